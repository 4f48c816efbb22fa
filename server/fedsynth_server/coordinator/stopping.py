"""Short work beside a running study: ending it, and making a changed registry count at once."""

from __future__ import annotations

from fedsynth.deployment.supervisor import stop
from fedsynth_server.coordinator.settings import Study

_STOP_SECONDS = 90.0


def stop_study(study: Study) -> str:
    """End the study's run and processes; returns what was done.

    The runner ends its run at SuperLink when it is told to stop, and it is told first. Processes that a killed supervisor
    left behind are ended, too.

    Raises:
        UsageError: ``not_running``.
        JobFailed: ``stop_timed_out``.
    """
    if stop(study.folder, _STOP_SECONDS):
        return "Stopped. `fedsynth study start` goes on from the checkpoint."
    return "Ended what a killed supervisor had left running."


def apply_registry(study: Study, done: str, later: str) -> str:
    """Make SuperLink's registrations agree with the registry now, if it runs; returns the sentence that is true.

    Raises:
        UsageError: ``key_in_use``; of settings or registry.
    """
    if not study.path(study.settings.superlink.ca).is_file():  # sites may be added before the keys are there
        return later
    from fedsynth_server.coordinator.control import SuperlinkUnreachable, open_control
    from fedsynth_server.coordinator.registry import reconcile

    try:
        with open_control(study) as control:
            reconcile(study, control)
    except SuperlinkUnreachable:
        return later
    return done
