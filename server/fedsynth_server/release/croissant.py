"""Croissant 1.0 metadata (https://docs.mlcommons.org/croissant/docs/croissant-spec.html) with Responsible AI fields."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from fedsynth.files import sha256_file
from fedsynth_server.release.facts import ReleaseFacts
from fedsynth_server.release.jsonfile import dump
from fedsynth_server.release.tables import (
    EXPRESSION_PARQUET,
    KEY,
    MORPHOLOGY,
    PARTICIPANTS,
    Column,
    expression_columns,
    label_column,
    morphology_columns,
)

# The context that the specification asks every file to carry (appendix 1), and the RAI vocabulary.
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
} | {
    term: f"cr:{term}"
    for term in (
        "citeAs",
        "column",
        "equivalentProperty",
        "extract",
        "field",
        "fileObject",
        "fileProperty",
        "fileSet",
        "format",
        "includes",
        "isLiveDataset",
        "jsonPath",
        "key",
        "md5",
        "parentField",
        "path",
        "recordSet",
        "references",
        "regex",
        "repeated",
        "replace",
        "samplingRate",
        "separator",
        "source",
        "subField",
        "transform",
    )
}

# What speaks of the data, listed where it is there: file, media type, what it is.
_DOCUMENTS = (
    ("report.html", "text/html", "Report for clinicians, data officers and statisticians: quality, privacy, limits"),
    (
        "DATASHEET.md",
        "text/markdown",
        "Datasheet after Gebru et al.: motivation, composition, collection, uses, maintenance",
    ),
    ("privacy.json", "application/json", "Privacy statement: unit, epsilon and delta, mechanisms of every site"),
    ("gate.json", "application/json", "Decision of the release gate: every check, and an override where there is one"),
    ("limits.toml", "application/toml", "Limits that the gate applied"),
    ("evaluation.json", "application/json", "Fidelity and usefulness beside real patients, with intervals"),
    ("attacks.json", "application/json", "Membership and attribute inference, search for copies"),
    (
        "audit.json",
        "application/json",
        "Audit of the private mechanisms: empirical lower bounds of epsilon, direct checks",
    ),
    ("site-evaluation.json", "application/json", "What sites found on their held-out patients, noised"),
    ("selection.json", "application/json", "What was selected of all that the study can draw, asked for and measured"),
    ("outcome.json", "application/json", "What the noise left to learn, beside its forecast"),
    ("curves.json", "application/json", "Training curves of noised quantities"),
    ("plan.toml", "application/toml", "Study plan: every choice that the sites approved"),
)


# What some of them are in a study without privacy.
_WITHOUT_NOISE = {
    "audit.json": "Audit of the sites' evaluation, the only mechanism with noise",
    "outcome.json": "Says that there was no noise to learn against",
    "curves.json": "Training curves, of quantities that were not noised",
}


def write_croissant(root: Path, facts: ReleaseFacts, formats: Collection[str], n_patients: int) -> None:
    """Write ``croissant.json`` for the tables, images and documents that lie in `root`, once all others are written."""
    participants = _file(root, PARTICIPANTS, "text/tab-separated-values", "Participants and their label")
    morphology = _file(root, MORPHOLOGY, "text/tab-separated-values", "Morphology of the tumour")
    expression = _file(root, EXPRESSION_PARQUET, "application/x-parquet", "Gene expression")
    images = []
    if "bids" in formats:
        images.append(_images("bids/sub-*/anat/*.nii.gz", "images-nifti", "application/gzip", "MR images"))
        images.append(_images("bids/derivatives/seg/sub-*/anat/*.nii.gz", "masks-nifti", "application/gzip", "Masks"))
    if "dicom" in formats:
        images.append(_images("dicom/*/*/*.dcm", "images-dicom", "application/dicom", "MR series and segmentations"))
    chosen = f" {facts.selection}" if facts.selection else ""
    said = _WITHOUT_NOISE if facts.statement.without_privacy else {}
    documents = [
        _file(root, name, kind, said.get(name, what)) for name, kind, what in _DOCUMENTS if (root / name).is_file()
    ]
    dump(
        root / "croissant.json",
        {
            "@context": _CONTEXT,
            "@type": "sc:Dataset",
            "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
            "name": facts.identifier,
            "description": f"{n_patients} synthetic patients: MRI, tumour mask, gene expression. {facts.guarantee}{chosen}",
            "version": f"{facts.released:%Y}.{facts.released.month}.{facts.released.day}",
            "datePublished": f"{facts.released:%Y-%m-%d}",
            "license": facts.publication.licence.url,
            "creator": [{"@type": "sc:Organization", "name": name} for name in facts.authors],
            "citeAs": f"{', '.join(facts.authors)}: {facts.identifier}, {facts.released:%Y}.",
            "inLanguage": "en",
            "isLiveDataset": False,
            "keywords": [
                "synthetic data",
                "not private" if facts.statement.without_privacy else "differential privacy",
                "MRI",
                "gene expression",
                "glioma",
            ],
            "distribution": [participants, morphology, expression, *images, *documents],
            "recordSet": [
                _records("participants", PARTICIPANTS, [label_column(facts.plan)]),
                _records("morphology", MORPHOLOGY, morphology_columns(facts.plan)),
                _records("expression", EXPRESSION_PARQUET, expression_columns(facts.plan)),
            ],
            **_responsible_ai(facts, [entry["name"] for entry in documents]),
        },
    )


def _responsible_ai(facts: ReleaseFacts, documents: Collection[str]) -> dict[str, Any]:
    """The RAI vocabulary (https://docs.mlcommons.org/croissant/docs/croissant-rai-spec.html)."""
    statement = facts.statement
    contact = f" Contact: {facts.publication.contact}." if facts.publication.contact else ""
    evidence = [
        f"{what}: {name if name in documents else 'not done, or not part of this release'}."
        for what, name in (
            ("Usefulness, as measured on real patients", "evaluation.json"),
            ("Attacks on membership and attributes, copies", "attacks.json"),
            ("Audit of the private mechanisms", "audit.json"),
            ("Decision on the release", "gate.json"),
        )
    ]
    return {
        "rai:dataCollection": (
            "Drawn from a generative model that was trained across sites by federated learning; "
            "the sites' data never left them. Nothing in this data set was acquired from a person."
        ),
        "rai:dataCollectionType": ["Others"],
        "rai:dataCollectionRawData": (
            "Patients of the taking-part hospitals, about "
            + ", ".join(f"{site.nominal_patients} at {site.name}" for site in statement.sites)
            + " (declared and rounded). Their data are no part of this data set."
        ),
        "rai:dataCollectionMissingData": "No value is missing; a mask may hold no tumour voxel.",
        "rai:dataPreprocessingProtocol": [
            "Images of the hospitals were resampled to one grid and scaled to [0, 1] each by itself.",
            "Expression was replaced by public reference quantiles at its rank within the patient, centred and scaled by "
            "public constants.",
        ],
        "rai:dataAnnotationProtocol": (
            "Tumour masks and labels were drawn by the generator together with the patient; nobody annotated them."
        ),
        "rai:dataReleaseMaintenancePlan": f"A release is never changed; a correction is a new release.{contact}",
        "rai:personalSensitiveInformation": [
            facts.guarantee,
            "No record describes a person. The generator was trained on health data (MRI, gene expression) of patients.",
            f"Not covered: {'; '.join(statement.not_covered)}",
        ],
        "rai:dataLimitations": [
            "Image quality is bounded by a small grid; not for diagnosis."
            if statement.without_privacy
            else "Image quality is bounded by noise added for privacy and by a small grid; not for diagnosis.",
            "Links between genes and images are what a model learned, and may be what it invented.",
            "Being synthetic does not by itself make data anonymous.",
            statement.composition,
            *evidence,
        ],
        "rai:dataBiases": (
            "The training patients are those of the taking-part hospitals; rare findings are under-represented "
            "or absent"
            + (". " if statement.without_privacy else ", and differential privacy suppresses them further.")
            + (f" {facts.selection}" if facts.selection else "")
        ),
        "rai:dataUseCases": [statement.intended_use, f"Not permitted: {statement.forbidden_use}"],
        "rai:dataSocialImpact": (
            "Lets methods be developed where patients' data cannot travel; "
            "a model that was trained on these data must be validated on real patients before any clinical use."
        ),
    }


def _file(root: Path, path: str, encoding: str, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path,
        "description": description,
        "contentUrl": path,
        "contentSize": f"{(root / path).stat().st_size} B",
        "encodingFormat": encoding,
        "sha256": sha256_file(root / path),
    }


def _images(pattern: str, name: str, encoding: str, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "description": description,
        "encodingFormat": encoding,
        "includes": pattern,
    }


def _records(name: str, source: str, columns: list[Column]) -> dict[str, Any]:
    key = Column(KEY, "Synthetic participant")
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "key": {"@id": f"{name}/{KEY}"},
        "field": [_field(name, source, column) for column in (key, *columns)],
    }


def _field(record_set: str, source: str, column: Column) -> dict[str, Any]:
    field: dict[str, Any] = {
        "@type": "cr:Field",
        "@id": f"{record_set}/{column.name}",
        "name": column.name,
        "description": column.description,
        "dataType": "sc:Float" if column.units else "sc:Text",
        "source": {"fileObject": {"@id": source}, "extract": {"column": column.name}},
    }
    if column.name == KEY and record_set != "participants":
        field["references"] = {"field": {"@id": f"participants/{KEY}"}}
    return field
