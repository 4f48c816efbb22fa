"""A study's state at the coordinator, written atomically after every round: one safetensors file, no pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedsynth.epsilons import from_json, to_json
from fedsynth.errors import JobFailed, UsageError
from fedsynth.files import DISK_FULL, write_atomic
from fedsynth.models.dcgan import initialise
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.images import make_companion, make_generator
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.plan import MODULES, Module, StatisticPlan, StudyPlan
from fedsynth.records import PUBLIC, State, state_digest
from fedsynth.translation import make_networks

FILE = "checkpoint.safetensors"

_EPSILONS = ("epsilon", "epsilon_lifetime")

CurveRow = dict[str, float | int | str]


@dataclass(frozen=True)
class Receipt:
    """A site's newest receipt of one module: what its ledger holds, as it said with its last reply.

    Both epsilons are infinite in a study without privacy; the checkpoint's JSON has ``null`` there.
    """

    head: str
    epsilon: float
    epsilon_lifetime: float
    steps: int
    private: bool
    order: int


def _written(receipt: Receipt) -> dict[str, object]:
    """`receipt` as it is written in JSON; `_receipt` reads it."""
    epsilons = {key: to_json(getattr(receipt, key)) for key in _EPSILONS}
    return {**vars(receipt), **epsilons}


def _receipt(written: dict[str, Any]) -> Receipt:
    return Receipt(**{**written, **{key: from_json(written[key]) for key in _EPSILONS}})


@dataclass(frozen=True)
class Evaluated:
    """The one round in which sites evaluated the generator on held-out patients.

    Attributes:
        receipts: of what held-out patients spent, by site.
        missing: code of why a site took no part, by site.
    """

    receipts: dict[str, Receipt]
    missing: dict[str, str]


@dataclass(frozen=True)
class StudyState:
    """Everything that a resumed coordinator needs.

    Attributes:
        study: the plan's digest.
        weights: state dicts by name: the modules' weights or noisy sums, what the server made of them (profiles,
            generator_ema), and the public weights that are sent along; of an evaluation, the ``evaluators`` and, under
            ``evaluation``, the noisy sum of each site by its name.
        rounds: completed rounds by module.
        curves: one row a site and round, by module.
        receipts: by site, then module.
        fits: what the server's fit to a statistic reports, by module; a statistic without an entry is not fitted yet.
        evaluated: the sites' evaluation; None until it is done, or where the plan has none.
    """

    study: str
    weights: dict[str, State]
    rounds: dict[Module, int] = field(default_factory=lambda: dict.fromkeys(MODULES, 0))
    curves: dict[Module, list[CurveRow]] = field(default_factory=lambda: {module: [] for module in MODULES})
    receipts: dict[str, dict[Module, Receipt]] = field(default_factory=dict)
    fits: dict[Module, dict[str, float]] = field(default_factory=dict)
    evaluated: Evaluated | None = None

    def finished(self, plan: StudyPlan) -> bool:
        """Whether nothing of `plan` is left to do. A release needs no evaluation: `missing_rounds` does not count it."""
        return not self.missing_rounds(plan) and (plan.site_evaluation is None or self.evaluated is not None)

    def newest_receipt(self, site: str) -> Receipt | None:
        """The receipt of `site` that it gave last, of whatever: its head covers all that the ledger held then."""
        own = [*self.receipts.get(site, {}).values()]
        if self.evaluated is not None and site in self.evaluated.receipts:
            own.append(self.evaluated.receipts[site])
        return max(own, key=lambda receipt: receipt.order, default=None)

    def missing_rounds(self, plan: StudyPlan) -> dict[Module, int]:
        """Rounds of `plan` that are still to be run, by module; a statistic counts until it is fitted."""
        missing = {module: plan.training(module).rounds - self.rounds[module] for module in plan.modules}
        unfitted = {module: 1 for module in plan.modules if module in PUBLIC and module not in self.fits}
        return {module: count for module, count in {**missing, **unfitted}.items() if count > 0}

    def curves_by_name(self) -> dict[str, list[CurveRow]]:
        """The curves under plain names, as a release takes them."""
        return {str(module): rows for module, rows in self.curves.items()}

    def with_weights(self, **weights: State) -> StudyState:
        """A copy with some state dicts replaced."""
        return replace(self, weights={**self.weights, **weights})


def save_state(state: StudyState, folder: Path) -> None:
    """Write the checkpoint; the one before stays until the new one is whole.

    Raises:
        JobFailed: ``disk_full``.
    """
    packed = torch.contiguous_format
    tensors = {
        f"{n}/{k}": t.clone(memory_format=packed)
        for n, state_dict in state.weights.items()
        for k, t in state_dict.items()
    }
    rest = {
        "study": state.study,
        "rounds": state.rounds,
        "curves": state.curves,
        "fits": state.fits,
        "receipts": {s: {m: _written(r) for m, r in by_module.items()} for s, by_module in state.receipts.items()},
        "evaluated": None
        if state.evaluated is None
        else {
            "receipts": {site: _written(receipt) for site, receipt in state.evaluated.receipts.items()},
            "missing": state.evaluated.missing,
        },
    }
    content = save(tensors, {"state": json.dumps(rest, sort_keys=True)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / FILE, content)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise JobFailed(
                "disk_full",
                f"The disk is full: the checkpoint in {folder} is still that of the round before.",
                "Free some space and repeat the command; the sites answer again from what they stored.",
            ) from None
        raise


def load_state(folder: Path, plan: StudyPlan) -> StudyState | None:
    """Read the checkpoint of `plan`; None when there is none.

    Raises:
        UsageError: ``checkpoint_of_other_study`` or ``checkpoint_unreadable``.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    weights: dict[str, State] = {}
    try:
        with safe_open(path, framework="pt") as file:
            rest = json.loads(file.metadata()["state"])
            for full_name in file.keys():  # noqa: SIM118 (not a mapping)
                name, _, key = full_name.partition("/")
                weights.setdefault(name, {})[key] = file.get_tensor(full_name)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            "checkpoint_unreadable",
            f"{path} is not an intact checkpoint ({type(error).__name__}).",
            "Restore it from a copy. Without one, remove it: sites send what they released before, so nothing is spent "
            "twice, but rounds that they have left behind stay out of reach.",
        ) from None
    if rest["study"] != plan.digest:
        raise UsageError(
            "checkpoint_of_other_study",
            f"{path} belongs to a study of digest {rest['study'][:12]}, not to this plan ({plan.digest[:12]}).",
            "Use another folder for another plan.",
        )
    receipts = {s: {m: _receipt(r) for m, r in by_module.items()} for s, by_module in rest["receipts"].items()}
    evaluated = None
    if rest.get("evaluated") is not None:  # a checkpoint of an earlier version has no such entry
        held_out = {site: _receipt(receipt) for site, receipt in rest["evaluated"]["receipts"].items()}
        evaluated = Evaluated(held_out, rest["evaluated"]["missing"])
    return StudyState(rest["study"], weights, rest["rounds"], rest["curves"], receipts, rest["fits"], evaluated)


