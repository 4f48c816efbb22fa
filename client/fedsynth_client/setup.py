"""Setting up a site: its folder, its first policy, its node, and a plan as a person reads it before approving."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from fedsynth.budget import evaluation_mechanism, noise_multipliers, planned_epsilon
from fedsynth.deployment.certificates import load_ca
from fedsynth.deployment.keys import make_node_key, make_runtime_tls, make_secret
from fedsynth.errors import UsageError
from fedsynth.files import write_atomic
from fedsynth.marks import CONSEQUENCES, marks
from fedsynth.plan import StudyPlan, load_plan
from fedsynth_client.node.settings import NodeSettings, ca_path, keys, save_settings, secret_path, settings_path
from fedsynth_client.policy import SitePolicy
from fedsynth_client.site import Site

_POLICY = """\
# What this hospital allows. Whatever is not written here is refused.
schema_version = 1

# The name under which study plans know this site.
site = "{name}"

# The cohort size that may be public. A rounded figure, not a count: it sets the sample rate of private training.
declared_patients = {declared}

# Digests of approved plans; `fedsynth site approve` adds them.
approved_plans = []

# Largest epsilon (patient level) over the life of this cohort, all studies together, and largest delta. 0 allows nothing.
max_epsilon = 0.0
max_delta = 0.0

# The same for held-out patients, on whom nothing is trained: what noisy scores of finished generators may cost them.
max_holdout_epsilon = 0.0

# Fewest training patients with which a module may train.
min_patients = 100

# Modules that may use this cohort, and whose noisy results may leave: "moments" and "embedding" (a noisy sum, released
# once), "autoencoder", "radiogenomics", "gan" and "translation" (weights, trained in noisy steps); "evaluation" (a noisy sum
# of scores of held-out patients).
modules = []

# A seeded run is reproducible and therefore not private.
allow_reproducible_noise = false

# A study without privacy (privacy.epsilon = inf) clips and noises nothing: what it computes from patients leaves as it is.
# For public or simulated data only: afterwards this cohort can take part in no private study any more. max_epsilon does not
# bind such a study.
allow_not_private = false

# Whether staff may sign, with this site's key, that a release be made (fedsynth site countersign).
countersign_releases = false
"""


def init_site(folder: Path, name: str, declared_patients: int) -> Path:
    """Write a policy that allows nothing; returns its path.

    Raises:
        UsageError: ``policy_exists``.
    """
    path = Site(folder).policy_path
    if path.exists():
        raise UsageError("policy_exists", f"{path} is already there.", "Edit it, or choose another folder.")
    SitePolicy(site=name, declared_patients=declared_patients)  # refuses a name that no plan could hold
    _make_folder(folder)
    path.write_text(_POLICY.format(name=name, declared=declared_patients), encoding="utf-8")
    return path


def init_node(folder: Path, gateway: str, ca: Path, runtime_names: list[str]) -> str:
    """Write ``node.toml`` and the node's keys; returns the fingerprint of the public key, which the coordinator registers.

    Args:
        folder: the site's folder.
        gateway: host:port of the coordinator's public door.
        ca: the authority that vouches for it, as the coordinator handed it over (PEM).
        runtime_names: names under which the runner finds the node, where they live in two containers.

    Raises:
        UsageError: ``node_settings_exist``, ``gateway_invalid``, ``certificate_missing``, ``not_a_ca``, ``key_exists``,
            ``certificate_name_invalid``.
    """
    if settings_path(folder).exists():
        raise UsageError("node_settings_exist", f"{settings_path(folder)} is already there.", "Edit it.")
    try:
        settings = NodeSettings(gateway=gateway)
    except ValidationError:
        raise UsageError(
            "gateway_invalid", f"{gateway!r} is no host:port.", "For example study.example.org:8443."
        ) from None
    load_ca(ca)
    _make_folder(folder)
    keys(folder).mkdir(mode=0o700, exist_ok=True)
    write_atomic(ca_path(folder, settings), ca.read_bytes())
    fingerprint = make_node_key(keys(folder))
    make_runtime_tls(keys(folder), runtime_names)
    make_secret(secret_path(folder))
    save_settings(settings, folder)  # last: a folder with settings has all its keys
    return fingerprint


def _make_folder(folder: Path) -> None:
    """The site's folder; a new one is its owner's alone, one that was there keeps its permissions."""
    if not folder.is_dir():
        folder.mkdir(parents=True, mode=0o700)


def find_plan(site: Site, plan: str) -> StudyPlan:
    """The plan that a person means by a file's path or by the digest of a plan that was offered here.

    Raises:
        UsageError: ``plan_not_offered``, ``plan_missing``, ``plan_not_toml`` or ``plan_invalid``.
        Refused: ``plan_altered``.
    """
    if re.fullmatch(r"[0-9a-f]{64}", plan):
        return site.offered(plan)
    return load_plan(Path(plan))


def plan_summary(plan: StudyPlan, site: str) -> str:
    """What `plan` asks of `site`, in a few lines."""
    sigma, private = noise_multipliers(plan, site), plan.privacy.private
    lines = [
        f"Study {plan.name}: {plan.purpose}",
        *marks(plan.privacy),
        *([] if private else [CONSEQUENCES]),
        f"Digest {plan.digest}",
        f"Sites: {', '.join(each.name for each in plan.sites)}",
        f"Images {'/'.join(plan.image.sequences)}, {plan.image.slices} slices of {plan.image.size} x {plan.image.size}; "
        f"{len(plan.genes.panel)} genes; label {plan.label.name} ({'/'.join(plan.label.classes)})",
        f"Epsilon {planned_epsilon(plan, site):.3f} of {plan.privacy.epsilon:g} per patient at delta {plan.privacy.delta:g} "
        f"(accountant {plan.privacy.accountant})"
        if private
        else "Epsilon infinite per patient: no protection at all",
    ]
    for module in plan.modules:
        training = plan.training(module)
        lines.append(
            f"  {module}: {'released once' if training.steps == 1 else f'{training.steps} steps'}, "
            f"sample rate {plan.sample_rate(module, site):.3f}, "
            + (f"clip {training.max_grad_norm:g}, noise multiplier {sigma[module]:g}" if private else "no noise")
        )
    if plan.site_evaluation is not None:
        lines.append(
            f"  evaluation on held-out patients: released once, epsilon {plan.site_evaluation.epsilon:g} of theirs, clip "
            f"{plan.site_evaluation.max_grad_norm:g}, noise multiplier {evaluation_mechanism(plan).noise_multiplier:g}; "
            "without it the study goes on"
        )
    if plan.privacy.accountant == "prv":
        lines.append(
            "PRV composes the removal of a patient; that adding one costs less is checked numerically, not proven."
        )
    return "\n".join(lines)
