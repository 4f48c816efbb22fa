"""The site's own runner: takes tasks from the SuperNode and lets the *installed* ClientApp answer them.

``python -I -m fedsynth_client.node.runner FOLDER``, usually started by `fedsynth site start`. It stands where Flower's
executor would: that one unpacks the coordinator's bundle and runs what is in it. This one accepts a run only if its bundle
has an allowed hash, looks at type, sender and size of a message before it unpacks it, and keeps the text of every error
at home: what leaves is a code.

Exit codes: 0 after SIGTERM; 2 for wrong settings, where a restart would be no use; 1 for the rest.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import httpx
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore import telemetry
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from pydantic import BaseModel

from fedsynth.deployment.bundle import bundle_sha256
from fedsynth.deployment.runtime import RuntimeDoor, heartbeat, take_tasks
from fedsynth.errors import ExitCode, FedsynthError, Refused, UsageError
from fedsynth.files import DISK_FULL, write_atomic
from fedsynth.progress import say
from fedsynth.records import refusal
from fedsynth_client.app import make_app
from fedsynth_client.node import delivery
from fedsynth_client.node.admission import ALWAYS_BYTES, check_bundle, check_kind, size_limit
from fedsynth_client.node.environment import check_environment
from fedsynth_client.node.settings import load_settings, runtime_ca_path, secret_path
from fedsynth_client.site import Site

_TASK_TYPE = "flwr-clientapp"
_SECONDS_TO_END = 8  # for the last words to the SuperNode, which may be gone itself
_RESPONSE_MARGIN = 16 * 2**20  # beside a message's bytes a response holds Flower's own, or the bundle


class LastTask(BaseModel):
    """The task that the runner answered last: when, what, how it ended, how long it took."""

    at: datetime
    what: str
    outcome: str
    seconds: float


class RunnerStatus(BaseModel):
    """What ``run/runner.json`` holds."""

    pid: int
    since: datetime
    tasks: int = 0
    last: LastTask | None = None


class Runner:
    """Answers tasks for the site in `folder`, one after another."""

    def __init__(self, site: Site, app: ClientApp, door: RuntimeDoor, bundles: frozenset[str]) -> None:
        self.site = site
        self.busy = self.delivering = self.ending = False
        self._app = app
        self.door = door
        self._bundles = bundles
        self._status = RunnerStatus(pid=os.getpid(), since=datetime.now(UTC))

    def work(self, token: str) -> None:
        """Answer the task of `token`. Whatever goes wrong is told in full in the site's log, and by a code to the others."""
        self.busy, started, what, outcome = True, time.monotonic(), "task", "stopped"
        try:
            with self.door.task_client(token, _TASK_TYPE) as client, heartbeat(client):
                delivery.bound_responses(client, ALWAYS_BYTES + _RESPONSE_MARGIN)
                announcement = delivery.announced(client)
                what = _what(announcement)
                outcome = self._answer(client, announcement)
        except RunNotRunningException:
            outcome = "run_ended"
            self.site.log.info("%s: the coordinator ended the run; the answer stays stored", what)
        except (delivery.MessageLost, delivery.ReplyLost, httpx.HTTPError) as error:
            # The SuperNode has lost the task, dropped the reply or is gone; what was trained is stored, for when it is
            # asked for again.
            outcome = "task_lost"
            self.site.log.warning("%s: the SuperNode does not know this task any more (%s)", what, type(error).__name__)
        except Exception as error:
            outcome = error.code if isinstance(error, FedsynthError) else "internal_error"
            self.site.log.exception("%s could not be taken or answered", what)
        finally:
            self.busy = False
            self._note(what, outcome, time.monotonic() - started)

    def _answer(self, client: RuntimeHttpClient, announcement: delivery.Announcement) -> str:
        """Admit or refuse, answer, and end the task; returns the refusal's code or ``answered``.

        A SuperNode sends one reply for every message that it takes. A second reply to the same message would go out in place
        of the next one's, and all answers from then on would be one message late; so none is made once a reply was begun.
        """
        try:
            content = self._content(client, announcement)
        except SystemExit:
            delivery.give_up(client, announcement, "site_stopped")
            raise
        except delivery.MessageLost:
            delivery.abandon(client)
            raise
        self.delivering = True
        try:
            delivery.answer(client, announcement, content)
        finally:
            self.delivering = False
        if self.ending:
            raise SystemExit(ExitCode.OK)
        refused = content.config_records.get("refusal")
        return str(refused["code"]) if refused is not None else "answered"

    def _content(self, client: RuntimeHttpClient, announcement: delivery.Announcement) -> RecordDict:
        try:
            try:
                message = self._admit(client, announcement)
            except Refused as error:
                self.site.log.warning("%s refused: %s", _what(announcement), error, exc_info=error.__cause__)
                content = refusal(error.code)
                delivery.drain(client, announcement)
            else:
                content = self._app(message, announcement.context).content
            delivery.discard(client, announcement)
        except (RunNotRunningException, delivery.MessageLost, httpx.HTTPError):
            raise
        except Exception:
            self.site.log.exception("%s failed", _what(announcement))
            return refusal("internal_error")
        return content

    def _admit(self, client: RuntimeHttpClient, announcement: delivery.Announcement) -> Message:
        metadata = announcement.message.metadata
        check_bundle(announcement.bundle, announcement.declared, self._bundles)
        check_kind(metadata.message_type, metadata.src_node_id, delivery.COORDINATOR)
        limit = size_limit(self.site, metadata.message_type)
        delivery.bound_responses(client, limit + _RESPONSE_MARGIN)
        return delivery.fetch(client, announcement, limit)

    def _note(self, what: str, outcome: str, seconds: float) -> None:
        """One plain line, and the status file; a full disk must not end the runner."""
        last = LastTask(at=datetime.now(UTC), what=what, outcome=outcome, seconds=round(seconds, 2))
        self._status = self._status.model_copy(update={"tasks": self._status.tasks + 1, "last": last})
        self.write_status()
        say(f"{last.at:%Y-%m-%d %H:%M:%S} {what}: {outcome}, {seconds:.1f} s")

    def write_status(self) -> None:
        """Write ``run/runner.json``."""
        path = status_path(self.site.folder)
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, self._status.model_dump_json(indent=2).encode())
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise


