"""Auditing the private mechanisms: what a run with canaries proves of epsilon, and whether they do what they say."""
