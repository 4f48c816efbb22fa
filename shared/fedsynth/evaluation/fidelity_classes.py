"""Inception, Mode and AM score: which classes do slices look like, and how clearly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.columns import NOT_ASKED, Columns, attempt, figure
from fedsynth.evaluation.fidelity_slices import FeatureSet, Slices, features_of, present
from fedsynth.evaluation.values import Figure, Group
from fedsynth.metrics.bootstrap import Rows, bootstrap_interval
from fedsynth.metrics.class_scores import am_score, inception_score, mode_score
from fedsynth.metrics.feature_network import Ensemble, FeatureNetwork
from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows

FEWEST_OF_CLASS = 20  # slices of a class that the classifier learns from
ITERATIONS = 300

Posteriors = NDArray[np.float64]
Classifier = Callable[[NDArray[np.float64]], Posteriors]


@dataclass(frozen=True)
class Scored:
    """Posteriors (N, K) of slices and their patients (N,), one array a network."""

    posteriors: list[Posteriors]
    patients: NDArray[np.int64]
    sites: NDArray[np.int64]


Statistic = Callable[[Posteriors, NDArray[np.float64]], float]


def class_figures(
    ensemble: Ensemble,
    features: Columns[list[FeatureSet]],
    held_out_features: list[FeatureSet] | NotMeasurable,
    learning: Slices | NotMeasurable,
    class_names: Sequence[str],
    site_names: Sequence[str],
    rng: np.random.Generator,
) -> list[Figure]:
    """The three scores, from a logistic regression on each network's features.

    Args:
        ensemble: the networks, whose scores are averaged.
        features: of the columns, one set a network.
        held_out_features: of the held-out patients, whose mean posterior is the distribution of real classes.
        learning: of real training patients who are in no column; the classifier learns on these.
        class_names: the plan's classes.
        site_names: for the groups by site.
        rng: source of the bootstraps.
    """
    classifiers = attempt(lambda: [_classifier(present(learning), n, class_names) for n in ensemble.networks])

    def scored(sets: list[FeatureSet]) -> Scored:
        posteriors = [classify(s.values) for (classify, _), s in zip(present(classifiers), sets, strict=True)]
        return Scored(posteriors, sets[0].patients, sets[0].sites)

    held_out = attempt(lambda: scored(present(held_out_features)))
    columns = features.map(scored)
    classes = "the classes" if isinstance(classifiers, NotMeasurable) else ", ".join(classifiers[0][1])
    named = (
        f"Class posteriors: logistic regression on the features of {ensemble.name}; classes of a slice: {classes}. Learned "
        "from real training patients who are in no column. Not comparable with published scores."
    )

    def against(statistic: Statistic) -> Callable[[Scored], float]:
        def value(of: Scored) -> float:
            if isinstance(held_out, NotMeasurable):
                raise NotMeasurable(f"held-out patients: {held_out}")
            pairs = zip(of.posteriors, held_out.posteriors, strict=True)
            return float(np.mean([statistic(p, reals.mean(axis=0)) for p, reals in pairs]))

        return value

    def row(metric: str, note: str, statistic: Statistic, lower: bool = False, sites: bool = True) -> Figure:
        synthetic = columns.synthetic
        ends = None
        if not isinstance(synthetic, NotMeasurable) and not isinstance(held_out, NotMeasurable):
            ends = _interval(synthetic, held_out, statistic, rng)
        groups = []
        if sites and not isinstance(held_out, NotMeasurable):
            groups = _by_site(columns, held_out, site_names, statistic)
        return figure(metric, "lower" if lower else "higher", columns.map(against(statistic)), note, ends).model_copy(
            update={"extractor": ensemble.name, "groups": groups}
        )

    return [
        row(
            "Inception-style score",
            f"{named} Between 1 and the number of classes; 'real' is what to compare with, as slices without a clear class "
            "are normal.",
            lambda posteriors, _: inception_score(posteriors),
            sites=False,
        ),
        row(
            "Mode score",
            "Same posteriors. The Inception-style score, lowered where classes are not as frequent as among held-out "
            "patients. By site: against the class frequencies of that site.",
            mode_score,
        ),
        row(
            "AM score",
            "Same posteriors. Divergence of the class frequencies from those of held-out patients, plus the uncertainty of "
            "a slice's class, in nats. By site: against the class frequencies of that site.",
            am_score,
            lower=True,
        ),
    ]


def slice_classes(slices: Slices, class_names: Sequence[str]) -> NDArray[np.int64]:
    """(N,) class of each slice: 0 without tumour, else 1 + class of the patient; -1 for a tumour of unknown class.

    Where no patient's class is known, 1 for every slice with tumour.
    """
    labels = slices.volumes.labels[slices.patients]
    if not (labels >= 0).any():
        return slices.tumour.astype(np.int64)
    return np.where(slices.tumour, np.where(labels >= 0, labels + 1, -1), 0)


def _classifier(learning: Slices, network: FeatureNetwork, class_names: Sequence[str]) -> tuple[Classifier, list[str]]:
    """A logistic regression from features to the classes that have enough slices, and their names."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, classes = features_of(learning, network), slice_classes(learning, class_names)
    learnt = [code for code in np.unique(classes) if code >= 0 and (classes == code).sum() >= FEWEST_OF_CLASS]
    if len(learnt) < 2:
        raise NotMeasurable(
            f"fewer than two classes of slices with {FEWEST_OF_CLASS} training slices to learn a classifier from"
        )
    known = np.isin(classes, learnt)
    require_finite("features", features.values)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=ITERATIONS))
    model.fit(features.values[known], classes[known])
    if (learning.volumes.labels >= 0).any():
        names = ["no tumour", *(f"tumour, {name}" for name in class_names)]
    else:
        names = ["no tumour", "tumour"]

    def posteriors(values: NDArray[np.float64]) -> Posteriors:
        require_rows("slices", values, 1)
        require_finite("features", values)
        return np.asarray(model.predict_proba(values), dtype=np.float64)

    return posteriors, [names[code] for code in learnt]


