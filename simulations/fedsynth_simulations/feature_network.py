"""The public state of the mean embedding: a feature network and its statistics, from a public simulated cohort.

The network learns to describe the tumour in a slice and to find it. It is not the network that evaluates
(`fedsynth.metrics.domain_extractor`): another architecture, without normalisation, other targets, other patients, so
that an evaluation does not reward a generator for fitting its own yardstick.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedsynth.engines.embedding import COMPONENTS, FEATURE_BOUND, TARGETS, Embedding, bounded, project
from fedsynth.models.condition import condition, slice_positions
from fedsynth.models.features import FeatureNetwork, describe_slices, make_feature_network
from fedsynth.models.interfaces import ImageGenerator
from fedsynth.morphology import ENHANCING, NECROSIS, OEDEMA
from fedsynth.plan import StudyPlan
from fedsynth.progress import track
from fedsynth.records import State
from fedsynth_simulations.pretrain import PublicPatients

_FEWEST_PIXELS = 8
_LARGEST_SHARE = 0.1  # of a slice that a tumour covers
_RIDGE = 0.01
_LEAST_VARIANCE = 1e-5  # of the largest
_CHUNK = 64


def embedding_state(
    plan: StudyPlan,
    patients: PublicPatients,
    parts: NDArray[np.uint8],
    generator_model: ImageGenerator,
    generator: torch.Generator,
    *,
    steps: int = 800,
) -> State:
    """Train the network and take all statistics that `fedsynth.engines.embedding.public_template` names.

    Args:
        plan: image grid, classes and features.
        patients: the public cohort.
        parts: (N, S, H, W) its label maps, which tell the tumour's parts.
        generator_model: the public generator that a study starts from; what it gets wrong on average is public.
        generator: of all draws.
        steps: of the network's training.
    """
    network = train_feature_network(patients.volumes[:, :-1], parts, generator, steps)
    state: State = {f"network/{name}": tensor for name, tensor in network.state_dict().items()}
    depth = plan.image.slices
    described = torch.stack([_describe(network, volume) for volume in patients.volumes])  # (N, S, M)
    state["centre"] = described.mean(dim=0)
    state["scale"] = (described - state["centre"]).std(dim=(0, 1)).clamp(min=1e-4)
    standard = bounded(((described - state["centre"]) / state["scale"]).flatten(0, 1), FEATURE_BOUND)
    values, vectors = torch.linalg.eigh((standard.T @ standard / len(standard)).double())
    state["directions"] = vectors.flip(1)[:, :COMPONENTS].float()
    state["spread"] = values.flip(0)[:COMPONENTS].clamp(min=1e-8).sqrt().float()
    one_hot = functional.one_hot(patients.labels, len(plan.label.classes)).float()
    state["label_share"] = one_hot.mean(dim=0).clamp(0.02, 0.98)
    measured = patients.morphology.double()
    state["morphology_centre"] = torch.nanmean(measured, dim=0).float()
    state["morphology_scale"] = (
        torch.nanmean((measured - torch.nanmean(measured, dim=0)) ** 2, dim=0).sqrt().clamp(min=1e-3).float()
    )

    draft = _unweighted(network, state, len(plan.label.classes))
    conditions = draft.conditions(patients.morphology, patients.labels)
    places = torch.arange(depth)
    scores = torch.stack([project(state, volume, places) for volume in described])  # (N, S, K)
    state["regression"] = _ridge(conditions, scores)
    deviations = (scores - torch.einsum("nq,sqk->nsk", conditions, state["regression"])).mean(dim=1)
    _, rotation = torch.linalg.eigh((deviations.T @ deviations / len(deviations)).double())
    state["rotation"] = rotation.flip(1).float().contiguous()
    rotated = deviations @ state["rotation"]
    variance = (rotated[:, :, None] * conditions[:, None, :]).square().mean(dim=0)
    # With few public patients some directions look as if nobody differed in them; nothing should be expected of those.
    state["variance"] = variance.clamp(min=_LEAST_VARIANCE * float(variance.max()))
    complete = replace(draft, state=state)
    state["expected"] = _of_generator(plan, complete, generator_model, patients, generator)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def train_feature_network(
    images: Tensor, parts: NDArray[np.uint8], generator: torch.Generator, steps: int, batch: int = 64
) -> FeatureNetwork:
    """Train on public volumes (N, C, S, H, W) in [-1, 1] and their label maps (N, S, H, W)."""
    targets = torch.from_numpy(_targets(parts))
    patients, channels, depth = images.shape[:3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        network = FeatureNetwork(channels, TARGETS)
    tumour = torch.from_numpy(parts > 0)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in track(range(steps), "Training the feature network on public patients", steps):
        rows = torch.randint(patients, (batch,), generator=generator)
        places = torch.randint(depth, (batch,), generator=generator)
        logits, located = network(images[rows, :, places].float())
        truth = targets[rows, places]
        known = truth.isfinite()
        describing = (
            functional.binary_cross_entropy_with_logits(logits, truth.nan_to_num(0.0), known.float(), reduction="sum")
            / known.sum()
        )
        share = functional.adaptive_avg_pool2d(tumour[rows, places].float()[:, None], located.shape[-1])[:, 0]
        locating = functional.binary_cross_entropy_with_logits(located, share)
        loss = describing + 3 * locating
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return make_feature_network(network.state_dict())


def _targets(parts: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, S, TARGETS) in [0, 1]: tumour present, place of the slice, share of the slice, centroid (row, column), and the
    parts' shares of the tumour; NaN where there is no tumour to describe."""
    _, depth, height, width = parts.shape
    tumour = parts > 0
    pixels = tumour.sum(axis=(2, 3))
    present = pixels >= _FEWEST_PIXELS
    some = np.maximum(pixels, 1)
    described = np.stack(
        [
            np.clip(pixels / (_LARGEST_SHARE * height * width), 0, 1),
            tumour.sum(axis=3) @ np.linspace(0, 1, height) / some,
            tumour.sum(axis=2) @ np.linspace(0, 1, width) / some,
            *[(parts == part).sum(axis=(2, 3)) / some for part in (NECROSIS, OEDEMA, ENHANCING)],
        ],
        axis=2,
    )
    described[~present] = np.nan
    place = np.broadcast_to(np.linspace(0, 1, depth), present.shape)
    return np.concatenate([np.stack([present, place], axis=2), described], axis=2).astype(np.float32)


