"""The runner: which tasks it lets in, what it answers to the others, and that nothing of a bundle is ever unpacked.

The SuperNode is played by an object that hands out one task and notes what comes back.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import context_to_proto, message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse, PushObjectResponse
from flwr.proto.run_pb2 import Run
from flwr.proto.runtime_pb2 import (
    PullAppMessagesResponse,
    PullTaskInputResponse,
    PushAppMessagesResponse,
    PushTaskOutputRequest,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedsynth.deployment.bundle import _PYPROJECT, bundle_bytes, bundle_sha256
from fedsynth.deployment.runtime import RuntimeDoor
from fedsynth.errors import Refused, UsageError
from fedsynth.plan import StudyPlan
from fedsynth.records import MESSAGE_TYPES, check_reply
from fedsynth_client.app import make_app
from fedsynth_client.node import admission, delivery
from fedsynth_client.node.admission import check_bundle, check_kind, check_size, size_limit
from fedsynth_client.node.environment import check_import_path, installed_roots, strays
from fedsynth_client.node.runner import Runner, main, read_runner_status
from fedsynth_client.policy import save_policy
from fedsynth_client.site import Site

NODE, RUN = 4711, 99


class SuperNode:
    """Hands out one task and notes what comes back; `forget` makes it lose the task."""

    def __init__(self, message: Message, bundle: bytes, declared: str | None = None) -> None:
        message.metadata.__dict__["_message_id"] = message.object_id
        self.objects = {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
        self.tree: ObjectTree = get_object_tree(message)
        self.announced = message_to_proto(message)
        self.bundle, self.declared = bundle, declared or hashlib.sha256(bundle).hexdigest()
        self.pulled: list[str] = []
        self.discarded: list[str] = []
        self.pushed: dict[str, bytes] = {}
        self.replies: list[Any] = []
        self.outputs: list[PushTaskOutputRequest] = []
        self._client = SimpleNamespace(event_hooks={})

    def PullTaskInput(self, _: object) -> PullTaskInputResponse:
        context = Context(run_id=RUN, node_id=NODE, node_config={}, state=RecordDict(), run_config={"study": "x"})
        return PullTaskInputResponse(
            context=context_to_proto(context),
            run=Run(run_id=RUN),
            fab=Fab(hash_str=self.declared, content=self.bundle),
            task_id=5,
        )

    def PullMessages(self, _: object) -> PullAppMessagesResponse:
        return PullAppMessagesResponse(messages_list=[self.announced], message_object_trees=[self.tree])

    def PullObject(self, request: Any) -> PullObjectResponse:
        self.pulled.append(request.object_id)
        content = self.objects.get(request.object_id)
        return PullObjectResponse(
            object_found=content is not None, object_available=True, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.discarded.append(request.message_object_id)

    def PushMessages(self, request: Any) -> PushAppMessagesResponse:
        (reply,), (tree,) = request.messages_list, request.message_object_trees
        self.replies.append((reply, tree))
        ids = [each.object_id for each in iterate_object_tree(tree)]
        return PushAppMessagesResponse(message_ids=[reply.metadata.message_id], objects_to_push=ids, session_id="s")

    def PushObject(self, request: Any) -> PushObjectResponse:
        self.pushed[request.object_id] = request.object_content
        return PushObjectResponse(stored=True)

    def PushTaskOutput(self, request: PushTaskOutputRequest) -> None:
        self.outputs.append(request)

    def SendTaskHeartbeat(self, _: object) -> SimpleNamespace:
        return SimpleNamespace(success=True)

    def reply(self) -> Message:
        """What the coordinator would get."""
        ((proto, tree),) = self.replies
        if not proto.HasField("error") and tree.object_id in self.pushed:
            found = inflate_object_from_contents(tree.object_id, dict(self.pushed), keep_object_contents=True)
            assert isinstance(found, Message)
            return found
        return message_from_proto(proto)

    def refusal(self) -> str:
        content = self.reply().content
        assert set(content) == {"refusal"}
        return str(content.config_records["refusal"]["code"])


class Door(RuntimeDoor):
    """A door behind which `node` stands."""

    node: SuperNode

    @contextmanager
    def task_client(self, token: str, component: str) -> Iterator[Any]:  # type: ignore[override]
        yield self.node


def message(content: RecordDict, message_type: str = "query.site", source: int = 1) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, source, 5
    return Message(content, dst_node_id=NODE, message_type=message_type, group_id="3")


def answered(
    site: Site, asked: Message, bundle: bytes | None = None, declared: str | None = None, app: ClientApp | None = None
) -> SuperNode:
    """Let the runner of `site` do one task."""
    node = SuperNode(asked, bundle_bytes() if bundle is None else bundle, declared)
    done_by(site, node, make_app(lambda context: site.folder) if app is None else app)
    return node


def done_by(site: Site, node: SuperNode, app: ClientApp) -> None:
    door = Door("127.0.0.1:1", b"", b"")
    object.__setattr__(door, "node", node)
    Runner(site, app, door, frozenset({bundle_sha256()})).work("token")


def forbidden(*_: object) -> Any:
    raise AssertionError("the app was called")


@pytest.fixture
def no_app() -> ClientApp:
    """An app that must not be reached."""
    app = ClientApp()
    app.query("site")(forbidden)
    for message_type in MESSAGE_TYPES.values():
        app.train(message_type.partition(".")[2])(forbidden)
    return app


# --- what is answered ----------------------------------------------------------------------------------------------


def test_a_question_for_the_sites_name_is_answered(tiny_site: Site) -> None:
    node = answered(tiny_site, message(RecordDict()))
    assert dict(node.reply().content.config_records["site"]) == {"name": "a"}
    (output,) = node.outputs
    assert output.sub_status == "completed"
    assert not output.HasField("context")  # nothing of the task stays in the SuperNode's memory
    assert node.discarded == [node.tree.object_id]
    status = read_runner_status(tiny_site.folder)
    assert status is not None
    assert status.last is not None
    assert (status.tasks, status.last.what, status.last.outcome) == (1, "'query.site' round 3", "answered")


def test_a_task_is_answered_by_the_installed_app(
    tiny_site: Site, tiny_plan: StudyPlan, task_content: Callable[..., RecordDict]
) -> None:
    content = task_content(tiny_plan, "autoencoder")
    reply = answered(tiny_site, message(content, "train.autoencoder")).reply()
    check_reply(reply.content, "autoencoder")
    assert "refusal" not in reply.content
    assert [entry.kind for entry in tiny_site.ledger().entries()] == ["charge", "released", "sent"]


# --- what is not let in --------------------------------------------------------------------------------------------


def test_a_foreign_bundle_is_refused_without_a_look_into_it(tiny_site: Site, no_app: ClientApp, tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_files

    foreign = build_fab_from_files(
        {
            "pyproject.toml": _PYPROJECT.encode(),
            "torch.py": f"open({str(tmp_path / 'owned')!r}, 'w')".encode(),
        }
    )[0]
    node = answered(tiny_site, message(RecordDict()), foreign, app=no_app)
    assert node.refusal() == "bundle_not_allowed"
    assert not (tmp_path / "owned").exists()
    assert "bundle_not_allowed" in (tiny_site.folder / "site.log").read_text()


def test_a_bundle_that_only_claims_an_allowed_hash_is_refused(tiny_site: Site, no_app: ClientApp) -> None:
    node = answered(tiny_site, message(RecordDict()), b"something else", bundle_sha256(), no_app)
    assert node.refusal() == "bundle_altered"


@pytest.mark.parametrize(
    "message_type", ["train", "query", "evaluate", "evaluate.site", "train.everything", "query.files"]
)
def test_other_message_types_are_refused(tiny_site: Site, no_app: ClientApp, message_type: str) -> None:
    assert answered(tiny_site, message(RecordDict(), message_type), app=no_app).refusal() == "message_type_not_allowed"


def test_a_message_from_another_node_is_refused(tiny_site: Site, no_app: ClientApp) -> None:
    assert answered(tiny_site, message(RecordDict(), source=8), app=no_app).refusal() == "sender_not_allowed"


def test_a_message_that_is_another_one_inside_is_refused(tiny_site: Site, no_app: ClientApp) -> None:
    """The announcement is one of ours, the content is of a type that the app would go by."""
    asked = message(RecordDict(), "train.autoencoder")
    node = SuperNode(asked, bundle_bytes())
    node.announced.metadata.message_type = "query.site"
    done_by(tiny_site, node, no_app)
    assert node.refusal() == "message_differs"


def test_a_message_that_is_too_large_is_refused_and_all_of_it_waited_for(
    tiny_site: Site, no_app: ClientApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "ALWAYS_BYTES", 10_000)
    asked = message(RecordDict({"x": ArrayRecord({str(i): Array(np.full(1000, i)) for i in range(20)})}))
    node = answered(tiny_site, asked, app=no_app)
    assert node.refusal() == "message_too_large"
    # A refused message is discarded only when the SuperNode holds all of it; else its own receipt breaks off.
    assert set(node.pulled) == set(node.objects)
    assert node.discarded == [node.tree.object_id]


def test_few_bytes_that_would_unpack_to_many_are_refused(tiny_site: Site, no_app: ClientApp) -> None:
    array = Array(np.zeros(200_000, dtype=np.uint8))
    node = SuperNode(message(RecordDict({"x": ArrayRecord({"x": array})})), bundle_bytes())
    (key,) = [key for key, content in node.objects.items() if content.startswith(b"Array ")]
    head, body = node.objects[key].split(b"\x00", 1)
    many = body.replace(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [' + b"0, " * 999 + b"0]")
    assert many != body
    node.objects[key] = head.rsplit(b" ", 1)[0] + b" %d\x00" % len(many) + many
    assert sum(map(len, node.objects.values())) < 1_000_000
    done_by(tiny_site, node, no_app)
    assert node.refusal() == "message_too_large"


def test_an_array_made_of_arrays_is_refused() -> None:
    inner = b'Array  22\x00{"arraychunk_ids": []}'
    outer = b"Array " + b"a" * 64 + b' 24\x00{"arraychunk_ids": [0,0]}'
    with pytest.raises(Refused) as refused:
        delivery.unpacked_bytes({"a" * 64: inner, "b" * 64: outer})
    assert refused.value.code == "message_malformed"


def test_bytes_that_are_no_message_are_refused(tiny_site: Site, no_app: ClientApp) -> None:
    node = SuperNode(message(RecordDict()), bundle_bytes())
    node.objects = dict.fromkeys(node.objects, b"\x80\x04K\x01.")
    done_by(tiny_site, node, no_app)
    assert node.refusal() == "message_malformed"


def test_a_message_that_the_supernode_lost_ends_the_task_and_not_the_runner(tiny_site: Site, no_app: ClientApp) -> None:
    node = SuperNode(message(RecordDict()), bundle_bytes())
    node.objects = {}
    done_by(tiny_site, node, no_app)
    status = read_runner_status(tiny_site.folder)
    assert status is not None
    assert status.last is not None
    assert status.last.outcome == "task_lost"
    assert node.replies == []
    assert [output.details for output in node.outputs] == ["message_lost"]


def test_a_message_that_never_comes_whole_is_not_waited_for_longer_than_its_answer_is(
    tiny_site: Site, no_app: ClientApp
) -> None:
    class Stuck(SuperNode):
        """Its run ended while it was receiving: the objects are announced, and never come."""

        def PullObject(self, request: Any) -> PullObjectResponse:
            return PullObjectResponse(object_found=True, object_available=False)

    node = Stuck(message(RecordDict()), bundle_bytes())
    node.announced.metadata.ttl = 0.5
    done_by(tiny_site, node, no_app)
    status = read_runner_status(tiny_site.folder)
    assert status is not None and status.last is not None
    assert (status.last.outcome, node.replies) == ("task_lost", [])
    assert status.last.seconds < 10


def test_a_reply_that_the_supernode_drops_is_not_followed_by_another(tiny_site: Site) -> None:
    class Late(SuperNode):
        """Its round is over: it drops the reply's objects while they arrive."""

        def PushObject(self, request: Any) -> PushObjectResponse:
            return PushObjectResponse(stored=False)

    node = Late(message(RecordDict()), bundle_bytes())
    done_by(tiny_site, node, make_app(lambda _: tiny_site.folder))
    assert len(node.replies) == 1  # a second would go out in place of the next task's
    assert [(output.sub_status, output.details) for output in node.outputs] == [("failed", "reply_lost")]
    status = read_runner_status(tiny_site.folder)
    assert status is not None and status.last is not None
    assert status.last.outcome == "task_lost"


