"""Private local training, one module a file: plain functions from weights to weights."""
