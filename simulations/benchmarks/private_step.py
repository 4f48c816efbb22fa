"""Measure the private step of the discriminator: book-keeping, Opacus' modes, and the step without privacy.

``python simulations/benchmarks/private_step.py --out FOLDER`` takes about ten minutes on one core and writes
``private-step.json`` and ``private-step.md``.

A step is what the patients' part of a training step costs: forward and backward pass over the drawn patients, clipping,
noise, optimiser. (The fake batch is a plain pass in every mode and left out.) Times: every mode steps once a round, in
turn, so that whatever else the machine does falls on all of them alike; reported is the median over rounds, in CPU time
of the process and in wall time. Memory: each mode in a process of its own, peak resident memory after two steps
minus that before the first (Linux). Exactness: the clipped sum against autograd on one patient at a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.nn.functional import softplus

from fedsynth.dp.bookkeeping import Bookkeeper
from fedsynth.dp.functional import gradient_penalties
from fedsynth.dp.randomness import SystemRandomness
from fedsynth.dp.step import CHUNK, Backend, PrivateModel, make_private, private_step, private_step_of
from fedsynth.models.condition import TumourMap
from fedsynth.models.dcgan import Discriminator, initialise

_CLIP, _CHANNELS, _CONDITION = 1.0, 4, 12

Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """What is stepped: a discriminator of `width` on `batch` patients of `size` x `size` pixels."""

    size: int
    width: int
    batch: int

    def model(self) -> Discriminator:
        """The discriminator with seeded weights."""
        places = TumourMap(self.size, (4, 5, 6), 3, (0.1, 200.0), 192 / self.size, 80.0)
        model = Discriminator(
            condition_dim=_CONDITION, channels=_CHANNELS, size=self.size, width=self.width, tumour_map=places
        )
        initialise(model, torch.Generator().manual_seed(7))
        return model

    def batch_of_patients(self) -> tuple[Tensor, Tensor]:
        """A made-up batch: images and conditions."""
        generator = torch.Generator().manual_seed(8)
        images = torch.rand(self.batch, _CHANNELS, self.size, self.size, generator=generator) * 2 - 1
        return images, torch.rand(self.batch, _CONDITION, generator=generator) * 2 - 1

    def losses(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """Losses of the made-up batch by positions in it."""
        images, codes = self.batch_of_patients()
        return lambda module, rows: softplus(-module(images[rows], codes[rows]))


# 0.7 M parameters at 64 pixels, and the main job's own discriminator.
SETTINGS = (Setting(64, 32, 64), Setting(64, 32, 512), Setting(32, 16, 64))


def not_private(
    setting: Setting, dtype: torch.dtype | None = None, memory_format: torch.memory_format = torch.contiguous_format
) -> Step:
    """Plain step on the whole batch."""
    model, losses, everyone = setting.model(), setting.losses(), torch.arange(setting.batch)
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = losses(model, everyone).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ours(
    setting: Setting, backend: Backend = "bookkeeping", dtype: torch.dtype | None = None, chunk: int = CHUNK
) -> Step:
    """`private_step` with one of its backends."""
    private, losses = _private(setting, backend, dtype), setting.losses()
    return lambda: private_step(private, setting.batch, losses, chunk=chunk)


def functional(setting: Setting, penalty: bool = False) -> Step:
    """`private_step_of` with each patient's own gradient, and, if wanted, with a gradient penalty inside the clip."""
    private, (images, codes) = _private(setting, "functional"), setting.batch_of_patients()

    def losses(model: nn.Module, images: Tensor, codes: Tensor) -> Tensor:
        real = softplus(-model(images, codes))
        return real + gradient_penalties(lambda at: model(at, codes), 0.5 * images) if penalty else real

    return lambda: private_step_of(private, setting.batch, lambda rows: (images[rows, None], codes[rows, None]), losses)


def _private(setting: Setting, backend: Backend, dtype: torch.dtype | None = None) -> PrivateModel:
    model = setting.model()
    return make_private(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        noise_multiplier=1.0,
        max_grad_norm=_CLIP,
        expected_batch=setting.batch,
        randomness=SystemRandomness(),
        backend=backend,
        autocast=dtype,
    )


class _GhostOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]
    """Opacus' optimiser of ghost clipping with the same noise as ours, so that noise costs the same."""

    randomness = SystemRandomness()

    def add_noise(self) -> None:
        std = float(self.noise_multiplier) * float(self.max_grad_norm)
        for parameter in self.params:
            parameter.grad = parameter.summed_grad + self.randomness.normal(parameter.shape, std)


class _GivenLosses(nn.Module):
    """A criterion for Opacus: the losses are computed already."""

    reduction = "mean"

    def forward(self, losses: Tensor, _: Tensor) -> Tensor:
        return losses


def ghost(setting: Setting) -> Step:
    """Opacus with ``grad_sample_mode="ghost"``: two backward passes, no per-sample gradients of linear layers."""
    model, losses, everyone = setting.model(), setting.losses(), torch.arange(setting.batch)
    module = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=_CLIP, use_ghost_clipping=True, loss_reduction="mean"
    )
    optimizer = _GhostOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-3),
        noise_multiplier=1.0,
        max_grad_norm=_CLIP,
        expected_batch_size=setting.batch,
    )
    criterion = DPLossFastGradientClipping(module, optimizer, _GivenLosses(), loss_reduction="mean")

    def step() -> None:
        optimizer.zero_grad()
        criterion(losses(module, everyone), everyone).backward()
        optimizer.step()

    return step


