"""What fidelity asks of a feature network, and the domain network in that form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.domain_extractor import DomainExtractor, alone, extract


class FeatureNetwork(Protocol):
    """A network from slices to features that says what it is, because another network gives other numbers."""

    @property
    def name(self) -> str:
        """What it is and was trained on, with the digest of its weights: equal names give comparable numbers."""

    @property
    def num_features(self) -> int:
        """D."""

    def features(self, images: NDArray[np.float32], sequence: int | None = None) -> NDArray[np.float64]:
        """Features (N, D) of slices (N, C, H, W) in [0, 1], of all sequences together or of one alone."""


class PairDistance(Protocol):
    """A learned perceptual distance of two images, such as LPIPS (Zhang et al., CVPR 2018)."""

    @property
    def name(self) -> str:
        """What it is, with the digest of its weights."""

    def distance(self, left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
        """(N, C) distance of each sequence of slices (N, C, H, W) in [0, 1]; 0 for equal ones."""


@dataclass(frozen=True)
class DomainNetwork:
    """`DomainExtractor` as a `FeatureNetwork`."""

    extractor: DomainExtractor

    @property
    def name(self) -> str:
        """See `DomainExtractor.name`."""
        return self.extractor.name

    @property
    def num_features(self) -> int:
        """D."""
        return self.extractor.num_features

    def features(self, images: NDArray[np.float32], sequence: int | None = None) -> NDArray[np.float64]:
        """See `FeatureNetwork`: one sequence alone has the others set to zero."""
        return extract(self.extractor, images if sequence is None else alone(images, sequence))


@dataclass(frozen=True)
class Ensemble:
    """Networks whose distances are averaged, because one network's distance varies with its random start.

    Attributes:
        label: a word for the titles of figures, e.g. ``"domain"``.
        networks: at least one; the same architecture and training data from different seeds, or a single one.
        comparable: what its distances can be compared with, a sentence for the reader.
    """

    label: str
    networks: tuple[FeatureNetwork, ...]
    comparable: str

    @property
    def name(self) -> str:
        """The networks' names."""
        names = [network.name for network in self.networks]
        return names[0] if len(names) == 1 else f"mean over {len(names)} networks: " + "; ".join(names)


def domain_ensemble(extractors: tuple[DomainExtractor, ...]) -> Ensemble:
    """Domain networks of one or several seeds."""
    return Ensemble(
        "domain", tuple(DomainNetwork(extractor) for extractor in extractors), "Not comparable with published FID."
    )
