"""Private generators of single grey slices, federated over sites: adversarial, mean embedding, Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dctn, idctn
from torch import Tensor, nn
from torch.nn import functional

from fedsynth.dp.accounting import Mechanism, noise_multiplier
from fedsynth.dp.randomness import SeededRandomness
from fedsynth.models.condition import condition
from fedsynth.models.dcgan import initialise
from fedsynth.models.images import make_discriminator, make_generator
from fedsynth.models.interfaces import ImageGenerator
from fedsynth.plan import ImagePlan, LabelPlan, MorphologyPlan, StudyPlan
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.adversarial import ImagePatients
from fedsynth_client.training.statistic import release_statistic
from fedsynth_server.aggregation import summed
from fedsynth_simulations.benchmarking.grid import benchmark_plan
from fedsynth_simulations.benchmarking.rounds import train_rounds
from fedsynth_simulations.benchmarking.slices import CLASSES, SIZE, Slices, Task
from fedsynth_simulations.pretrain import VolumeEncoder

_DELTA = 1e-5
_PER_CLASS = 400  # synthetic slices of each class
_NO_NOISE = 1e-3
_GAN_ROUNDS, _GAN_STEPS, _GAN_BATCH = 15, 20, 64
_GENERATOR_BATCH = 32
_FIT_STEPS, _FIT_BATCH = 200, 60
_START_STEPS, _START_BATCH = 500, 48
_COMPONENTS = 128  # public directions in which features are released
_FREQUENCIES = 10  # a side


# -- adversarial ------------------------------------------------------------------------------------------------------


def _plan(task: Task) -> StudyPlan:
    """The study's plan for grey slices: the mask channel is empty, and the condition tells the class alone."""
    base = benchmark_plan(32, {name: len(site) for name, site in task.sites.items()})
    return base.model_copy(
        update={
            "image": ImagePlan(sequences=["T1c"], size=32, slices=1, pixel_spacing_mm=6.0),
            "label": LabelPlan(name="tumour", classes=list(CLASSES)),
            "morphology": MorphologyPlan(features=["volume"]),
            "gan": base.gan.model_copy(
                update={
                    "rounds": _GAN_ROUNDS,
                    "steps_per_round": _GAN_STEPS,
                    "expected_batch": _GAN_BATCH,
                    "learning_rate": 1e-3,
                    "generator_learning_rate": 5e-4,
                    "generator_batch": _GENERATOR_BATCH,
                    "warm_start": None,
                }
            ),
        }
    )


def _gan(task: Task, epsilon: float, seed: int) -> Slices:
    plan, draws = _plan(task), torch.Generator().manual_seed(seed)
    generator, critic = make_generator(plan), make_discriminator(plan)
    initialise(generator, draws)
    initialise(critic, draws)
    labels = torch.arange(3 * 300) % 3
    blocks = {}
    for name, site in task.sites.items():
        rate = _GAN_BATCH / len(site)
        blocks[name] = Mechanism(rate, _noise(rate, _GAN_ROUNDS * _GAN_STEPS, epsilon), _GAN_STEPS)
    end = train_rounds(
        plan,
        generator.state_dict(),
        critic.state_dict(),
        {name: _as_patients(site) for name, site in task.sites.items()},
        blocks,
        {name: SeededRandomness(100 * seed + i) for i, name in enumerate(task.sites)},
        dict.fromkeys(task.sites, 1 / len(task.sites)),
        SyntheticProfiles(torch.zeros(len(labels), 0), torch.full((len(labels), 1), 0.5), labels),
    )
    generator.load_state_dict(end.average)
    return _draw(plan, generator, draws, smooth=False)


def _noise(rate: float, steps: int, epsilon: float) -> float:
    return _NO_NOISE if math.isinf(epsilon) else noise_multiplier(rate, steps, epsilon, _DELTA)


def _as_patients(site: Slices) -> ImagePatients:
    """Each slice as a patient of one plane, with an empty mask."""
    images = torch.from_numpy(site.images)[:, None, None] * 2 - 1
    slices = torch.cat([images, torch.full_like(images, -1.0)], dim=1).half()
    return ImagePatients(slices, torch.full((len(site), 1), math.nan), torch.from_numpy(site.labels))


