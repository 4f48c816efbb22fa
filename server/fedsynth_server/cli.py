"""`fedsynth study` and `fedsynth release`: what a coordinator and a recipient type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsynth_server.coordinator.commands import add_commands

study = typer.Typer(help="Write and check a study plan; run the study's coordinator.", no_args_is_help=True)
release = typer.Typer(help="Make and verify releases.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@study.command()
def new(
    out: Annotated[Path, typer.Argument(help="The plan to write (TOML).")],
    panel: Annotated[
        Path, typer.Option(help="Gene panel: a TSV with columns gene, center, scale (public references).")
    ],
    site: Annotated[list[str], typer.Option(help="NAME=PATIENTS, the size that the site declares; repeat.")],
    name: Annotated[str, typer.Option(help="Name of the study: lower-case letters, digits and dashes.")],
    purpose: Annotated[str, typer.Option(help="One sentence for those who approve the plan.")],
    epsilon: Annotated[
        float, typer.Option(min=0.01, help="Budget of a patient over the whole study; inf is a study without privacy.")
    ] = 10.0,
    delta: Annotated[float, typer.Option(help="Delta of the budget.")] = 1e-5,
    measure: Annotated[str, typer.Option(help="What expression tables hold: abundance or zscore.")] = "abundance",
    warm_start: Annotated[Path | None, typer.Option(help="Public weights to start the GAN from.")] = None,
) -> None:
    """Write a plan with defaults for the sizes given; read and edit it, then check it."""
    from fedsynth.marks import marks
    from fedsynth.plan import save_plan
    from fedsynth_server.new_plan import new_plan

    plan = new_plan(
        name=name,
        purpose=purpose,
        panel=panel,
        sites=site,
        epsilon=epsilon,
        delta=delta,
        measure=measure,
        warm_start=warm_start,
    )
    if out.exists():
        from fedsynth.errors import UsageError

        raise UsageError("plan_exists", f"{out} is already there.", "Name another file.")
    save_plan(plan, out)
    for mark in marks(plan.privacy):
        typer.echo(mark)
    typer.echo(f"Wrote {out}, digest {plan.digest}. Next: fedsynth study check {out}")


@study.command("check")
def check_plan(
    plan: Annotated[Path, typer.Argument(help="The study plan (TOML).")],
    weights: Annotated[
        Path | None, typer.Option(help="The plan's file of public weights, for a sharper forecast.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a plan will cost at every site, what its noise leaves to learn, and which engines suit it."""
    from fedsynth.plan import load_plan
    from fedsynth_server.forecast_command import show_forecast

    show_forecast(load_plan(plan), as_json, weights)


add_commands(study)


@release.command()
def keygen(out: Annotated[Path, typer.Argument(help="Where to write the private key (PEM, mode 0600).")]) -> None:
    """Make an Ed25519 key for signing releases; prints the fingerprint to publish."""
    from fedsynth_server.release.manifest import generate_key

    typer.echo(f"Wrote {out}. Publish this fingerprint: {generate_key(out)}")


