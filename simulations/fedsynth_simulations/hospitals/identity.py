"""Planted identifiers: strings that occur nowhere by chance, in every place where a hospital keeps identity.

Whoever finds one of them outside a site's folder has found a leak.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Which identifiers each site's files hold.
_PLANTED = {
    "north": (
        "patient_id",
        "family",
        "given",
        "address",
        "other_id",
        "accession",
        "comment",
        "institution",
        "physician",
        "device",
        "uid_root",
    ),
    "south": ("patient_id", "family", "given", "other_id", "accession", "comment", "institution", "device"),
    "east": ("patient_id", "family", "address", "comment"),
}
_LETTERS = np.array(list("BCDFGHJKLMNPQRSTVWXZ"))


@dataclass(frozen=True)
class Identity:
    """One patient's planted identifiers; all but `birth_date` are recognisable as such.

    Attributes:
        patient_id: by which the hospital's files and tables name the patient.
        family, given: name.
        birth_date: YYYYMMDD; no planted string, since eight digits occur by chance.
        address, other_id, accession, comment: of the patient and the examination.
        institution, physician, device: of the site, the same for all its patients.
        uid_root: with which all DICOM UIDs of the patient begin.
    """

    patient_id: str
    family: str
    given: str
    birth_date: str
    address: str
    other_id: str
    accession: str
    comment: str
    institution: str
    physician: str
    device: str
    uid_root: str

    def planted(self, site: str) -> list[str]:
        """The strings that the files of `site` hold and that must never leave it."""
        return [getattr(self, name) for name in _PLANTED[site]]


def draw_identity(site: str, index: int, rng: np.random.Generator, site_rng: np.random.Generator) -> Identity:
    """Invent the identifiers of one patient.

    Args:
        site: name of the site.
        index: number of the patient, which makes ids unique.
        rng: the patient's stream.
        site_rng: a stream that starts the same for all patients of the site.
    """

    def token(stream: np.random.Generator, letters: int = 8) -> str:
        return "".join(stream.choice(_LETTERS, letters))

    family = f"PLANTFAMILY{token(rng)}"
    return Identity(
        # One hospital names its folders after its patients.
        patient_id=f"{family}_{index:04d}" if site == "east" else f"{site[0].upper()}{token(rng, 4)}{index:04d}",
        family=family,
        given=f"PLANTGIVEN{token(rng)}",
        birth_date=f"{rng.integers(1935, 1995)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}",
        address=f"PLANTSTREET {token(rng)} {rng.integers(1, 200)}",
        other_id=f"PLANTOTHER{token(rng)}",
        accession=f"PLANT{token(rng)}",
        comment=f"PLANTCOMMENT {token(rng)} called about the result",
        institution=f"PLANTHOSPITAL {token(site_rng)}",
        physician=f"PLANTDOCTOR{token(site_rng)}",
        device=f"PLANTDEVICE{token(site_rng)}",
        # The root that pydicom lets everyone use for tests.
        uid_root=f"1.2.826.0.1.3680043.8.498.{rng.integers(10**11, 10**12)}",
    )
