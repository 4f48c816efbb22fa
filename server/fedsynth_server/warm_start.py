"""Public weights that generator and discriminator may start from, with their provenance."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedsynth.errors import UsageError
from fedsynth.files import write_atomic
from fedsynth.plan import WarmStart
from fedsynth.records import State, state_digest


def save_warm_start(path: Path, generator: State, discriminator: State, provenance: dict[str, str]) -> None:
    """Write both networks as one safetensors file in float16 (half the size; the plan's digests are of what is read)."""
    tensors = {f"generator/{k}": v.half() for k, v in generator.items()}
    tensors |= {f"discriminator/{k}": v.half() for k, v in discriminator.items()}
    write_atomic(path, save(tensors, {"provenance": json.dumps(provenance, sort_keys=True)}))


def load_warm_start(path: Path) -> tuple[dict[str, State], WarmStart]:
    """Read weights (as float32) and what a plan says of them.

    Raises:
        UsageError: ``warm_start_unreadable``.
    """
    weights: dict[str, State] = {"generator": {}, "discriminator": {}}
    try:
        with safe_open(path, framework="pt") as file:
            provenance = json.loads(file.metadata()["provenance"])
            for full_name in file.keys():  # noqa: SIM118 (not a mapping)
                name, _, key = full_name.partition("/")
                weights[name][key] = file.get_tensor(full_name).to(torch.float32)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            "warm_start_unreadable", f"{path} does not hold a warm start with provenance ({type(error).__name__})."
        ) from None
    return weights, WarmStart(
        generator_sha256=state_digest(weights["generator"]),
        discriminator_sha256=state_digest(weights["discriminator"]),
        provenance="; ".join(f"{key}: {value}" for key, value in sorted(provenance.items())),
    )
