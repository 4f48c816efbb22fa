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
from fedsynth.metrics.roc_auc import roc_auc
from fedsynth.metrics.ssim_diversity import similarity
from fedsynth.models.images import make_discriminator
from fedsynth_simulations.experiments.bench import (
    REAL,
    Bench,
    Measured,
    RealSlices,
    mean_cell,
    share_cell,
    with_interval,
)
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
        # Test slices lie in the order of their classes: a part of them has to be drawn.
        chosen = np.sort(bench.rng(13).permutation(len(test))[:count])
        reals, fakes = test[chosen], features[:count]
        few = count <= _FEW
        value = frechet_distance(reals, fakes, few)
        folds = frechet_folds(reals, fakes, bench.test.owners[chosen], owners[:count], few)
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
    """The sites' discriminators on test slices and on fresh synthetic ones: accuracy, and area under the curve."""
    whole, area, of_real, of_fake = {}, {}, {}, {}
    for column, trained in bench.trained.items():
        if trained.plan.gan.architecture == "vae":
            continue
        loss = trained.plan.gan.loss
        real, fake = _scores(bench, trained, bench.drawn[column])
        count = min(len(real), len(fake))
        scores = np.concatenate([real, fake[:count]])
        truth = np.arange(len(scores)) < len(real)
        owners = np.concatenate([bench.test.owners, bench.test.owners.max() + 1 + np.arange(count)])
        taken = taken_for_real(loss, torch.from_numpy(scores)).numpy()
        whole[column] = share_cell(taken == truth, owners, bench.rng(4))
        area[column] = _area(scores, truth, owners, bench)
        of_real[column] = Cell(value=float(taken[truth].mean()))
        of_fake[column] = Cell(value=float((~taken[~truth]).mean()))
    row = bench.experiment.row
    arbitrary = "A Wasserstein score has no natural threshold (0 is taken), so its accuracy means little"
    return Measured(
        [
            row("discriminator", "Accuracy of D, test slices against fresh synthetic ones", whole, arbitrary),
            row("discriminator-area", "... area under its ROC curve (needs no threshold)", area),
            row("discriminator-real", "... share of test slices that D takes for real", of_real),
            row("discriminator-fake", "... share of synthetic slices that D recognises", of_fake),
        ],
        notes=[
            "D's accuracy says how far D is ahead of G, not how good the pictures are: it is near 1 where G fails, and near "
            "0.5 both where G is perfect and where D has learnt nothing."
        ],
    )


def _area(scores: NDArray[np.float64], truth: NDArray[np.bool_], owners: NDArray[np.int64], bench: Bench) -> Cell:
    return with_interval(lambda rows: roc_auc(scores[rows], truth[rows]), owners, bench.rng(4))


@torch.no_grad()
def _scores(bench: Bench, trained: Trained, drawn: Drawn) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """D's scores (M,) of the test slices, and (N,) of synthetic ones; means over sites."""
    plan, test = trained.plan, bench.test
    places = np.tile(np.arange(plan.image.slices), len(test) // plan.image.slices)
    # The mask channel of a synthetic slice is shown as it was drawn: a clean one would give it away, or hide it.
    made = torch.from_numpy(drawn.channels) * 2 - 1
    by_site = []
    for state in trained.companions.values():
        model = make_discriminator(plan)
        model.load_state_dict(state)
        model.eval()
        both = []
        for images, labels, where in (
            (_channels(test.images, test.masks), test.labels, places),
            (made, drawn.labels, drawn.places),
        ):
            codes = code(plan, torch.from_numpy(labels), torch.from_numpy(where))
            both.append(torch.cat([model(images[r], codes[r]) for r in torch.arange(len(labels)).split(128)]))
        by_site.append(both)
    real, fake = (torch.stack([both[i] for both in by_site]).double().mean(0).numpy() for i in (0, 1))
    return real, fake


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
