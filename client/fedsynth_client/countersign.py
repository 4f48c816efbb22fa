"""Countersigning a release at a site: look at the candidate, hold it against the site's own ledger, sign, remember.

What leaves is one file (`fedsynth.countersignature`): that this site agrees to the content, that its ledger says what the
privacy statement says of it, and, where its staff attacked the synthetic patients with the site's own patients, that
nothing was above the limits. The figures stay here; the file quotes only the SHA-256 of the report. Whether a site signs
is a decision of people who have seen its patients' data, and no differential privacy covers it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from pydantic import ValidationError

from fedsynth.attacks.values import Attacks
from fedsynth.countersignature import (
    EVIDENCE,
    Countersignature,
    OwnAttacks,
    Statement,
    key_hex,
    sign,
)
from fedsynth.deployment.keys import check_private, write_private
from fedsynth.epsilons import shown
from fedsynth.errors import Refused, UsageError
from fedsynth.files import sha256_file, write_atomic
from fedsynth.judging import asks_for_selected, judge
from fedsynth.limits import FILE as LIMITS
from fedsynth.limits import VIEWS, Limits, load_limits
from fedsynth.marks import NO_GUARANTEE, marks
from fedsynth.plan import StudyPlan, load_plan
from fedsynth.released import ReleasedPatients, read_release
from fedsynth.selection import Selected, selection_faults, subset_words, told
from fedsynth.statement import PrivacyStatement, SiteStatement
from fedsynth.sums import content_digest, content_faults
from fedsynth.synthetic import subject_digest
from fedsynth_client.ledger import Entry
from fedsynth_client.site import Site

# Statements round nothing, but accountants of two versions may differ in their last digits.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Prepared:
    """What this site is about to sign, and what its staff read before they do."""

    statement: Statement
    summary: str


def key_path(site: Site) -> Path:
    """Where the site's key for countersignatures lies."""
    return site.folder / "keys" / "countersign.pem"


def log_path(site: Site) -> Path:
    """Where the site remembers what it signed, one JSON object a line."""
    return site.folder / "countersigned.jsonl"


def make_key(site: Site) -> str:
    """Make the site's key (Ed25519, mode 0600) if it has none; returns its public half in hex, as plans name it.

    Raises:
        UsageError, Refused: a key that is there cannot be used.
    """
    path = key_path(site)
    if not path.exists():
        content = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_private(path, content)
    return key_hex(load_key(site).public_key())


