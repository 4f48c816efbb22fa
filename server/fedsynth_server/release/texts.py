"""The texts that a release carries for people: README.md and LICENSE."""

from __future__ import annotations

from collections.abc import Collection

from fedsynth.synthetic import STORED_MAXIMUM
from fedsynth_server.release.facts import NOT_A_PATIENT, NOT_FOR_DIAGNOSIS, ReleaseFacts
from fedsynth_server.release.wording import epsilon

_PLACES = {
    "bids": f"""
- `bids/`: BIDS data set. NIfTI images (intensities 0 to {STORED_MAXIMUM}, arbitrary units), masks in `derivatives/seg`.""",
    "dicom": """
- `dicom/<participant>/<sequence>/`: the same images as MR series; `SEG/mask.dcm`: the mask. Synthetic Data is YES
  throughout.""",
}


def readme(facts: ReleaseFacts, formats: Collection[str], n_patients: int, fingerprint: str) -> str:
    """README.md: what the release is, how to check it, what it is for and what it is not."""
    return "\n".join(
        [_what(facts, n_patients), _where(facts, formats), _how_to_check(fingerprint), _privacy(facts), _use(facts)]
    )


def _what(facts: ReleaseFacts, n_patients: int) -> str:
    plan, image = facts.plan, facts.plan.image
    selection = f"\n**What was selected.** {facts.selection}\n" if facts.selection else ""
    warning = "" if facts.statement.private else f"\n**{facts.guarantee}**\n"
    return f"""# Synthetic patients of study {plan.name}

**{NOT_A_PATIENT}. {NOT_FOR_DIAGNOSIS}.**
{warning}
Release `{facts.identifier}`, made with {facts.software}. Purpose of the study: {plan.purpose}

{n_patients} synthetic patients, each with gene expression ({len(plan.genes.panel)} genes), tumour morphology, a tumour
mask and MRI ({", ".join(facts.sequences)}; {image.slices} slices of {image.size} x {image.size}). All parts of a patient
were drawn along one chain, genes -> morphology -> image and mask, so they belong together.
{selection}"""


def _where(facts: ReleaseFacts, formats: Collection[str]) -> str:
    trees = "".join(text for name, text in _PLACES.items() if name in formats)
    selection = (
        ""
        if facts.selected is None
        else "- `selection.json`: what was selected of all that the study can draw, and measured.\n"
    )
    return f"""## What lies where
{trees}
- `participants.tsv`, `morphology.tsv`, `genes/`: tables, described in `datapackage.json` and `croissant.json`. Gene
  expression is on the plan's scale; times `genes.scale` plus `genes.center` of `plan.toml` it is on the reference scale.
- `report.html`: everything in one page, to be read in a browser. `DATASHEET.md`: the questions of a datasheet, answered.
- `privacy.json`: the privacy statement. `gate.json`: the decision to release, every check. Where they were made:
  `evaluation.json` (quality), `attacks.json`, `audit.json` (of the private mechanisms), `site-evaluation.json`.
{selection}- `plan.toml`: the study plan, digest `{facts.plan.digest}`.
"""


def _how_to_check(fingerprint: str) -> str:
    return f"""## How to check it

With fedsynth:

    fedsynth release verify FOLDER

With common tools, inside the folder:

    sha256sum --check --quiet SHA256SUMS
    openssl pkeyutl -verify -rawin -pubin -inkey release.pub.pem -sigfile SHA256SUMS.sig -in SHA256SUMS

The key in the folder shows only that nothing changed since somebody signed it. To know *who* signed, compare the key's
fingerprint with one that the coordinator gave you by another way. This release was signed with the key

    {fingerprint}

which is what `openssl pkey -pubin -in release.pub.pem -outform DER | sha256sum` prints.
"""


def _privacy(facts: ReleaseFacts) -> str:
    statement = facts.statement
    spent = "\n".join(
        f"| {site.name} | {epsilon(site.epsilon)} | {epsilon(site.epsilon_lifetime)} |" for site in statement.sites
    )
    not_covered = "\n".join(f"- {item}" for item in statement.not_covered)
    return f"""## Privacy

{facts.guarantee}
Unit: {statement.unit}. Neighbours: {statement.neighbouring}. Accountant: {statement.accountant}.

| site | epsilon, this study | epsilon, all studies |
| --- | --- | --- |
{spent}

{statement.trust_model}

{statement.composition}

Not covered by the guarantee:

{not_covered}

Being synthetic does not by itself make data anonymous; that also depends on who holds them and what else they hold.
"""


def _use(facts: ReleaseFacts) -> str:
    publication = facts.publication
    contact = f"\nContact: {publication.contact}\n" if publication.contact else ""
    return f"""## Use

Intended: {facts.statement.intended_use}

Forbidden: {facts.statement.forbidden_use}
{contact}
Licence: {publication.licence.name} ({publication.licence.spdx}), see `LICENSE`.
"""


def licence(facts: ReleaseFacts) -> str:
    """LICENSE: which licence the data are under."""
    terms = facts.publication.licence
    return f"""Synthetic patients of study {facts.plan.name}, release {facts.identifier}
Published by: {", ".join(facts.authors)}

These data are licensed under {terms.name} ({terms.spdx}).
The text of the licence: {terms.url}

The licence is of the data, not of the program that made them. README.md and privacy.json say what the data are intended
for and what must not be attempted with them.
"""
