"""A small study over real processes: three sites, a gateway and a SuperLink, under TLS and with registered keys."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from federation import STUDY, Federation

from fedsynth.plan import StudyPlan

pytestmark = pytest.mark.network


def test_first(new_federation: Callable[..., Federation], network_plan: Callable[..., StudyPlan]) -> None:
    began = time.monotonic()
    f = new_federation(network_plan())
    print("laid out", time.monotonic() - began)
    began = time.monotonic()
    f.start(STUDY, *f.sites)
    print("first round", f.wait_until(lambda: f.done() >= 1, 120, "first round"))
    print("third round", f.wait_until(lambda: f.done() >= 3, 120, "first round"))
    print("end", f.wait_until(lambda: f.started[STUDY].poll() is not None, 120, "end"))
    print(f.describe())
