"""Train on synthetic, test on real, on 1,508 real contrast-enhanced T1 slices of three tumour classes.

``python simulations/benchmarks/real_slices.py --data FOLDER --cohorts FOLDER --out FOLDER`` (`--data` holds
``<class>/<number>.png``, figshare 1512427, CC BY 4.0; `--cohorts` the public patients that ``cohorts.py`` drew).
The patients' ids are lost, so the unit of privacy is the **slice** (record), which protects a patient of many slices less
than the studies of this software do. Numbers run in patient order: sites and the test set are contiguous ranges of each
class. Neighbours differ by one record; delta is 1e-5; 32 x 32 pixels, grey.

Methods, each at epsilon 1, 3, 10 and without noise, three sites:

- ``gan``: the study's adversarial engine from random weights, weights averaged over sites after each round;
- ``embedding, public features``: class-wise mean embedding in the features of a network that was trained on simulated
  public slices, released once by each site, and a generator fitted to the sum (DP-MEPF, Harder et al. 2023);
- ``embedding, random features``: the same with a network of random filters;
- ``gaussian``: class means and a pooled covariance of low spatial frequencies, released once.

Beside them ``real``: the classifier trained on the real training slices, and ``majority``: always the commonest class.
About 15 minutes on one core with two seeds. Results are appended to ``real-slices.jsonl``; what is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn, idctn
from torch import Tensor, nn
from torch.nn import functional

from fedsynth.dp.accounting import Mechanism, noise_multiplier
from fedsynth.dp.randomness import SeededRandomness
from fedsynth.metrics.roc_auc import macro_auc
from fedsynth.models.condition import condition
from fedsynth.models.dcgan import Generator, initialise, make_discriminator, make_generator
from fedsynth.plan import ImagePlan, LabelPlan, MorphologyPlan, StudyPlan
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.adversarial import ImagePatients, train_gan
from fedsynth_client.training.statistic import release_statistic
from fedsynth_server.aggregation import moving_average, summed, weighted_average
from fedsynth_simulations.benchmarking.cohorts import load_public
from fedsynth_simulations.benchmarking.grid import benchmark_plan
from fedsynth_simulations.benchmarking.pictures import save_grid
from fedsynth_simulations.cohort.public import PublicCohort
from fedsynth_simulations.evaluation.extractor import extractor_task
from fedsynth_simulations.evaluation.networks import fit, predict

SIZE = 32
CLASSES = ("glioma", "meningioma", "pituitary")
# Where, as shares of a class in the order of its numbers, sites and test set lie.
_RANGES: dict[str, tuple[float, float]] = {"a": (0.0, 0.27), "b": (0.27, 0.53), "test": (0.53, 0.73), "c": (0.73, 1.0)}
_DELTA = 1e-5
_PER_CLASS = 400  # synthetic slices of each class
_NO_NOISE = 1e-6
_GAN_ROUNDS, _GAN_STEPS, _GAN_BATCH = 15, 20, 64
_FIT_STEPS, _FIT_BATCH = 400, 96
_COMPONENTS = 128  # public directions in which features are released
_FREQUENCIES = 10  # a side
_PUBLIC_PATIENTS = 300


@dataclass(frozen=True)
class Slices:
    """Grey slices (N, 32, 32) float32 in [0, 1] and their classes (N,)."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    """Sites, test set and public slices (N, 32, 32) with their targets."""

    sites: dict[str, Slices]
    test: Slices
    public: NDArray[np.float32]
    targets: NDArray[np.float32]

    @property
    def train(self) -> Slices:
        """All sites' slices."""
        parts = list(self.sites.values())
        return Slices(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))


