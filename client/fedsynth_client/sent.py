"""The outbox log: what left this site, as a data officer reads it."""

from __future__ import annotations

from pydantic import BaseModel

from fedsynth_client.site import Site


class Sent(BaseModel):
    """One answer that went out; `records` gives bytes by record, `sha256` is the stored answer's digest.

    `private` is whether it was noised, and unpredictably.
    """

    entry: int
    at: str
    study: str
    module: str
    round: int
    records: dict[str, int]
    bytes: int
    sha256: str
    to: str
    again: bool
    private: bool


def sent(site: Site) -> list[Sent]:
    """Everything that was sent, oldest first; `again` marks an answer that went out before.

    Raises:
        Refused: ``ledger_tampered``.
    """
    seen: set[str] = set()
    found = []
    private: dict[tuple[str, str, int], bool] = {}
    for entry in site.ledger().entries():
        if entry.kind == "charge":
            private[entry.body["study"], entry.body["module"], entry.body["round"]] = entry.body["private"]
        if entry.kind != "sent":
            continue
        body = entry.body
        found.append(
            Sent(
                entry=entry.sequence,
                at=entry.recorded_at,
                study=body["study"],
                module=body["module"],
                round=body["round"],
                records=body["records"],
                bytes=sum(body["records"].values()),
                sha256=body["sha256"],
                to=body["to"],
                again=body["sha256"] in seen,
                private=private.get((body["study"], body["module"], body["round"]), False),
            )
        )
        seen.add(body["sha256"])
    return found


def render(found: list[Sent]) -> str:
    """The log as lines, one answer each."""
    if not found:
        return "Nothing was sent."
    lines = [
        f"{each.at}  {each.module} round {each.round} of {each.study[:12]}  to {each.to}  {each.bytes:,} bytes "
        f"({', '.join(f'{name} {size:,}' for name, size in each.records.items())})  sha256 {each.sha256[:16]}"
        + ("  sent again" if each.again else "")
        + ("" if each.private else "  NOT PRIVATE")
        for each in found
    ]
    total = sum(each.bytes for each in found)
    repeated = sum(each.again for each in found)
    lines.append(
        f"{len(found)} answers, {total:,} bytes; {repeated} of them sent again. Refusals, one code each, are in site.log."
    )
    return "\n".join(lines)
