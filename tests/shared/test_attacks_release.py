"""Membership inference from a release: an overfitted release gives its patients away, an honest one does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from fedsynth.attacks import release
from fedsynth.attacks.distances import sanity_distances
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.roc_auc import roc_auc

Points = NDArray[np.float64]
Method = Callable[[Points, Points, Points], Points]

METHODS: dict[str, Method] = {
    "nearest": lambda at, made, _: release.nearest_neighbour(at, made),
    "monte-carlo": lambda at, made, _: release.monte_carlo(at, made),
    "calibrated": release.calibrated,
    "density": release.density_ratio,
}
MEMBERS, OTHERS, DIMENSIONS = 80, 80, 6


def population(rng: np.random.Generator, n: int) -> Points:
    """People of very different commonness: a dense group and a sparse one."""
    width = np.where(rng.random(n) < 0.5, 0.3, 2.0)
    return rng.normal(size=(n, DIMENSIONS)) * width[:, None]


def area(method: Method, made: Points, members: Points, others: Points, reference: Points) -> float:
    scores = method(np.concatenate([members, others]), made, reference)
    return roc_auc(scores, np.repeat([True, False], [len(members), len(others)]))


@pytest.mark.parametrize("name", METHODS)
def test_a_release_of_noisy_copies_gives_members_away(name: str) -> None:
    rng = np.random.default_rng(1)
    members, others, reference = (population(rng, n) for n in (MEMBERS, OTHERS, 60))
    made = np.repeat(members, 3, axis=0) + 0.05 * rng.normal(size=(3 * MEMBERS, DIMENSIONS))
    assert area(METHODS[name], made, members, others, reference) > (0.8 if name in ("density", "calibrated") else 0.95)


@pytest.mark.parametrize("name", METHODS)
def test_a_release_of_other_people_gives_nobody_away(name: str) -> None:
    areas = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        members, others, reference, made = (population(rng, n) for n in (MEMBERS, OTHERS, 60, 150))
        areas.append(area(METHODS[name], made, members, others, reference))
    assert np.mean(areas) == pytest.approx(0.5, abs=0.04)


def test_nearest_and_monte_carlo_are_what_their_papers_say() -> None:
    rng = np.random.default_rng(2)
    at, made = population(rng, 50), population(rng, 30)
    distances = cdist(at, made)
    assert np.allclose(release.nearest_neighbour(at, made), -distances.min(axis=1), atol=1e-6)
    radius = np.median(distances.min(axis=1))
    expected = np.where(distances <= radius, -np.log(distances / radius), 0.0).mean(axis=1)
    assert np.allclose(release.monte_carlo(at, made), expected, atol=1e-5)


def test_calibration_takes_out_how_common_a_patient_is() -> None:
    """Members from the crowd, others from its edge: near to everything is not the same as trained on."""
    rng = np.random.default_rng(3)
    members, others = 0.3 * rng.normal(size=(80, DIMENSIONS)), 2.0 * rng.normal(size=(80, DIMENSIONS))
    made, reference = population(rng, 150), population(rng, 150)
    assert area(METHODS["nearest"], made, members, others, reference) > 0.95
    assert area(METHODS["calibrated"], made, members, others, reference) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("name", METHODS)
def test_scores_do_not_depend_on_how_many_distances_fit_into_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    at, made, reference = population(rng, 100), population(rng, 70), population(rng, 40)
    whole = METHODS[name](at, made, reference)
    monkeypatch.setattr(release, "_AT_ONCE", 300)
    assert np.allclose(METHODS[name](at, made, reference), whole, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_release_of_one_patient_over_and_over_is_no_error(name: str) -> None:
    rng = np.random.default_rng(5)
    at, reference = population(rng, 40), population(rng, 40)
    assert np.isfinite(METHODS[name](at, np.zeros((30, DIMENSIONS)), reference)).all()


def test_too_few_or_broken_patients_are_no_result() -> None:
    rng = np.random.default_rng(6)
    at = population(rng, 40)
    with pytest.raises(NotMeasurable, match="synthetic patients"):
        release.nearest_neighbour(at, at[:5])
    with pytest.raises(NotMeasurable, match="reference patients"):
        release.calibrated(at, at, at[:5])
    with pytest.raises(NotMeasurable, match="not finite"):
        release.monte_carlo(np.where(at > 1, np.nan, at), at)


def test_the_sanity_check_tells_copies_and_calls_itself_a_sanity_check() -> None:
    rng = np.random.default_rng(7)
    members, others = population(rng, 200), population(rng, 60)
    copied = sanity_distances("genes", members, others, members[:100] + 1e-3, rng)
    assert copied.nearer.low > 0.5 or copied.training[0] < 0.01 < copied.holdout[0]
    honest = sanity_distances("genes", members, others, population(rng, 300), rng)
    assert honest.nearer.low < 0.5 < honest.nearer.high
    assert "sanity check" in honest.note
