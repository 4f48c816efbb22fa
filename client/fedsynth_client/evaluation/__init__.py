"""What whoever holds real patients can find out about a release: `fedsynth evaluate`."""
