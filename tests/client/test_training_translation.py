"""Private translation: whose slices a step sees, whose gradient it takes, and where the noise goes."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from fedsynth.domains import Domain, draw_slices, sequence_channels, source_and_target
from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import SeededRandomness, SystemRandomness
from fedsynth.models.trainable import trainable_parameters
from fedsynth.plan import StudyPlan
from fedsynth.records import PROGRESS, State
from fedsynth.translation import SOURCE, TARGET, TO_SOURCE, TO_TARGET, make_networks, translation_losses
from fedsynth_client.training.block import BlockResult
from fedsynth_client.training.translation import train_translation

CYCLE, IDENTITY = 3.0, 2.0
TRAINING = {"rounds": 2, "steps_per_round": 2, "expected_batch": 2, "max_grad_norm": 1e6, "budget_share": 0.3}
EVERYBODY = Mechanism(1.0, 0.0, 1)  # everybody, without noise: what is left is the gradient
SEQUENCES = {"domains": "sequences", "source": "T1", "target": "T1c"}


def study(epsilon: float = 5.0, **changes: Any) -> StudyPlan:
    """A plan whose translation steps by plain gradient descent of rate 1, unless told otherwise."""
    others = {**TRAINING, "learning_rate": 1e-3}
    section = {**TRAINING, **SEQUENCES, "optimizer": "sgd", "learning_rate": 1.0, "width": 2}
    section |= {"cycle_weight": CYCLE, "identity_weight": IDENTITY, **changes}
    return StudyPlan.model_validate(
        {
            "name": "small",
            "purpose": "tests of translation",
            "image": {"sequences": ["T1", "T1c"], "size": 32, "slices": 3},
            "genes": {
                "panel": ["A", "B"],
                "reference_quantiles": [0.0, 1.0],
                "center": [0.0, 0.0],
                "scale": [1.0, 1.0],
            },
            "privacy": {"epsilon": epsilon},
            "autoencoder": others,
            "radiogenomics": others,
            "gan": {**others, "budget_share": 0.1},
            "translation": section,
            "sites": [{"name": "north", "nominal_patients": 20}],
        }
    )


def volumes(patients: int, slices: int = 1, seed: int = 0) -> Tensor:
    """(N, 3, S, 32, 32): two sequences and a mask, of which every other slice has tumour."""
    images = torch.randn(patients, 3, slices, 32, 32, generator=torch.Generator().manual_seed(seed)).tanh()
    images[:, -1] = -1.0
    images[:, -1, ::2, 3:9, 3:9] = 1.0
    return images


def block(
    plan: StudyPlan,
    patients: Tensor,
    mechanism: Mechanism = EVERYBODY,
    randomness: SeededRandomness | SystemRandomness | None = None,
    before: tuple[State, State] | None = None,
    first_step: int = 0,
) -> BlockResult:
    weights, local = before or (start(plan)["translators"], {})
    source = SeededRandomness(3) if randomness is None else randomness
    return train_translation(
        plan, weights, local, source_and_target(plan, patients), mechanism, source, first_step=first_step
    )


def start(plan: StudyPlan) -> dict[str, State]:
    networks = make_networks(plan)
    return {part: dict(networks[part].state_dict()) for part in ("translators", "discriminators")}


def moved(plan: StudyPlan, result: BlockResult) -> dict[str, Tensor]:
    """By how much a block moved each of the networks, as one vector each."""
    before = start(plan)
    local = {name.removeprefix("model/"): t for name, t in result.local.items() if name.startswith("model/")}
    found = {}
    for part, after in (("translators", result.weights), ("discriminators", local)):
        for name in {key.split(".")[0] for key in after}:
            own = [key for key in after if key.startswith(f"{name}.")]
            found[name] = torch.cat([(after[key] - before[part][key]).flatten() for key in own])
    return found


def whole(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([parts[name] for name in (TO_TARGET, TO_SOURCE, SOURCE, TARGET)])


def by_autograd(plan: StudyPlan, source: Tensor | None, target: Tensor | None) -> Tensor:
    """The gradient of one patient (C, H, W) of each domain, each player's own loss differentiated by itself."""
    networks = make_networks(plan)
    generators, judges = networks["translators"], networks["discriminators"]
    assert isinstance(generators, nn.ModuleDict) and isinstance(judges, nn.ModuleDict)
    of_generators, of_judges = torch.zeros(()), torch.zeros(())
    for x, way, here, there in ((source, TO_TARGET, SOURCE, TARGET), (target, TO_SOURCE, TARGET, SOURCE)):
        if x is None:
            continue
        back, item = generators[TO_SOURCE if way == TO_TARGET else TO_TARGET], x[None]
        fake = generators[way](item)
        of_generators = of_generators + (judges[there](fake)[0] - 1) ** 2 / 2
        of_generators = (
            of_generators + CYCLE * (back(fake) - item).abs().mean() + IDENTITY * (back(item) - item).abs().mean()
        )
        of_judges = of_judges + (judges[here](item)[0] - 1) ** 2 / 2 + judges[there](fake.detach())[0] ** 2 / 2
    first = torch.autograd.grad(
        of_generators, [p for name in (TO_TARGET, TO_SOURCE) for p in generators[name].parameters()]
    )
    second = torch.autograd.grad(of_judges, [p for name in (SOURCE, TARGET) for p in judges[name].parameters()])
    return torch.cat([gradient.flatten() for gradient in (*first, *second)])