def _what(announcement: delivery.Announcement) -> str:
    """Type and round as a line of a log may hold them: both are the other side's text."""
    metadata = announcement.message.metadata
    group = f" round {int(metadata.group_id)}" if metadata.group_id.isdecimal() and len(metadata.group_id) < 7 else ""
    return f"{metadata.message_type[:40]!r}{group}"


def status_path(folder: Path) -> Path:
    """Where the runner says what it does."""
    return folder / "run" / "runner.json"


def read_runner_status(folder: Path) -> RunnerStatus | None:
    """What the runner last wrote; None when it never ran."""
    path = status_path(folder)
    return RunnerStatus.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def make_runner(folder: Path) -> Runner:
    """The runner of the site in `folder`.

    Raises:
        UsageError: settings, keys or secret are missing.
        FedsynthError: the policy is missing, or code does not come from the installed environment.
    """
    settings, site = load_settings(folder), Site(folder)
    site.policy()
    door = RuntimeDoor(settings.runtime, _bytes(runtime_ca_path(folder)), _bytes(secret_path(folder)))
    app = make_app(lambda context: folder)
    check_environment(folder)
    return Runner(site, app, door, frozenset({bundle_sha256(), *settings.bundles}))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            "key_missing",
            f"{path} cannot be read: {error.strerror}.",
            "Make the node's keys with `fedsynth site init FOLDER --gateway HOST:PORT --ca FILE`.",
        ) from None


def _check_silent() -> None:
    # Flower took this from the environment when it was imported: `fedsynth` must have been imported first.
    if telemetry.FLWR_TELEMETRY_ENABLED != "0" or os.environ.get("FLWR_DISABLE_UPDATE_CHECK") != "1":
        raise UsageError("reporting_not_off", "Flower was imported before its reporting was switched off.")


def _end_on_signals(runner: Runner) -> None:
    def end(number: int, frame: FrameType | None) -> None:
        signal.alarm(_SECONDS_TO_END)  # whatever still hangs then is ended by the operating system
        if runner.delivering:  # a SuperNode waits for ever for the rest of half a reply
            runner.ending = True
            return
        raise SystemExit(ExitCode.OK)

    def locked_out(number: int, frame: FrameType | None) -> None:
        # Flower interrupts a process whose secret or token the SuperNode does not accept. A token dies with the SuperNode
        # that gave it out: what is being trained then is finished and stored, for the coordinator will ask again.
        if runner.busy:
            say("the SuperNode does not know this task any more; its result is kept for when it is asked for again")
            return
        say("the SuperNode does not accept this runner's secret: both need the same keys/superexec.secret")
        os._exit(ExitCode.FAILED)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, locked_out)


def main(arguments: list[str]) -> int:
    """Run until a signal comes; returns the exit code."""
    if len(arguments) != 1:
        say("usage: python -I -m fedsynth_client.node.runner FOLDER")
        return ExitCode.USAGE
    folder = Path(arguments[0]).resolve()
    try:
        _check_silent()
        runner = make_runner(folder)
        _end_on_signals(runner)
        runner.write_status()
        say(f"runner of site {runner.site.policy().site} is ready")
        take_tasks(runner.door, _TASK_TYPE, runner.work, lambda: False)
    except FedsynthError as error:
        say(f"Error: {error}")
        return ExitCode.USAGE
    except httpx.HTTPError as error:
        # Flower tries an unreachable SuperNode again by itself; what comes through is a certificate that does not fit.
        say(f"Error: the SuperNode at {load_settings(folder).runtime} cannot be used: {error} [runtime_unusable]")
        return ExitCode.FAILED
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
