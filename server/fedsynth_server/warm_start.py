"""Public weights that a study starts from or describes patients with, in one file with their provenance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedsynth.errors import UsageError
from fedsynth.files import write_atomic
from fedsynth.plan import GenePlan, PublicWeights, StudyPlan, WarmStart
from fedsynth.recommend import PublicStarts
from fedsynth.records import PUBLIC, State, state_digest


def save_warm_start(
    path: Path,
    weights: dict[str, State],
    provenance: dict[str, str],
    made_for: StudyPlan | None = None,
) -> None:
    """Write state dicts by name as one safetensors file.

    Args:
        path: the file.
        weights: ``generator``, ``discriminator`` and, where there are any, ``autoencoder``, ``moments_public`` and
            ``embedding_public``. Networks are stored as float16, half the size, and a plan's digests are of what is read;
            scales and variances of the statistics need the range of float32.
        provenance: how they were made and from what public data.
        made_for: a plan with the genes, sequences, features and label that the weights are about; without it no plan can
            use those over genes, and the rest is taken on trust.
    """
    tensors = {
        f"{name}/{key}": (tensor.float() if name in PUBLIC.values() else tensor.half()).contiguous()
        for name, state in weights.items()
        for key, tensor in state.items()
    }
    metadata = {
        "provenance": json.dumps(provenance, sort_keys=True),
        "genes": made_for.genes.identity if made_for else "",
        "images": made_for.images_identity if made_for else "",
        "label": made_for.label_identity if made_for else "",
    }
    write_atomic(path, save(tensors, metadata))


def load_warm_start(path: Path) -> tuple[dict[str, State], WarmStart]:
    """Read weights (as float32) by name, and what a plan says of generator and discriminator.

    Raises:
        UsageError: ``warm_start_unreadable``.
    """
    weights, start, _ = _read(path)
    return weights, start


def check_made_for(path: Path, plan: StudyPlan) -> None:
    """Refuse a file whose weights were made for other genes, images or classes than those of `plan`.

    A digest says which numbers are meant, not what they are about: weights for T1, T1c, FLAIR have the shapes of those for
    T1, T2, FLAIR, and a study would spend its budget on them. What a file does not state is taken on trust.

    Raises:
        UsageError: ``warm_start_unreadable`` or ``warm_start_of_other_data``.
    """
    _, _, stated = _read(path)
    over_genes = plan.moments is not None or ("autoencoder" in plan.modules and plan.autoencoder.warm_start is not None)
    over_images = any((plan.moments, plan.embedding, plan.gan.warm_start))
    for used, key, named, what in (
        (over_genes, "genes", plan.genes.identity, "another gene panel or measure"),
        (
            over_images,
            "images",
            plan.images_identity,
            "other sequences or morphology features, or another order of them,",
        ),
        (
            any((plan.moments, plan.embedding)),
            "label",
            plan.label_identity,
            "another label, or another order of its classes,",
        ),
    ):
        if used and stated.get(key) and stated[key] != named:
            raise UsageError(
                "warm_start_of_other_data",
                f"The weights in {path} were made for {what} than the plan's.",
                "Make them anew for this plan; nothing was spent.",
            )


def public_starts(path: Path, genes: GenePlan) -> PublicStarts:
    """What a plan over `genes` can say of the weights in the file; those over other genes are left out.

    Raises:
        UsageError: ``warm_start_unreadable``.
    """
    weights, start, stated = _read(path)

    def named(name: str) -> PublicWeights | None:
        if name not in weights:
            return None
        return PublicWeights(sha256=state_digest(weights[name]), provenance=start.provenance)

    starts = PublicStarts(gan=start, embedding=named(PUBLIC["embedding"]))
    if stated.get("genes") != genes.identity:
        return starts
    return replace(starts, autoencoder=named("autoencoder"), moments=named(PUBLIC["moments"]))


def _read(path: Path) -> tuple[dict[str, State], WarmStart, dict[str, str]]:
    """Weights by name, what a plan says of the networks, and what the file states of itself."""
    weights: dict[str, State] = {"generator": {}, "discriminator": {}}
    try:
        with safe_open(path, framework="pt") as file:
            stated = dict(file.metadata())
            provenance = json.loads(stated["provenance"])
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
    return weights, start, stated
