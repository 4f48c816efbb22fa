"""A federation whose parties live in network namespaces of their own: nobody reaches anybody but over the wire.

::

    coordinator 10.99.0.1 ──┐
    site a      10.99.0.11 ─┤
    site b      10.99.0.12 ─┼── hub: a bridge, and the way to everywhere else, which leads nowhere and is listened to
    site c      10.99.0.13 ─┘

Whatever a party sends to an address that is none of these four goes to the hub and is written down there: questions of DNS,
too, since the name server that the parties are told of is elsewhere. All addresses and devices are inside the namespaces,
which end with the processes that hold them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from federation import MARK, STUDY, Federation

from fedsynth.deployment.supervisor import script

HUB = "10.99.0.254"
ADDRESSES = {STUDY: "10.99.0.1", "a": "10.99.0.11", "b": "10.99.0.12", "c": "10.99.0.13"}
_NAME_SERVER = "192.0.2.53"  # TEST-NET-1: nobody's
_LONGEST_SECONDS = 600  # that a namespace is held

# Writes down every IPv4 packet to somebody who is none of the parties (one line each), by the first packet socket that
# sees all devices of the hub.
_LISTEN = """
import socket, sys
known = set(sys.argv[1].split(","))
packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
print("listening", flush=True)
while True:
    packet, origin = packets.recvfrom(65536)
    ip = packet[14:]
    target = socket.inet_ntoa(ip[16:20])
    if target in known or origin[2] == socket.PACKET_OUTGOING:
        continue
    length = (ip[0] & 15) * 4
    port = int.from_bytes(ip[length + 2 : length + 4], "big") if ip[9] in (6, 17) else 0
    print(socket.inet_ntoa(ip[12:16]), ip[9], target, port, flush=True)
"""

# Tries ports of an address; prints those that are open.
_SCAN = """
import json, socket, sys
first, last = int(sys.argv[2]), int(sys.argv[3])
found = []
for port in range(first, last + 1):
    with socket.socket() as probe:
        probe.settimeout(0.5)
        if probe.connect_ex((sys.argv[1], port)) == 0:
            found.append(port)
print(json.dumps(found))
"""


def unable() -> str:
    """Why this machine cannot make network namespaces, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(
        ["unshare", "-n", "-m", "sh", "-c", "ip link add v0 type veth peer name v1 && ip link add b0 type bridge"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    return f"no network namespaces here: {tried.stderr.strip()[:200]}" if tried.returncode else ""


@dataclass
class Parted(Federation):
    """See the module's text."""

    host: str = ADDRESSES[STUDY]
    holders: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    listener: subprocess.Popen[bytes] | None = None

    def part(self) -> None:
        """Make the namespaces and join them; before anything is started."""
        names = self.root / "resolv.conf"
        names.write_text(f"nameserver {_NAME_SERVER}\noptions timeout:1 attempts:1\n")
        for name in ("hub", *ADDRESSES):
            self.holders[name] = subprocess.Popen(
                ["unshare", "-n", "-m", "sleep", str(_LONGEST_SECONDS)], env={**os.environ, MARK: str(self.root)}
            )
        _wait_until_apart(list(self.holders.values()))
        self._in("hub", f"ip link add br0 type bridge && ip addr add {HUB}/24 dev br0 && ip link set br0 up")
        self._in("hub", "ip link set lo up && sysctl -qw net.ipv4.ip_forward=0")
        for number, (name, address) in enumerate(ADDRESSES.items()):
            pid = self.holders[name].pid
            self._in("hub", f"ip link add p{number} type veth peer name wire netns {pid}")
            self._in("hub", f"ip link set p{number} master br0 up")
            self._in(name, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1; ip link set lo up")
            self._in(
                name, f"ip addr add {address}/24 dev wire && ip link set wire up && ip route add default via {HUB}"
            )
            self._in(name, f"mount --bind {names} /etc/resolv.conf")
        log = (self.root / "elsewhere.log").open("wb")
        with log:
            self.listener = subprocess.Popen(
                [*self.inside("hub"), sys.executable, "-c", _LISTEN, ",".join(ADDRESSES.values())],
                stdout=log,
                env={**os.environ, MARK: str(self.root)},
            )
        self.wait_until(lambda: "listening" in self._elsewhere_log(), 10, "somebody who listens")

    def inside(self, whose: str) -> list[str]:
        """What to put before a command that is to run where a party lives."""
        return ["nsenter", "-t", str(self.holders[whose].pid), "-n", "-m", f"--wd={Path.cwd()}"]

    def _in(self, whose: str, command: str) -> None:
        done = subprocess.run([*self.inside(whose), "sh", "-ec", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def start(self, *whose: str) -> None:
        """As `Federation.start`, each where it lives."""
        for name in whose:
            role = "study" if name == STUDY else "site"
            log = self.folder(name) / "logs" / "supervisor.log"
            log.parent.mkdir(exist_ok=True)
            with log.open("ab") as stream:
                self.started[name] = subprocess.Popen(
                    [*self.inside(name), *script("fedsynth", role, "start", str(self.folder(name)))],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=self._environment(),
                    start_new_session=True,
                )

    def _environment(self) -> dict[str, str]:
        # A proxy of this machine's is not theirs.
        return {key: value for key, value in super()._environment().items() if not key.lower().endswith("_proxy")}

    def run_in(self, whose: str, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command where a party lives, whatever its exit code."""
        return subprocess.run(
            [*self.inside(whose), *command],
            capture_output=True,
            text=True,
            timeout=90,
            env={**self._environment(), **environment},
            check=False,
        )

    def scan(self, whose: str, address: str, first: int, last: int) -> list[int]:
        """TCP ports of `address` that are open for somebody who lives with `whose`."""
        done = self.run_in(whose, [sys.executable, "-I", "-c", _SCAN, address, str(first), str(last)])
        assert done.returncode == 0, done.stderr
        found: list[int] = json.loads(done.stdout)
        return found

    def elsewhere(self) -> list[str]:
        """Packets that left for somewhere else than the parties: sender, protocol, target, port."""
        return [line for line in self._elsewhere_log().splitlines() if line != "listening"]

    def _elsewhere_log(self) -> str:
        return (self.root / "elsewhere.log").read_text()

    def close(self) -> None:
        """As `Federation.close`; the namespaces end with their holders."""
        super().close()
        for process in (*self.holders.values(), *([self.listener] if self.listener else [])):
            process.kill()
            process.wait(10)


def _wait_until_apart(holders: list[subprocess.Popen[bytes]]) -> None:
    ours = Path("/proc/self/ns/net").readlink()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{each.pid}/ns/net").readlink() == ours for each in holders):
        assert time.monotonic() < deadline, "no namespace was made"
        time.sleep(0.05)
