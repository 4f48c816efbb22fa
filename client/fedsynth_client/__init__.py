"""What runs inside a hospital: ingest, cohort store, private training, ledger, policy, outbox, Flower ClientApp."""

import fedsynth  # noqa: F401  (it switches Flower's telemetry off, which must happen before Flower is imported)