def test_the_text_of_an_error_stays_at_home(tiny_site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    app = ClientApp()

    @app.query("site")
    def fail(message: Message, context: Context) -> Message:
        raise RuntimeError("Ursula Beispiel")

    node = answered(tiny_site, message(RecordDict()), app=app)
    assert node.refusal() == "internal_error"
    assert b"Ursula" not in b"".join(node.pushed.values())
    assert all("Ursula" not in output.details for output in node.outputs)
    assert "Ursula" in (tiny_site.folder / "site.log").read_text()
    assert "Ursula" not in capsys.readouterr().err


def test_that_a_name_was_told_is_logged(tiny_site: Site) -> None:
    answered(tiny_site, message(RecordDict()))
    assert "asked for its name by node 1" in (tiny_site.folder / "site.log").read_text()


def test_a_stop_in_the_middle_of_a_task_is_told_and_ends_the_runner(tiny_site: Site) -> None:
    app = ClientApp()

    @app.query("site")
    def stopped(message: Message, context: Context) -> Message:
        raise SystemExit(0)

    node = SuperNode(message(RecordDict()), bundle_bytes())
    with pytest.raises(SystemExit):
        done_by(tiny_site, node, app)
    reply = node.reply()
    assert (reply.error.code, reply.error.reason) == (8, "site_stopped")
    (output,) = node.outputs
    assert output.sub_status == "failed"


def test_a_log_line_holds_no_text_of_the_other_side(tiny_site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    asked = message(RecordDict())
    asked.metadata.group_id = "1\nrunner of site a is ready"
    answered(tiny_site, asked)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "ready" not in line


# --- the rules one by one ------------------------------------------------------------------------------------------


def test_rules_of_admission() -> None:
    check_bundle(bundle_bytes(), bundle_sha256(), [bundle_sha256()])
    for message_type in [*MESSAGE_TYPES.values(), "query.site"]:
        check_kind(message_type, 1, 1)
    check_size(10, 100, 100)
    for objects, size in ((10, 101), (admission.LARGEST_TREE + 1, 1)):
        with pytest.raises(Refused):
            check_size(objects, size, 100)


def test_the_limit_grows_with_an_approved_plans_tasks_only(
    tiny_site: Site, tiny_plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "ALWAYS_BYTES", 100)
    assert size_limit(tiny_site, "query.site") == 100
    allowed = size_limit(tiny_site, "train.gan")
    assert allowed > 10_000
    assert size_limit(tiny_site, "train.moments") == 100  # not in the plan
    save_policy(tiny_site.policy().model_copy(update={"approved_plans": []}), tiny_site.policy_path)
    assert size_limit(tiny_site, "train.gan") == 100
    tiny_site.policy_path.unlink()
    assert size_limit(tiny_site, "train.gan") == 100


@pytest.mark.parametrize(
    ("headers", "fits"), [({"content-length": "100"}, True), ({"content-length": "101"}, False), ({}, False)]
)
def test_a_response_is_refused_before_it_is_read(headers: dict[str, str], fits: bool) -> None:
    def body() -> Iterator[bytes]:
        if not fits:
            raise AssertionError("the body was read")
        yield b"x" * 100

    client = SimpleNamespace(
        _client=httpx.Client(
            transport=httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, content=body()))
        )
    )
    delivery.bound_responses(client, 100)  # type: ignore[arg-type]
    if fits:
        assert len(client._client.get("https://x.invalid").content) == 100
    else:
        with pytest.raises(Refused) as refused:
            client._client.get("https://x.invalid")
        assert refused.value.code == "message_too_large"


