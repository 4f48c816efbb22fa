"""What privacy accounting says and costs: one-shot releases, joint against split budgets, and the time of an allocation.

Prints markdown tables and writes `accounting.md` and `accounting.json` to --out. Takes about a minute on two CPU cores,
nearly all of it PRV. Run as ``python simulations/benchmarks/accounting.py --out FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedsynth.dp import accounting
from fedsynth.dp.accounting import (
    Accountant,
    Demand,
    Mechanism,
    allocate,
    allocation_report,
    epsilon,
    gaussian_epsilon,
)
from fedsynth.dp.composition import two_epsilons

# Patients of a site and the expected batch, as in the study's reference table.
COHORTS = {100: 25, 250: 50, 500: 64, 1000: 128}
TARGETS = (1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Table:
    """A titled table of strings and numbers."""

    title: str
    columns: list[str]
    rows: list[list[str | float]]

    def markdown(self) -> str:
        """The table as GitHub reads it."""
        lines = [self.columns, ["---"] * len(self.columns)]
        lines += [[cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row] for row in self.rows]
        return f"### {self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def study(patients: int) -> dict[str, Demand]:
    """Three DP-SGD phases and two one-shot statistics."""
    rate = COHORTS[patients] / patients
    return {
        "moments": Demand(1.0, 1, 0.15),
        "embedding": Demand(1.0, 1, 0.30),
        "autoencoder": Demand(rate, 300, 0.15),
        "radiogenomics": Demand(rate, 300, 0.10),
        "gan": Demand(rate, 1000, 0.30),
    }


def one_shots() -> Table:
    """One Gaussian release: RDP, Opacus' PRV on its own, and the exact curve."""
    delta, rows = 1e-5, list[list[str | float]]()
    for sigma in (0.5, 1.0, 2.0, 4.0, 8.0, 20.0):
        one = [Mechanism(1.0, sigma, 1)]
        rdp, exact = epsilon(one, delta), gaussian_epsilon(sigma, delta)
        raw = accounting._prv_epsilon(tuple(one), delta, rdp)
        rows.append([sigma, rdp, raw, exact, f"{100 * (rdp / exact - 1):.0f} %"])
    return Table("One-shot release, delta 1e-5", ["sigma", "RDP", "PRV grid", "exact", "RDP above exact"], rows)


def joint_against_split(accountant: Accountant) -> Table:
    """What a joint allocation gains for three DP-SGD phases and two one-shot statistics."""
    rows: list[list[str | float]] = []
    for patients in COHORTS:
        demands, delta = study(patients), 1 / (10 * patients)
        for target in TARGETS:
            report = allocation_report(demands, allocate(demands, target, delta, accountant), target, delta, accountant)
            pairs = [
                f"{part.noise_multiplier_split:.2f} -> {part.noise_multiplier:.2f}" for part in report.modules.values()
            ]
            rows.append([str(patients), target, report.epsilon_summed, *pairs])
    title = f"Joint allocation by {accountant.upper()}, delta 1/(10 n): noise multipliers, split -> joint"
    return Table(title, ["n", "epsilon", "sum of epsilons alone", *study(100)], rows)


def equal_phases() -> Table:
    """Phases of 1,000 steps that each cost epsilon 8 alone, at n = 500."""
    rate, delta = 64 / 500, 1 / 5000
    split = accounting.noise_multiplier(rate, 1000, 8.0, delta)
    rows: list[list[str | float]] = []
    for phases in (1, 2, 3, 5):
        history = [Mechanism(rate, split, 1000)] * phases
        joint = allocate({str(i): Demand(rate, 1000, 1 / phases) for i in range(phases)}, 8.0, delta)["0"]
        rows.append([str(phases), 8.0 * phases, epsilon(history, delta), epsilon(history, delta, "prv"), joint])
    title = f"Equal phases at n = 500, sigma {split:g} (epsilon 8 each), and the sigma of a true joint epsilon 8"
    return Table(title, ["phases", "sum", "RDP", "PRV", "sigma for 8 (RDP)"], rows)


def shared_noise() -> Table:
    """A one-shot sum whose noise the sites share, sized for epsilon 3 towards recipients, by the exact curve."""
    delta, rows = 1e-4, list[list[str | float]]()
    sigma = allocate({"embedding": Demand(1.0, 1, 1.0)}, 3.0, delta, "prv")["embedding"]
    for sites in (1, 3, 5, 10):
        for unreliable in (0, 1):
            if unreliable < sites:
                both = two_epsilons([Mechanism(1.0, sigma, 1)], sites, delta, "prv", unreliable=unreliable)
                rows.append([str(sites), str(unreliable), both.towards_recipients, both.towards_server])
    title = f"Shared noise, total sigma {sigma:g}, delta 1e-4"
    return Table(title, ["sites", "unreliable", "towards recipients", "towards a server that sees messages"], rows)


def costs() -> Table:
    """CPU time of an allocation of five modules from cold; best of three under RDP."""
    rows: list[list[str | float]] = []
    for patients in COHORTS:
        demands, delta = study(patients), 1 / (10 * patients)
        for target in TARGETS:
            rdp = min(_seconds(partial(allocate, demands, target, delta)) for _ in range(3))
            prv = _seconds(partial(allocate, demands, target, delta, "prv"))
            rows.append([str(patients), target, 1000 * rdp, prv])
    return Table("CPU time of an allocation of five modules", ["n", "epsilon", "RDP, ms", "PRV, s"], rows)


def _seconds(work: Callable[[], object]) -> float:
    accounting._rdp_of_one_step.cache_clear()
    accounting._prv_epsilon.cache_clear()
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Make all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    tables = [one_shots(), equal_phases(), joint_against_split("rdp"), shared_noise(), costs()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text = "\n\n".join(table.markdown() for table in tables) + f"\n\nPeak memory of all: {peak:.0f} MB.\n"
    print(text)
    (out / "accounting.md").write_text(text, encoding="utf-8")
    (out / "accounting.json").write_text(json.dumps([vars(table) for table in tables], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
