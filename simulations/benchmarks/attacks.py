"""Attack small simulated studies, once trained almost without noise and once privately, and tell what each attack finds.

``python simulations/benchmarks/attacks.py --out FOLDER`` draws two hospitals, runs each recipe with a budget so large that
there is hardly any noise and with those of ``--epsilon``, writes down all messages, draws a release, attacks both, and
writes ``attacks.md`` (tables) and ``attacks.json`` (all results) to FOLDER. About 15 minutes on two cores; ``--quick``
takes fewer patients and two or three minutes. Studies that are there are not run again.

Recipes:

- ``statistics``: moments and embedding from the packaged public weights;
- ``networks``: autoencoder, radiogenomic DNN and adversarial rounds from random weights;
- ``copies``: no study, a release that repeats training patients: what the attacks on a release find at best.

The sites are small (by default 40 training patients each), where a model can learn its patients by heart, and have many
held-out patients, without whom low false positive rates could not be told.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import save_file

from fedsynth.attacks.rates import largest_area, largest_true_positive_rate
from fedsynth.attacks.run import attack_release
from fedsynth.attacks.transcript import Transcript
from fedsynth.attacks.values import Attacks, MembershipAttack
from fedsynth.budget import planned_epsilon
from fedsynth.evaluation.patients import Patients
from fedsynth.metrics.domain_extractor import DomainExtractor, train_extractor
from fedsynth.morphology import denormalise
from fedsynth.plan import Module, StudyPlan, save_plan
from fedsynth.recommend import PublicStarts
from fedsynth.synthetic import SyntheticPatient
from fedsynth_client.app import app as client_app
from fedsynth_client.cohort import Cohort, load_cohort
from fedsynth_client.evaluation.patients import patients_of
from fedsynth_client.policy import SitePolicy, save_policy
from fedsynth_client.site import Site
from fedsynth_server.checkpoint import load_state
from fedsynth_server.rounds import run_study
from fedsynth_server.synthesis import synthesise
from fedsynth_server.warm_start import load_warm_start, public_starts
from fedsynth_simulations.benchmarking import cohorts
from fedsynth_simulations.cohort.anatomy import Anatomy
from fedsynth_simulations.cohort.public import public_cohort
from fedsynth_simulations.extractor import extractor_task
from fedsynth_simulations.grid import InProcessGrid
from fedsynth_simulations.hospitals.sites import SITES
from fedsynth_simulations.plans import simulated_genes, study_plan
from fedsynth_simulations.transcript import TranscriptTap
from fedsynth_simulations.weights import packaged_warm_start

RECIPES = ("statistics", "networks", "copies")
_NEARLY_NO_NOISE = 1e5
_HOSPITALS = SITES[:2]
_PUBLIC_PATIENTS = 100


@dataclass(frozen=True)
class Sizes:
    """Patients of each site, and synthetic patients of the release."""

    train: int
    holdout: int
    synthetic: int


def main() -> None:
    """Parse the command line, run and attack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[10.0, 1.0], help="of the private runs")
    parser.add_argument("--train", type=int, default=40, help="training patients a site")
    parser.add_argument("--holdout", type=int, default=120, help="held-out patients a site")
    parser.add_argument("--synthetic", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(20, 40, 40) if given.quick else Sizes(given.train, given.holdout, given.synthetic)
    given.out.mkdir(parents=True, exist_ok=True)
    plan = recipe_plan("statistics", sizes.train, _NEARLY_NO_NOISE)
    write_sites(given.out / "cohorts", plan, sizes, given.seed)
    extractor = _extractor(plan, given.seed)
    found: dict[str, Attacks] = {}
    plans: dict[str, StudyPlan] = {}
    for recipe in (each for each in given.recipes if each != "copies"):
        for epsilon in (_NEARLY_NO_NOISE, *given.epsilon):
            name = f"{recipe}-{epsilon:g}"
            plan = plans[name] = recipe_plan(recipe, sizes.train, epsilon)
            started = time.monotonic()
            synthetic = run(given.out / name, given.out / "cohorts", plan, sizes.synthetic)
            print(f"{name}: study {time.monotonic() - started:.0f} s", flush=True)
            transcript = Transcript(given.out / name / "transcript")
            found[name] = _attacked(plan, given.out / "cohorts", synthetic, extractor, given.seed, transcript)
            print(table(plan, found[name]), flush=True)
    if "copies" in given.recipes:
        plan = recipe_plan("statistics", sizes.train, _NEARLY_NO_NOISE)
        train = patients_of(_split(given.out / "cohorts", plan, "train"))
        found["copies"] = _attacked(plan, given.out / "cohorts", repeated(train, plan), extractor, given.seed, None)
        plans["copies"] = plan
    sections = [f"## {name}\n\n{table(plans[name], attacks)}" for name, attacks in found.items()]
    (given.out / "attacks.md").write_text("\n".join(sections), encoding="utf-8")
    results = {name: attacks.model_dump(mode="json") for name, attacks in found.items()}
    (given.out / "attacks.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print("\n".join(sections))


def recipe_plan(recipe: str, patients: int, epsilon: float) -> StudyPlan:
    """The plan of a recipe for sites of so many training patients."""
    genes = simulated_genes()
    starts = public_starts(packaged_warm_start(), genes) if recipe == "statistics" else PublicStarts()
    sites: dict[str, int] = {site.name: patients for site in _HOSPITALS}
    plan = study_plan(f"attacks-{recipe}", "Attack a small study.", sites, genes=genes, epsilon=epsilon, starts=starts)
    # Held-out patients are the attacks' non-members here, and nothing more is asked of them.
    return StudyPlan.model_validate({**plan.model_dump(), "site_evaluation": None})


def write_sites(folder: Path, plan: StudyPlan, sizes: Sizes, seed: int) -> None:
    """Draw the hospitals' patients and write them as prepared cohorts, unless they are there."""
    anatomy = Anatomy.load()
    for site in _HOSPITALS:
        if not (folder / site.name / "manifest.json").is_file():
            parts = [
                cohorts.draw_site(plan, site, seed, "train", range(sizes.train), anatomy),
                cohorts.draw_site(plan, site, seed, "holdout", range(sizes.holdout), anatomy),
            ]
            splits = ["train"] * sizes.train + ["holdout"] * sizes.holdout
            write_cohort(folder / site.name, plan, cohorts.concatenate(parts), splits, np.random.default_rng(seed))


def write_cohort(
    folder: Path, plan: StudyPlan, patients: cohorts.Patients, splits: Sequence[str], rng: np.random.Generator
) -> None:
    """Write patients, of split ``"train"`` or ``"holdout"`` each, as `fedsynth site prepare` would."""
    (folder / "patients").mkdir(parents=True, exist_ok=True)
    keys = [f"p{key:012x}" for key in rng.choice(16**12, len(patients), replace=False)]
    for key, images, mask in zip(keys, patients.images, patients.masks, strict=True):
        save_file({"images": images, "mask": mask}, folder / "patients" / f"{key}.safetensors")
    index = pd.Index(keys, name="key")
    pd.DataFrame(patients.genes, index=index, columns=plan.genes.panel).to_parquet(folder / "expression.parquet")
    names = plan.morphology.features
    clinical = pd.DataFrame(denormalise(patients.morphology, names), index=index, columns=names)
    clinical["label"] = patients.labels
    clinical.to_parquet(folder / "clinical.parquet")
    rows = [
        {"key": key, "split": split, "has_images": True, "has_genes": True}
        for key, split in zip(keys, splits, strict=True)
    ]
    sections = {"image": plan.image, "genes": plan.genes, "label": plan.label}
    manifest = {**{name: section.model_dump() for name, section in sections.items()}, "patients": rows}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def run(folder: Path, prepared: Path, plan: StudyPlan, synthetic: int) -> list[SyntheticPatient]:
    """Run the study of `plan` in `folder`, its messages written down in ``transcript``; draws the release anew."""
    study = folder / "study"
    study.mkdir(parents=True, exist_ok=True)
    save_plan(plan, study / "plan.toml")
    nodes: dict[int, Path] = {}
    for node, site in enumerate(plan.sites, start=1):
        nodes[node] = folder / "sites" / site.name
        if not nodes[node].is_dir():
            nodes[node].mkdir(parents=True)
            (nodes[node] / "cohort").symlink_to((prepared / site.name).resolve())
            policy = SitePolicy(
                site=site.name,
                max_epsilon=plan.privacy.epsilon,
                max_delta=plan.privacy.delta,
                min_patients=5,
                declared_patients=site.nominal_patients,
                modules=list(plan.modules),
            )
            save_policy(policy, nodes[node] / "policy.toml")
        Site(nodes[node]).approve(plan)
    state = load_state(study, plan)
    if state is None or state.missing_rounds(plan):
        weights = load_warm_start(packaged_warm_start())[0] if plan.moments is not None else None
        grid = InProcessGrid(client_app, nodes, wiretap=TranscriptTap(folder / "transcript"))
        state = run_study(grid, plan, study, weights)
    generator = torch.Generator()
    generator.seed()
    return synthesise(plan, state, synthetic, generator)


def repeated(train: Patients, plan: StudyPlan) -> list[SyntheticPatient]:
    """A release that is nothing but training patients."""
    return [
        SyntheticPatient(
            f"SYN{row + 1:04d}",
            plan.label.classes[train.labels[row]],
            train.genes[row],
            denormalise(train.morphology[row], plan.morphology.features),
            train.images[row].astype(np.float32),
            (train.masks[row] > 0).astype(np.uint8),
        )
        for row in range(len(train))
    ]


def table(plan: StudyPlan, attacks: Attacks) -> str:
    """Membership attacks beside what the privacy of what they see allows, the sites' rows averaged; the rest as lines."""
    groups: dict[str, list[MembershipAttack]] = {}
    for attack in attacks.membership:
        groups.setdefault(attack.id, []).append(attack)
    lines = [
        "| attack | epsilon | AUC | allowed | TPR at FPR 1 % | allowed | bound of epsilon | provable |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for identity, group in groups.items():
        epsilon = max(claimed(plan, attack) for attack in group)
        areas = ", ".join(f"{a.area.value:.2f} ({a.area.low:.2f} to {a.area.high:.2f})" for a in group)
        points = [a.points[-1] for a in group]
        rates = ", ".join(f"{p.true_positive_rate.value:.2f} at {100 * p.reached.value:.1f} %" for p in points)
        allowed = largest_true_positive_rate(epsilon, plan.privacy.delta, points[0].asked)
        bounds = ", ".join(f"{a.epsilon_bound:.1f}" for a in group)
        provable = max(a.largest_bound or 0.0 for a in group)
        lines.append(
            f"| {identity} | {epsilon:.3g} | {areas} | {largest_area(epsilon, plan.privacy.delta):.2f} | {rates} | "
            f"{allowed:.2f} | {bounds} | {provable:.1f} |"
        )
    lines.append("")
    for guess in attacks.attributes:
        lines.append(
            f"- {guess.id} ({guess.metric}): members {guess.members:.2f}, non-members {guess.non_members:.2f}, gap "
            f"{guess.gap.value:.2f} ({guess.gap.low:.2f} to {guess.gap.high:.2f}), baseline {guess.baseline:.2f}"
        )
    for check in attacks.copies:
        lines.append(
            f"- copies of {check.of}: {check.found} of {check.compared} (held-out {check.found_holdout}), threshold "
            f"{check.threshold:.2f}, most similar {check.most_similar[0]:.2f} (held-out {check.most_similar[1]:.2f})"
        )
    for distance in attacks.distances:
        low, high = distance.nearer.low, distance.nearer.high
        lines.append(f"- nearer to training, {distance.of}: {distance.nearer.value:.2f} ({low:.2f} to {high:.2f})")
    lines += [f"- not done: {reason}" for reason in attacks.not_done]
    lines.append(f"- {attacks.seconds:.0f} s")
    return "\n".join(lines) + "\n"


def claimed(plan: StudyPlan, attack: MembershipAttack) -> float:
    """The epsilon of what an attack saw: of one module at a site, or, of a release, of the whole study."""
    modules: dict[str, Module] = {"generator-approach": "gan", **{f"-{module}": module for module in plan.modules}}
    seen = [module for end, module in modules.items() if attack.id.endswith(end)]
    if attack.view == "release" or not seen:
        return plan.privacy.epsilon
    return planned_epsilon(plan, attack.site, seen[0])


def _attacked(
    plan: StudyPlan,
    prepared: Path,
    synthetic: list[SyntheticPatient],
    extractor: DomainExtractor,
    seed: int,
    transcript: Transcript | None,
) -> Attacks:
    train, holdout = (patients_of(_split(prepared, plan, split)) for split in ("train", "holdout"))
    return attack_release(plan, train, holdout, synthetic, extractor, "simulated patients", seed, transcript=transcript)


def _split(prepared: Path, plan: StudyPlan, split: str) -> dict[str, Cohort]:
    cohort = {site.name: load_cohort(prepared / site.name, plan.morphology.features) for site in plan.sites}
    return {name: each.split("train" if split == "train" else "holdout") for name, each in cohort.items()}


def _extractor(plan: StudyPlan, seed: int) -> DomainExtractor:
    public = public_cohort(plan, _PUBLIC_PATIENTS, np.random.default_rng([seed, 2]))
    images, targets = extractor_task(public)
    generator = torch.Generator().manual_seed(seed)
    return train_extractor(images, targets, generator, f"{_PUBLIC_PATIENTS} public simulated patients")


if __name__ == "__main__":
    main()
