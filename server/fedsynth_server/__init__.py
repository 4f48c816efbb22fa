"""What the coordinator runs: round loop, aggregation, checkpoints, synthesis, release and its verification."""

import fedsynth  # noqa: F401  (it switches Flower's telemetry off, which must happen before Flower is imported)
