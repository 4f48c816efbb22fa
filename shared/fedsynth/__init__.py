"""What both sides of a federation must agree on: plan, models, private step, accounting, metrics, wire records."""

__version__ = "0.1.0"
