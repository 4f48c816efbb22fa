"""What both sides of a federation must agree on: plan, models, private step, accounting, metrics, wire records."""

import os

__version__ = "0.1.0"

# Flower reports usage and looks for updates unless it is told not to before its first import. A hospital's node and a
# coordinator must contact nobody but each other, so this is not left to the environment.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
