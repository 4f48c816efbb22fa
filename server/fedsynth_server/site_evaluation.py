"""The sites' evaluation of the finished generator, on the coordinator's side: what they evaluate with, and what came back.

Both ends are post-processing: the evaluators see synthetic patients only, and what came back are noisy sums.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedsynth.budget import evaluation_mechanism
from fedsynth.evaluation.networks import SliceClassifier, SmallUNet, fit, segmentation_loss
from fedsynth.evaluation.samples import synthetic_profiles, synthetic_volumes, training_slices
from fedsynth.evaluation.site_scores import ROW_SIZE, bearing_pixels, meanings, noisy_scores
from fedsynth.evaluation.site_values import FILE, SiteEvaluation, SiteScores
from fedsynth.files import DISK_FULL, write_atomic
from fedsynth.plan import StudyPlan
from fedsynth.progress import say
from fedsynth.records import EVALUATORS, WEIGHTS, State, state_digest
from fedsynth_server.checkpoint import StudyState
from fedsynth_server.synthesis import synthesise

TOTAL = "total"
PATIENTS = 200  # synthetic patients that the evaluators are trained on
SLICES = 3000  # of theirs, at most
STEPS, BATCH = 250, 32

_EXPLANATION = (
    "After training, each site let small networks, which had been trained on synthetic patients only, answer for its own "
    "held-out patients, on whom nothing had been trained. It released one sum of bounded scores with Gaussian noise; no "
    "score of a patient left a site. Intervals (95 %) hold that noise and nothing else: they say where the mean over these "
    "very patients lies, not what other patients would have given, nor what networks trained again would have reached. "
    "Where the noise drowns a score, nothing is known of it. Sites compute their scores themselves, and nobody can check "
    "them. The networks are small yardsticks: scores compare generators, and are no claim about clinical performance."
)


def evaluation_template() -> State:
    """Names, shapes and types of what a site sends; the values mean nothing."""
    return {TOTAL: torch.zeros(ROW_SIZE)}


def make_evaluators(plan: StudyPlan, state: StudyState) -> State:
    """Train what sites evaluate with on patients drawn from the finished study (`evaluators_template`).

    Seeded by the plan's digest: the same state gives the same evaluators, which touch no private data.

    Raises:
        Refused: ``study_not_finished``.
    """
    seed = int(plan.digest[:15], 16)
    patients = synthesise(plan, state, PATIENTS, torch.Generator().manual_seed(seed))
    profiles, volumes = synthetic_profiles(plan, patients), synthetic_volumes(plan, patients)
    rng, channels = np.random.default_rng(seed), len(plan.image.sequences)

    images, masks = training_slices(volumes, SLICES, rng, tumour_share=0.5)
    unet = fit(
        lambda: SmallUNet(channels),
        segmentation_loss,
        images,
        masks.astype(np.float32),
        rng,
        STEPS,
        BATCH,
        "Training the sites' segmentation",
    )
    bearing = (masks.sum(axis=(1, 2)) >= bearing_pixels(plan)).astype(np.float32)
    # Half of the slices bear tumour, as the balanced accuracy that the sites compute weighs them.
    classifier = fit(
        lambda: SliceClassifier(channels),
        functional.binary_cross_entropy_with_logits,
        images,
        bearing,
        rng,
        STEPS,
        BATCH,
        "Training the sites' slice classifier",
    )
    frequency = np.bincount(profiles.labels, minlength=len(plan.label.classes)) / len(profiles)
    return {
        **_prefixed("unet", unet),
        **_prefixed("classifier", classifier),
        "morphology_floor": torch.from_numpy(profiles.morphology.mean(axis=0)).to(torch.float32),
        "label_floor": torch.from_numpy(frequency).to(torch.float32),
    }


def _prefixed(name: str, network: nn.Module) -> State:
    return {f"{name}/{key}": tensor.detach().clone() for key, tensor in network.state_dict().items()}


def site_evaluation(plan: StudyPlan, state: StudyState) -> SiteEvaluation:
    """Read the noisy sums that sites sent.

    Raises:
        ValueError: the plan has no evaluation, or it is not done.
    """
    if plan.site_evaluation is None or state.evaluated is None:
        raise ValueError("the sites have not evaluated this study")
    sums, sigma = state.weights.get(WEIGHTS["evaluation"], {}), evaluation_mechanism(plan).noise_multiplier
    receipts = state.evaluated.receipts
    return SiteEvaluation(
        plan_digest=plan.digest,
        evaluators=state_digest(state.weights[EVALUATORS]),
        epsilon_budget=plan.site_evaluation.epsilon,
        delta=plan.privacy.delta,
        # Held-out patients have an account of their own, and noise also in a study without privacy.
        private=plan.privacy.reproducible_seed is None
        and all(receipt.private or not plan.privacy.private for receipt in receipts.values()),
        meanings=meanings(plan),
        sites=[
            SiteScores(
                site=site,
                epsilon=receipt.epsilon,
                epsilon_lifetime=receipt.epsilon_lifetime,
                noise_multiplier=sigma,
                scores=noisy_scores(sums[site], sigma),
            )
            for site, receipt in sorted(receipts.items())
        ],
        missing=state.evaluated.missing,
        # The sites' noises are independent.
        pooled=noisy_scores(torch.stack([sums[s] for s in sorted(sums)]).double().sum(0), sigma * math.sqrt(len(sums)))
        if sums
        else [],
        explanation=_EXPLANATION,
    )


def save_site_evaluation(plan: StudyPlan, state: StudyState, folder: Path) -> None:
    """Write ``site-evaluation.json`` into the study's folder, unless it is there as it should be."""
    content = site_evaluation(plan, state).model_dump_json(indent=2).encode()
    path = folder / FILE
    if path.is_file() and path.read_bytes() == content:
        return
    try:
        write_atomic(path, content)
    except OSError as error:
        # Everything that it holds is in the checkpoint: the study is done, and running it again writes the file.
        if error.errno not in DISK_FULL:
            raise
        say(f"the disk is full: {FILE} is not written")
