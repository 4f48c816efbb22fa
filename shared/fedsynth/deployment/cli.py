"""`fedsynth deploy`: keys and certificates for coordinator and sites."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedsynth.deployment.issuance import Authority

app = typer.Typer(help="Make, check and renew keys and certificates for a deployment.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The study's or the site's folder; keys lie in its keys/.")]
CaCert = Annotated[Path | None, typer.Option(help="An authority's certificate (PEM); usually FOLDER/ca/ca.crt.")]
CaKey = Annotated[Path | None, typer.Option(help="Its private key (PEM), e.g. on the medium it is kept on.")]
Days = Annotated[int, typer.Option(help="Days that a server certificate is valid, at most 397.")]
CaName = Annotated[str, typer.Option("--name", help="Name of a new authority; if left out, one with the day in it.")]
SuperLinkName = Annotated[
    str, typer.Option(help="Names of SuperLink besides localhost, parted by commas: for a container network.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


class What(StrEnum):
    """What is renewed."""

    SERVERS = "servers"
    CA_BEGIN = "ca-begin"
    CA_SWITCH = "ca-switch"
    CA_FINISH = "ca-finish"
    SECRET = "secret"
    NODE_KEY = "node-key"
    RUNTIME = "runtime"


@app.command()
def certs(
    out: Folder,
    gateway_name: Annotated[
        str, typer.Option(help="DNS names and IP addresses under which sites reach the gateway, parted by commas.")
    ],
    superlink_name: SuperLinkName = "",
    ca_cert: CaCert = None,
    ca_key: CaKey = None,
    days: Days = 365,
    name: CaName = "",
    as_json: AsJson = False,
) -> None:
    """Make a study's authority, the certificates of gateway and SuperLink, and the study runner's secret."""
    from fedsynth.cli import envelope
    from fedsynth.deployment.issuance import issue_study, survey

    given = _given(ca_cert, ca_key)
    authority = issue_study(out, _names(gateway_name), _names(superlink_name), given, days, name)
    trusted = survey([out / "keys" / "ca.crt"])[0]
    if as_json:
        envelope(
            {
                "give_to_sites": str(out / "keys" / "ca.crt"),
                "keep_offline": str(authority.key),
                "ca_sha256": trusted.sha256,
                "keys": str(out / "keys"),
            }
        )
        return
    typer.echo(
        f"Wrote {out / 'keys'}: certificates and keys of gateway and SuperLink, and the secret. They stay there."
    )
    typer.echo(f"Give every site {out / 'keys' / 'ca.crt'} and read its SHA-256 out by telephone:\n  {trusted.sha256}")
    typer.echo(f"Keep {authority.key} offline: move it to a medium in a safe. Who has it can pose as the gateway.")


@app.command("node-key")
def node_key(out: Folder, as_json: AsJson = False) -> None:
    """Make a site's node key: node.key stays, node.pub goes to the coordinator."""
    from fedsynth.cli import envelope
    from fedsynth.deployment.keys import make_node_key

    made = make_node_key(out / "keys")
    if as_json:
        envelope({"public_key": str(out / "keys" / "node.pub"), "fingerprint": made})
        return
    typer.echo(f"Send the coordinator {out / 'keys' / 'node.pub'} and read its fingerprint out by telephone:\n  {made}")
    typer.echo("node.key never leaves this machine.")


@app.command()
def secret(out: Folder) -> None:
    """Make the secret between a Flower process and the runner that takes its tasks."""
    from fedsynth.deployment.keys import make_secret

    path = out / "keys" / "superexec.secret"
    make_secret(path)
    typer.echo(f"Wrote {path}: for the processes of this folder only.")


