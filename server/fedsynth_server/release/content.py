"""What a release must hold beside its images: files, tables, privacy statement; and the list of all content checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedsynth.countersignature import EVIDENCE, FOLDER
from fedsynth.marks import marks
from fedsynth.plan import PrivacyPlan, StudyPlan
from fedsynth.selection import selection_faults
from fedsynth.statement import SiteStatement
from fedsynth.sums import CONTENT, content_faults, files_of, is_content
from fedsynth_server.release.bids import REQUIRED as REQUIRED_OF_BIDS
from fedsynth_server.release.facts import not_private
from fedsynth_server.release.imagery import file_faults, geometry_faults, identifier_faults, synthetic_faults
from fedsynth_server.release.opened import Release, read_tsv
from fedsynth_server.release.patients import PARTICIPANT_ID
from fedsynth_server.release.tables import EXPRESSION, EXPRESSION_PARQUET, KEY, MORPHOLOGY, PARTICIPANTS

REQUIRED = (
    "README.md",
    "LICENSE",
    "croissant.json",
    "curves.json",
    "datapackage.json",
    "plan.toml",
    "preview.png",
    "privacy.json",
    "release.json",
    "report.html",
    PARTICIPANTS,
    MORPHOLOGY,
    EXPRESSION,
    EXPRESSION_PARQUET,
)
# Since there is a gate; releases of earlier versions lack them.
REQUIRED_OF_GATE = (CONTENT, "gate.json", "limits.toml")
# What is made after the gate let a release pass.
MADE_LAST = frozenset(
    {
        "CONTENT.SHA256SUMS",
        "DATASHEET.md",
        "README.md",
        "SHA256SUMS",
        "SHA256SUMS.sig",
        "croissant.json",
        "gate.json",
        "release.pub.pem",
        "report.html",
    }
)
GENES = frozenset({EXPRESSION, EXPRESSION_PARQUET})
# What a release may hold beside.
OUTCOME = "outcome.json"
# Versions of an accountant differ by less than this; a false statement by more.
_EPSILON_TOLERANCE = 0.01


def structure_faults(release: Release) -> list[str]:
    """Files that every release must have, and trees that it has without saying so."""
    required = [*REQUIRED, *(REQUIRED_OF_GATE if release.has_gate else ())]
    faults = [f"missing: {name}" for name in required if not (release.folder / name).is_file()]
    if release.has_gate:
        faults += [
            f"no release holds {name}"
            for name in files_of(release.folder)
            if not (is_content(name) or name in MADE_LAST or name in EVIDENCE or name.startswith(f"{FOLDER}/"))
        ]
    elif any(site.countersign_key is not None for site in release.plan.sites):
        faults.append("sites reserved in the plan to countersign, which this version of a release has no place for")
    return faults + _tree_faults(release)


def listed_faults(release: Release) -> list[str]:
    """What sites countersign is all there and as ``CONTENT.SHA256SUMS`` lists it."""
    return content_faults(release.folder) + _tree_faults(release) if release.has_gate else []


def _tree_faults(release: Release) -> list[str]:
    required = [f"bids/{name}" for name in REQUIRED_OF_BIDS] if release.has_bids else []
    faults = [f"missing: {name}" for name in required if not (release.folder / name).is_file()]
    for name in ("bids", "dicom"):
        if (release.folder / name).exists() != (name in release.index.formats):
            faults.append(f"release.json and the folder disagree on {name}/")
    return faults


def participants_faults(release: Release) -> list[str]:
    """Every participant has a row in each table and each of its images, nobody else has, and they are as selected."""
    plan, folder, participants = release.plan, release.folder, release.participants
    faults = []
    if len(participants) != release.index.n_patients or len(set(participants)) != len(participants):
        faults.append(f"{PARTICIPANTS} does not list {release.index.n_patients} different participants")
    faults += [f"participant id {name!r}" for name in participants if not PARTICIPANT_ID.fullmatch(name)]
    if faults:
        return faults
    columns = {PARTICIPANTS: [plan.label.name], MORPHOLOGY: plan.morphology.features, EXPRESSION: plan.genes.panel}
    beside = {
        PARTICIPANTS: "participants.tsv",
        MORPHOLOGY: "phenotype/morphology.tsv",
        EXPRESSION: "phenotype/expression.tsv",
    }
    for name, expected in columns.items():
        table = read_tsv(folder / name)
        faults += _table_faults(name, table, expected, participants)
        if release.has_bids:
            prefixed = (table[0], [[f"sub-{row[0]}", *row[1:]] for row in table[1]])
            if read_tsv(folder / "bids" / beside[name]) != prefixed:
                faults.append(f"bids/{beside[name]} and {name} disagree")
    unknown = {row[1] for row in read_tsv(folder / PARTICIPANTS)[1]} - set(plan.label.classes)
    faults += [f"label {label!r} is not in the plan" for label in sorted(unknown)]
    if not faults:
        faults += _parquet_faults(folder)
    genes = {path.relative_to(folder).as_posix() for path in (folder / "genes").rglob("*") if path.is_file()}
    faults += [f"unexpected: {name}" for name in sorted(genes - GENES)]
    if not faults and release.selected is not None:
        morphology = np.array([row[1:] for row in read_tsv(folder / MORPHOLOGY)[1]], dtype=np.float32)
        labels = [row[1] for row in read_tsv(folder / PARTICIPANTS)[1]]
        faults += selection_faults(release.selected, plan, labels, morphology)
    return faults + file_faults(release)


def privacy_faults(release: Release) -> list[str]:
    """The statement is of this plan, and no site spent more than the plan allows."""
    plan, statement = release.plan, release.statement
    faults = []
    if not statement.plan_digest == plan.digest == release.index.plan_digest:
        faults.append("privacy.json, release.json and plan.toml are not of the same plan")
    if statement.epsilon_budget != plan.privacy.epsilon or statement.delta != plan.privacy.delta:
        faults.append("budget or delta of privacy.json are not those of plan.toml")
    if statement.private:
        faults += [f"privacy.json says private although the plan is {mark}" for mark in marks(plan.privacy)]
    if statement.private != release.index.private:
        faults.append("privacy.json and release.json disagree on whether the release is private")
    known = {site.name for site in plan.sites}
    if not statement.sites:
        faults.append("privacy.json names no site")
    for site in statement.sites:
        if site.name not in known:
            faults.append(f"site {site.name!r} is not in the plan")
        if not 0 <= site.epsilon <= plan.privacy.epsilon:
            faults.append(f"site {site.name}: epsilon {site.epsilon:.4g} is not within {plan.privacy.epsilon:.4g}")
        if site.epsilon_lifetime < site.epsilon:
            faults.append(f"site {site.name}: epsilon of all studies is below that of this one")
        faults += _recomputed_faults(site, plan.privacy)
        if not plan.privacy.private:
            faults += _bare_faults(site)
        faults += _holdout_faults(site, plan)
    if statement.holdout_epsilon_budget != (plan.site_evaluation.epsilon if plan.site_evaluation else None):
        faults.append("the budget of held-out patients in privacy.json is not that of plan.toml")
    return faults


def _bare_faults(site: SiteStatement) -> list[str]:
    """Nothing was noised in a study without privacy, so nobody may state that it was, nor an epsilon that it gave."""
    faults = []
    if math.isfinite(site.epsilon):
        faults.append(f"site {site.name}: epsilon {site.epsilon:.4g} in a study without privacy")
    faults += [
        f"site {site.name}: {each.module} with noise in a study without privacy"
        for each in site.mechanisms
        if each.noise_multiplier != 0 or math.isfinite(each.epsilon_alone)
    ]
    return faults


def _holdout_faults(site: SiteStatement, plan: StudyPlan) -> list[str]:
    """Held-out patients spent what the plan allows, and not less than the noise of their one sum costs."""
    from fedsynth.dp.accounting import Mechanism, epsilon

    if site.holdout is None:
        return []
    if plan.site_evaluation is None:
        return [f"site {site.name}: held-out patients spent epsilon although the plan has no evaluation"]
    spent, budget = site.holdout.epsilon, plan.site_evaluation.epsilon
    faults = []
    if not 0 <= spent <= budget * (1 + 1e-6):
        faults.append(f"site {site.name}: held-out patients spent epsilon {spent:.4g}, not within {budget:.4g}")
    cost = epsilon([Mechanism(1.0, site.holdout.noise_multiplier, 1)], plan.privacy.delta, plan.privacy.accountant)
    if cost > spent * (1 + _EPSILON_TOLERANCE):
        faults.append(f"site {site.name}: the sum over held-out patients costs epsilon {cost:.4g}, more than stated")
    return faults


def outcome_faults(release: Release) -> list[str]:
    """The comparison with the forecast, where there is one, is of this plan and its modules."""
    if not (release.folder / OUTCOME).is_file():
        return []
    from fedsynth_server.outcome import Outcome

    outcome = Outcome.model_validate_json((release.folder / OUTCOME).read_bytes())
    faults = [] if outcome.plan_digest == release.plan.digest else [f"{OUTCOME} is not of plan.toml"]
    if [found.module for found in outcome.modules] != list(release.plan.modules):
        faults.append(f"{OUTCOME} does not have one entry for each module of the plan")
    return faults


def _recomputed_faults(site: SiteStatement, privacy: PrivacyPlan) -> list[str]:
    """Compose the mechanisms that the site states: they may not cost more than the epsilon that it states."""
    from fedsynth.dp.accounting import Mechanism, epsilon

    try:
        history = [Mechanism(m.sample_rate, m.noise_multiplier, m.steps) for m in site.mechanisms if m.steps != 0]
        cost = epsilon(history, privacy.delta, privacy.accountant)
    except ValueError as error:
        return [f"site {site.name}: its mechanisms cannot be composed: {error}"]
    if cost > site.epsilon * (1 + _EPSILON_TOLERANCE):
        return [f"site {site.name}: its mechanisms cost epsilon {cost:.4g}, more than the {site.epsilon:.4g} stated"]
    return []


# Name, what holds when there is no fault, test; in the order in which they are shown.
CHECKS: tuple[tuple[str, str, Callable[[Release], list[str]]], ...] = (
    ("content", "what sites countersign is as it was listed", listed_faults),
    ("participants", "every participant has genes, morphology, images and mask", participants_faults),
    ("geometry", "images lie on the plan's grid; NIfTI and DICOM agree", geometry_faults),
    ("synthetic", "every image says that it is synthetic", synthetic_faults),
    ("identifiers", "no header holds anything but what a release writes", identifier_faults),
    ("privacy", "the privacy statement is of this plan and within its budget", privacy_faults),
    ("outcome", "what is said of forecast and outcome, if anything, is of this plan", outcome_faults),
)


def warnings(release: Release) -> list[str]:
    """What a recipient must know although nothing is wrong with the files."""
    found = not_private(release.plan, release.statement)
    return [found] if found else []


def _table_faults(
    name: str, table: tuple[list[str], list[list[str]]], columns: list[str], participants: list[str]
) -> list[str]:
    header, rows = table
    faults = []
    if header != [KEY, *columns]:
        faults.append(f"{name} does not have the columns of the plan")
    if [row[0] for row in rows] != participants:
        faults.append(f"{name} does not have one row for each participant")
    if name != PARTICIPANTS and not all(_is_number(value) for row in rows for value in row[1:]):
        faults.append(f"{name} holds a value that is no finite number")
    return faults


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _parquet_faults(folder: Path) -> list[str]:
    from pyarrow import parquet

    header, rows = read_tsv(folder / EXPRESSION)
    table = parquet.read_table(folder / EXPRESSION_PARQUET)
    if table.column_names != header or table.column(KEY).to_pylist() != [row[0] for row in rows]:
        return [f"{EXPRESSION_PARQUET} and {EXPRESSION} disagree on genes or participants"]
    values = np.array([row[1:] for row in rows], dtype=np.float32)
    same = all(np.array_equal(table.column(gene).to_numpy(), values[:, i]) for i, gene in enumerate(header[1:]))
    return [] if same else [f"{EXPRESSION_PARQUET} and {EXPRESSION} disagree on values"]
