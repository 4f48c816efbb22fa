"""Is the synthetic gene table a faithful stand-in for the expression of held-out real patients?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsynth.dp.randomness import Randomness, SeededRandomness
from fedsynth.evaluation.columns import NOT_ASKED, Columns, attempt, beside_floor, figure
from fedsynth.evaluation.gene_baselines import baseline_names, draw_marginals, draw_normal, measure_marginals
from fedsynth.evaluation.linear import class_scores
from fedsynth.evaluation.recovery import HALVES, Recovered, Recovery, concordance_curve, over_halves, recover
from fedsynth.evaluation.samples import Profiles
from fedsynth.evaluation.tested import LEAST_IN_GROUP, Tested, groups_of, present, tested_figure, value_of
from fedsynth.evaluation.values import Figure, Group, Section
from fedsynth.metrics.bootstrap import Rows
from fedsynth.metrics.coexpression import coexpression
from fedsynth.metrics.discrimination import discriminate
from fedsynth.metrics.marginals import mean_wasserstein, sd_ratios, spread_error
from fedsynth.metrics.measurable import NotMeasurable, require_rows
from fedsynth.metrics.roc_auc import macro_auc
from fedsynth.plan import StudyPlan

MIN_TEST_PATIENTS = 8

Genes = NDArray[np.float32]
Baselines = Mapping[str, Profiles | NotMeasurable]


def genes(
    plan: StudyPlan,
    profiles: Columns[Profiles],
    holdout: Profiles,
    rng: np.random.Generator,
    site_names: Sequence[str] = (),
    randomness: Randomness | None = None,
) -> Section:
    """Compare the profiles of each column, and of two other generators, with those of the held-out patients.

    Args:
        plan: classes, the range to which profiles are clipped, and the budget of the private baseline.
        profiles: synthetic, real training and public-only patients; the floor is made here.
        holdout: held-out real patients.
        rng: source of all draws.
        site_names: of the codes in `holdout.sites`; without names nothing is told by site.
        randomness: of the noise of the private baseline. None seeds it from `rng`, so that an evaluation can be repeated:
            the baseline is compared here and never leaves.
    """
    noise = SeededRandomness(int(rng.integers(2**62))) if randomness is None else randomness
    baselines = _baselines(plan, profiles, noise, rng)
    table = _Table.of(plan, profiles, baselines, holdout, rng)
    recovered = attempt(lambda: _recovery(profiles, baselines, holdout, rng))
    curve = attempt(lambda: concordance_curve(value_of(recovered), plan.label.name))
    beside = (
        f"Beside the study's generator stand two others, fitted to the same patients: {' and '.join(baselines)}. The "
        "private one spends the whole budget on the genes of labelled patients, which the study shares out, and knows no "
        "link between genes but the class. Neither is released. "
        if baselines
        else ""
    )
    return Section(
        id="genes",
        title="Fidelity of the gene table",
        explanation=(
            f"Synthetic expression profiles over {len(plan.genes.panel)} genes are compared with those of held-out "
            "real patients, on the study's normalised scale: each gene by itself (distance of distributions, spread), "
            "pairs of genes (co-expression), all genes together (can a classifier tell synthetic from real? 0.5 is "
            "best: it cannot), and in use (is the label learnt from synthetic profiles recognised in real ones? do the "
            "same genes differ between its classes?). The "
            "floor draws every gene by itself from a normal distribution with the public centre and scale. "
            f"{beside}Intervals (95 %) hold the chance of which held-out patients were compared, not that of drawing "
            "other synthetic ones. Faithful averages do not make single synthetic profiles biologically valid, and sites' "
            "batch effects may be part of what is compared."
        ),
        figures=[
            *_comparisons(plan, table, profiles, holdout, site_names, rng),
            _discriminator(table, rng),
            _label(plan, profiles, baselines, holdout, site_names, rng),
            *_differences(plan, recovered),
        ],
        curves=[] if isinstance(curve, NotMeasurable) else [curve],
    )


def _baselines(plan: StudyPlan, profiles: Columns[Profiles], noise: Randomness, rng: np.random.Generator) -> Baselines:
    """As many profiles of each baseline as there are synthetic ones."""
    count = len(profiles.synthetic) if isinstance(profiles.synthetic, Profiles) else 0
    if not count or isinstance(profiles.real, NotMeasurable):
        return {}
    train = profiles.real
    measured = measure_marginals(plan, train, noise)
    normal, marginals = baseline_names(measured.epsilon, plan.privacy.delta)
    return {
        normal: attempt(lambda: draw_normal(train, count, plan.genes.clip, rng)),
        marginals: draw_marginals(measured, count, plan.genes.clip, train, rng),
    }


@dataclass(frozen=True)
class _Table:
    """As many profiles (`size`, G) of held-out patients, of each column and of each baseline."""

    real: Genes
    columns: Columns[Genes]
    baselines: dict[str, Genes | NotMeasurable]

    @property
    def size(self) -> int:
        return len(self.real)

    @staticmethod
    def of(
        plan: StudyPlan,
        profiles: Columns[Profiles],
        baselines: Baselines,
        holdout: Profiles,
        rng: np.random.Generator,
    ) -> _Table:
        samples = (profiles.synthetic, profiles.real, profiles.public_only, holdout)
        size = min((len(p) for p in samples if isinstance(p, Profiles) and len(p)), default=0)

        def some(sample: Profiles) -> Genes:
            return sample.take(rng.permutation(len(sample))[:size]).genes

        real = some(holdout)
        independent = rng.normal(size=(size, real.shape[1])).astype(np.float32)
        independent = np.clip(independent, -plan.genes.clip, plan.genes.clip)
        columns = beside_floor(profiles, some, lambda _: independent)
        drawn = {name: s if isinstance(s, NotMeasurable) else some(s) for name, s in baselines.items()}
        return _Table(real, columns, drawn)

    def groups(self, tested: Callable[[Genes], Tested]) -> list[Group]:
        """The baselines' values."""
        values = {
            name: Columns(sample).map(lambda genes: tested(genes).value).synthetic
            for name, sample in self.baselines.items()
        }
        return _baseline_groups(values, self.size)


