"""Fitting models to noisy statistics: post-processing at the coordinator."""
