"""Setting up a site: its folder, its first policy, and a plan as a person reads it before approving."""

from __future__ import annotations

from pathlib import Path

from fedsynth.budget import noise_multipliers, planned_epsilon
from fedsynth.errors import UsageError
from fedsynth.plan import StudyPlan
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

# Fewest training patients with which a module may train.
min_patients = 100

# Modules that may use this cohort, and whose noisy results may leave: "moments" and "embedding" (a noisy sum, released
# once), "autoencoder", "radiogenomics" and "gan" (weights, trained in noisy steps).
modules = []

# A seeded run is reproducible and therefore not private.
allow_reproducible_noise = false
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
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(_POLICY.format(name=name, declared=declared_patients), encoding="utf-8")
    return path


def plan_summary(plan: StudyPlan, site: str) -> str:
    """What `plan` asks of `site`, in a few lines."""
    sigma = noise_multipliers(plan, site)
    lines = [
        f"Study {plan.name}: {plan.purpose}",
        f"Digest {plan.digest}",
        f"Sites: {', '.join(each.name for each in plan.sites)}",
        f"Images {'/'.join(plan.image.sequences)}, {plan.image.slices} slices of {plan.image.size} x {plan.image.size}; "
        f"{len(plan.genes.panel)} genes; label {plan.label.name} ({'/'.join(plan.label.classes)})",
        f"Epsilon {planned_epsilon(plan, site):.3f} of {plan.privacy.epsilon:g} per patient at delta {plan.privacy.delta:g} "
        f"(accountant {plan.privacy.accountant})",
    ]
    for module in plan.modules:
        training = plan.training(module)
        lines.append(
            f"  {module}: {'released once' if training.steps == 1 else f'{training.steps} steps'}, "
            f"sample rate {plan.sample_rate(module, site):.3f}, clip {training.max_grad_norm:g}, "
            f"noise multiplier {sigma[module]:g}"
        )
    if plan.privacy.accountant == "prv":
        lines.append(
            "PRV composes the removal of a patient; that adding one costs less is checked numerically, not proven."
        )
    if plan.privacy.reproducible_seed is not None:
        lines.append("NOT PRIVATE: the plan fixes the noise seed.")
    return "\n".join(lines)
