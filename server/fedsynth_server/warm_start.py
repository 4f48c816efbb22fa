"""Public weights that a study starts from or describes patients with, in one file with their provenance."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedsynth.errors import UsageError
from fedsynth.files import write_atomic
from fedsynth.plan import PublicWeights, WarmStart
from fedsynth.recommend import PublicStarts
from fedsynth.records import PUBLIC, State, state_digest


def save_warm_start(path: Path, weights: dict[str, State], provenance: dict[str, str]) -> None:
    """Write state dicts by name as one safetensors file.

    Args:
        path: the file.
        weights: ``generator``, ``discriminator`` and, where there are any, ``autoencoder``, ``moments_public`` and
            ``embedding_public``. They are stored as float16: half the size, and a plan's digests are of what is read.
        provenance: how they were made and from what public data.
    """
    tensors = {f"{name}/{key}": tensor.half() for name, state in weights.items() for key, tensor in state.items()}
    write_atomic(path, save(tensors, {"provenance": json.dumps(provenance, sort_keys=True)}))


def load_warm_start(path: Path) -> tuple[dict[str, State], WarmStart]:
    """Read weights (as float32) by name, and what a plan says of generator and discriminator.

    Raises:
        UsageError: ``warm_start_unreadable``.
    """
    weights: dict[str, State] = {"generator": {}, "discriminator": {}}
    try:
        with safe_open(path, framework="pt") as file:
            provenance = json.loads(file.metadata()["provenance"])
            for full_name in file.keys():  # noqa: SIM118 (not a mapping)
                name, _, key = full_name.partition("/")
                weights.setdefault(name, {})[key] = file.get_tensor(full_name).to(torch.float32)
        if not all(weights.values()):
            raise KeyError("generator and discriminator")
        start = WarmStart(
            generator_sha256=state_digest(weights["generator"]),
            discriminator_sha256=state_digest(weights["discriminator"]),
            provenance="; ".join(f"{key}: {value}" for key, value in sorted(provenance.items())),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            "warm_start_unreadable",
            f"{path} does not hold generator, discriminator and provenance ({type(error).__name__}).",
        ) from None
    return weights, start


def public_starts(weights: dict[str, State], start: WarmStart) -> PublicStarts:
    """What a plan can say of all the weights that `load_warm_start` read."""

    def named(name: str) -> PublicWeights | None:
        if name not in weights:
            return None
        return PublicWeights(sha256=state_digest(weights[name]), provenance=start.provenance)

    return PublicStarts(start, named("autoencoder"), named(PUBLIC["moments"]), named(PUBLIC["embedding"]))