def _comparisons(
    plan: StudyPlan,
    table: _Table,
    profiles: Columns[Profiles],
    holdout: Profiles,
    site_names: Sequence[str],
    rng: np.random.Generator,
) -> list[Figure]:
    """Gene by gene, and pairs of genes."""
    ratios = table.columns.map(lambda values: float(sd_ratios(table.real, values).mean())).synthetic
    ratio = "" if isinstance(ratios, NotMeasurable) else f" Mean ratio of the synthetic table: {ratios:.2f}."
    parts = [
        *_distances_of("class", plan.label.classes, profiles, holdout, rng),
        *_distances_of("site", site_names, profiles, holdout, rng),
    ]

    def row(
        metric: str,
        better: Literal["higher", "lower"],
        score: Callable[[Genes, Genes], float],
        bounds: tuple[float, float],
        note: str,
        groups: Sequence[Group] = (),
    ) -> Figure:
        def tested(values: Genes) -> Tested:
            return Tested(lambda rows: score(table.real[rows], values), table.size, "leave-out", bounds)

        return tested_figure(metric, better, table.columns.map(tested), note, rng, [*table.groups(tested), *groups])

    return [
        row(
            "Distance of the distributions, mean over genes (1-Wasserstein)",
            "lower",
            mean_wasserstein,
            (0.0, np.inf),
            f"In units of the public scale; {table.size} profiles a column. Floor: independent standard normal genes. By "
            "class and site: as many profiles as there are held-out ones, of the class, or of all sites.",
            parts,
        ),
        row(
            "Error of the spread, mean |log2 (sd ratio)|",
            "lower",
            spread_error,
            (0.0, np.inf),
            f"0 is right, 1 is half or double the real spread.{ratio}",
        ),
        row(
            "Agreement of co-expression (correlation)",
            "higher",
            lambda real, values: coexpression(real, values)[0],
            (-1.0, 1.0),
            "Correlation of the gene-by-gene correlation matrices; few patients hold down 'real' too.",
        ),
        row(
            "Error of co-expression (mean absolute)",
            "lower",
            lambda real, values: coexpression(real, values)[1],
            (0.0, 2.0),
            "Mean absolute difference of the gene-by-gene correlations.",
        ),
    ]


def _distances_of(
    by: Literal["class", "site"],
    names: Sequence[str],
    profiles: Columns[Profiles],
    holdout: Profiles,
    rng: np.random.Generator,
) -> list[Group]:
    """Distance of the distributions from the held-out patients of each class or site.

    A class is compared with the same class. A site is compared with all sites, since synthetic patients are of none: a
    table that has the batch effect of one site is near to that one only.
    """
    codes = holdout.labels if by == "class" else holdout.sites
    groups = []
    for name, rows in present(names, codes):

        def candidates(sample: Profiles, code: int = int(codes[rows[0]])) -> Profiles:
            same = sample.take(np.flatnonzero(sample.labels == code)) if by == "class" else sample
            require_rows("profiles", same.genes, LEAST_IN_GROUP)
            return same

        found = replace(profiles, public_only=NOT_ASKED).map(candidates)
        size = min([len(rows), *(len(s) for s in (found.synthetic, found.real) if isinstance(s, Profiles))])

        def distance(sample: Profiles, rows: Rows = rows, size: int = size) -> float:
            require_rows("held-out profiles", rows, LEAST_IN_GROUP)
            reference = holdout.genes[rng.permutation(rows)[:size]]
            return mean_wasserstein(reference, sample.genes[rng.permutation(len(sample))[:size]])

        row = figure(name, "lower", found.map(distance), "")
        groups.append(Group(by=by, name=name, n=len(rows), synthetic=row.synthetic, real=row.real, note=row.note))
    return groups


def _discriminator(table: _Table, rng: np.random.Generator) -> Figure:
    def tested(values: Genes) -> Tested:
        found = discriminate(table.real, values, rng)
        return Tested(found.area, len(found.scores))

    return tested_figure(
        "AUC, synthetic told from real",
        "lower",
        table.columns.map(tested),
        "0.5 is best. Cross-validated logistic regression on leading principal components and their squares. The interval "
        "is over held-out and synthetic patients, with the discriminator as it is.",
        rng,
        table.groups(tested),
    )


