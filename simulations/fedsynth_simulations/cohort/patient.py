"""A whole patient: anatomy, tumour and expression drawn once, then scanned on any grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth_simulations.cohort.anatomy import DETAIL, FLUID, GREY, WHITE, Anatomy
from fedsynth_simulations.cohort.expression import draw_tpm
from fedsynth_simulations.cohort.fields import sample_field, smooth_field
from fedsynth_simulations.cohort.grid import Grid, axial_grid, tilt
from fedsynth_simulations.cohort.latents import Latents, draw_latents
from fedsynth_simulations.cohort.style import Signal, Style, draw_signal
from fedsynth_simulations.cohort.tumour import (
    LATTICE_MM,
    Margins,
    Orders,
    Tumour,
    draw_shape,
    is_brain,
    label_map,
    margins,
    orders,
    wish_for,
    with_levels,
)

# Half widths of the transitions: the ring is sharp, oedema fades.
_RIM_MM, _FRINGE_MM = 1.1, 3.0


@dataclass(frozen=True)
class Head:
    """One person's head with a tumour, in millimetres and without a grid.

    Attributes:
        to_atlas: (3, 4) affine from the patient to the atlas, mm.
        fields: (6, Z, Y, X) smooth fields over the head: displacement x, y, z in mm, then three of unit variance for
            the tumour.
        tumour: the tumour.
    """

    to_atlas: NDArray[np.float32]
    fields: NDArray[np.float32]
    tumour: Tumour


@dataclass(frozen=True)
class Acquisition:
    """The scanner's part of one patient's session.

    Attributes:
        signals: contrast of each sequence.
        shading: (C, Z, Y, X) logarithm of the receive field, one a sequence.
        noise: standard deviation of the complex noise.
    """

    signals: dict[str, Signal]
    shading: NDArray[np.float32]
    noise: float

    def only(self, *names: str) -> Acquisition:
        """The acquisition of the sequences `names` alone."""
        rows = [list(self.signals).index(name) for name in names]
        return Acquisition({name: self.signals[name] for name in names}, self.shading[rows], self.noise)


@dataclass(frozen=True)
class Subject:
    """One simulated patient before any scan.

    Attributes:
        latents: ground truth.
        tpm: (G,) expression of `expression.biology().genes`.
        label: grade, ``"low"`` or ``"high"``.
        head: anatomy and tumour.
        acquisition: how the site's scanner sees them.
    """

    latents: Latents
    tpm: NDArray[np.float64]
    label: str
    head: Head
    acquisition: Acquisition


@dataclass(frozen=True)
class SimulatedPatient:
    """A patient and a scan of all sequences on one grid.

    Attributes:
        subject: genes, label, ground truth.
        images: sequence -> (S, H, W) float32, not negative, white matter on T1 about 1.
        mask: (S, H, W) uint8, codes of `fedsynth.morphology`.
        grid: where the voxels lie.
    """

    subject: Subject
    images: dict[str, NDArray[np.float32]]
    mask: NDArray[np.uint8]
    grid: Grid


def draw_patient(
    anatomy: Anatomy,
    style: Style,
    rng: np.random.Generator,
    grid: Grid,
    severity: float = 0.0,
    batch_effect: NDArray[np.float64] | float = 0.0,
) -> SimulatedPatient:
    """Draw one patient of a site, see `draw_subject`, and scan every sequence of its style on `grid`."""
    subject = draw_subject(anatomy, style, rng, severity, batch_effect)
    images, mask = scan(anatomy, subject.head, subject.acquisition, grid, rng)
    return SimulatedPatient(subject, images, mask, grid)


def draw_subject(
    anatomy: Anatomy,
    style: Style,
    rng: np.random.Generator,
    severity: float = 0.0,
    batch_effect: NDArray[np.float64] | float = 0.0,
) -> Subject:
    """Draw one patient of a site.

    Args:
        anatomy: the atlas.
        style: the site's scanner.
        rng: source of everything about this patient.
        severity: mean malignancy of the site's patients, in standard deviations.
        batch_effect: of the site's laboratory, see `expression.draw_batch_effect`.
    """
    latents = draw_latents(rng, severity)
    tpm = draw_tpm(latents.pathways, batch_effect, rng)
    head = draw_head(anatomy, style, latents.drivers, rng)
    return Subject(latents, tpm, latents.label, head, draw_acquisition(style, rng))


def draw_head(anatomy: Anatomy, style: Style, drivers: dict[str, float], rng: np.random.Generator) -> Head:
    """Draw a head and put a tumour into it.

    Args:
        anatomy: the atlas.
        style: for how much people differ.
        drivers: standard normal value of each of `latents.DRIVERS`.
        rng: source of anatomy and of the tumour's shape.
    """
    turn = tilt(rng.normal(0, 2.5), 0) @ tilt(rng.normal(0, 2.0), 1) @ tilt(rng.normal(0, 2.5), 2)
    linear = turn / rng.uniform(*style.size, size=3)
    to_atlas = np.concatenate([linear, rng.normal(0, 1.5, (3, 1))], axis=1).astype(np.float32)
    warp = smooth_field(rng, 80.0, channels=3) * np.float32(rng.uniform(*style.warp_mm))
    rough = smooth_field(rng, 36.0, channels=3)
    fields = np.concatenate([warp, rough])

    wish = wish_for(drivers, anatomy, rng)
    middle = np.linalg.solve(linear, wish.middle_mm - to_atlas[:, 3]).astype(np.float32)
    shape = draw_shape(wish.volume_ml, rng)
    side = 1.0 if wish.middle_mm[0] > 0 else -1.0
    tumour = Tumour(wish, middle, shape, side, (0.0, 0.0, 0.0))

    lattice = axial_grid(51, 61, LATTICE_MM, LATTICE_MM)
    points = lattice.points_mm()
    # No part of a tumour lies farther out than this, so the rest of the lattice need not be ordered.
    near = ((points - middle) ** 2).sum(axis=1) < (2.2 * tumour.radius_mm + 8.0) ** 2
    tissue, ordered, _ = _look(anatomy, Head(to_atlas, fields, tumour), points[near])
    return Head(to_atlas, fields, with_levels(tumour, ordered, is_brain(tissue), lattice.voxel_ml))


def draw_acquisition(style: Style, rng: np.random.Generator) -> Acquisition:
    """Draw the contrasts, shading and noise of one patient's session."""
    signals = {name: draw_signal(contrast, rng) for name, contrast in style.contrasts.items()}
    shading = smooth_field(rng, 220.0, channels=len(signals)) * np.float32(rng.uniform(*style.shading))
    return Acquisition(signals, shading, rng.uniform(*style.noise))


