"""The comparison after the run: noise is called noise, signal is called signal, and the forecast is held to its word."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import SeededRandomness
from fedsynth.plan import TRAINED, Module, StudyPlan, TrainingPlan
from fedsynth.records import State
from fedsynth_client.training.profiles import train_autoencoder
from fedsynth_server.aggregation import weighted_average
from fedsynth_server.checkpoint import CurveRow, StudyState, first_state
from fedsynth_server.forecast import forecast, parameters
from fedsynth_server.outcome import ModuleOutcome, Outcome, study_outcome
from fedsynth_server.random_walk import movement, walk
from fedsynth_server.rounds import _from_encoder

PUBLIC = {"sha256": "0" * 64, "provenance": "weights of a test"}


def statistics_plan(tiny: StudyPlan, patients: int = 400, epsilon: float = 10.0) -> StudyPlan:
    """Moments, embedding and one round of the GAN."""
    none = {module: tiny.training(module).model_copy(update={"rounds": 0}).model_dump() for module in TRAINED[:2]}
    return StudyPlan.model_validate(
        {
            **tiny.model_dump(),
            **none,
            "privacy": {"epsilon": epsilon},
            "moments": {"budget_share": 0.3, "public": PUBLIC, "components": 4},
            "embedding": {"budget_share": 0.4, "public": PUBLIC, "dimensions": 20},
            "gan": {**tiny.gan.model_dump(), "rounds": 1, "budget_share": 0.3},
            "sites": [{"name": name, "nominal_patients": patients} for name in ("a", "b")],
        }
    )


def finished(plan: StudyPlan, **changes: Any) -> StudyState:
    """A state in which every round was run."""
    state = StudyState(plan.digest, {})
    rounds = {**state.rounds, **{module: plan.training(module).rounds for module in plan.modules}}
    return replace(state, rounds=rounds, **changes)


def outcome_of(found: Outcome, module: Module) -> ModuleOutcome:
    (one,) = [each for each in found.modules if each.module == module]
    return one


MOMENTS = {"noise_to_signal": 0.2, "kept_link": 0.96}
EMBEDDING = {"residual_before": 9.0, "residual_after": 5.0, "noise_norm": 4.0, "steps": 200.0, "patients": 400.0}


def after(plan: StudyPlan, moments: dict[str, float] = MOMENTS, embedding: dict[str, float] = EMBEDDING) -> Outcome:
    return study_outcome(plan, finished(plan, fits={"moments": moments, "embedding": embedding}))


def test_a_strong_signal_is_learnt_as_foretold(tiny_plan: StudyPlan) -> None:
    plan = statistics_plan(tiny_plan, patients=4000)
    found = after(plan)
    for module in ("moments", "embedding"):
        one = outcome_of(found, module)
        assert (one.forecast, one.verdict, one.as_forecast) == ("learns", "learnt", True)
        assert one.forecast_noise_to_signal == forecast(plan).worst(module).noise_to_signal
    of_embedding = outcome_of(found, "embedding")
    assert of_embedding.learnt == pytest.approx((81 - 25) / (81 - 16))
    assert of_embedding.noise_to_signal == pytest.approx(4 / math.sqrt(65))
    assert "20% was noise" in of_embedding.sentence  # 16 of 81


def test_pure_noise_is_drowned_as_foretold(tiny_plan: StudyPlan) -> None:
    plan = statistics_plan(tiny_plan, patients=15, epsilon=0.2)
    found = after(plan, {"noise_to_signal": 30.0, "kept_link": 0.02}, EMBEDDING | {"residual_before": 4.1, "steps": 0})
    for module in ("moments", "embedding"):
        one = outcome_of(found, module)
        assert (one.forecast, one.verdict, one.as_forecast) == ("drowns", "drowned", True)


def test_a_false_hope_is_called_so(tiny_plan: StudyPlan) -> None:
    one = outcome_of(after(statistics_plan(tiny_plan, 4000), {"noise_to_signal": 5.0, "kept_link": 0.1}), "moments")
    assert (one.forecast, one.verdict, one.as_forecast) == ("learns", "drowned", False)


@pytest.mark.parametrize(
    ("before", "left", "verdict"),
    [(9.0, 4.0, "learnt"), (9.0, 7.5, "partly"), (9.0, 9.2, "missed"), (4.2, 4.1, "nothing"), (5.2, 5.2, "nothing")],
)
def test_an_embedding_says_how_much_was_learnt(tiny_plan: StudyPlan, before: float, left: float, verdict: str) -> None:
    fit = EMBEDDING | {"residual_before": before, "residual_after": left}
    one = outcome_of(after(statistics_plan(tiny_plan, 4000), embedding=fit), "embedding")
    assert one.verdict == verdict
    assert (one.learnt is None) == (verdict == "nothing")
    assert one.learnt is None or 0 <= one.learnt <= 1


def test_without_a_coordinate_above_the_noise_everything_drowned(tiny_plan: StudyPlan) -> None:
    nothing = EMBEDDING | {"residual_before": 0.0, "residual_after": 0.0, "noise_norm": 0.0}
    assert outcome_of(after(statistics_plan(tiny_plan), embedding=nothing), "embedding").verdict == "drowned"


def test_a_generator_tells_nothing_of_its_discriminators(tiny_plan: StudyPlan) -> None:
    one = outcome_of(after(statistics_plan(tiny_plan)), "gan")
    assert (one.verdict, one.as_forecast, one.noise_to_signal, one.learnt) == ("open", None, None, None)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 40])
def test_the_walk_is_that_of_adam_on_noise(steps: int) -> None:
    generator = torch.Generator().manual_seed(7)
    parameter = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = torch.optim.Adam([parameter], lr=1e-2)
    for _ in range(steps):
        parameter.grad = 3.7 * torch.randn(20_000, generator=generator)
        optimizer.step()
    assert float(parameter.detach().square().mean()) / 1e-4 == pytest.approx(walk(steps), rel=0.08)


LONG: dict[str, Any] = {"steps_per_round": 40, "rounds": 2}
NETWORKS: tuple[Module, ...] = ("autoencoder", "radiogenomics")


def networks_plan(tiny: StudyPlan, **autoencoder: Any) -> StudyPlan:
    sections: dict[str, Any] = {module: tiny.training(module).model_dump() | LONG for module in NETWORKS}
    sections["autoencoder"] |= {"hidden": [64, 48], "latent_dim": 32} | autoencoder
    return StudyPlan.model_validate(tiny.model_dump() | sections)


def starts(plan: StudyPlan) -> dict[str, State]:
    """As the coordinator starts: the DNN from what the encoder has become, which in these tests is its start."""
    weights = first_state(plan, None).weights
    return {"autoencoder": weights["autoencoder"], "radiogenomics": _from_encoder(plan, StudyState("", weights))}


def walked(state: State, noise_sd: float, generator: torch.Generator) -> State:
    return {name: t + noise_sd * torch.randn(t.shape, generator=generator) for name, t in state.items()}


def networks_state(plan: StudyPlan, weights: dict[str, State], norm: float = 1.0) -> StudyState:
    rows: dict[Module, list[CurveRow]] = {
        module: [
            {"round": number, "site": site.name, "update_norm": norm}
            for number in range(1, plan.training(module).rounds + 1)
            for site in plan.sites
        ]
        for module in NETWORKS
    }
    return replace(finished(plan, curves={**StudyState("", {}).curves, **rows}), weights=weights)


def noise_of(plan: StudyPlan, module: Module) -> float:
    """Standard deviation of the averaged walk of two rounds at two sites of equal weight: two halves of a walk."""
    training = plan.training(module)
    assert isinstance(training, TrainingPlan)
    return training.learning_rate * math.sqrt(walk(training.steps_per_round))


@pytest.mark.parametrize("seed", range(5))
def test_networks_that_walked_at_random_drowned(tiny_plan: StudyPlan, seed: int) -> None:
    plan, draws = networks_plan(tiny_plan), torch.Generator().manual_seed(seed)
    start = starts(plan)
    moved = {"autoencoder": walked(start["autoencoder"], noise_of(plan, "autoencoder"), draws)}
    # The DNN starts from the encoder as it is after its own rounds.
    begun = _from_encoder(plan, StudyState("", {**first_state(plan, None).weights, **moved}))
    moved["radiogenomics"] = walked(begun, noise_of(plan, "radiogenomics"), draws)
    found = study_outcome(plan, networks_state(plan, moved))
    for module in NETWORKS:
        one = outcome_of(found, module)
        assert (one.verdict, one.noise_to_signal, one.learnt) == ("drowned", None, 0.0)


@pytest.mark.parametrize("strength", [1.3, 2.0, 5.0])
def test_a_direction_that_stands_out_was_learnt_as_far_as_it_is_seen(tiny_plan: StudyPlan, strength: float) -> None:
    """`strength`: of the planted direction, over the least that can be seen, noise times the fourth root of m k."""
    plan, draws = networks_plan(tiny_plan), torch.Generator().manual_seed(7)
    start, noise = starts(plan)["autoencoder"], noise_of(plan, "autoencoder")
    name = "encoder.2.weight"
    rows, columns = start[name].shape
    left, right = torch.randn(rows, generator=draws), torch.randn(columns, generator=draws)
    left, right = left / left.norm(), right / right.norm()
    shares, found = [], []
    for _ in range(30):
        moved = walked(start, noise, draws)
        moved[name] = moved[name] + strength * noise * (rows * columns) ** 0.25 * torch.outer(left, right)
        u, _, v = torch.linalg.svd(moved[name] - start[name])
        shares.append(float((u[:, 0] @ left) ** 2 * (v[0] @ right) ** 2))
        found.append(movement(start, moved, noise).signal)
    if strength == 1.3:
        assert found.count(0.0) > 3  # near the edge, a direction may as well be noise
    else:
        assert sum(found) / 30 == pytest.approx(sum(shares) / 30, abs=0.08)
        weights = {**starts(plan), "autoencoder": moved}
        one = outcome_of(study_outcome(plan, networks_state(plan, weights)), "autoencoder")
        assert (one.verdict, one.learnt) == ("learnt", found[-1])


@pytest.mark.parametrize(("sigma", "verdicts"), [(400.0, {"drowned"}), (0.02, {"partly", "learnt"})])
def test_a_network_that_was_trained_privately_is_judged_rightly(
    tiny_plan: StudyPlan, sigma: float, verdicts: set[str]
) -> None:
    """Real private steps: profiles that vary along one direction, under noise that hides it, and under next to none."""
    plan = networks_plan(tiny_plan, learning_rate=1e-3)
    draws = torch.Generator().manual_seed(7)
    genes = {site: torch.randn(40, 1, generator=draws) * torch.ones(20) + 1.0 for site in ("a", "b")}
    weights = starts(plan)
    for number in range(plan.autoencoder.rounds):
        received = {
            site: train_autoencoder(
                plan,
                weights["autoencoder"],
                genes[site],
                Mechanism(0.25, sigma, 40),
                SeededRandomness(10 * number + place),
            ).weights
            for place, site in enumerate(genes)
        }
        weights["autoencoder"] = weighted_average(received, {"a": 0.5, "b": 0.5})
    assert outcome_of(study_outcome(plan, networks_state(plan, weights)), "autoencoder").verdict in verdicts


def test_after_a_warm_start_only_lengths_tell(tiny_plan: StudyPlan) -> None:
    plan = networks_plan(tiny_plan, warm_start=PUBLIC)
    unit = plan.autoencoder.learning_rate * math.sqrt(parameters(plan, "autoencoder"))
    plain = starts(networks_plan(tiny_plan))
    noise = outcome_of(study_outcome(plan, networks_state(plan, plain, math.sqrt(walk(40)) * unit)), "autoencoder")
    assert (noise.verdict, noise.as_forecast) == ("open", None) and "1.00 times" in noise.sentence
    marched = outcome_of(study_outcome(plan, networks_state(plan, plain, 0.5 * 40 * unit)), "autoencoder")
    # A quarter of the squared step is signal: noise of sqrt(walk 3/4) against 40 sqrt(1/4), over 2 rounds and 2 sites.
    share = (0.25 * 1600 - walk(40)) / (1600 - walk(40))
    assert marched.verdict == "learnt"
    assert marched.noise_to_signal == pytest.approx(math.sqrt(walk(40) * (1 - share) / (1600 * share * 4)))


@pytest.mark.parametrize(
    "change",
    [
        {"steps_per_round": 1},
        {"nonnegative_output": True},
        {"nonnegative_weights": True},
        {"optimizer": "sgd"},
        {"schedule": "linear"},
    ],
)
def test_what_cannot_be_told_is_left_open(tiny_plan: StudyPlan, change: dict[str, Any]) -> None:
    plan = networks_plan(tiny_plan)
    section = plan.radiogenomics.model_dump() | change
    plan = StudyPlan.model_validate(plan.model_dump() | {"radiogenomics": section})
    assert outcome_of(study_outcome(plan, networks_state(plan, starts(plan))), "radiogenomics").verdict == "open"


def test_the_outcome_survives_json(tiny_plan: StudyPlan) -> None:
    found = after(statistics_plan(tiny_plan))
    assert Outcome.model_validate_json(found.model_dump_json()) == found


def test_a_state_of_another_plan_or_an_unfinished_one_is_an_error(tiny_plan: StudyPlan) -> None:
    plan = statistics_plan(tiny_plan)
    with pytest.raises(ValueError, match="another plan"):
        study_outcome(plan, StudyState("0" * 64, {}))
    with pytest.raises(ValueError, match="not finished: moments"):
        study_outcome(plan, StudyState(plan.digest, {}))