def _draw(plan: StudyPlan, generator: ImageGenerator, draws: torch.Generator, *, smooth: bool) -> Slices:
    labels = torch.arange(3).repeat_interleave(_PER_CLASS)
    generator.eval()
    with torch.no_grad():
        parts = [_generate(plan, generator, rows, draws, smooth=smooth) for rows in labels.split(200)]
    return Slices(((torch.cat(parts) + 1) / 2).numpy(), labels.numpy())


def _generate(
    plan: StudyPlan, generator: ImageGenerator, labels: Tensor, draws: torch.Generator, *, smooth: bool
) -> Tensor:
    """Slices (B, 32, 32) in [-1, 1] of the classes `labels`."""
    z = torch.randn(len(labels), plan.gan.latent_dim, generator=draws)
    drawn = generator(z, _code(labels))[:, 0]
    return _smoothed(drawn) if smooth else drawn


def _smoothed(planes: Tensor) -> Tensor:
    """Binomial smoothing over 3 x 3 pixels. Features with strides do not see a checkerboard, and without this the fit
    draws one wherever it likes to raise a mean square."""
    weight = torch.tensor([0.25, 0.5, 0.25])
    padded = functional.pad(planes[:, None], (1, 1, 1, 1), mode="replicate")
    return functional.conv2d(padded, torch.outer(weight, weight)[None, None])[:, 0]


def _code(labels: Tensor) -> Tensor:
    return condition(labels, torch.full((len(labels), 1), 0.5), torch.zeros(len(labels)), len(CLASSES))


# -- mean embedding ---------------------------------------------------------------------------------------------------


class Features(nn.Module):
    """Convolutional features of slices: pooled maps of three levels and the slice at 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Conv2d(inside, outside, 4, stride=2, padding=1) for inside, outside in ((1, 24), (24, 48), (48, 96))
        )
        self.head = nn.Linear(2 * 96 * 4, 6)

    def forward(self, images: Tensor) -> Tensor:
        """Target logits (N, 6) of slices (N, 32, 32) in [-1, 1]."""
        last = self.maps(images)[-1]
        pooled = functional.adaptive_avg_pool2d(last, 2), functional.adaptive_max_pool2d(last, 2)
        return self.head(torch.cat(pooled, dim=1).flatten(1))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Activations of the three levels."""
        maps, x = [], images[:, None]
        for level in self.levels:
            x = functional.silu(level(x))
            maps.append(x)
        return maps

    def describe(self, images: Tensor) -> Tensor:
        """(N, M): means over 2 x 2 places of each map and of its square, and the slice at 8 x 8 pixels, each of norm 1."""
        blocks = [functional.adaptive_avg_pool2d(images[:, None], 8).flatten(1)]
        for level in self.maps(images):
            blocks.append(functional.adaptive_avg_pool2d(level, 2).flatten(1))
            blocks.append(functional.adaptive_avg_pool2d(level**2, 2).flatten(1))
        return torch.cat([functional.normalize(block, dim=1) for block in blocks], dim=1)


