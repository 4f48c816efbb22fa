"""Privacy over sites: what disjoint patients, patients at two sites, and shared noise cost."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsynth.dp.accounting import Accountant, Mechanism, epsilon, gaussian_epsilon
from fedsynth.dp.composition import TwoEpsilons, distributed_noise, overlap_epsilon, study_epsilon, two_epsilons

DELTA = 1e-5
ONE_SHOT = Mechanism(1.0, 1.5, 1)
HISTORIES = {
    "north": [Mechanism(0.1, 2.0, 300), ONE_SHOT],
    "south": [Mechanism(0.05, 1.5, 300), ONE_SHOT],
    "west": [Mechanism(0.2, 6.0, 500)],
}


def test_disjoint_sites_cost_what_the_costliest_of_them_costs() -> None:
    each = {name: epsilon(history, DELTA) for name, history in HISTORIES.items()}
    assert len(set(each.values())) == 3
    assert study_epsilon(HISTORIES, DELTA) == max(each.values())
    assert study_epsilon({"west": HISTORIES["west"]}, DELTA) == each["west"]
    assert study_epsilon({}, DELTA) == 0
    assert study_epsilon({"north": []}, DELTA) == 0


def test_a_patient_at_two_sites_pays_for_both_but_less_than_their_sum() -> None:
    two = {name: HISTORIES[name] for name in ("north", "south")}
    each = [epsilon(history, DELTA) for history in two.values()]
    assert max(each) < overlap_epsilon(two, DELTA) < sum(each)
    assert overlap_epsilon(two, DELTA) < overlap_epsilon(HISTORIES, DELTA)
    assert overlap_epsilon({"west": HISTORIES["west"]}, DELTA) == study_epsilon({"west": HISTORIES["west"]}, DELTA)


def test_a_patient_at_k_sites_of_one_shot_releases_pays_as_for_one_release_of_less_noise() -> None:
    sites = {str(k): [Mechanism(1.0, sigma, 1)] for k, sigma in enumerate((1.0, 2.0, 4.0))}
    exact = gaussian_epsilon((1 + 1 / 4 + 1 / 16) ** -0.5, DELTA)
    assert overlap_epsilon(sites, DELTA, "prv") == pytest.approx(exact, abs=1e-8)
    assert exact < overlap_epsilon(sites, DELTA) < 1.2 * exact


@given(
    total=st.floats(0.01, 1000),
    sites=st.integers(1, 50),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_the_reliable_sites_alone_add_up_to_the_whole_noise(total: float, sites: int, data: st.DataObject) -> None:
    unreliable = data.draw(st.integers(0, sites - 1))
    each = distributed_noise(total, sites, unreliable=unreliable)
    assert math.sqrt((sites - unreliable) * each**2) == pytest.approx(total, rel=1e-12)
    assert math.sqrt(sites) * each >= total * (1 - 1e-12)


@pytest.mark.parametrize(
    ("total", "sites", "unreliable"), [(1.0, 0, 0), (1.0, 3, 3), (1.0, 3, -1), (0.0, 3, 0), (math.nan, 3, 0)]
)
def test_noise_that_nobody_would_add_is_refused(total: float, sites: int, unreliable: int) -> None:
    with pytest.raises(ValueError, match=r"must be positive|at least one must be left"):
        distributed_noise(total, sites, unreliable=unreliable)


@pytest.mark.parametrize(("sites", "unreliable"), [(3, 0), (9, 0), (9, 4), (4, 3)])
def test_both_epsilons_of_a_shared_one_shot_are_those_of_gaussian_mechanisms(sites: int, unreliable: int) -> None:
    both = two_epsilons([ONE_SHOT], sites, DELTA, "prv", unreliable=unreliable)
    # Theorem 8 of Balle and Wang: the sum has the whole noise, one message 1 / sqrt(sites - unreliable) of it.
    assert both.towards_recipients == pytest.approx(gaussian_epsilon(1.5, DELTA), abs=1e-8)
    single = gaussian_epsilon(1.5 / math.sqrt(sites - unreliable), DELTA)
    assert both.towards_server == pytest.approx(single, abs=1e-8)
    assert both.unreliable == unreliable


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_a_server_that_sees_single_messages_learns_more_than_the_recipients(accountant: Accountant) -> None:
    history = [Mechanism(0.1, 4.0, 100), ONE_SHOT]
    three = two_epsilons(history, 3, DELTA, accountant)
    assert three.towards_server > three.towards_recipients == epsilon(history, DELTA, accountant)
    tolerant = two_epsilons(history, 3, DELTA, accountant, unreliable=1)
    assert tolerant.towards_recipients == three.towards_recipients
    assert three.towards_recipients < tolerant.towards_server < three.towards_server


def test_one_site_shares_with_nobody() -> None:
    alone = epsilon([ONE_SHOT], DELTA)
    assert two_epsilons([ONE_SHOT], 1, DELTA) == TwoEpsilons(alone, alone, 0)
