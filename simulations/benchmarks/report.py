"""Table and figure of a sweep: ``python simulations/benchmarks/report.py --runs runs.jsonl ... --out FOLDER``.

Writes ``recipes.md`` (one table a measure: rows are recipe and epsilon, columns arrangement and patients a site; means
over seeds, and their standard deviation from two seeds on) and ``recipes.png`` (what tells recipes apart over patients a
site, one column an epsilon, with ceiling and floor). Seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MEASURES = {
    "tumour_auc": "AUC of tumour-bearing slice, trained on synthetic, tested on real",
    "t1_auc": "the same from T1 alone",
    "t1c_auc": "the same from T1c alone",
    "label_auc": "AUC of grade from images, trained on synthetic, tested on real",
    "dice": "Dice of a segmentation trained on synthetic, tested on real",
    "frechet": "Fréchet distance in domain features (lower is better)",
    "recall": "recall of images",
    "coverage": "coverage of images",
    "precision": "precision of images",
    "training_seconds": "CPU seconds of the recipe itself, without the measurement",
}
# What the figure shows, from top to bottom.
_DRAWN = {"frechet": "Fréchet distance\n(lower is better)", "label_auc": "AUC of grade\nfrom images", "dice": "Dice"}
_ORDER = ("real", "public", "conditions", "scratch", "warm", "embedding", "hybrid")
_ARRANGEMENTS = ("federated", "pooled", "single")


@dataclass(frozen=True)
class Line:
    """One run: what it is and what was measured."""

    recipe: str
    epsilon: float
    patients: int
    arrangement: str
    measured: dict[str, float | None]


def main() -> None:
    """Parse the command line and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=32)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    lines = read(given.runs, given.size)
    shown = {name: title for name, title in MEASURES.items() if _values(lines, name)}
    text = "\n\n".join(f"### {title}\n\n{table(lines, name)}" for name, title in shown.items())
    (given.out / "recipes.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    _figure(lines, given.out / "recipes.png")


def read(paths: Sequence[Path], size: int) -> list[Line]:
    """The runs at `size` pixels in the files `paths`."""
    found = []
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(text)
            if values["size"] == size:
                measured = {name: values.get(name) for name in MEASURES}
                found.append(
                    Line(_named(values), float(values["epsilon"]), values["patients"], values["arrangement"], measured)
                )
    return found


def _named(values: dict[str, str]) -> str:
    return values["recipe"] + (f", {values['variant']}" if values.get("variant") else "")


def _rank(recipe: str) -> tuple[int, str]:
    return _ORDER.index(recipe.partition(",")[0]), recipe


def table(lines: Sequence[Line], measure: str) -> str:
    """A Markdown table of one measure; empty cells were not run."""
    columns = sorted(
        {(line.arrangement, line.patients) for line in lines if line.recipe != "public"},
        key=lambda column: (_ARRANGEMENTS.index(column[0]), column[1]),
    )
    rows = sorted({(line.recipe, line.epsilon) for line in lines}, key=lambda row: (_rank(row[0]), row[1]))
    head = ["recipe", "epsilon", *(f"{arrangement} {patients}" for arrangement, patients in columns)]
    text = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for recipe, epsilon in rows:
        shown = "-" if recipe in ("real", "public") else f"{epsilon:g}"
        cells = [_cell(select(lines, recipe, epsilon, *column), measure) for column in columns]
        text.append("| " + " | ".join([recipe, shown, *cells]) + " |")
    return "\n".join(text)


def select(lines: Sequence[Line], recipe: str, epsilon: float, arrangement: str, patients: int) -> list[Line]:
    """Runs of one cell. The floor holds in every column, and real patients of three sites are the pooled ones."""
    if recipe == "public":
        return [line for line in lines if line.recipe == recipe]
    if recipe == "real" and arrangement == "federated":
        arrangement = "pooled"
    wanted = (recipe, epsilon, arrangement, patients)
    return [line for line in lines if (line.recipe, line.epsilon, line.arrangement, line.patients) == wanted]


def _values(lines: Sequence[Line], measure: str) -> list[float]:
    return [value for line in lines if (value := line.measured[measure]) is not None]


def _cell(lines: Sequence[Line], measure: str) -> str:
    values = _values(lines, measure)
    if not values:
        return ""
    digits = 0 if measure == "training_seconds" else 3
    spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 and digits else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def _figure(lines: Sequence[Line], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.artist import Artist

    federated = [line for line in lines if line.arrangement == "federated"]
    epsilons = sorted({line.epsilon for line in federated})
    if not epsilons:
        return
    sizes = sorted({line.patients for line in federated})
    # From random weights the distance is off any scale that shows the others.
    recipes = [r for r in sorted({line.recipe for line in lines}, key=_rank) if not r.startswith("scratch")]
    rows, columns = len(_DRAWN), len(epsilons)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(2.7 * columns, 2.5 * rows),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, (measure, title) in zip(axes, _DRAWN.items(), strict=True):
        for panel, epsilon in zip(row, epsilons, strict=True):
            for number, recipe in enumerate(recipes):
                own = float("inf") if recipe in ("real", "public") else epsilon
                points = [(n, _values(select(lines, recipe, own, "federated", n), measure)) for n in sizes]
                drawn = [(n, float(np.mean(values)), float(np.std(values))) for n, values in points if values]
                if drawn:
                    where, height, spread = zip(*drawn, strict=True)
                    style = {"real": "k--", "public": "k:"}.get(recipe, "o-")
                    label = {"real": "real (ceiling)", "public": "public (floor)"}.get(recipe, recipe)
                    shade = {} if recipe in ("real", "public") else {"color": f"C{number}"}
                    panel.errorbar(where, height, spread, fmt=style, markersize=4, capsize=2, label=label, **shade)
            panel.set_xscale("log")
            panel.set_xticks(sizes, [str(n) for n in sizes])
            panel.minorticks_off()
        row[0].set_ylabel(title, fontsize=8)
    for panel, epsilon in zip(axes[0], epsilons, strict=True):
        panel.set_title("no noise" if np.isinf(epsilon) else f"epsilon {epsilon:g}", fontsize=10)
    for panel in axes[-1]:
        panel.set_xlabel("patients at each of 3 sites", fontsize=8)
    named: dict[str, Artist] = {}
    for panel in axes.flat:
        handles, labels = panel.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(named.values()), list(named), loc="outside lower center", ncols=len(named), fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
