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
    """Slices drawn from a domain, k a patient.

    Attributes:
        slices: (P, k, C, H, W) float32 in [-1, 1]; zeros for a patient who has none of the domain.
        present: (P, k) float32, 1, or 0 for a patient who has none.
    """

    slices: Tensor
    present: Tensor


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
    # The place of a slice among those of the domain, then its place in the volume.
    many = upto[:, -1:]
    rank = torch.minimum((torch.rand(len(rows), count, generator=generator) * many).long(), (many - 1).clamp(min=0))
    places = (upto[:, None, :] <= rank[:, :, None]).sum(dim=2).clamp(max=domain.member.shape[1] - 1)
    present = (many > 0).expand(-1, count).float()
    slices = domain.slices[rows[:, None], :, places].float()
    return DrawnSlices(slices * present[:, :, None, None, None], present)
