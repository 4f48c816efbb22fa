"""The contract with Flower's internals: what the site's node takes from them must be there and mean what it meant.

They are no public interface. When this fails after an update of Flower, read `fedsynth_client.node.delivery`,
`fedsynth_client.node.registration` and `fedsynth.deployment.runtime` against the new version before anything else.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version

import flwr.common.constant as constant
import pytest
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PullTaskInputResponse, PushTaskOutputRequest
from flwr.supercore import telemetry
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode
from flwr.supernode.runtime import run_clientapp

from fedsynth.deployment.machine import FLOWER


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_installed_flower_is_the_one_this_was_written_for() -> None:
    assert version("flwr") == FLOWER == "1.41.0"


def test_functions_take_what_we_give_them() -> None:
    assert parameters(run_clientapp.pull_task_input) == ["client"]
    assert parameters(run_clientapp.push_message) == ["client", "message", "context"]
    assert parameters(run_clientapp.push_task_output) == ["client", "context", "sub_status", "details"]
    assert parameters(inflatable_utils.pull_objects)[:2] == ["object_ids", "pull_object_fn"]
    assert "max_time" in parameters(inflatable_utils.pull_objects)
    assert parameters(inflatable_utils.inflate_object_from_contents)[:2] == ["object_id", "object_contents"]


def test_the_runtime_api_has_the_calls_we_make() -> None:
    task = ("AcquireTask", "PullTaskInput", "PushTaskOutput", "SendTaskHeartbeat")
    for call in (*task, "PullMessages", "PushMessages", "PullObject", "PushObject", "ConfirmMessageReceived"):
        assert callable(getattr(RuntimeHttpClient, call)), call


def test_messages_have_the_fields_we_read() -> None:
    assert {"context", "run", "fab", "task_id"} <= set(PullTaskInputResponse.DESCRIPTOR.fields_by_name)
    assert {"messages_list", "message_object_trees"} <= set(PullAppMessagesResponse.DESCRIPTOR.fields_by_name)
    assert {"context", "sub_status", "details"} <= set(PushTaskOutputRequest.DESCRIPTOR.fields_by_name)
    assert {"object_id", "children"} <= set(ObjectTree.DESCRIPTOR.fields_by_name)


def test_the_http_client_calls_response_hooks_before_it_reads_the_body() -> None:
    import httpx

    read: list[bool] = []
    client = RuntimeHttpClient("https://nowhere.invalid")
    client._client = httpx.Client(
        transport=httpx.MockTransport(lambda request: httpx.Response(200, stream=httpx.ByteStream(b"x")))
    )
    client._client.event_hooks = {"response": [lambda response: read.append(hasattr(response, "_content"))]}
    client._client.get("https://nowhere.invalid")
    assert read == [False]


def test_packed_objects_name_type_children_and_length() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(RecordDict(), dst_node_id=2, message_type="query.site")
    kind, children, length = get_object_head_values_from_object_content(message.deflate())
    assert (kind, len(children)) == ("Message", 1)
    assert length > 0


def test_constants_mean_what_they_meant() -> None:
    assert constant.SUPERLINK_NODE_ID == 1
    assert constant.ErrorCode.CLIENT_APP_CRASHED == 8
    # No Exception, so that it passes handlers of those: it must be named wherever it is to be caught.
    assert not issubclass(RunNotRunningException, Exception)
    assert telemetry.FLWR_TELEMETRY_ENABLED == "0"


def test_a_node_without_a_place_is_looked_up_before_its_interval_is_judged() -> None:
    """What `registration` relies on: the key first, then the interval, and nothing changed by either."""
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.error import FlowerError

    class Link:
        def __init__(self, known: bool) -> None:
            self.known = known

        def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
            return 7 if self.known else None

        def activate_node(self, *_: object) -> bool:
            raise AssertionError("the node's place was taken")

    question = ActivateNodeRequest(public_key=b"k", heartbeat_interval=0.0)
    for known, code in ((True, ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL), (False, 2004)):
        with pytest.raises(FlowerError) as answered:
            fleet_handlers.activate_node(question, Link(known))  # type: ignore[arg-type]
        assert answered.value.code == code


def test_the_supernode_knows_the_options_we_start_it_with() -> None:
    known = {option for action in _parse_args_run_supernode()._actions for option in action.option_strings}
    assert {
        "--superlink",
        "--root-certificates",
        "--auth-supernode-private-key",
        "--isolation",
        "--superexec-auth-secret-file",
        "--host",
        "--port",
        "--ssl-certfile",
        "--ssl-keyfile",
        "--ssl-ca-certfile",
        "--health-server-address",
    } <= known
