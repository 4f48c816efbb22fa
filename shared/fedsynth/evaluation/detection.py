"""Can released images be told from real ones? A network and a look at the frequencies say how easily."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional

from fedsynth.evaluation.columns import Columns, figure, interval
from fedsynth.evaluation.networks import SliceClassifier, fit, predict
from fedsynth.evaluation.samples import Volumes, training_slices
from fedsynth.evaluation.values import Section
from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows
from fedsynth.metrics.roc_auc import roc_auc

MIN_PATIENTS = 8  # on each side of each split
MAX_PATIENTS = 150
MAX_SLICES = 2000  # of each side, to train on
STEPS, BATCH = 200, 64
_CHUNK = 256  # slices whose spectra, of complex numbers, are held at a time
_POWER_FLOOR = 1e-8  # of images in [0, 1]; blank planes have none

# (S, C, H, W) or (N, C, H, W) slices -> scores, higher for synthetic ones
Detector = Callable[[NDArray[np.float32]], NDArray[np.floating]]
Learner = Callable[[NDArray[np.float32], NDArray[np.float32]], Detector]


def detection(volumes: Columns[Volumes], holdout: Volumes, rng: np.random.Generator) -> Section:
    """Train detectors on one half of each column against real patients, and test them on other patients.

    Half of a column's patients are learnt from and half are tested; on the real side, the second half of the real
    training patients is learnt from and held-out patients are tested. No patient is on both sides of a split, so a
    detector cannot win by remembering patients.

    Args:
        volumes: synthetic, real training and public-only patients. The column 'real' asks the same of real patients, who
            should not be told from others: a value far from 0.5 there is what sites or chance do.
        holdout: held-out real patients.
        rng: source of all draws.
    """
    slices = volumes.real.masks.shape[1] if isinstance(volumes.real, Volumes) else 0
    notes = {
        "network": "A small convolutional network on single slices; its mean logit over the patient's slices.",
        "spectrum": "Logistic regression on the radially averaged log power spectrum of each sequence. Networks that "
        "upsample leave traces at high frequencies (Durall et al., 2020).",
    }
    figures = []
    for name, learner, metric in (
        ("network", network_detector(rng), "AUC, synthetic images told from real: network"),
        ("spectrum", _spectrum, "AUC, synthetic images told from real: frequencies"),
    ):
        scores = _scores(volumes, holdout, learner, rng)
        figures.append(
            figure(
                metric,
                "none",
                scores.map(lambda pair: _area(*pair)),
                f"{notes[name]} Tested by patient on {min(len(holdout), MAX_PATIENTS)} held-out patients and half of the "
                f"column's; {slices} slices each.",
                _interval(scores, rng),
            )
        )
    return Section(
        id="detection",
        title="Recognisability: can released images be told from real ones?",
        explanation=(
            "Detectors learn to tell the images of one half of the synthetic patients from real ones and are tested on "
            "the other half and on held-out patients. At 0.5 they guess; at 1 every image is recognised. Both ends say "
            "something: near 0.5 the images are good, and could be passed off as real; near 1 they carry traces of the "
            "generator, which a model trained on them may learn in place of anatomy, and which makes misuse easy to see. "
            "Whatever the value, released files also say in their headers that they are synthetic. A detector is as good "
            "as what it was trained on: another generator, or images that were blurred or compressed, may pass it."
        ),
        figures=figures,
    )


def _scores(
    volumes: Columns[Volumes], holdout: Volumes, learner: Learner, rng: np.random.Generator
) -> Columns[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Scores of the tested patients of each column, and of the held-out patients that they are tested against."""
    tested = _some(holdout, rng)
    real = volumes.real
    if isinstance(real, NotMeasurable):
        return Columns(NotMeasurable("no real training patients to learn from"))
    order = rng.permutation(len(real))
    column, reference = real.take(order[: len(real) // 2]), real.take(order[len(real) // 2 :])

    def of(fake: Volumes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        fake = _some(fake, rng)
        learnt, asked = fake.take(np.arange(len(fake) // 2)), fake.take(np.arange(len(fake) // 2, len(fake)))
        for what, side in (
            ("synthetic patients to learn from", learnt),
            ("real patients to learn from", reference),
            ("synthetic patients to test on", asked),
            ("held-out patients to test on", tested),
        ):
            require_rows(what, side.images, MIN_PATIENTS)
        drawn, _ = training_slices(learnt, MAX_SLICES, rng)
        others, _ = training_slices(reference, len(drawn), rng)
        images = np.concatenate([drawn, others])
        targets = np.concatenate([np.ones(len(drawn)), np.zeros(len(others))]).astype(np.float32)
        detect = learner(images, targets)
        return _by_patient(detect, asked), _by_patient(detect, tested)

    columns = Columns(volumes.synthetic, column, public_only=volumes.public_only)
    return columns.map(of)


def _some(volumes: Volumes, rng: np.random.Generator) -> Volumes:
    return volumes.take(rng.permutation(len(volumes))[:MAX_PATIENTS])


def _by_patient(detect: Detector, volumes: Volumes) -> NDArray[np.float64]:
    """(N,) mean score of each patient's slices."""
    scores = []
    for volume in volumes.images:
        slices = np.moveaxis(volume, 0, 1).astype(np.float32)
        require_finite("images", slices)
        scores.append(float(detect(np.ascontiguousarray(slices)).mean()))
    return np.array(scores)


def network_detector(rng: np.random.Generator) -> Learner:
    """How a small convolutional network learns to score slices; its weights and batches follow from `rng`."""

    def learn(images: NDArray[np.float32], targets: NDArray[np.float32]) -> Detector:
        network = fit(
            lambda: SliceClassifier(images.shape[1]),
            functional.binary_cross_entropy_with_logits,
            images,
            targets,
            rng,
            STEPS,
            BATCH,
            "Training a detector",
        )
        return lambda slices: predict(network, slices)

    return learn


def _spectrum(images: NDArray[np.float32], targets: NDArray[np.float32]) -> Detector:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
    model.fit(power_spectrum(images), targets)
    return lambda slices: model.decision_function(power_spectrum(slices))


def power_spectrum(images: NDArray[np.floating]) -> NDArray[np.float64]:
    """Radially averaged log10 power of square slices (N, C, H, H) as (N, C * (H // 2)), per cycle over the image.

    Slices are taken down to zero at their edges by a Hann window, so that edges do not look like high frequencies.
    """
    parts = [_power_spectrum(images[i : i + _CHUNK]) for i in range(0, len(images), _CHUNK)]
    return np.concatenate(parts)


def _power_spectrum(images: NDArray[np.floating]) -> NDArray[np.float64]:
    n, channels, size, _ = images.shape
    window = np.hanning(size)
    spectrum = np.abs(np.fft.fft2(images * np.outer(window, window))) ** 2 / size**2
    cycles = np.fft.fftfreq(size, d=1 / size)
    ring = np.minimum(np.hypot(*np.meshgrid(cycles, cycles)).round().astype(int), size // 2).ravel()
    flat = spectrum.reshape(n * channels, -1)
    rings = np.stack([flat[:, ring == radius].mean(axis=1) for radius in range(size // 2)], axis=1)
    return np.log10(rings + _POWER_FLOOR).reshape(n, -1)


def _area(fake: NDArray[np.float64], real: NDArray[np.float64]) -> float:
    truth = np.concatenate([np.ones(len(fake), dtype=bool), np.zeros(len(real), dtype=bool)])
    return roc_auc(np.concatenate([fake, real]), truth)


def _interval(
    scores: Columns[tuple[NDArray[np.float64], NDArray[np.float64]]], rng: np.random.Generator
) -> tuple[float, float] | None:
    """Over the tested patients of both kinds, drawn anew together."""
    if isinstance(scores.synthetic, NotMeasurable):
        return None
    fake, real = scores.synthetic
    both = np.concatenate([fake, real])
    truth = np.arange(len(both)) < len(fake)
    return interval(scores.map(lambda _: both), lambda values, rows: roc_auc(values[rows], truth[rows]), len(both), rng)