def main() -> None:
    """Parse the command line, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cohorts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--gan-seeds", nargs="+", type=int, default=[1], help="its runs take the longest")
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 3.0, 10.0, math.inf])
    parser.add_argument("--methods", nargs="+", default=["real", "majority", *_METHODS])
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "real-slices.jsonl"
    done = {json.loads(line)["key"] for line in path.read_text().splitlines()} if path.exists() else set()
    task = _load(given.data, given.cohorts)
    for method in given.methods:
        epsilons = [math.inf] if method in ("real", "majority") else given.epsilons
        for seed in given.gan_seeds if method == "gan" else given.seeds:
            for epsilon in epsilons:
                key = f"{method}/{epsilon}/{seed}"
                if key in done:
                    continue
                started = time.process_time()
                result = _run(task, method, epsilon, seed, given.out)
                line = {"key": key, "method": method, "epsilon": str(epsilon), "seed": seed, **result}
                line["cpu_seconds"] = round(time.process_time() - started, 1)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    print(_table([json.loads(line) for line in path.read_text().splitlines()]))


def _load(data: Path, cohorts: Path) -> Task:
    parts: dict[str, list[Slices]] = {name: [] for name in _RANGES}
    for code, name in enumerate(CLASSES):
        paths = sorted((data / name).glob("*.png"), key=lambda path: int(path.stem))
        images = np.stack([_prepared(path) for path in paths])
        for part, (low, high) in _RANGES.items():
            chosen = images[round(low * len(paths)) : round(high * len(paths))]
            parts[part].append(Slices(chosen, np.full(len(chosen), code, dtype=np.int64)))
    merged = {
        part: Slices(np.concatenate([p.images for p in found]), np.concatenate([p.labels for p in found]))
        for part, found in parts.items()
    }
    public = load_public(cohorts, _PUBLIC_PATIENTS, 64)
    cohort = PublicCohort(public.images, public.masks, public.morphology.astype(np.float64), public.labels)
    slices, targets = extractor_task(cohort)
    t1c = slices[:, 1].reshape(len(slices), SIZE, 64 // SIZE, SIZE, 64 // SIZE).mean(axis=(2, 4))
    return Task({name: merged[name] for name in ("a", "b", "c")}, merged["test"], _scaled(t1c), targets)


def _prepared(path: Path) -> NDArray[np.float32]:
    """(32, 32): block means, scaled by the slice's own brightest pixels; no statistic over slices."""
    with Image.open(path) as picture:
        grey = np.asarray(picture.convert("L"), dtype=np.float32)
    factor = len(grey) // SIZE
    return _scaled(grey.reshape(SIZE, factor, SIZE, factor).mean(axis=(1, 3))[None])[0]


def _scaled(slices: NDArray[np.floating]) -> NDArray[np.float32]:
    bright = np.quantile(slices, 0.99, axis=(1, 2), keepdims=True)
    return np.clip(slices / np.maximum(bright, 1e-3), 0, 1).astype(np.float32)


def _run(task: Task, method: str, epsilon: float, seed: int, out: Path) -> dict[str, float | None]:
    if method == "majority":
        commonest = np.bincount(task.train.labels).argmax()
        return {"accuracy": float((task.test.labels == commonest).mean()), "auc": 0.5}
    if method == "real":
        return _classify(task.train, task.test, seed)
    drawn = _METHODS[method](task, epsilon, seed)
    if seed == 1:
        rows = [drawn.images[drawn.labels == code][:12] for code in range(len(CLASSES))]
        save_grid(out / f"{method.replace(', ', '-').replace(' ', '-')}-{epsilon}.png", np.concatenate(rows), 12)
    return _classify(drawn, task.test, seed)


