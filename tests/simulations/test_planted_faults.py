"""Every fault that would break the guarantee, planted in the code that a site runs, and what of the audit catches it.

Without a fault the audit passes (`test_a_sound_installation_passes`). Each test below plants one and names the instrument
that has to report it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsynth import records
from fedsynth.auditing.values import MechanismCheck
from fedsynth.dp import accounting
from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.bookkeeping import Bookkeeper
from fedsynth.dp.randomness import Randomness, SeededRandomness, SystemRandomness, poisson_draw
from fedsynth.dp.step import PatientDPOptimizer
from fedsynth.plan import Module, SiteEvaluationPlan, StudyPlan
from fedsynth_client import cohort as cohorts
from fedsynth_client import ledger, rounds
from fedsynth_client.auditing.checks import (
    accountant_composes,
    clipping_binds,
    closed_list,
    noise_beside_patients,
    noise_is_fresh,
    noise_scale,
    patient_counts_once,
    progress_is_public,
    sampling_rate,
)
from fedsynth_client.auditing.preprocessing import preprocessing_is_apart
from fedsynth_client.auditing.run import audit_module, audit_plan
from fedsynth_client.auditing.wire import answers_are_as_charged, rounds_are_charged_and_closed
from fedsynth_client.cohort import Cohort
from fedsynth_client.ingest import prepare as ingest
from fedsynth_client.ingest.expression import Profiles
from fedsynth_client.training import adversarial, images, learner, profiles, statistic
from fedsynth_client.training.block import BlockResult

MODULES: tuple[Module, ...] = ("autoencoder", "radiogenomics", "embedding", "gan")
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")
CANARIES: dict[Module, int] = {"autoencoder": 512, "radiogenomics": 512, "embedding": 512, "gan": 256}
SITE = "a"

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    """Twelve steps a network and one statistic, together epsilon 4; patients are drawn with probability 1/2."""
    training = {"rounds": 3, "steps_per_round": 4, "expected_batch": 20, "max_grad_norm": 0.5, "learning_rate": 1e-3}
    genes = 20
    return StudyPlan.model_validate(
        {
            "name": "audited",
            "purpose": "A small study that is audited",
            "image": {"size": 32, "slices": 4},
            "genes": {
                "panel": [f"G{i}" for i in range(genes)],
                "reference_quantiles": [-2.0, 2.0],
                "center": [0.0] * genes,
                "scale": [1.0] * genes,
            },
            "privacy": {"epsilon": 4.0},
            "autoencoder": {**training, "budget_share": 0.2},
            "radiogenomics": {**training, "budget_share": 0.2},
            "embedding": {"budget_share": 0.3, "public": {"sha256": "0" * 64, "provenance": "made up here"}},
            "gan": {**training, "budget_share": 0.3, "slices_per_patient": 2},
            "sites": [{"name": SITE, "nominal_patients": 40}],
        }
    )


def fails(check: MechanismCheck) -> bool:
    """Whether a check reports a fault; its finding must say something."""
    assert check.finding
    return not check.ok


def test_a_sound_installation_passes(plan: StudyPlan) -> None:
    found = audit_plan(plan, canaries=CANARIES)
    assert [check.finding for check in found.checks if not check.ok] == []
    assert [module.module for module in found.modules] == list(MODULES)
    for module in found.modules:
        assert module.ok
        assert module.reachable > module.claimed_epsilon, "an audit that cannot fail proves nothing"
    assert found.ok


# ---- noise -----------------------------------------------------------------------------------------------------------


def _no_noise_drawn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SystemRandomness, "normal", lambda _, shape, std: torch.zeros(tuple(shape)))


def _half_the_noise(patch: pytest.MonkeyPatch) -> None:
    whole = SystemRandomness.normal
    patch.setattr(SystemRandomness, "normal", lambda self, shape, std: whole(self, shape, std / 2))


def _noise_forgotten_by_the_optimiser(patch: pytest.MonkeyPatch) -> None:
    def add_noise(self: PatientDPOptimizer) -> None:
        for parameter in self.params:
            parameter.grad = parameter.summed_grad.clone()

    patch.setattr(PatientDPOptimizer, "add_noise", add_noise)


def _noise_in_the_first_step_only(patch: pytest.MonkeyPatch) -> None:
    noisy = PatientDPOptimizer.add_noise

    def add_noise(self: PatientDPOptimizer) -> None:
        noisy(self)
        self.noise_multiplier = 0.0

    patch.setattr(PatientDPOptimizer, "add_noise", add_noise)


def _no_noise_in_biases(patch: pytest.MonkeyPatch) -> None:
    noisy = PatientDPOptimizer.add_noise

    def add_noise(self: PatientDPOptimizer) -> None:
        noisy(self)
        for parameter in self.params:
            if parameter.dim() == 1:
                parameter.grad = parameter.summed_grad.clone()

    patch.setattr(PatientDPOptimizer, "add_noise", add_noise)


def _less_noise_beside_patients(patch: pytest.MonkeyPatch) -> None:
    noisy, release = PatientDPOptimizer.add_noise, statistic.release_statistic

    def add_noise(self: PatientDPOptimizer) -> None:
        if any(bool(parameter.summed_grad.any()) for parameter in self.params):
            self.noise_multiplier *= 0.8
        noisy(self)

    def quieter(rows: Tensor, mechanism: Mechanism, *more: Any) -> BlockResult:
        share = 0.8 if len(rows) else 1.0
        return release(rows, replace(mechanism, noise_multiplier=share * mechanism.noise_multiplier), *more)

    patch.setattr(PatientDPOptimizer, "add_noise", add_noise)
    patch.setattr(statistic, "release_statistic", quieter)


def _the_same_noise_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SystemRandomness, "normal", lambda _, shape, std: SeededRandomness(1).normal(shape, std))


@pytest.mark.parametrize("module", MODULES)
def test_no_noise_is_caught_by_the_one_run_bound_and_by_the_noise_scale(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, module: Module
) -> None:
    _no_noise_drawn(monkeypatch)
    found = audit_module(plan, SITE, module, CANARIES[module])
    assert found.epsilon_bound > found.claimed_epsilon
    assert not found.ok
    assert fails(noise_scale(plan, SITE, module))


@pytest.mark.parametrize("module", MODULES)
def test_halved_noise_is_caught_by_the_noise_scale(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, module: Module
) -> None:
    _half_the_noise(monkeypatch)
    assert fails(noise_scale(plan, SITE, module))


@pytest.mark.parametrize(
    "plant", [_noise_forgotten_by_the_optimiser, _noise_in_the_first_step_only, _no_noise_in_biases]
)
@pytest.mark.parametrize("module", TRAINED)
def test_noise_that_steps_lack_is_caught_by_the_noise_scale(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, plant: Plant, module: Module
) -> None:
    plant(monkeypatch)
    assert fails(noise_scale(plan, SITE, module))


@pytest.mark.parametrize("module", MODULES)
def test_less_noise_in_steps_that_have_patients_is_caught_by_the_noise_beside_them(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, module: Module
) -> None:
    _less_noise_beside_patients(monkeypatch)
    assert not fails(noise_scale(plan, SITE, module)), "without patients nothing shows"
    assert fails(noise_beside_patients(plan, SITE, module))


@pytest.mark.parametrize("module", MODULES)
def test_noise_that_is_used_twice_is_caught_by_the_comparison_of_two_runs(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, module: Module
) -> None:
    _the_same_noise_again(monkeypatch)
    assert fails(noise_is_fresh(plan, SITE, module))


# ---- clipping --------------------------------------------------------------------------------------------------------


def _nothing_is_clipped(patch: pytest.MonkeyPatch) -> None:
    clipped_sums = Bookkeeper.clipped_sums
    patch.setattr(
        Bookkeeper,
        "clipped_sums",
        lambda self, losses, patients, clip, check_mixing=False: clipped_sums(
            self, losses, patients, 1e30, check_mixing
        ),
    )
    release = statistic.release_statistic

    def unclipped(rows: Tensor, mechanism: Mechanism, max_norm: float, randomness: Randomness) -> BlockResult:
        wide = 1e6  # the noise stays what it was
        return release(rows, replace(mechanism, noise_multiplier=mechanism.noise_multiplier / wide), wide, randomness)

    patch.setattr(statistic, "release_statistic", unclipped)


def _coordinates_are_clipped_instead_of_rows(patch: pytest.MonkeyPatch) -> None:
    release = statistic.release_statistic

    def by_coordinate(rows: Tensor, mechanism: Mechanism, max_norm: float, randomness: Randomness) -> BlockResult:
        wide = 1e6
        clamped = rows.nan_to_num().clamp(-max_norm, max_norm)
        return release(
            clamped, replace(mechanism, noise_multiplier=mechanism.noise_multiplier / wide), wide, randomness
        )

    patch.setattr(statistic, "release_statistic", by_coordinate)


@pytest.mark.parametrize("module", MODULES)
def test_a_missing_clip_is_caught_by_the_reach_of_one_patient(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, module: Module
) -> None:
    _nothing_is_clipped(monkeypatch)
    assert fails(clipping_binds(plan, SITE, module))


@pytest.mark.parametrize("module", ["autoencoder", "embedding"])
def test_a_missing_clip_is_caught_by_the_one_run_bound(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, module: Module
) -> None:
    _nothing_is_clipped(monkeypatch)
    assert not audit_module(plan, SITE, module, CANARIES[module]).ok


def test_a_clip_of_single_coordinates_is_caught_by_the_reach_of_one_patient(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    _coordinates_are_clipped_instead_of_rows(monkeypatch)
    assert fails(clipping_binds(plan, SITE, "embedding"))


# ---- the patient is the unit -----------------------------------------------------------------------------------------


def _slices_are_drawn(patch: pytest.MonkeyPatch) -> None:
    slices = 2

    def draw(patients: int, sample_rate: float, randomness: Randomness) -> Tensor:
        return poisson_draw(patients * slices, sample_rate, randomness) // slices

    patch.setattr(images, "poisson_draw", draw)


def _slices_are_clipped_one_by_one(patch: pytest.MonkeyPatch) -> None:
    step, slices = learner.private_step_of, 2

    def by_slice(private: Any, patients: int, tensors: Any, *more: Any) -> None:
        def of_slices(positions: Tensor) -> list[Tensor]:
            drawn = torch.unique(positions // slices)
            return [part.flatten(0, 1)[positions - slices * drawn[0]][:, None] for part in tensors(drawn)]

        step(private, patients * slices, of_slices, *more, chunk=slices)

    patch.setattr(learner, "private_step_of", by_slice)


def test_drawing_slices_instead_of_patients_is_caught_by_the_number_drawn_and_by_the_reach_of_one_patient(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slices_are_drawn(monkeypatch)
    assert fails(sampling_rate(plan, SITE, "gan"))
    assert fails(patient_counts_once(plan, SITE, "gan"))
    assert fails(clipping_binds(plan, SITE, "gan"))


def test_clipping_slices_instead_of_patients_is_caught_by_the_count_of_one_patient(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slices_are_clipped_one_by_one(monkeypatch)
    assert fails(patient_counts_once(plan, SITE, "gan"))


@pytest.mark.parametrize("module", TRAINED)
def test_drawing_more_patients_than_charged_is_caught_by_the_number_drawn(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, module: Module
) -> None:
    for training in (profiles, images):
        monkeypatch.setattr(training, "poisson_draw", lambda n, rate, source: poisson_draw(n, 1.2 * rate, source))
    assert fails(sampling_rate(plan, SITE, module, repeats=8))


# ---- accounting ------------------------------------------------------------------------------------------------------


def _history_of_the_newest_round(patch: pytest.MonkeyPatch) -> None:
    whole = ledger._history

    def newest(entries: list[ledger.Entry], *which: Any) -> list[Mechanism]:
        return whole([entry for entry in entries if entry.kind == "charge"][-1:], *which)

    patch.setattr(ledger, "_history", newest)


def _epsilon_of_one_mechanism(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        ledger, "epsilon", lambda history, delta, accountant="rdp": accounting.epsilon(history[-1:], delta, accountant)
    )


def _steps_are_not_multiplied(patch: pytest.MonkeyPatch) -> None:
    """An accountant that takes every mechanism for one step, wherever epsilon is computed."""
    whole = accounting._rdp_epsilon
    patch.setattr(
        accounting, "_rdp_epsilon", lambda history, delta: whole([replace(m, steps=1) for m in history], delta)
    )


@pytest.mark.parametrize("plant", [_history_of_the_newest_round, _epsilon_of_one_mechanism])
def test_an_accountant_that_forgets_rounds_is_caught_by_the_ledger_s_epsilon_and_by_the_receipts(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    plant(monkeypatch)
    assert fails(accountant_composes(plan, SITE))
    assert fails(rounds_are_charged_and_closed(plan, SITE))


def test_an_accountant_that_forgets_steps_everywhere_is_caught_by_comparison_with_another_accountant(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert accountant_composes(plan, SITE).ok  # and the plan's noise is computed before the fault is planted
    _steps_are_not_multiplied(monkeypatch)
    assert fails(accountant_composes(plan, SITE))


# ---- between the charge and the training ----------------------------------------------------------------------------
# The canaries and most checks call the training functions themselves: a site that calls them otherwise than it charges
# passes all of those.


def _trained_with(**changes: Callable[[Mechanism], float]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        train = rounds._train

        def otherwise(*given: Any) -> BlockResult:
            *first, block, randomness = given
            changed: dict[str, Any] = {name: change(block) for name, change in changes.items()}
            return train(*first, replace(block, **changed), randomness)

        patch.setattr(rounds, "_train", otherwise)

    return plant


def _every_site_has_one_seed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rounds, "_randomness", lambda *_: SeededRandomness(1))


def _held_out_patients_are_trained_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cohort, "split", lambda self, _: self)


@pytest.mark.parametrize(
    "plant",
    [
        _trained_with(noise_multiplier=lambda block: block.noise_multiplier / 2),
        _trained_with(sample_rate=lambda block: min(1.5 * block.sample_rate, 1.0)),
        _trained_with(steps=lambda block: block.steps + (block.sample_rate < 1)),
        _every_site_has_one_seed,
        _held_out_patients_are_trained_on,
    ],
    ids=["half the noise", "more patients", "a step more", "one seed", "held-out patients"],
)
def test_a_site_that_computes_something_else_than_it_charges_is_caught_by_its_answers(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    assert answers_are_as_charged(plan, SITE).ok
    plant(monkeypatch)
    check = answers_are_as_charged(plan, SITE)
    assert fails(check) and all(f"{module}: " in check.finding for module in TRAINED)


@pytest.mark.parametrize("trains", ["all", "head", "adapters"])
def test_a_discriminator_with_less_noise_than_charged_is_caught_by_what_the_site_keeps(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, trains: str
) -> None:
    gan = plan.gan.model_copy(update={"discriminator_trains": trains})
    studied = plan.model_copy(update={"gan": gan})
    assert answers_are_as_charged(studied, SITE).ok
    _trained_with(noise_multiplier=lambda block: 0.9 * block.noise_multiplier)(monkeypatch)
    assert "gan: what it kept" in answers_are_as_charged(studied, SITE).finding


def test_an_evaluation_with_less_noise_than_charged_is_caught_by_the_answers(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = plan.model_copy(update={"site_evaluation": SiteEvaluationPlan(epsilon=2.0)})
    assert answers_are_as_charged(evaluated, SITE).ok and rounds_are_charged_and_closed(evaluated, SITE).ok
    score = rounds.evaluate_holdout

    def quieter(used: Any, holdout: Cohort, block: Mechanism, *more: Any) -> BlockResult:
        return score(used, holdout, replace(block, noise_multiplier=block.noise_multiplier / 2), *more)

    monkeypatch.setattr(rounds, "evaluate_holdout", quieter)
    check = answers_are_as_charged(evaluated, SITE)
    assert fails(check) and "evaluation: what it sent" in check.finding and "gan: " not in check.finding


# ---- what leaves -----------------------------------------------------------------------------------------------------


def _real_loss_beside_the_progress(patch: pytest.MonkeyPatch) -> None:
    train = profiles.train_autoencoder

    def telling(study: StudyPlan, weights: Any, genes: Tensor, *more: Any, **options: Any) -> BlockResult:
        result = train(study, weights, genes, *more, **options)
        return replace(result, progress={**result.progress, "real_loss": float(genes.square().mean())})

    patch.setattr(profiles, "train_autoencoder", telling)
    patch.setattr(rounds, "train_autoencoder", telling)


def _real_loss_on_the_closed_list(patch: pytest.MonkeyPatch) -> None:
    _real_loss_beside_the_progress(patch)
    patch.setitem(records.PROGRESS, "autoencoder", records.PROGRESS["autoencoder"] | {"real_loss"})


def _real_loss_past_the_check(patch: pytest.MonkeyPatch) -> None:
    _real_loss_beside_the_progress(patch)
    patch.setattr(rounds, "check_reply", lambda *_: None)


@pytest.mark.parametrize(
    "plant", [_real_loss_beside_the_progress, _real_loss_on_the_closed_list, _real_loss_past_the_check]
)
def test_a_real_loss_on_the_wire_is_caught_by_the_closed_list_of_the_audit(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    plant(monkeypatch)
    assert fails(closed_list(plan, SITE, "autoencoder"))
    assert fails(rounds_are_charged_and_closed(plan, SITE))


def test_a_real_loss_under_another_name_is_caught_by_two_cohorts_that_must_not_differ(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = adversarial.train_gan

    def telling(*given: Any) -> BlockResult:
        result = train(*given)
        return replace(
            result, progress={**result.progress, "fake_score": float(given[4].slices.float().square().sum())}
        )

    monkeypatch.setattr(adversarial, "train_gan", telling)
    assert not fails(closed_list(plan, SITE, "gan")), "a name alone shows nothing"
    assert fails(progress_is_public(plan, SITE, "gan"))


def test_a_real_loss_as_a_network_s_update_norm_is_caught_by_its_weights(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = profiles.train_autoencoder

    def telling(study: StudyPlan, weights: Any, genes: Tensor, *more: Any) -> BlockResult:
        return replace(train(study, weights, genes, *more), progress={"update_norm": float(genes.square().mean())})

    monkeypatch.setattr(profiles, "train_autoencoder", telling)
    assert fails(progress_is_public(plan, SITE, "autoencoder"))


# ---- preprocessing ---------------------------------------------------------------------------------------------------


def _least_to_largest(values: np.ndarray) -> np.ndarray:
    """Min-max scaling over patients (axis 0) of values of whatever shape."""
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    scaled: np.ndarray = (values - low) / np.where(high > low, high - low, 1.0)
    return scaled


def _images_scaled_by_the_cohort(patch: pytest.MonkeyPatch) -> None:
    slices_of = rounds.image_slices

    def scaled(cohort: Cohort) -> Tensor:
        images = _least_to_largest(cohort.images.astype(np.float32)).astype(np.float16)
        return slices_of(replace(cohort, images=images))

    patch.setattr(rounds, "image_slices", scaled)


def _genes_scaled_by_the_table(patch: pytest.MonkeyPatch) -> None:
    read = ingest.read_expression

    def scaled(*given: Any) -> Profiles:
        found = read(*given)
        table = _least_to_largest(np.stack(list(found.values.values())))
        found.values = dict(zip(found.values, table, strict=True))
        return found

    patch.setattr(ingest, "read_expression", scaled)


def _morphology_scaled_by_the_cohort(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cohorts, "normalise", lambda values, _: _least_to_largest(values).astype(np.float32))


@pytest.mark.parametrize(
    "plant", [_images_scaled_by_the_cohort, _genes_scaled_by_the_table, _morphology_scaled_by_the_cohort]
)
def test_private_min_max_scaling_is_caught_by_preparing_patients_without_one(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    plant(monkeypatch)
    assert fails(preprocessing_is_apart(plan))


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_a_fault_makes_the_whole_audit_fail(plan: StudyPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    _half_the_noise(monkeypatch)
    found = audit_plan(plan, canaries=dict.fromkeys(MODULES, 32))
    assert not found.ok
    assert {check.module for check in found.checks if check.id == "noise-scale" and not check.ok} == set(MODULES)