def _label(
    plan: StudyPlan,
    profiles: Columns[Profiles],
    baselines: Baselines,
    holdout: Profiles,
    site_names: Sequence[str],
    rng: np.random.Generator,
) -> Figure:
    test, classes = holdout.take(np.flatnonzero(holdout.labels >= 0)), len(plan.label.classes)

    def recognised(scores: NDArray[np.float64]) -> Tested:
        return Tested(lambda rows: macro_auc(scores[rows], test.labels[rows]), len(test))

    def trained(sample: Profiles) -> Tested:
        require_rows("held-out patients with genes and label", test.genes, MIN_TEST_PATIENTS)
        return recognised(class_scores(sample.genes, sample.labels, test.genes, classes))

    columns = beside_floor(profiles, trained, lambda _: recognised(np.full((len(test), classes), 1 / classes)))
    others = {name: Columns(one).map(lambda s: trained(s).value).synthetic for name, one in baselines.items()}
    drawn = max((len(sample) for sample in baselines.values() if isinstance(sample, Profiles)), default=0)
    return tested_figure(
        f"AUC, {plan.label.name} from genes",
        "higher",
        columns,
        f"Logistic regression trained on each column, tested on {len(test)} real patients. Floor: a constant "
        "prediction, 0.5 by definition.",
        rng,
        [*_baseline_groups(others, drawn), *groups_of("site", site_names, test.sites, columns, rng)],
    )


def _recovery(
    profiles: Columns[Profiles], baselines: Baselines, holdout: Profiles, rng: np.random.Generator
) -> Recovery:
    return recover(profiles, baselines, _joined(value_of(profiles.real), holdout), rng)


def _differences(plan: StudyPlan, recovered: Recovery | NotMeasurable) -> list[Figure]:
    """Recovery of differential expression as figures."""
    label = plan.label.name
    how = (
        f"Welch's t test gene by gene, false discovery rate 5 % (Benjamini and Hochberg). Truth: what one half of all real "
        f"patients, trained on or held out, calls; mean and 95 % range over {HALVES} halves."
    )
    called = 0.0
    if not isinstance(recovered, NotMeasurable):
        called = recovered.called
        how += f" Each column has {', '.join(map(str, recovered.patients))} patients in the classes."
    rate = " Floor: as many genes as the other real half calls, chosen at random"

    def row(
        metric: str,
        better: Literal["higher", "none"],
        of: Callable[[Recovered], NDArray[np.float64]],
        floor: float,
        note: str,
    ) -> Figure:
        if isinstance(recovered, NotMeasurable):
            empty = figure(metric, "higher", Columns[float](recovered, recovered, recovered), note)
            return empty.model_copy(update={"better": better})
        found = recovered.columns.map(lambda column: over_halves(of(column)))
        synthetic = found.synthetic
        others = {
            name: Columns(one).map(lambda column: over_halves(of(column))[0]).synthetic
            for name, one in recovered.baselines.items()
        }
        columns = replace(found.map(lambda pair: pair[0]), floor=floor)
        between = None if isinstance(synthetic, NotMeasurable) else synthetic[1]
        found_row = figure(metric, "higher", columns, note, between)
        groups = _baseline_groups(others, sum(recovered.patients))
        return found_row.model_copy(update={"better": better, "groups": groups})

    return [
        row(
            f"True positive rate, genes that differ by {label}",
            "higher",
            lambda column: column.true_rate,
            called / 2,
            f"Share of the genes that differ in real patients which differ in the same direction in each column. {how} "
            f"'real': the other half.{rate}, each in a random direction.",
        ),
        row(
            f"False positive rate, genes that differ by {label}",
            "none",
            lambda column: column.false_rate,
            called,
            "Share of the genes not called in real patients that are called in each column. Some of them do differ and "
            "were missed for want of patients, hence 'real' is not 0. Far above it, genes differ that should not; below it "
            "with a low true positive rate, differences were lost. Genes move together, so one chance difference among the "
            f"synthetic patients moves many.{rate}.",
        ),
        row(
            f"Agreement of the differences by {label} (rank correlation)",
            "higher",
            lambda column: column.agreement,
            0.0,
            "Spearman correlation over genes of the difference in units of the spread (Cohen's d), that of a real half "
            "with that of each column. Floor: 0, no relation.",
        ),
    ]


def _baseline_groups(values: Mapping[str, float | NotMeasurable], profiles: int) -> list[Group]:
    rows = {name: figure(name, "higher", Columns(value), "") for name, value in values.items()}
    return [
        Group(by="baseline", name=name, n=profiles, synthetic=row.synthetic, note=row.note)
        for name, row in rows.items()
    ]


def _joined(first: Profiles, second: Profiles) -> Profiles:
    return Profiles(
        np.concatenate([first.genes, second.genes]),
        np.concatenate([first.morphology, second.morphology]),
        np.concatenate([first.labels, second.labels]),
        np.concatenate([first.sites, second.sites]),
    )
