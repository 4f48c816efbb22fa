"""Epsilons in files: JSON has no infinity, so the infinite epsilon of a study without privacy is written as ``null``.

Everywhere: in receipts as they are stored, in ``privacy.json``, in countersignatures, audits and what commands print with
``--json``. Whatever holds such a ``null`` says beside it that it is not private. A missing epsilon is no epsilon at all: the
key is always there. In TOML, which has an infinity, a plan says ``inf``; in a message it is a floating-point infinity.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer


def to_json(epsilon: float) -> float | None:
    """`epsilon` as it is written in JSON.

    >>> to_json(8.0), to_json(math.inf)
    (8.0, None)
    """
    return None if epsilon == math.inf else epsilon


def from_json(written: Any) -> Any:
    """What `to_json` wrote; anything else is left for whoever checks it."""
    return math.inf if written is None else written


def finite(value: Any) -> Any:
    """`value`, of dicts, lists, tuples, text and numbers, with ``null`` for every infinite number.

    >>> finite({"epsilon": math.inf, "steps": [1, 2.5]})
    {'epsilon': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return to_json(value) if isinstance(value, float) else value


def shown(epsilon: float, decimals: int = 3) -> str:
    """An epsilon for a person: digits, or the word.

    >>> shown(2.5), shown(math.inf)
    ('2.500', 'infinite')
    """
    return "infinite" if math.isinf(epsilon) else f"{epsilon:.{decimals}f}"


def _is_a_number(epsilon: float) -> float:
    if math.isnan(epsilon):
        raise ValueError("an epsilon is a number, or infinite")
    return epsilon


Epsilon = Annotated[
    float,
    Field(allow_inf_nan=True),
    AfterValidator(_is_a_number),
    BeforeValidator(from_json),
    PlainSerializer(to_json, return_type=float | None, when_used="json"),
]
"""A pydantic field for an epsilon: infinite where there is no privacy, never "not a number"."""