@app.command()
def expiry(
    paths: Annotated[list[Path], typer.Argument(help="Certificates, or folders that hold them.")],
    as_json: AsJson = False,
) -> None:
    """Show until when each certificate is valid; the exit code tells whether one has expired."""
    from fedsynth.cli import envelope
    from fedsynth.deployment.checks import Line, show
    from fedsynth.deployment.issuance import survey
    from fedsynth.errors import ExitCode

    found = survey(paths)
    if as_json:
        envelope(
            [
                {
                    "path": str(each.path),
                    "subject": each.subject,
                    "authority": each.authority,
                    "names": each.names,
                    "expires": each.expires.isoformat(),
                    "days_left": each.days_left,
                    "state": each.state,
                    "sha256": each.sha256,
                }
                for each in found
            ]
        )
    else:
        states = {"ok": "ok", "soon": "warn", "expired": "fail"}
        remedy = "Renew it with `fedsynth deploy renew`."
        show(
            Line(
                states[each.state],  # type: ignore[arg-type]
                f"{each.path}: {'authority ' if each.authority else ''}{each.subject}, until {each.expires:%Y-%m-%d} "
                f"({each.days_left} days)",
                "" if each.state == "ok" else remedy,
            )
            for each in found
        )
    if any(each.state == "expired" for each in found):
        raise typer.Exit(ExitCode.REFUSED)


@app.command()
def renew(
    out: Folder,
    what: Annotated[
        What,
        typer.Option(
            help="servers: certificates of gateway and SuperLink. ca-begin, ca-switch, ca-finish: the three steps to a new "
            "authority. secret: of either side. node-key, runtime: of a site."
        ),
    ] = What.SERVERS,
    gateway_name: Annotated[str, typer.Option(help="New names of the gateway; those it has, if left out.")] = "",
    superlink_name: SuperLinkName = "",
    ca_cert: CaCert = None,
    ca_key: CaKey = None,
    days: Days = 365,
    name: CaName = "",
) -> None:
    """Replace keys or certificates; the old ones are kept in keys/old under the day they expire."""
    from fedsynth.deployment import issuance
    from fedsynth.deployment.keys import make_secret

    authority = _given(ca_cert, ca_key) or issuance.home(out)
    aside: list[Path] = []
    if what is What.SERVERS:
        aside = issuance.renew_servers(out, authority, _names(gateway_name), _names(superlink_name), days)
        after = "Restart gateway and SuperLink: `fedsynth study stop` and `start`. Sites need nothing."
    elif what is What.CA_BEGIN:
        following = issuance.begin_ca(out, authority, name)
        after = (
            f"Give every site {out / 'keys' / 'ca.crt'}, which holds the old and the new authority, and let it restart its\n"
            f"node. When all have it: --what ca-switch. Keep {following.key} offline in the meantime."
        )
    elif what is What.CA_SWITCH:
        aside = issuance.switch_ca(out, authority, days)
        after = (
            "Restart gateway and SuperLink. A site that still has the old authority alone cannot connect now.\n"
            f"When all sites are back: --what ca-finish. Keep {authority.key} offline."
        )
    elif what is What.CA_FINISH:
        aside = issuance.finish_ca(out, authority)
        after = f"Give every site {out / 'keys' / 'ca.crt'} in place of the one with both, and destroy the old key."
    elif what is What.SECRET:
        make_secret(out / "keys" / "superexec.secret", replace=True)
        after = "Restart the processes of this folder."
    elif what is What.NODE_KEY:
        made, aside = issuance.renew_node_key(out)
        after = (
            f"Send the coordinator {out / 'keys' / 'node.pub'} ({made}). The node\n"
            "cannot join before the coordinator has revoked the old key and added this one; then restart it."
        )
    else:
        aside = issuance.renew_runtime(out)
        after = "Restart node and runner together."
    for path in aside:
        typer.echo(f"The old one is now {path}")
    typer.echo(after)


@app.command()
def bundle(
    out: Annotated[Path, typer.Argument(help="The folder to write the bundle into.")], as_json: AsJson = False
) -> None:
    """Write the Flower bundle that every site allows, and print its hash."""
    import hashlib

    from fedsynth.cli import envelope
    from fedsynth.deployment.bundle import bundle_bytes
    from fedsynth.files import write_atomic

    content = bundle_bytes()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "fedsynth-study.fab"
    write_atomic(path, content)
    digest = hashlib.sha256(content).hexdigest()
    if as_json:
        envelope({"path": str(path), "sha256": digest})
    else:
        typer.echo(f"{digest}  {path}")


def _names(value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


def _given(certificate: Path | None, key: Path | None) -> Authority | None:
    from fedsynth.deployment.issuance import Authority
    from fedsynth.errors import UsageError

    if (certificate is None) != (key is None):
        raise UsageError(
            "authority_incomplete", "An authority is a certificate and a key.", "Give --ca-cert and --ca-key."
        )
    return Authority(certificate, key) if certificate is not None and key is not None else None