@torch.no_grad()
def _describe(network: FeatureNetwork, volume: Tensor) -> Tensor:
    """(S, M) of a volume (C + 1, S, H, W)."""
    return describe_slices(network, volume.transpose(0, 1).float())


def _unweighted(network: FeatureNetwork, state: State, classes: int) -> Embedding:
    return Embedding(network, state, torch.zeros(0), torch.zeros(0, dtype=torch.int64), classes, torch.zeros(0))


def _ridge(conditions: Tensor, scores: Tensor) -> Tensor:
    """(S, 1 + Q, K): ridge regression of scores (N, S, K) on conditions (N, 1 + Q), for each position by itself."""
    x = conditions.double()
    gram = x.T @ x + _RIDGE * len(x) * torch.diag(torch.tensor([0.0, *[1.0] * (x.shape[1] - 1)], dtype=torch.float64))
    return torch.linalg.solve(gram, torch.einsum("nq,nsk->sqk", x, scores.double())).float()


@torch.no_grad()
def _of_generator(
    plan: StudyPlan, embedding: Embedding, model: ImageGenerator, patients: PublicPatients, generator: torch.Generator
) -> Tensor:
    """(DEVIATIONS, 1 + Q): the mean of each coordinate, unweighted, over public conditions drawn through `model`."""
    positions, depth = slice_positions(plan.image.slices), plan.image.slices
    conditions = embedding.conditions(patients.morphology, patients.labels)
    total = torch.zeros(embedding.state["variance"].shape, dtype=torch.float64)
    for i in track(range(len(patients.labels)), "Embedding the public generator", len(patients.labels)):
        code = condition(
            patients.labels[i].expand(depth), patients.morphology[i].expand(depth, -1), positions, embedding.classes
        )
        z = torch.randn(1, model.latent_dim, generator=generator).expand(depth, -1)
        deviations = embedding.deviations(model(z, code), torch.arange(depth), conditions[i].expand(depth, -1))
        total += torch.outer(deviations.mean(dim=0), conditions[i]).double()
    return (total / len(patients.labels)).float()
