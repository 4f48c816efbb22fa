"""The gate: every condition under which synthetic patients may be released, each checked on the files themselves.

Whoever makes a release decides by these functions, and whoever verifies one decides again by the same functions from the
evidence that lies in it: a decision that the evidence does not bear out is found.

At the coordinator there are no real patients. Attacks and the search for copies are either those of a file (simulated or
public patients), or they were made at every contributing site, which says so in its countersignature, and keeps the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from fedsynth import __version__
from fedsynth.attacks.values import Attacks, View
from fedsynth.auditing.code import code_digest
from fedsynth.auditing.values import Audit, AuditedModule
from fedsynth.budget import private_activities
from fedsynth.countersignature import FOLDER, OwnAttacks, Statement, key_pem, signed_by
from fedsynth.epsilons import shown
from fedsynth.errors import Refused
from fedsynth.evaluation.site_values import FILE as SITE_EVALUATION
from fedsynth.evaluation.values import may_be_shared
from fedsynth.files import read_json, sha256_file
from fedsynth.judging import (
    SEES,
    Judgement,
    asks_for_selected,
    judge_attributes,
    judge_copies,
    judge_membership,
    judge_selected,
)
from fedsynth.plan import Activity, StudyPlan
from fedsynth.selection import subset_words
from fedsynth.sums import content_digest
from fedsynth_server.release.checks import Check
from fedsynth_server.release.decision import GateCheck, GateDecision, override_is_signed
from fedsynth_server.release.evidence import ATTACKS, AUDIT, EVALUATION, Evidence, read_evidence
from fedsynth_server.release.facts import SOFTWARE
from fedsynth_server.release.opened import Release
from fedsynth_server.release.subject import subject_of

FILE = "gate.json"
SOFTWARE_VERSION = f"{SOFTWARE} {__version__}"

# The content checks that a gate check of their own reports.
_IDENTIFIERS, _PRIVACY = "identifiers", "privacy"
_DO_NOT = "Nobody can answer for this: make the release anew."


def decide(release: Release, evidence: Evidence, content: Sequence[Check], code: str) -> GateDecision:
    """Check every condition; an override is not decided here.

    Args:
        release: the finished release, or the candidate of one.
        evidence: what lies in it.
        content: the checks of its content (`fedsynth_server.release.checks.content_checks`).
        code: digest of the sources that the audit must be of (`fedsynth.auditing.code.code_digest`).

    Raises:
        Refused: the patients cannot be read from the files.
    """
    subject = subject_of(release)
    signed = _Signed(release, evidence, content_digest(release.folder), subject)
    checks = [
        _ledgers(release, evidence, content),
        *_privacy(release),
        _audit(release, evidence.audit, code),
        _membership(release, evidence, signed, subject, "release"),
        *_selected(release, evidence, signed, subject),
        _membership(release, evidence, signed, subject, "coordinator"),
        _attributes(evidence, signed, subject),
        _copies(evidence, signed, subject),
        _evidence(release, evidence, subject),
        _files(content),
        _identifiers(content),
        _countersignatures(release, signed),
    ]
    return GateDecision(
        plan_digest=release.plan.digest, subject=subject, content=signed.content, code=code, checks=checks
    )


def _ledgers(release: Release, evidence: Evidence, content: Sequence[Check]) -> GateCheck:
    """Every site that contributed states an entry of its ledger, within budget; so do its held-out patients, if asked."""
    statement = release.statement
    stated = {site.name: site for site in statement.sites}
    faults = [check.reason for check in content if check.name == _PRIVACY and check.status != "ok"]
    for site, modules in _contributions(release).items():
        if site not in stated:
            faults.append(f"site {site} contributed, but no receipt of its ledger is there")
            continue
        charged = {mechanism.module for mechanism in stated[site].mechanisms}
        faults += [f"site {site} contributed to {module}, which it states no charge of" for module in modules - charged]
    faults += [
        f"site {site.name} states no entry of its ledger" for site in statement.sites if not _head(site.ledger_head)
    ]
    for scores in evidence.site_evaluation.sites if evidence.site_evaluation else []:
        account = stated[scores.site].holdout if scores.site in stated else None
        if account is None or abs(account.epsilon - scores.epsilon) > 1e-9:
            faults.append(f"site {scores.site} evaluated, but its account of held-out patients is not in the statement")
        elif abs(account.noise_multiplier - scores.noise_multiplier) > 1e-9:
            faults.append(
                f"site {scores.site} evaluated with the noise multiplier {scores.noise_multiplier:g}; the statement says "
                f"{account.noise_multiplier:g}"
            )
    if evidence.site_evaluation and statement.private and not evidence.site_evaluation.private:
        faults.append("the sites evaluated with reproducible noise, though the statement calls all noise unpredictable")
    spent = "; ".join(
        f"{site.name} epsilon {shown(site.epsilon)}"
        + (f" (held-out patients {site.holdout.epsilon:.3f})" if site.holdout else "")
        + f", ledger entry {site.ledger_head[:12]}"
        for site in statement.sites
    )
    return _final(
        "ledgers",
        "Ledgers of the sites",
        faults,
        f"Every contributing site states an entry of its ledger, within the budget of epsilon "
        f"{shown(statement.epsilon_budget, 2)} at delta {statement.delta:g}: {spent}.",
        "Ask the sites named for the receipts of their ledgers (fedsynth site ledger). What was spent cannot be taken back: "
        "above the budget this study must not be released.",
    )


def _contributions(release: Release) -> dict[str, set[str]]:
    """Modules by site, as the training curves tell who sent what."""
    found: dict[str, set[str]] = {}
    for module, rows in read_json(release.folder / "curves.json").items():
        for row in rows:
            if "site" in row:
                found.setdefault(str(row["site"]), set()).add(module)
    return found


def _head(digest: str) -> bool:
    return len(digest) == 64 and set(digest) <= set("0123456789abcdef") and set(digest) != {"0"}


def _privacy(release: Release) -> list[GateCheck]:
    """What the guarantee rests on; a study without privacy has none, and its noise, if any, is another matter."""
    if release.plan.privacy.private:
        return [_private(release)]
    without = GateCheck(
        id="privacy",
        title="Trained with privacy",
        status="failed",
        finding="The study was trained without privacy: nothing of its patients was clipped or noised, every epsilon is "
        "infinite, and this release may hold what their data looked like.",
        remedy="Run the study again with a finite privacy.epsilon, on patients who took part in no study without privacy. "
        "Only of simulated or public patients may this be released, and somebody has to say that it is so (an override).",
    )
    return [without] if release.plan.privacy.reproducible_seed is None else [without, _private(release)]


def _private(release: Release) -> GateCheck:
    private = release.statement.private
    return GateCheck(
        id="private",
        title="Unpredictable noise",
        status="ok" if private else "failed",
        finding=f"Noise came from: {release.statement.noise_source}."
        if private
        else "The noise was reproducible: whoever knows its seed can take it away, and no epsilon guarantees anything.",
        remedy=""
        if private
        else "Run the study again without privacy.reproducible_seed. Only of simulated or public "
        "patients may this be released, and somebody has to say that it is so (an override).",
    )


def _audit(release: Release, audit: Audit | None, code: str) -> GateCheck:
    """The mechanisms of this plan were audited, by this code, and nothing that is claimed was refuted."""
    plan = release.plan
    private = private_activities(plan)
    if not private:
        return _check("audit", _AUDIT, Judgement("not asked", "A study without privacy has no mechanism to audit."))
    if audit is None:
        return _check("audit", _AUDIT, Judgement("failed", "No audit of the plan's mechanisms was given.", _RUN_AUDIT))
    stale = [] if audit.plan_digest == plan.digest else [f"it is of plan {audit.plan_digest[:12]}"]
    if audit.code != code:
        stale.append(f"it is of other code ({audit.code[:12]}, by {audit.software}) than this ({code[:12]})")
    unaudited = sorted(set(private) - {module.module for module in audit.modules})
    stale += [f"{module} was not audited" for module in unaudited]
    if not audit.checks:
        stale.append("no property of the mechanisms was tested directly")
    stale += [
        f"{module.module} at {module.site} claims epsilon {module.claimed_epsilon:.3f}, more than the plan's budget"
        for module in audit.modules
        if module.claimed_epsilon > _budget(plan, module.module) * (1 + 1e-6)
    ]
    stale += [
        f"its run of {module.module} could have refuted no epsilon at all ({module.canaries} canaries)"
        for module in audit.modules
        if module.reachable <= 0
    ]
    used = _noise(release)
    stale += [
        f"{module.module} at {module.site} was audited with the noise multiplier {module.noise_multiplier:g}; the study "
        f"used {used[_where(module)]:g}"
        for module in audit.modules
        if module.noise_multiplier > used.get(_where(module), module.noise_multiplier) * (1 + 1e-6)
    ]
    refuted = [f"{found.title}: {found.finding}" for found in audit.checks if not found.ok]
    refuted += [
        f"{found.module} at {found.site}: epsilon is at least {found.epsilon_bound:.3f} ({found.confidence:.0%} "
        f"confidence), {found.epsilon_bound - found.claimed_epsilon:.3f} above the {found.claimed_epsilon:.3f} claimed"
        for found in audit.modules
        if not found.ok
    ]
    if refuted:
        return _check("audit", _AUDIT, Judgement("failed", f"{'; '.join(refuted)}.", _REFUTED, refuted=True))
    if stale:
        return _check(
            "audit", _AUDIT, Judgement("failed", f"The audit does not count: {'; '.join(stale)}.", _RUN_AUDIT)
        )
    bounds = "; ".join(
        f"{found.module} at least {found.epsilon_bound:.2f} of {found.claimed_epsilon:.2f} claimed"
        for found in audit.modules
    )
    return _check(
        "audit", _AUDIT, Judgement("ok", f"{len(audit.checks)} properties hold; no epsilon is refuted: {bounds}.")
    )


def _where(module: AuditedModule) -> tuple[str, str]:
    return module.site, module.module


def _noise(release: Release) -> dict[tuple[str, str], float]:
    """The noise multiplier of each site and module, as the privacy statement says."""
    found: dict[tuple[str, str], float] = {}
    for site in release.statement.sites:
        found |= {(site.name, mechanism.module): mechanism.noise_multiplier for mechanism in site.mechanisms}
        if site.holdout is not None:
            found[site.name, "evaluation"] = site.holdout.noise_multiplier
    return found


def _budget(plan: StudyPlan, module: Activity) -> float:
    """What the patients may spend whom `module` takes."""
    if module == "evaluation":
        return 0.0 if plan.site_evaluation is None else plan.site_evaluation.epsilon
    return plan.privacy.epsilon


_AUDIT = "Audit of the mechanisms"
_RUN_AUDIT = "Run `fedsynth evaluate audit PLAN --out FILE` with this very version and give the file with --audit."
_REFUTED = (
    "Do not release: the code does not do what the privacy statement claims. Find the fault, mend it, and train anew under "
    "a new plan; tell the sites, whose patients may have been less protected than they were told."
)


def _membership(release: Release, evidence: Evidence, signed: _Signed, subject: str, view: View) -> GateCheck:
    claimed = {site.name: site.epsilon for site in release.statement.sites}
    return _attacked(
        f"membership-{view}",
        f"Membership inference from {SEES[view]}",
        evidence.attacks,
        signed,
        subject,
        lambda attacks: judge_membership(attacks, evidence.limits, view, claimed),
        asked=view in evidence.limits.membership.views,
        reason=evidence.limits.reason,
        covered=lambda own: view in own.views,
    )


def _selected(release: Release, evidence: Evidence, signed: _Signed, subject: str) -> list[GateCheck]:
    """Membership inference once more, of those who are in the part of all patients that was selected; if one was."""
    if release.selected is None or not (part := subset_words(release.selected.asked, release.plan)):
        return []
    claimed = {site.name: site.epsilon for site in release.statement.sites}
    return [
        _attacked(
            "membership-selected",
            f"Membership inference from the release, of those alone who fit what was selected ({part})",
            evidence.attacks,
            signed,
            subject,
            lambda attacks: judge_selected(attacks, evidence.limits, claimed),
            asked=asks_for_selected(evidence.limits),
            reason=evidence.limits.reason,
            covered=lambda own: own.selected,
        )
    ]


def _attributes(evidence: Evidence, signed: _Signed, subject: str) -> GateCheck:
    return _attacked(
        "attributes",
        "Attribute inference",
        evidence.attacks,
        signed,
        subject,
        lambda attacks: judge_attributes(attacks, evidence.limits),
        asked=evidence.limits.attributes.asked,
        reason=evidence.limits.reason,
    )


def _copies(evidence: Evidence, signed: _Signed, subject: str) -> GateCheck:
    return _attacked(
        "copies",
        "Copies of real patients",
        evidence.attacks,
        signed,
        subject,
        lambda attacks: judge_copies(attacks, evidence.limits),
        asked=evidence.limits.copies.asked,
        reason=evidence.limits.reason,
    )


def _attacked(
    id_: str,
    title: str,
    attacks: Attacks | None,
    signed: _Signed,
    subject: str,
    judge: Callable[[Attacks], Judgement],
    *,
    asked: bool,
    reason: str,
    covered: Callable[[OwnAttacks], bool] = lambda own: True,
) -> GateCheck:
    """What attacks found, by a file or, where there is none, by what every contributing site countersigned."""
    if not asked:
        return _check(id_, title, Judgement("not asked", f"The limits do not ask for it: {reason}"))
    if attacks is not None and attacks.subject == subject and attacks.plan_digest == signed.plan_digest:
        if spared := [site for site in signed.contributing if site not in attacks.sites]:
            return _check(
                id_,
                title,
                Judgement(
                    "failed",
                    f"Patients of {', '.join(spared)} were trained on, and the attacks given spared them.",
                    "Run `fedsynth evaluate attacks` with a --cohort of each contributing site.",
                ),
            )
        return _check(id_, title, judge(attacks))
    silent = [site for site in signed.contributing if not signed.attacked(site, covered)]
    if not silent:
        return _check(
            id_,
            title,
            Judgement(
                "ok",
                f"Tried at {', '.join(signed.contributing)}, each with its own patients, and countersigned as within the "
                "limits. The figures stay at the sites.",
            ),
        )
    given = "The attacks given were run with other synthetic patients" if attacks else "No attacks were given"
    return _check(
        id_,
        title,
        Judgement(
            "failed",
            f"{given}, and of the {len(signed.contributing)} contributing sites {', '.join(silent)} did not countersign "
            "that their own stayed within the limits.",
            "Simulated or public patients: run `fedsynth evaluate attacks CANDIDATE --public ... --out FILE` and give it "
            "with --attacks. Otherwise each of these sites runs it with its own patients and countersigns (fedsynth site "
            "countersign SITE CANDIDATE --attacks FILE), or the limits leave it out, with a reason.",
        ),
    )


def _evidence(release: Release, evidence: Evidence, subject: str) -> GateCheck:
    """Whatever lies beside the patients is about these patients and this plan, and may be shown."""
    plan = release.plan.digest
    faults = []
    for name, found in ((ATTACKS, evidence.attacks), (EVALUATION, evidence.evaluation)):
        if found is None:
            continue
        if found.subject != subject:
            faults.append(f"{name} is about other synthetic patients ({found.subject[:12]}, not {subject[:12]})")
        if found.n_synthetic != release.index.n_patients:
            faults.append(
                f"{name} is about {found.n_synthetic} synthetic patients; these are {release.index.n_patients}"
            )
        if not may_be_shared(found.data):
            faults.append(f"{name} was computed on patients who are not public, and has to stay where it was computed")
    for name, digest in (
        (ATTACKS, evidence.attacks.plan_digest if evidence.attacks else plan),
        (AUDIT, evidence.audit.plan_digest if evidence.audit else plan),
        (SITE_EVALUATION, evidence.site_evaluation.plan_digest if evidence.site_evaluation else plan),
    ):
        if digest != plan:
            faults.append(f"{name} is of another plan ({digest[:12]}, not {plan[:12]})")
    open_ = evidence.attacks.not_done if evidence.attacks else []
    return _final(
        "evidence",
        "Evidence belongs to this release",
        faults,
        f"All evidence is of plan {plan[:12]} and synthetic patients {subject[:12]}."
        + (f" Attacks that could not be made: {' '.join(open_)}" if open_ else ""),
        "Leave out what is about something else, or make it anew about this candidate.",
    )


def _files(content: Sequence[Check]) -> GateCheck:
    checks = [check for check in content if check.name not in (_IDENTIFIERS, _PRIVACY)]
    return _final(
        "files",
        "Structure of the files",
        [f"{check.name}: {check.reason}" for check in checks if check.status != "ok"],
        f"{len(checks)} checks hold: {', '.join(check.name for check in checks)}.",
        _DO_NOT,
    )


def _identifiers(content: Sequence[Check]) -> GateCheck:
    checks = [check for check in content if check.name == _IDENTIFIERS]
    faults = [check.reason for check in checks if check.status != "ok"]
    return _final(
        "identifiers",
        "Nothing that could name a person",
        faults if checks else ["the headers were not looked at"],
        "; ".join(check.reason for check in checks) + ".",
        _DO_NOT,
    )


class _Signed:
    """The countersignatures of a release, and which of them hold.

    Attributes:
        contributing: sites whose patients were used.
        asking: those of them that the plan gives a right to countersign.
        faults: what is wrong with those that are there.
    """

    def __init__(self, release: Release, evidence: Evidence, content: str, subject: str) -> None:
        self.content, self.plan_digest = content, release.plan.digest
        self.contributing = [site.name for site in release.statement.sites]
        keys = {site.name: site.countersign_key for site in release.plan.sites}
        self.asking = [site for site in self.contributing if keys.get(site) is not None]
        self.faults: list[str] = []
        self.valid: dict[str, Statement] = {}
        self._subject = subject
        self.faults += _stray(release)
        for name, countersignature in evidence.countersignatures.items():
            key = keys.get(name)
            if key is None or not signed_by(countersignature, key):
                self.faults.append(f"the countersignature of {name} is not by the key that the plan names")
                continue
            try:
                stated = countersignature.stated
            except Refused as error:
                self.faults.append(f"{name}: {error.message}")
                continue
            faults = _statement_faults(stated, name, release, content)
            self.faults += faults
            if not faults:
                self.valid[name] = stated

    def attacked(self, site: str, covered: Callable[[OwnAttacks], bool]) -> bool:
        """Whether `site` countersigned that its attacks on these patients, of the sort asked for, were within limits."""
        stated = self.valid.get(site)
        own = stated.attacks if stated else None
        return own is not None and own.subject == self._subject and covered(own)


def _stray(release: Release) -> list[str]:
    """Files among the countersignatures that are none, and keys there that are not those of the plan."""
    home = release.folder / FOLDER
    keys = {site.name: site.countersign_key for site in release.plan.sites}
    faults = []
    for path in sorted(home.rglob("*")):
        name, _, kind = path.relative_to(home).as_posix().partition(".")
        if name not in keys or kind not in ("json", "sig", "pub.pem"):
            faults.append(f"{FOLDER}/ holds something that is no countersignature of a site of the plan")
        elif kind == "pub.pem" and (key := keys[name]) is not None and path.read_bytes() != key_pem(key):
            faults.append(f"{FOLDER}/{name}.pub.pem is not the key that the plan names")
    return faults


def _statement_faults(stated: Statement, name: str, release: Release, content: str) -> list[str]:
    """In what a site's statement is about something else than this release."""
    faults = []
    if stated.site != name:
        faults.append(f"the countersignature of {name} is that of {stated.site}")
    if stated.plan_digest != release.plan.digest or stated.content != content:
        faults.append(f"{name} countersigned another content ({stated.content[:12]}, not {content[:12]})")
    spent = next((site for site in release.statement.sites if site.name == name), None)
    if spent is None or (stated.ledger_head, stated.epsilon) != (spent.ledger_head, spent.epsilon):
        faults.append(f"{name} countersigned another epsilon or ledger entry than privacy.json states")
    for file, digest in stated.evidence.items():
        path = release.folder / file
        if not path.is_file() or sha256_file(path) != digest:
            faults.append(f"{name} countersigned beside another {file}")
    return faults


