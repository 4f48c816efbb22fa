"""Do synthetic slices look like slices of patients that nobody trained on?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.columns import Columns, attempt, figure
from fedsynth.evaluation.samples import Volumes, even_slices
from fedsynth.evaluation.values import Section
from fedsynth.metrics.density_coverage import density_coverage
from fedsynth.metrics.domain_extractor import DomainExtractor, extract
from fedsynth.metrics.frechet import frechet_distance
from fedsynth.metrics.kernel_distance import kernel_distance
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.precision_recall import precision_recall
from fedsynth.metrics.ssim_diversity import mean_pairwise_ssim
from fedsynth.morphometry import HEAD_THRESHOLD

MAX_SLICES = 2000
LEAST_HEAD = 0.02  # share of the plane


def fidelity(
    volumes: Columns[Volumes], holdout: Volumes, extractor: DomainExtractor, rng: np.random.Generator
) -> Section:
    """Compare slices of each column of `volumes` with slices of the held-out patients, in the extractor's features.

    Args:
        volumes: synthetic, real training and public-only patients; the floor is made here.
        holdout: held-out real patients.
        extractor: the named feature network.
        rng: source of all draws.
    """
    sets = Columns(volumes.synthetic, volumes.real, volumes.real, volumes.public_only).map(_require_images)
    counted = [
        len(v) for v in (sets.synthetic, sets.real, sets.public_only, holdout) if isinstance(v, Volumes) and len(v)
    ]
    patients = min(counted, default=0)
    positions = head_positions(holdout)
    slices = max(1, min(len(positions), MAX_SLICES // max(1, patients)))

    def features(of: Volumes) -> NDArray[np.float64]:
        return extract(extractor, even_slices(_require_images(of), patients, positions, slices, rng))

    floor = sets.map(lambda real: _one_mean_patient(real, patients)).floor
    sets = Columns(sets.synthetic, sets.real, floor, sets.public_only)
    reference = attempt(lambda: features(holdout))
    compared = sets.map(features)
    if isinstance(reference, NotMeasurable):
        compared = Columns(NotMeasurable(f"held-out patients: {reference}"))
        reference = np.zeros((0, extractor.num_features))
    real = reference
    manifolds = compared.map(lambda f: precision_recall(real, f))
    densities = compared.map(lambda f: density_coverage(real, f))
    size = f"{patients} patients a column, {slices} slices each, at the levels of the head."
    floor_is = "Floor: the mean real slice, again and again."
    named = f"Features: {extractor.name}. Not comparable with published FID."
    return Section(
        id="fidelity",
        title="Fidelity of the images",
        explanation=(
            "Slices of the synthetic patients are compared with slices of held-out real patients, who took no part in "
            "training, by the features of a small neural network. The distances (FID, KID) are 0 for the same "
            "distribution. Precision and density ask whether synthetic slices look like real ones; recall and coverage "
            "ask whether every kind of real slice occurs among them, and fall towards 0 for a generator that draws one "
            "picture again and again. The column 'real' compares the real training patients with the held-out ones and "
            "is the best that can be hoped for; all columns use as many patients and slices, because these numbers "
            "depend on how many there are. With few patients they vary from draw to draw. They say nothing about "
            "whether a single image is anatomically right, and they are no test of privacy. All quality figures were "
            "computed on the held-out patients without noise, which is harmless for simulated or public patients only: "
            "at a hospital each would have to be paid for from the privacy budget."
        ),
        figures=[
            figure(
                "FID in domain features",
                "lower",
                compared.map(lambda f: frechet_distance(real, f)),
                f"{named} {size} {floor_is}",
            ),
            figure(
                "KID in domain features",
                "lower",
                compared.map(lambda f: kernel_distance(real, f, rng)),
                "Same features. Unbiased, so it can be negative, with few patients clearly so.",
            ),
            figure("Precision", "higher", manifolds.map(lambda pair: pair[0]), "Nearest neighbours: 3."),
            figure("Recall", "higher", manifolds.map(lambda pair: pair[1]), "Nearest neighbours: 3."),
            figure(
                "Density",
                "higher",
                densities.map(lambda pair: pair[0]),
                "Nearest neighbours: 5. Read it against 'real': far above means that only typical slices are drawn.",
            ),
            figure("Coverage", "higher", densities.map(lambda pair: pair[1]), "Nearest neighbours: 5."),
            figure(
                "SSIM between patients",
                "lower",
                sets.map(lambda v: mean_pairwise_ssim(v.images[:, :, positions], rng)),
                "Mean structural similarity of two different patients at the same slice position. Well above 'real' "
                "means too little variety, well below means noise.",
            ),
        ],
    )


def head_positions(holdout: Volumes) -> NDArray[np.int64]:
    """Slice positions that show the head in at least nine of ten held-out patients, or all when there is none.

    Blank slices are all alike: they would count as neighbours of one another and hide a collapsed generator.
    """
    if not len(holdout):
        return np.arange(holdout.images.shape[2])
    bright = holdout.images.max(axis=1) > HEAD_THRESHOLD
    shown = np.flatnonzero((bright.mean(axis=(2, 3)) > LEAST_HEAD).mean(axis=0) >= 0.9)
    return shown if len(shown) else np.arange(holdout.images.shape[2])


def _require_images(volumes: Volumes) -> Volumes:
    if not len(volumes):
        raise NotMeasurable("no patient with images")
    return volumes


def _one_mean_patient(real: Volumes, patients: int) -> Volumes:
    """The mean real volume, `patients` times: what a generator draws that has collapsed to the mean."""
    mean = real.images.mean(axis=0, dtype=np.float32)
    return Volumes(
        np.broadcast_to(mean, (patients, *mean.shape)),
        np.zeros((patients, *real.masks.shape[1:]), dtype=bool),
        np.full(patients, -1),
        np.full(patients, -1),
    )
