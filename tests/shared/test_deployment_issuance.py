"""`fedsynth deploy` makes what coordinator and sites need, and replaces it without a site ever losing its trust."""

from __future__ import annotations

import json
import ssl
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedsynth.cli import build
from fedsynth.deployment import certificates, issuance
from fedsynth.deployment.bundle import bundle_sha256
from fedsynth.deployment.certificates import check_certificate, load_ca, make_ca, make_server_certificate, names_of
from fedsynth.deployment.issuance import (
    Authority,
    begin_ca,
    finish_ca,
    home,
    issue_study,
    names_of_file,
    renew_node_key,
    renew_runtime,
    renew_servers,
    survey,
    switch_ca,
)
from fedsynth.deployment.keys import check_node_key, check_private, fingerprint, make_node_key, make_runtime_tls
from fedsynth.deployment.network import handshake
from fedsynth.errors import ExitCode, FedsynthError

GATEWAY = ["gateway.example", "127.0.0.1"]


def fedsynth(*arguments: object) -> Any:
    return CliRunner().invoke(build(), ["deploy", *map(str, arguments)], standalone_mode=False)


def said(*arguments: object) -> Any:
    result = fedsynth(*arguments, "--json")
    assert result.exception is None, result.output
    return json.loads(result.stdout)["data"]


def code_of(probe: Callable[[], object]) -> str:
    with pytest.raises(FedsynthError) as caught:
        probe()
    assert caught.value.hint
    return caught.value.code


def refused(*arguments: object) -> str:
    error = fedsynth(*arguments).exception
    assert isinstance(error, FedsynthError), error
    return error.code


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def serving(keys: Path, server: str = "gateway") -> Iterator[int]:
    """A TLS server with the pair that lies in a study's folder now."""
    listening = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    listening.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / f"{server}.crt", keys / f"{server}.key")
    listening.socket = context.wrap_socket(listening.socket, server_side=True)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield listening.server_address[1]
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join(5)


def test_what_a_coordinator_gets(tmp_path: Path) -> None:
    study = tmp_path / "study"
    told = said("certs", study, "--gateway-name", "gateway.example, 127.0.0.1", "--superlink-name", "superlink")
    keys = study / "keys"
    assert told["give_to_sites"] == str(keys / "ca.crt") and told["keep_offline"] == str(study / "ca" / "ca.key")
    for name in GATEWAY:
        check_certificate(keys / "gateway.crt", keys / "gateway.key", keys / "ca.crt", name)
    for name in ("localhost", "127.0.0.1", "::1", "superlink"):
        check_certificate(keys / "superlink.crt", keys / "superlink.key", keys / "ca.crt", name)
    for private in ("keys/gateway.key", "keys/superlink.key", "keys/superexec.secret", "ca/ca.key"):
        check_private(study / private)
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    assert {path.name for path in keys.iterdir()} == {
        "ca.crt",
        "gateway.crt",
        "gateway.key",
        "superlink.crt",
        "superlink.key",
        "superexec.secret",
    }


def test_the_words_say_what_stays_and_what_goes(tmp_path: Path) -> None:
    shown = fedsynth("certs", tmp_path, "--gateway-name", "gateway.example").output
    assert "Give every site" in shown and "offline" in shown
    digest = survey([tmp_path / "keys" / "ca.crt"])[0].sha256
    assert digest in shown
    made = fedsynth("node-key", tmp_path / "site").output
    assert fingerprint(tmp_path / "site" / "keys" / "node.pub") in made


def test_nothing_is_touched_where_there_is_something(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "gateway.key").write_text("mine")
    assert refused("certs", tmp_path, "--gateway-name", "gateway.example") == "key_exists"
    assert contents(tmp_path) == {tmp_path / "keys" / "gateway.key": b"mine"}
    fedsynth("node-key", tmp_path)
    fedsynth("secret", tmp_path)
    before = contents(tmp_path)
    assert refused("node-key", tmp_path) == "key_exists" and refused("secret", tmp_path) == "key_exists"
    assert contents(tmp_path) == before


def test_names_that_are_wrong_make_nothing(tmp_path: Path) -> None:
    for names, code in (
        ("https://gateway.example", "certificate_name_invalid"),
        (",", "certificate_without_name"),
    ):
        assert refused("certs", tmp_path, "--gateway-name", names) == code
    assert refused("certs", tmp_path, "--gateway-name", "a.example", "--days", "400") == "certificate_days_invalid"
    assert contents(tmp_path) == {}


def test_an_authority_is_used_again(tmp_path: Path) -> None:
    first = issue_study(tmp_path / "first", GATEWAY)
    second = tmp_path / "second"
    said(
        *("certs", second, "--gateway-name", "gateway.example"),
        *("--ca-cert", first.certificate, "--ca-key", first.key),
    )
    assert not (second / "ca").exists()
    assert (second / "keys" / "ca.crt").read_bytes() == first.certificate.read_bytes()
    third = ["certs", tmp_path / "third", "--gateway-name", "gateway.example", "--ca-cert", first.certificate]
    assert refused(*third) == "authority_incomplete"
    first.key.chmod(0o644)
    assert refused(*third, "--ca-key", first.key) == "key_readable_by_others"
    assert not (tmp_path / "third").exists()