EvaluationFile = Annotated[Path | None, typer.Option("--evaluation", help="What was measured on these patients.")]
AttacksFile = Annotated[
    Path | None, typer.Option("--attacks", help="Attacks on these patients, with simulated or public ones.")
]
AuditFile = Annotated[Path | None, typer.Option("--audit", help="The audit of the plan (fedsynth evaluate audit).")]
SiteEvaluationFile = Annotated[
    Path | None,
    typer.Option(
        "--site-evaluation", help="What sites found on their held-out patients, where it is not that of STUDY."
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option("--override", help="A check that fails and is answered for; repeat. Exactly those that fail."),
]
Statement = Annotated[str, typer.Option("--statement", help="With --override: why. It is signed, and shown first.")]
_PATIENTS = 150  # of a release for which no number was asked
Responsible = Annotated[str, typer.Option("--responsible", help="With --override: the role of who answers for it.")]


@release.command()
def make(
    folder: Annotated[Path, typer.Argument(help="The study's folder (plan.toml and checkpoint).")],
    out: Annotated[Path, typer.Option(help="The release to write; must not exist.")],
    key: Annotated[Path | None, typer.Option(help="Private signing key (see keygen).")] = None,
    patients: Annotated[
        int | None, typer.Option(min=1, help="Synthetic patients to draw; without, the sum of --count, or 150.")
    ] = None,
    count: Annotated[
        list[str] | None, typer.Option("--count", help="CLASS=PATIENTS, so many of this class; repeat.")
    ] = None,
    balance: Annotated[
        bool, typer.Option("--balance", help="Equally many patients of each class, also of rarer ones.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option("--only", help="CLASS of which patients may be; repeat.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where", help='A range of morphology that every patient is drawn for, e.g. "volume>=20" (mL); repeat.'
        ),
    ] = None,
    sequences: Annotated[
        str, typer.Option("--sequences", help="MR sequences of the images, e.g. T1c,FLAIR; without, all of the plan.")
    ] = "",
    candidate: Annotated[
        bool, typer.Option("--candidate", help="Stop before the gate: write OUT-candidate, to attack and countersign.")
    ] = False,
    evaluation: EvaluationFile = None,
    attacks: AttacksFile = None,
    audit: AuditFile = None,
    site_evaluation: SiteEvaluationFile = None,
    limits: Annotated[Path | None, typer.Option(help="Limits of attacks (see limits); without, the defaults.")] = None,
    override: Override = None,
    statement: Statement = "",
    responsible: Responsible = "",
) -> None:
    """Draw synthetic patients from a finished study and write a signed release, if the gate lets it pass."""
    from fedsynth.errors import UsageError
    from fedsynth.plan import StudyPlan
    from fedsynth.selection import Selection, make_selection, parse_counts, parse_range
    from fedsynth_server.release.from_study import EvidenceFiles, override_request, release_study

    if (key is None) != candidate:
        raise UsageError(
            "key_or_candidate", "A release needs --key; a candidate is not signed.", "Give one of the two."
        )
    files = EvidenceFiles(evaluation, attacks, audit, site_evaluation)
    request = override_request(override or [], statement, responsible)
    counts, ranges = parse_counts(count or []), [parse_range(text) for text in where or []]
    named = [name.strip() for name in sequences.split(",") if name.strip()]

    def select(plan: StudyPlan) -> Selection:
        return make_selection(
            plan,
            patients,
            default_patients=_PATIENTS,
            counts=counts,
            balance=balance,
            only=only or [],
            where=ranges,
            sequences=named,
        )

    made = release_study(folder, out, key, select, files, limits, request)
    if candidate:
        typer.echo(f"Candidate: {made}. When evidence and countersignatures are there: fedsynth release finish {made}")
    else:
        typer.echo(f"Release: {made}")


@release.command()
def finish(
    candidate: Annotated[Path, typer.Argument(help="The candidate; it stays as it is.")],
    key: Annotated[Path, typer.Option(help="Private signing key (see keygen).")],
    out: Annotated[
        Path | None, typer.Option(help="The release to write; without, beside the candidate, without -candidate.")
    ] = None,
    evaluation: EvaluationFile = None,
    attacks: AttacksFile = None,
    audit: AuditFile = None,
    site_evaluation: SiteEvaluationFile = None,
    countersignature: Annotated[
        list[Path] | None, typer.Option(help="A site's countersignature (fedsynth site countersign); repeat.")
    ] = None,
    override: Override = None,
    statement: Statement = "",
    responsible: Responsible = "",
) -> None:
    """Add evidence and countersignatures to a candidate and sign it, if the gate lets it pass."""
    from fedsynth_server.release.from_study import EvidenceFiles, finish_candidate, override_request

    files = EvidenceFiles(evaluation, attacks, audit, site_evaluation)
    request = override_request(override or [], statement, responsible)
    typer.echo(f"Release: {finish_candidate(candidate, out, key, files, countersignature or [], request)}")


@release.command()
def limits(
    out: Annotated[Path, typer.Option(help="The file to write (TOML); must not exist.")],
) -> None:
    """Write the default limits of attacks, each explained, to be edited."""
    from fedsynth.errors import UsageError
    from fedsynth.limits import TEMPLATE

    if out.exists():
        raise UsageError("limits_exist", f"{out} is already there.", "Name another file.")
    out.write_text(TEMPLATE, encoding="utf-8")
    typer.echo(f"Wrote {out}. Give it to fedsynth release make with --limits.")


@release.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="The release.")],
    key: Annotated[
        str | None, typer.Option(help="The coordinator's public key (PEM file) or its fingerprint, from elsewhere.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check integrity, signature, structure, privacy statement and the gate's decision of a release."""
    from fedsynth_server.release.command import verify_command

    verify_command(folder, key, as_json)
