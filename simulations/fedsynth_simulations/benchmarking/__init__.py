"""What the benchmarks of `simulations/benchmarks` share: cohorts, recipes, and the yardstick they are measured by."""