def load_key(site: Site) -> Ed25519PrivateKey:
    """The site's key.

    Raises:
        UsageError: ``countersign_key_missing``, ``countersign_key_invalid``.
        Refused: ``key_readable_by_others``, ``key_of_other_owner``.
    """
    path = key_path(site)
    if not path.exists():
        raise UsageError(
            "countersign_key_missing",
            f"There is no key at {path}.",
            "fedsynth site countersign-key makes one; the coordinator puts its public half into the plan.",
        )
    check_private(path)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError("countersign_key_invalid", f"{path} is no unencrypted private key in PEM.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError("countersign_key_invalid", f"{path} is a key of another kind than Ed25519.")
    return key


def prepare(site: Site, candidate: Path, attacks: Path | None) -> Prepared:
    """Check `candidate` as far as this site can, and say what would be signed.

    Args:
        candidate: the folder that the coordinator sent, or a finished release.
        attacks: the report of the site's own attacks on it (`fedsynth evaluate attacks`); it stays here.

    Raises:
        Refused: ``countersigning_not_allowed``: the policy does not. ``candidate_damaged``, ``candidate_of_other_plan``:
            the files are not as listed. ``plan_not_approved``. ``site_not_in_candidate``, ``ledger_disagrees``: the privacy
            statement says something else of this site than its ledger. ``attacks_of_others``, ``attacks_above_limits``.
        UsageError: ``countersign_key_not_in_plan``, ``attacks_unreadable``, a missing key, an unreadable candidate.
    """
    policy = site.policy()
    if not policy.countersign_releases:
        raise Refused(
            "countersigning_not_allowed",
            "The policy does not allow to countersign releases.",
            "Set countersign_releases = true in the policy, if the hospital wants to.",
        )
    if faults := content_faults(candidate):
        raise Refused(
            "candidate_damaged", f"The candidate is not as it was listed: {'; '.join(faults[:5])}.", "Ask for it again."
        )
    plan = _approved(site, candidate)
    _check_key(site, plan, policy.site)
    statement, stated = _stated(candidate, plan, policy.site)
    checked = _ledger_agrees(site, plan, statement, stated)
    patients = read_release(candidate)
    _selected_agrees(patients, plan)
    subject = subject_digest(patients)
    limits = load_limits(candidate / LIMITS)
    own, words = _own_attacks(limits, plan, statement, subject, patients.selected, policy.site, attacks)
    signed = Statement(
        site=policy.site,
        plan_digest=plan.digest,
        content=content_digest(candidate),
        evidence={name: sha256_file(candidate / name) for name in EVIDENCE if (candidate / name).is_file()},
        ledger_head=stated.ledger_head,
        epsilon=stated.epsilon,
        attacks=own,
    )
    lines = [
        f"Release of {len(patients)} synthetic patients of study {plan.name} (plan {plan.digest[:12]}, approved here).",
        f"Content {signed.content}",
        *([] if patients.selected is None else [f"Selected: {' '.join(told(patients.selected, plan))}"]),
        checked,
        words,
        *([f"The limits leave something out, or are loose: {limits.reason}"] if limits.reason else []),
        *([f"Looser than the defaults: {'; '.join(limits.loosened)}."] if limits.loosened else []),
        f"Evidence beside it: {', '.join(sorted(signed.evidence)) or 'none'}.",
        *(["Private: yes."] if statement.private else marks(plan.privacy) or [NO_GUARANTEE]),
        "Your signature says that this site agrees to the release of exactly this content. It tells whoever gets the "
        "release that you agreed, and no figure.",
    ]
    return Prepared(signed, "\n".join(lines))


def countersign(site: Site, prepared: Prepared, out: Path) -> Countersignature:
    """Sign what was prepared: remember it at the site, then write `out` for the coordinator.

    Raises:
        UsageError: ``countersignature_exists``, or the key cannot be used.
    """
    if out.exists() or out.is_symlink():
        raise UsageError("countersignature_exists", f"{out} exists and is not overwritten.", "Name another file.")
    signed = sign(prepared.statement, load_key(site))
    _remember(site, prepared.statement, signed)
    write_atomic(out, (signed.model_dump_json(indent=2) + "\n").encode())
    site.log.info("countersigned content %s of plan %s", prepared.statement.content, prepared.statement.plan_digest)
    return signed


def _approved(site: Site, candidate: Path) -> StudyPlan:
    """The plan of the candidate, which is one that this site approved."""
    plan = load_plan(candidate / "plan.toml")
    if plan.digest not in site.policy().approved_plans:
        raise Refused(
            "plan_not_approved", f"The candidate is of plan {plan.digest}, which is not approved at this site."
        )
    return site.plan(plan.digest)


def _check_key(site: Site, plan: StudyPlan, name: str) -> None:
    mine = key_hex(load_key(site).public_key())
    if plan.site(name).countersign_key != mine:
        raise UsageError(
            "countersign_key_not_in_plan",
            f"The plan does not name this site's key ({mine}).",
            "A key belongs into the plan before it is approved: without it nobody could tell whose signature it is.",
        )


def _stated(candidate: Path, plan: StudyPlan, name: str) -> tuple[PrivacyStatement, SiteStatement]:
    """The candidate's privacy statement, and what it says of this site."""
    try:
        statement = PrivacyStatement.model_validate_json((candidate / "privacy.json").read_bytes())
    except ValidationError:
        raise Refused("candidate_damaged", "privacy.json of the candidate is no privacy statement.") from None
    if (statement.plan_digest, statement.epsilon_budget, statement.delta) != (
        plan.digest,
        plan.privacy.epsilon,
        plan.privacy.delta,
    ):
        raise Refused("candidate_of_other_plan", "privacy.json of the candidate is of another plan than plan.toml.")
    for stated in statement.sites:
        if stated.name == name:
            return statement, stated
    raise Refused("site_not_in_candidate", f"The candidate's privacy statement does not name this site ({name}).")


def _selected_agrees(patients: ReleasedPatients, plan: StudyPlan) -> None:
    """What staff read of the selection before they sign is true of the patients in the candidate."""
    if patients.selected is None:
        return
    if faults := selection_faults(patients.selected, plan, patients.labels, patients.morphology):
        raise Refused(
            "candidate_damaged",
            f"The patients of the candidate are not those that it says were selected: {'; '.join(faults)}.",
            "Do not sign. Ask for another candidate.",
        )


def _ledger_agrees(site: Site, plan: StudyPlan, statement: PrivacyStatement, stated: SiteStatement) -> str:
    """Compare what is stated of this site with its whole ledger: entry, epsilon of both kinds of patients, and noise."""
    ledger = site.ledger()
    entries = ledger.entries()
    place = next((entry.sequence for entry in entries if entry.digest == stated.ledger_head), None)
    if place is None:
        raise Refused(
            "ledger_disagrees",
            f"The privacy statement quotes the ledger entry {stated.ledger_head[:12]}, which this ledger does not have.",
            "Do not sign. The statement is about another ledger, or this one is an older copy.",
        )
    delta, accountant = plan.privacy.delta, plan.privacy.accountant
    spent = ledger.epsilon(delta, accountant, plan.digest)
    _check_spent("training", stated.epsilon, spent)
    evaluated = any(entry.kind == "charge" and _is_evaluation(entry, plan) for entry in entries)
    words = ""
    if stated.holdout is not None or evaluated:
        held_out = ledger.epsilon(delta, accountant, plan.digest, population="holdout")
        words = _held_out_agree(plan, stated, held_out)
    if statement.private and not ledger.is_private(plan.digest):
        raise Refused(
            "ledger_disagrees",
            "The statement calls the study private; at this site some of it had no noise, or noise from a seed.",
        )
    return (
        f"This site spent epsilon {shown(spent, 4)} of {plan.privacy.epsilon:g} at delta {delta:g}: its ledger says so; the "
        f"statement quotes entry {place} of {len(entries)}.{words}"
    )


def _held_out_agree(plan: StudyPlan, stated: SiteStatement, spent: float) -> str:
    """Compare what is stated of held-out patients with what they spent; returns what is to be said of it.

    A coordinator that received no answer states nothing of them and asks once only, so an answer that was charged and lost
    must not keep the site from signing for ever. Silence means at most the plan's budget (`fedsynth.statement`).
    """
    budget = plan.site_evaluation.epsilon if plan.site_evaluation else 0.0
    if stated.holdout is not None or spent > budget + _TOLERANCE:
        _check_spent("held-out", stated.holdout.epsilon if stated.holdout else 0.0, spent)
        return ""
    return (
        f" Its held-out patients spent {spent:.4f} of {budget:g}, of which the statement says nothing: the coordinator "
        "counted no answer of the evaluation. Ask why, if the site sent one."
    )


def _is_evaluation(entry: Entry, plan: StudyPlan) -> bool:
    return bool(entry.body["study"] == plan.digest and entry.body["module"] == "evaluation")


def _check_spent(people: str, stated: float, spent: float) -> None:
    if not math.isclose(stated, spent, rel_tol=0.0, abs_tol=_TOLERANCE):
        raise Refused(
            "ledger_disagrees",
            f"The privacy statement says that this site spent epsilon {shown(stated, 4)} of {people} patients in this "
            f"study; its ledger says {shown(spent, 4)}.",
            "Do not sign. Where the site has answered since, ask for a candidate whose statement counts everything.",
        )


def _own_attacks(
    limits: Limits,
    plan: StudyPlan,
    statement: PrivacyStatement,
    subject: str,
    selected: Selected | None,
    name: str,
    path: Path | None,
) -> tuple[OwnAttacks | None, str]:
    """What is stated of the site's own attacks, and in words what they found, which is for the site's staff alone."""
    if path is None:
        asked = "The limits ask for them: without them the gate may refuse." if limits.asks_for_attacks else ""
        return None, f"Nothing is said of attacks: no report was given. {asked}".strip()
    try:
        content = path.read_bytes()
        attacks = Attacks.model_validate_json(content)
    except (OSError, ValidationError) as error:
        raise UsageError("attacks_unreadable", f"{path} is no report of attacks ({type(error).__name__}).") from None
    if attacks.subject != subject or attacks.plan_digest != plan.digest:
        raise Refused(
            "attacks_of_others",
            "The attacks were run with other synthetic patients than those of this candidate.",
            "Run fedsynth evaluate attacks on this candidate.",
        )
    if attacks.sites != [name]:
        raise Refused(
            "attacks_on_others",
            f"The attacks were run on patients of {', '.join(attacks.sites)}, and this site speaks for its own ({name}).",
            f"Run fedsynth evaluate attacks on this candidate with --cohort {name}=SITE alone.",
        )
    views = [view for view in VIEWS if any(attack.view == view for attack in attacks.membership)]
    part = any(attack.of_selected for attack in attacks.membership)
    claimed = {site.name: site.epsilon for site in statement.sites}
    judgements = judge(attacks, limits, views, claimed, selected=part)
    failed = [judgement for judgement in judgements if judgement.status == "failed"]
    if failed:
        raise Refused(
            "attacks_above_limits",
            "The attacks are not within the limits, so that cannot be signed: "
            + " ".join(judgement.finding for judgement in failed),
            "Do not sign. Tell the coordinator that you do not; the figures need not leave.",
        )
    own = OwnAttacks(report=hashlib.sha256(content).hexdigest(), subject=subject, views=views, selected=part)
    left = [str(view) for view in limits.membership.views if view not in views]
    if selected is not None and subset_words(selected.asked, plan) and asks_for_selected(limits) and not part:
        left.append("those alone who fit what was selected")
    missing = f" Not tried, though asked for: {', '.join(left)}." if left else ""
    found = " ".join(judgement.finding for judgement in judgements)
    return own, f"Your attacks are within the limits.{missing} For your eyes only: {found}"


def _remember(site: Site, statement: Statement, signed: Countersignature) -> None:
    """Add a line to the site's record of signatures; the whole file is written anew, or not at all."""
    path = log_path(site)
    line = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "statement": statement.model_dump(mode="json"),
        "signature": signed.signature,
    }
    before = path.read_bytes() if path.exists() else b""
    write_atomic(path, before + json.dumps(line, sort_keys=True).encode() + b"\n")