def scan(
    anatomy: Anatomy, head: Head, acquisition: Acquisition, grid: Grid, rng: np.random.Generator
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.uint8]]:
    """Scan all sequences of an acquisition on one grid.

    Args:
        anatomy: the atlas.
        head: whom to scan.
        acquisition: contrasts, shading and noise.
        grid: of the scan; two grids show the same head in the same place.
        rng: source of the noise.

    Returns:
        images (sequence -> (S, H, W) float32), mask (S, H, W) uint8.
    """
    points = grid.points_mm()
    tissue, ordered, texture = _look(anatomy, head, points)
    parts = margins(head.tumour, ordered)
    brain = is_brain(tissue)
    shading = np.exp(sample_field(acquisition.shading, points))
    images = {}
    for (name, signal), field in zip(acquisition.signals.items(), shading, strict=True):
        clean = _paint(signal, head.tumour, tissue, parts, brain, texture) * field
        noise = np.float32(acquisition.noise) * rng.standard_normal((2, clean.size), dtype=np.float32)
        images[name] = np.hypot(clean + noise[0], noise[1]).reshape(grid.shape)
    return images, label_map(parts, brain).reshape(grid.shape)


def _look(
    anatomy: Anatomy, head: Head, points: NDArray[np.float32]
) -> tuple[NDArray[np.float32], Orders, NDArray[np.float32]]:
    """Tissue (6, N), the tumour's three orders and its texture (N,) at places of the patient."""
    fields = sample_field(head.fields, points)
    offsets = points - head.tumour.middle_mm
    # Mass effect: tissue that the core displaced is found farther out.
    reach = np.float32(1.6 * head.tumour.radius_mm)
    push = np.float32(0.22) * np.exp(-(offsets**2).sum(axis=1) / reach**2)
    in_atlas = (points - offsets * push[:, None]) @ head.to_atlas[:, :3].T + head.to_atlas[:, 3] + fields[:3].T
    tissue = anatomy.at(in_atlas)
    return tissue, orders(head.tumour, offsets, tissue, in_atlas[:, 0], fields[3:]), fields[5]


def _paint(
    signal: Signal,
    tumour: Tumour,
    tissue: NDArray[np.float32],
    parts: Margins,
    brain: NDArray[np.bool_],
    texture: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Signal (N,) without shading and noise: tissue, then oedema, ring and necrosis over it with soft boundaries."""
    healthy = (
        signal.white * tissue[WHITE]
        + signal.grey * tissue[GREY]
        + signal.fluid * tissue[FLUID]
        + signal.detail * tissue[DETAIL]
    )
    image = np.maximum(healthy, 0)
    # Fluid stays fluid where oedema surrounds it, and a trace of the tissue shows through.
    wet = _soft(parts.whole, _FRINGE_MM) * brain * (0.82 + 0.08 * texture) * (1 - tissue[FLUID])
    oedema = signal.oedema * tumour.wish.wetness**signal.water * (1 + 0.06 * texture)
    image = image + wet * (oedema - image)
    ring = _soft(parts.core, _RIM_MM) * brain
    bright = tumour.wish.brightness**signal.uptake
    image = image + ring * (signal.enhancing * bright * (1 + 0.1 * texture) - image)
    dead = _soft(parts.necrosis, _RIM_MM) * brain
    return np.asarray(image + dead * (signal.necrosis * (1 + 0.08 * texture) - image), dtype=np.float32)


def _soft(margin_mm: NDArray[np.float32], half_width_mm: float) -> NDArray[np.float32]:
    """From 0 far outside to 1 far inside."""
    return 1 / (1 + np.exp(-np.clip(margin_mm / np.float32(0.5 * half_width_mm), -30, 30)))
