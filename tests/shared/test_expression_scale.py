"""Facts about the mapping of profiles to the plan's scale."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsynth.expression import coverage, to_panel_scale
from fedsynth.plan import GenePlan

G = 40
GENES = GenePlan(
    panel=[f"G{i}" for i in range(G)],
    reference_quantiles=np.linspace(0.0, 10.0, 21).tolist(),
    center=[5.0] * G,
    scale=[2.0] * G,
    clip=2.0,
)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000))
def test_any_monotone_change_of_scale_gives_the_same_profile(seed: int) -> None:
    values = np.random.default_rng(seed).gamma(1.0, 50.0, G)
    np.testing.assert_array_equal(to_panel_scale(values, GENES), to_panel_scale(np.log2(values + 1), GENES))


def test_ranks_become_reference_quantiles_centred_and_scaled() -> None:
    mapped = to_panel_scale(np.arange(G, dtype=float), GENES)
    expected = np.clip((10.0 * (np.arange(G) + 0.5) / G - 5.0) / 2.0, -2.0, 2.0)
    np.testing.assert_allclose(mapped, expected, atol=1e-6)


def test_equal_values_share_a_rank() -> None:
    values = np.arange(G, dtype=float)
    values[:10] = 0.0
    mapped = to_panel_scale(values, GENES)
    assert len(set(mapped[:10].tolist())) == 1


def test_missing_genes_sit_at_the_public_centre_and_do_not_count_in_ranks() -> None:
    values = np.arange(G, dtype=float)
    values[20:] = np.nan
    mapped = to_panel_scale(values, GENES)
    assert (mapped[20:] == 0).all()
    assert mapped[0] == pytest.approx(-2.0)
    assert mapped[19] == pytest.approx(2.0)
    assert coverage(values) == 0.5


def test_a_profile_of_the_wrong_length_or_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="40 genes"):
        to_panel_scale(np.zeros(3), GENES)
    with pytest.raises(ValueError, match="at least two"):
        to_panel_scale(np.full(G, np.nan), GENES)
