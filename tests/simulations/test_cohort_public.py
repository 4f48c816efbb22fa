"""The public cohort in prepared form."""

from __future__ import annotations

import numpy as np
import pytest

from fedsynth.morphology import FEATURES
from fedsynth.plan import (
    AutoencoderPlan,
    GanPlan,
    GenePlan,
    ImagePlan,
    LabelPlan,
    MorphologyPlan,
    PrivacyPlan,
    RadiogenomicsPlan,
    SitePlan,
    StudyPlan,
)
from fedsynth_simulations.cohort.public import public_cohort


def plan(image: ImagePlan, label: LabelPlan | None = None) -> StudyPlan:
    training = {"rounds": 1, "steps_per_round": 1, "expected_batch": 8, "max_grad_norm": 1.0, "learning_rate": 1e-3}
    return StudyPlan(
        name="public-cohort",
        purpose="a plan for tests of the public cohort",
        image=image,
        genes=GenePlan(panel=["TP53", "EGFR"], reference_quantiles=[-1.0, 1.0], center=[0.0, 0.0], scale=[1.0, 1.0]),
        label=label or LabelPlan(),
        morphology=MorphologyPlan(features=["flair_ratio", "volume"]),
        privacy=PrivacyPlan(epsilon=8.0),
        autoencoder=AutoencoderPlan.model_validate({**training, "budget_share": 0.3}),
        radiogenomics=RadiogenomicsPlan.model_validate({**training, "budget_share": 0.3}),
        gan=GanPlan.model_validate({**training, "budget_share": 0.4}),
        sites=[SitePlan(name="north", nominal_patients=100)],
    )


def test_prepared_patients_have_the_plans_shape_and_order() -> None:
    image = ImagePlan(sequences=["FLAIR", "T1"], size=32, slices=8, pixel_spacing_mm=6.0, slice_spacing_mm=14.0)
    cohort = public_cohort(plan(image, LabelPlan(classes=["high", "low"])), 6, np.random.default_rng(0))
    assert cohort.images.shape == (6, 2, 8, 32, 32) and cohort.images.dtype == np.float16
    assert cohort.images.min() >= 0 and cohort.images.max() <= 1
    assert cohort.masks.shape == (6, 8, 32, 32) and (cohort.masks.reshape(6, -1) > 0).any(axis=1).all()
    assert cohort.labels.shape == (6,) and set(cohort.labels) <= {0, 1}
    tumour = cohort.masks > 0
    flair, t1 = cohort.images[:, 0][tumour].mean(), cohort.images[:, 1][tumour].mean()
    assert flair > t1
    bounds = {feature.name: feature for feature in FEATURES}
    ratio, volume = cohort.morphology.T
    assert (ratio > 1).all() and (ratio < bounds["flair_ratio"].high).all()
    voxel_ml = 6.0 * 6.0 * 14.0 / 1000
    assert volume == pytest.approx(tumour.reshape(6, -1).sum(axis=1) * voxel_ml)


def test_the_same_stream_draws_the_same_cohort() -> None:
    study = plan(ImagePlan(size=32, slices=8, pixel_spacing_mm=6.0, slice_spacing_mm=14.0))
    first, again = (public_cohort(study, 2, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.morphology, again.morphology)


@pytest.mark.parametrize(
    ("image", "label"),
    [(ImagePlan(sequences=["T1", "DWI"]), LabelPlan()), (ImagePlan(), LabelPlan(classes=["a", "b"]))],
)
def test_what_is_not_simulated_is_refused(image: ImagePlan, label: LabelPlan) -> None:
    with pytest.raises(ValueError, match="expected T1, T1c, FLAIR"):
        public_cohort(plan(image, label), 1, np.random.default_rng(0))
