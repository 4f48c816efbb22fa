"""Reading TOML files into pydantic models, with errors that name every offending key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedsynth.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)


def load_toml(path: Path, model: type[Model], what: str) -> Model:
    """Read `path` and validate it as `model`.

    Args:
        path: a TOML file.
        model: the pydantic model to validate against.
        what: noun for messages and the prefix of error codes, e.g. ``"plan"``.

    Raises:
        UsageError: ``<what>_missing``, ``<what>_not_toml`` or ``<what>_invalid``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"{what}_missing", f"There is no {what} file at {path}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{what}_not_toml", f"{path} is not UTF-8 text.") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{what}_not_toml", f"{path} is not valid TOML: {error}.") from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors(include_url=False)
        ]
        raise UsageError(
            f"{what}_invalid",
            f"{path} is not a valid {what}: {'; '.join(faults)}.",
            "Correct the named keys; unknown keys are never ignored.",
        ) from None
