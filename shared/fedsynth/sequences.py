"""The MR sequences that a release can name in the words of BIDS and DICOM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsynth.errors import UsageError


@dataclass(frozen=True)
class MrSequence:
    """A sequence of the plan in the vocabulary of the standards.

    Attributes:
        name: as in ``plan.image.sequences``; also the folder of the DICOM series.
        bids: BIDS entities and suffix that follow ``sub-<label>_``.
        meaning: what the image emulates.
    """

    name: str
    bids: str
    meaning: str


_KNOWN = {
    sequence.name: sequence
    for sequence in (
        MrSequence("T1", "T1w", "T1-weighted"),
        MrSequence("T1c", "ce-gadolinium_T1w", "T1-weighted after gadolinium"),
        MrSequence("T2", "T2w", "T2-weighted"),
        MrSequence("FLAIR", "FLAIR", "T2-weighted FLAIR"),
    )
}


def mr_sequences(names: Sequence[str]) -> tuple[MrSequence, ...]:
    """The sequences called `names`, in that order.

    Raises:
        UsageError: ``sequence_not_releasable``, for a name that has no agreed counterpart in BIDS.
    """
    unknown = [name for name in names if name not in _KNOWN]
    if unknown:
        raise UsageError(
            "sequence_not_releasable",
            f"No BIDS name is known for sequence {', '.join(map(repr, unknown))}.",
            f"A release can hold {', '.join(_KNOWN)}; name the plan's image.sequences so.",
        )
    return tuple(_KNOWN[name] for name in names)
