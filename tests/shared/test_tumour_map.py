"""The map that shows the networks where a condition says the tumour lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsynth.models.condition import condition, tumour_map
from fedsynth.morphology import FEATURES, normalise
from fedsynth.plan import GanPlan, GenePlan, MorphologyPlan, StudyPlan

NAMES = [feature.name for feature in FEATURES]
_TRAINING = {
    "rounds": 1,
    "steps_per_round": 1,
    "expected_batch": 1,
    "max_grad_norm": 1.0,
    "learning_rate": 1e-3,
    "budget_share": 0.3,
}


def a_plan(features: list[str] = NAMES) -> StudyPlan:
    genes = GenePlan(panel=["A", "B"], reference_quantiles=[-1, 1], center=[0, 0], scale=[1, 1])
    return StudyPlan.model_validate(
        {
            "name": "map",
            "purpose": "where does the tumour lie",
            "genes": genes.model_dump(),
            "morphology": MorphologyPlan(features=features).model_dump(),
            "privacy": {"epsilon": 1.0},
            "autoencoder": _TRAINING,
            "radiogenomics": _TRAINING,
            "gan": GanPlan.model_validate(_TRAINING).model_dump(exclude_none=True),
            "sites": [{"name": "a", "nominal_patients": 10}],
        }
    )


def a_map(position: float = 0.0, **features: float) -> torch.Tensor:
    values = {**dict.fromkeys(NAMES, 0.5), "volume": 30.0, **features}
    unit = normalise(np.array([[values[name] for name in NAMES]]), NAMES)
    code = condition(torch.zeros(1, dtype=torch.int64), torch.from_numpy(unit), torch.tensor([position]), 2)
    return tumour_map(a_plan())(code)[0, 0]


def test_a_tumour_to_the_patients_left_and_back_lies_right_and_low_in_the_picture() -> None:
    picture = a_map(position_left=0.8, position_posterior=0.7)
    row, column = divmod(int(picture.argmax()), 64)
    assert column == pytest.approx(31.5 + 0.3 * 140 / 3, abs=1)
    assert row == pytest.approx(31.5 + 0.2 * 175 / 3, abs=1)


def test_the_ball_fades_away_from_its_slice_and_grows_with_the_volume() -> None:
    assert a_map(position=0.0).max() > 0.99
    assert a_map(position=1.0).max() < 0.1
    assert a_map(volume=120.0).sum() > 2 * a_map(volume=30.0).sum()


def test_half_of_the_peak_encloses_a_disc_of_about_the_balls_size() -> None:
    radius_mm = (3000 * 30.0 / (4 * np.pi)) ** (1 / 3)
    inside = a_map() > np.exp(-0.5)  # one radius from the middle
    assert float(inside.sum()) * 9.0 == pytest.approx(np.pi * radius_mm**2, rel=0.1)


def test_a_plan_without_positions_gets_an_empty_map() -> None:
    features = ["volume", "sphericity"]
    code = condition(torch.zeros(1, dtype=torch.int64), torch.full((1, 2), 0.5), torch.zeros(1), 2)
    assert not tumour_map(a_plan(features))(code).any()
