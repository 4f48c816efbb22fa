"""How much of an epsilon the audit of `fedsynth evaluate audit` sees, with and without planted faults, and what it costs.

Every module is run as a site would run it (`fedsynth_client.auditing`), at the noise that makes it cost the stated epsilon
alone. Prints markdown tables and writes `auditing.md` and `auditing.json` to --out. Takes some five minutes of
processor time, most of it for the GAN. Run as ``python simulations/benchmarks/auditing.py --out FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from fedsynth.auditing.one_run import Outcome, outcome, planned_guesses
from fedsynth.dp.accounting import Mechanism, epsilon, noise_multiplier
from fedsynth.dp.bookkeeping import Bookkeeper
from fedsynth.dp.randomness import Randomness, SystemRandomness
from fedsynth.plan import Module, MomentsPlan, StudyPlan
from fedsynth_client.auditing.canaries import run_with_canaries
from fedsynth_client.training import statistic
from fedsynth_client.training.block import BlockResult

MODULES: tuple[Module, ...] = ("moments", "autoencoder", "radiogenomics", "gan")
TARGETS = (1.0, 3.0, 10.0)
CANARIES: dict[Module, tuple[int, ...]] = {
    "moments": (256, 1024, 4096),
    "autoencoder": (256, 1024, 4096),
    "radiogenomics": (256, 1024, 4096),
    "gan": (256, 1024),
}
DELTA = 1e-5
PATIENTS, BATCH, ROUNDS, STEPS = 160, 53, 10, 10
REPEATS = 3


@dataclass(frozen=True)
class Table:
    """A titled table of strings."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table as GitHub reads it."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return f"### {self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plan() -> StudyPlan:
    """One site; what is audited takes its clipping norms, batches and slices from here."""
    training = {
        "rounds": ROUNDS,
        "steps_per_round": STEPS,
        "expected_batch": BATCH,
        "learning_rate": 1e-3,
        "budget_share": 0.3,
    }
    return StudyPlan.model_validate(
        {
            "name": "audited",
            "purpose": "Modules that are audited one by one",
            "image": {"size": 32, "slices": 4},
            "genes": {
                "panel": ["G0", "G1"],
                "reference_quantiles": [-1.0, 1.0],
                "center": [0.0, 0.0],
                "scale": [1.0, 1.0],
            },
            "privacy": {"epsilon": 10.0, "delta": DELTA},
            "autoencoder": {**training, "max_grad_norm": 0.05},
            "radiogenomics": {**training, "max_grad_norm": 1.0},
            "gan": {**training, "max_grad_norm": 1.0},
            "sites": [{"name": "site", "nominal_patients": PATIENTS}],
        }
    )


def block_of(module: Module, target: float) -> tuple[Mechanism, int]:
    """One round's mechanism, and the number of rounds, at which `module` costs `target` alone."""
    if module == "moments":
        return Mechanism(1.0, noise_multiplier(1.0, 1, target, DELTA), 1), 1
    rate = BATCH / PATIENTS
    return Mechanism(rate, noise_multiplier(rate, ROUNDS * STEPS, target, DELTA), STEPS), ROUNDS


@dataclass(frozen=True)
class Measured:
    """One audit, and the processor time that it took."""

    found: Outcome
    seconds: float


def measure(study: StudyPlan, module: Module, target: float, canaries: int) -> Measured:
    """Audit `module` at an epsilon of `target`, as `fedsynth_client.auditing.run.audit_module` does."""
    start, source = time.process_time(), SystemRandomness()
    block, rounds = block_of(module, target)
    steps = block.steps * rounds
    guesses = planned_guesses(canaries, block.sample_rate, block.noise_multiplier, steps, DELTA)
    members = (source.uniform(canaries) < 0.5).numpy()
    looks = run_with_canaries(
        study.model_copy(update=_moments(module)), module, block, rounds, members, guesses, source
    )
    return Measured(outcome(looks, members, DELTA), time.process_time() - start)


def _moments(module: Module) -> dict[str, object]:
    public = {"sha256": "0" * 64, "provenance": "none: rows are made up"}
    return (
        {"moments": MomentsPlan.model_validate({"budget_share": 1.0, "public": public})} if module == "moments" else {}
    )


