"""What the coordinator runs: round loop, aggregation, checkpoints, synthesis, release and its verification."""
