"""Laying out a study's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedsynth.deployment.network import split_address
from fedsynth.errors import UsageError
from fedsynth.plan import load_plan
from fedsynth_server.coordinator.settings import FILE, Study, checked_address

_SETTINGS = """\
# The coordinator of study {name}: its processes, their doors and keys. Paths are relative to this folder.
schema_version = 1

[gateway]
# Under which name and port the sites reach the gateway. The name must be in its certificate.
address = "{address}"
# What it binds here.
listen = "0.0.0.0:{port}"
# false: it runs elsewhere, with the configuration that `fedsynth study gateway-config` prints.
managed = true
certificate = "keys/gateway.crt"
key = "keys/gateway.key"
# Largest request (MiB). Models of any size pass: they travel in chunks of 5 MB.
max_request_mib = 16
nginx = "nginx"

[superlink]
# Who reaches this port can start runs at every site, so it stays on this machine. Only where the gateway lives in another
# container of the same private network does it listen elsewhere.
listen = "127.0.0.1"
port = 18000
health_port = 18001
# For localhost and 127.0.0.1.
certificate = "keys/superlink.crt"
key = "keys/superlink.key"
# The authority's certificate. Its private key does not belong on this machine.
ca = "keys/ca.crt"
# What the study runner proves itself with (32 random bytes or more).
secret = "keys/superexec.secret"

[study]
# How long (s) the study pauses for want of sites before it gives up; 0: for ever.
patience_s = 0.0
# How long (s) a round that has enough sites stays open for sites that are not connected.
absent_s = 60.0
# After how long, in seconds, a connected site that says nothing is sent its task again (then after twice as long, and so
# on); it answers from what it stores, without a new charge. 0: never.
silent_s = 60.0
"""


def init_study(folder: Path, plan: Path, gateway: str, weights: Path | None) -> Study:
    """Lay out `folder` for the study of `plan`.

    Args:
        folder: the study's folder; whatever lies there already is not touched.
        plan: the study plan (TOML).
        gateway: host:port under which sites will reach the gateway.
        weights: the plan's public weights, if it names any.

    Raises:
        UsageError: ``study_exists``, ``address_invalid``; of the plan or of weights that are not those it names.
    """
    _, port = split_address(checked_address(gateway))
    study = Study(folder)
    for path in (folder / FILE, study.plan_path, study.weights_path):
        if path.exists():
            raise UsageError("study_exists", f"{path} is already there.", "Choose another folder.")
    asked = load_plan(plan)
    _check_weights(plan, weights)
    for made in (folder, folder / "keys", folder / "superlink"):
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copyfile(plan, study.plan_path)
    if weights is not None:
        shutil.copyfile(weights, study.weights_path)
    text = _SETTINGS.format(name=asked.name, address=gateway, port=port)
    (folder / FILE).write_text(text, encoding="utf-8")
    return study


def _check_weights(plan: Path, weights: Path | None) -> None:
    from fedsynth_server.checkpoint import first_state
    from fedsynth_server.warm_start import check_made_for, load_warm_start

    asked = load_plan(plan)
    if weights is None:
        first_state(asked, None)
    else:
        check_made_for(weights, asked)
        first_state(asked, load_warm_start(weights)[0])
