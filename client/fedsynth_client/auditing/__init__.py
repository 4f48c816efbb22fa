"""Auditing the site's own private computation: the real training functions, run on made-up patients only."""
