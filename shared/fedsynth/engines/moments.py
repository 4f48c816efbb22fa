"""What a patient adds to the private moments of genes, morphology and label.

A profile enters as its coordinates u in r public directions, morphology as m, centred and scaled by public constants.
The rows hold what a linear-Gaussian model is fitted from (`fedsynth.models.linear_gaussian`): counts, sums of u and m by
class, and the second moments u u', u m' and m m'. Released once with Gaussian noise this is the sufficient statistics
perturbation of Vu and Slavkovic (2009) and Wang (2018), for the second moments "Analyze Gauss" (Dwork et al. 2014).

Each block of a row is bounded by 1 whatever the patient, and the squared weights of the blocks add up to 1, so a row's
norm is at most 1. What a patient lacks adds nothing: every moment has a count of the patients who have what it is about,
so it is a mean over just those patients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsynth.plan import StudyPlan

State = dict[str, Tensor]

# Share of a row's squared norm that each block may have. Blocks with many weak entries, above all the link of genes and
# morphology, get more of it: the noise is the same in every entry.
_SHARES: dict[str, float] = {
    "class_counts": 0.06,
    "pair_counts": 0.02,
    "class_genes": 0.20,
    "class_morphology": 0.07,
    "genes": 0.10,
    "link": 0.48,
    "morphology": 0.07,
}
# u and m are shortened to the norm at which their squared coordinates average this much; in the public population they
# average 1. Most patients are shortened, which costs little (directions stay, and `attenuation` says by how much lengths
# shrink) and makes the row of a typical patient large beside the noise.
CLIPPED_MEAN_SQUARE = 0.6
SHAPE_POINTS = 101  # of the public quantile function of a feature
_BELOW_ONE = 1 - 1e-6  # so that rounding to float32 does not lift a norm above 1


@dataclass(frozen=True)
class Sizes:
    """K classes, r components of expression, F features of morphology."""

    classes: int
    components: int
    features: int

    @property
    def genes_radius(self) -> float:
        """Largest norm of u; a longer one is shortened to it."""
        return math.sqrt(CLIPPED_MEAN_SQUARE * self.components)

    @property
    def morphology_radius(self) -> float:
        """Largest norm of m; a longer one is shortened to it."""
        return math.sqrt(CLIPPED_MEAN_SQUARE * self.features)


@dataclass(frozen=True)
class Block:
    """A block of a row: its shape when unpacked, and by what its entries were multiplied to be bounded and weighed."""

    shape: tuple[int, ...]
    factor: float


def sizes(plan: StudyPlan) -> Sizes:
    """The sizes of the moments that `plan` asks for.

    Raises:
        ValueError: the plan has no section `moments`.
    """
    if plan.moments is None:
        raise ValueError("the plan has no section moments")
    return Sizes(len(plan.label.classes), plan.moments.components, len(plan.morphology.features))


def layout(size: Sizes) -> dict[str, Block]:
    """The blocks of a row, in order.

    ``class_counts`` (K + 1, 1 + F) counts patients by class (the last row: class unknown) who have a profile (column 0)
    and each feature; ``pair_counts`` (F,) those with a profile and the feature; ``class_genes`` (K, r) and
    ``class_morphology`` (K, F) are sums by class; ``link`` (r, F) is the sum of u m'; ``genes`` and ``morphology`` are
    the upper triangles of the sums of u u' and m m' with off-diagonal entries times sqrt 2, which makes their norm that
    of the full matrices. With F = 0 the blocks of
    features are empty.
    """
    k, r, f = size.classes, size.components, size.features
    largest_u, largest_m = size.genes_radius, size.morphology_radius
    # Entries of the first row: sqrt(2) bounds a profile's 1 and F features' 1 / sqrt(F) together.
    largest = {
        "class_counts": math.sqrt(2.0 if f else 1.0),
        "pair_counts": 1.0,
        "class_genes": largest_u,
        "class_morphology": largest_m,
        "genes": largest_u**2,
        "link": largest_u * largest_m,
        "morphology": largest_m**2,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "class_counts": (k + 1, 1 + f),
        "pair_counts": (f,),
        "class_genes": (k, r),
        "class_morphology": (k, f),
        "genes": (r * (r + 1) // 2,),
        "link": (r, f),
        "morphology": (f * (f + 1) // 2,),
    }
    # Without features, the shares of the blocks that are left add up to 1 as well.
    whole = sum(share for name, share in _SHARES.items() if math.prod(shapes[name]))
    return {
        name: Block(shape, math.sqrt(_SHARES[name] / whole) / (largest[name] or 1.0)) for name, shape in shapes.items()
    }


def row_size(plan: StudyPlan) -> int:
    """Length D of a row."""
    return sum(math.prod(block.shape) for block in layout(sizes(plan)).values())


def public_template(plan: StudyPlan) -> State:
    """Names, shapes and types of the public weights that rows are computed with; the values mean nothing.

    ``basis`` (G, r) orthonormal directions of expression on the plan's scale; ``genes_scale`` (r,) standard deviation of
    a public population along each; ``morphology_centre`` and ``morphology_scale`` (F,) mean and standard deviation of
    the normalised features in a public population, and ``morphology_shape`` (F, `SHAPE_POINTS`) their standardised
    quantile functions at probabilities (i + 1/2) / `SHAPE_POINTS`, of mean 0 and standard deviation 1.
    ``morphology_by_class`` (K, F) is the mean of the standardised features in each class of the public population: what is
    believed of the classes where the noise leaves nothing else. Rows use neither of the last two.
    """
    size, genes = sizes(plan), len(plan.genes.panel)
    return {
        "basis": torch.zeros(genes, size.components),
        "genes_scale": torch.ones(size.components),
        "morphology_centre": torch.zeros(size.features),
        "morphology_scale": torch.ones(size.features),
        "morphology_shape": torch.zeros(size.features, SHAPE_POINTS),
        "morphology_by_class": torch.zeros(size.classes, size.features),
    }


def rows(plan: StudyPlan, public: Mapping[str, Tensor], genes: Tensor, morphology: Tensor, labels: Tensor) -> Tensor:
    """One row a patient, see `rows_of_size`; `plan` says which sizes."""
    return rows_of_size(sizes(plan), public, genes, morphology, labels)


def rows_of_size(
    size: Sizes, public: Mapping[str, Tensor], genes: Tensor, morphology: Tensor, labels: Tensor
) -> Tensor:
    """One row a patient, each a function of that patient and public weights alone.

    Args:
        size: of the moments; without features, rows are about genes and label alone.
        public: as `public_template` describes.
        genes: (N, G) on the plan's scale. A row with any value that is not finite is a patient without a profile.
        morphology: (N, F) in [0, 1], not finite where not measured.
        labels: (N,) class codes, -1 where unknown.

    Returns:
        (N, D) float32 and finite, of norm at most 1 each; 0 for a patient with neither profile nor morphology.

    Raises:
        ValueError: shapes that do not belong together, or a label that is no class code.
    """
    count, panel = len(labels), len(public["basis"])
    if genes.shape != (count, panel) or morphology.shape != (count, size.features):
        raise ValueError(
            f"expected genes ({count}, {panel}) and morphology ({count}, {size.features}), "
            f"got {tuple(genes.shape)} and {tuple(morphology.shape)}"
        )
    if count and (int(labels.min()) < -1 or int(labels.max()) >= size.classes):
        raise ValueError(f"expected labels from -1 to {size.classes - 1}")
    u, has_profile = _coordinates(public, genes, size)
    m, measured = _standardised(public, morphology, size)
    one_hot = torch.nn.functional.one_hot(labels.long() % (size.classes + 1), size.classes + 1).double()
    # Python's modulo: -1, unknown, becomes the last column.
    per_feature = measured / math.sqrt(max(size.features, 1))
    present = torch.cat([has_profile[:, None], per_feature], dim=1)
    parts = {
        "class_counts": _outer(one_hot, present),
        "pair_counts": has_profile[:, None] * per_feature,
        "class_genes": _outer(one_hot[:, :-1], u),
        "class_morphology": _outer(one_hot[:, :-1], m),
        "genes": pack_symmetric(u[:, :, None] * u[:, None, :]),
        "link": _outer(u, m),
        "morphology": pack_symmetric(m[:, :, None] * m[:, None, :]),
    }
    blocks = layout(size)
    row = torch.cat([parts[name] * block.factor for name, block in blocks.items()], dim=1)
    # The blocks' bounds make this a formality; it guards against rounding.
    return (row * (_BELOW_ONE / row.norm(dim=1, keepdim=True).clamp(min=1.0))).to(torch.float32)


def unpack(size: Sizes, total: Tensor) -> dict[str, Tensor]:
    """The blocks of a sum (D,) of rows in the units of their moments (float64): plain counts, sums and second moments.

    The symmetric blocks come as full matrices.

    Raises:
        ValueError: the sum has another length.
    """
    blocks = layout(size)
    lengths = [math.prod(block.shape) for block in blocks.values()]
    if total.shape != (sum(lengths),):
        raise ValueError(f"expected a sum of length {sum(lengths)}, got shape {tuple(total.shape)}")
    found = {
        name: part.reshape(block.shape) / block.factor
        for (name, block), part in zip(blocks.items(), total.double().split(lengths), strict=True)
    }
    found["class_counts"][:, 1:] *= math.sqrt(size.features)
    found["pair_counts"] *= math.sqrt(size.features)
    return {
        **found,
        "genes": unpack_symmetric(found["genes"], size.components),
        "morphology": unpack_symmetric(found["morphology"], size.features),
    }


def noise_variances(size: Sizes, noise_sd: float) -> dict[str, Tensor]:
    """Variance of each entry of `unpack` when the sum holds Gaussian noise of standard deviation `noise_sd`."""
    blocks = layout(size)
    found = {name: torch.full(block.shape, (noise_sd / block.factor) ** 2).double() for name, block in blocks.items()}
    found["class_counts"][:, 1:] *= size.features
    found["pair_counts"] *= size.features
    for name, width in (("genes", size.components), ("morphology", size.features)):
        variance = (noise_sd / blocks[name].factor) ** 2
        found[name] = torch.full((width, width), variance / 2).double().fill_diagonal_(variance)
    return found


def pack_symmetric(matrices: Tensor) -> Tensor:
    """Upper triangles (..., r (r + 1) / 2) of symmetric matrices (..., r, r), off-diagonal entries times sqrt 2."""
    width = matrices.shape[-1]
    row, column = torch.triu_indices(width, width)
    return matrices[..., row, column] * torch.where(row == column, 1.0, math.sqrt(2.0)).to(matrices.dtype)


def unpack_symmetric(packed: Tensor, width: int) -> Tensor:
    """Inverse of `pack_symmetric`: (..., width, width)."""
    row, column = torch.triu_indices(width, width)
    values = packed / torch.where(row == column, 1.0, math.sqrt(2.0)).to(packed.dtype)
    matrices = packed.new_zeros((*packed.shape[:-1], width, width))
    matrices[..., row, column] = values
    matrices[..., column, row] = values
    return matrices


def _coordinates(public: Mapping[str, Tensor], genes: Tensor, size: Sizes) -> tuple[Tensor, Tensor]:
    """u (N, r), 0 without a profile, and whether there is one (N,)."""
    usable = torch.isfinite(genes).all(dim=1)
    values = torch.where(usable[:, None], genes, 0.0).double()
    u = values @ public["basis"].double() / public["genes_scale"].double()
    return _shortened(u, torch.tensor(size.genes_radius, dtype=torch.float64)), usable.double()


def _standardised(public: Mapping[str, Tensor], morphology: Tensor, size: Sizes) -> tuple[Tensor, Tensor]:
    """m (N, F), 0 where not measured, and whether each entry is measured (N, F)."""
    measured = torch.isfinite(morphology)
    values = torch.where(measured, morphology, 0.0).double()
    m = (values - public["morphology_centre"].double()) / public["morphology_scale"].double()
    # With fewer features the norm is smaller, and so is the bound, so that all patients are shortened alike.
    radius = (CLIPPED_MEAN_SQUARE * measured.sum(1, keepdim=True).double()).sqrt()
    return _shortened(torch.where(measured, m, 0.0), radius), measured.double()


def _shortened(vectors: Tensor, radius: Tensor) -> Tensor:
    norms = vectors.norm(dim=1, keepdim=True)
    return vectors * torch.where(norms > radius, radius / norms, 1.0)


def _outer(first: Tensor, second: Tensor) -> Tensor:
    """(N, a), (N, b) -> (N, a b)."""
    return (first[:, :, None] * second[:, None, :]).flatten(1)
