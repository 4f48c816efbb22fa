"""The Flower ServerApp: thin; the round loop is `fedsynth_server.rounds`."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsynth.errors import UsageError
from fedsynth.plan import load_plan
from fedsynth_server.rounds import run_study
from fedsynth_server.warm_start import load_warm_start

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study whose folder the run config names (``study-folder``: plan.toml, checkpoint, warm-start.safetensors)."""
    folder = context.run_config.get("study-folder")
    if not folder:
        raise UsageError("study_folder_unknown", "The run config does not name a study-folder.")
    path = Path(str(folder))
    warm_start = path / "warm-start.safetensors"
    run_study(
        grid, load_plan(path / "plan.toml"), path, load_warm_start(warm_start)[0] if warm_start.is_file() else None
    )