@dataclass(frozen=True)
class Embedding:
    """Slices to public coordinates: what `Features.describe` gives, centred and turned to public main directions.

    Coordinates are scaled so that public slices have norm about 1, and longer ones are shortened to 1.
    """

    features: Features
    mean: Tensor
    directions: Tensor
    scale: float

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 32, 32) in [-1, 1] -> (N, D), norm at most 1."""
        u = (self.features.describe(images) - self.mean) @ self.directions / self.scale
        return u / u.norm(dim=1, keepdim=True).clamp(min=1.0)


def public_embedding(task: Task, *, trained: bool, seed: int) -> Embedding:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = Features()
    public = torch.from_numpy(task.public) * 2 - 1
    targets = torch.from_numpy(task.targets)
    if trained:
        known, truth = (~targets.isnan()).float(), targets.nan_to_num(0.0)
        optimizer = torch.optim.Adam(features.parameters(), lr=2e-3)
        for _ in range(300):
            rows = torch.randint(len(public), (64,), generator=generator)
            loss = functional.binary_cross_entropy_with_logits(features(public[rows]), truth[rows], known[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    features.requires_grad_(False)
    described = features.describe(_varied(public, generator))
    mean = described.mean(0)
    directions = torch.linalg.svd(described - mean, full_matrices=False).Vh[:_COMPONENTS].T
    lengths = ((described - mean) @ directions).norm(dim=1)
    return Embedding(features, mean, directions, 1.5 * float(lengths.median()))


def _varied(public: Tensor, generator: torch.Generator) -> Tensor:
    """Public slices turned by quarter turns and shifted: real ones come in three planes, the simulated ones in one."""
    turned = torch.cat([torch.rot90(public, k, (1, 2)) for k in range(4)])
    turned = turned[torch.randperm(len(turned), generator=generator)[:4000]]
    shifts = torch.randint(-4, 5, (2,), generator=generator).tolist()
    return torch.cat([turned, turned.roll(shifts, (1, 2)), turned.flip(2)])


_COUNT_SHARE = 0.1  # of a row's squared norm, for the one-hot class from which counts come


def _mean_embedding(task: Task, epsilon: float, seed: int, *, trained: bool, started: bool) -> Slices:
    plan, draws = _plan(task), torch.Generator().manual_seed(seed)
    embed = public_embedding(task, trained=trained, seed=seed)
    sigma = _noise(1.0, 1, epsilon)
    totals = {}
    for i, (name, site) in enumerate(task.sites.items()):
        one_hot = functional.one_hot(torch.from_numpy(site.labels), len(CLASSES)).float()
        coordinates = embed(torch.from_numpy(site.images) * 2 - 1)
        placed = (one_hot[:, :, None] * coordinates[:, None, :]).flatten(1)
        rows = torch.cat([math.sqrt(_COUNT_SHARE) * one_hot, math.sqrt(1 - _COUNT_SHARE) * placed], dim=1)
        mechanism = Mechanism(1.0, sigma, 1)
        totals[name] = release_statistic(rows, mechanism, 1.0, SeededRandomness(100 * seed + i)).weights
    total = summed(totals)["total"]
    counts = (total[: len(CLASSES)] / math.sqrt(_COUNT_SHARE)).clamp(min=20.0)
    means = total[len(CLASSES) :].reshape(len(CLASSES), -1) / math.sqrt(1 - _COUNT_SHARE) / counts[:, None]
    generator = make_generator(plan)
    if started:
        generator.load_state_dict(_public_start(task))
    else:
        initialise(generator, draws)
    _fit_generator(plan, generator, embed, means, 3e-4 if started else 1e-3, draws)
    return _draw(plan, generator, draws, smooth=True)


@lru_cache(maxsize=1)
def _public_start(task: Task) -> State:
    """A generator that was trained as the decoder of a variational autoencoder on public slices, classes at random."""
    plan, draws = _plan(task), torch.Generator().manual_seed(0)
    model = make_generator(plan)
    encoder = VolumeEncoder(channels=1, size=SIZE, latent_dim=plan.gan.latent_dim, width=32)
    initialise(model, draws)
    initialise(encoder, draws)
    public = _varied(torch.from_numpy(task.public) * 2 - 1, draws)
    optimizer = torch.optim.Adam([*model.parameters(), *encoder.parameters()], lr=1e-3)
    for _ in range(_START_STEPS):
        real = public[torch.randint(len(public), (_START_BATCH,), generator=draws)]
        mean, log_variance = encoder(real[:, None])
        z = mean + torch.randn(mean.shape, generator=draws) * (0.5 * log_variance).exp()
        labels = torch.randint(len(CLASSES), (len(real),), generator=draws)
        drawn = _smoothed(model(z, _code(labels))[:, 0])
        kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).mean()
        loss = (drawn - real).abs().mean() + 0.02 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _fit_generator(
    plan: StudyPlan,
    generator: ImageGenerator,
    embed: Embedding,
    means: Tensor,
    learning_rate: float,
    draws: torch.Generator,
) -> None:
    """Match the class means of the generator's slices; a running mean lowers the variance of the gradient."""
    optimizer = torch.optim.Adam(generator.parameters(), lr=learning_rate, betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _FIT_STEPS, learning_rate / 10)
    running = torch.zeros_like(means)
    labels = torch.arange(_FIT_BATCH) % len(CLASSES)
    for step in range(_FIT_STEPS):
        drawn = embed(_generate(plan, generator, labels, draws, smooth=True))
        now = torch.stack([drawn[labels == code].mean(0) for code in range(len(CLASSES))])
        weight = max(1 / (step + 1), 0.1)
        blend = (1 - weight) * running + weight * now
        # The gradient of the blend is that of `now` times its weight; dividing gives steps of one size throughout.
        loss = ((blend - means) ** 2).sum() / weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        running = blend.detach()