def _countersignatures(release: Release, signed: _Signed) -> GateCheck:
    missing = [site for site in signed.asking if site not in signed.valid]
    faults = [*signed.faults, *(f"{site} has not countersigned this content" for site in missing)]
    if not faults and not signed.asking:
        return GateCheck(
            id="countersignatures",
            title=_COUNTERSIGNED,
            status="not asked",
            finding="No contributing site reserved the right to countersign in the plan.",
            overridable=False,
        )
    return _final(
        "countersignatures",
        _COUNTERSIGNED,
        faults,
        f"{', '.join(signed.asking)} countersigned content {signed.content[:12]}.",
        "Send the candidate to these sites; each looks at it, runs `fedsynth site countersign SITE CANDIDATE --out FILE`, "
        "and sends the file back for `fedsynth release finish --countersignature FILE`. Only the site itself can waive it.",
    )


_COUNTERSIGNED = "Countersignatures of the sites"


def _check(id_: str, title: str, judgement: Judgement) -> GateCheck:
    return GateCheck(
        id=id_,
        title=title,
        status=judgement.status,
        finding=judgement.finding,
        remedy=judgement.remedy,
        overridable=not judgement.refuted,
    )


def _final(id_: str, title: str, faults: list[str], finding: str, remedy: str) -> GateCheck:
    """A check that nobody can override."""
    failed = bool(faults)
    return GateCheck(
        id=id_,
        title=title,
        status="failed" if failed else "ok",
        finding="; ".join(faults) + "." if failed else finding,
        remedy=remedy if failed else "",
        overridable=False,
    )


