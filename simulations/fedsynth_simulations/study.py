"""A whole study on one machine: hospitals, ingest, federation, evaluation, release. Each stage is done once.

The stages write into one folder, each under a temporary name until it is whole, so that the same command goes on after
an interruption at any moment. The federation is the deployment's own: ClientApp, ServerApp, ledgers and checkpoints.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from rich.console import Console

from fedsynth.attacks.run import attack_release
from fedsynth.attacks.transcript import Transcript
from fedsynth.attacks.values import Attacks
from fedsynth.auditing.code import code_digest
from fedsynth.auditing.values import Audit
from fedsynth.engines.moments import sizes
from fedsynth.epsilons import finite
from fedsynth.errors import JobFailed, Refused, UsageError
from fedsynth.evaluation.evaluate import evaluate
from fedsynth.evaluation.patients import Patients
from fedsynth.evaluation.values import Evaluation
from fedsynth.files import read_json, write_json
from fedsynth.limits import AttributeLimits, CopyLimits, Limits, MembershipLimits
from fedsynth.metrics.domain_extractor import DomainExtractor, train_extractor
from fedsynth.models.gene_autoencoder import generate_expression, make_autoencoder
from fedsynth.models.images import make_generator
from fedsynth.models.linear_gaussian import LinearGaussianProfiles, public_prior
from fedsynth.morphology import normalise
from fedsynth.plan import StudyPlan, load_plan, save_plan
from fedsynth.profiles import profile_model
from fedsynth.progress import say
from fedsynth.recommend import PublicStarts
from fedsynth.records import PUBLIC
from fedsynth.synthesis import SyntheticProfiles, draw_patients
from fedsynth.synthetic import SyntheticPatient, subject_digest
from fedsynth_client.app import app as client_app
from fedsynth_client.auditing.run import audit_plan
from fedsynth_client.cohort import load_cohort
from fedsynth_client.evaluation.patients import patients_of
from fedsynth_client.ingest.command import report_path
from fedsynth_client.ingest.prepare import prepare
from fedsynth_client.ingest.report import render
from fedsynth_client.ingest.sources import load_sources
from fedsynth_client.policy import SitePolicy, save_policy
from fedsynth_client.site import Site
from fedsynth_server.app import app as server_app
from fedsynth_server.checkpoint import StudyState, load_state
from fedsynth_server.outcome import study_outcome
from fedsynth_server.release.decision import OverrideRequest
from fedsynth_server.release.make import candidate_path, make_release
from fedsynth_server.release.manifest import generate_key
from fedsynth_server.release.preview import Example, ReferenceExamples
from fedsynth_server.release.verify import verify
from fedsynth_server.site_evaluation import site_evaluation
from fedsynth_server.statement import privacy_statement
from fedsynth_server.synthesis import synthesise
from fedsynth_server.warm_start import load_warm_start, public_starts
from fedsynth_simulations.cohort.public import PublicCohort, public_cohort
from fedsynth_simulations.extractor import extractor_task
from fedsynth_simulations.grid import InProcessGrid, Wiretap, run_in_process, untapped
from fedsynth_simulations.hospitals import write_hospitals
from fedsynth_simulations.plans import simulated_genes, study_plan, zscore_genes
from fedsynth_simulations.ray import run_over_ray
from fedsynth_simulations.transcript import TranscriptTap
from fedsynth_simulations.weights import PACKAGED, packaged_warm_start

_PUBLIC_PATIENTS = 150
_EXAMPLES = 6
_EXTRACTORS = 3  # one network's distances vary too much with its training

Backend = Literal["in-process", "ray"]
Found = TypeVar("Found", bound=BaseModel)


@dataclass(frozen=True)
class Settings:
    """What a simulated study is asked for; stored beside it, since a resumed run must ask for the same.

    Attributes:
        patients: patients a simulated hospital.
        seed: of the simulated hospitals (not of the privacy noise).
        epsilon: budget of a patient.
        synthetic: synthetic patients in the release.
        site_folders: real folders in place of simulated hospitals; empty for a simulation.
        sources: the `sources.toml` that describes all real folders.
        warm_start: file of public weights, ``"packaged"`` for those of this package, or empty for random weights.
        reproducible_seed: seeds the privacy noise: the run is then marked *not private*.
        backend: how the federation runs: in this process, or over Ray.
    """

    patients: int
    seed: int
    epsilon: float
    synthetic: int
    site_folders: tuple[str, ...] = ()
    sources: str = ""
    warm_start: str = ""
    reproducible_seed: int | None = None
    backend: Backend = "in-process"


def run(out: Path, settings: Settings, wiretap: Wiretap = untapped) -> Path:
    """Run, or go on with, the study in `out`; returns the folder of its verified release.

    Raises:
        UsageError: ``run_differs``: `out` holds a study with other settings.
        FedsynthError: whatever a stage refuses.
    """
    _remember(out, settings)
    with _stage("hospitals"):
        sources = _hospitals(out, settings)
    with _stage("plan"):
        plan = _plan(out, settings, sources)
    with _stage("sites"):
        for name, path in sources.items():
            _site(out / "sites" / name, name, plan, path)
    with _stage("federation"):
        state = _federation(out, plan, list(sources), wiretap, settings.backend)
    release = out / "release"
    if not release.is_dir():
        with _stage("synthesis"):
            drawn = _drawn(out, plan, state, list(sources), settings)
        subject = subject_digest(drawn.synthetic)
        with _stage("evaluation"):
            evaluation = _kept(
                out / "evaluation.json",
                Evaluation,
                lambda: _evaluation(plan, state, drawn, settings),
                lambda held: held.subject == subject,
            )
        with _stage("attacks"):
            attacks = _kept(
                out / "attacks.json",
                Attacks,
                lambda: _attacks(out, plan, drawn, settings),
                lambda held: held.subject == subject,
            )
        with _stage("audit"):  # of this very code: an audit of other code would not count
            audit = _kept(out / "audit.json", Audit, lambda: audit_plan(plan), lambda held: held.code == code_digest())
        with _stage("release"):
            _release(out, plan, state, drawn, evaluation, attacks, audit, settings)
    with _stage("verification"):
        result = verify(release, release / "release.pub.pem")
        if not result.ok:
            raise Refused(
                "release_not_verified", "The release does not verify.", "Run `fedsynth release verify` on it."
            )
    return release


@contextmanager
def _stage(name: str) -> Iterator[None]:
    started = time.monotonic()
    say(f"== {name}")
    yield
    say(f"== {name}: {time.monotonic() - started:.1f} s")


def _remember(out: Path, settings: Settings) -> None:
    path, asked = out / "settings.json", json.loads(json.dumps(finite(asdict(settings))))
    if path.is_file():
        held = read_json(path)
        if held != asked:
            changed = sorted(key for key in asked if asked[key] != held.get(key))
            raise UsageError(
                "run_differs",
                f"{out} holds a study with other settings ({', '.join(changed)}).",
                "Repeat the first command to go on with it, or name another folder with --out.",
            )
        return
    if out.is_dir() and any(out.iterdir()):
        raise UsageError("out_not_empty", f"{out} holds other files.", "Name a new or empty folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, asked)


def _hospitals(out: Path, settings: Settings) -> dict[str, Path]:
    """Each site's `sources.toml`."""
    if settings.site_folders:
        return _real_hospitals(out, settings)
    hospitals = out / "hospitals"
    if not hospitals.is_dir():
        draft = out / "hospitals.part"
        shutil.rmtree(draft, ignore_errors=True)
        write_hospitals(draft, settings.patients, settings.seed)
        draft.rename(hospitals)
    return {path.parent.name: path for path in sorted(hospitals.glob("*/sources.toml"))}


