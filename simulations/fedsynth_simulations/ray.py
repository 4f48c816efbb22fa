"""The same study over Flower's Ray engine, for those who have it: slower to start, sites in processes of their own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from flwr.app import Context

from fedsynth.errors import UsageError
from fedsynth_client.app import make_app as make_client_app
from fedsynth_server.app import make_app as make_server_app


def run_over_ray(study_folder: Path, site_folders: list[Path]) -> None:
    """Run the study in `study_folder` over one Ray actor a site.

    Raises:
        UsageError: ``ray_missing``.
    """
    if find_spec("ray") is None:
        raise UsageError("ray_missing", "Ray is not installed.", "pip install 'fedsynth[ray]'")
    from flwr.simulation import run_simulation

    folders = [str(folder.resolve()) for folder in site_folders]
    study = study_folder.resolve()

    def of_partition(context: Context) -> Path:
        return Path(folders[int(str(context.node_config["partition-id"]))])

    run_simulation(
        server_app=make_server_app(lambda _: study),
        client_app=make_client_app(of_partition),
        num_supernodes=len(folders),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
