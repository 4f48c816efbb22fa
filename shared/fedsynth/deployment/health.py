"""Whether a Flower process lives, asked over the standard gRPC health service (``grpc.health.v1``)."""

from __future__ import annotations

from fedsynth.deployment.network import Unreachable, split_address

_SECONDS = 3.0


def serving(address: str) -> str:
    """Ask the health service at `address` (host:port, no TLS: it is bound to this machine or a container's network).

    Raises:
        UsageError: ``address_invalid``.
        Unreachable: ``health_unreachable``: nothing answers; ``health_not_grpc``: something else does;
            ``not_serving``: it answers that it does not serve.
    """
    import grpc  # type: ignore[import-untyped]
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

    split_address(address)
    # A local call never goes through a proxy.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
        except grpc.RpcError as error:
            raise _failure(address, error.code().name) from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise Unreachable("not_serving", f"{address} says {name}.", "Wait a moment; then look at its log.")
    return f"{address} serves"


def _failure(address: str, code: str) -> Unreachable:
    if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        return Unreachable(
            "health_unreachable",
            f"No health service answers at {address}.",
            "Is it started? Its log says why it ended.",
        )
    return Unreachable(
        "health_not_grpc", f"What answers at {address} is no health service.", "Check the address in the settings."
    )
