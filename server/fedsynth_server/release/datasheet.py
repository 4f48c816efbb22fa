"""``DATASHEET.md``: a release described by the questions of Datasheets for Datasets (Gebru et al., CACM 64(12), 2021).

What the plan, the privacy statement and the evidence do not say is not asked: no answer is made up, and no question is
left with an empty one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from fedsynth.attacks.values import Attacks
from fedsynth.auditing.values import Audit
from fedsynth.evaluation.site_values import SiteEvaluation
from fedsynth.evaluation.values import Evaluation
from fedsynth.judging import SEES
from fedsynth.synthetic import STORED_MAXIMUM
from fedsynth_server.outcome import Outcome
from fedsynth_server.release import report_wording, wording
from fedsynth_server.release.decision import GateDecision
from fedsynth_server.release.facts import NOT_A_PATIENT, NOT_FOR_DIAGNOSIS, ReleaseFacts

Answers = list[tuple[str, str]]


def datasheet(
    facts: ReleaseFacts,
    formats: Collection[str],
    labels: Sequence[str],
    *,
    evaluation: Evaluation | None = None,
    attacks: Attacks | None = None,
    audit: Audit | None = None,
    gate: GateDecision | None = None,
    site_evaluation: SiteEvaluation | None = None,
    outcome: Outcome | None = None,
) -> str:
    """The datasheet as Markdown.

    Args:
        facts: plan, privacy statement, time and licence of the release.
        formats: image trees of the release, of ``"bids"`` and ``"dicom"``.
        labels: the label of every synthetic patient.
        evaluation, attacks, audit, gate, site_evaluation, outcome: the evidence, as far as there is any.
    """
    sections = (
        ("Motivation", _motivation(facts)),
        ("Composition", _composition(facts, formats, labels)),
        ("Collection process", _collection(facts)),
        ("Preprocessing", _preprocessing(facts)),
        ("Uses", _uses(facts, evaluation, site_evaluation, outcome)),
        ("Privacy and evidence", _privacy(facts, attacks, audit, gate)),
        ("Distribution", _distribution(facts, formats)),
        ("Maintenance", _maintenance(facts)),
    )
    head = f"# Datasheet: {facts.identifier}\n\n**{NOT_A_PATIENT}. {NOT_FOR_DIAGNOSIS}.**\n"
    if gate is not None and gate.override is not None:
        failed = ", ".join(gate.override.failed)
        head += (
            f"\n**Released under an override of failed checks ({failed}).** Signed by the {gate.override.responsible}: "
            f"“{_one_line(gate.override.statement)}”\n"
        )
    if not facts.statement.private:
        head += f"\n**{facts.guarantee}**\n"
    body = "\n".join(
        f"## {title}\n\n" + "\n".join(f"**{question}** {answer}\n" for question, answer in answers)
        for title, answers in sections
    )
    return f"{head}\n{body}"


def _motivation(facts: ReleaseFacts) -> Answers:
    names = ", ".join(site.name for site in facts.statement.sites)
    return [
        ("For what purpose were the data made?", f"{_sentence(facts.plan.purpose)}"),
        (
            "Who made them?",
            f"{', '.join(facts.authors)}, with {facts.software}, from a generator trained at {len(facts.statement.sites)} "
            f"sites: {names}.",
        ),
    ]


def _composition(facts: ReleaseFacts, formats: Collection[str], labels: Sequence[str]) -> Answers:
    plan, image = facts.plan, facts.plan.image
    counts = Counter(labels)
    by_class = ", ".join(f"{counts.get(name, 0)} {name}" for name in plan.label.classes)
    morphology = ", ".join(plan.morphology.features)
    blur = "" if facts.statement.without_privacy else " and by noise that was added for privacy"
    return [
        (
            "What is an instance?",
            f"One synthetic patient: {len(plan.genes.panel)} genes, {len(plan.morphology.features)} features of tumour "
            f"morphology ({morphology}), MRI ({', '.join(facts.sequences)}) and a tumour mask. All parts of a patient were "
            "drawn along one chain, genes -> morphology -> image and mask.",
        ),
        ("How many are there?", f"{len(labels)}; by {plan.label.name}: {by_class}."),
        *_selected(facts),
        (
            "What are the data of an instance?",
            f"Images of {image.slices} slices of {image.size} x {image.size} pixels at {image.pixel_spacing_mm:g} x "
            f"{image.pixel_spacing_mm:g} x {image.slice_spacing_mm:g} mm, whole numbers from 0 to {STORED_MAXIMUM} in "
            f"arbitrary units ({', '.join(sorted(formats)).upper()}); a mask of 0 and 1 on the same grid; expression on the "
            "plan's centred and scaled reference scale; morphology in physical units.",
        ),
        ("Is anything missing?", "No value is missing. A patient may have no tumour voxel in the mask at all."),
        (
            "Are there splits?",
            "None. Every patient was drawn independently of the others, so any split is as good as another; what is "
            "learned from them has to be tested on real patients.",
        ),
        (
            "What is wrong with them?",
            f"Images are blurred by a small grid{blur}. Rare findings, outliers and small "
            "subgroups are the first to be lost or distorted. A link between genes and images is what the model learned, "
            "and may be what it invented.",
        ),
        (
            "Do they describe people?",
            "No instance is a person. The generator was trained on patients, though, and being synthetic does not by itself "
            "make data anonymous; that also depends on who holds them and what else they hold.",
        ),
    ]


def _selected(facts: ReleaseFacts) -> Answers:
    """Gebru et al.: does it hold all possible instances, or is it a sample, and is that representative?"""
    if facts.selected is None:
        return []
    found = facts.selected
    share = (
        f" Of {found.tried} profiles that the model drew for it, {found.fitting} fitted." if found.asked.where else ""
    )
    return [("Are they a selection?", f"Yes. {_one_line(facts.selection)}{share}")]


def _collection(facts: ReleaseFacts) -> Answers:
    statement = facts.statement
    named = (
        "says that nothing is clipped or noised"
        if statement.without_privacy
        else "names every module, the clipping, the noise and the budget"
    )
    declared = "; ".join(f"{site.name} about {site.nominal_patients}" for site in statement.sites)
    return [
        (
            "How was each instance obtained?",
            f"Drawn at random from the trained models. Profiles: {wording.profile_method(facts.plan)}. Images: "
            f"{wording.image_method(facts.plan)}.",
        ),
        (
            "From whom was it learned?",
            f"From patients of the sites, whose data never left them. Declared and rounded training patients: {declared}.",
        ),
        (
            "Who allowed it?",
            f"Each site approved the study plan of digest `{facts.plan.digest}` in its own policy before it trained; the "
            f"plan {named}. Ethical review and consent for the original "
            "data are matters of the sites and are not recorded here.",
        ),
    ]


def _preprocessing(facts: ReleaseFacts) -> Answers:
    genes = facts.plan.genes
    return [
        (
            "What was done to the originals?",
            "Images were resampled to the plan's grid and scaled to [0, 1] each by itself. Expression was replaced by "
            "public reference quantiles at its rank within the patient, centred and scaled by public constants and cut off "
            f"at +-{genes.clip:g}. No statistic over a site's patients was used.",
        ),
        (
            "What was done to the synthetic patients?",
            f"{_drawn_as(facts)} Intensities were rounded to 1/1000.",
        ),
        ("Are the originals kept with them?", "No. They stay at the sites, which keep them by their own rules."),
    ]


def _drawn_as(facts: ReleaseFacts) -> str:
    if not facts.selection:
        return "Nothing was selected, sorted or corrected after drawing."
    return (
        "Patients were selected by what they were drawn for and sequences by name, where Composition says so. Nothing was "
        "selected by its images, sorted by quality or corrected."
    )


def _uses(
    facts: ReleaseFacts,
    evaluation: Evaluation | None,
    site_evaluation: SiteEvaluation | None,
    outcome: Outcome | None,
) -> Answers:
    answers: Answers = [
        ("What are they for?", _sentence(facts.statement.intended_use)),
        ("What must not be done with them?", _sentence(facts.statement.forbidden_use)),
        ("What are they good for, as measured?", _measured(evaluation)),
    ]
    if site_evaluation is not None:
        answers.append(("What did the sites find?", _sites(site_evaluation)))
    if outcome is not None and not facts.statement.without_privacy:
        verdicts = "; ".join(f"{each.module}: {wording.VERDICTS[each.verdict]}" for each in outcome.modules)
        answers.append(("What did the noise leave to learn?", f"{verdicts}."))
    return answers


def _measured(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "Not measured. A look at the images alone says nothing about what the data are good for."
    figures = [figure for section in evaluation.sections for figure in section.figures]
    measured = [figure for figure in figures if figure.synthetic is not None]
    verdicts = Counter(wording.reading(figure).verdict for figure in measured)
    lines = []
    for section in evaluation.sections:
        shown = [figure for figure in section.figures if figure.synthetic is not None]
        rows = [
            f"| {_one_line(figure.metric)} | {_value(figure.synthetic)}{_ends(figure.interval)} | {_value(figure.real)} | "
            f"{_value(figure.floor)} |"
            for figure in shown
        ]
        if rows:
            head = (
                f"| {_one_line(section.title)} | synthetic (95 % interval) | real | floor |\n| --- | --- | --- | --- |"
            )
            lines.append("\n".join([head, *rows]))
    return (
        f"Against {evaluation.n_holdout} held-out real patients ({_one_line(evaluation.data)}): of {len(measured)} "
        f"measures, {verdicts['ceiling']} lie at least half-way from a trivial floor to what real data reach, "
        f"{verdicts['between']} less than half-way, {verdicts['floor']} at the floor or not told apart from it, and "
        f"{verdicts['open']} cannot be placed. {len(figures) - len(measured)} could not be measured.\n\n"
        + "\n\n".join(lines)
    ).rstrip()


def _sites(found: SiteEvaluation) -> str:
    pooled = [
        f"{found.meaning(score.name).title}: {_value(score.value)}{_ends(score.interval)}, floor {_value(score.floor)}"
        for score in found.pooled
    ]
    if not pooled:
        return "No site took part in the evaluation."
    return (
        f"{len(found.sites)} sites judged the generator on their own held-out patients and released noisy means, at epsilon "
        f"{found.epsilon_budget:g} of those patients at most: {'; '.join(pooled)}."
    )


def _privacy(facts: ReleaseFacts, attacks: Attacks | None, audit: Audit | None, gate: GateDecision | None) -> Answers:
    statement = facts.statement
    spent = "; ".join(
        f"{site.name} {wording.epsilon(site.epsilon)} ({wording.epsilon(site.epsilon_lifetime)} over all studies)"
        for site in statement.sites
    )
    return [
        (
            "What is guaranteed?",
            f"{facts.guarantee} Unit: {statement.unit}; neighbours: {statement.neighbouring}. Spent: {spent}; delta "
            f"{statement.delta:g}; accountant {statement.accountant} ({statement.accountant_version}).",
        ),
        ("What is not covered?", f"{'; '.join(statement.not_covered) or 'The statement names nothing'}."),
        ("What did attacks find?", _attacked(attacks)),
        ("Does the mechanism do what it claims?", _audited(audit)),
        ("Who decided on the release?", report_wording.gate(gate).sentence),
    ]


def _attacked(attacks: Attacks | None) -> str:
    if attacks is None:
        return "Nobody attacked this release; the guarantee rests on the mechanism alone."
    parts = []
    for view, sees in SEES.items():
        own = [attack for attack in attacks.membership if attack.view == view]
        if (strongest := report_wording.strongest(own)) is not None:
            parts.append(
                f"{len(own)} membership attacks by who sees {sees}; the strongest ({_one_line(strongest.title)}) reaches an "
                f"AUC of {report_wording.rate(strongest.area)}. {report_wording.area(strongest.area).sentence}"
            )
    parts += [f"Copies of {check.of}: {report_wording.copies(check).sentence}" for check in attacks.copies]
    parts.append(
        f"Real patients: {_one_line(attacks.data)}. That an attack finds nothing does not prove that none can."
    )
    return " ".join(parts)


def _audited(audit: Audit | None) -> str:
    if audit is None:
        return "The mechanisms of this plan were not audited."
    bounds = "; ".join(
        f"{each.module} at {each.site}: at least {wording.number(each.epsilon_bound)} "
        f"of {wording.epsilon(each.claimed_epsilon)}"
        for each in audit.modules
    )
    return f"{report_wording.audit(audit).sentence}" + (f" Epsilon proven by canaries: {bounds}." if bounds else "")


def _distribution(facts: ReleaseFacts, formats: Collection[str]) -> Answers:
    terms = facts.publication.licence
    names = {"bids": "a BIDS tree of NIfTI images", "dicom": "DICOM series with segmentations"}
    trees = " and ".join(names[name] for name in sorted(formats))
    return [
        (
            "How are they distributed?",
            f"As one folder: {trees}, tables (TSV, Parquet), this datasheet, `croissant.json`, `datapackage.json`, "
            "`privacy.json` and `report.html`; every file is listed in SHA256SUMS, which is signed (Ed25519).",
        ),
        ("Under which terms?", f"{terms.name} ({terms.spdx}), {terms.url}."),
    ]


def _maintenance(facts: ReleaseFacts) -> Answers:
    contact = facts.publication.contact
    answers: Answers = [
        (
            "Will they change?",
            f"This release ({facts.version}) never changes. A correction is a new release with a name of its own. Each new "
            f"release of the same patients adds to what they spend: {_sentence(facts.statement.composition)}",
        )
    ]
    if contact:
        answers.append(("Whom to ask, and whom to tell of a suspected leak?", f"{contact}."))
    return answers


def _value(value: float | None) -> str:
    return "-" if value is None else wording.number(value)


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({wording.number(interval[0])} to {wording.number(interval[1])})"


def _one_line(text: str) -> str:
    """Text of others as text: one line, with nothing that Markdown or HTML would read as more."""
    plain = " ".join(text.split())
    for sign in "\\`*_[]<>|#":
        plain = plain.replace(sign, f"\\{sign}")
    return plain


def _sentence(text: str) -> str:
    line = _one_line(text)
    return line if line.endswith((".", "!", "?")) else f"{line}."
