"""Scores of held-out patients: what a row says of a patient, and what can be read from a noisy sum of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsynth.evaluation.patients import Patients
from fedsynth.evaluation.site_scores import (
    MEASURED,
    ROW_SIZE,
    SCORED,
    Evaluators,
    bearing_pixels,
    evaluators_template,
    expected_width,
    meanings,
    noisy_scores,
    ratio_interval,
    rows,
)
from fedsynth.evaluation.site_values import NoisyScore
from fedsynth.plan import StudyPlan

SIZE, SLICES, PIXELS = 32, 6, 12
FEATURES, CLASSES = 3, 2


class ReadsImage(nn.Module):
    """Says tumour wherever the first channel is bright (or dark): an oracle on the patients of this test."""

    def __init__(self, whole_slice: bool, sign: float = 1.0) -> None:
        super().__init__()
        self.whole_slice, self.sign = whole_slice, sign

    def forward(self, slices: Tensor) -> Tensor:
        bright = slices[:, 0] - 0.5
        return self.sign * (bright.sum(dim=(1, 2)) + SIZE**2 / 2 - PIXELS + 0.5 if self.whole_slice else bright)


@dataclass(frozen=True)
class Answers:
    """Predicts what it is told to."""

    morphology: NDArray[np.float32]
    label: int

    def draw(self, count: int, generator: torch.Generator) -> object:
        raise NotImplementedError

    def predict(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.zeros(len(genes), CLASSES)
        logits[:, self.label] = 1.0
        return torch.from_numpy(self.morphology).expand(len(genes), -1), logits


def patients(count: int = 1, side: int = 6) -> Patients:
    """Patients with a bright square of side x side pixels in the middle slices, features 0.5 and label 1."""
    masks = np.zeros((count, SLICES, SIZE, SIZE), dtype=np.uint8)
    masks[:, 2:4, 5 : 5 + side, 5 : 5 + side] = 1
    return Patients(
        np.repeat(masks[:, None], 2, axis=1).astype(np.float16),
        masks,
        np.zeros((count, 4), dtype=np.float32),
        np.full((count, FEATURES), 0.5, dtype=np.float32),
        np.ones(count, dtype=np.int64),
        np.ones(count, dtype=bool),
        np.ones(count, dtype=bool),
        np.zeros(count, dtype=np.int64),
        ("a",),
    )


def used(sign: float = 1.0, morphology: float = 0.5, label: int = 1) -> Evaluators:
    answers = Answers(np.full(FEATURES, morphology, dtype=np.float32), label)
    unet, classifier = ReadsImage(False, sign), ReadsImage(True, sign)
    return Evaluators(unet, classifier, answers, np.full(FEATURES, 0.6), 0, PIXELS)  # type: ignore[arg-type]


def scores(row: Tensor) -> dict[str, float | None]:
    """Scores of one row on [0, 1]; None where not measured."""
    entry = dict(zip((*SCORED, *(f"n_{m}" for m in MEASURED)), (row * ROW_SIZE**0.5).tolist(), strict=True))
    of = {"dice": "images", "slices": "images", "morphology_floor": "morphology", "label_floor": "label"}
    return {
        name: (entry[name] + 1) / 2 if entry[f"n_{of.get(name, name)}"] == pytest.approx(1.0) else None
        for name in SCORED
    }


def test_an_oracle_scores_1_and_its_opposite_0() -> None:
    assert scores(rows(used(), patients())[0]) == pytest.approx(
        {"dice": 1, "slices": 1, "morphology": 1, "morphology_floor": 0.6, "label": 1, "label_floor": 0}, abs=1e-6
    )
    worst = scores(rows(used(-1.0, morphology=0.0, label=0), patients())[0])
    assert worst == pytest.approx(
        {"dice": 0, "slices": 0, "morphology": 0, "morphology_floor": 0.6, "label": 0, "label_floor": 0}, abs=1e-6
    )


def test_a_row_never_exceeds_norm_1_and_the_best_patient_reaches_it() -> None:
    best = replace(used(), morphology_floor=np.full(FEATURES, 0.5), label_floor=1)
    assert rows(best, patients())[0].norm() == pytest.approx(1.0, abs=1e-12)


def test_what_a_patient_lacks_is_neither_scored_nor_counted() -> None:
    whole, nothing = patients(), {"dice": None, "slices": None}
    for lacking in (
        replace(whole, has_images=np.array([False])),
        replace(whole, masks=whole.masks * 0),  # no tumour: Dice says nothing
        replace(whole, masks=whole.masks * 0 + 1),  # no slice without
        patients(side=3),  # less than 1 square cm in every slice
    ):
        assert scores(rows(used(), lacking)[0]) == pytest.approx({**scores(rows(used(), whole)[0]), **nothing})
    no_genes = scores(rows(used(), replace(whole, has_genes=np.array([False])))[0])
    assert [name for name, value in no_genes.items() if value is None] == list(SCORED[2:])
    part = replace(whole, morphology=np.array([[np.nan, 0.5, 0.75]], dtype=np.float32), labels=np.array([-1]))
    found = scores(rows(used(), part)[0])
    assert found["morphology"] == pytest.approx(0.5) and found["label"] is None
    unknown = replace(whole, morphology=np.full((1, FEATURES), np.nan, dtype=np.float32))
    assert scores(rows(used(), unknown)[0])["morphology"] is None
    assert rows(used(), whole.rows(np.array([False]))).shape == (0, ROW_SIZE)


def test_a_plan_fixes_the_evaluators_and_names_the_label(tiny_plan: StudyPlan) -> None:
    template = evaluators_template(tiny_plan)
    assert template["morphology_floor"].shape == (len(tiny_plan.morphology.features),)
    assert template["label_floor"].shape == (len(tiny_plan.label.classes),)
    assert {name.split("/")[0] for name in template} == {"unet", "classifier", "morphology_floor", "label_floor"}
    assert [each.name for each in meanings(tiny_plan)] == ["dice", "slices", "morphology", "label"]
    assert meanings(tiny_plan)[-1].title == "Grade from genes"
    assert bearing_pixels(tiny_plan) == 12  # 100 mm2 at 3 mm
    large = tiny_plan.model_copy(update={"image": tiny_plan.image.model_copy(update={"size": 128})})
    assert bearing_pixels(large) == 3  # evaluated at 64 pixels of 6 mm


def total(means: dict[str, float], patients_of: dict[str, float]) -> Tensor:
    """The sum without noise of patients with these mean scores."""
    of = {"dice": "images", "slices": "images", "morphology_floor": "morphology", "label_floor": "label"}
    centred = [(2 * means[name] - 1) * patients_of[of.get(name, name)] for name in SCORED]
    return torch.tensor([*centred, *(patients_of[name] for name in MEASURED)], dtype=torch.float64) / ROW_SIZE**0.5


MEANS = {"dice": 0.6, "slices": 0.8, "morphology": 0.7, "morphology_floor": 0.6, "label": 0.75, "label_floor": 0.55}
TRUTH = {"dice": 0.6, "slices": 0.8, "morphology": 0.7, "label": 0.75}
GAIN = {"slices": 0.3, "morphology": 0.1, "label": 0.2}


def read(noise_sd: float, count: float, generator: torch.Generator) -> list[NoisyScore]:
    true = total(MEANS, dict.fromkeys(MEASURED, count))
    noise = torch.randn(ROW_SIZE, generator=generator, dtype=torch.float64) * noise_sd
    return noisy_scores((true + noise).to(torch.float32), noise_sd)


def test_with_next_to_no_noise_the_means_come_back() -> None:
    for score in read(1e-4, 50.0, torch.Generator().manual_seed(1)):
        assert score.value == pytest.approx(TRUTH[score.name], abs=1e-3)
        assert score.interval is not None and score.interval[1] - score.interval[0] < 1e-3
        assert score.patients == pytest.approx(50, abs=1e-2) and not score.drowned
        if score.name in GAIN:
            assert score.gain == pytest.approx((GAIN[score.name],) * 2, abs=1e-3)
    assert [score.floor for score in read(1e-4, 50.0, torch.Generator())] == [
        None,
        0.5,
        pytest.approx(0.6, abs=1e-3),
        pytest.approx(0.55, abs=1e-3),
    ]


@pytest.mark.parametrize(("noise_sd", "count"), [(0.5, 40.0), (2.3, 40.0), (2.3, 15.0)])
def test_an_interval_holds_the_true_mean_in_95_of_100_cases(noise_sd: float, count: float) -> None:
    """Also where the noise is so large that many intervals say nothing: those are counted as holding it."""
    generator, repeats = torch.Generator().manual_seed(2), 1500
    misses = dict.fromkeys([*TRUTH, *(f"gain of {name}" for name in GAIN)], 0)
    for _ in range(repeats):
        for score in read(noise_sd, count, generator):
            if score.interval is not None:
                low, high = score.interval
                misses[score.name] += not low <= TRUTH[score.name] <= high
                assert score.value is not None and low - 1e-9 <= score.value <= high + 1e-9
            if score.gain is not None:
                misses[f"gain of {score.name}"] += not score.gain[0] <= GAIN[score.name] <= score.gain[1]
    # Three standard deviations of a count above what 5 % would give.
    assert max(misses.values()) <= repeats * 0.05 + 3 * (repeats * 0.05 * 0.95) ** 0.5, misses
    if noise_sd < 1:  # bounded nearly always, so the coverage is not bought by saying nothing
        assert min(misses.values()) >= repeats * 0.05 - 4 * (repeats * 0.05 * 0.95) ** 0.5, misses


def test_what_drowns_in_noise_is_called_so() -> None:
    generator = torch.Generator().manual_seed(3)
    drowned = [score for _ in range(200) for score in read(20.0, 10.0, generator)]
    assert sum(score.drowned for score in drowned) > 0.9 * len(drowned)
    assert all(score.drowned for score in drowned if score.value is None)
    assert all(score.interval is None and score.floor is None for score in drowned if score.value is None)
    # Where there is nothing but noise, no score looks sharp by chance.
    noise = [
        score
        for _ in range(3000)
        for score in noisy_scores(torch.randn(ROW_SIZE, generator=generator, dtype=torch.float64), 1.0)
    ]
    assert sum(score.value is not None for score in noise) > 50
    assert all(score.drowned for score in noise)
    none = noisy_scores(torch.zeros(ROW_SIZE), 1.0)
    assert all(score.drowned and score.value is None and score.gain is None for score in none)
    clear = [score for _ in range(50) for score in read(0.5, 60.0, generator)]
    assert not any(score.drowned for score in clear)


def test_a_ratio_s_interval_is_fieller_s() -> None:
    """Worked out by hand: 3 / 4 with unit noise; |3 - 4 r| = 1.96 sqrt(1 + r^2) at both ends."""
    found = ratio_interval(3.0, 4.0, 1.0, 1.0)
    assert found is not None
    for end in found:
        assert abs(3 - 4 * end) == pytest.approx(1.959964 * (1 + end**2) ** 0.5, rel=1e-5)
    assert found[0] < 0.75 < found[1]
    assert ratio_interval(3.0, 1.9, 1.0, 1.0) is None  # the denominator does not stand out of its noise
    assert ratio_interval(3.0, -40.0, 1.0, 1.0) is None  # no number of people


def test_a_forecast_says_how_wide_intervals_will_be() -> None:
    widths = [
        score.interval[1] - score.interval[0]
        for seed in range(60)
        for score in read(1.0, 50.0, torch.Generator().manual_seed(seed))
        if score.name == "label" and score.interval is not None
    ]
    assert expected_width(50.0, 1.0) == pytest.approx(np.mean(widths), rel=0.1)
    assert expected_width(5.0, 2.0) == 1.0
    assert expected_width(1e6, 1.0) < 1e-4
