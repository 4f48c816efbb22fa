"""What a patient adds to the moments: bounded, a function of that patient alone, and nothing where something is missing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsynth.engines.moments import (
    SHAPE_POINTS,
    layout,
    noise_variances,
    pack_symmetric,
    public_template,
    row_size,
    rows,
    sizes,
    unpack,
    unpack_symmetric,
)
from fedsynth.plan import StudyPlan

GENES, COMPONENTS = 12, 4
FEATURES = ["volume", "enhancing_fraction", "sphericity"]


def make_plan() -> StudyPlan:
    training = {"rounds": 0, "steps_per_round": 1, "expected_batch": 5, "max_grad_norm": 1.0, "learning_rate": 1e-3}
    return StudyPlan.model_validate(
        {
            "name": "moments",
            "purpose": "A plan with moments for tests",
            "genes": {
                "panel": [f"G{i}" for i in range(GENES)],
                "reference_quantiles": [-2.0, 2.0],
                "center": [0.0] * GENES,
                "scale": [1.0] * GENES,
            },
            "morphology": {"features": FEATURES},
            "privacy": {"epsilon": 5.0},
            "moments": {
                "components": COMPONENTS,
                "budget_share": 0.5,
                "public": {"sha256": "0" * 64, "provenance": "made up for tests"},
            },
            "autoencoder": {**training, "budget_share": 0.1},
            "radiogenomics": {**training, "budget_share": 0.1},
            "gan": {**training, "rounds": 1, "budget_share": 0.3},
            "sites": [{"name": "a", "nominal_patients": 40}],
        }
    )


PLAN = make_plan()
SIZE = sizes(PLAN)


def make_public() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(GENES, COMPONENTS, generator=draws))
    return {
        "basis": basis,
        "genes_scale": torch.tensor([2.0, 1.5, 1.0, 0.5]),
        "morphology_centre": torch.tensor([0.5, 0.3, 0.7]),
        "morphology_scale": torch.tensor([0.12, 0.2, 0.05]),
        # Rows use neither of these.
        "morphology_shape": torch.zeros(3, SHAPE_POINTS),
        "morphology_by_class": torch.zeros(SIZE.classes, 3),
    }


PUBLIC = make_public()


def patients(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, GENES, generator=draws),
        torch.rand(count, len(FEATURES), generator=draws),
        torch.randint(-1, 2, (count,), generator=draws),
    )


def test_public_weights_are_those_of_the_template() -> None:
    template = public_template(PLAN)
    assert {name: tensor.shape for name, tensor in template.items()} == {n: t.shape for n, t in PUBLIC.items()}


extreme = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from([3e38, -3e38, 0.0, 1e-40])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(extreme, min_size=GENES, max_size=GENES),
    st.lists(extreme, min_size=3, max_size=3),
    st.integers(min_value=-1, max_value=1),
)
def test_a_row_is_finite_and_at_most_1_long_whatever_the_patient(
    genes: list[float], morphology: list[float], label: int
) -> None:
    row = rows(PLAN, PUBLIC, torch.tensor([genes]), torch.tensor([morphology]), torch.tensor([label]))
    assert row.shape == (1, row_size(PLAN))
    assert row.dtype == torch.float32
    assert torch.isfinite(row).all()
    assert float(row.double().norm()) <= 1.0


def test_a_patient_far_from_the_public_population_uses_the_whole_norm() -> None:
    far = rows(PLAN, PUBLIC, torch.full((1, GENES), 1e6), torch.full((1, 3), 1e6), torch.tensor([1]))
    assert float(far.norm()) == pytest.approx(1.0, abs=1e-5)


def test_shares_of_the_blocks_are_bounds_that_are_reached() -> None:
    far = rows(PLAN, PUBLIC, torch.full((1, GENES), 1e6), torch.full((1, 3), 1e6), torch.tensor([1]))[0]
    blocks = layout(SIZE)
    lengths = [math.prod(block.shape) for block in blocks.values()]
    squares = [float(part.double().square().sum()) for part in far.split(lengths)]
    assert squares == pytest.approx([0.06, 0.02, 0.20, 0.07, 0.10, 0.48, 0.07], abs=1e-4)


def test_neighbouring_cohorts_differ_by_at_most_1_in_the_sum() -> None:
    genes, morphology, labels = patients(30)
    genes[4], morphology[4] = 1e9, -1e9
    whole = rows(PLAN, PUBLIC, genes, morphology, labels).double()
    for left_out in (0, 4, 29):
        kept = [i for i in range(30) if i != left_out]
        without = rows(PLAN, PUBLIC, genes[kept], morphology[kept], labels[kept]).double()
        assert torch.equal(without, whole[kept])  # nobody's row depends on others
        assert float((whole.sum(0) - without.sum(0)).norm()) <= 1.0


def test_sums_unpack_to_counts_and_moments() -> None:
    genes, morphology, labels = patients(50, seed=1)
    genes *= 0.1  # short enough that nothing is clipped
    morphology = PUBLIC["morphology_centre"] + 0.2 * PUBLIC["morphology_scale"] * (morphology - 0.5)
    found = unpack(SIZE, rows(PLAN, PUBLIC, genes, morphology, labels).double().sum(0))
    u = genes.double() @ PUBLIC["basis"].double() / PUBLIC["genes_scale"].double()
    m = ((morphology - PUBLIC["morphology_centre"]) / PUBLIC["morphology_scale"]).double()
    for label in (0, 1):
        chosen = labels == label
        assert found["class_counts"][label] == pytest.approx([float(chosen.sum())] * 4, rel=1e-4)
        torch.testing.assert_close(found["class_genes"][label], u[chosen].sum(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found["class_morphology"][label], m[chosen].sum(0), rtol=1e-3, atol=1e-4)
    assert float(found["class_counts"][2, 0]) == pytest.approx(float((labels == -1).sum()), rel=1e-4)
    assert found["pair_counts"] == pytest.approx([50.0] * 3, rel=1e-4)
    torch.testing.assert_close(found["genes"], u.T @ u, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["link"], u.T @ m, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["morphology"], m.T @ m, rtol=1e-3, atol=1e-4)


def test_what_is_missing_changes_nothing_else() -> None:
    genes, morphology, labels = patients(20, seed=2)
    labels = labels.clamp(min=0)
    whole = unpack(SIZE, rows(PLAN, PUBLIC, genes, morphology, labels).double().sum(0))

    without_profile = unpack(
        SIZE, rows(PLAN, PUBLIC, torch.full_like(genes, torch.nan), morphology, labels).double().sum(0)
    )
    for name in ("class_morphology", "morphology"):
        torch.testing.assert_close(without_profile[name], whole[name])
    for name in ("genes", "link", "class_genes", "pair_counts"):
        assert float(without_profile[name].abs().max()) == 0.0
    assert float(without_profile["class_counts"][:, 0].abs().max()) == 0.0

    without_images = unpack(
        SIZE, rows(PLAN, PUBLIC, genes, torch.full_like(morphology, torch.nan), labels).double().sum(0)
    )
    for name in ("genes", "class_genes"):
        torch.testing.assert_close(without_images[name], whole[name])
    for name in ("morphology", "link", "class_morphology", "pair_counts"):
        assert float(without_images[name].abs().max()) == 0.0

    unknown = unpack(SIZE, rows(PLAN, PUBLIC, genes, morphology, torch.full_like(labels, -1)).double().sum(0))
    for name in ("genes", "link", "morphology", "pair_counts"):
        torch.testing.assert_close(unknown[name], whole[name])
    assert float(unknown["class_genes"].abs().max()) == 0.0
    assert float(unknown["class_counts"][2, 0]) == pytest.approx(20.0, rel=1e-4)


def test_nothing_known_adds_nothing() -> None:
    row = rows(PLAN, PUBLIC, torch.full((1, GENES), torch.nan), torch.full((1, 3), torch.inf), torch.tensor([1]))
    assert float(row.abs().max()) == 0.0


def test_a_site_without_patients_has_an_empty_matrix_of_rows() -> None:
    none = rows(PLAN, PUBLIC, torch.zeros(0, GENES), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert none.shape == (0, row_size(PLAN))


@pytest.mark.parametrize("label", [-2, 2])
def test_labels_that_are_no_class_are_refused(label: int) -> None:
    with pytest.raises(ValueError, match="expected labels"):
        rows(PLAN, PUBLIC, torch.zeros(1, GENES), torch.zeros(1, 3), torch.tensor([label]))


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="expected genes"):
        rows(PLAN, PUBLIC, torch.zeros(1, GENES + 1), torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="expected a sum"):
        unpack(SIZE, torch.zeros(3))


def test_noise_has_the_stated_variance_in_every_moment() -> None:
    draws = torch.Generator().manual_seed(5)
    noise = [unpack(SIZE, 2.0 * torch.randn(row_size(PLAN), generator=draws)) for _ in range(4000)]
    expected = noise_variances(SIZE, 2.0)
    for name, variance in expected.items():
        found = torch.stack([sample[name] for sample in noise]).var(0)
        assert float((found / variance).min()) > 0.85
        assert float((found / variance).max()) < 1.15


def test_packing_keeps_the_norm_and_comes_back() -> None:
    matrix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix + matrix.T
    packed = pack_symmetric(matrix)
    assert float(packed.norm()) == pytest.approx(float(matrix.norm()))
    torch.testing.assert_close(unpack_symmetric(packed, 5), matrix)