def decision_faults(release: Release, content: Sequence[Check], key: Ed25519PublicKey) -> list[str]:
    """In what ``gate.json`` says something else than the evidence beside it; empty when nothing.

    Args:
        key: the release's, which an override must be signed with.

    Raises:
        Refused: ``gate_unreadable``, or the evidence cannot be read.
    """
    decision = read_decision(release)
    found = decide(release, read_evidence(release.folder), content, decision.code)
    faults = []
    if (decision.plan_digest, decision.subject, decision.content) != (found.plan_digest, found.subject, found.content):
        faults.append(f"{FILE} is about another plan, other patients or another content")
    stated = {check.id: check for check in decision.checks}
    same = release.index.software == SOFTWARE_VERSION and decision.code == code_digest()
    for check in found.checks:
        said = stated.get(check.id)
        if said is None or said.status != check.status or said.overridable != check.overridable:
            faults.append(f"{FILE} says {said.status if said else 'nothing'} of {check.id}; found: {check.status}")
        elif same and said != check:  # other versions, and other states of this one, may word it otherwise
            faults.append(f"{FILE} words {check.id} otherwise than this very version does")
    if unknown := sorted(stated.keys() - {check.id for check in found.checks}):
        faults.append(f"{FILE} has checks that are not known: {', '.join(unknown)}")
    failed = [check.id for check in found.failed]
    if decision.override is None:
        return faults + ([f"it was released although {', '.join(failed)} failed"] if failed else [])
    if not override_is_signed(decision, key):
        faults.append("the override is not signed with the key of the release")
    if decision.override.failed != failed:
        faults.append(f"the override is of {decision.override.failed}; {failed} failed")
    if final := [check.id for check in found.failed if not check.overridable]:
        faults.append(f"{', '.join(final)} failed, which nobody can override")
    return faults