def bounds_below_claims(study: StudyPlan) -> Table:
    """Sound mechanisms: what of the claim is seen."""
    rows = []
    for module in MODULES:
        for target in TARGETS:
            block, rounds = block_of(module, target)
            claimed = epsilon([replace(block, steps=block.steps * rounds)], DELTA)
            for canaries in CANARIES[module]:
                found = [measure(study, module, target, canaries) for _ in range(REPEATS)]
                bounds = sorted(each.found.bound for each in found)
                rows.append(
                    [
                        module,
                        f"{claimed:.2f}",
                        f"{block.noise_multiplier:.2f}",
                        str(canaries),
                        f"{statistics.median(bounds):.2f} ({bounds[0]:.2f} to {bounds[-1]:.2f})",
                        f"{found[0].found.reachable:.2f}",
                        f"{statistics.median(each.seconds for each in found):.1f}",
                    ]
                )
                print(rows[-1], flush=True)
    columns = [
        "module",
        "claimed",
        "noise multiplier",
        "canaries",
        f"bound: median of {REPEATS} (range)",
        "reachable",
        "CPU s",
    ]
    return Table("Sound mechanisms: lower bound at 95 % confidence against the claim", columns, rows)


def faults(study: StudyPlan) -> Table:
    """Broken mechanisms: which bounds exceed the claim."""
    target, rows = 3.0, []
    for module in MODULES:
        for name, planted in FAULTS.items():
            canaries = CANARIES[module][1]
            with planted():
                found = measure(study, module, target, canaries).found
            verdict = "refuted" if found.bound > target else "passes"
            rows.append(
                [module, name, f"{target:g}", f"{found.bound:.2f}", f"{found.correct}/{found.guesses}", verdict]
            )
            print(rows[-1], flush=True)
    columns = ["module", "fault", "claimed", "bound", "right guesses", "the claim is"]
    return Table(f"Planted faults, {CANARIES['gan'][1]} canaries, one run each", columns, rows)


def _scaled_noise(factor: float) -> Callable[[], AbstractContextManager[object]]:
    whole = SystemRandomness.normal

    def normal(self: SystemRandomness, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        return whole(self, shape, std * factor) if factor else torch.zeros(tuple(shape))

    return lambda: patch.object(SystemRandomness, "normal", normal)


@contextmanager
def _doubled_clip() -> Iterator[None]:
    """Everybody may move a sum twice as far as was charged; the noise stays what it was."""
    clipped_sums, release = Bookkeeper.clipped_sums, statistic.release_statistic

    def wide(self: Bookkeeper, losses: Callable[[], Tensor], patients: int, clip: float, check_mixing: bool = False):  # type: ignore[no-untyped-def]
        return clipped_sums(self, losses, patients, 2 * clip, check_mixing)

    def wide_release(rows: Tensor, mechanism: Mechanism, max_norm: float, randomness: Randomness) -> BlockResult:
        half = replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)
        return release(rows, half, 2 * max_norm, randomness)

    with patch.object(Bookkeeper, "clipped_sums", wide), patch.object(statistic, "release_statistic", wide_release):
        yield


FAULTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "none": nullcontext,
    "noise halved": _scaled_noise(0.5),
    "clip doubled": _doubled_clip,
    "a fifth of the noise": _scaled_noise(0.2),
    "no noise": _scaled_noise(0.0),
}


def main() -> None:
    """Make the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--faults-only", action="store_true", help="leave out the table of sound mechanisms")
    asked = parser.parse_args()
    out: Path = asked.out
    out.mkdir(parents=True, exist_ok=True)
    study = plan()
    tables = [*([] if asked.faults_only else [bounds_below_claims(study)]), faults(study)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text = "\n\n".join(table.markdown() for table in tables) + f"\n\nPeak memory of all: {peak:.0f} MB.\n"
    print(text)
    (out / "auditing.md").write_text(text, encoding="utf-8")
    (out / "auditing.json").write_text(json.dumps([vars(table) for table in tables], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
