"""What was taken and what was refused, for the person at the site: a table on the terminal and a JSON file.

The report names places on the site's own disk, so it lies beside the cohort, not in it, and never leaves the site.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsynth.files import write_json
from fedsynth_client.ingest.refusals import Reason, Refusal

if TYPE_CHECKING:
    from rich.console import Console

# Places shown for one reason on the terminal; the JSON file has all of them.
_SHOWN = 3


@dataclass(frozen=True)
class Taken:
    """How many patients the cohort holds, and of how many of them each part is usable."""

    patients: int
    with_images: int
    with_genes: int
    with_both: int
    with_label: int
    train: int
    holdout: int


@dataclass(frozen=True)
class PreparationReport:
    """The outcome of one preparation.

    Attributes:
        taken: what the cohort holds.
        found: distinct patients named by any of the hospital's files.
        refused: everything that was not taken, in the order in which it was met.
        notes: facts that are no refusals, e.g. the panel's coverage.
        seconds: how long it took.
    """

    taken: Taken
    found: int
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...]
    seconds: float

    def counts(self) -> dict[str, int]:
        """Number of refusals by reason code, the most frequent first."""
        return dict(Counter(refusal.reason.code for refusal in self.refused).most_common())

    def as_json(self) -> dict[str, Any]:
        """The whole report as JSON values."""
        return {
            "schema_version": 1,
            "taken": asdict(self.taken),
            "patients_found": self.found,
            "refused_counts": self.counts(),
            "refused": [
                {
                    "item": item,
                    "what": refusal.what,
                    "where": refusal.where,
                    "reason": refusal.reason.code,
                    "sentence": refusal.reason.sentence,
                    "detail": refusal.detail,
                    "remedy": refusal.reason.remedy,
                }
                for item, refusal in enumerate(self.refused)
            ],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 2),
        }

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        write_json(path, self.as_json())


def render(report: PreparationReport, console: Console) -> None:
    """Print the report as tables."""
    from rich.table import Table
    from rich.text import Text

    taken = report.taken
    summary = Table(title=f"Taken: {taken.patients} of {report.found} patients", title_justify="left")
    for heading in ("images and mask", "genes", "both", "label known", "for training", "held out"):
        summary.add_column(heading, justify="right")
    parts = (taken.with_images, taken.with_genes, taken.with_both, taken.with_label, taken.train, taken.holdout)
    summary.add_row(*map(str, parts))
    console.print(summary)
    for note in report.notes:
        console.print(Text(note))
    if not report.refused:
        console.print("Nothing was refused.")
        return
    by_reason: dict[Reason, list[Refusal]] = {}
    for refusal in report.refused:
        by_reason.setdefault(refusal.reason, []).append(refusal)
    table = Table(title=f"Not taken: {len(report.refused)} items", title_justify="left", show_lines=True)
    table.add_column("reason", no_wrap=True)
    table.add_column("items", justify="right")
    table.add_column("what is wrong, and where", ratio=3)
    table.add_column("what to do", ratio=2)
    for reason, refusals in sorted(by_reason.items(), key=lambda entry: -len(entry[1])):
        places = [refusal.where + (f" ({refusal.detail})" if refusal.detail else "") for refusal in refusals[:_SHOWN]]
        more = len(refusals) - len(places)
        lines = [reason.sentence, *places, *([f"and {more} more"] if more else [])]
        table.add_row(reason.code, str(len(refusals)), Text("\n".join(lines)), reason.remedy)
    console.print(table)
