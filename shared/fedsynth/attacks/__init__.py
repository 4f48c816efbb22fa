"""Attacks on a study's patients: from its release, and from what the coordinator saw of its training."""
