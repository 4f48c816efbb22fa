"""Faults that only the gan's options and the translation can have, planted in the code that a site runs, and what of the
audit catches each.

A fault of the noise is caught by its scale in each parameter, a fault of the clip by how far one patient moves the sum;
a bound from canaries is too low for most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsynth.auditing.values import MechanismCheck
from fedsynth.dp import step
from fedsynth.dp.bookkeeping import Bookkeeper
from fedsynth.dp.functional import clipped_sums_of, gradient_penalties
from fedsynth.dp.randomness import SeededRandomness, SystemRandomness
from fedsynth.dp.step import PatientDPOptimizer
from fedsynth.plan import Activity, StudyPlan
from fedsynth_client import rounds
from fedsynth_client.auditing.checks import (
    Noiseless,
    clipping_binds,
    closed_list,
    noise_beside_patients,
    noise_is_fresh,
    noise_scale,
    patient_counts_once,
    progress_is_public,
    sampling_rate,
)
from fedsynth_client.auditing.run import audit_module
from fedsynth_client.auditing.wire import answers_are_as_charged, rounds_are_charged_and_closed
from fedsynth_client.training import adversarial
from fedsynth_client.training.block import BlockResult
from fedsynth_client.training.learner import Learner

SITE = "a"

PENALISED = {"loss": "wasserstein", "lipschitz": "gradient_penalty"}
# What a plan's section on images says, for each way in which images are trained.
OPTIONS: dict[str, dict[str, Any]] = {
    "clipped weights": {"loss": "wasserstein", "lipschitz": "weight_clip", "schedule": "linear"},
    "penalty": PENALISED,
    "penalty at fakes": {**PENALISED, "penalty_at": "fakes", "spectral_norm": True},
    # Generic weights have so steep slopes here that this public part must not hide what is released of patients.
    "penalty at fakes alone": {**PENALISED, "penalty_at": "fakes"},
    "descent": {"loss": "least_squares", "optimizer": "sgd", "momentum": 0.9},
    "growth": {"architecture": "enhanced", "growth": [1, 1, 1], **PENALISED},
    "private generator": {"loss": "hinge", "l1_weight": 10.0, "feature_matching_weight": 1.0},
    "autoencoder": {"architecture": "vae"},
    "sequences": {"source": "T1c", "target": "FLAIR"},
    "tumour": {"domains": "tumour"},
}
TRANSLATIONS = ("sequences", "tumour")
# Where the generator's own gradient is private.
JOINT = ("private generator", "autoencoder", *TRANSLATIONS)


def plan(options: str) -> StudyPlan:
    training = {"rounds": 3, "steps_per_round": 4, "expected_batch": 20, "max_grad_norm": 0.5, "learning_rate": 1e-3}
    genes = 20
    public = {"sha256": "0" * 64, "provenance": "made up here"}
    of_gan = {} if options in TRANSLATIONS else OPTIONS[options]
    values: dict[str, Any] = {
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
        "moments": {"budget_share": 0.2, "public": public},
        "autoencoder": {**training, "rounds": 0, "budget_share": 0.1},
        "radiogenomics": {**training, "rounds": 0, "budget_share": 0.1},
        "gan": {**training, "budget_share": 0.3, "slices_per_patient": 2, **of_gan},
        "sites": [{"name": SITE, "nominal_patients": 40}],
    }
    if options in TRANSLATIONS:
        values["translation"] = {**training, "budget_share": 0.3, "slices_per_patient": 2, **OPTIONS[options]}
    return StudyPlan.model_validate(values)


def module(options: str) -> Activity:
    return "translation" if options in TRANSLATIONS else "gan"


def fails(check: MechanismCheck) -> bool:
    """Whether a check reports a fault; its finding must say something."""
    assert check.finding
    return not check.ok


OF_A_MODULE = (
    noise_scale,
    noise_beside_patients,
    noise_is_fresh,
    clipping_binds,
    patient_counts_once,
    sampling_rate,
    closed_list,
    progress_is_public,
)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_sound_installation_passes(options: str) -> None:
    studied = plan(options)
    # What takes seconds is left to the options of which the others are variations.
    found = [
        check(studied, SITE, module(options))
        for check in OF_A_MODULE
        if check is not sampling_rate or options in ("penalty", "private generator", "autoencoder")
    ]
    assert [check.finding for check in found if not check.ok] == []


@pytest.mark.parametrize("options", ["growth", "autoencoder", "sequences"])
def test_a_sound_site_charges_and_sends_what_was_agreed(options: str) -> None:
    check = rounds_are_charged_and_closed(plan(options), SITE)
    assert check.ok, check.finding


@pytest.mark.parametrize("options", ["descent", "private generator", "tumour"])
def test_a_sound_site_answers_as_it_is_charged(options: str) -> None:
    check = answers_are_as_charged(plan(options), SITE)
    assert check.ok, check.finding


# ---- noise -----------------------------------------------------------------------------------------------------------


def _no_noise_in_the_generator(patch: pytest.MonkeyPatch, options: str) -> None:
    noisy = PatientDPOptimizer.add_noise

    def add_noise(self: PatientDPOptimizer) -> None:
        noisy(self)
        # The generators of a translation are the first of its networks; else they are a group of their own, the last.
        parameters = self.params
        quiet = parameters[: len(parameters) // 4] if options in TRANSLATIONS else self.param_groups[-1]["params"]
        for parameter in quiet:
            parameter.grad = parameter.summed_grad.clone()

    patch.setattr(PatientDPOptimizer, "add_noise", add_noise)


@pytest.mark.parametrize("options", JOINT)
def test_a_generator_without_noise_is_caught_by_the_noise_scale_with_patients_and_without(
    monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    _no_noise_in_the_generator(monkeypatch, options)
    assert fails(noise_scale(plan(options), SITE, module(options)))
    assert fails(noise_beside_patients(plan(options), SITE, module(options)))


@pytest.mark.parametrize("options", OPTIONS)
def test_nine_tenths_of_the_noise_are_caught_by_the_noise_scale(monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    whole = SystemRandomness.normal
    monkeypatch.setattr(SystemRandomness, "normal", lambda self, shape, std: whole(self, shape, 0.9 * std))
    assert fails(noise_scale(plan(options), SITE, module(options)))


def test_no_noise_is_caught_by_the_one_run_bound_where_a_gradient_is_no_matter_of_chance() -> None:
    found = audit_module(plan("sequences"), SITE, "translation", 64, Noiseless(SeededRandomness(1)))
    assert found.epsilon_bound > found.claimed_epsilon and not found.ok


# ---- clipping --------------------------------------------------------------------------------------------------------

Sums = Callable[..., list[Tensor]]


def _clipped_in_parts(parts: Callable[[nn.Module], dict[str, float]]) -> Sums:
    """Clips parameters by parts: those whose names begin so, each with a multiple of the clip."""

    def sums(
        model: nn.Module, parameters: Sequence[nn.Parameter], tensors: Any, losses: Any, clip: float
    ) -> list[Tensor]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found: dict[int, Tensor] = {}
        for prefix, factor in parts(model).items():
            own = [p for p in parameters if names[id(p)].startswith(prefix) and id(p) not in found]
            clipped = clipped_sums_of(model, own, tensors, losses, factor * clip)
            found |= {id(parameter): part for parameter, part in zip(own, clipped, strict=True)}
        return [found[id(parameter)] for parameter in parameters]

    return sums


@pytest.mark.parametrize("options", ["private generator", *TRANSLATIONS])
def test_networks_that_are_clipped_each_for_itself_are_caught_by_the_reach_of_one_patient(
    monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    def each_network(model: nn.Module) -> dict[str, float]:
        return {f"{name}.": 1.0 for name, _ in model.named_children()}

    monkeypatch.setattr(step, "clipped_sums_of", _clipped_in_parts(each_network))
    check = clipping_binds(plan(options), SITE, module(options))
    assert fails(check) and "1.41" in check.finding, "sqrt(2) clipping norms"


def test_fade_in_parameters_that_are_left_out_of_the_clip_are_caught_by_the_reach_of_one_patient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def all_but_what_fades_out(_: nn.Module) -> dict[str, float]:
        return {"from_images.1.": 1e9, "": 1.0}  # of 16 pixels, while 32 fade in

    monkeypatch.setattr(step, "clipped_sums_of", _clipped_in_parts(all_but_what_fades_out))
    assert fails(clipping_binds(plan("growth"), SITE, "gan"))


def test_a_penalty_at_interpolates_outside_the_clip_is_caught_by_the_reach_of_one_patient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_critic, take = adversarial.critic_losses, Learner.step

    def without_penalty(gan: Any, stage: Any) -> Any:
        return of_critic(gan.model_copy(update={"lipschitz": "none"}), stage)

    def outside(self: Learner, patients: int, tensors: Any, losses: Any, public: Any) -> None:
        def with_penalty(model: nn.Module) -> Tensor:
            found: Tensor = public(model)
            if patients:
                _, code, points = (part.flatten(0, 1) for part in tensors(torch.arange(patients)))
                found = found + 10 * gradient_penalties(lambda x: model(x, code), points).mean()
            return found

        take(self, patients, lambda rows: tensors(rows)[:2], losses, with_penalty)

    monkeypatch.setattr(adversarial, "critic_losses", without_penalty)
    monkeypatch.setattr(Learner, "step", outside)
    assert fails(clipping_binds(plan("penalty"), SITE, "gan"))


@pytest.mark.parametrize("options", ["penalty at fakes", "penalty at fakes alone"])
def test_a_public_penalty_that_is_taken_at_patients_slices_is_caught_by_the_reach_of_one_patient(
    monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    take = Learner.step

    def beside_patients(self: Learner, patients: int, tensors: Any, losses: Any, public: Any) -> None:
        def with_penalty(model: nn.Module) -> Tensor:
            found: Tensor = public(model)
            if patients:
                shown, code = (part.flatten(0, 1) for part in tensors(torch.arange(patients)))
                slopes = gradient_penalties(lambda x: model(x, code), shown)
                found = found + self._plan.gan.penalty_weight * slopes.mean()
            return found

        take(self, patients, tensors, losses, with_penalty)

    monkeypatch.setattr(Learner, "step", beside_patients)
    assert fails(clipping_binds(plan(options), SITE, "gan"))


@pytest.mark.parametrize("options", ["clipped weights", "growth", "autoencoder", "tumour"])
def test_a_missing_clip_is_caught_by_the_reach_of_one_patient(monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    kept = Bookkeeper.clipped_sums
    monkeypatch.setattr(
        Bookkeeper,
        "clipped_sums",
        lambda self, losses, patients, clip, **more: kept(self, losses, patients, 1e30, **more),
    )
    monkeypatch.setattr(step, "clipped_sums_of", _clipped_in_parts(lambda _: {"": 1e30}))
    assert fails(clipping_binds(plan(options), SITE, module(options)))


# ---- what leaves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["private generator", "autoencoder"])
def test_a_site_that_trains_with_less_noise_than_it_charges_is_caught_by_what_it_kept(
    monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    """What it sent need not show it: Adam's steps are as long whatever the scale of the noise."""
    train = rounds._train

    def quieter(*given: Any) -> BlockResult:
        *first, block, randomness = given
        return train(*first, replace(block, noise_multiplier=0.9 * block.noise_multiplier), randomness)

    monkeypatch.setattr(rounds, "_train", quieter)
    assert "gan: what it kept" in answers_are_as_charged(plan(options), SITE).finding