def read_decision(release: Release) -> GateDecision:
    """What was decided of `release`.

    Raises:
        Refused: ``gate_unreadable``.
    """
    try:
        return GateDecision.model_validate_json((release.folder / FILE).read_bytes())
    except (OSError, ValidationError):
        raise Refused("gate_unreadable", f"{FILE} is missing or is no decision.") from None


def gate_warnings(release: Release) -> list[str]:
    """What a recipient must know of how a release came to be, even when every check of it holds."""
    if not release.has_gate:
        return [
            "This release was made before there was a gate: nothing shows that its mechanisms were audited, that it was "
            "attacked, or that anybody looked for copies of patients in it."
        ]
    decision = read_decision(release)
    warnings = []
    if decision.override is not None:
        warnings.append(
            f"RELEASED ALTHOUGH CHECKS FAILED ({', '.join(decision.override.failed)}). {decision.override.responsible} "
            f'answers for it: "{decision.override.statement}"'
        )
    limits = read_evidence(release.folder).limits
    if limits.loosened:
        warnings.append(
            f"Limits of attacks are looser than the defaults: {'; '.join(limits.loosened)}. {limits.reason}"
        )
    if release.index.software == SOFTWARE_VERSION and decision.code != code_digest():
        warnings.append(
            f"Made and audited by other sources ({decision.code[:12]}) than yours ({code_digest()[:12]}), though both call "
            f"themselves {SOFTWARE_VERSION}: ask for them before you rely on the audit."
        )
    unasked = [check for check in decision.checks if check.status == "not asked" and check.id != "countersignatures"]
    warnings += [f"Not checked: {check.title}. {check.finding}" for check in unasked]
    return warnings
