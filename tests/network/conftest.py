"""Federations of real processes: see `federation.Federation` for how to use them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsynth.plan import StudyPlan

# Tests are imported without a package (--import-mode=importlib), so their neighbours are put where `import` finds them.
for _name in ("federation", "peer", "parted"):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None and _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_name] = _module
    _spec.loader.exec_module(_module)

from federation import STUDY, Federation  # noqa: E402
from parted import Parted, unable  # noqa: E402

SITES = ("a", "b", "c")


@pytest.fixture(scope="session")
def network_plan(tiny_plan: StudyPlan) -> Callable[..., StudyPlan]:
    """The tiny plan for three sites, two of which are enough; rounds by module and parts of any section can be changed."""

    def make(rounds: dict[str, int] | None = None, **sections: dict[str, Any]) -> StudyPlan:
        plan = tiny_plan.model_dump(mode="json", exclude_none=True)
        plan["sites"] = [{"name": name, "nominal_patients": 40} for name in SITES]
        plan["aggregation"] = {**plan["aggregation"], "min_sites": 2, "round_timeout_s": 20.0}
        for module, count in (rounds or {}).items():
            plan[module]["rounds"] = count
        for name, changes in sections.items():
            plan[name] = {**plan[name], **changes}
        return StudyPlan.model_validate(plan)

    return make


@pytest.fixture(scope="session")
def cohorts(_tiny_template: Path) -> dict[str, Path]:
    """A prepared cohort a site; nothing here looks at whose patients they are, so c has those of b."""
    return {
        "a": _tiny_template / "a" / "cohort",
        "b": _tiny_template / "b" / "cohort",
        "c": _tiny_template / "b" / "cohort",
    }


@pytest.fixture(scope="session")
def new_federation(
    tmp_path_factory: pytest.TempPathFactory, cohorts: dict[str, Path]
) -> Iterator[Callable[..., Federation]]:
    """Lay out a federation (nothing runs yet); whatever it starts is ended when the tests are over.

    Without nginx, the gateway, its tests are skipped; where FEDSYNTH_REQUIRE_NETWORK is set, they fail.
    """
    made: list[Federation] = []
    # A runner of tests that is told to end must not leave processes behind.
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))

    def make(plan: StudyPlan, small_disks: dict[str, int] | None = None, **study_settings: float) -> Federation:
        if shutil.which("nginx") is None:
            if os.environ.get("FEDSYNTH_REQUIRE_NETWORK"):
                pytest.fail("nginx, the gateway, is not installed, and FEDSYNTH_REQUIRE_NETWORK is set")
            pytest.skip("nginx, the gateway, is not installed")
        federation = Federation(tmp_path_factory.mktemp("federation"), plan)
        made.append(federation)
        for whose, mebibytes in (small_disks or {}).items():
            federation.small_disk(whose, mebibytes)
        federation.lay_out(cohorts, **study_settings)
        return federation

    yield make
    signal.signal(signal.SIGTERM, before)
    for federation in made:
        federation.close()


@pytest.fixture(scope="session")
def clean_study(new_federation: Callable[..., Federation], network_plan: Callable[..., StudyPlan]) -> Federation:
    """A study of five rounds, started and left to itself: it comes to its end while others are tested."""
    rounds = {"autoencoder": 2, "radiogenomics": 1, "gan": 2}
    federation = new_federation(network_plan(rounds, aggregation={"min_sites": 3, "round_timeout_s": 120.0}))
    federation.start_study()
    federation.wait_until(federation.is_open, 60, "a gateway that knows the sites")
    federation.start(*federation.sites)
    return federation


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure says what status and logs said at that moment."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Federation):
                report.sections.append((f"federation ({name})", value.describe()))
    return report


@pytest.fixture(scope="session")
def parted(
    tmp_path_factory: pytest.TempPathFactory, cohorts: dict[str, Path], network_plan: Callable[..., StudyPlan]
) -> Iterator[Parted]:
    """A study of three rounds whose parties live in network namespaces of their own; it is under way (see `parted`)."""
    reason = unable() or ("" if shutil.which("nginx") else "nginx, the gateway, is not installed")
    if reason:
        pytest.skip(reason)
    # All three take part in every round, however long a machine that is busy takes to start the last of them.
    plan = network_plan(
        rounds={"autoencoder": 1, "radiogenomics": 1, "gan": 1},
        aggregation={"min_sites": 3, "round_timeout_s": 120.0},
    )
    made = Parted(tmp_path_factory.mktemp("parted"), plan)
    try:
        made.lay_out(cohorts)
        made.part()
        made.start(STUDY, *made.sites)
        yield made
    finally:
        made.close()
