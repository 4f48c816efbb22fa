"""Differential privacy: noise, sampling, the private step, and what it costs."""