def test_a_patients_gradient_is_that_of_each_players_own_loss_one_at_a_time() -> None:
    plan = study()
    patients = volumes(3)
    expected = [by_autograd(plan, patient[0], patient[1]) for patient in patients]
    together = -2 * whole(moved(plan, block(plan, patients)))  # rate 1, expected batch 2
    torch.testing.assert_close(together, torch.stack(expected).sum(0), rtol=1e-5, atol=1e-5)


def test_a_patient_of_several_slices_has_the_mean_of_their_gradients() -> None:
    plan = study(slices_per_patient=2)
    patient = volumes(1).expand(-1, -1, 3, -1, -1)  # all slices alike, so it does not matter which are drawn
    torch.testing.assert_close(
        -2 * whole(moved(plan, block(plan, patient))),
        by_autograd(plan, patient[0, 0, :1], patient[0, 1, :1]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(("slices", "has"), [(slice(0, 1), TARGET), (slice(1, 2), SOURCE)])
def test_a_patient_without_one_domain_has_the_losses_of_the_other(
    slices: slice, has: Literal["source", "target"]
) -> None:
    plan = study(domains="tumour", source="", target="")
    patient = volumes(1, slices=2)[:, :, slices]
    image = patient[0, :2, 0]
    expected = by_autograd(plan, image, None) if has == SOURCE else by_autograd(plan, None, image)
    torch.testing.assert_close(-2 * whole(moved(plan, block(plan, patient))), expected, rtol=1e-5, atol=1e-5)


def test_one_patient_moves_all_four_networks_by_the_clip_and_no_further() -> None:
    plan = study(max_grad_norm=0.01)
    for patients in (1, 4):
        parts = moved(plan, block(plan, volumes(patients)))
        length = 2 * float(whole(parts).norm())
        assert length <= patients * 0.01 * (1 + 1e-5)
        assert all(part.norm() > 0 for part in parts.values())
    alone = 2 * float(whole(moved(plan, block(plan, volumes(1)))).norm())
    assert alone == pytest.approx(0.01, rel=1e-3)  # its own gradient is longer, so it is cut to the very clip


def test_a_patient_whose_gradient_overflows_counts_as_nothing() -> None:
    plan = study()
    patients = volumes(2)
    patients[1, 0] = torch.nan
    torch.testing.assert_close(
        whole(moved(plan, block(plan, patients))), whole(moved(plan, block(plan, patients[:1]))), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("patients", [0, 3])
def test_all_four_networks_are_noised(patients: int) -> None:
    plan = study(max_grad_norm=1e-3)
    sigma = 200.0
    parts = moved(plan, block(plan, volumes(patients), Mechanism(1.0, sigma, 1), SystemRandomness()))
    assert set(parts) == {TO_TARGET, TO_SOURCE, SOURCE, TARGET}
    for part in parts.values():
        assert float(part.std()) == pytest.approx(sigma * 1e-3 / 2, rel=0.2)
    assert len(whole(parts)) == trainable_parameters(plan, "translation")


def test_noise_is_drawn_anew_and_a_seed_repeats_it() -> None:
    plan, patients, noisy = study(max_grad_norm=1.0), volumes(3, slices=3), Mechanism(0.5, 1.0, 2)
    first, second = (whole(moved(plan, block(plan, patients, noisy, SystemRandomness()))) for _ in range(2))
    assert not torch.allclose(first, second)
    seeded, again = (whole(moved(plan, block(plan, patients, noisy, SeededRandomness(5)))) for _ in range(2))
    assert torch.equal(seeded, again)


@pytest.mark.parametrize(
    "optimizer",
    [{"optimizer": "adam"}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adam", "schedule": "linear"}],
)
def test_two_blocks_are_one_long_one(optimizer: dict[str, Any]) -> None:
    """What stays at the site between blocks is all that the next needs: discriminators, moments, the schedule's place."""
    plan = study(learning_rate=1e-3, max_grad_norm=1.0, **optimizer)
    patients = volumes(3)
    at_once = block(plan, patients, Mechanism(1.0, 0.0, 4))
    half = block(plan, patients, Mechanism(1.0, 0.0, 2))
    local = load(save(half.local))  # as the outbox keeps it
    rest = block(plan, patients, Mechanism(1.0, 0.0, 2), before=(half.weights, local), first_step=2)
    for name, tensor in at_once.weights.items():
        torch.testing.assert_close(rest.weights[name], tensor, rtol=1e-5, atol=1e-7)
    assert set(rest.local) == set(at_once.local)
    for name, tensor in at_once.local.items():
        torch.testing.assert_close(rest.local[name], tensor, rtol=1e-4, atol=1e-6)
    forgetful = block(plan, patients, Mechanism(1.0, 0.0, 2), before=(half.weights, {}), first_step=2)
    assert any(not torch.allclose(forgetful.weights[name], tensor) for name, tensor in at_once.weights.items())


def test_a_block_sends_generators_and_one_number_and_keeps_the_rest() -> None:
    plan = study(optimizer="adam", learning_rate=1e-3)
    result = block(plan, volumes(3), Mechanism(0.5, 1.0, 2))
    assert {name.split(".")[0] for name in result.weights} == {TO_TARGET, TO_SOURCE}
    assert set(result.progress) == PROGRESS["translation"]
    parts = {name.split("/")[0] for name in result.local}
    assert parts == {"model", "moments"}
    assert {name.split("/")[1].split(".")[0] for name in result.local if name.startswith("model/")} == {SOURCE, TARGET}


def test_without_privacy_a_step_follows_the_mean_gradient_and_takes_no_noise() -> None:
    plan = study(epsilon=float("inf"), max_grad_norm=1e-9)  # not clipped either
    patients = volumes(3)
    mean = torch.stack([by_autograd(plan, patient[0], patient[1]) for patient in patients]).mean(0)
    torch.testing.assert_close(-whole(moved(plan, block(plan, patients))), mean, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="adds no noise"):
        block(plan, patients, Mechanism(1.0, 1.0, 1))


def test_losses_of_a_pair_come_from_that_pair_alone() -> None:
    plan = study()
    networks = make_networks(plan)
    source, target = volumes(3)[:, :1, 0], volumes(3, seed=1)[:, :1, 0]
    there = torch.ones(3)
    assert plan.translation is not None
    losses = translation_losses(plan.translation, networks, source, there, target, there)
    source[2] = 0.5
    again = translation_losses(plan.translation, networks, source, there, target, there)
    torch.testing.assert_close(losses[:2], again[:2])
    assert not torch.allclose(losses[2], again[2])


# --- which slices --------------------------------------------------------------------------------------------------


def test_the_domains_of_sequences_are_whole_volumes_of_the_two() -> None:
    plan, patients = study(source="T1c", target="T1"), volumes(2, slices=3)
    source, target = source_and_target(plan, patients)
    assert torch.equal(source.slices, patients[:, 1:2]) and torch.equal(target.slices, patients[:, :1])
    assert source.member.all() and target.member.all()
    assert sequence_channels(plan) == (1, 0)


def test_the_domains_of_tumour_are_told_apart_by_the_mask_which_is_no_part_of_them() -> None:
    plan, patients = study(domains="tumour", source="", target=""), volumes(2, slices=3)
    source, target = source_and_target(plan, patients)
    assert torch.equal(source.slices, patients[:, :2]) and torch.equal(target.slices, patients[:, :2])
    assert source.member.tolist() == [[False, True, False]] * 2
    assert target.member.tolist() == [[True, False, True]] * 2
    with pytest.raises(ValueError, match="no sequences"):
        sequence_channels(plan)


def test_slices_are_drawn_evenly_among_those_of_the_domain() -> None:
    member = torch.tensor([[True, False, True, True], [False, False, False, False], [False, True, False, False]])
    slices = torch.arange(12.0).reshape(3, 1, 4, 1, 1).expand(-1, -1, -1, 2, 2) + 1
    rows = torch.tensor([2, 0, 1, 0])
    drawn = draw_slices(Domain(slices, member), rows, 3000, torch.Generator().manual_seed(0))
    values, there = drawn.at(torch.arange(4))
    assert there[:, 0].tolist() == [1.0, 1.0, 0.0, 1.0]
    seen, counts = values[1, :, 0, 0, 0].unique(return_counts=True)
    assert seen.tolist() == [1.0, 3.0, 4.0] and counts.min() > 900
    assert set(values[0].unique().tolist()) == {10.0}
    assert not values[2].any()  # nothing of the domain: nothing of the patient
    assert not torch.equal(drawn.places[1], drawn.places[3])  # the same patient, drawn twice, is two draws
