"""The Flower ServerApp: thin; the round loop is `fedsynth_server.rounds`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsynth.errors import UsageError
from fedsynth.plan import load_plan
from fedsynth_server.rounds import Patience, run_study
from fedsynth_server.warm_start import check_made_for, load_warm_start


def study_folder(context: Context) -> Path:
    """The study's folder, which the run config names (``study-folder``).

    Raises:
        UsageError: ``study_folder_unknown``.
    """
    folder = context.run_config.get("study-folder")
    if not folder:
        raise UsageError("study_folder_unknown", "The run config does not name a study-folder.")
    return Path(str(folder))


def make_app(
    folder_of: Callable[[Context], Path] = study_folder,
    patience: Patience = Patience(),  # noqa: B008 (immutable)
) -> ServerApp:
    """A ServerApp that runs the study in the folder that `folder_of` finds (plan.toml, checkpoint, warm start)."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        folder = folder_of(context)
        plan, warm_start, weights = load_plan(folder / "plan.toml"), folder / "warm-start.safetensors", None
        if warm_start.is_file():
            check_made_for(warm_start, plan)
            weights = load_warm_start(warm_start)[0]
        run_study(grid, plan, folder, weights, patience)

    return app


app = make_app()