def first_state(plan: StudyPlan, warm_start: dict[str, State] | None) -> StudyState:
    """The state before the first round: weights drawn from a generator seeded by the plan's digest, or the warm start.

    Args:
        plan: the study plan.
        warm_start: state dicts by name; needed if and only if the plan names a warm start.

    Raises:
        UsageError: ``warm_start_missing``, ``warm_start_not_in_plan`` or ``warm_start_differs``.
    """
    seed = int(plan.digest[:15], 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # nn.Linear draws its first weights from the global stream
        autoencoder, dnn = make_autoencoder(plan).state_dict(), make_radiogenomic_dnn(plan).state_dict()
        generator, companion = make_generator(plan), make_companion(plan)
    draws = torch.Generator().manual_seed(seed)
    initialise(generator, draws)
    initialise(companion, draws)
    start: dict[str, State] = {"generator": generator.state_dict(), "discriminator": companion.state_dict()}
    if plan.profile_engine == "networks":
        start |= {"autoencoder": autoencoder, "radiogenomics": dnn}
    if "translation" in plan.modules:
        start["translation"] = dict(make_networks(plan)["translators"].state_dict())
    start |= _public_start(plan, warm_start)
    return StudyState(plan.digest, {**start, "generator_ema": start["generator"]})


def _public_start(plan: StudyPlan, warm_start: dict[str, State] | None) -> dict[str, State]:
    """Those of the given weights that the plan names, after comparing digests."""
    named: dict[str, str] = {}
    if plan.gan.warm_start is not None:
        named["generator"] = plan.gan.warm_start.generator_sha256
        named["discriminator"] = plan.gan.warm_start.discriminator_sha256
    if plan.autoencoder.warm_start is not None and "autoencoder" in plan.modules:
        named["autoencoder"] = plan.autoencoder.warm_start.sha256
    statistics: dict[Module, StatisticPlan | None] = {"moments": plan.moments, "embedding": plan.embedding}
    for module, section in statistics.items():
        if section is not None:
            named[PUBLIC[module]] = section.public.sha256
    if not named:
        if warm_start is not None:
            raise UsageError("warm_start_not_in_plan", "Weights were given, but the plan names none.")
        return {}
    if warm_start is None or not set(named) <= set(warm_start):
        raise UsageError("warm_start_missing", "The plan names public weights, but no such weights were given.")
    if any(state_digest(warm_start[name]) != digest for name, digest in named.items()):
        raise UsageError("warm_start_differs", "The weights given are not those whose digests the plan names.")
    return {name: warm_start[name] for name in named}
