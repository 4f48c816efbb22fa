"""Simulated hospitals: folders of the files that hospitals really have, planted identifiers and faults included."""

from fedsynth_simulations.hospitals.write import write_hospitals

__all__ = ["write_hospitals"]
