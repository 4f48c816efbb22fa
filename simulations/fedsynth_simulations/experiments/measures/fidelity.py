"""How near synthetic slices come to real ones: Fréchet distance in features of the domain, SSIM, diversity, and the
discriminator's own verdict."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedsynth.losses import taken_for_real
from fedsynth.metrics.domain_extractor import NUM_FEATURES, DomainExtractor, extract, train_extractor
from fedsynth.metrics.frechet import frechet_distance, frechet_folds
from fedsynth.metrics.jackknife import jackknife_interval
from fedsynth.metrics.nearest_image import nearest_slices
from fedsynth.metrics.precision_recall import precision_recall
from fedsynth.metrics.ssim_diversity import similarity
from fedsynth.models.images import make_discriminator
from fedsynth_simulations.experiments.bench import REAL, Bench, Measured, RealSlices, mean_cell, share_cell
from fedsynth_simulations.experiments.drawing import Drawn
from fedsynth_simulations.experiments.training import Trained, code
from fedsynth_simulations.experiments.values import Cell, Curves, Line

_PAIRS = 300
_NEAREST = 200
_FEW = 2 * NUM_FEATURES  # slices, at which the distance is mostly bias


def domain_network(bench: Bench) -> DomainExtractor:
    """The network whose features are compared: trained on the real training slices to tell class and tumour."""
    train = bench.train
    classes = np.eye(len(bench.data.label.classes))[np.clip(train.labels, 0, None)]
    classes[train.labels < 0] = np.nan
    tumour = train.masks.reshape(len(train), -1).max(axis=1, initial=False)
    targets = np.concatenate([classes, tumour[:, None]], axis=1)
    return train_extractor(
        train.images,
        targets,
        torch.Generator().manual_seed(bench.experiment.spec.seed),
        "the experiment's real training slices",
        bench.classifier_steps,
    )


def frechet(bench: Bench) -> Measured:
    """Fréchet distance to the test slices, and how much of the test slices' manifold is covered."""
    network = domain_network(bench)
    test = extract(network, bench.test.images)
    distance, precision, recall = {}, {}, {}
    for column, (features, owners) in _features(bench, network).items():
        count = min(len(features), len(test))
        reals, fakes = test[:count], features[:count]
        few = count <= _FEW
        value = frechet_distance(reals, fakes, few)
        folds = frechet_folds(reals, fakes, bench.test.owners[:count], owners[:count], few)
        interval = jackknife_interval(value, *folds, least=0.0)
        distance[column] = Cell(
            value=value, interval=interval, note=f"of {count} slices only, so biased" if few else ""
        )
        precise, recalled = precision_recall(reals, fakes)
        precision[column], recall[column] = Cell(value=precise), Cell(value=recalled)
    row = bench.experiment.row
    return Measured(
        [
            row(
                "fid",
                "Fréchet distance to test slices (lower is better)",
                distance,
                "Features of a small network trained on the real training slices, not of Inception: no other FID can be "
                "compared. Intervals: jackknife over slices or patients",
            ),
            row("precision", "Precision: share of synthetic slices that look real", precision),
            row("recall", "Recall: share of test slices that are covered (0: mode collapse)", recall),
        ]
    )


def _features(bench: Bench, network: DomainExtractor) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]:
    found = {column: (extract(network, drawn.images), np.arange(len(drawn))) for column, drawn in _mixed(bench).items()}
    real = bench.train.take(bench.rng(1).permutation(len(bench.train)))
    return found | {REAL: (extract(network, real.images), real.owners)}


def _mixed(bench: Bench) -> dict[str, Drawn]:
    """Synthetic slices in random order, in the classes' shares among the test slices: a distance must not measure those."""
    found = {}
    shares = np.array([(bench.test.labels == k).sum() for k in range(len(bench.data.label.classes))], dtype=float)
    shares = shares / shares.sum() if shares.sum() else np.full(len(shares), 1 / len(shares))
    for column, drawn in bench.drawn.items():
        rng = bench.rng(2)
        rows = [np.flatnonzero(drawn.labels == k) for k in range(len(shares))]
        largest = min(len(each) / share for each, share in zip(rows, shares, strict=True) if share > 0)
        kept = [rng.permutation(each)[: int(largest * share)] for each, share in zip(rows, shares, strict=True)]
        found[column] = drawn.take(rng.permutation(np.concatenate(kept)))
    return found