class ClassNetwork(nn.Module):
    """Slices (N, 1, 32, 32) -> class logits (N, 3); the yardstick."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in ((1, 24), (24, 48), (48, 96)):
            layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(8, outside), nn.SiLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 16, len(CLASSES)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.layers(images)


def _classify(train: Slices, test: Slices, seed: int) -> dict[str, float | None]:
    network = fit(
        ClassNetwork,
        functional.cross_entropy,
        train.images[:, None],
        train.labels,  # type: ignore[arg-type]  # `fit` hands targets to the loss as they are
        np.random.default_rng([seed, 9]),
        300,
        64,
        "Training a class network",
    )
    logits = predict(network, test.images[:, None])
    return {
        "accuracy": round(float((logits.argmax(axis=1) == test.labels).mean()), 4),
        "auc": round(macro_auc(logits, test.labels), 4),
    }


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
                    "generator_batch": _GAN_BATCH,
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
    shared = average = generator.state_dict()
    local = {name: {f"model/{key}": value for key, value in critic.state_dict().items()} for name in task.sites}
    randomness = {name: SeededRandomness(100 * seed + i) for i, name in enumerate(task.sites)}
    labels = torch.arange(3 * 300) % 3
    pool = SyntheticProfiles(torch.zeros(len(labels), 0), torch.full((len(labels), 1), 0.5), labels)
    for _ in range(_GAN_ROUNDS):
        replies: dict[str, State] = {}
        for name, site in task.sites.items():
            rate = _GAN_BATCH / len(site)
            block = Mechanism(rate, _noise(rate, _GAN_ROUNDS * _GAN_STEPS, epsilon), _GAN_STEPS)
            result = train_gan(plan, shared, local[name], pool, _as_patients(site), block, randomness[name])
            replies[name], local[name] = result.weights, result.local
        shared = weighted_average(replies, dict.fromkeys(replies, 1 / len(replies)))
        average = moving_average(average, shared, plan.gan.ema_decay)
    generator.load_state_dict(average)
    return _draw(plan, generator, draws)


def _noise(rate: float, steps: int, epsilon: float) -> float:
    return _NO_NOISE if math.isinf(epsilon) else noise_multiplier(rate, steps, epsilon, _DELTA)


def _as_patients(site: Slices) -> ImagePatients:
    """Each slice as a patient of one plane, with an empty mask."""
    images = torch.from_numpy(site.images)[:, None, None] * 2 - 1
    slices = torch.cat([images, torch.full_like(images, -1.0)], dim=1).half()
    return ImagePatients(slices, torch.full((len(site), 1), math.nan), torch.from_numpy(site.labels))


def _draw(plan: StudyPlan, generator: Generator, draws: torch.Generator) -> Slices:
    labels = torch.arange(3).repeat_interleave(_PER_CLASS)
    generator.eval()
    with torch.no_grad():
        parts = [_generate(plan, generator, rows, draws) for rows in labels.split(200)]
    return Slices(((torch.cat(parts) + 1) / 2).numpy(), labels.numpy())


def _generate(plan: StudyPlan, generator: Generator, labels: Tensor, draws: torch.Generator) -> Tensor:
    """Slices (B, 32, 32) in [-1, 1] of the classes `labels`."""
    code = condition(labels, torch.full((len(labels), 1), 0.5), torch.zeros(len(labels)), len(CLASSES))
    z = torch.randn(len(labels), plan.gan.latent_dim, generator=draws)
    return generator(z, code)[:, 0]


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


def _embedding(task: Task, trained: bool, seed: int) -> Embedding:
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


def _mean_embedding(task: Task, epsilon: float, seed: int, *, trained: bool) -> Slices:
    plan, draws = _plan(task), torch.Generator().manual_seed(seed)
    embed = _embedding(task, trained, seed)
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
    initialise(generator, draws)
    _fit_generator(plan, generator, embed, means, draws)
    return _draw(plan, generator, draws)


def _fit_generator(
    plan: StudyPlan, generator: Generator, embed: Embedding, means: Tensor, draws: torch.Generator
) -> None:
    """Match the class means of the generator's slices; a running mean lowers the variance of the gradient."""
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _FIT_STEPS, 1e-4)
    running = torch.zeros_like(means)
    labels = torch.arange(_FIT_BATCH) % len(CLASSES)
    for step in range(_FIT_STEPS):
        drawn = embed(_generate(plan, generator, labels, draws))
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


_METHODS: dict[str, Callable[[Task, float, int], Slices]] = {
    "gaussian": _gaussian,
    "embedding, public features": lambda task, epsilon, seed: _mean_embedding(task, epsilon, seed, trained=True),
    "embedding, random features": lambda task, epsilon, seed: _mean_embedding(task, epsilon, seed, trained=False),
    "gan": _gan,
}


def _table(lines: list[dict[str, object]]) -> str:
    """Markdown: a row a method and epsilon, means over seeds."""
    cells: dict[tuple[str, str], list[dict[str, object]]] = {}
    for line in lines:
        cells.setdefault((str(line["method"]), str(line["epsilon"])), []).append(line)
    rows = ["| method | epsilon | accuracy | macro AUC | seeds |", "| --- | --- | --- | --- | --- |"]
    for (method, epsilon), found in cells.items():
        accuracy, auc = (np.array([float(str(line[name])) for line in found]) for name in ("accuracy", "auc"))
        shown = [f"{v.mean():.3f}" + (f" ± {v.std():.3f}" if len(v) > 1 else "") for v in (accuracy, auc)]
        rows.append(f"| {method} | {epsilon} | {shown[0]} | {shown[1]} | {len(found)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
