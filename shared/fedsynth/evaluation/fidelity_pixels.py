"""Diversity between patients (SSIM, MS-SSIM, LPIPS), and how near slices lie to their nearest training slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.columns import Columns, attempt, figure
from fedsynth.evaluation.fidelity_slices import present, require_images
from fedsynth.evaluation.samples import Volumes
from fedsynth.evaluation.values import Figure, Group
from fedsynth.metrics.bootstrap import Rows, bootstrap_interval
from fedsynth.metrics.feature_network import PairDistance
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.nearest_image import nearest_slices
from fedsynth.metrics.patient_pairs import Compare, Pairs, compare_pairs, draw_pairs, resampled_mean
from fedsynth.metrics.ssim_diversity import multiscale_similarity, scales_of, similarity

PAIRS = 250
PAIRS_IN_CLASS = 100
RESAMPLES = 200
NEAREST_POSITIONS = 2
MOST_NEAREST = 100  # patients of a column


@dataclass(frozen=True)
class _Compared:
    """Pairs of a column and the values of their sequences (P, C)."""

    pairs: Pairs
    values: NDArray[np.float64]

    @property
    def by_pair(self) -> NDArray[np.float64]:
        return np.asarray(self.values.mean(axis=1))


def diversity_figures(
    volumes: Columns[Volumes],
    positions: NDArray[np.integer],
    class_names: Sequence[str],
    sequence_names: Sequence[str],
    lpips: PairDistance | None,
    rng: np.random.Generator,
) -> list[Figure]:
    """SSIM and MS-SSIM between patients, and LPIPS where there is a network for it."""
    either = "Well above 'real' means too little variety, well below means noise or wrong pictures."
    pairs = f"Mean over {PAIRS} pairs of different patients at the same slice position."
    size = volumes.real.images.shape[-1] if isinstance(volumes.real, Volumes) else 0
    scales = (
        f"{scales_of(size)} of 5 scales fit {size} pixels, so values of other sizes cannot be compared." if size else ""
    )
    measures: list[tuple[str, str, Compare, str, str]] = [
        ("SSIM between patients", "lower", similarity, f"{pairs} {either} Interval: bootstrap over patients.", ""),
        (
            "MS-SSIM between patients",
            "lower",
            multiscale_similarity,
            f"The same over several scales. {scales} {either}",
            "",
        ),
    ]
    if lpips is not None:
        measures.append(
            (
                "LPIPS between patients",
                "higher",
                lpips.distance,
                f"{pairs} Well below 'real' means too little variety, well above means noise or wrong pictures.",
                lpips.name,
            )
        )
    return [
        _diversity(metric, better, compare, note, extractor, volumes, positions, class_names, sequence_names, rng)
        for metric, better, compare, note, extractor in measures
    ]


def nearest_figures(
    volumes: Columns[Volumes],
    holdout: Volumes,
    positions: NDArray[np.integer],
    class_names: Sequence[str],
    sequence_names: Sequence[str],
    rng: np.random.Generator,
) -> list[Figure]:
    """PSNR and SSIM to the nearest real training slice: a hint at copies, and called that."""
    shown = positions[
        np.linspace(0, len(positions) - 1, 2 + min(NEAREST_POSITIONS, len(positions))).round().astype(int)
    ]
    shown = np.unique(shown[1:-1])
    train = volumes.real

    def among() -> Volumes:
        if isinstance(train, NotMeasurable):
            raise NotMeasurable("there are no real training images to look among")
        return train

    def nearest(of: Volumes, channel: int | None = None) -> NDArray[np.float64]:
        """(patients, 2): PSNR and SSIM, means over the positions."""
        chosen, channels = require_images(of), slice(None) if channel is None else [channel]
        found = [
            nearest_slices(chosen.images[:, channels, position], among().images[:, channels, position])
            for position in shown
        ]
        return np.stack([np.mean([f.psnr for f in found], axis=0), np.mean([f.ssim for f in found], axis=0)], axis=1)

    def some(of: Volumes) -> Volumes:
        return of.take(np.sort(rng.permutation(len(of))[:MOST_NEAREST])) if len(of) > MOST_NEAREST else of

    compared = Columns(volumes.synthetic, holdout, volumes.floor, volumes.public_only).map(some)
    values = compared.map(nearest)
    hint = (
        "To the nearest slice of a training patient at the same position. In the column 'real' stand held-out patients: "
        "synthetic slices clearly nearer to training patients than those are would hint at copies. A hint only; the "
        "section on attacks tests for them. Floor: the mean real slice."
    )
    notes = {
        "PSNR to the nearest training slice (dB)": f"{hint} PSNR is a measure of reconstruction, of two pictures of "
        "the same thing; a synthetic slice has no such partner, so that more is not better here.",
        "SSIM to the nearest training slice": f"{hint}",
    }
    parts = _parts(compared, values, nearest, class_names, sequence_names)
    figures = []
    for column, (metric, note) in enumerate(notes.items()):

        def mean(of: NDArray[np.float64], column: int = column) -> float:
            return float(of[:, column].mean())

        synthetic = values.synthetic
        ends = None if isinstance(synthetic, NotMeasurable) else _mean_interval(synthetic[:, column], rng)
        groups = [
            group.model_copy(
                update={
                    "synthetic": mean(fake) if len(fake) else None,
                    "interval": _mean_interval(fake[:, column], rng) if len(fake) else None,
                    "real": mean(real) if len(real) else None,
                }
            )
            for group, fake, real in parts
        ]
        figures.append(
            figure(metric, "lower", values.map(mean), note, ends).model_copy(
                update={"better": "none", "groups": groups}
            )
        )
    return figures


def _parts(
    compared: Columns[Volumes],
    values: Columns[NDArray[np.float64]],
    nearest: Callable[[Volumes, int], NDArray[np.float64]],
    class_names: Sequence[str],
    sequence_names: Sequence[str],
) -> list[tuple[Group, NDArray[np.float64], NDArray[np.float64]]]:
    """Each class and sequence with the values of its synthetic and of its held-out patients."""
    synthetic, unseen, fake, real = compared.synthetic, compared.real, values.synthetic, values.real
    if any(isinstance(each, NotMeasurable) for each in (synthetic, unseen, fake, real)):
        return []
    of_synthetic, of_unseen, of_fake, of_real = present(synthetic), present(unseen), present(fake), present(real)
    parts = []
    for code, name in enumerate(class_names):
        inside = of_synthetic.labels == code
        group = Group(by="class", name=name, n=int(inside.sum()), synthetic=None)
        parts.append((group, of_fake[inside], of_real[of_unseen.labels == code]))
    if len(sequence_names) > 1:
        for channel, name in enumerate(sequence_names):
            group = Group(by="sequence", name=name, n=len(of_synthetic), synthetic=None)
            parts.append((group, nearest(of_synthetic, channel), nearest(of_unseen, channel)))
    return parts


def _diversity(
    metric: str,
    better: str,
    compare: Compare,
    note: str,
    extractor: str,
    volumes: Columns[Volumes],
    positions: NDArray[np.integer],
    class_names: Sequence[str],
    sequence_names: Sequence[str],
    rng: np.random.Generator,
) -> Figure:
    def compared(of: Volumes) -> _Compared:
        pairs = draw_pairs(len(require_images(of)), positions, PAIRS, rng)
        return _Compared(pairs, compare_pairs(of.images, pairs, compare))

    columns = volumes.map(compared)
    synthetic, real = columns.synthetic, columns.real
    ends, groups = None, []
    if not isinstance(synthetic, NotMeasurable):
        ends = _pairs_interval(synthetic.pairs, synthetic.by_pair, rng)
        groups += _by_class(volumes, positions, compare, class_names, rng)
        if len(sequence_names) > 1:
            groups += [
                Group(
                    by="sequence",
                    name=name,
                    n=synthetic.pairs.patients,
                    synthetic=float(synthetic.values[:, channel].mean()),
                    interval=_pairs_interval(synthetic.pairs, synthetic.values[:, channel], rng),
                    real=None if isinstance(real, NotMeasurable) else float(real.values[:, channel].mean()),
                )
                for channel, name in enumerate(sequence_names)
            ]
    return figure(
        metric, "higher" if better == "higher" else "lower", columns.map(lambda c: float(c.values.mean())), note, ends
    ).model_copy(update={"extractor": extractor, "groups": groups})


def _by_class(
    volumes: Columns[Volumes],
    positions: NDArray[np.integer],
    compare: Compare,
    class_names: Sequence[str],
    rng: np.random.Generator,
) -> list[Group]:
    """Pairs within a class: a generator that draws one picture a class is varied only on the whole."""
    synthetic = volumes.synthetic
    if isinstance(synthetic, NotMeasurable) or len(np.unique(synthetic.labels[synthetic.labels >= 0])) < 1:
        return []

    def within(of: Volumes | NotMeasurable, code: int) -> tuple[Pairs, NDArray[np.float64]] | NotMeasurable:
        def compared() -> tuple[Pairs, NDArray[np.float64]]:
            some = present(of)
            pairs = draw_pairs(len(some), positions, PAIRS_IN_CLASS, rng, np.where(some.labels == code, 0, -1))
            return pairs, np.asarray(compare_pairs(some.images, pairs, compare).mean(axis=1))

        return attempt(compared)

    groups = []
    for code, name in enumerate(class_names):
        fake, real = within(volumes.synthetic, code), within(volumes.real, code)
        group = Group(
            by="class",
            name=name,
            n=int((synthetic.labels == code).sum()),
            synthetic=None,
            real=None if isinstance(real, NotMeasurable) else float(real[1].mean()),
        )
        if isinstance(fake, NotMeasurable):
            update: dict[str, object] = {"note": f"Not measured: {fake}."}
        else:
            update = {"synthetic": float(fake[1].mean()), "interval": _pairs_interval(*fake, rng)}
        groups.append(group.model_copy(update=update))
    return groups


def _mean_interval(values: NDArray[np.float64], rng: np.random.Generator) -> tuple[float, float] | None:
    return bootstrap_interval(lambda rows: float(values[rows].mean()), len(values), rng)


def _pairs_interval(pairs: Pairs, values: NDArray[np.float64], rng: np.random.Generator) -> tuple[float, float] | None:
    def mean(rows: Rows) -> float:
        return resampled_mean(values, pairs, rows)

    return bootstrap_interval(mean, pairs.patients, rng, RESAMPLES)