# --- where the code comes from -------------------------------------------------------------------------------------


def test_modules_of_this_process_are_installed_ones() -> None:
    assert strays(sys.modules, installed_roots()) == []


def test_a_module_from_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    spec = __import__("importlib.util").util.spec_from_file_location("torch", tmp_path / "torch.py")
    stray = ModuleType("torch")
    stray.__spec__ = spec
    assert strays({"torch": stray, "json": json}, installed_roots()) == ["torch"]


def test_import_paths_into_working_or_site_folder_are_refused(tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "lib"
    check_import_path([str(elsewhere)], tmp_path, site, True)
    for path in ("", str(tmp_path), str(site), str(site / "run" / "flower" / "apps")):
        with pytest.raises(UsageError) as refused:
            check_import_path([str(elsewhere), path], Path.cwd() if path == "" else tmp_path, site, True)
        assert refused.value.code == "import_path_unsafe"
    with pytest.raises(UsageError):
        check_import_path([str(elsewhere)], tmp_path, site, False)


# --- as a process --------------------------------------------------------------------------------------------------


def test_wrong_settings_end_the_process_with_the_code_that_is_not_repeated(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 2
    assert main([]) == 2


def test_the_process_does_not_import_from_where_it_was_started(tmp_path: Path) -> None:
    for planted in ("torch.py", "fedsynth_client/__init__.py", "flwr.py", "json.py"):
        trap = tmp_path / "trap" / planted
        trap.parent.mkdir(parents=True, exist_ok=True)
        trap.write_text(f"open({str(tmp_path / 'owned')!r}, 'w').close()")
    command = [sys.executable, "-I", "-m", "fedsynth_client.node.runner", str(tmp_path / "nowhere")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "trap")}
    ended = subprocess.run(command, cwd=tmp_path / "trap", env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "node_settings_missing" in ended.stderr
    assert not (tmp_path / "owned").exists()


def test_sigterm_is_a_clean_end_but_for_half_a_reply() -> None:
    from fedsynth_client.node.runner import _end_on_signals

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        runner = SimpleNamespace(busy=True, delivering=True, ending=False)
        _end_on_signals(runner)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGINT)  # Flower's way to say that a token has died: what is trained goes on
        os.kill(os.getpid(), signal.SIGTERM)
        assert runner.ending
        runner.delivering = False
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 0
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
