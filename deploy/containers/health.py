"""Ask a Flower process for its health (gRPC, grpc.health.v1): ``health.py [HOST:PORT]``; exit code 0 if it serves.

Without an argument the address is that of the environment variable FEDSYNTH_HEALTH.
"""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

_SECONDS = 4.0  # shorter than the timeout of the container engine's own check


def serving(address: str) -> bool:
    """Whether the process at `address` (host:port) says that it serves."""
    # Without the option grpc would ask the proxy that the node uses for its way out.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=_SECONDS)
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}", file=sys.stderr)
            return False
    return bool(answer.status == HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(0 if serving(sys.argv[1] if len(sys.argv) > 1 else os.environ["FEDSYNTH_HEALTH"]) else 1)
