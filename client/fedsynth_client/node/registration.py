"""Does the coordinator know this node's key? Asked without taking the node's place.

A node takes its place by an ActivateNode request. SuperLink looks the signed key up first and then refuses a heartbeat
interval of 0 seconds; so a request with that interval tells whether the key is registered and changes nothing, even
while the node is running. Flower 1.41: superlink/servicer/fleet/fleet_handlers.py, `activate_node`.
"""

from __future__ import annotations

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedsynth.deployment.network import Unreachable
from fedsynth.errors import Refused, UsageError

_PATH = "/v1/fleet/activate-node"
_METHOD = "/flwr.proto.Fleet/ActivateNode"
_NO_INTERVAL = 0.0


def registered(client: httpx.Client, private_key: bytes) -> str:
    """Ask the coordinator whether it knows the public half of `private_key`.

    Args:
        client: an HTTPS client whose base URL is the gateway, and which trusts the coordinator's authority only.
        private_key: OpenSSH PEM.

    Raises:
        UsageError: ``node_key_invalid``.
        Refused: ``key_not_registered``: unknown, or revoked. ``signature_refused``: the clock is off.
        Unreachable: ``gateway_no_answer``, ``superlink_unreachable``, ``registration_unknown``.
    """
    try:
        key = load_ssh_private_key(private_key, None)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UsageError(
            "node_key_invalid", "The node key is no elliptic-curve key in OpenSSH form.", "Make a new one."
        )
    question = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=_NO_INTERVAL)
    request = client.build_request(
        "POST",
        _PATH,
        content=question.SerializeToString(deterministic=True),
        headers={"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE},
    )
    signer = NodeAuthHttpInterceptor(key, key.public_key())
    context = ProtobufRequestContext(rpc_method=_METHOD, message=question, request=request)
    try:
        response = signer.intercept(context, lambda signed: client.send(signed.request))
    except httpx.HTTPError:
        raise Unreachable(
            "gateway_no_answer", "The gateway does not answer a node's request.", "See the checks of the connection."
        ) from None
    return _judge(response)


def _judge(response: httpx.Response) -> str:
    if response.status_code == httpx.codes.UNAUTHORIZED:
        raise Refused(
            "signature_refused",
            "The coordinator does not accept the time that the node signs.",
            "Set this machine's clock by NTP.",
        )
    if response.status_code in (502, 503, 504):
        raise Unreachable(
            "superlink_unreachable",
            f"The gateway answers, but SuperLink behind it does not (HTTP {response.status_code}).",
            "A site can only wait.",
        )
    error = FlowerError.from_json(response.text)
    code = error.code if error is not None else None
    if code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
        return "node key is registered with the coordinator"
    if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        raise Refused(
            "key_not_registered",
            "The coordinator does not know this node's key, or has revoked it.",
            "Send keys/node.pub to the coordinator, who registers it with `fedsynth study add-site`.",
        )
    raise Unreachable(
        "registration_unknown",
        f"The coordinator answers with HTTP {response.status_code}, from which nothing can be told.",
        "Is it of the same version?",
    )
