"""What runs inside a hospital: ingest, cohort store, private training, ledger, policy, outbox, Flower ClientApp."""
