"""The forecast: true costs, what statistics can tell, levers that were computed, engines that follow the recommendation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsynth.budget import noise_multipliers, planned_epsilon
from fedsynth.engines import embedding, moments
from fedsynth.plan import Module, PublicWeights, StudyPlan, TrainingPlan, WarmStart
from fedsynth.recommend import PublicStarts, recommend
from fedsynth.records import PUBLIC, State
from fedsynth_server.engine_advice import engine_advice, image_engine
from fedsynth_server.forecast import HARD, HOPELESS, STATISTIC_HARD, Forecast, forecast, noise_to_signal, parameters
from fedsynth_server.levers import Levers, levers
from fedsynth_server.statistics_forecast import RESIDUAL

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")

NAMED = PublicWeights(sha256="0" * 64, provenance="weights of a test")
WARM = WarmStart(generator_sha256="0" * 64, discriminator_sha256="1" * 64, provenance="weights of a test")


def resized(plan: StudyPlan, patients: int, batch: int) -> StudyPlan:
    sites = [site.model_copy(update={"nominal_patients": patients}) for site in plan.sites]
    trainings: dict[str, Any] = {
        module: plan.training(module).model_copy(update={"expected_batch": batch}) for module in TRAINED
    }
    return plan.model_copy(update={"sites": sites, **trainings})


def spending(plan: StudyPlan, epsilon: float, **changes: Any) -> StudyPlan:
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"epsilon": epsilon, **changes})})


@pytest.fixture(scope="module")
def long_plan(tiny_plan: StudyPlan) -> StudyPlan:
    trainings: dict[str, Any] = {
        module: tiny_plan.training(module).model_copy(update={"rounds": 20}) for module in TRAINED
    }
    return tiny_plan.model_copy(update=trainings)


@pytest.fixture(scope="module")
def statistics_plan(tiny_plan: StudyPlan) -> StudyPlan:
    """Moments and embedding, nothing trained."""
    none = {module: tiny_plan.training(module).model_copy(update={"rounds": 0}).model_dump() for module in TRAINED}
    return StudyPlan.model_validate(
        {
            **tiny_plan.model_dump(),
            **none,
            "moments": {"budget_share": 0.4, "public": NAMED.model_dump(), "components": 4},
            "embedding": {"budget_share": 0.6, "public": NAMED.model_dump(), "dimensions": 20},
        }
    )


@pytest.fixture(scope="module")
def public(statistics_plan: StudyPlan) -> dict[str, State]:
    """Public weights whose coordinates differ in how much public patients vary in them."""
    state = embedding.public_template(statistics_plan)
    count = state["variance"].numel()
    state["variance"] = torch.logspace(0, -4, count).reshape(state["variance"].shape)
    state["expected"] = 0.1 * state["variance"].sqrt()
    return {PUBLIC["embedding"]: state}


@pytest.fixture(scope="module")
def tiny_forecast(tiny_plan: StudyPlan) -> Forecast:
    return forecast(tiny_plan)


def of_module(found: list[Levers], module: Module) -> Levers:
    (one,) = [each for each in found if each.module == module]
    return one


def test_figures_follow_from_the_budget(tiny_plan: StudyPlan, tiny_forecast: Forecast) -> None:
    foretold = tiny_forecast
    assert [(row.site, row.module) for row in foretold.modules] == [(s, m) for s in ("a", "b") for m in TRAINED]
    for row in foretold.modules:
        training = tiny_plan.training(row.module)
        assert isinstance(training, TrainingPlan)
        sigma = noise_multipliers(tiny_plan, row.site)[row.module]
        assert row.noise_multiplier == sigma
        assert row.noise_to_batch == sigma / training.expected_batch
        together = 1 if row.module == "gan" else 2  # discriminators are not averaged
        size = parameters(tiny_plan, row.module)
        assert row.noise_to_signal == pytest.approx(
            sigma * math.sqrt(size) / training.expected_batch / math.sqrt(training.steps * together)
        )
        assert (row.reading == "learns") == (row.noise_to_signal <= HARD)
        assert (row.reading == "drowns") == (row.noise_to_signal > HOPELESS)
        assert row.epsilon_alone < foretold.epsilon[row.site] <= tiny_plan.privacy.epsilon
    assert foretold.epsilon == {name: planned_epsilon(tiny_plan, name) for name in ("a", "b")}


def test_joint_accounting_is_set_against_adding_up(tiny_forecast: Forecast) -> None:
    for budget in tiny_forecast.budgets:
        alone = [row.epsilon_alone for row in tiny_forecast.modules if row.site == budget.site]
        assert budget.epsilon_summed == pytest.approx(sum(alone))
        assert budget.epsilon < budget.epsilon_summed
        assert all(factor > 1 for factor in budget.split_noise.values())


def test_a_small_cohort_needs_levers_and_a_huge_one_does_not(
    tiny_plan: StudyPlan, tiny_forecast: Forecast, long_plan: StudyPlan
) -> None:
    assert "gan" in {each.module for each in levers(tiny_plan, tiny_forecast)}
    huge_plan = resized(long_plan, 9_000, 900)
    huge = forecast(huge_plan)
    assert all(row.noise_to_signal < HARD for row in huge.modules)
    assert levers(huge_plan, huge) == []


def test_each_lever_is_what_its_plan_would_forecast(tiny_plan: StudyPlan, tiny_forecast: Forecast) -> None:
    stated = of_module(levers(tiny_plan, tiny_forecast), "gan")

    def gan(plan: StudyPlan) -> float:
        size, steps = parameters(plan, "gan"), plan.gan.steps
        return noise_multipliers(plan, "a")["gan"] * math.sqrt(size / steps) / plan.gan.expected_batch

    longer = tiny_plan.gan.model_copy(update={"rounds": 4})
    larger = tiny_plan.gan.model_copy(update={"expected_batch": 20})
    alone: dict[str, Any] = {
        module: tiny_plan.training(module).model_copy(update={"rounds": 0}) for module in TRAINED[:2]
    }
    changed = {
        "twice the epsilon": spending(tiny_plan, 20.0),
        "twice the steps": tiny_plan.model_copy(update={"gan": longer}),
        "twice the batch": tiny_plan.model_copy(update={"gan": larger}),
        "twice the patients a site": resized(tiny_plan, 80, 20),
        "the whole budget for it": tiny_plan.model_copy(update=alone),
    }
    assert set(stated.changes) == {*changed, "a one-shot embedding instead of the gan"}
    for lever, plan in changed.items():
        assert stated.changes[lever] == pytest.approx(gan(plan))
        assert stated.changes[lever] < stated.noise_to_signal
    assert list(stated.changes.values()) == sorted(stated.changes.values())
    assert stated.best == "a one-shot embedding instead of the gan" and f"{stated.best} helps most" in stated.sentence


def test_more_sites_help_only_what_is_averaged(tiny_plan: StudyPlan, tiny_forecast: Forecast) -> None:
    found = levers(tiny_plan, tiny_forecast)
    assert "twice the sites" not in of_module(found, "gan").changes
    averaged = [each for each in found if each.module != "gan"]
    assert averaged
    for each in averaged:
        assert each.changes["twice the sites"] == pytest.approx(each.noise_to_signal / math.sqrt(2))


def test_levers_of_a_prv_plan_are_ratios_to_its_own_figure(tiny_plan: StudyPlan) -> None:
    plan = spending(tiny_plan, 10.0, accountant="prv")
    found = forecast(plan)
    stated = of_module(levers(plan, found), "gan")
    assert stated.noise_to_signal == found.worst("gan").noise_to_signal
    doubled = noise_to_signal(resized(plan, 80, 20), "a", "gan")
    assert stated.changes["twice the patients a site"] == pytest.approx(doubled, rel=1e-6)


def test_moments_are_foretold_by_the_noise_of_their_link(statistics_plan: StudyPlan) -> None:
    found = forecast(statistics_plan)
    (of_moments, _) = found.statistics
    assert of_moments.coordinates == moments.row_size(statistics_plan) == parameters(statistics_plan, "moments")
    assert all(row.noise_to_signal == of_moments.noise_to_signal for row in found.modules if row.module == "moments")
    assert of_moments.learnable == pytest.approx(1 / (1 + of_moments.noise_to_signal**2))
    # Sums are added: at twice the sites of the same size the noise of the mean falls by sqrt 2.
    more = [site.model_copy(update={"name": f"{site.name}-2"}) for site in statistics_plan.sites]
    wider = statistics_plan.model_copy(update={"sites": [*statistics_plan.sites, *more]})
    assert forecast(wider).statistics[0].noise_to_signal == pytest.approx(of_moments.noise_to_signal / math.sqrt(2))


def test_more_moments_rise_above_less_noise(statistics_plan: StudyPlan) -> None:
    above = [forecast(spending(statistics_plan, epsilon)).statistics[0] for epsilon in (0.1, 3.0, 1000.0)]
    assert above[0].above_noise < above[1].above_noise < above[2].above_noise == above[2].coordinates
    assert "the link of genes and morphology" in above[0].sentence
    assert "below it" not in above[2].sentence


def test_an_embedding_without_its_weights_is_judged_by_the_plain_ratio(statistics_plan: StudyPlan) -> None:
    found = forecast(statistics_plan).statistics[1]
    sigmas = [noise_multipliers(statistics_plan, site)["embedding"] for site in ("a", "b")]
    assert not found.sharp
    assert found.noise_to_signal == pytest.approx(math.hypot(*sigmas) * math.sqrt(20) / 80 / RESIDUAL)
    assert "--weights" in found.sentence


def test_an_embedding_with_its_weights_tells_what_can_be_learnt(
    statistics_plan: StudyPlan, public: dict[str, State]
) -> None:
    found = [forecast(spending(statistics_plan, epsilon), public).statistics[1] for epsilon in (0.3, 3.0, 1000.0)]
    assert all(each.sharp for each in found)
    assert [each.above_noise for each in found] == sorted(each.above_noise for each in found)
    assert 0 < found[0].learnable < found[1].learnable < found[2].learnable < 1
    assert found[0].noise_to_signal > found[2].noise_to_signal
    # The learnable share is what the engine's weights leave of its own objective.
    plan = spending(statistics_plan, 3.0)
    made = embedding.plan_embedding(plan, public[PUBLIC["embedding"]])
    noise = math.hypot(*(noise_multipliers(plan, site)["embedding"] for site in ("a", "b"))) / 80
    expected = made.state["expected"].double() ** 2 + made.prior.double()
    left = expected / (1 + made.weight.double() ** 2 * expected / noise**2)
    assert found[1].learnable == pytest.approx(1 - float(left.sum() / expected.sum()))


@pytest.mark.parametrize("with_weights", [False, True])
def test_levers_of_statistics_lower_the_ratio_they_claim(
    statistics_plan: StudyPlan, public: dict[str, State], with_weights: bool
) -> None:
    known = public if with_weights else {}
    plan = spending(statistics_plan, 0.5)
    found = forecast(plan, known)
    stated = {each.module: each for each in levers(plan, found, known)}
    assert "moments" in stated and "half the components" in stated["moments"].changes
    halved = {
        "embedding": ("half the dimensions", {"dimensions": 10}),
        "moments": ("half the components", {"components": 2}),
    }
    for module, one in stated.items():
        assert one.changes and all(ratio < one.noise_to_signal for ratio in one.changes.values())
        assert "twice the steps" not in one.changes and "twice the batch" not in one.changes
        name, update = halved[module]
        changed = plan.model_copy(update={module: plan.training(module).model_copy(update=update)})
        after = noise_to_signal(changed, "a", module, known)
        assert one.changes.get(name, after) == pytest.approx(after)
        assert (name in one.changes) == (after <= 0.98 * one.noise_to_signal)


def test_large_networks_are_offered_moments(tiny_plan: StudyPlan) -> None:
    large = tiny_plan.autoencoder.model_copy(update={"hidden": [512, 256]})
    plan = spending(resized(tiny_plan, 300, 10), 10.0).model_copy(
        update={"autoencoder": large.model_copy(update={"expected_batch": 10})}
    )
    one = of_module(levers(plan, forecast(plan)), "autoencoder")
    assert one.best == "one-shot moments instead of the networks"


STARTS = {
    "none": PublicStarts(),
    "gan": PublicStarts(gan=WARM),
    "moments": PublicStarts(moments=NAMED),
    "embedding": PublicStarts(gan=WARM, embedding=NAMED),
    "all": PublicStarts(gan=WARM, autoencoder=NAMED, moments=NAMED, embedding=NAMED),
}


def recommended(plan: StudyPlan, starts: PublicStarts) -> StudyPlan:
    return plan.model_copy(
        update=vars(
            recommend([site.nominal_patients for site in plan.sites], starts, plan.privacy.epsilon, plan.privacy.delta)
        )
    )


@pytest.mark.parametrize("known", STARTS)
@pytest.mark.parametrize(("patients", "epsilon"), [(30, 0.3), (300, 10.0), (2000, 10.0)])
def test_advice_is_that_of_recommend_less_what_drowns(
    tiny_plan: StudyPlan, known: str, patients: int, epsilon: float
) -> None:
    starts = STARTS[known]
    plan = spending(resized(tiny_plan, patients, 10), epsilon)
    profiles, images = engine_advice(plan, starts)
    ideal = recommended(plan, starts)
    assert profiles.recommended == ideal.profile_engine
    ratios = {
        row.module: row.reading
        for row in (forecast(ideal).worst(m) for m in ideal.modules)
        if row.module in ("embedding", "gan")
    }
    kept = [module for module, reading in ratios.items() if reading != "drowns" or starts.gan is None]
    assert images.recommended == (" + ".join(kept) or "public only")
    for advice in (profiles, images):
        assert f"{patients} patients at each of 2 sites and epsilon {epsilon:g}" in advice.reason
        assert advice.reason.endswith(".") and advice.reason.count(". ") == 0
        assert ",," not in advice.reason
        assert advice.reason.count("noise to signal is") == ("no private engine" not in advice.reason)


def test_a_plan_that_was_recommended_follows_the_advice(tiny_plan: StudyPlan) -> None:
    base = resized(tiny_plan, 300, 10)
    plan = recommended(base, STARTS["all"])
    assert all(advice.follows for advice in engine_advice(plan, PublicStarts()))
    assert image_engine(plan) == "embedding"
    other = engine_advice(base, STARTS["all"])
    assert [advice.follows for advice in other] == [False, False]
    assert [advice.planned for advice in other] == ["networks", "gan"]


def test_networks_are_set_against_moments_that_need_public_weights(tiny_plan: StudyPlan) -> None:
    profiles, _ = engine_advice(tiny_plan, PublicStarts())
    assert profiles.recommended == "networks"
    assert "public directions" in profiles.reason and " for moments" in profiles.reason


def test_what_drowns_is_left_out_only_where_public_weights_make_images(statistics_plan: StudyPlan) -> None:
    hopeless = spending(statistics_plan, 0.05)
    warm = hopeless.model_copy(update={"gan": hopeless.gan.model_copy(update={"warm_start": WARM})})
    assert forecast(warm).worst("embedding").reading == "drowns"
    _, images = engine_advice(warm, PublicStarts())
    assert (images.recommended, images.planned, images.follows) == ("public only", "embedding", False)
    rich = replace(STARTS["all"], moments=None)
    _, fine = engine_advice(spending(resized(warm, 5000, 10), 10.0), rich)
    assert fine.recommended == "embedding"
    assert forecast(spending(resized(warm, 5000, 10), 10.0)).worst("embedding").noise_to_signal < STATISTIC_HARD
