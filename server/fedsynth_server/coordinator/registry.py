"""``sites.json``: which sites were added, under which keys, and which were revoked.

It is what SuperLink's registrations are made to agree with (`reconcile`), whoever changed what while something was down: a
site that was added while SuperLink rested is registered as soon as it runs, a revoked one is unregistered, and a node that
SuperLink knows but this file does not is none of ours.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsynth.deployment.keys import fingerprint, public_key_bytes
from fedsynth.errors import UsageError
from fedsynth.files import write_atomic
from fedsynth_server.coordinator.settings import Study

if TYPE_CHECKING:  # Flower is heavy, and listing sites needs none of it
    from fedsynth_server.coordinator.control import Control, Node

FILE = "sites.json"


class SiteRecord(BaseModel):
    """A site that was added.

    Attributes:
        name: its name in the plan.
        fingerprint: of its public key, to compare over the telephone.
        public_key: PEM.
        node_id: SuperLink's number for it; None until it is registered there.
        added: when.
        revoked: when its key was revoked; None while it is valid.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    fingerprint: str
    public_key: str
    node_id: int | None = None
    added: datetime
    revoked: datetime | None = None


class Registry(BaseModel):
    """What ``sites.json`` holds: one valid record a site at most, and the revoked ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    sites: list[SiteRecord] = []

    def valid(self) -> dict[str, SiteRecord]:
        """Records that are not revoked, by name."""
        return {record.name: record for record in self.sites if record.revoked is None}


def read_registry(folder: Path) -> Registry:
    """The registry in `folder`; an empty one if no site was added yet.

    Raises:
        UsageError: ``registry_unreadable``.
    """
    path = folder / FILE
    try:
        return Registry.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Registry()
    except (ValidationError, UnicodeDecodeError):
        raise UsageError(
            "registry_unreadable", f"{path} is not an intact list of sites.", "Restore it, or add the sites anew."
        ) from None


def add_site(study: Study, key: Path, name: str) -> SiteRecord:
    """Add a site under its public key; `reconcile` registers it.

    Raises:
        UsageError: ``site_not_in_plan``, ``site_added_already``, ``key_added_already``; of a key that is not suitable.
    """
    named = [site.name for site in study.plan.sites]
    if name not in named:
        raise UsageError(
            "site_not_in_plan",
            f"The plan names no site {name!r}.",
            f"It names {', '.join(named)}. Only the sites of the plan take part.",
        )
    record = SiteRecord(
        name=name,
        fingerprint=fingerprint(key),
        public_key=public_key_bytes(key).decode("ascii"),
        added=datetime.now(UTC),
    )
    with _changing(study.folder):
        registry = read_registry(study.folder)
        if name in registry.valid():
            raise UsageError(
                "site_added_already",
                f"Site {name} was added with key {registry.valid()[name].fingerprint}.",
                f"To change its key: fedsynth study revoke {study.folder} {name}, then add it anew.",
            )
        for other in registry.sites:
            if other.public_key == record.public_key:
                raise UsageError(
                    "key_added_already",
                    f"This key belongs to site {other.name}" + (", and was revoked." if other.revoked else "."),
                    "Every site has a key of its own, and a revoked key stays revoked; the site can make a new one.",
                )
        _write(study.folder, Registry(sites=[*registry.sites, record]))
    return record


def revoke_site(study: Study, name: str) -> SiteRecord:
    """Revoke a site's key; `reconcile` unregisters it.

    Raises:
        UsageError: ``site_unknown``.
    """
    with _changing(study.folder):
        registry = read_registry(study.folder)
        record = registry.valid().get(name)
        if record is None:
            raise UsageError(
                "site_unknown", f"No site {name!r} is added.", f"See `fedsynth study sites {study.folder}`."
            )
        revoked = record.model_copy(update={"revoked": datetime.now(UTC)})
        _write(study.folder, Registry(sites=[revoked if each == record else each for each in registry.sites]))
    return revoked


@dataclass(frozen=True)
class Changes:
    """What has to change at SuperLink, and what the registry has to learn from it.

    Attributes:
        register: records that SuperLink does not know.
        adopt: node ids by name of records that SuperLink knows under another id than the registry.
        unregister: nodes that are revoked, or that nobody added.
    """

    register: list[SiteRecord]
    adopt: dict[str, int]
    unregister: list[Node]


def changes(registry: Registry, nodes: list[Node]) -> Changes:
    """Compare the registry with SuperLink's registrations; keys decide, names must agree."""
    by_key = {node.public_key.decode("ascii", "replace").strip(): node for node in nodes}
    wanted = {record.public_key.strip(): record for record in registry.valid().values()}
    kept = {key: node for key, node in by_key.items() if key in wanted and wanted[key].name == node.name}
    return Changes(
        register=[record for key, record in wanted.items() if key not in kept],
        adopt={wanted[key].name: node.id for key, node in kept.items() if wanted[key].node_id != node.id},
        unregister=[node for node in nodes if node not in kept.values()],
    )


def reconcile(study: Study, control: Control) -> Changes:
    """Make SuperLink's registrations agree with the registry; returns what was changed.

    Raises:
        UsageError: ``key_in_use`` (SuperLink remembers the key as revoked); of the registry.
        SuperlinkUnreachable: ``superlink_unreachable``; what was done until then stays done.
    """
    with _changing(study.folder):
        registry = read_registry(study.folder)
        needed = changes(registry, control.nodes())
        for node in needed.unregister:
            control.unregister(node.id)
        for record in needed.register:
            node_id = control.register(record.public_key.encode("ascii"), record.name)
            registry = _with_node(registry, record.name, node_id)
            _write(study.folder, registry)
        for name, node_id in needed.adopt.items():
            registry = _with_node(registry, name, node_id)
        if needed.adopt:
            _write(study.folder, registry)
    return needed


def _with_node(registry: Registry, name: str, node_id: int) -> Registry:
    current = registry.valid()[name]
    learned = current.model_copy(update={"node_id": node_id})
    return Registry(sites=[learned if each == current else each for each in registry.sites])


@contextmanager
def _changing(folder: Path) -> Iterator[None]:
    """One writer at a time: a command and the supervisor may both have something to write."""
    run = folder / "run"
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (run / "sites.lock").open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _write(folder: Path, registry: Registry) -> None:
    write_atomic(folder / FILE, registry.model_dump_json(indent=2).encode() + b"\n")
