"""`fedsynth evaluate`: what a recipient or a hospital types to see what a release is worth, and what it gives away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Measure a release against real patients; attack it; audit a plan's mechanisms.", no_args_is_help=True
)

Release = Annotated[Path, typer.Argument(help="The folder of a release, or of its candidate.")]
Cohorts = Annotated[
    list[str],
    typer.Option("--cohort", help="NAME=FOLDER of a site or of a cohort that it prepared for the plan; repeat."),
]
Out = Annotated[Path, typer.Option(help="The file to write (JSON); must not exist.")]
Data = Annotated[
    str, typer.Option(help="What the real patients are, for the reader, e.g. 'TCGA-LGG, three hospitals'.")
]
Public = Annotated[
    bool,
    typer.Option(
        "--public",
        help="The real patients are public or simulated: the figures may be shown to anybody. Without this the file says "
        "that it has to stay where it was computed, and no release takes it.",
    ),
]
Extractors = Annotated[
    list[Path],
    typer.Option(
        "--extractor",
        help="A feature network (ONNX beside its TOML), e.g. Inception or RadImageNet, for figures of its own beside those "
        "of the small network that is trained on drawn phantoms; repeat.",
    ),
]
Lpips = Annotated[
    Path | None, typer.Option(help="A learned perceptual distance (ONNX beside its TOML), for diversity.")
]
TranscriptFolder = Annotated[
    Path | None,
    typer.Option("--transcript", help="Every message of the study's training: attacks from a coordinator's view, too."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of every random draw: the same seed gives the same figures.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command()
def release(
    folder: Release,
    out: Out,
    cohort: Cohorts,
    data: Data = "",
    public: Public = False,
    seed: Seed = 0,
    extractor: Extractors = [],  # noqa: B006 (typer copies it)
    lpips: Lpips = None,
    as_json: AsJson = False,
) -> None:
    """Measure fidelity, utility, radiogenomics and genes of a release, beside real patients as ceiling and floors.

    The figures are computed on real patients without privacy.
    """
    from fedsynth_client.evaluation.command import Asked, evaluate_release

    asked = Asked(folder, tuple(cohort), out, data, public, seed, as_json)
    evaluate_release(asked, tuple(extractor), lpips)


@app.command()
def attacks(
    folder: Release,
    out: Out,
    cohort: Cohorts,
    data: Data = "",
    public: Public = False,
    seed: Seed = 0,
    transcript: TranscriptFolder = None,
    as_json: AsJson = False,
) -> None:
    """Attack a release: guess who was trained on, guess attributes, look for copies.

    Held-out patients of the same sites are the non-members. The figures are computed on real patients without privacy.
    """
    from fedsynth_client.evaluation.command import Asked, attack

    attack(Asked(folder, tuple(cohort), out, data, public, seed, as_json), transcript)


@app.command()
def audit(
    plan: Annotated[Path, typer.Argument(help="The study plan (TOML).")],
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Audit a plan's mechanisms with canaries in place of patients: what is the least epsilon that this code spends?

    No patient takes part, so the result may be shown to anybody.
    """
    from fedsynth_client.evaluation.command import audit_mechanisms

    audit_mechanisms(plan, out, as_json)
