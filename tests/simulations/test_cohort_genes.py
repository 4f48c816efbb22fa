"""Panel, latents and expression: the gene side of the simulated cohort."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from fedsynth_simulations.cohort.expression import (
    biology,
    draw_batch_effect,
    draw_counts,
    draw_tpm,
    public_expression_reference,
    reference_quantiles,
)
from fedsynth_simulations.cohort.latents import LINK, draw_latents, link_matrix
from fedsynth_simulations.cohort.panel import BYSTANDERS, load_panel, pathways

GENES = [gene for gene, _ in load_panel()]


def test_panel_has_256_distinct_genes_in_a_dozen_pathways() -> None:
    assert len(GENES) == len(set(GENES)) == 256
    assert len(pathways()) == 12
    assert not set(GENES) & set(BYSTANDERS)


@pytest.mark.realdata
def test_panel_works_on_the_real_expression_tables() -> None:
    data = Path(os.environ.get("FEDSYNTH_REAL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    table = data / "tcga_lgg" / "CS" / "expression.tsv.gz"
    if not table.is_file():
        pytest.skip("the real research data are not beside the checkout (set FEDSYNTH_REAL_DATA)")
    with gzip.open(table, "rt") as stream:
        measured = {line.split("\t", 1)[0] for line in stream}
    assert set(GENES) | set(BYSTANDERS) <= measured


def test_drivers_have_unit_variance_and_the_stated_share_is_explained() -> None:
    rng = np.random.default_rng(0)
    patients = [draw_latents(rng) for _ in range(4000)]
    activities = np.stack([patient.pathways for patient in patients])
    drivers = np.array([list(patient.drivers.values()) for patient in patients])
    explained = (activities @ link_matrix().T).var(axis=0)
    assert drivers.std(axis=0) == pytest.approx(1.0, abs=0.05)
    assert explained == pytest.approx([driver.explained for driver in LINK], abs=0.06)


def test_grade_follows_the_drivers_and_severity() -> None:
    rng = np.random.default_rng(1)
    mild = np.mean([draw_latents(rng, -1.0).label == "high" for _ in range(500)])
    severe = np.mean([draw_latents(rng, 1.0).label == "high" for _ in range(500)])
    even = [draw_latents(rng) for _ in range(1000)]
    high = np.array([patient.label == "high" for patient in even])
    enhancement = np.array([patient.drivers["enhancement"] for patient in even])
    assert mild < 0.4 < 0.6 < severe
    assert 0.4 < high.mean() < 0.6
    assert enhancement[high].mean() - enhancement[~high].mean() > 1.0
    assert (enhancement[high] < 0).any() and (enhancement[~high] > 0).any()


def test_expression_is_positive_and_reproducible_and_sites_differ() -> None:
    activities = np.zeros(len(pathways()))
    first, again = (draw_tpm(activities, 0.0, np.random.default_rng(3)) for _ in range(2))
    batch = draw_batch_effect(np.random.default_rng(4))
    shifted = draw_tpm(activities, batch, np.random.default_rng(3))
    assert first.shape == (len(biology().genes),)
    assert (first > 0).all()
    assert np.array_equal(first, again)
    assert np.log(shifted / first) == pytest.approx(batch)


def test_counts_keep_the_order_of_abundance_roughly() -> None:
    tpm = draw_tpm(np.zeros(len(pathways())), 0.0, np.random.default_rng(5))
    counts = draw_counts(tpm, np.random.default_rng(6))
    assert counts.dtype.kind == "i" and (counts >= 0).all()
    assert np.corrcoef(np.log1p(counts), np.log1p(tpm))[0, 1] > 0.9


def test_public_reference_describes_normal_scores_of_each_gene() -> None:
    center, scale = public_expression_reference(GENES, 300, np.random.default_rng(7))
    assert center.shape == scale.shape == (256,)
    assert abs(center.mean()) < 0.02
    assert (np.abs(center) <= 3).all() and (scale > 0.1).all()
    # An abundant gene ranks high in everybody.
    baseline = biology().baseline[:256]
    assert np.corrcoef(center, baseline)[0, 1] > 0.95


@pytest.mark.parametrize(("panel", "n"), [(["TP53", "NOT_A_GENE"], 10), (["TP53", "EGFR"], 1)])
def test_public_reference_refuses_what_it_cannot_describe(panel: list[str], n: int) -> None:
    with pytest.raises(ValueError, match=r"expected (known genes|at least two)"):
        public_expression_reference(panel, n, np.random.default_rng(0))


def test_reference_quantiles_are_those_of_a_plan() -> None:
    quantiles = reference_quantiles()
    assert quantiles[0] == -3.0 and quantiles[-1] == 3.0
    assert quantiles[len(quantiles) // 2] == pytest.approx(0.0, abs=1e-12)
    assert quantiles == sorted(quantiles)
