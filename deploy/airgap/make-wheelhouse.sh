#!/usr/bin/env bash
# Collects everything that an installation of fedsynth needs into one folder, for machines without internet.
#
#   deploy/airgap/make-wheelhouse.sh FOLDER
#
# Run it in a checkout of fedsynth, on a connected machine with the same operating system family, processor type and
# Python version as the target. All versions are those of constraints.txt.
#
# FOLDER (must not exist) gets:
#   wheels/                 one wheel a package, fedsynth's own among them
#   requirements.lock       every package with version and hash: coordinator, or a site's runner
#   requirements-node.lock  the few that a site's networked node needs (no torch, nothing that reads patients' files)
#   licenses.tsv            package, version, licence as the package declares it
#   PLATFORM                the Python version and processor type that the wheels are for
#   install.sh              installs from this folder
#   containers/             builds container images from this folder
#   SHA256SUMS              of all of these
#
# Settings, by environment:
#   PYTHON                  the Python to use (python3)
#   PIP_EXTRA_INDEX_URL     https://download.pytorch.org/whl/cpu for torch without CUDA, which is far smaller
#   ALLOW_CUDA=1            accept torch's CUDA libraries (some gigabytes); without it they are refused
#   EXTRAS                  optional parts, such as "codecs" (JPEG lossless and 12-bit DICOM)
set -euo pipefail

fail() { echo "make-wheelhouse: $1" >&2; exit 2; }

[ $# -eq 1 ] || fail "name the folder to write"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source_tree=$(cd "$here/../.." && pwd)
[ -f "$source_tree/constraints.txt" ] || fail "run it in a checkout of fedsynth"
[ ! -e "$1" ] || fail "$1 is already there"
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || fail "$python is not Python 3.11 or 3.12"

mkdir -p "$1/wheels"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT="$source_tree/constraints.txt"

# pip of its own: the system's may be too old to write the report that the lock files are made from.
"$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip)

echo "Building fedsynth ..."
"${pip[@]}" wheel --quiet --no-deps --wheel-dir "$out/wheels" "$source_tree"
own=("$out"/wheels/fedsynth-*.whl)
[ ${#own[@]} -eq 1 ] || fail "expected one wheel of fedsynth, found ${#own[@]}"

echo "Collecting what it needs ..."
wanted="${own[0]}${EXTRAS:+[$EXTRAS]}" # by its file: an index may hold something else under the same name
"${pip[@]}" wheel --quiet --wheel-dir "$out/wheels" "$wanted"

cuda=$(find "$out/wheels" -name 'nvidia_*' -o -name 'triton-*')
if [ -n "$cuda" ] && [ "${ALLOW_CUDA:-}" != 1 ]; then
  fail "torch came with its CUDA libraries. Set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, or ALLOW_CUDA=1."
fi

# --isolated: only what was just collected counts, whatever this machine's pip.conf names.
offline=("${pip[@]}" --isolated install --quiet --dry-run --ignore-installed --no-index --find-links "$out/wheels")
"${offline[@]}" --report "$work/all.json" "$wanted"
mapfile -t node < <(grep -v '^#' "$here/node-requirements.txt")
"${offline[@]}" --report "$work/node.json" "${node[@]}"
"${offline[@]}" --no-deps --report "$work/own.json" "${own[0]}"
"$work/venv/bin/python" "$here/lock.py" "$work/all.json" > "$out/requirements.lock"
"$work/venv/bin/python" "$here/lock.py" "$work/node.json" "$work/own.json" > "$out/requirements-node.lock"
"$work/venv/bin/python" "$here/licenses.py" "$out/wheels" > "$out/licenses.tsv"
"$python" -c 'import platform, sys; print("python%d.%d" % sys.version_info[:2], sys.platform, platform.machine())' > "$out/PLATFORM"
install -m 0755 "$here/install.sh" "$out/install.sh"
mkdir "$out/containers"
install -m 0644 "$here"/../containers/Containerfile.* "$here/../containers/health.py" "$out/containers/"

cd "$out"
# shellcheck disable=SC2094 # SHA256SUMS is left out of its own list
find . -type f ! -name SHA256SUMS -printf '%P\0' | LC_ALL=C sort -z | xargs -0 sha256sum > SHA256SUMS
echo "Wrote $out: $(find wheels -type f | wc -l) wheels, $(du -sh . | cut -f1)"
echo "Tell the installing party this figure by another way than the folder itself:"
sha256sum SHA256SUMS | cut -d' ' -f1
