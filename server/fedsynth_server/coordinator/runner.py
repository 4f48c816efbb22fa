"""The study runner: takes the study's run from SuperLink and does it with the installed ServerApp.

``python -m fedsynth_server.coordinator.runner FOLDER``. Flower's own executor would unpack the bundle that the run was
started with and import what is in it; whoever reached SuperLink could then run code here. This runner only compares the
bundle's hash with that of its own, and takes the study's folder from its own argument.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx
from flwr.app import RecordDict
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, fab_from_proto, run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import ServerApp
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedsynth.deployment.bundle import bundle_sha256
from fedsynth.deployment.runtime import RuntimeDoor, heartbeat, take_tasks
from fedsynth.errors import FedsynthError, UsageError
from fedsynth_server.app import make_app
from fedsynth_server.coordinator.bounded_grid import BoundedGrid, reply_limit
from fedsynth_server.coordinator.control import SuperlinkUnreachable, open_control
from fedsynth_server.coordinator.settings import Study
from fedsynth_server.rounds import Patience
from fedsynth_server.status import StatusFile, read_status

COMPONENT = "flwr-serverapp"
# SuperLink takes a run for dead when it has heard nothing of it for 60 s, so a longer wait for SuperLink gains nothing.
_SUPERLINK_AWAY_SECONDS = 75.0

_SUPERLINK_STARTS_SECONDS = 60.0

# How the process ends. After AGAIN the supervisor starts it anew, and the study goes on from its checkpoint; after UNUSABLE
# it does not, since keys or settings have to be mended first.
DONE, AGAIN, UNUSABLE = 0, 75, 78

log = logging.getLogger("fedsynth_server.coordinator.runner")


class Stopped(BaseException):
    """SIGTERM: somebody wants this process to end, whatever it is doing."""


@dataclass(frozen=True)
class Runner:
    """What a task is done with."""

    study: Study
    door: RuntimeDoor
    app: ServerApp
    bundle: str

    def work(self, token: str) -> None:
        """Do the task that was handed out with `token`, and report its outcome.

        Raises:
            Stopped: SIGTERM came; the run is ended at SuperLink.
            httpx.HTTPError, RunNotRunningException, KeyboardInterrupt: SuperLink is away or has ended the run.
        """
        grid = BoundedGrid(self.door.address, self.door.ca, token, reply_limit(self.study.plan))
        grid._retry_invoker.max_time = _SUPERLINK_AWAY_SECONDS
        run_id = 0
        try:
            with self.door.task_client(token, COMPONENT) as client, heartbeat(client):
                given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
                run_id = given.run.run_id
                TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, run_id
                TaskIdentity.node_id = given.context.node_id
                grid.set_run(run_from_proto(given.run))
                code = self._refused(fab_from_proto(given.fab).content)
                if not code:
                    context = context_from_proto(given.context)
                    context.run_config, context.state = {}, RecordDict()
                    code = self._run(grid, context)
                _report(grid._runtime_client, SubStatus.FAILED if code else SubStatus.COMPLETED, code)
        except Stopped:
            self._end_run(run_id)
            raise
        finally:
            grid.close()

    def _refused(self, bundle: bytes) -> str:
        if hashlib.sha256(bundle).hexdigest() == self.bundle:
            return ""
        log.error("a run was started with a bundle that is not ours; it is refused")
        return "bundle_not_allowed"

    def _run(self, grid: HttpGrid, context: object) -> str:
        """Do the study; returns an error's code, or nothing. The text of an error stays here."""
        try:
            self.app(grid, context)  # type: ignore[arg-type]
        except FedsynthError as error:
            # What is wrong with the study itself is wrong in the next run, too.
            log.error("the study failed: %s", error)
            _note_failure(self.study, error)
            return error.code
        except (httpx.HTTPError, RunNotRunningException):
            raise
        except Exception:
            log.exception("the study failed")
            return "internal_error"
        log.info("the study is finished")
        return ""

    def _end_run(self, run_id: int) -> None:
        """Let SuperLink forget the run and its messages at once, and not when it misses the heartbeat."""
        if not run_id:
            return
        try:
            with open_control(self.study) as control:
                control.stop_run(run_id)
        except FedsynthError as error:
            log.warning("the run could not be ended at SuperLink: %s", error)


def end_orphans(study: Study) -> None:
    """End runs that an earlier runner took and did not finish, so that a new one can start at once.

    There is one runner, so whatever is taken while this one has taken nothing has nobody who works on it.

    Raises:
        SuperlinkUnreachable: ``superlink_unreachable``: it does not answer for a minute.
    """
    deadline = time.monotonic() + _SUPERLINK_STARTS_SECONDS
    with open_control(study) as control:
        while True:  # both were started at the same time
            try:
                runs = control.runs()
                break
            except SuperlinkUnreachable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        for run in runs:
            if run.claimed:
                log.info("ending run %d, whose runner is gone", run.id)
                control.stop_run(run.id)


def make_runner(study: Study) -> Runner:
    """A runner of `study`.

    Raises:
        UsageError: of the settings, ``keys_unreadable``.
    """
    settings = study.settings
    try:
        ca = study.path(settings.superlink.ca).read_bytes()
        secret = study.path(settings.superlink.secret).read_bytes()
    except OSError as error:
        raise UsageError(
            "keys_unreadable", f"{error.filename} cannot be read.", "See `fedsynth study doctor`."
        ) from None
    waits = settings.study
    patience = Patience(
        absent_s=waits.absent_s, shortage_s=waits.patience_s or float("inf"), silent_s=waits.silent_s or float("inf")
    )
    return Runner(
        study=study,
        door=RuntimeDoor(study.superlink_address, ca, secret),
        app=make_app(lambda _: study.folder, patience),
        bundle=bundle_sha256(),
    )


def _note_failure(study: Study, error: FedsynthError) -> None:
    """Write phase ``failed``, unless the study has done so itself."""
    status = read_status(study.folder)
    if status is not None and status.phase == "failed" and status.code == error.code:
        return
    StatusFile(study.folder, study.plan).phase("failed", error.message, error.code)


def _report(client: RuntimeHttpClient, outcome: str, code: str) -> None:
    client.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=code))


def main(folder: Path) -> int:
    """Take runs until SIGTERM; returns the process's exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line a question for work
    logging.getLogger("flwr").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _stop)
    study = Study(folder.absolute())
    try:
        runner = make_runner(study)
        end_orphans(study)
        log.info("ready; study %s, bundle %s", study.plan.name, runner.bundle[:12])
        take_tasks(runner.door, COMPONENT, runner.work, stopped=lambda: False)
    except Stopped:
        log.info("stopped")
        return DONE
    except KeyboardInterrupt:  # how Flower's client says so, from whatever thread
        log.warning("SuperLink ended the run, or does not take this runner's secret (%s)", "keys/superexec.secret")
        return AGAIN
    except RunNotRunningException:
        log.warning("the run was ended at SuperLink")
        return AGAIN
    except httpx.HTTPError as error:
        log.warning("SuperLink is away (%s)", type(error).__name__)
        return AGAIN
    except FedsynthError as error:
        log.error("%s", error)
        return UNUSABLE if isinstance(error, UsageError) else AGAIN
    return DONE


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
