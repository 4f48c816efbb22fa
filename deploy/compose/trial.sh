#!/usr/bin/env bash
# Lays out a trial of three hospitals and a coordinator for compose.yaml: folders, keys, settings, policies.
#
#   trial.sh FOLDER PLAN COHORT_A COHORT_B COHORT_C [WEIGHTS]
#
# PLAN names the sites hospital-a, hospital-b and hospital-c; COHORT_x are cohorts prepared for it (fedsynth site prepare);
# WEIGHTS are the plan's public weights, if it names any. Run it under the account that is to own everything, not as root,
# in an environment with fedsynth (or inside the fedsynth-coordinator image).
#
# TRIAL ONLY: it writes each site's policy from the plan and approves the plan in its name. In a real study a hospital's data
# officer does both after reading the plan, and the authority's key is made elsewhere.
set -euo pipefail

fail() { echo "trial: $1" >&2; exit 2; }

if [ $# -lt 5 ] || [ $# -gt 6 ]; then
  fail "usage: trial.sh FOLDER PLAN COHORT_A COHORT_B COHORT_C [WEIGHTS]"
fi
[ "$(id -u)" -ne 0 ] || fail "not as root: the containers run as the account that owns the folder"
[ ! -e "$1" ] || fail "$1 is already there"
umask 077
mkdir -p "$1"
trial=$(cd "$1" && pwd)
plan=$(realpath "$2")
cohorts=("$3" "$4" "$5")
weights=()
[ $# -lt 6 ] || weights=(--weights "$(realpath "$6")")
address=coordinator.example.org:8443
study=$trial/coordinator/study

fedsynth study init "$study" --plan "$plan" --gateway "$address" "${weights[@]}"
fedsynth deploy certs "$study" --gateway-name coordinator.example.org
mkdir "$trial/offline" "$trial/coordinator/gateway-logs" "$trial/coordinator/gateway-run"
mv "$study/ca" "$trial/offline/"
# The gateway is a container of its own, which shares the coordinator's loopback interface.
sed -i 's/^managed = true$/managed = false/' "$study/coordinator.toml"
grep -q '^managed = false$' "$study/coordinator.toml" || fail "coordinator.toml could not be set to an unmanaged gateway"
fedsynth study gateway-config "$study" --keys /gateway --superlink 127.0.0.1:18000 > "$trial/coordinator/nginx.conf"

# What the plan asks of a site: patients, epsilon, delta.
wanted() {
  python3 - "$plan" "$1" <<'PYTHON'
import sys, tomllib
plan = tomllib.load(open(sys.argv[1], "rb"))
patients = {site["name"]: site["nominal_patients"] for site in plan["sites"]}
if sys.argv[2] not in patients:
    sys.exit(f"trial: the plan does not name {sys.argv[2]}")
privacy = plan["privacy"]
print(patients[sys.argv[2]], privacy["epsilon"], privacy.get("delta", 1e-5), sep="\t")
PYTHON
}

number=0
for site in hospital-a hospital-b hospital-c; do
  folder=$trial/$site
  what=$(wanted "$site")
  IFS=$'\t' read -r patients epsilon delta <<< "$what"
  fedsynth site init "$folder/site" --name "$site" --declared-patients "$patients"
  fedsynth site init "$folder/node" --gateway "$address" --ca "$study/keys/ca.crt" --runtime-name "$site-node"
  # Of the node's files the runner gets what it needs to find and believe the node, and no private key.
  sed -i -e "s/^runtime = .*/runtime = \"$site-node:18094\"/" -e "s/^health_listen = .*/health_listen = \"$site-node:18095\"/" \
    "$folder/node/node.toml"
  mkdir "$folder/site/keys"
  cp -p "$folder/node/node.toml" "$folder/site/"
  cp -p "$folder/node/keys/runtime-ca.crt" "$folder/node/keys/superexec.secret" "$folder/site/keys/"
  cp -a "${cohorts[number]}" "$folder/site/cohort"
  sed -i -e "s/^max_epsilon = .*/max_epsilon = $epsilon/" -e "s/^max_delta = .*/max_delta = $delta/" \
    -e "s/^min_patients = .*/min_patients = 5/" \
    -e 's/^modules = .*/modules = ["moments", "autoencoder", "radiogenomics", "embedding", "gan"]/' "$folder/site/policy.toml"
  fedsynth site approve "$folder/site" "$plan" --yes
  fedsynth study add-site "$study" "$folder/node/keys/node.pub" --name "$site"
  number=$((number + 1))
done

cat > "$trial/.env" <<EOF
FEDSYNTH_TRIAL=$trial
FEDSYNTH_UID=$(id -u)
FEDSYNTH_GID=$(id -g)
EOF
echo "Laid out $trial. Next: docker compose --file compose.yaml --env-file $trial/.env up --detach"
