"""The files for operators: they parse, name what exists, hold no secret, and ask for no more rights than they need."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import typer.main
import yaml

from fedsynth import __version__
from fedsynth.cli import build

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONTAINERFILES = sorted((DEPLOY / "containers").glob("Containerfile.*"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SCRIPTS = sorted(DEPLOY.rglob("*.sh"))
DOCUMENTS = sorted(DEPLOY.rglob("*.md"))
OFF = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def _name(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


# What is written as a command exists --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root() -> click.Group:
    group = typer.main.get_command(build())
    assert isinstance(group, click.Group)
    return group


def check_fedsynth(root: click.Group, words: list[str], complete: bool) -> None:
    """Raise what `fedsynth` itself would say to these words; `complete`: required arguments have to be there, too."""
    command: click.Command = root
    context = click.Context(root, info_name="fedsynth")
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-"):
            break
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"no command {words[0]!r} in {context.command_path}")
        context, command, words = click.Context(found, info_name=words[0], parent=context), found, words[1:]
    given, rest, _ = command.make_parser(context).parse_args(list(words))
    if rest:
        raise click.UsageError(f"{context.command_path} does not take {rest}")
    for parameter in command.params:
        value = given.get(parameter.name or "")
        missing = not isinstance(value, str | list | tuple | bool)
        if missing and complete and parameter.required:
            raise click.UsageError(f"{context.command_path} needs {parameter.name}")
        if isinstance(parameter.type, click.Choice) and isinstance(value, str):
            parameter.type.convert(value, parameter, context)


def commands_in(text: str) -> Iterator[tuple[str, bool]]:
    """Commands of a document: lines of fenced ``sh`` blocks (complete) and code spans (perhaps only a command's name)."""
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.split(" #")[0].strip(), True
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        yield span, False


def fedsynth_words(command: str) -> list[str] | None:
    """The words after ``fedsynth`` if this is such a command, without redirections; None if it is another."""
    words = shlex.split(command)
    if "fedsynth" not in [Path(word).name for word in words[:1]] or "..." in words:
        return None
    end = next((place for place, word in enumerate(words) if word in (">", "|", "&&", ";")), len(words))
    return words[1:end]


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_documents_name_commands_and_options_that_exist(document: Path, root: click.Group) -> None:
    for command, complete in commands_in(document.read_text(encoding="utf-8")):
        command = command.rpartition(" -- ")[2]  # kubectl exec ... -- COMMAND, runuser ... -- COMMAND
        if command.startswith("fedsynth ") and (words := fedsynth_words(command)) is not None:
            check_fedsynth(root, words, complete)


def test_a_wrong_command_would_be_noticed(root: click.Group) -> None:
    check_fedsynth(root, ["site", "start", "SITE", "--only", "node"], True)
    for wrong in (
        ["site", "begin"],
        ["site", "start", "SITE", "--force"],
        ["site", "start", "SITE", "--only", "both"],
        ["site", "start"],
        ["site", "start", "SITE", "MORE"],
        ["study", "add-site", "STUDY", "KEY.pub"],
    ):
        with pytest.raises(click.UsageError):
            check_fedsynth(root, wrong, True)


def test_the_runbooks_show_every_command_of_their_side(root: click.Group) -> None:
    for side, runbook in (("site", "RUNBOOK-site.md"), ("study", "RUNBOOK-coordinator.md")):
        text = (DEPLOY / runbook).read_text(encoding="utf-8")
        group = root.commands[side]
        assert isinstance(group, click.Group)
        elsewhere = {"new", "gateway-config"}  # writing a plan is no deployment; the gateway has a document of its own
        missing = [name for name in group.commands if name not in elsewhere and f"fedsynth {side} {name}" not in text]
        assert not missing, f"{runbook} does not show {missing}"


def started_commands() -> Iterator[tuple[str, list[str]]]:
    """What units, containers, compose and Kubernetes start."""
    for path in UNITS:
        yield _name(path), shlex.split(unit(path)["Service"]["ExecStart"][0])
    for path in CONTAINERFILES:
        for instruction, value in instructions(path):
            if instruction == "CMD":
                yield _name(path), json.loads(value)
    for name, service in compose()["services"].items():
        if service.get("command"):
            yield f"compose {name}", service["command"]
    for kind, pod in pods():
        for container in pod["containers"]:
            yield f"kubernetes {kind}", container["command"]


def test_what_is_started_exists(root: click.Group) -> None:
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    seen = set()
    for where, command in started_commands():
        program = Path(command[0]).name
        seen.add(program)
        if program == "fedsynth":
            check_fedsynth(root, command[1:], True)
        elif program == "flower-supernode" and command[1:] != ["--version"]:
            given = _parse_args_run_supernode().parse_args(command[1:])
            assert given.isolation == "process", where  # the secret counts in no other mode
            assert given.superexec_auth_secret_file and given.auth_supernode_private_key and given.root_certificates
            assert not given.insecure, where
    assert {"fedsynth", "flower-supernode", "nginx"} <= seen


@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_scripts_are_bash_that_stops_at_errors(script: Path, root: click.Group) -> None:
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith("fedsynth "):
            words = fedsynth_words(re.sub(r'"\$\{\w+\[@\]\}"', "", line.strip()))
            assert words is not None
            check_fedsynth(root, words, True)


@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", str(script)], check=True)


# Secrets, versions, images ------------------------------------------------------------------------------------------


def test_no_secret_is_in_the_files() -> None:
    for path in (path for path in DEPLOY.rglob("*") if path.is_file()):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"BEGIN [A-Z ]*PRIVATE KEY|BEGIN CERTIFICATE|(?i:password\s*[:=])", text), _name(path)
        assert not re.search(r"^kind: Secret$", text, flags=re.MULTILINE), _name(path)