def ssim(bench: Bench) -> Measured:
    """SSIM to the nearest real slice, and between two slices of a class."""
    rng = bench.rng(3)
    near, among = {}, {}
    for column, drawn in bench.drawn.items():
        chosen = rng.permutation(len(drawn))[:_NEAREST]
        near[column] = mean_cell(nearest_slices(drawn.images[chosen], bench.test.images).ssim, rng)
        among[column] = mean_cell(_between(drawn.images, drawn.labels, rng), rng)
    real: RealSlices = bench.train
    chosen = rng.permutation(len(real))[:_NEAREST]
    near[REAL] = mean_cell(nearest_slices(real.images[chosen], bench.test.images).ssim, rng)
    among[REAL] = mean_cell(_between(real.images, real.labels, rng), rng)
    row = bench.experiment.row
    return Measured(
        [
            row(
                "ssim",
                "SSIM to the nearest test slice (real training slices: what can be reached)",
                near,
                "A synthetic slice has no partner that it should equal, so SSIM depends on what it is compared with",
            ),
            row(
                "diversity",
                "SSIM between two slices of a class (far above real: too alike; 1: all one)",
                among,
            ),
        ]
    )


def _between(images: NDArray[np.float32], labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
    first = rng.integers(len(images), size=_PAIRS)
    second = np.array([rng.choice(np.flatnonzero(labels == labels[i])) for i in first])
    different = first != second
    return similarity(images[first[different]], images[second[different]]).mean(axis=1)


def discriminator(bench: Bench) -> Measured:
    """Accuracy of the sites' discriminators on test slices and on fresh synthetic ones."""
    whole, of_real, of_fake = {}, {}, {}
    for column, trained in bench.trained.items():
        if trained.plan.gan.architecture == "vae":
            continue
        rng = bench.rng(4)
        real, fake = _verdicts(bench, trained, column)
        count = min(len(real), len(fake))
        owners = np.concatenate([bench.test.owners, bench.test.owners.max() + 1 + np.arange(count)])
        right = np.concatenate([real, ~fake[:count]])
        whole[column] = share_cell(right, owners, rng)
        of_real[column], of_fake[column] = Cell(value=float(real.mean())), Cell(value=float((~fake).mean()))
    row = bench.experiment.row
    return Measured(
        [
            row("discriminator", "Accuracy of D, test slices against fresh synthetic ones", whole),
            row("discriminator-real", "... share of test slices that D takes for real", of_real),
            row("discriminator-fake", "... share of synthetic slices that D recognises", of_fake),
        ],
        notes=[
            "D's accuracy says how far D is ahead of G, not how good the pictures are: it is near 1 where G fails, and near "
            "0.5 both where G is perfect and where D has learnt nothing."
        ],
    )


@torch.no_grad()
def _verdicts(bench: Bench, trained: Trained, column: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether D takes for real (M,) the test slices, and (N,) synthetic ones; by the majority of sites."""
    plan, drawn, test = trained.plan, bench.drawn[column], bench.test
    slices = plan.image.slices
    places = np.tile(np.arange(slices), len(test) // slices)
    real = _channels(test.images, test.masks)
    # The mask channel of a synthetic slice is shown as it was drawn: a clean one would give it away, or hide it.
    votes = []
    for state in trained.companions.values():
        model = make_discriminator(plan)
        model.load_state_dict(state)
        model.eval()
        both = []
        for images, labels, where in (
            (real, test.labels, places),
            (torch.from_numpy(drawn.channels) * 2 - 1, drawn.labels, drawn.places),
        ):
            rows = torch.arange(len(labels)).split(128)
            codes = code(plan, torch.from_numpy(labels), torch.from_numpy(where))
            both.append(torch.cat([taken_for_real(plan.gan.loss, model(images[r], codes[r])) for r in rows]).float())
        votes.append(both)
    return tuple(torch.stack([vote[i] for vote in votes]).mean(0).numpy() > 0.5 for i in (0, 1))  # type: ignore[return-value]


def _channels(images: NDArray[np.float32], masks: NDArray[np.bool_]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([images, masks[:, None].astype(np.float32)], axis=1)) * 2 - 1


def losses(bench: Bench) -> Measured:
    """Curves of what the sites report: the generator's loss, and D's mean score of synthetic slices."""
    curves = []
    for quantity, title, label in (
        ("generator_loss", "Loss of the generator", "loss"),
        ("fake_score", "Score that D gives synthetic slices", "score"),
    ):
        lines = []
        for column, trained in bench.trained.items():
            values = trained.history.get(quantity, [])
            if values:
                lines.append(Line(name=column, x=[float(i + 1) for i in range(len(values))], y=values))
        if lines:
            curves.append(Curves(title=title, x_label="round", y_label=label, lines=lines))
    return Measured(curves=curves)
