"""Simulated hospitals and a whole study on one machine."""
