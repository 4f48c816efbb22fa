"""Do synthetic slices look like slices of patients that nobody trained on?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsynth.evaluation.columns import Columns, attempt
from fedsynth.evaluation.fidelity_classes import class_figures
from fedsynth.evaluation.fidelity_distances import GroupNames, distance_figures
from fedsynth.evaluation.fidelity_pixels import diversity_figures, nearest_figures
from fedsynth.evaluation.fidelity_radiomics import radiomics_figure
from fedsynth.evaluation.fidelity_slices import (
    FeatureSet,
    Slices,
    draw_slices,
    features_of,
    head_positions,
    one_mean_patient,
    present,
    require_images,
)
from fedsynth.evaluation.samples import Volumes
from fedsynth.evaluation.values import Section
from fedsynth.metrics.feature_network import Ensemble, PairDistance
from fedsynth.metrics.measurable import NotMeasurable

__all__ = ["fidelity", "head_positions"]

MAX_SLICES = 2000


def fidelity(
    volumes: Columns[Volumes],
    holdout: Volumes,
    ensembles: Sequence[Ensemble],
    names: GroupNames,
    spacing_mm: tuple[float, float, float],
    rng: np.random.Generator,
    lpips: PairDistance | None = None,
    max_slices: int = MAX_SLICES,
) -> Section:
    """Compare slices of each column of `volumes` with slices of the held-out patients.

    Args:
        volumes: synthetic, real training and public-only patients; the floor is made here.
        holdout: held-out real patients, their site codes those of the training patients.
        ensembles: the feature networks; the first one's posteriors give the class scores.
        names: classes, sequences and sites.
        spacing_mm: (s, h, w) distance between voxel centres of the volumes.
        rng: source of all draws.
        lpips: a learned perceptual distance for diversity; None leaves that figure out.
        max_slices: slices of a column at most.
    """
    # Half of the training patients are kept from the ceiling: what is learned or scaled is learned on these.
    halves = Columns(volumes.real).map(lambda real: _halves(require_images(real), rng)).synthetic
    ceiling, learning = (halves, halves) if isinstance(halves, NotMeasurable) else halves
    sets = Columns(volumes.synthetic, ceiling, volumes.real, volumes.public_only).map(require_images)
    counted = [
        len(v) for v in (sets.synthetic, sets.real, sets.public_only, holdout) if isinstance(v, Volumes) and len(v)
    ]
    patients = min(counted, default=0)
    positions = head_positions(holdout)
    per_patient = max(1, min(len(positions), max_slices // max(1, patients)))
    floor = sets.map(lambda real: one_mean_patient(real, patients)).floor
    sets = Columns(sets.synthetic, sets.real, floor, sets.public_only)

    def drawn(of: Volumes) -> Slices:
        return draw_slices(of, patients, positions, per_patient, rng)

    reference = attempt(lambda: drawn(holdout))
    slices = sets.map(drawn)
    learnt_from = learning if isinstance(learning, NotMeasurable) else attempt(lambda: drawn(learning))
    size = f"{patients} patients a column, {per_patient} slices each, at the levels of the head."

    figures = []
    for number, ensemble in enumerate(ensembles):

        def features(of: Slices, ensemble: Ensemble = ensemble) -> list[FeatureSet]:
            return [features_of(of, network) for network in ensemble.networks]

        held_out = attempt(lambda: features(present(reference)))
        columns = slices.map(features)
        figures += distance_figures(ensemble, columns, held_out, slices, reference, names, size, rng)
        if number == 0:
            figures += class_figures(ensemble, columns, held_out, learnt_from, names.classes, names.sites, rng)
    figures.append(
        radiomics_figure(
            sets,
            holdout,
            learning,
            patients,
            positions,
            spacing_mm,
            names.classes,
            names.sequences,
            names.sites,
            rng,
        )
    )
    figures += diversity_figures(sets, positions, names.classes, names.sequences, lpips, rng)
    among = Columns(volumes.synthetic, volumes.real, _one(floor), volumes.public_only).map(require_images)
    figures += nearest_figures(among, holdout, positions, names.classes, names.sequences, rng)
    return Section(id="fidelity", title="Fidelity of the images", explanation=EXPLANATION, figures=figures)


def _halves(real: Volumes, rng: np.random.Generator) -> tuple[Volumes, Volumes]:
    """Patients of the ceiling, and those that are learned from."""
    order = rng.permutation(len(real))
    middle = (len(real) + 1) // 2
    return real.take(np.sort(order[:middle])), real.take(np.sort(order[middle:]))


def _one(floor: Volumes | NotMeasurable) -> Volumes | NotMeasurable:
    return floor if isinstance(floor, NotMeasurable) else floor.take(np.arange(min(1, len(floor))))


EXPLANATION = (
    "Slices of the synthetic patients are compared with slices of held-out real patients, who took no part in "
    "training, by the features of a small neural network, and of others where they were given as files; each figure "
    "names its network, because another one gives other numbers. The distances (FID, KID) are 0 for the same "
    "distribution. Precision and density ask whether synthetic slices look like real ones; recall and coverage ask "
    "whether every kind of real slice occurs among them, and fall towards 0 for a generator that draws one picture "
    "again and again. The Inception-style, Mode and AM scores ask whether slices look clearly like slices without "
    "tumour or with a tumour of one class, and whether these are as frequent as among real patients. The radiomics "
    "distance compares whole patients by features that have names. SSIM, MS-SSIM and LPIPS between patients measure "
    "variety. The column 'real' compares real training patients with the held-out ones and is the best that can be "
    "hoped for; all columns use as many patients and slices, because these numbers depend on how many there are. A "
    "group (a class, a sequence, a site) has fewer and compares with its own 'real' only: a group that is far worse "
    "than its 'real' while the whole is not is a fault that the whole hides. Intervals (95 %) hold the chance of "
    "which patients were drawn, not that of training again. For distances between sets patients are left out group by "
    "group (jackknife), since drawing them with replacement would move such a distance by more than its spread. The "
    "figures say nothing about whether a single image is anatomically right, and they are no test of privacy. All "
    "were computed on the held-out patients without noise, which is harmless for simulated or public patients only: "
    "at a hospital each would have to be paid for from the privacy budget."
)
