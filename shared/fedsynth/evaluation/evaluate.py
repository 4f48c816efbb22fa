"""`evaluate`: the first numbers of a release, each beside its real-data ceiling and its floor.

Only whoever holds real patients can run this: a simulation, or a study of public data. The numbers are computed on
held-out patients without privacy; at a hospital each of them would be a release of its own, and be charged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedsynth.errors import UsageError
from fedsynth.evaluation.columns import NOT_ASKED, Columns
from fedsynth.evaluation.detection import detection
from fedsynth.evaluation.fidelity import fidelity
from fedsynth.evaluation.fidelity_distances import GroupNames
from fedsynth.evaluation.genes import genes
from fedsynth.evaluation.patients import Patients, seen
from fedsynth.evaluation.radiogenomics import radiogenomics, remeasured
from fedsynth.evaluation.samples import (
    real_profiles,
    real_volumes,
    shrink_factor,
    synthetic_profiles,
    synthetic_volumes,
)
from fedsynth.evaluation.utility import utility
from fedsynth.evaluation.values import Evaluation, Section
from fedsynth.metrics.domain_extractor import DomainExtractor, train_extractor
from fedsynth.metrics.feature_network import Ensemble, PairDistance, domain_ensemble
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.phantoms import phantom_slices
from fedsynth.plan import StudyPlan
from fedsynth.progress import say
from fedsynth.selection import Selected, mix_words, sequences_of, with_sequences
from fedsynth.synthetic import SyntheticPatient, subject_digest

PHANTOMS = 4000


def evaluate(
    plan: StudyPlan,
    train: Patients,
    holdout: Patients,
    synthetic: Sequence[SyntheticPatient],
    public_only: Sequence[SyntheticPatient] | None,
    extractor: DomainExtractor | None,
    predict_morphology: Callable[[NDArray[np.float32]], NDArray[np.floating]] | None,
    data: str,
    seed: int,
    further_extractors: Sequence[DomainExtractor] = (),
    networks: Sequence[Ensemble] = (),
    lpips: PairDistance | None = None,
    selected: Selected | None = None,
) -> Evaluation:
    """Measure fidelity, utility, radiogenomics and genes of a release.

    Args:
        plan: the study plan, whose scales and feature order all arguments share.
        train: real patients of all sites that were trained on; the ceiling.
        holdout: real patients of all sites that nothing was trained on.
        synthetic: the release.
        public_only: patients of the warm-start generator without any private data; None when there is none.
        extractor: the named feature network, trained on public data; None trains one on phantoms.
        predict_morphology: the released DNN: genes (N, G) -> morphology (N, F) normalised to [0, 1]; None for whoever has
            the release alone, which holds no weights: the network's own errors are then not measured.
        data: what the real patients are, for the reader, e.g. ``"simulated patients"``.
        seed: of every random draw; the same seed gives the same numbers on the same machine.
        further_extractors: `extractor` trained again from other seeds: distances in features are averaged over all.
        networks: further feature networks, e.g. from files (`fedsynth.metrics.onnx_network`), each with its own figures.
        lpips: a learned perceptual distance, for diversity.
        selected: what was selected for the release. Where it holds fewer sequences than the plan, real patients are compared
            by these alone, and so must `public_only` patients and `extractor` be of these; where the mix of patients was
            chosen, every section says so.

    Raises:
        UsageError: ``extractor_channels`` or ``synthetic_label_unknown``.
    """
    train, holdout = (seen(patients, plan, sequences_of(plan, selected)) for patients in (train, holdout))
    plan = with_sequences(plan, sequences_of(plan, selected))
    channels = len(plan.image.sequences)
    given = [each for each in (extractor, *further_extractors) if each is not None]
    if any(each.channels != channels for each in given):
        raise UsageError(
            "extractor_channels",
            f"An extractor takes {[each.channels for each in given]} channels, the images have {channels} sequences.",
        )
    # A stream a section: what one section draws does not shift the numbers of the next.
    draws = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(6)]
    if extractor is None:
        extractor = phantom_extractor(channels, draws[0])

    holdout_volumes, holdout_profiles = real_volumes(holdout), real_profiles(holdout)
    volumes = Columns(
        synthetic_volumes(plan, synthetic),
        real_volumes(train),
        public_only=NOT_ASKED if public_only is None else synthetic_volumes(plan, public_only),
    )
    profiles = Columns(
        synthetic_profiles(plan, synthetic),
        real_profiles(train),
        public_only=NOT_ASKED if public_only is None else synthetic_profiles(plan, public_only),
    )
    sections = []
    say("Evaluating fidelity")
    ensembles = [domain_ensemble((extractor, *further_extractors)), *networks]
    names = GroupNames(tuple(plan.label.classes), tuple(plan.image.sequences), holdout.site_names)
    in_plane = plan.image.pixel_spacing_mm * shrink_factor(plan.image.size)
    spacing_mm = (plan.image.slice_spacing_mm, in_plane, in_plane)
    sections.append(fidelity(volumes, holdout_volumes, ensembles, names, spacing_mm, draws[1], lpips))
    say("Evaluating recognisability")
    sections.append(detection(volumes, holdout_volumes, draws[5]))
    say("Evaluating utility")
    sections.append(utility(plan, volumes, holdout_volumes, extractor, draws[2], holdout.site_names))
    say("Evaluating radiogenomics")
    measured = remeasured(plan, synthetic, holdout, public_only)
    sections.append(
        radiogenomics(
            plan,
            profiles,
            holdout_profiles,
            predict_morphology or _no_network,
            measured,
            draws[3],
            holdout.site_names,
        )
    )
    say("Evaluating genes")
    sections.append(genes(plan, profiles, holdout_profiles, draws[4], holdout.site_names))
    return Evaluation(
        subject=subject_digest(synthetic),
        data=data,
        n_train=len(train),
        n_holdout=len(holdout),
        n_synthetic=len(synthetic),
        sections=[_said_of_selection(section, selected, plan) for section in sections],
    )


def _said_of_selection(section: Section, selected: Selected | None, plan: StudyPlan) -> Section:
    """`section`, which says first that what it measured was chosen."""
    chosen = [] if selected is None else mix_words(selected.asked, plan)
    if not chosen:
        return section
    explanation = (
        f"{' '.join(chosen)} The real patients beside them are not chosen, so every figure that depends on who the patients "
        f"are (distances, marginal distributions, class figures) shows that choice, too. {section.explanation}"
    )
    return section.model_copy(update={"explanation": explanation})


def _no_network(genes: NDArray[np.float32]) -> NDArray[np.floating]:
    raise NotMeasurable("the network's weights are no part of a release")


def phantom_extractor(channels: int, rng: np.random.Generator) -> DomainExtractor:
    """The extractor for want of a public cohort: trained on drawn ellipses with and without a lesion."""
    say("Training the feature extractor on phantoms")
    images, targets = phantom_slices(PHANTOMS, channels, 64, rng)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return train_extractor(images, targets, generator, f"{PHANTOMS} drawn phantoms")
