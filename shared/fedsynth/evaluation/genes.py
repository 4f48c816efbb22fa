"""Is the synthetic gene table a faithful stand-in for the expression of held-out real patients?"""

from __future__ import annotations

import numpy as np

from fedsynth.evaluation.columns import Columns, beside_floor, figure, interval
from fedsynth.evaluation.linear import class_scores
from fedsynth.evaluation.samples import Profiles
from fedsynth.evaluation.values import Section
from fedsynth.metrics.coexpression import coexpression
from fedsynth.metrics.discrimination import discriminative_auc
from fedsynth.metrics.marginals import mean_wasserstein, sd_ratios, spread_error
from fedsynth.metrics.measurable import NotMeasurable, require_rows
from fedsynth.metrics.roc_auc import macro_auc
from fedsynth.plan import StudyPlan

MIN_TEST_PATIENTS = 8


def genes(plan: StudyPlan, profiles: Columns[Profiles], holdout: Profiles, rng: np.random.Generator) -> Section:
    """Compare the profiles of each column with those of the held-out patients.

    Args:
        plan: classes, and the range to which profiles are clipped.
        profiles: synthetic, real training and public-only patients; the floor is made here.
        holdout: held-out real patients.
        rng: source of all draws.
    """
    sizes = [
        len(p)
        for p in (profiles.synthetic, profiles.real, profiles.public_only, holdout)
        if isinstance(p, Profiles) and len(p)
    ]
    size = min(sizes, default=0)
    real = holdout.take(rng.permutation(len(holdout))[:size]).genes
    independent = np.clip(rng.normal(size=(size, real.shape[1])), -plan.genes.clip, plan.genes.clip).astype(np.float32)
    equal = beside_floor(
        profiles, lambda sample: sample.take(rng.permutation(len(sample))[:size]).genes, lambda _: independent
    )
    ratios = equal.map(lambda values: float(sd_ratios(real, values).mean())).synthetic
    ratio = "" if isinstance(ratios, NotMeasurable) else f" Mean ratio of the synthetic table: {ratios:.2f}."

    test = holdout.take(np.flatnonzero(holdout.labels >= 0))
    classes = len(plan.label.classes)

    def trained(sample: Profiles) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        require_rows("held-out patients with genes and label", test.genes, MIN_TEST_PATIENTS)
        return class_scores(sample.genes, sample.labels, test.genes, classes)

    scores = beside_floor(profiles, trained, lambda _: np.full((len(test), classes), 1 / classes))
    return Section(
        id="genes",
        title="Fidelity of the gene table",
        explanation=(
            f"Synthetic expression profiles over {len(plan.genes.panel)} genes are compared with those of held-out "
            "real patients, on the study's normalised scale: each gene by itself (distance of distributions, spread), "
            "pairs of genes (co-expression), all genes together (can a classifier tell synthetic from real? 0.5 is "
            "best: it cannot), and in use (is the label learnt from synthetic profiles recognised in real ones?). The "
            "floor draws every gene by itself from a normal distribution with the public centre and scale. Faithful "
            "averages do not make single synthetic profiles biologically valid, and sites' batch effects may be part "
            "of what is compared."
        ),
        figures=[
            figure(
                "Distance of the distributions, mean over genes (1-Wasserstein)",
                "lower",
                equal.map(lambda values: mean_wasserstein(real, values)),
                f"In units of the public scale; {size} profiles a column. Floor: independent standard normal genes.",
            ),
            figure(
                "Error of the spread, mean |log2 (sd ratio)|",
                "lower",
                equal.map(lambda values: spread_error(real, values)),
                f"0 is right, 1 is half or double the real spread.{ratio}",
            ),
            figure(
                "Agreement of co-expression (correlation)",
                "higher",
                equal.map(lambda values: coexpression(real, values)[0]),
                "Correlation of the gene-by-gene correlation matrices; few patients hold down 'real' too.",
            ),
            figure(
                "Error of co-expression (mean absolute)",
                "lower",
                equal.map(lambda values: coexpression(real, values)[1]),
                "Mean absolute difference of the gene-by-gene correlations.",
            ),
            figure(
                "AUC, synthetic told from real",
                "lower",
                equal.map(lambda values: discriminative_auc(real, values, rng)),
                "0.5 is best. Cross-validated logistic regression on leading principal components and their squares.",
            ),
            figure(
                f"AUC, {plan.label.name} from genes",
                "higher",
                scores.map(lambda values: macro_auc(values, test.labels)),
                f"Logistic regression trained on each column, tested on {len(test)} real patients. Floor: a constant "
                "prediction, 0.5 by definition.",
                interval(scores, lambda values, rows: macro_auc(values[rows], test.labels[rows]), len(test), rng),
            ),
        ],
    )
