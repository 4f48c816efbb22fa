"""What a layout found for each patient, before any voxel is read.

Every layout module (`dicom`, `nifti`, `slices`) ends in the same values: a `PatientFiles` a patient, whose sources know
how to read themselves. Reading is left for later so that it can run patient by patient, in another process if need be.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsynth.morphology import ENHANCING, NECROSIS, OEDEMA, WHOLE_TUMOUR
from fedsynth_client.ingest.grid import Volume
from fedsynth_client.ingest.refusals import Reason, Refusal, Unusable
from fedsynth_client.ingest.sources import MaskClass

MASK = "mask"
# Fewer slices are no volume of the brain: a localizer, or what is left of a series. Masks may be smaller.
MIN_SLICES = 8
MASK_VALUES: dict[MaskClass, int] = {
    "necrosis": NECROSIS,
    "oedema": OEDEMA,
    "enhancing": ENHANCING,
    "tumour": WHOLE_TUMOUR,
}


class Source(Protocol):
    """One volume on disk."""

    @property
    def where(self) -> str:
        """Its place relative to the folder of `sources.toml`."""
        ...

    def read(self) -> Volume:
        """Read it.

        Raises:
            Unusable: with the reason.
        """
        ...

    def read_mask(self, codes: Mapping[str, MaskClass]) -> Volume:
        """Read it as a uint8 label map of `fedsynth.morphology`, by the codes of `sources.toml`.

        Raises:
            Unusable: with the reason, ``UNKNOWN_MASK_CODE`` among them.
        """
        ...


@dataclass(frozen=True)
class PatientFiles:
    """The volumes that were found for one patient: study sequence, or `MASK`, to source."""

    patient_id: str
    where: str
    volumes: dict[str, Source]


@dataclass
class Found:
    """All patients of a layout, and what was refused while looking."""

    patients: list[PatientFiles] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


def relative(path: Path, base: Path) -> str:
    """`path` as seen from `base`; its bare name when it lies elsewhere."""
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.name


def matches(name: str, patterns: Sequence[str]) -> int:
    """Length, wildcards not counted, of the longest of `patterns` (fnmatch, case-insensitive) that `name` matches; or -1.

    >>> matches("T1c.nii.gz", ["t1*"]), matches("T1c.nii.gz", ["t1c*"]), matches("FLAIR.nii", ["t1*"])
    (2, 3, -1)
    """
    lengths = [
        len(pattern.replace("*", "").replace("?", ""))
        for pattern in patterns
        if fnmatch.fnmatchcase(name.casefold(), pattern.casefold())
    ]
    return max(lengths, default=-1)


def role(name: str, sequences: Mapping[str, Sequence[str]], mask_patterns: Sequence[str]) -> str | None:
    """Which sequence `name` is by its patterns, or `MASK`, or None when no pattern matches.

    The mask's patterns come first (a mask is often named after the sequence that it was drawn on); among sequences the
    most specific pattern wins, so that ``t1*`` and ``t1c*`` can stand side by side.

    Raises:
        Unusable: ``SEVERAL_SEQUENCES`` when two are equally specific.
    """
    if matches(name, mask_patterns) >= 0:
        return MASK
    scores = {sequence: matches(name, patterns) for sequence, patterns in sequences.items()}
    best = max(scores.values(), default=-1)
    if best < 0:
        return None
    winners = [sequence for sequence, score in scores.items() if score == best]
    if len(winners) > 1:
        raise Unusable(Reason.SEVERAL_SEQUENCES, " and ".join(winners))
    return winners[0]


def recode_mask(data: NDArray[np.generic], codes: Mapping[str, MaskClass]) -> NDArray[np.uint8]:
    """Label map with the study's values from one with the hospital's; 0 is background unless `codes` says otherwise.

    Raises:
        Unusable: ``UNKNOWN_MASK_CODE`` when a value occurs that has no code.
    """
    values = {float(code): MASK_VALUES[name] for code, name in codes.items() if _is_number(code)}
    result = np.zeros(data.shape, dtype=np.uint8)
    known = np.asarray(data == 0)
    for value, target in values.items():
        here = data == value
        result[here] = target
        known |= here
    if not known.all():
        raise Unusable(Reason.UNKNOWN_MASK_CODE, f"{int((~known).sum())} voxels")
    return result


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
