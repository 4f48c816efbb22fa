"""`release.json`: which release this is, for programs; `verify` reads from it what it must find."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedsynth_server.release.facts import ReleaseFacts


class ReleaseIndex(BaseModel):
    """Identity and extent of a release.

    `schema_version` 1 is of releases that were made before there was a gate (`fedsynth_server.release.gate`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1, 2] = 2
    identifier: str
    study: str
    plan_digest: str
    released: datetime
    software: str
    licence: str
    private: bool
    formats: list[Literal["bids", "dicom"]] = Field(min_length=1)
    n_patients: int = Field(ge=1)

    @classmethod
    def of(cls, facts: ReleaseFacts, formats: Collection[str], n_patients: int) -> ReleaseIndex:
        """The index of a release with these facts."""
        return cls(
            identifier=facts.identifier,
            study=facts.plan.name,
            plan_digest=facts.plan.digest,
            released=facts.released,
            software=facts.software,
            licence=facts.publication.licence.spdx,
            private=facts.statement.private,
            formats=[name for name in ("bids", "dicom") if name in formats],
            n_patients=n_patients,
        )
