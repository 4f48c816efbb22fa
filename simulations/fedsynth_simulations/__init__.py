"""Simulated hospitals and a whole study on one machine."""

import fedsynth  # noqa: F401  (it switches Flower's telemetry off, which must happen before Flower is imported)
