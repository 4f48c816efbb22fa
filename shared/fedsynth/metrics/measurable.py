"""The one way in which a metric says that it has no value."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class NotMeasurable(ValueError):
    """A metric has no value on this input; the message is a clause that a reader of the report understands."""


def require_rows(what: str, values: NDArray[np.generic], at_least: int) -> None:
    """Raise `NotMeasurable` unless `values` has `at_least` rows of `what`."""
    if len(values) < at_least:
        raise NotMeasurable(f"{len(values)} {what}, at least {at_least} are needed")


def require_finite(what: str, values: NDArray[np.floating]) -> None:
    """Raise `NotMeasurable` if `values` holds NaN or infinity."""
    if not np.isfinite(values).all():
        raise NotMeasurable(f"{what} hold values that are not finite")