def test_expiry_tells_which_and_how_long(tmp_path: Path) -> None:
    authority = issue_study(tmp_path, GATEWAY, days=10)
    told = {Path(each["path"]).name: each for each in said("expiry", tmp_path / "keys")}
    assert told["gateway.crt"]["state"] == "soon" and told["gateway.crt"]["names"] == GATEWAY
    assert told["gateway.crt"]["days_left"] == 9 and not told["gateway.crt"]["authority"]
    assert told["ca.crt"]["state"] == "ok" and told["ca.crt"]["authority"]
    result = fedsynth("expiry", tmp_path)
    assert result.return_value in (None, 0) and "9 days" in result.output
    assert authority.key.name not in result.output


def test_expiry_refuses_what_has_expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Earlier(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.now(UTC) - timedelta(days=20)

    issue_study(tmp_path, GATEWAY)
    with monkeypatch.context() as then:
        then.setattr(certificates, "datetime", Earlier)
        ca = make_ca("an authority")
        pair = make_server_certificate(*ca, GATEWAY, days=10)
    (tmp_path / "keys" / "superlink.crt").write_bytes(pair[0])
    result = fedsynth("expiry", tmp_path)
    assert result.return_value == ExitCode.REFUSED
    assert [line for line in result.output.splitlines() if "FAIL" in line and "superlink.crt" in line]
    assert {each.path.name for each in survey([tmp_path]) if each.state == "expired"} == {"superlink.crt"}


def test_expiry_of_nothing(tmp_path: Path) -> None:
    assert code_of(lambda: survey([tmp_path])) == "no_certificates"
    assert code_of(lambda: survey([tmp_path / "absent.crt"])) == "certificate_missing"


def test_servers_are_renewed_under_the_same_names_and_sites_notice_nothing(tmp_path: Path) -> None:
    authority = issue_study(tmp_path, GATEWAY, ["superlink"], days=20)
    keys, site = tmp_path / "keys", tmp_path / "site.crt"
    site.write_bytes((keys / "ca.crt").read_bytes())
    before = contents(keys)
    aside = renew_servers(tmp_path, authority)
    assert names_of_file(keys / "gateway.crt") == GATEWAY
    assert names_of_file(keys / "superlink.crt") == ["localhost", "superlink", "127.0.0.1", "::1"]
    for server in ("gateway", "superlink"):
        for ending in ("crt", "key"):
            old = [path for path in aside if path.name.startswith(server) and path.suffix == f".{ending}"]
            assert [path.read_bytes() for path in old] == [before[keys / f"{server}.{ending}"]]
            assert f"until-{datetime.now(UTC) + timedelta(days=20):%Y-%m-%d}" in old[0].name
            assert stat.S_IMODE(old[0].stat().st_mode) == 0o600
    with serving(keys) as port:
        assert "certificate until" in handshake("127.0.0.1", port, site)
    with serving(keys, "superlink") as port:
        handshake("localhost", port, site)
    assert {each.path.parent.name for each in survey([tmp_path])} >= {"keys", "ca"}
    assert not any("old" in each.path.parts for each in survey([tmp_path]))
    renew_servers(tmp_path, authority, ["new.example"])
    assert names_of_file(keys / "gateway.crt") == ["new.example"]
    (keys / "gateway.crt").unlink()  # as where the gateway runs elsewhere
    assert {path.stem.split(".")[0] for path in renew_servers(tmp_path, authority)} == {"superlink"}


def test_servers_are_not_renewed_by_an_authority_that_no_site_trusts(tmp_path: Path) -> None:
    issue_study(tmp_path / "study", GATEWAY)
    other = issue_study(tmp_path / "other", GATEWAY)
    before = contents(tmp_path)
    assert code_of(lambda: renew_servers(tmp_path / "study", other)) == "authority_not_trusted"
    assert contents(tmp_path) == before


def test_the_authority_changes_and_no_site_that_follows_loses_its_trust(tmp_path: Path) -> None:
    """The whole change with a TLS server: one site follows each step, another stays with the old authority."""
    study = tmp_path / "study"
    keys, authority = study / "keys", issue_study(study, GATEWAY)
    follows, stays = tmp_path / "follows.crt", tmp_path / "stays.crt"
    for site in (follows, stays):
        site.write_bytes((keys / "ca.crt").read_bytes())

    assert code_of(lambda: switch_ca(study, authority)) == "ca_change_not_begun"
    begin_ca(study, authority)
    assert code_of(lambda: begin_ca(study, authority)) == "key_exists"
    assert code_of(lambda: finish_ca(study, authority)) == "ca_change_not_switched"
    assert len(load_ca(keys / "ca.crt")) == 2
    with serving(keys) as port:
        handshake("127.0.0.1", port, follows)
        follows.write_bytes((keys / "ca.crt").read_bytes())
        handshake("127.0.0.1", port, follows)

    old_key = authority.key.read_bytes()
    aside = switch_ca(study, authority)
    assert old_key in [path.read_bytes() for path in aside] and authority.key.read_bytes() != old_key
    with serving(keys) as port:
        handshake("127.0.0.1", port, follows)
        assert code_of(lambda: handshake("127.0.0.1", port, stays)) == "untrusted_ca"
    with serving(keys, "superlink") as port:  # the gateway trusts keys/ca.crt
        handshake("localhost", port, keys / "ca.crt")

    finish_ca(study, authority)
    assert load_ca(keys / "ca.crt") == load_ca(authority.certificate)
    follows.write_bytes((keys / "ca.crt").read_bytes())
    with serving(keys) as port:
        handshake("127.0.0.1", port, follows)
    renew_servers(study, authority)  # the new one is an authority like any other
    with serving(keys) as port:
        handshake("127.0.0.1", port, follows)


def test_the_old_authority_is_not_dropped_while_a_server_needs_it(tmp_path: Path) -> None:
    authority = issue_study(tmp_path, GATEWAY)
    keys = tmp_path / "keys"
    old = {name: (keys / name).read_bytes() for name in ("superlink.crt", "superlink.key")}
    begin_ca(tmp_path, authority)
    switch_ca(tmp_path, authority)
    for name, content in old.items():  # as if somebody had restored it
        (keys / name).write_bytes(content)
    bundle = (keys / "ca.crt").read_bytes()
    assert code_of(lambda: finish_ca(tmp_path, authority)) == "untrusted_ca"
    assert (keys / "ca.crt").read_bytes() == bundle


def test_an_authority_whose_key_is_in_a_safe_can_be_succeeded(tmp_path: Path) -> None:
    authority = issue_study(tmp_path, GATEWAY)
    authority.key.unlink()
    begin_ca(tmp_path, authority)
    switch_ca(tmp_path, authority)
    finish_ca(tmp_path, authority)
    keys = tmp_path / "keys"
    check_certificate(keys / "gateway.crt", keys / "gateway.key", keys / "ca.crt", "gateway.example")


def test_the_three_steps_by_command(tmp_path: Path) -> None:
    issue_study(tmp_path, GATEWAY)
    for what in ("ca-begin", "ca-switch", "ca-finish", "servers", "secret"):
        result = fedsynth("renew", tmp_path, "--what", what)
        assert result.exception is None and result.output
    keys = tmp_path / "keys"
    check_certificate(keys / "gateway.crt", keys / "gateway.key", home(tmp_path).certificate, "gateway.example")


def test_a_node_key_is_replaced_and_the_old_one_kept(tmp_path: Path) -> None:
    assert code_of(lambda: renew_node_key(tmp_path)) == "node_key_missing"
    before = make_node_key(tmp_path / "keys")
    after, aside = renew_node_key(tmp_path)
    assert after != before and check_node_key(tmp_path / "keys") == f"node key {after}"
    assert {fingerprint(path) for path in aside} == {before}


def test_the_runtime_certificate_keeps_its_names(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    make_runtime_tls(keys, ["node"])
    before = (keys / "runtime.crt").read_bytes()
    renew_runtime(tmp_path)
    assert (keys / "runtime.crt").read_bytes() != before
    check_certificate(keys / "runtime.crt", keys / "runtime.key", keys / "runtime-ca.crt", "node")


def test_an_authority_that_was_made_elsewhere(tmp_path: Path) -> None:
    """With a name of its own and a bundle of two in its file: the first one signs."""
    pair, other = make_ca("Hospital group, authority 7"), make_ca("another")
    given = Authority(tmp_path / "group.pem", tmp_path / "group.key")
    given.certificate.write_bytes(pair[0] + other[0])
    given.key.write_bytes(pair[1])
    given.key.chmod(0o600)
    issue_study(tmp_path / "study", GATEWAY, authority=given)
    keys = tmp_path / "study" / "keys"
    check_certificate(keys / "gateway.crt", keys / "gateway.key", keys / "ca.crt", "gateway.example")
    renew_servers(tmp_path / "study", given)
    assert names_of(certificates.load_certificates(keys / "gateway.crt")[0]) == GATEWAY


def test_the_bundle_is_the_one_that_sites_allow(tmp_path: Path) -> None:
    told = said("bundle", tmp_path / "out")
    assert told["sha256"] == bundle_sha256()
    assert Path(told["path"]).is_file()


def test_a_private_key_never_appears_in_what_is_printed(tmp_path: Path) -> None:
    shown = fedsynth("certs", tmp_path, "--gateway-name", "gateway.example").output
    shown += fedsynth("node-key", tmp_path).output + fedsynth("secret", tmp_path).output
    assert "PRIVATE" not in shown
    assert (tmp_path / "keys" / "superexec.secret").read_text() not in shown
    assert issuance.home(tmp_path).key.is_file()