def images() -> Iterator[tuple[str, str]]:
    """Every image that the files name, and where."""
    for path in CONTAINERFILES:
        for instruction, value in instructions(path):
            if instruction == "ARG" and value.startswith("BASE="):
                yield _name(path), value.removeprefix("BASE=")
    for name, service in compose()["services"].items():
        yield f"compose {name}", re.sub(r"^\$\{[A-Z_]+:-(.*)\}$", r"\1", service["image"])
    for entry in load("kubernetes/base/kustomization.yaml")[0]["images"]:
        yield "kustomization", f"{entry.get('newName', entry['name'])}:{entry['newTag']}"
    yield "load-study", load("kubernetes/load-study.yaml")[0]["spec"]["containers"][0]["image"]


def test_images_have_versions_and_ours_is_this_one() -> None:
    nginx = set()
    for where, image in images():
        name, _, tag = image.rpartition(":")
        assert name and tag not in ("", "latest"), f"{where}: {image}"
        if name.startswith("fedsynth-"):
            assert tag == __version__, f"{where}: {image}"
        if name.endswith("/nginx"):
            nginx.add(tag)
    assert len(nginx) == 1
    for path in CONTAINERFILES:
        assert f'org.opencontainers.image.version="{__version__}"' in path.read_text(encoding="utf-8")


def test_versions_come_from_the_constraints() -> None:
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    wanted = [
        line.strip()
        for line in (DEPLOY / "airgap/node-requirements.txt").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert wanted and set(wanted) <= pinned
    assert "torch" not in wanted
    script = (DEPLOY / "airgap/make-wheelhouse.sh").read_text(encoding="utf-8")
    assert 'PIP_CONSTRAINT="$source_tree/constraints.txt"' in script
    # No other place names a version of a Python package.
    for path in (*SCRIPTS, *CONTAINERFILES):
        assert not re.search(r"\b[a-z][a-z-]+==\d", path.read_text(encoding="utf-8")), _name(path)


# Containers ---------------------------------------------------------------------------------------------------------


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions of a Containerfile, continued lines joined, comments left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest) for word, rest in found]


@pytest.mark.parametrize("path", CONTAINERFILES, ids=_name)
def test_containers_need_no_root_no_shell_and_no_network(path: Path) -> None:
    steps = instructions(path)
    last = max(place for place, (word, _) in enumerate(steps) if word == "FROM")
    final = steps[last:]
    assert sum(word == "FROM" for word, _ in steps) == 2  # what installs is not in what runs
    users = [value for word, value in final if word == "USER"]
    assert users and re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[-1])
    assert not any(word in ("ADD", "EXPOSE", "VOLUME") for word, _ in steps)
    assert not any(word == "RUN" for word, _ in final)
    for word, value in steps:
        if word in ("RUN", "CMD", "ENTRYPOINT"):
            assert isinstance(json.loads(value), list)
        if word == "HEALTHCHECK":
            assert isinstance(json.loads(value.partition(" CMD ")[2]), list)
    assert any(word == "HEALTHCHECK" for word, _ in final)
    install = next(json.loads(value) for word, value in steps if word == "RUN" and '"install"' in value)
    assert {"--no-index", "--require-hashes", "--no-deps", "--isolated"} <= set(install)
    variables = dict(part.split("=", 1) for word, value in final if word == "ENV" for part in shlex.split(value))
    assert variables["PYTHONSAFEPATH"] == "1"
    assert {key: variables[key] for key in OFF} == OFF


