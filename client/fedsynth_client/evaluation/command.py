"""What `fedsynth evaluate` does: read, compute, write one file whole or not at all, say what was found."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from fedsynth.cli import envelope
from fedsynth.errors import JobFailed, UsageError
from fedsynth.evaluation.values import NOT_PUBLIC
from fedsynth.files import write_json
from fedsynth.plan import load_plan
from fedsynth.progress import say
from fedsynth.released import ReleasedPatients, read_release
from fedsynth_client.evaluation.cohorts import Evaluated, evaluated_patients, named_folders
from fedsynth_client.evaluation.show import show_attacks, show_audit, show_evaluation

_PUBLIC, _UNSAID = "public or simulated patients", "real patients"
WARNING = (
    "These figures were computed on real patients without privacy. They are no part of the release's guarantee: keep the "
    "file where it was written."
)


@dataclass(frozen=True)
class Asked:
    """What was typed.

    Attributes:
        release: the release's folder.
        cohorts: ``NAME=FOLDER`` each.
        out: the file to write.
        data: what the real patients are, for the reader.
        public: they are public or simulated.
        seed: of every random draw.
        as_json: one JSON object in place of tables.
    """

    release: Path
    cohorts: tuple[str, ...]
    out: Path
    data: str
    public: bool
    seed: int
    as_json: bool

    @property
    def description(self) -> str:
        """What the real patients are, and whether what is found on them may be passed on."""
        if self.public:
            return self.data or _PUBLIC
        return f"{self.data or _UNSAID} ({NOT_PUBLIC})"


def evaluate_release(asked: Asked, extractors: tuple[Path, ...] = (), lpips: Path | None = None) -> None:
    """Measure a release, write the evaluation, and print it.

    Args:
        asked: what was typed.
        extractors: files of feature networks, for figures of their own.
        lpips: file of a learned perceptual distance.

    Raises:
        UsageError, Refused: see `read_release`, `evaluated_patients`, `load_onnx` and `evaluate`; ``result_exists``.
    """
    from fedsynth.evaluation.evaluate import evaluate
    from fedsynth.metrics.onnx_network import load_onnx, onnx_ensemble

    _require_new(asked.out)
    networks = [onnx_ensemble(load_onnx(path)) for path in extractors]
    distance = None if lpips is None else load_onnx(lpips, "distance")
    synthetic, real = _read(asked)
    started = time.monotonic()
    found = evaluate(
        synthetic.plan,
        real.train,
        real.holdout,
        synthetic,
        public_only=None,
        extractor=None,
        predict_morphology=None,
        data=asked.description,
        seed=asked.seed,
        networks=networks,
        lpips=distance,
        selected=synthetic.selected,
    )
    _finish(asked.out, found, started, private=not asked.public)
    if asked.as_json:
        envelope({"file": str(asked.out), "evaluation": found.model_dump(mode="json")})
    else:
        show_evaluation(found)


def attack(asked: Asked, transcript: Path | None = None) -> None:
    """Attack a release, write what was found, and print it.

    Args:
        asked: what was typed.
        transcript: folder of every message of the study's training (`fedsynth.attacks.transcript`), for a coordinator who
            attacks.

    Raises:
        UsageError, Refused: see `read_release`, `evaluated_patients` and `attack_release`; ``result_exists``.
    """
    from fedsynth.attacks.run import attack_release
    from fedsynth.attacks.transcript import Transcript

    _require_new(asked.out)
    if transcript is not None and not transcript.is_dir():
        raise UsageError("transcript_missing", f"There is no folder {transcript}.")
    synthetic, real = _read(asked, of_the_study=True)
    started = time.monotonic()
    found = attack_release(
        synthetic.plan,
        real.train,
        real.holdout,
        synthetic,
        extractor=None,
        data=asked.description,
        seed=asked.seed,
        transcript=None if transcript is None else Transcript(transcript),
        selected=synthetic.selected,
    )
    _finish(asked.out, found, started, private=not asked.public)
    if asked.as_json:
        envelope({"file": str(asked.out), "attacks": found.model_dump(mode="json")})
    else:
        show_attacks(found)


def audit_mechanisms(plan_path: Path, out: Path, as_json: bool) -> None:
    """Audit the mechanisms of the plan in `plan_path`, write what was found, and print it.

    Raises:
        UsageError: the plan cannot be read; ``result_exists``.
        JobFailed: ``audit_failed``, after the result was written: the audit refutes what the plan claims.
    """
    from fedsynth_client.auditing.run import audit_plan

    _require_new(out)
    plan = load_plan(plan_path)
    started = time.monotonic()
    found = audit_plan(plan)
    _finish(out, found, started, private=False)
    if not as_json:
        show_audit(found)
    if not found.ok:
        failed: list[str] = [module.module for module in found.modules if not module.ok]
        failed += [check.title for check in found.checks if not check.ok]
        raise JobFailed(
            "audit_failed",
            f"The audit refutes what is claimed ({'; '.join(failed)}).",
            f"Train nothing with this code and plan before it is explained; {out} holds the numbers.",
        )
    if as_json:
        envelope({"file": str(out), "audit": found.model_dump(mode="json")})


def _read(asked: Asked, of_the_study: bool = False) -> tuple[ReleasedPatients, Evaluated]:
    """What is cheap to refuse is refused before anything is computed.

    Args:
        of_the_study: the cohorts must be those of sites that the release's plan names. On anybody else nobody trained, and
            an attack that guesses their membership finds nothing, whatever the model remembers of its own patients.
    """
    folders = named_folders(asked.cohorts)
    say("Reading the release")
    synthetic = read_release(asked.release)
    sites = [site.name for site in synthetic.plan.sites]
    if of_the_study and (strangers := sorted(folders.keys() - set(sites))):
        raise UsageError(
            "cohort_not_of_study",
            f"--cohort {', '.join(strangers)}: the release's plan has no such site, so nobody trained on its patients.",
            f"Name the cohorts of its sites as the plan does: {', '.join(sites)}.",
        )
    say(f"Reading {len(folders)} cohort{'s' if len(folders) > 1 else ''}")
    return synthetic, evaluated_patients(synthetic.plan, folders)


def _require_new(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UsageError("result_exists", f"{out} exists and is not overwritten.", "Name another file.")
    if not out.parent.is_dir():
        raise UsageError("folder_missing", f"There is no folder {out.parent} to write into.")


def _finish(out: Path, found: BaseModel, started: float, private: bool) -> None:
    """Write the result; what was computed on patients who are not public is for its owner's eyes."""
    write_json(out, found.model_dump(mode="json"))
    if private:
        out.chmod(0o600)
        say(f"Warning: {WARNING}")
    say(f"Wrote {out} after {time.monotonic() - started:.0f} s.")
