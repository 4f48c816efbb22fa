#!/usr/bin/env bash
# Installs fedsynth from this folder into a new virtual environment; touches no network.
#
#   ./install.sh VENV SHA256 [--node]
#
# SHA256 is the SHA-256 of the file SHA256SUMS, as the party that made the folder told you by another way. Whoever altered
# the folder may have altered this file, too, so check both sums by hand before you run it (see the runbooks).
# --node installs only what a site's networked node needs.
# PYTHON names the Python to use (python3).
set -euo pipefail

fail() { echo "install: $1" >&2; exit 2; }

[ $# -eq 2 ] || { [ $# -eq 3 ] && [ "$3" = --node ]; } || fail "usage: install.sh VENV SHA256 [--node]"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1
python=${PYTHON:-python3}
lock=requirements.lock
[ "${3:-}" != --node ] || lock=requirements-node.lock
[ ! -e "$venv" ] || fail "$venv is already there"

found=$(sha256sum "$here/SHA256SUMS" | cut -d' ' -f1)
[ "$found" = "$2" ] || fail "SHA256SUMS has the SHA-256 $found, not the one given. Do not install this folder."
(cd "$here" && sha256sum --quiet --check --strict SHA256SUMS) || fail "a file differs from SHA256SUMS. Do not install this folder."

mine=$("$python" -c 'import platform, sys; print("python%d.%d" % sys.version_info[:2], sys.platform, platform.machine())')
made=$(cat "$here/PLATFORM")
[ "$mine" = "$made" ] || fail "the wheels are for $made; this is $mine"

"$python" -m venv "$venv"
# --isolated: neither the environment nor a pip.conf may name an index or other options.
"$venv/bin/python" -m pip --isolated install --quiet --disable-pip-version-check --no-cache-dir --no-index --no-deps \
  --find-links "$here/wheels" --require-hashes --requirement "$here/$lock"
FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 "$venv/bin/fedsynth" --version >/dev/null
echo "Installed $("$venv/bin/fedsynth" --version) into $venv"