def _real_hospitals(out: Path, settings: Settings) -> dict[str, Path]:
    """Describe folders that stay where they are by one file for all of them, its paths relative to each folder."""
    template = load_sources(Path(settings.sources))
    found: dict[str, Path] = {}
    for given in settings.site_folders:
        folder = Path(given).resolve()
        if not folder.is_dir():
            raise UsageError("site_folder_missing", f"There is no folder {given}.")
        name = folder.name.lower()
        if name in found:
            raise UsageError("site_folders_alike", f"Two site folders are called {name!r}; sites are named by folder.")
        parts = {
            key: getattr(template, key).model_copy(update={"path": str(folder / getattr(template, key).path)})
            for key in ("images", "expression", "clinical")
            if getattr(template, key) is not None
        }
        path = out / "sites" / name / "sources.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        described = template.model_copy(update=parts).model_dump(mode="json", exclude_none=True)
        path.write_text(tomli_w.dumps(described), encoding="utf-8")
        found[name] = path
    return found


def _plan(out: Path, settings: Settings, sources: dict[str, Path]) -> StudyPlan:
    path = out / "study" / "plan.toml"
    if path.is_file():
        return load_plan(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    real = bool(settings.site_folders)
    genes = zscore_genes() if real else simulated_genes()
    starts = PublicStarts()
    if settings.warm_start:
        file = packaged_warm_start() if settings.warm_start == PACKAGED else Path(settings.warm_start)
        # Real genes do not move together as simulated ones do; tables of z-scores keep simulated abundances away.
        starts = public_starts(file, genes)
        shutil.copyfile(file, path.parent / "warm-start.safetensors")
    plan = study_plan(
        "research-sites" if real else "simulated-sites",
        "Try the software on public research data on one machine." if real else "Show a whole study on one machine.",
        {name: _declared(each, settings) for name, each in sources.items()},
        genes=genes,
        epsilon=settings.epsilon,
        starts=starts,
        reproducible_seed=settings.reproducible_seed,
    )
    draft = path.with_suffix(".part")
    save_plan(plan, draft)
    draft.rename(path)
    return plan


def _declared(sources_path: Path, settings: Settings) -> int:
    """The training patients that a site declares: a rounded figure below the rows of its clinical table."""
    if not settings.site_folders:
        return max(settings.patients * 7 // 100 * 10, 5)
    clinical = load_sources(sources_path).clinical
    if clinical is None:
        raise UsageError("clinical_missing", f"{settings.sources} names no clinical table.", "Its rows size the study.")
    with Path(clinical.path).open(encoding="utf-8") as table:
        rows = sum(1 for line in table if line.strip()) - 1
    return max(rows * 16 // 100 * 5, 5)


def _site(folder: Path, name: str, plan: StudyPlan, sources_path: Path) -> None:
    """Prepare a site as its own staff would: policy, cohort, approval of the plan."""
    site, declared = Site(folder), plan.site(name).nominal_patients
    folder.mkdir(parents=True, exist_ok=True)
    if not site.policy_path.is_file():
        policy = SitePolicy(
            site=name,
            max_epsilon=plan.privacy.epsilon if plan.privacy.private else 0.0,
            max_holdout_epsilon=plan.site_evaluation.epsilon if plan.site_evaluation else 0.0,
            max_delta=plan.privacy.delta,
            min_patients=max(declared // 2, 5),
            declared_patients=declared,
            modules=[*plan.modules, "evaluation"],
            allow_reproducible_noise=plan.privacy.reproducible_seed is not None,
            allow_not_private=not plan.privacy.private,
        )
        save_policy(policy, site.policy_path)
    if not site.cohort_path.is_dir():
        say(f"Preparing site {name}")
        report = prepare(plan, sources_path, site.cohort_path, np.random.default_rng())
        report.save(report_path(site.cohort_path))
        render(report, Console(stderr=True))
    site.approve(plan)


def _federation(out: Path, plan: StudyPlan, names: list[str], wiretap: Wiretap, backend: Backend) -> StudyState:
    folder = out / "study"
    state = load_state(folder, plan)
    if state is None or not state.finished(plan):
        folders = [out / "sites" / name for name in names]
        if backend == "ray":
            run_over_ray(folder, folders)
        else:
            tap = TranscriptTap(out / "transcript")

            def both(direction: str, node: int, content: bytes) -> None:
                tap(direction, node, content)
                wiretap(direction, node, content)

            grid = InProcessGrid(client_app, dict(enumerate(folders, start=1)), wiretap=both)
            run_in_process(server_app, grid, {"study-folder": str(folder)})
        state = load_state(folder, plan)
    if state is None:
        raise JobFailed("checkpoint_missing", f"The federation ended without a checkpoint in {folder}.")
    return state


@dataclass(frozen=True)
class _Drawn:
    """The synthetic patients, and the real ones that they are held against: possible since every site lies here.

    Attributes:
        bench: the feature networks and the patients of the public generator, made when first asked for.
    """

    synthetic: list[SyntheticPatient]
    train: Patients
    holdout: Patients
    bench: Callable[[], tuple[list[DomainExtractor], list[SyntheticPatient] | None]]


def _drawn(out: Path, plan: StudyPlan, state: StudyState, names: list[str], settings: Settings) -> _Drawn:
    synthetic = synthesise(plan, state, settings.synthetic, torch.Generator().manual_seed(_draw_seed(out, settings)))
    cohorts = {name: load_cohort(out / "sites" / name / "cohort", plan.morphology.features) for name in names}

    @lru_cache(maxsize=1)
    def bench() -> tuple[list[DomainExtractor], list[SyntheticPatient] | None]:
        generator = torch.Generator().manual_seed(settings.seed)
        say("Training feature extractors on a public simulated cohort")
        public = public_cohort(plan, _PUBLIC_PATIENTS, np.random.default_rng([settings.seed, 2]))
        images, targets = extractor_task(public)
        provenance = f"{_PUBLIC_PATIENTS} public simulated patients"
        extractors = [train_extractor(images, targets, generator, provenance) for _ in range(_EXTRACTORS)]
        return extractors, _public_only(out, plan, public, len(synthetic), generator)

    return _Drawn(
        synthetic,
        patients_of({name: cohort.split("train") for name, cohort in cohorts.items()}),
        patients_of({name: cohort.split("holdout") for name, cohort in cohorts.items()}),
        bench,
    )


def _draw_seed(out: Path, settings: Settings) -> int:
    """The seed of the synthetic patients: by the operating system, and kept, since evidence is about these very ones."""
    path = out / "draw.json"
    if not path.is_file():
        seed = settings.reproducible_seed
        write_json(path, {"seed": secrets.randbits(62) if seed is None else seed})
    return int(read_json(path)["seed"])


def _kept(path: Path, model: type[Found], make: Callable[[], Found], fits: Callable[[Found], bool]) -> Found:
    """What lies in `path`, if it `fits`, or else what `make` finds, which is then written there."""
    if path.is_file():
        held = model.model_validate(read_json(path))
        if fits(held):
            return held
    found = make()
    write_json(path, found.model_dump(mode="json"))
    return found


def _evaluation(plan: StudyPlan, state: StudyState, drawn: _Drawn, settings: Settings) -> Evaluation:
    model = profile_model(plan, state.weights)

    def predict(genes: NDArray[np.float32]) -> NDArray[np.floating]:
        return np.asarray(model.predict(torch.from_numpy(genes))[0].numpy())

    extractors, public_only = drawn.bench()
    return evaluate(
        plan,
        drawn.train,
        drawn.holdout,
        drawn.synthetic,
        public_only,
        extractors[0],
        predict,
        _data(settings),
        settings.seed,
        further_extractors=extractors[1:],
    )


def _attacks(out: Path, plan: StudyPlan, drawn: _Drawn, settings: Settings) -> Attacks:
    """Attack the release and, where the messages of training were written down, the training."""
    extractors, public_only = drawn.bench()
    transcript = Transcript(out / "transcript") if (out / "transcript").is_dir() else None
    return attack_release(
        plan,
        drawn.train,
        drawn.holdout,
        drawn.synthetic,
        extractors[0],
        _data(settings),
        settings.seed,
        public_only,
        transcript,
    )


def _public_only(
    out: Path, plan: StudyPlan, public: PublicCohort, count: int, generator: torch.Generator
) -> list[SyntheticPatient] | None:
    """What the public weights make without any private data: the floor that private training has to beat.

    Morphology and labels are those of the public cohort; genes come from the public weights of the plan's profile engine
    or, without any, are independent standard normal values, the plan's public reference. Nothing links the two, since no
    public data do.
    """
    path = out / "study" / "warm-start.safetensors"
    if not path.is_file():
        return None
    weights, _ = load_warm_start(path)
    model = make_generator(plan)
    model.load_state_dict(weights["generator"])
    rows = torch.randint(len(public.labels), (count,), generator=generator)
    if plan.profile_engine == "moments":
        prior = public_prior(sizes(plan), weights[PUBLIC["moments"]])
        genes = LinearGaussianProfiles(prior, plan.genes.clip).draw(count, generator).genes
    elif plan.autoencoder.warm_start is not None:
        autoencoder = make_autoencoder(plan)
        autoencoder.load_state_dict(weights["autoencoder"])
        genes = generate_expression(autoencoder.eval(), count, generator, plan.genes.clip)
    else:
        genes = torch.randn(count, len(plan.genes.panel), generator=generator).clamp(-plan.genes.clip, plan.genes.clip)
    morphology = torch.from_numpy(normalise(public.morphology, plan.morphology.features)).nan_to_num(0.5)
    return draw_patients(
        plan, model, SyntheticProfiles(genes, morphology[rows], torch.from_numpy(public.labels)[rows]), generator
    )


def _data(settings: Settings) -> str:
    return "public research patients" if settings.site_folders else "simulated patients"


def _release(
    out: Path,
    plan: StudyPlan,
    state: StudyState,
    drawn: _Drawn,
    evaluation: Evaluation,
    attacks: Attacks,
    audit: Audit,
    settings: Settings,
) -> None:
    key = out / "keys" / "release.pem"
    key.parent.mkdir(exist_ok=True)
    if not key.is_file():
        generate_key(key)
    # Of an earlier attempt that the gate refused: the same patients are drawn again.
    shutil.rmtree(candidate_path(out / "release"), ignore_errors=True)
    shown = drawn.holdout.rows(drawn.holdout.has_images)
    examples = tuple(
        Example(plan.label.classes[label] if label >= 0 else "label unknown", images.astype(np.float32), mask)
        for label, images, mask in list(zip(shown.labels, shown.images, shown.masks, strict=True))[:_EXAMPLES]
    )
    make_release(
        out / "release",
        plan,
        drawn.synthetic,
        privacy_statement(plan, state),
        evaluation,
        state.curves_by_name(),
        key,
        datetime.now(UTC).replace(microsecond=0),
        real_examples=ReferenceExamples("public" if settings.site_folders else "simulated", examples),
        outcome=study_outcome(plan, state),
        audit=audit,
        attacks=attacks,
        limits=_limits(drawn, attacks),
        override=_override(plan, settings),
        site_evaluation=site_evaluation(plan, state) if state.evaluated else None,
    )


def _limits(drawn: _Drawn, attacks: Attacks) -> Limits:
    """The default limits; where too few patients are held out, without the attacks that need more of them."""
    least = MembershipLimits().least_patients
    held_out = int((drawn.holdout.has_images & drawn.holdout.has_genes).sum())
    if held_out // 2 >= least:  # half of them are the sample of the population that some attackers have
        return Limits()
    return Limits(
        reason=f"Only {held_out} patients were held out. Membership inference against fewer than {least} shows nothing"
        + (f", and this needs more, too: {' '.join(attacks.not_done)}" if attacks.not_done else "."),
        membership=MembershipLimits(views=[]),
        attributes=AttributeLimits(asked=bool(attacks.attributes)),
        copies=CopyLimits(asked={check.of for check in attacks.copies} == {"images", "genes"}),
    )


def _override(plan: StudyPlan, settings: Settings) -> OverrideRequest | None:
    """No noise, or noise that can be made again, protects nobody: here it need not, since the patients are simulated or
    public."""
    causes = {
        "privacy": "" if plan.privacy.private else "The study was trained without privacy.",
        "private": ""
        if plan.privacy.reproducible_seed is None
        else "The noise was seeded so that the run can be repeated.",
    }
    checks = tuple(check for check, cause in causes.items() if cause)
    if not checks:
        return None
    said = " ".join(causes[check] for check in checks)
    return OverrideRequest(f"{said} Its patients are {_data(settings)}.", "whoever ran the simulation", checks)