MODES: dict[str, Callable[[Setting], Step]] = {
    "not private": not_private,
    "book-keeping": ours,
    "Opacus hooks": lambda s: ours(s, "hooks", chunk=s.batch),
    "Opacus ghost": ghost,
    "not private, channels last": lambda s: not_private(s, memory_format=torch.channels_last),
    "not private, bfloat16": lambda s: not_private(s, torch.bfloat16),
    "book-keeping, bfloat16": lambda s: ours(s, dtype=torch.bfloat16),
    "functional": functional,
    "functional, with a gradient penalty": lambda s: functional(s, penalty=True),
}


def times(setting: Setting, rounds: int) -> dict[str, dict[str, float]]:
    """Median CPU and wall time of a step in ms, by mode."""
    steps = {name: make(setting) for name, make in MODES.items()}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            if turn:  # the first round is a warm-up
                seen[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {
            "cpu_ms": 1e3 * statistics.median(cpu for cpu, _ in found),
            "wall_ms": 1e3 * statistics.median(wall for _, wall in found),
        }
        for name, found in seen.items()
    }


def _peak(name: str, setting: Setting, threads: int, queue: multiprocessing.Queue[float]) -> None:
    _quiet(threads)
    step = MODES[name](setting)
    before = _high_water_mib()
    for _ in range(2):
        step()
    queue.put(_high_water_mib() - before)


def _high_water_mib() -> float:
    # Not `getrusage`: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak_mib(name: str, setting: Setting, threads: int) -> float:
    """Extra peak resident memory of two steps in MiB, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(target=_peak, args=(name, setting, threads, queue))
    process.start()
    found = queue.get(timeout=600)
    process.join()
    return found


def largest_error(setting: Setting) -> float:
    """Largest difference to autograd on one patient at a time, over the largest value; half of the patients clipped."""
    model, losses = setting.model(), setting.losses()
    parameters = list(model.parameters())
    alone = [torch.autograd.grad(losses(model, torch.tensor([i])).sum(), parameters) for i in range(setting.batch)]
    norms = [float(torch.cat([g.double().flatten() for g in own]).norm()) for own in alone]
    clip = statistics.median(norms)
    expected = [
        torch.stack([min(1.0, clip / (norm + 1e-6)) * g.double() for norm, g in zip(norms, of_all, strict=True)]).sum(0)
        for of_all in zip(*alone, strict=True)
    ]
    everyone = torch.arange(setting.batch)
    found, _ = Bookkeeper(model, parameters).clipped_sums(lambda: losses(model, everyone), setting.batch, clip)
    difference = max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))
    return difference / max(float(e.abs().max()) for e in expected)


def as_markdown(results: list[dict[str, Any]]) -> str:
    """One table a setting."""
    lines = []
    for result in results:
        setting, modes = result["setting"], result["modes"]
        plain, hooks, book = modes["not private"], modes["Opacus hooks"], modes["book-keeping"]
        lines += [
            f"### {setting['size']} x {setting['size']} pixels, batch {setting['batch']}, "
            f"{result['parameters'] / 1e6:.2f} M parameters",
            "",
            "| step | CPU, ms | wall, ms | over not private | hooks over it | peak extra memory, MiB |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {name} | {m['cpu_ms']:.0f} | {m['wall_ms']:.0f} | {m['cpu_ms'] / plain['cpu_ms']:.2f} | "
            f"{hooks['cpu_ms'] / m['cpu_ms']:.2f} | {m['peak_mib']:.0f} |"
            for name, m in modes.items()
        ]
        lines += [
            "",
            f"Book-keeping: {book['cpu_ms'] / plain['cpu_ms']:.2f} x the step without privacy, "
            f"{hooks['cpu_ms'] / book['cpu_ms']:.2f} x faster than hooks, "
            f"{book['peak_mib'] / hooks['peak_mib']:.2f} of their extra memory."
            + (f" Largest relative error: {result['error']:.1e}." if result["error"] is not None else ""),
            "",
        ]
    return "\n".join(lines)


def _quiet(threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=12, help="at batch 64; a quarter of it at 512")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    _quiet(given.threads)
    results: list[dict[str, Any]] = []
    for setting in SETTINGS:
        modes = times(setting, given.rounds if setting.batch <= 64 else max(given.rounds // 4, 2))
        for name in modes:
            modes[name]["peak_mib"] = peak_mib(name, setting, given.threads)
        results.append(
            {
                "setting": asdict(setting),
                "parameters": sum(p.numel() for p in setting.model().parameters()),
                "modes": modes,
                "error": largest_error(setting) if setting.batch <= 64 else None,
            }
        )
        report = {
            "torch": torch.__version__,
            "threads": given.threads,
            "rounds": given.rounds,
            "chunk": CHUNK,
            "results": results,
        }
        # After every setting, so that a run that is stopped leaves what it has.
        (given.out / "private-step.json").write_text(json.dumps(report, indent=2))
        (given.out / "private-step.md").write_text(as_markdown(results))
        print(as_markdown(results[-1:]), flush=True)


if __name__ == "__main__":
    main()
