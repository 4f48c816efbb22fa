"""Membership inference from the generators that a site sent back, round by round.

A site's discriminator never leaves, and where the generator sees patients through it alone, a coordinator cannot compute how
a patient would have pulled the generator. What it can ask: did what the generator draws under the patient's own condition
come nearer to the patient in the site's hands? A generator that is held against patients' slices has a private gradient of
its own, so it is attacked through its updates as well (`fedsynth.attacks.updates`). One that grows is asked at the
resolution that the round trained.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsynth.attacks.transcript import Transcript
from fedsynth.metrics.domain_extractor import DomainExtractor, extract
from fedsynth.models.condition import condition, slice_positions
from fedsynth.models.growth import Stage, enlarged, stage_at
from fedsynth.models.images import make_generator
from fedsynth.models.interfaces import ImageGenerator
from fedsynth.plan import StudyPlan
from fedsynth.records import WEIGHTS, State

_ROUNDS, _SLICES, _DRAWS, _AT_ONCE = 3, 3, 1, 32


def generator_approach(
    plan: StudyPlan,
    morphology: Tensor,
    labels: Tensor,
    slices: NDArray[np.floating],
    rows: dict[str, list[int]],
    extractor: DomainExtractor,
    transcript: Transcript,
    seed: int,
) -> dict[str, NDArray[np.float64]]:
    """By how much generated slices came nearer to each patient's, in extractor features, summed over some rounds.

    Args:
        plan: the study plan.
        morphology: (N, F) of members and non-members, in [0, 1], NaN where not measured.
        labels: (N,) class codes, -1 where unknown.
        slices: (N, S * D) features of all their slices (`fedsynth.attacks.descriptions`).
        rows: by site, the patients to be scored.
        extractor: that made `slices`.
        transcript: what was sent and came back.
        seed: of the latent draws, the same before and after.

    Returns:
        Scores by site, in the order of its rows.
    """
    model = make_generator(plan).eval()
    depth = plan.image.slices
    steps = plan.gan.steps_per_round
    places = np.unique(np.linspace(0, depth - 1, min(_SLICES, depth) + 2).round().astype(int)[1:-1])
    truth = slices.reshape(len(labels), depth, -1)[:, places]
    scores = {site: np.zeros(len(numbers)) for site, numbers in rows.items()}
    for site, numbers in rows.items():
        for number in _spread(transcript.rounds("gan", site)):
            chosen = np.array(numbers)
            before, after = (
                _distance(
                    plan,
                    model,
                    state,
                    stage_at(plan, number * steps - 1),
                    morphology[chosen],
                    labels[chosen],
                    truth[chosen],
                    places,
                    extractor,
                    seed,
                )
                for state in (
                    transcript.sent("gan", number)[WEIGHTS["gan"]],
                    transcript.reply("gan", number, site),
                )
            )
            scores[site] += before - after
    return scores


def _distance(
    plan: StudyPlan,
    model: ImageGenerator,
    state: State,
    stage: Stage | None,
    morphology: Tensor,
    labels: Tensor,
    truth: NDArray[np.floating],
    places: NDArray[np.integer],
    extractor: DomainExtractor,
    seed: int,
) -> NDArray[np.float64]:
    """(N,) mean distance of the patients' slices from the nearest of a few generated under the same condition."""
    model.load_state_dict(state)
    positions = slice_positions(plan.image.slices)[torch.from_numpy(places)]
    latents = torch.randn(_DRAWS, plan.gan.latent_dim, generator=torch.Generator().manual_seed(seed))
    found = np.zeros(len(labels))
    for start in range(0, len(labels), _AT_ONCE):
        some = slice(start, min(start + _AT_ONCE, len(labels)))
        code = condition(
            labels[some].repeat_interleave(len(positions)),
            morphology[some].repeat_interleave(len(positions), dim=0),
            positions.repeat(len(labels[some])),
            len(plan.label.classes),
        )
        nearest = np.full((len(labels[some]), len(positions)), np.inf)
        for latent in latents:
            features = _generated(plan, model, code, latent, stage, extractor).reshape(*nearest.shape, -1)
            nearest = np.minimum(nearest, np.linalg.norm(features - truth[some], axis=2))
        found[some] = nearest.mean(axis=1)
    return found


@torch.no_grad()
def _generated(
    plan: StudyPlan,
    model: ImageGenerator,
    code: Tensor,
    latent: Tensor,
    stage: Stage | None,
    extractor: DomainExtractor,
) -> NDArray[np.float64]:
    """(B, D) features of one slice for each condition (B, c)."""
    made = enlarged(model(latent.expand(len(code), -1), code, stage), plan.image.size)
    return extract(extractor, ((made[:, :-1] + 1) / 2).numpy())


def _spread(rounds: list[int]) -> list[int]:
    """At most `_ROUNDS` of the rounds, evenly spread, with the first and the last."""
    return [
        rounds[i] for i in np.unique(np.linspace(0, len(rounds) - 1, min(_ROUNDS, len(rounds))).round().astype(int))
    ]
