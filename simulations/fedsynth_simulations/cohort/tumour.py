"""The tumour: where it lies, how large its parts are, and which place belongs to which part.

Three functions of place order the tissue: by how early oedema reaches it, by how deep it lies in the core, and by how
early it dies. A part is what lies below a level, and the levels are chosen so that the parts have the volumes that the
drivers ask for: volume and composition are exact whatever the anatomy around.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from fedsynth.morphology import BACKGROUND, ENHANCING, NECROSIS, OEDEMA
from fedsynth_simulations.cohort.anatomy import FLUID, FLUID_SOFT, GREY, WHITE, WHITE_SOFT, Anatomy

LATTICE_MM = 3.0  # on which the levels are chosen
# (N,) each: when oedema, the core and necrosis reach a place.
Orders = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]

_LARGEST_CORE = 0.9  # share of the whole: some oedema is always left
_FLUID_DELAY, _FALX_DELAY = 0.9, 1.2


@dataclass(frozen=True)
class TumourWish:
    """What the drivers ask for.

    Attributes:
        volume_ml: the whole tumour, oedema included.
        enhancing: share of the volume that enhances.
        necrotic: share of the volume that is necrotic.
        middle_mm: (3,) place of the middle in the atlas, one of `Anatomy.tumour_sites_mm`.
        irregularity: standard deviation of the boundary, in radii.
        brightness: how strongly the ring enhances, about 1.
        wetness: how much water oedema holds, about 1; bright on FLAIR, dark on T1.
    """

    volume_ml: float
    enhancing: float
    necrotic: float
    middle_mm: NDArray[np.float32]
    irregularity: float
    brightness: float
    wetness: float


@dataclass(frozen=True)
class Tumour:
    """A wish made concrete in one patient's anatomy.

    Attributes:
        wish: what was asked for.
        middle_mm: (3,) middle in the patient.
        shape: (3, 3) maps an offset in mm to one in radii of the volume-equivalent ball.
        side: +1 when the tumour lies left, -1 when right.
        levels: of the whole tumour, the core and necrosis.
    """

    wish: TumourWish
    middle_mm: NDArray[np.float32]
    shape: NDArray[np.float32]
    side: float
    levels: tuple[float, float, float]

    @property
    def radius_mm(self) -> float:
        """Radius of the ball of the same volume."""
        return radius_mm(self.wish.volume_ml)


@dataclass(frozen=True)
class Margins:
    """Signed distance (N,) in mm, roughly, to the boundary of each part; positive inside. Parts are nested."""

    whole: NDArray[np.float32]
    core: NDArray[np.float32]
    necrosis: NDArray[np.float32]


def radius_mm(volume_ml: float) -> float:
    """Radius of the ball of a volume."""
    return float((volume_ml * 1000.0 * 3 / (4 * np.pi)) ** (1 / 3))


def wish_for(drivers: dict[str, float], anatomy: Anatomy, rng: np.random.Generator) -> TumourWish:
    """Turn standard normal drivers (`latents.DRIVERS`) into a wish; all ranges are those of adult gliomas."""
    enhancement, oedema = drivers["enhancement"], drivers["oedema"]
    enhancing = 0.62 * float(expit(-0.9 + 1.3 * enhancement - 0.3 * oedema))
    # Small cores do not outgrow their supply: no necrosis without a sizeable ring.
    of_core = 0.55 * float(expit(0.9 * drivers["necrosis"] + 0.5 * enhancement)) * enhancing**2 / (enhancing**2 + 0.01)
    # The place that is asked for, in the box of the possible ones, then the possible one that is nearest to it.
    sites = anatomy.tumour_sites_mm
    asked = np.array([drivers["left"] * 34.0, 2.0 + drivers["posterior"] * 32.0, 18.0 + drivers["superior"] * 18.0])
    nearest = int(np.argmin(((sites - asked) ** 2).sum(axis=1)))
    necrotic = min(enhancing * of_core / (1 - of_core), _LARGEST_CORE - enhancing)
    return TumourWish(
        volume_ml=float(np.clip(np.exp(np.log(42.0) + 0.75 * drivers["volume"]), 4.0, 160.0)),
        enhancing=enhancing,
        necrotic=necrotic,
        middle_mm=sites[nearest],
        irregularity=float(0.16 + 0.05 * np.clip(drivers["irregularity"], -2, 2)),
        brightness=float(np.clip(1.0 + 0.16 * enhancement + 0.05 * rng.standard_normal(), 0.6, 1.5)),
        wetness=float(np.clip(1.0 + 0.09 * oedema + 0.03 * rng.standard_normal(), 0.75, 1.3)),
    )


def draw_shape(volume_ml: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """A random ellipsoid of unit volume-equivalent radius: (3, 3) from mm to radii."""
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    axes = np.exp(rng.normal(0.0, 0.16, 3))
    axes /= np.prod(axes) ** (1 / 3)
    return (np.diag(1 / axes) @ rotation / radius_mm(volume_ml)).astype(np.float32)


def orders(
    tumour: Tumour,
    offsets_mm: NDArray[np.float32],
    tissue: NDArray[np.float32],
    across_mm: NDArray[np.float32],
    rough: NDArray[np.float32],
) -> Orders:
    """The three functions of place: when oedema, core and necrosis reach it.

    Args:
        tumour: its levels are not used.
        offsets_mm: (N, 3) from the tumour's middle.
        tissue: (6, N) channels of the atlas at these places.
        across_mm: (N,) left coordinate in the atlas; the falx and tentorium keep oedema on its side.
        rough: (3, N) smooth fields of unit variance.
    """
    rho = np.linalg.norm(offsets_mm @ tumour.shape.T, axis=1)
    irregularity = tumour.wish.irregularity
    fluid = tissue[FLUID_SOFT]
    beyond = expit(-tumour.side * across_mm / 3.0) * (1 - 0.5 * tissue[WHITE_SOFT])
    delay = _FLUID_DELAY * fluid + _FALX_DELAY * beyond
    # Oedema runs along white matter and spares cortex.
    whole = rho / (0.72 + 0.45 * tissue[WHITE_SOFT]) + irregularity * 1.2 * rough[0] + delay
    core = rho + irregularity * rough[1] + 0.5 * delay
    necrosis = rho + irregularity * (0.6 * rough[1] + 0.8 * rough[2])
    return whole, core, necrosis


def with_levels(
    tumour: Tumour,
    ordered: Orders,
    brain: NDArray[np.bool_],
    voxel_ml: float,
) -> Tumour:
    """Choose the levels on sample places, so that the parts have the volumes that were asked for.

    Args:
        tumour: its levels are replaced.
        ordered: the three functions at the sample places, from `orders`.
        brain: (N,) which of them lie in the brain.
        voxel_ml: volume that a sample place stands for.
    """
    wish = tumour.wish
    whole, core, necrosis = (order[brain] for order in ordered)
    whole_level = _level(whole, round(wish.volume_ml / voxel_ml))
    in_whole = whole < whole_level
    core_level = _level(core[in_whole], round((wish.enhancing + wish.necrotic) * in_whole.sum()))
    in_core = in_whole & (core < core_level)
    necrosis_level = _level(necrosis[in_core], round(wish.necrotic * in_whole.sum()))
    return Tumour(wish, tumour.middle_mm, tumour.shape, tumour.side, (whole_level, core_level, necrosis_level))


def margins(
    tumour: Tumour,
    ordered: Orders,
) -> Margins:
    """Distances to the boundaries of the parts; a part ends where the part around it ends."""
    whole, core, necrosis = (
        (np.float32(level) - order) * np.float32(tumour.radius_mm)
        for level, order in zip(tumour.levels, ordered, strict=True)
    )
    core = np.minimum(core, whole)
    return Margins(whole, core, np.minimum(necrosis, core))


def label_map(parts: Margins, brain: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Codes of `fedsynth.morphology` (N,): necrosis, enhancing ring, and oedema around them; inside the brain only."""
    labels = np.where(parts.whole > 0, OEDEMA, BACKGROUND)
    labels = np.where(parts.core > 0, ENHANCING, labels)
    labels = np.where(parts.necrosis > 0, NECROSIS, labels)
    return np.where(brain, labels, BACKGROUND).astype(np.uint8)


def is_brain(tissue: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(N,) where tissue and fluid together fill more than half of the place."""
    return (tissue[GREY] + tissue[WHITE] + tissue[FLUID]) > 0.5


def _level(values: NDArray[np.float32], count: int) -> float:
    """The level below which `count` of the values lie."""
    if count <= 0 or values.size == 0:
        return -np.inf
    if count >= values.size:
        return float(values.max()) + 1e-6
    return float(np.partition(values, count)[count])
