"""Stacks of PNG or JPEG slices: one folder a patient, files ``<sequence>_<index>``.

Such files hold no geometry. They are taken as axial slices in radiological display (the patient's right on the left of
the picture, anterior above) whose index grows towards the head, with the spacings that `sources.toml` states.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedsynth_client.ingest.found import MASK, MIN_SLICES, Found, PatientFiles, Source, recode_mask, relative, role
from fedsynth_client.ingest.grid import Volume
from fedsynth_client.ingest.refusals import READ_FAILURES, Reason, Refusal, Unusable
from fedsynth_client.ingest.sources import ImageSources, MaskClass

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_INDEX = re.compile(r"(\d+)$")


@dataclass(frozen=True)
class SliceStack:
    """The slices of one sequence, in the order of their index, of which the first is `first_index`."""

    where: str
    paths: tuple[Path, ...]
    first_index: int
    spacing_mm: tuple[float, float, float]

    def read(self) -> Volume:
        """Read and stack the slices; see `Source.read`."""
        return self._placed(self._stack().astype(np.float32))

    def read_mask(self, codes: Mapping[str, MaskClass]) -> Volume:
        """Read the slices as a label map; see `Source.read_mask`."""
        return self._placed(recode_mask(self._stack(), codes))

    def _placed(self, data: NDArray[np.generic]) -> Volume:
        """Slices of equal index lie at equal height, so that a mask of some slices meets its images."""
        volume = Volume.from_lps(data, self.spacing_mm)
        volume.affine[2, 3] = self.first_index * self.spacing_mm[0]
        return volume

    def _stack(self) -> NDArray[np.generic]:
        slices = [_grey(path) for path in self.paths]
        if len({data.shape for data in slices}) > 1:
            raise Unusable(Reason.MIXED_MATRIX)
        return np.stack(slices)


def find(root: Path, base: Path, images: ImageSources) -> Found:
    """Patients of a folder that holds one folder of slices a patient; the folder's name is the patient's id.

    Raises:
        ValueError: `images` states no spacings (`ImageSources` refuses such a file already).
    """
    if images.pixel_spacing_mm is None or images.slice_spacing_mm is None:
        raise ValueError("slices need pixel_spacing_mm and slice_spacing_mm")
    spacing = (images.slice_spacing_mm, images.pixel_spacing_mm, images.pixel_spacing_mm)
    found = Found()
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        stacks: dict[str, dict[int, Path]] = defaultdict(dict)
        for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES):
            try:
                serves, index = _place(path, images)
                if index in stacks[serves]:
                    raise Unusable(Reason.SEVERAL_CANDIDATES, serves)
            except Unusable as refused:
                found.refused.append(Refusal("file", relative(path, base), refused.reason, refused.detail))
                continue
            stacks[serves][index] = path
        volumes: dict[str, Source] = {}
        for serves, stack in stacks.items():
            indices = sorted(stack)
            if not indices:
                continue
            if indices[-1] - indices[0] + 1 != len(indices):
                found.refused.append(Refusal("series", relative(folder, base), Reason.INDEX_GAP, serves))
            elif len(indices) < MIN_SLICES and serves != MASK:
                found.refused.append(Refusal("series", relative(folder, base), Reason.TOO_FEW_SLICES, serves))
            else:
                paths = tuple(stack[index] for index in indices)
                volumes[serves] = SliceStack(f"{relative(folder, base)}: {serves}", paths, indices[0], spacing)
        if stacks:
            found.patients.append(PatientFiles(folder.name, relative(folder, base), volumes))
        else:
            found.refused.append(Refusal("patient", relative(folder, base), Reason.EMPTY_FOLDER))
    return found


def _place(path: Path, images: ImageSources) -> tuple[str, int]:
    serves = role(path.name, images.sequences, images.mask_patterns)
    index = _INDEX.search(path.stem)
    if serves is None or index is None:
        raise Unusable(Reason.NO_PATTERN_MATCHES)
    return serves, int(index.group(1))


def _grey(path: Path) -> NDArray[np.generic]:
    """Grey values (H, W) of a picture; colour is accepted only where its channels are equal."""
    try:
        with Image.open(path) as picture:
            data = np.asarray(picture if picture.mode != "P" else picture.convert("RGB"))
    except READ_FAILURES:
        raise Unusable(Reason.UNREADABLE, path.name) from None
    if data.ndim == 3:
        channels = data[..., :3]
        if (channels != channels[..., :1]).any():
            raise Unusable(Reason.COLOUR, path.name)
        data = channels[..., 0]
    return np.asarray(data)