# -- Gaussian ---------------------------------------------------------------------------------------------------------

_WEIGHTS = (0.1, 0.45, 0.45)  # squared norms of counts, means and second moments in a row


def _gaussian(task: Task, epsilon: float, seed: int) -> Slices:
    """Class means and one covariance of the lowest spatial frequencies (cosine transform, public), released once."""
    rng = np.random.default_rng(seed)
    public = _frequencies(task.public)
    centre = public.mean(axis=0)
    radius = 1.5 * float(np.median(np.linalg.norm(public - centre, axis=1)))
    sigma, d = _noise(1.0, 1, epsilon), public.shape[1]
    upper = np.triu_indices(d)
    # Off-diagonal entries stand for two, so that the norm of the row is that of the matrix.
    twice = np.where(upper[0] == upper[1], 1.0, math.sqrt(2.0))
    totals = {}
    for i, (name, site) in enumerate(task.sites.items()):
        x = (_frequencies(site.images) - centre) / radius
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1.0)
        one_hot = np.eye(len(CLASSES))[site.labels]
        placed = (one_hot[:, :, None] * x[:, None, :]).reshape(len(x), -1)
        squares = x[:, upper[0]] * x[:, upper[1]] * twice
        weighted = zip(_WEIGHTS, (one_hot, placed, squares), strict=True)
        rows = torch.from_numpy(np.concatenate([math.sqrt(w) * block for w, block in weighted], axis=1))
        totals[name] = release_statistic(rows, Mechanism(1.0, sigma, 1), 1.0, SeededRandomness(100 * seed + i)).weights
    total = summed(totals)["total"].double().numpy()
    k = len(CLASSES)
    counts = np.maximum(total[:k] / math.sqrt(_WEIGHTS[0]), 20.0)
    means = total[k : k + k * d].reshape(k, d) / math.sqrt(_WEIGHTS[1]) / counts[:, None]
    second = np.zeros((d, d))
    second[upper] = total[k + k * d :] / math.sqrt(_WEIGHTS[2]) / twice / counts.sum()
    second = second + np.triu(second, 1).T
    covariance = second - (means * (counts / counts.sum())[:, None]).T @ means
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    labels = np.repeat(np.arange(k), _PER_CLASS)
    drawn = means[labels] + rng.standard_normal((len(labels), d)) @ root.T
    return Slices(_from_frequencies(drawn * radius + centre), labels.astype(np.int64))


def _frequencies(images: NDArray[np.floating]) -> NDArray[np.float64]:
    lowest = dctn(images.astype(np.float64), axes=(1, 2), norm="ortho")[:, :_FREQUENCIES, :_FREQUENCIES]
    return np.asarray(lowest.reshape(len(images), -1))


def _from_frequencies(coefficients: NDArray[np.float64]) -> NDArray[np.float32]:
    padded = np.zeros((len(coefficients), SIZE, SIZE))
    padded[:, :_FREQUENCIES, :_FREQUENCIES] = coefficients.reshape(-1, _FREQUENCIES, _FREQUENCIES)
    return np.clip(idctn(padded, axes=(1, 2), norm="ortho"), 0, 1).astype(np.float32)


def _embedding_method(*, trained: bool, started: bool) -> Callable[[Task, float, int], Slices]:
    return partial(_mean_embedding, trained=trained, started=started)


# Task, epsilon and seed to synthetic slices.
METHODS: dict[str, Callable[[Task, float, int], Slices]] = {
    "gaussian": _gaussian,
    "embedding, public features and start": _embedding_method(trained=True, started=True),
    "embedding, public features": _embedding_method(trained=True, started=False),
    "embedding, random features": _embedding_method(trained=False, started=False),
    "gan": _gan,
}
