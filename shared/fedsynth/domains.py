"""The two domains of a plan's translation: which slices of a patient belong to which, and drawing some of them.

Of ``"sequences"`` every slice of one sequence is of one domain, every slice of the other sequence of the other. Of
``"tumour"`` a slice, with all its sequences, is of the domain without or with tumour as its mask says; a patient may lack
one of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsynth.plan import StudyPlan, TranslationPlan


@dataclass(frozen=True)
class Domain:
    """The slices of one domain, one row a patient.

    Attributes:
        slices: (N, C, S, H, W) in [-1, 1], views of the patients' images.
        member: (N, S) which slices are of the domain.
    """

    slices: Tensor
    member: Tensor


@dataclass(frozen=True)
class DrawnSlices:
    """Slices drawn from a domain, k a patient; their pixels are gathered when they are asked for.

    Attributes:
        domain: from which.
        rows: (P,) patients.
        places: (P, k) which of a patient's slices; of no meaning for a patient who has none of the domain.
        present: (P,) whether the patient has any.
    """

    domain: Domain
    rows: Tensor
    places: Tensor
    present: Tensor

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Slices (n, k, C, H, W) float32 and whether they are there (n, k), 1 or 0, of the patients at `positions` (n,).

        A patient who has none of the domain gets zeros.
        """
        there = self.present[positions, None].expand(-1, self.places.shape[1]).float()
        slices = self.domain.slices[self.rows[positions, None], :, self.places[positions]].float()
        return slices * there[:, :, None, None, None], there


def section_of(plan: StudyPlan) -> TranslationPlan:
    """The plan's section on translation.

    Raises:
        ValueError: the plan has none.
    """
    if plan.translation is None:
        raise ValueError("the plan has no section translation")
    return plan.translation


def sequence_channels(plan: StudyPlan) -> tuple[int, int]:
    """Channels of source and target of a plan that translates between sequences.

    Raises:
        ValueError: it translates nothing, or between other domains.
    """
    section, names = section_of(plan), plan.image.sequences
    if section.domains != "sequences":
        raise ValueError(f"the domains {section.domains} are no sequences")
    return names.index(section.source), names.index(section.target)


def source_and_target(plan: StudyPlan, slices: Tensor) -> tuple[Domain, Domain]:
    """The two domains of patients' `slices` (N, C + 1, S, H, W) in [-1, 1]: image channels and mask channel.

    Raises:
        ValueError: the plan has no section translation.
    """
    if section_of(plan).domains == "sequences":
        every = torch.ones(slices.shape[0], slices.shape[2], dtype=torch.bool)
        source, target = sequence_channels(plan)
        return Domain(slices[:, source : source + 1], every), Domain(slices[:, target : target + 1], every)
    with_tumour = (slices[:, -1] > 0).flatten(2).any(dim=2)
    return Domain(slices[:, :-1], ~with_tumour), Domain(slices[:, :-1], with_tumour)


def draw_slices(domain: Domain, rows: Tensor, count: int, generator: torch.Generator) -> DrawnSlices:
    """Draw `count` slices, each uniformly among those of the domain, for each patient of `rows` (P,)."""
    upto = domain.member[rows].long().cumsum(dim=1)
    many = upto[:, -1:]
    # The place of a slice among those of the domain, then its place in the volume.
    drawn = (torch.rand(len(rows), count, generator=generator) * many).long()
    rank = torch.minimum(drawn, (many - 1).clamp(min=0))  # a product with a number just below 1 may round up
    places = (upto[:, None, :] <= rank[:, :, None]).sum(dim=2).clamp(max=domain.member.shape[1] - 1)
    return DrawnSlices(domain, rows, places, many[:, 0] > 0)
