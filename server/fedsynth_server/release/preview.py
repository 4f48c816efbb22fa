"""Pictures of a release: a sheet of synthetic patients, and the same beside patients that may be shown.

Slices are drawn as the array lies: the patient's right is on the left of the picture (radiological convention).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from skimage.measure import find_contours

from fedsynth.synthetic import SyntheticPatient
from fedsynth_server.release.facts import NOT_A_PATIENT

TILE = 128
_GAP = 4
_LABEL_WIDTH = 132
_HEADER = 58
_NAME = 20  # height of the line that names the columns
_CAPTION = 72  # height of a patient's caption, which has at most four lines
_NARROW_COLUMNS, _NARROW_ROWS = 3, 4
_CONTOUR = (255, 196, 0)
_INK = (236, 236, 236)
_FAINT = (160, 160, 160)
_PAPER = (18, 18, 20)
# Where along the head the extra slices lie, as a fraction of the slices.
_LEVELS = (0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Example:
    """A patient to show: caption, images (C, S, H, W) in [0, 1] and mask (S, H, W)."""

    caption: str
    images: NDArray[np.float32]
    mask: NDArray[np.uint8]


@dataclass(frozen=True)
class ReferenceExamples:
    """Patients to show beside the synthetic ones. `source` states that nobody's privacy is at stake in showing them.

    Attributes:
        source: ``"simulated"`` patients were never people; ``"public"`` ones are published under a licence for this.
    """

    source: Literal["simulated", "public"]
    examples: tuple[Example, ...]


def example_of(patient: SyntheticPatient) -> Example:
    """A synthetic patient as an example."""
    return Example(f"{patient.participant_id}\n{patient.label}", patient.images, patient.mask)


def preview_sheet(examples: Sequence[Example], sequences: Sequence[str], title: str) -> bytes:
    """A PNG with a row for each example.

    A row shows every sequence at the slice with the most tumour, the first of them with the mask's contour, then slices
    of the last sequence from inferior to superior with the contour.
    """
    names = [f"{sequences[0]}, mask", *sequences, *(f"{sequences[-1]}, {level:.0%}" for level in _LEVELS)]
    return _sheet([(example.caption, _row(example)) for example in examples], names, title)


def comparison_sheet(
    reference: ReferenceExamples, synthetic: Sequence[Example], sequences: Sequence[str], title: str
) -> bytes:
    """A PNG with reference patients on the left and synthetic patients on the right, each at its largest tumour slice.

    A row's two patients are not a pair: they stand beside each other for the eye only.
    """
    names = [*(f"{reference.source} {name}" for name in sequences), *(f"synthetic {name}" for name in sequences)]
    rows = []
    for left, right in zip(reference.examples, synthetic, strict=False):
        tiles = [
            _tile(image, example.mask, _tumour_slice(example.mask), True)
            for example in (left, right)
            for image in example.images
        ]
        rows.append((f"{left.caption}\n|\n{right.caption}", tiles))
    return _sheet(rows, names, f"Left: {reference.source} patients. Right: synthetic patients of {title}")


def narrow_sheet(sheet: bytes) -> bytes | None:
    """The first patients of a sheet with its tiles in rows of three, for small screens; None for any other picture."""
    step = TILE + _GAP
    with Image.open(io.BytesIO(sheet)) as opened:
        columns, rest = divmod(opened.width - _LABEL_WIDTH, step)
        rows, more = divmod(opened.height - _HEADER, step)
        if rest or more or columns < 1 or rows < 1:
            return None
        wide = opened.convert("RGB")
    rows = min(rows, _NARROW_ROWS)
    columns -= columns % _NARROW_COLUMNS if columns > _NARROW_COLUMNS else 0  # whole lines
    lines = -(-columns // _NARROW_COLUMNS)
    block = _CAPTION + lines * (_NAME + step) + _GAP
    narrow = Image.new("RGB", (_NARROW_COLUMNS * step, _NAME + _GAP + rows * block), _PAPER)
    ImageDraw.Draw(narrow).text((8, 4), NOT_A_PATIENT, fill=_INK, font=ImageFont.load_default(14))
    for row in range(rows):
        top, left_out = _NAME + _GAP + row * block, _HEADER + row * step
        narrow.paste(wide.crop((0, left_out, _LABEL_WIDTH, left_out + _CAPTION)), (0, top))
        for column in range(columns):
            line, place = divmod(column, _NARROW_COLUMNS)
            x, y = place * step, top + _CAPTION + line * (_NAME + step)
            start = _LABEL_WIDTH + column * step
            narrow.paste(wide.crop((start, _HEADER - _NAME, start + step, _HEADER)), (x, y))
            narrow.paste(wide.crop((start, left_out, start + step, left_out + step)), (x, y + _NAME))
    stream = io.BytesIO()
    narrow.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _row(example: Example) -> list[Image.Image]:
    tumour = _tumour_slice(example.mask)
    levels = [round(level * (len(example.mask) - 1)) for level in _LEVELS]
    return [
        _tile(example.images[0], example.mask, tumour, True),
        *(_tile(image, example.mask, tumour, False) for image in example.images),
        *(_tile(example.images[-1], example.mask, level, True) for level in levels),
    ]


def _tumour_slice(mask: NDArray[np.uint8]) -> int:
    """The slice with the most tumour; the middle one when there is none."""
    areas = mask.sum(axis=(1, 2), dtype=np.int64)
    return int(areas.argmax()) if areas.any() else len(mask) // 2


def _tile(volume: NDArray[np.float32], mask: NDArray[np.uint8], index: int, contour: bool) -> Image.Image:
    pixels = np.rint(np.clip(volume[index], 0, 1) * 255).astype(np.uint8)
    tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC).convert("RGB")
    if contour:
        draw = ImageDraw.Draw(tile)
        scale = TILE / max(pixels.shape)
        for line in find_contours(np.pad(mask[index], 1).astype(float), 0.5):
            # Contours come as (row, column) of pixel centres, shifted by the padding.
            draw.line([((x - 0.5) * scale, (y - 0.5) * scale) for y, x in line], fill=_CONTOUR, width=1)
    return tile


def _sheet(rows: Sequence[tuple[str, list[Image.Image]]], names: Sequence[str], title: str) -> bytes:
    step = TILE + _GAP
    sheet = Image.new("RGB", (_LABEL_WIDTH + len(names) * step, _HEADER + len(rows) * step), _PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(16), ImageFont.load_default(12)
    draw.text((8, 8), title, fill=_INK, font=large)
    for column, name in enumerate(names):
        draw.text((_LABEL_WIDTH + column * step, _HEADER - 20), name, fill=_FAINT, font=small)
    for row, (caption, tiles) in enumerate(rows):
        top = _HEADER + row * step
        draw.multiline_text((8, top + 8), caption, fill=_INK, font=small)
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (_LABEL_WIDTH + column * step, top))
    stream = io.BytesIO()
    sheet.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
