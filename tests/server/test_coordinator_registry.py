"""Who may take part: only sites of the plan, each under a key of its own, and SuperLink is made to agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedsynth.deployment.keys import make_node_key
from fedsynth.errors import FedsynthError, UsageError
from fedsynth.plan import StudyPlan, save_plan
from fedsynth_server.coordinator.control import Control, Node, SuperlinkUnreachable
from fedsynth_server.coordinator.registry import FILE, add_site, changes, read_registry, reconcile, revoke_site
from fedsynth_server.coordinator.settings import Study


@dataclass
class Superlink(Control):
    """SuperLink's registrations, as the Control API treats them: a key that was unregistered never comes back."""

    known: list[Node] = field(default_factory=list)
    spent: set[bytes] = field(default_factory=set)
    away: bool = False

    def nodes(self) -> list[Node]:
        if self.away:
            raise SuperlinkUnreachable("superlink_unreachable", "away")
        return list(self.known)

    def register(self, public_key: bytes, name: str) -> int:
        if public_key in self.spent:
            raise UsageError("key_in_use", "")
        self.spent.add(public_key)
        self.known.append(Node(2**63 + len(self.spent), name, public_key, False, None))
        return self.known[-1].id

    def unregister(self, node_id: int) -> None:
        self.known = [node for node in self.known if node.id != node_id]


@pytest.fixture
def study(tiny_plan: StudyPlan, tmp_path: Path) -> Study:
    save_plan(tiny_plan, tmp_path / "plan.toml")
    return Study(tmp_path)


def key(folder: Path, name: str) -> Path:
    make_node_key(folder / name)
    return folder / name / "node.pub"


def test_a_site_is_added_registered_revoked_and_added_anew(study: Study) -> None:
    superlink = Superlink()
    record = add_site(study, key(study.folder, "first"), "a")
    assert record.node_id is None
    assert [each.name for each in reconcile(study, superlink).register] == ["a"]
    assert read_registry(study.folder).valid()["a"].node_id == superlink.known[0].id
    assert superlink.known[0].name == "a"
    assert superlink.known[0].public_key == record.public_key.encode()

    revoke_site(study, "a")
    assert read_registry(study.folder).valid() == {}
    assert [node.name for node in reconcile(study, superlink).unregister] == ["a"]
    assert superlink.known == []

    again = add_site(study, key(study.folder, "second"), "a")
    reconcile(study, superlink)
    assert [node.public_key for node in superlink.known] == [again.public_key.encode()]
    assert [each.revoked is None for each in read_registry(study.folder).sites] == [False, True]


def test_added_while_superlink_rests_registered_when_it_runs(study: Study) -> None:
    superlink = Superlink(away=True)
    add_site(study, key(study.folder, "first"), "a")
    with pytest.raises(SuperlinkUnreachable):
        reconcile(study, superlink)
    superlink.away = False
    reconcile(study, superlink)
    assert [node.name for node in superlink.known] == ["a"]
    assert reconcile(study, superlink) == changes(read_registry(study.folder), superlink.known)  # nothing is left


def test_a_superlink_that_lost_its_database_learns_the_sites_again(study: Study) -> None:
    add_site(study, key(study.folder, "first"), "a")
    reconcile(study, Superlink())
    new = Superlink()
    reconcile(study, new)
    assert read_registry(study.folder).valid()["a"].node_id == new.known[0].id


def test_a_registration_whose_record_was_lost_is_adopted(study: Study) -> None:
    record = add_site(study, key(study.folder, "first"), "a")
    superlink = Superlink()
    superlink.register(record.public_key.encode(), "a")  # and the coordinator died before it wrote the node's id
    done = reconcile(study, superlink)
    assert not done.register and done.adopt == {"a": superlink.known[0].id}
    assert read_registry(study.folder).valid()["a"].node_id == superlink.known[0].id


def test_nodes_that_nobody_added_are_unregistered(study: Study) -> None:
    superlink = Superlink()
    superlink.register(b"somebody's key", "a")
    reconcile(study, superlink)
    assert superlink.known == []


def test_a_key_under_another_sites_name_is_unregistered(study: Study) -> None:
    record = add_site(study, key(study.folder, "first"), "a")
    other = Node(5, "b", record.public_key.encode(), True, None)
    needed = changes(read_registry(study.folder), [other])
    assert needed.unregister == [other] and [each.name for each in needed.register] == ["a"]


def test_refusals(study: Study) -> None:
    first, second = key(study.folder, "first"), key(study.folder, "second")
    add_site(study, first, "a")
    for path, name, code in (
        (second, "c", "site_not_in_plan"),
        (second, "a", "site_added_already"),
        (first, "b", "key_added_already"),
        (first.with_name("node.key"), "b", "private_key_given"),
        (study.folder / "none.pub", "b", "node_key_missing"),
    ):
        with pytest.raises(FedsynthError) as caught:
            add_site(study, path, name)
        assert caught.value.code == code
    with pytest.raises(FedsynthError) as caught:
        revoke_site(study, "b")
    assert caught.value.code == "site_unknown"
    assert list(read_registry(study.folder).valid()) == ["a"]


def test_a_revoked_key_never_comes_back(study: Study) -> None:
    first = key(study.folder, "first")
    add_site(study, first, "a")
    revoke_site(study, "a")
    with pytest.raises(UsageError) as caught:
        add_site(study, first, "a")
    assert caught.value.code == "key_added_already" and "revoked" in caught.value.message


def test_only_nist_curves(study: Study) -> None:
    foreign = (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1()))
    path = study.folder / "foreign.pub"
    path.write_bytes(
        foreign[0].public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    with pytest.raises(UsageError) as caught:
        add_site(study, path, "a")
    assert caught.value.code == "node_key_invalid"
    path.write_bytes(
        foreign[1]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(UsageError) as caught:
        add_site(study, path, "a")
    assert caught.value.code == "node_key_invalid"


def test_a_broken_registry_stops_everything(study: Study) -> None:
    (study.folder / FILE).write_text('{"sites": [{"name": "a"}]}')
    superlink = Superlink()
    with pytest.raises(UsageError) as caught:
        reconcile(study, superlink)
    assert caught.value.code == "registry_unreadable"
