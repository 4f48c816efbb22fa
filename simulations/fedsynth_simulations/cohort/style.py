"""How a scanner renders tissue: ranges from which each patient's contrasts, noise and shading are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Range = tuple[float, float]


@dataclass(frozen=True)
class Contrast:
    """Signal of each tissue in one sequence; white matter on T1 is about 1.

    `detail` is the share of the atlas' texture that shows. `water` and `uptake` are the powers with which oedema follows
    the tumour's wetness and the ring its brightness.
    """

    white: Range
    grey: Range
    fluid: Range
    oedema: Range
    enhancing: Range
    necrosis: Range
    detail: Range
    water: float
    uptake: float


@dataclass(frozen=True)
class Style:
    """A scanner and its protocol.

    Attributes:
        name: of the site.
        contrasts: one a sequence.
        noise: standard deviation of the complex noise (Gudbjartsson & Patz, 1995).
        shading: standard deviation of the logarithm of the receive field.
        warp_mm: standard deviation of the elastic deformation between people.
        size: factor by which heads differ from the atlas, per axis.
    """

    name: str
    contrasts: Mapping[str, Contrast]
    noise: Range = (0.012, 0.03)
    shading: Range = (0.03, 0.1)
    warp_mm: Range = (2.0, 3.5)
    size: Range = (0.93, 1.06)


@dataclass(frozen=True)
class Signal:
    """The contrast of one sequence in one patient: a value drawn from each range of `Contrast`."""

    white: float
    grey: float
    fluid: float
    oedema: float
    enhancing: float
    necrosis: float
    detail: float
    water: float
    uptake: float


def draw_signal(contrast: Contrast, rng: np.random.Generator) -> Signal:
    """Draw one patient's contrast."""
    return Signal(
        white=rng.uniform(*contrast.white),
        grey=rng.uniform(*contrast.grey),
        fluid=rng.uniform(*contrast.fluid),
        oedema=rng.uniform(*contrast.oedema),
        enhancing=rng.uniform(*contrast.enhancing),
        necrosis=rng.uniform(*contrast.necrosis),
        detail=rng.uniform(*contrast.detail),
        water=contrast.water,
        uptake=contrast.uptake,
    )


def style(name: str, grey_t1: float, fluid_flair: float, uptake: float, spread: float, **scanner: Range) -> Style:
    """A style by what tells protocols apart.

    Args:
        name: of the site.
        grey_t1: grey matter on T1 where white matter is 1; low on strongly T1-weighted protocols.
        fluid_flair: fluid on FLAIR; high where inversion nulls it badly.
        uptake: signal of the enhancing ring.
        spread: relative half width of all ranges.
        scanner: `noise`, `shading`, `warp_mm`, `size` of `Style`.
    """

    def around(value: float) -> Range:
        return value * (1 - spread), value * (1 + spread)

    def contrast(
        tissue: tuple[float, float, float], tumour: tuple[float, float, float], water: float, uptake: float
    ) -> Contrast:
        white, grey, fluid = map(around, tissue)
        oedema, enhancing, necrosis = map(around, tumour)
        return Contrast(white, grey, fluid, oedema, enhancing, necrosis, (0.6, 1.1), water, uptake)

    t1 = contrast((1.0, grey_t1, 0.28), (0.52, 0.6, 0.36), water=-0.5, uptake=0.0)
    t1c = contrast((1.0, grey_t1 * 1.06, 0.28), (0.55, uptake, 0.36), water=-0.5, uptake=1.0)
    flair = contrast((0.52, 0.66, fluid_flair), (1.12, 0.92, 0.55), water=1.0, uptake=0.0)
    return Style(name, {"T1": t1, "T1c": t1c, "FLAIR": flair}, **scanner)


# Wider than any one site, so that a generator that starts from it is at home at none and near to all.
PUBLIC_STYLE = style(
    "public",
    grey_t1=0.72,
    fluid_flair=0.16,
    uptake=1.5,
    spread=0.14,
    noise=(0.005, 0.05),
    shading=(0.0, 0.15),
    warp_mm=(1.5, 4.0),
    size=(0.9, 1.09),
)
