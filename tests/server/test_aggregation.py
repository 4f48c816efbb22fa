"""Averaging: exact, whatever the order of sites, by weights that are public."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from fedsynth.plan import AggregationPlan, StudyPlan, WarmStart
from fedsynth.records import State
from fedsynth_server.aggregation import (
    averaging_decay,
    bounded,
    combined,
    moving_average,
    site_weights,
    update_norm,
    weighted_average,
)

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


ROBUST = [
    AggregationPlan(rule="median", weighting="equal", min_sites=3),
    AggregationPlan(rule="trimmed_mean", weighting="equal", min_sites=3),
]


@pytest.mark.parametrize("rule", ROBUST, ids=lambda rule: rule.rule)
@given(honest=st.lists(ARRAYS, min_size=2, max_size=4), poison=st.sampled_from([-1e30, 1e30, 7.0]))
def test_one_poisoned_site_cannot_leave_the_range_of_the_honest_ones(
    rule: AggregationPlan, honest: list[np.ndarray], poison: float
) -> None:
    states = {f"s{i}": state(array) for i, array in enumerate(honest)}
    states["poisoned"] = state(np.full((3, 2), poison, np.float32))
    weights = dict.fromkeys(states, 1 / len(states))
    result = combined(states, weights, rule)["layer.weight"].numpy()
    stack = np.stack(honest)
    assert (result >= stack.min(axis=0)).all() and (result <= stack.max(axis=0)).all()
    # The plain mean leaves it, which is why the rule exists.
    if abs(poison) > 1e20:
        mean = combined(states, weights, AggregationPlan())["layer.weight"].numpy()
        assert ((mean < stack.min(axis=0)) | (mean > stack.max(axis=0))).all()


@given(arrays=st.lists(ARRAYS, min_size=3, max_size=5))
def test_the_median_is_numpys(arrays: list[np.ndarray]) -> None:
    states = {f"s{i}": state(array) for i, array in enumerate(arrays)}
    result = combined(states, dict.fromkeys(states, 1.0), ROBUST[0])["layer.weight"].numpy()
    np.testing.assert_allclose(result, np.median(np.stack(arrays), axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sites", [3, 4, 5, 6])
def test_the_trimmed_mean_leaves_out_the_share_at_each_end(sites: int) -> None:
    values = {f"s{i}": {"w": torch.tensor([float(i**2)])} for i in range(sites)}
    left_out = int(0.34 * sites)
    kept = [float(i**2) for i in range(sites)][left_out : sites - left_out]
    assert combined(values, {}, ROBUST[1])["w"].item() == pytest.approx(np.mean(kept))


@given(start=ARRAYS, received=ARRAYS, largest=st.floats(0.1, 10))
def test_a_bounded_update_keeps_its_direction_and_not_its_length(
    start: np.ndarray, received: np.ndarray, largest: float
) -> None:
    sent, asked = state(start), state(received)
    taken = bounded(sent, asked, largest)
    norm = update_norm(sent, asked)
    assert update_norm(sent, taken) <= largest + 1e-3 or norm <= largest
    if norm <= largest:
        assert taken is asked
    else:
        share = largest / norm
        np.testing.assert_allclose(
            taken["layer.weight"].numpy(), start + share * (received - start), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize(
    "changes", [{"rule": "median"}, {"rule": "trimmed_mean", "weighting": "equal", "min_sites": 2}]
)
def test_a_robust_rule_without_sites_to_compare_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="compares sites"):
        AggregationPlan.model_validate(changes)


def test_a_trim_that_leaves_nobody_out_is_refused() -> None:
    asked = {"rule": "trimmed_mean", "weighting": "equal", "min_sites": 4}
    with pytest.raises(ValueError, match="leaves nobody out"):
        AggregationPlan.model_validate({**asked, "trim": 0.2})
    AggregationPlan.model_validate({**asked, "trim": 0.25})


def test_weights_that_nobody_trained_are_no_part_of_the_average(tiny_plan: StudyPlan) -> None:
    from_random = tiny_plan.model_copy(update={"gan": tiny_plan.gan.model_copy(update={"warm_start": None})})
    public = WarmStart(generator_sha256="a" * 64, discriminator_sha256="b" * 64, provenance="public slices")
    from_public = tiny_plan.model_copy(update={"gan": tiny_plan.gan.model_copy(update={"warm_start": public})})
    grown = from_public.model_copy(
        update={"gan": from_public.gan.model_copy(update={"rounds": 6, "growth": [1, 2, 3]})}
    )
    decay = tiny_plan.gan.ema_decay
    assert decay > 0
    assert [averaging_decay(from_random, number) for number in (1, 2, 3)] == [0.0, decay, decay]
    assert [averaging_decay(from_public, number) for number in (1, 2)] == [decay, decay]
    assert [averaging_decay(grown, number) for number in range(1, 7)] == [0.0, 0.0, decay, 0.0, decay, decay]