def test_the_networked_container_has_no_torch() -> None:
    locks = {path.suffix: re.findall(r"requirements\S*\.lock", path.read_text("utf-8")) for path in CONTAINERFILES}
    assert set(locks[".site-node"]) == {"requirements-node.lock"}
    assert set(locks[".site-runner"]) == set(locks[".coordinator"]) == {"requirements.lock"}


def load(name: str) -> list[Any]:
    return [document for document in yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")) if document]


def compose() -> dict[str, Any]:
    document: dict[str, Any] = load("compose/compose.yaml")[0]
    return document


def test_compose_services_have_no_rights_to_spare() -> None:
    for name, service in compose()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"] and "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"].startswith("${FEDSYNTH_UID:?"), name
        assert service["healthcheck"]["test"][0] == "CMD", name  # no shell
        assert service["mem_limit"] and service["pids_limit"] and service["tmpfs"], name
        assert not {"privileged", "ports", "pid", "ipc", "devices", "env_file"} & set(service), name
        assert all(volume["type"] == "bind" for volume in service["volumes"]), name


def test_in_compose_data_and_network_are_apart() -> None:
    document = compose()
    assert all(network["internal"] is True for network in document["networks"].values())
    services = document["services"]
    assert services["gateway"]["network_mode"] == "service:coordinator"  # SuperLink stays on loopback
    assert list(services["coordinator"]["networks"]) == ["outer"]
    for site in ("hospital-a", "hospital-b", "hospital-c"):
        node, runner = services[f"{site}-node"], services[f"{site}-runner"]
        assert set(node["networks"]) == {"outer", f"inside-{site}"}
        assert set(runner["networks"]) == {f"inside-{site}"}
        [keys] = node["volumes"]
        assert keys["source"].endswith(f"/{site}/node/keys") and keys["read_only"] is True
        [folder] = runner["volumes"]
        assert folder["source"].endswith(f"/{site}/site") and folder["target"] == "/site"
        # The node offers tasks on the site's inside network only.
        inside = node["networks"][f"inside-{site}"]["ipv4_address"]
        assert f"--host={inside}" in node["command"] and f"--health-server-address={inside}:18095" in node["command"]
    for secret in document["secrets"].values():
        assert set(secret) == {"file"}


def test_compose_variables_are_in_the_example() -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)", (DEPLOY / "compose/compose.yaml").read_text(encoding="utf-8")))
    shown = set(re.findall(r"^#?\s?([A-Z_]+)=", (DEPLOY / "compose/.env.example").read_text("utf-8"), re.MULTILINE))
    assert used == shown


# systemd ------------------------------------------------------------------------------------------------------------


def unit(path: Path) -> dict[str, dict[str, list[str]]]:
    """Sections, keys and values of a unit file."""
    sections: dict[str, dict[str, list[str]]] = {}
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    section: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line.strip() and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return sections


@pytest.mark.parametrize("path", UNITS, ids=_name)
def test_units_run_without_privileges(path: Path) -> None:
    service = unit(path)["Service"]
    assert service.get("User", ["fedsynth"]) == ["fedsynth"]
    assert service.get("User") or service["DynamicUser"] == ["yes"]
    for key, value in {
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "RestrictNamespaces": "yes",
        "LimitCORE": "0",
        "UMask": "0077",
        "SystemCallArchitectures": "native",
    }.items():
        assert service[key] == [value], key
    assert service["SystemCallFilter"] == ["@system-service", "~@privileged @resources"]
    assert "MemoryMax" in service


def test_the_runner_has_no_network_and_the_node_no_data() -> None:
    runner = unit(DEPLOY / "systemd/fedsynth-site-runner.service")["Service"]
    assert runner["IPAddressDeny"] == ["any"] and runner["IPAddressAllow"] == ["localhost"]
    assert runner["ReadWritePaths"] == ["/var/lib/fedsynth/site"]
    assert "-/var/lib/fedsynth/site/keys/node.key" in runner["InaccessiblePaths"]
    node = unit(DEPLOY / "systemd/fedsynth-site-node.service")["Service"]
    assert node["InaccessiblePaths"] == ["/var/lib/fedsynth"] and "ReadWritePaths" not in node
    variables = dict(part.split("=", 1) for line in node["Environment"] for part in line.split())
    assert {key: variables[key] for key in OFF} == OFF


def _systemd_analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("systemd-analyze is not installed")
    return found


@pytest.mark.parametrize("path", UNITS, ids=_name)
def test_systemd_takes_the_units(path: Path, tmp_path: Path) -> None:
    program = _systemd_analyze()
    # The programs are not installed where the tests run.
    text = re.sub(r"/opt/fedsynth/bin/\S+", "/bin/true", path.read_text(encoding="utf-8"))
    copy = tmp_path / path.name
    copy.write_text(text, encoding="utf-8")
    done = subprocess.run([program, "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60)
    said = [line for line in (done.stdout + done.stderr).splitlines() if path.name in line]
    assert not said and done.returncode == 0, said


@pytest.mark.parametrize("path", UNITS, ids=_name)
def test_systemd_calls_the_units_hardly_exposed(path: Path) -> None:
    command = [_systemd_analyze(), "security", "--offline=yes", "--no-pager", "--threshold=20", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-400:] + done.stderr[-400:]


# Kubernetes ---------------------------------------------------------------------------------------------------------


def manifests() -> list[Any]:
    base = DEPLOY / "kubernetes/base"
    return [
        document
        for name in load("kubernetes/base/kustomization.yaml")[0]["resources"]
        for document in load(base / name)
    ]


def pods() -> list[tuple[str, dict[str, Any]]]:
    found = [("load-study", load("kubernetes/load-study.yaml")[0]["spec"])]
    for manifest in manifests():
        if manifest["kind"] == "StatefulSet":
            found.append((manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]))
    return found


def restricted_violations(pod: dict[str, Any]) -> list[str]:
    """What the Pod Security Standard `restricted` (Kubernetes 1.32) forbids and this pod does."""
    found = [f"uses {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for volume in pod.get("volumes", []):
        found += [f"volume of kind {kind}" for kind in set(volume) - {"name"} - allowed]
    shared = pod.get("securityContext", {})
    if shared.get("sysctls"):
        found.append("sets sysctls")
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        own, name = container.get("securityContext", {}), container["name"]
        effective = {**shared, **own}
        rules = {
            "privileged": not own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": effective.get("runAsNonRoot") is True,
            "runAsUser": effective.get("runAsUser") != 0,
            "seccompProfile": effective.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "capabilities": own.get("capabilities", {}).get("drop") == ["ALL"]
            and set(own["capabilities"].get("add", [])) <= {"NET_BIND_SERVICE"},
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
        }
        found += [f"{name}: {rule}" for rule, kept in rules.items() if not kept]
    return found


def test_pods_keep_the_restricted_standard() -> None:
    assert len(pods()) == 2
    for name, pod in pods():
        assert not restricted_violations(pod), name
        assert pod["automountServiceAccountToken"] is False
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert {"cpu", "memory"} == set(container["resources"]["limits"]) == set(container["resources"]["requests"])
    assert restricted_violations(
        {"hostNetwork": True, "volumes": [{"name": "x", "hostPath": {}}], "containers": []}
    ) == [
        "uses hostNetwork",
        "volume of kind hostPath",
    ]
    assert len(restricted_violations({"containers": [{"name": "x"}]})) == 4


def test_only_the_gateway_can_be_reached() -> None:
    by_kind = {manifest["kind"]: manifest for manifest in manifests()}
    policy = by_kind["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == {} and set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == [] and policy["ingress"] == [{"ports": [{"port": 8443, "protocol": "TCP"}]}]
    [port] = by_kind["Service"]["spec"]["ports"]
    assert port["targetPort"] == "fleet" and port["port"] == 8443
    pod = by_kind["StatefulSet"]["spec"]["template"]["spec"]
    opened = {c["name"]: [p["containerPort"] for p in c.get("ports", [])] for c in pod["containers"]}
    assert opened == {"coordinator": [], "gateway": [8443]}
    mounted = {c["name"]: {m["name"] for m in c["volumeMounts"]} for c in pod["containers"]}
    assert not mounted["gateway"] & {"study", "keys", "secrets"}
    assert by_kind["StatefulSet"]["spec"]["replicas"] == 1
    for container in pod["containers"]:
        assert container["livenessProbe"]
    assert by_kind["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert by_kind["PodDisruptionBudget"]["spec"]["selector"] == by_kind["StatefulSet"]["spec"]["selector"]


def test_kustomize_takes_the_base() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes/base")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    rendered = [document for document in yaml.safe_load_all(done.stdout) if document]
    assert sorted(document["kind"] for document in rendered) == sorted(document["kind"] for document in manifests())
    assert all(document["metadata"].get("namespace", "fedsynth") == "fedsynth" for document in rendered)


# Installation without internet --------------------------------------------------------------------------------------


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, DEPLOY / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lock_files_hold_what_pip_chose() -> None:
    def item(name: str, version: str) -> dict[str, Any]:
        archive = {"hashes": {"sha256": name[0] * 64}}
        return {"metadata": {"name": name, "version": version}, "download_info": {"archive_info": archive}}

    report = json.dumps({"install": [item("torch", "2.13.0+cpu"), item("Importlib_Resources", "7.1.0")]})
    own = json.dumps({"install": [item("fedsynth", "0.1.0")]})
    assert _module("airgap/lock.py").locked([report, own]) == [
        f"fedsynth==0.1.0 --hash=sha256:{'f' * 64}",
        f"importlib-resources==7.1.0 --hash=sha256:{'I' * 64}",
        f"torch==2.13.0+cpu --hash=sha256:{'t' * 64}",
    ]


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License-Expression: MIT\nLicense: other\n", "MIT"),
        ("License: long text\nClassifier: License :: OSI Approved :: BSD License\n", "BSD License"),
        ("License: Apache 2.0\n", "Apache 2.0"),
        ("", "not declared: read the files in the wheel"),
    ],
)
def test_licences_are_those_that_a_package_declares(tmp_path: Path, metadata: str, licence: str) -> None:
    wheel = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x-1.dist-info/METADATA", f"Metadata-Version: 2.4\nName: x\nVersion: 1\n{metadata}\n")
    licenses = _module("airgap/licenses.py")
    assert licenses.declared(licenses.metadata(wheel)) == licence


def _wheelhouse(folder: Path, platform: str) -> str:
    """A wheelhouse of one file that is no wheel; returns the SHA-256 of its list of sums."""
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels" / "x-1-py3-none-any.whl").write_text("x", encoding="utf-8")
    (folder / "PLATFORM").write_text(platform, encoding="utf-8")
    shutil.copy(DEPLOY / "airgap/install.sh", folder / "install.sh")
    sums = subprocess.run(
        ["sha256sum", "wheels/x-1-py3-none-any.whl", "PLATFORM"], cwd=folder, capture_output=True, check=True
    )
    (folder / "SHA256SUMS").write_bytes(sums.stdout)
    return subprocess.run(["sha256sum", folder / "SHA256SUMS"], capture_output=True, check=True).stdout[:64].decode()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("sum", "not the one given"),
        ("file", "a file differs"),
        ("platform", "the wheels are for"),
        ("venv", "is already there"),
    ],
)
def test_the_installer_refuses_before_it_installs(tmp_path: Path, fault: str, words: str) -> None:
    house, venv = tmp_path / "house", tmp_path / "venv"
    digest = _wheelhouse(house, "python3.11 plan9 vax")
    if fault == "sum":
        digest = "0" * 64
    if fault == "file":
        (house / "wheels" / "x-1-py3-none-any.whl").write_text("y", encoding="utf-8")
    if fault == "venv":
        venv.mkdir()
    done = subprocess.run(
        [str(house / "install.sh"), str(venv), digest],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
        timeout=60,
    )
    assert done.returncode == 2 and words in done.stderr
    assert fault == "venv" or not venv.exists()


@pytest.mark.parametrize("runbook", ["RUNBOOK-site.md", "RUNBOOK-coordinator.md"])
def test_a_wheelhouse_is_checked_before_its_installer_is_run(tmp_path: Path, runbook: str) -> None:
    text = (DEPLOY / runbook).read_text(encoding="utf-8")
    (command,) = [line for line in text.splitlines() if "install.sh" in line and not line.startswith("On ")]
    house, ran = tmp_path / "house", tmp_path / "ran"
    digest = _wheelhouse(house, "any")
    (house / "install.sh").write_text(f"#!/bin/sh\ntouch {ran}\n", encoding="utf-8")
    typed = command.replace("SHA256  SHA256SUMS", f"{digest}  SHA256SUMS")
    subprocess.run(["sh", "-c", typed], cwd=house, capture_output=True, timeout=60, check=True)
    assert ran.exists()
    ran.unlink()
    for altered in ("PLATFORM", "SHA256SUMS"):
        (house / altered).write_text("altered", encoding="utf-8")
        assert subprocess.run(["sh", "-c", typed], cwd=house, capture_output=True, timeout=60).returncode != 0
        assert not ran.exists()


# Health -------------------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_the_health_check_tells_a_process_that_serves_from_one_that_does_not() -> None:
    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    serving = _module("containers/health.py").serving
    service = health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        service.set("", health_pb2.HealthCheckResponse.SERVING)
        assert serving(f"127.0.0.1:{port}")
        service.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert not serving(f"127.0.0.1:{port}")
    finally:
        stopped: threading.Event = server.stop(None)
        stopped.wait(5)
    assert not serving(f"127.0.0.1:{port}")