def _interval(
    of: Scored, held_out: Scored, statistic: Statistic, rng: np.random.Generator
) -> tuple[float, float] | None:
    """Bootstrap over the synthetic patients; the held-out patients stay."""
    _, number = np.unique(of.patients, return_inverse=True)
    rows_of = [np.flatnonzero(number == patient) for patient in range(int(number.max()) + 1)]
    references = [reals.mean(axis=0) for reals in held_out.posteriors]

    def value(patients: Rows) -> float:
        rows = np.concatenate([rows_of[patient] for patient in patients])
        pairs = zip(of.posteriors, references, strict=True)
        return float(np.mean([statistic(p[rows], reference) for p, reference in pairs]))

    return bootstrap_interval(value, len(rows_of), rng)


def _by_site(
    columns: Columns[Scored], held_out: Scored, site_names: Sequence[str], statistic: Statistic
) -> list[Group]:
    sites = [code for code in range(len(site_names)) if (held_out.sites == code).any()]
    if len(sites) < 2 or isinstance(columns.synthetic, NotMeasurable):
        return []
    groups = []
    for code in sites:
        there = held_out.sites == code
        references = [reals[there].mean(axis=0) for reals in held_out.posteriors]

        synthetic, ceiling = columns.synthetic, columns.real
        everyone = np.ones(len(synthetic.patients), dtype=bool)
        real = (
            NOT_ASKED
            if isinstance(ceiling, NotMeasurable)
            else _at(ceiling, ceiling.sites == code, references, statistic)
        )
        groups.append(
            Group(
                by="site",
                name=site_names[code],
                n=len(np.unique(held_out.patients[there])),
                synthetic=_mean(synthetic, everyone, references, statistic),
                real=None if isinstance(real, NotMeasurable) else real,
            )
        )
    return groups


def _at(
    of: Scored, rows: NDArray[np.bool_], references: list[Posteriors], statistic: Statistic
) -> float | NotMeasurable:
    return attempt(lambda: _mean(of, rows, references, statistic))


def _mean(of: Scored, rows: NDArray[np.bool_], references: list[Posteriors], statistic: Statistic) -> float:
    pairs = zip(of.posteriors, references, strict=True)
    return float(np.mean([statistic(p[rows], reference) for p, reference in pairs]))
