"""Averaging: exact, whatever the order of sites, by weights that are public."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from fedsynth.plan import StudyPlan
from fedsynth.records import State
from fedsynth_server.aggregation import moving_average, site_weights, weighted_average

FINITE = st.floats(-1e3, 1e3, width=32)
ARRAYS = numpy_strategies.arrays(np.float32, (3, 2), elements=FINITE)


def sized(plan: StudyPlan, weighting: str, **sizes: int) -> StudyPlan:
    sites = [plan.sites[0].model_copy(update={"name": name, "nominal_patients": n}) for name, n in sizes.items()]
    aggregation = plan.aggregation.model_copy(update={"weighting": weighting})
    return plan.model_copy(update={"sites": sites, "aggregation": aggregation})


def state(values: np.ndarray) -> State:
    return {"layer.weight": torch.from_numpy(values.copy()), "layer.bias": torch.from_numpy(values[0].copy())}


@given(arrays=st.lists(ARRAYS, min_size=1, max_size=4), raw=st.lists(st.integers(1, 500), min_size=4, max_size=4))
def test_the_average_is_the_weighted_mean(arrays: list[np.ndarray], raw: list[int]) -> None:
    names = [f"s{i}" for i in range(len(arrays))]
    shares = np.array(raw[: len(arrays)], dtype=np.float64) / sum(raw[: len(arrays)])
    average = weighted_average(
        {name: state(array) for name, array in zip(names, arrays, strict=True)},
        dict(zip(names, shares.tolist(), strict=True)),
    )
    expected = np.tensordot(shares, np.stack(arrays).astype(np.float64), axes=1).astype(np.float32)
    assert average["layer.weight"].dtype == torch.float32
    np.testing.assert_allclose(average["layer.weight"].numpy(), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(average["layer.bias"].numpy(), expected[0], rtol=1e-6, atol=1e-9)


@given(arrays=st.lists(ARRAYS, min_size=2, max_size=4), order=st.randoms(use_true_random=False))
def test_the_order_of_replies_changes_no_bit(arrays: list[np.ndarray], order: st.DataObject) -> None:
    states = {f"s{i}": state(array) for i, array in enumerate(arrays)}
    weights = {name: (i + 1) / sum(range(1, len(arrays) + 1)) for i, name in enumerate(states)}
    shuffled = list(states)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = weighted_average(states, weights), weighted_average({name: states[name] for name in shuffled}, weights)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_site_keeps_its_weights_bit_by_bit() -> None:
    values = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    assert torch.equal(weighted_average({"a": state(values)}, {"a": 1.0})["layer.weight"], torch.from_numpy(values))


def test_weights_are_the_declared_sizes_or_equal(tiny_plan: StudyPlan) -> None:
    nominal = sized(tiny_plan, "nominal", a=100, b=300, c=100)
    assert site_weights(nominal, ["a", "b", "c"]) == {"a": 0.2, "b": 0.6, "c": 0.2}
    assert site_weights(sized(tiny_plan, "equal", a=100, b=300), ["a", "b"]) == {"a": 0.5, "b": 0.5}


def test_the_weights_of_missing_sites_go_to_the_others(tiny_plan: StudyPlan) -> None:
    plan = sized(tiny_plan, "nominal", a=100, b=300, c=100)
    assert site_weights(plan, ["a", "b"]) == {"a": 0.25, "b": 0.75}
    assert site_weights(plan, ["c"]) == {"c": 1.0}


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_moving_average_is_the_formula(decay: float) -> None:
    old, new = state(np.full((3, 2), 2.0, np.float32)), state(np.full((3, 2), 4.0, np.float32))
    assert torch.allclose(
        moving_average(old, new, decay)["layer.weight"], torch.tensor(decay * 2.0 + (1 - decay) * 4.0)
    )
