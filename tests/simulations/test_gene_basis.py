"""Public weights of the moments: orthonormal directions with their scales, the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest

from fedsynth_simulations.gene_basis import public_moments_weights, weights_of_basis

RNG = np.random.default_rng(0)
PROFILES = RNG.standard_normal((200, 3)) @ RNG.standard_normal((3, 20)) + 0.1 * RNG.standard_normal((200, 20))
MORPHOLOGY = RNG.uniform(0.2, 0.8, (100, 2)).astype(np.float32)


def test_directions_are_orthonormal_and_hold_what_varies() -> None:
    weights = public_moments_weights(PROFILES, MORPHOLOGY, 3)
    basis = weights["basis"].double().numpy()
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-6)
    assert np.square(PROFILES @ basis).sum() / np.square(PROFILES).sum() > 0.97
    np.testing.assert_allclose(
        np.square(PROFILES @ basis).mean(0), weights["genes_scale"].double().numpy() ** 2, rtol=1e-5
    )


def test_signs_do_not_depend_on_the_decomposition() -> None:
    weights = public_moments_weights(PROFILES, MORPHOLOGY, 3)
    flipped = public_moments_weights(-PROFILES, MORPHOLOGY, 3)
    np.testing.assert_allclose(weights["basis"].numpy(), flipped["basis"].numpy(), atol=1e-6)


def test_morphology_is_scaled_by_those_in_whom_it_was_measured() -> None:
    some = MORPHOLOGY.copy()
    some[::2, 1] = np.nan
    weights = weights_of_basis(np.eye(20)[:, :2], PROFILES, some)
    assert float(weights["morphology_centre"][1]) == pytest.approx(some[1::2, 1].mean(), rel=1e-5)
    assert float(weights["morphology_scale"][0]) == pytest.approx(some[:, 0].std(), rel=1e-5)


def test_what_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(ValueError, match="components"):
        public_moments_weights(PROFILES, MORPHOLOGY, 21)
    nobody = np.full_like(MORPHOLOGY, np.nan)
    with pytest.raises(ValueError, match="measured"):
        public_moments_weights(PROFILES, nobody, 3)


def test_classes_differ_by_their_public_means() -> None:
    labels = np.arange(len(MORPHOLOGY)) % 2
    weights = public_moments_weights(PROFILES, MORPHOLOGY, 3, labels, 2)
    standard = (MORPHOLOGY - np.nanmean(MORPHOLOGY, axis=0)) / np.nanstd(MORPHOLOGY, axis=0)
    np.testing.assert_allclose(weights["morphology_by_class"][1], np.nanmean(standard[labels == 1], axis=0), atol=1e-6)
    assert not public_moments_weights(PROFILES, MORPHOLOGY, 3)["morphology_by_class"].any()
