"""Train on synthetic, test on real, on 1,508 real contrast-enhanced T1 slices of three tumour classes.

``python simulations/benchmarks/real_slices.py --data FOLDER --cohorts FOLDER --out FOLDER`` (`--data` holds
``<class>/<number>.png``, figshare 1512427, CC BY 4.0; `--cohorts` the public patients that ``cohorts.py`` drew).
The patients' ids are lost, so the unit of privacy is the **slice** (record), which protects a patient of many slices less
than the studies of this software do. Numbers run in patient order: sites and the test set are contiguous ranges of each
class. Neighbours differ by one record; delta is 1e-5; 32 x 32 pixels, grey.

Methods, each at epsilon 1, 3, 10 and without noise, three sites:

- ``gan``: the study's adversarial engine from random weights, weights averaged over sites after each round;
- ``embedding, public features and start``: class-wise mean embedding in the features of a network that was trained on
  simulated public slices, released once by each site, and a generator, pre-trained on public slices, that is fitted to
  the sum (DP-MEPF, Harder et al. 2023); ``embedding, public features`` from random weights; ``embedding, random
  features`` with a network of random filters, from random weights;
- ``gaussian``: class means and a pooled covariance of low spatial frequencies, released once.

Beside them ``real``: the classifier trained on the real training slices, and ``majority``: always the commonest class.
About 20 minutes on one core with two seeds. Results are appended to ``real-slices.jsonl``; what is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from fedsynth_simulations.benchmarking.pictures import save_grid
from fedsynth_simulations.benchmarking.slice_methods import METHODS
from fedsynth_simulations.benchmarking.slices import CLASSES, Task, classify, load_task


def main() -> None:
    """Parse the command line, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cohorts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--gan-seeds", nargs="+", type=int, default=[1], help="its runs take the longest")
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 3.0, 10.0, math.inf])
    parser.add_argument("--methods", nargs="+", default=["real", "majority", *METHODS])
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "real-slices.jsonl"
    done = {json.loads(line)["key"] for line in path.read_text().splitlines()} if path.exists() else set()
    task = load_task(given.data, given.cohorts)
    for method in given.methods:
        epsilons = [math.inf] if method in ("real", "majority") else given.epsilons
        for seed in given.gan_seeds if method == "gan" else given.seeds:
            for epsilon in epsilons:
                key = f"{method}/{epsilon}/{seed}"
                if key in done:
                    continue
                started = time.process_time()
                result = _run(task, method, epsilon, seed, given.out)
                line = {"key": key, "method": method, "epsilon": str(epsilon), "seed": seed, **result}
                line["cpu_seconds"] = round(time.process_time() - started, 1)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    print(_table([json.loads(line) for line in path.read_text().splitlines()]))


def _run(task: Task, method: str, epsilon: float, seed: int, out: Path) -> dict[str, float | None]:
    if method == "majority":
        commonest = np.bincount(task.train.labels).argmax()
        return {"accuracy": float((task.test.labels == commonest).mean()), "auc": 0.5}
    if method == "real":
        return classify(task.train, task.test, seed)
    drawn = METHODS[method](task, epsilon, seed)
    if seed == 1:
        rows = [drawn.images[drawn.labels == code][:12] for code in range(len(CLASSES))]
        save_grid(out / f"{method.replace(', ', '-').replace(' ', '-')}-{epsilon}.png", np.concatenate(rows), 12)
    return classify(drawn, task.test, seed)


def _table(lines: list[dict[str, object]]) -> str:
    """Markdown: a row a method and epsilon, means over seeds."""
    cells: dict[tuple[str, str], list[dict[str, object]]] = {}
    for line in lines:
        cells.setdefault((str(line["method"]), str(line["epsilon"])), []).append(line)
    rows = ["| method | epsilon | accuracy | macro AUC | seeds |", "| --- | --- | --- | --- | --- |"]
    for (method, epsilon), found in cells.items():
        accuracy, auc = (np.array([float(str(line[name])) for line in found]) for name in ("accuracy", "auc"))
        shown = [f"{v.mean():.3f}" + (f" ± {v.std():.3f}" if len(v) > 1 else "") for v in (accuracy, auc)]
        rows.append(f"| {method} | {epsilon} | {shown[0]} | {shown[1]} | {len(found)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
