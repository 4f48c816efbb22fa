"""Checks of the private computation's parts, made on the code that a site runs, with made-up patients.

A bound from canaries lies far below the claim, so a fault that costs less than the difference passes it: half the noise,
for one. These checks measure single promises of a mechanism instead: how much noise there is, how far one patient moves
a sum, how often a patient is drawn, what is charged, what is sent. Where chance takes part, a check of a sound mechanism
fails once in a million times.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from opacus.accountants import RDPAccountant
from scipy.stats import binom, chi2, norm
from torch import Tensor
from torch.nn.functional import pad

from fedsynth.auditing.values import MechanismCheck
from fedsynth.budget import charge, mechanism
from fedsynth.dp.accounting import Mechanism, epsilon
from fedsynth.dp.randomness import Randomness, SeededRandomness, SystemRandomness
from fedsynth.errors import JobFailed, Refused
from fedsynth.plan import Activity, StudyPlan
from fedsynth.records import WEIGHTS, State, check_reply, progress_of, progress_record, to_record
from fedsynth_client.auditing.standins import (
    IMAGES,
    Noiseless,
    Patients,
    StandIn,
    alike,
    canary_patients,
    flat,
    for_many_steps,
    heard,
    stand_in,
    step_weights,
)
from fedsynth_client.auditing.wire import told
from fedsynth_client.ledger import Ledger, Limit, Task

_ALARM = 1e-6
_NOISE_GENES = 5000  # profile length, or row length, of a stand-in that is only listened to for its noise
_FEW, _MANY = 8, 400
_MANY_IMAGES = 100  # whose gradients are taken one by one
_STEPS = 3
# Orders for Opacus' accountant. It takes seconds for its own choice, most of them for orders that are no whole numbers.
_ORDERS = [1.25, 1.5, 1.75, 2.5, 3.5, *range(2, 64), 96, 128, 192, 256]
_TOLERANCE = 1e-3  # of what is read off weights and moments in float32


def noise_scale(plan: StudyPlan, site: str, module: Activity) -> MechanismCheck:
    """Whether what is released without any patient has the variance that was charged, in every step and parameter.

    Each parameter, however small, is held against its own interval of chance: a bias without noise must not hide among
    thousands of weights that have it.
    """
    block = _short(charge(plan, site, module).mechanism)
    stand = _without_start(stand_in(plan, module, _NOISE_GENES, block.noise_multiplier))
    parts = heard(for_many_steps(stand), _nobody(stand, module), block, SystemRandomness())
    expected = block.noise_multiplier * float(step_weights(stand, block.steps).square().sum().sqrt())
    ok, finding = _as_charged(parts, expected)
    return MechanismCheck(
        id="noise-scale",
        title="The noise is as large as was charged",
        module=module,
        ok=ok,
        finding=f"Released without patients, in {block.steps} steps: {finding}",
    )


def noise_beside_patients(plan: StudyPlan, site: str, module: Activity) -> MechanismCheck:
    """Whether the noise is as large when patients take part: what a step releases, less what it does without noise."""
    block = _everybody(plan, site, module)
    stand = stand_in(plan, module, _NOISE_GENES, block.noise_multiplier)
    patients = canary_patients(module, stand.plan, _FEW)
    if module not in IMAGES:
        patients = replace(patients, rows=pad(patients.rows, (0, _NOISE_GENES - _FEW)))
    noisy, still = (heard(stand, patients, block, source) for source in (SystemRandomness(), Noiseless()))
    parts = {name: values - still[name] for name, values in noisy.items()}
    ok, finding = _as_charged(parts, block.noise_multiplier * float(step_weights(stand, 1)[0]))
    return MechanismCheck(
        id="noise-beside",
        title="The noise is as large when patients take part",
        module=module,
        ok=ok,
        finding=f"Released with {_FEW} patients, less what the same step releases without noise: {finding}",
    )


def _as_charged(parts: State, expected: float) -> tuple[bool, str]:
    """Whether the values of every parameter, and all together, have the standard deviation `expected`; and a sentence."""
    outside = []
    for name, values in parts.items():
        low, high = _spread_by_chance(values.numel(), _ALARM / (len(parts) + 1))
        ratio = float(values.square().mean().sqrt()) / expected
        if not low * (1 - _TOLERANCE) <= ratio <= high * (1 + _TOLERANCE):
            outside.append(f"{name} has {ratio:.4f} times it")
    everything = flat(parts)
    low, high = _spread_by_chance(len(everything), _ALARM / (len(parts) + 1))
    whole = float(everything.square().mean().sqrt()) / expected
    ok = not outside and low * (1 - _TOLERANCE) <= whole <= high * (1 + _TOLERANCE)
    return ok, (
        f"{len(everything)} values have {whole:.4f} times the standard deviation of {expected:g} clipping norms that was "
        f"charged (chance alone gives {low:.3f} to {high:.3f})" + (f"; {'; '.join(outside)}." if outside else ".")
    )


def _spread_by_chance(count: int, alarm: float) -> tuple[float, float]:
    """Between which values the root mean square of `count` standard normal values lies but for a chance of `alarm`."""
    low, high = (math.sqrt(float(chi2.ppf(p, count)) / count) for p in (alarm / 2, 1 - alarm / 2))
    return low, high


def _without_start(stand: StandIn) -> StandIn:
    """The stand-in with all weights 0 at first, of which every change can be read off: fit for noise, not for patients."""
    return replace(stand, weights={name: torch.zeros_like(tensor) for name, tensor in stand.weights.items()})


def noise_is_fresh(plan: StudyPlan, site: str, module: Activity) -> MechanismCheck:
    """Whether two runs of the same task draw noise of their own."""
    block = replace(charge(plan, site, module).mechanism, steps=1)
    stand = _without_start(stand_in(plan, module, _NOISE_GENES, block.noise_multiplier))
    first, second = (flat(heard(stand, _nobody(stand, module), block, SystemRandomness())) for _ in range(2))
    lengths = float(first.norm() * second.norm())
    limit = float(norm.isf(_ALARM / 2)) / math.sqrt(len(first))
    alike_by = float(first @ second) / lengths if lengths else 1.0
    return MechanismCheck(
        id="noise-fresh",
        title="No noise is used twice",
        module=module,
        ok=abs(alike_by) <= limit,
        finding=f"The noise of two runs correlates by {alike_by:+.4f} (chance alone stays within {limit:.4f})."
        if lengths
        else "Two runs without patients released zeros: there is no noise to compare.",
    )


def clipping_binds(plan: StudyPlan, site: str, module: Activity) -> MechanismCheck:
    """Whether adding one patient, however extreme, moves the un-noised sum by at most the clipping norm.

    The sum is measured with and without the patient, beside a few others; over images also beside nobody, since there a
    patient's random numbers may depend on who else was drawn, and sums of the others then differ. A patient of whom the
    clip leaves a whole norm must be among them: a sum that nobody moves would pass anything.
    """
    stand = _read_off(plan, module, _FEW)
    block = _everybody(plan, site, module)
    cohort = canary_patients(module, plan, _FEW)
    before = _sum(stand, cohort, block)
    alone = stand.trained is not None
    moved, together = {}, float(before.norm())
    for name, patient in _extremes(module, plan).items():
        after = _sum(stand, cohort + patient, block)
        moved[name] = float((_sum(stand, patient, block) if alone else after - before).norm())
        together = max(together, float(after.norm()))
    worst, furthest = max(moved.items(), key=lambda item: item[1] if math.isfinite(item[1]) else math.inf)
    bounded = all(distance <= 1 + _TOLERANCE for distance in moved.values()) and together <= _FEW + 1 + _TOLERANCE
    return MechanismCheck(
        id="clipping",
        title="One patient moves the sum by at most the clipping norm",
        module=module,
        ok=bounded and furthest >= 1 - 0.01,
        finding=f"Of {len(moved)} extreme patients the one with {worst} moved the sum furthest, by {furthest:.4f} clipping "
        f"norms; beside {_FEW} others the sum's length was {together:.4f} at most.",
    )


def patient_counts_once(plan: StudyPlan, site: str, module: Activity) -> MechanismCheck:
    """Whether a patient, drawn for certain, adds one clipped contribution however many slices or values there are."""
    stand, block = _read_off(plan, module, _FEW), _everybody(plan, site, module)
    one = alike(module, plan, _FEW, 1)
    if module in IMAGES:  # slices that have little in common, so that none can hide behind another
        other = canary_patients(module, plan, 2)
        one = replace(one, rows=torch.stack([other.rows[0, :, 0], other.rows[1, :, 0]], dim=1)[None])
    length = float(_sum(stand, one, block).norm())
    return MechanismCheck(
        id="patient-once",
        title="A patient counts once, whatever the number of slices",
        module=module,
        ok=abs(length - 1) <= 0.01,
        finding=f"A patient drawn for certain adds a contribution of {length:.4f} clipping norms to a step's sum.",
    )


def sampling_rate(plan: StudyPlan, site: str, module: Activity, repeats: int = 4) -> MechanismCheck:
    """Whether a step draws patients as often as was charged.

    All patients are alike, so an un-noised sum is as long as the number of those drawn. Twice as many slices as patients
    drawn one by one would show as twice the number. Where random numbers are a part of a patient's gradient (an
    interpolate, a latent vector), the sum of everybody tells the mean gradient, and how far others may be from it.
    """
    block = replace(charge(plan, site, module).mechanism, steps=1)
    stand = _read_off(plan, module, _FEW, size=float(_MANY))
    many = _MANY if stand.trained is None else _MANY_IMAGES
    crowd = alike(module, plan, _FEW, many)
    mean = _sum(stand, crowd, replace(block, sample_rate=1.0)) / many
    share = float(mean.norm())  # 1 where all gradients are the same; a contribution is never longer than 1
    draws = [
        float(_sum(stand, crowd, block, SystemRandomness()) @ mean) / share**2 if share else 0.0 for _ in range(repeats)
    ]
    total, patients = sum(draws), repeats * many
    low, high = (float(binom.ppf(p, patients, block.sample_rate)) for p in (_ALARM / 2, 1 - _ALARM / 2))
    # Each drawn patient counts 1 on average, with a variance of at most 1 / share^2 - 1.
    unlike = math.sqrt(max(1 / share**2 - 1, 0.0) * high) * float(norm.isf(_ALARM / 2)) if share else 0.0
    same = share >= 1 - _TOLERANCE
    whole = not same or all(abs(drawn - round(drawn)) <= 0.1 for drawn in draws)
    # Longer than 1: somebody was drawn, or counted, more than once, and the mean would hide it from what is drawn later.
    once = 0 < share <= 1 + _TOLERANCE
    slack = 0.0 if same else unlike
    least, most = low * (1 - _TOLERANCE) - slack, high * (1 + _TOLERANCE) + slack
    return MechanismCheck(
        id="sampling-rate",
        title="Patients are drawn as often as was charged",
        module=module,
        ok=once and whole and least <= total <= most,
        finding=f"The mean over a step that draws everybody is {share:.2f} long, where 1 is the most. {repeats} steps drew "
        f"{total:.0f} of {patients} made-up patients; at the charged rate of "
        f"{block.sample_rate:.4f} chance alone gives {least:.0f} to {most:.0f}.",
    )


def accountant_composes(plan: StudyPlan, site: str) -> MechanismCheck:
    """Whether a ledger that was charged for every round of every module tells the epsilon of all of them.

    Measured against Opacus' accountant for the steps that the plan says, and against the budget: to spend the whole plan
    once more must be refused. (The ledger's orders are finer than those asked of Opacus, so its epsilon may be a little
    smaller.)
    """
    reference, delta, study = RDPAccountant(), plan.privacy.delta, plan.digest
    unlimited = Limit(math.inf, delta)
    charged: list[Mechanism] = []
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        for module in plan.modules:
            block, norm_of = mechanism(plan, site, module), plan.training(module).max_grad_norm
            for number in range(1, plan.training(module).rounds + 1):
                ledger.charge(
                    Task(study, module, number),
                    block,
                    max_grad_norm=norm_of,
                    private=True,
                    study_limit=unlimited,
                    lifetime_limit=unlimited,
                )
                charged.append(block)
            # As many steps as the plan says, whatever the ledger made of the rounds.
            steps = plan.training(module).steps
            reference.history.append((block.noise_multiplier, block.sample_rate, steps))
        spent, one = ledger.epsilon(delta, "rdp", study), max(epsilon([block], delta) for block in set(charged))
        opacus = float(reference.get_epsilon(delta, alphas=_ORDERS))
        stopped = _is_refused(ledger, plan, site)
    alone = len(charged) == 1
    grows = spent > one * (1 + 1e-6) or (alone and abs(spent - one) <= 1e-6 * one)
    return MechanismCheck(
        id="accountant",
        title="The ledger composes all rounds of all modules",
        module=None,
        ok=grows and 0.95 * opacus <= spent <= opacus + 1e-6 and stopped,
        finding=f"After {len(charged)} charged rounds the ledger tells epsilon {spent:.4f}; Opacus' accountant tells "
        f"{opacus:.4f} for the same rounds; the costliest single round costs {one:.4f}. To spend the whole plan once more "
        f"was {'refused' if stopped else 'NOT refused'}.",
    )


def _is_refused(ledger: Ledger, plan: StudyPlan, site: str) -> bool:
    """Whether the ledger, after the whole plan, refuses to charge as much again under the plan's budget."""
    limit = Limit(plan.privacy.epsilon, plan.privacy.delta)
    try:
        for module in plan.modules:
            steps = plan.training(module).steps
            ledger.charge(
                Task(plan.digest, module, plan.training(module).rounds + 1),
                mechanism(plan, site, module, steps=steps),
                max_grad_norm=plan.training(module).max_grad_norm,
                private=True,
                study_limit=limit,
                lifetime_limit=limit,
                accountant=plan.privacy.accountant,
            )
    except Refused as refusal:
        return refusal.code == "budget_exceeded"
    return False


def closed_list(plan: StudyPlan, site: str, module: Activity) -> MechanismCheck:
    """Whether a round's result holds what may leave and nothing else, and a reply with a loss on patients is refused."""
    block = _short(charge(plan, site, module).mechanism)
    stand = stand_in(plan, module, _FEW, block.noise_multiplier)
    result = stand.block(canary_patients(module, plan, _FEW), block, SystemRandomness())
    agreed = told(plan, module)
    extra = sorted(set(result.progress) - agreed)
    expected = set(result.weights) if not stand.weights else set(stand.weights)
    own = not extra and set(result.weights) == expected and _passes(plan, module, result.weights, result.progress)
    smuggled = [
        _passes(plan, module, result.weights, {**dict.fromkeys(agreed, 0.0), "real_loss": 0.5}),
        _passes(plan, module, result.weights, dict.fromkeys(agreed, 0.0), more="real_loss"),
    ]
    return MechanismCheck(
        id="closed-list",
        title="Nothing but the closed list leaves",
        module=module,
        ok=own and not any(smuggled),
        finding=(f"The result carries {', '.join(extra)}, which may not leave. " if extra else "")
        + f"The result of a round {'passed' if own else 'FAILED'} the check of replies; with a loss on patients beside it, "
        f"{sum(smuggled)} of {len(smuggled)} replies passed.",
    )


def _passes(
    plan: StudyPlan, module: Activity, weights: State, progress: dict[str, float], more: str | None = None
) -> bool:
    from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    receipt = ConfigRecord({"head": "0" * 64, "epsilon": 1.0, "epsilon_lifetime": 1.0, "steps": 1, "private": True})
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
        WEIGHTS[module]: to_record(weights),
        "progress": progress_record(progress),
        "receipt": receipt,
    }
    if more is not None:
        records[more] = MetricRecord({more: 0.5})
    try:
        check_reply(RecordDict(records), module, progress_of(plan, module))
    except JobFailed:
        return False
    return True


def progress_is_public(plan: StudyPlan, site: str, module: Activity) -> MechanismCheck:
    """Whether the progress that is sent with a result tells of patients only what the result itself tells.

    The same task is run on two cohorts that have nothing in common, with equal draws and equal noise. Of a network over
    profiles, the progress has to follow from the weights before and after. What the GAN trains on patients is made to
    stand still; then nothing that leaves may differ.
    """
    block = _everybody(plan, site, module)
    stand = stand_in(plan, module, _FEW, block.noise_multiplier)
    if module == "gan":
        still = {"learning_rate": 0.0, "discriminator_steps": 1}
        if stand.plan.gan.generator_is_private:
            still["generator_learning_rate"] = 0.0
        gan = stand.plan.gan.model_copy(update=still)
        stand = replace(stand, plan=stand.plan.model_copy(update={"gan": gan}))
    one, two = canary_patients(module, plan, _FEW)[torch.arange(2)], canary_patients(module, plan, _FEW)
    results = [stand.block(patients, block, SeededRandomness(1)) for patients in (one, two[torch.arange(4, _FEW)])]
    if module == "gan":
        ok = results[0].progress == results[1].progress and all(
            torch.equal(results[0].weights[name], results[1].weights[name]) for name in results[0].weights
        )
        finding = "With networks that stand still where they see patients, what leaves is "
        finding += "the same for two cohorts." if ok else "NOT the same for two cohorts."
    else:
        told = [dict(result.progress) for result in results]
        follows = [_update_norm(stand, result.weights) for result in results]
        ok = all(
            not rest or (set(rest) == {"update_norm"} and math.isclose(rest["update_norm"], length, rel_tol=1e-6))
            for rest, length in zip(told, follows, strict=True)
        )
        finding = (
            f"The progress of two rounds {'follows' if ok else 'does NOT follow'} from the weights sent and returned."
        )
    return MechanismCheck(
        id="progress", title="Progress tells nothing that the result does not", module=module, ok=ok, finding=finding
    )


def _update_norm(stand: StandIn, after: dict[str, Tensor]) -> float:
    changes = [(after[name].double() - start.double()).square().sum() for name, start in stand.weights.items()]
    return math.sqrt(sum(float(change) for change in changes))


def _short(block: Mechanism) -> Mechanism:
    """A block of few steps, so that noise that is missing in later steps shows."""
    return replace(block, steps=min(block.steps, _STEPS))


def _everybody(plan: StudyPlan, site: str, module: Activity) -> Mechanism:
    """One step that draws everybody."""
    return replace(charge(plan, site, module).mechanism, sample_rate=1.0, steps=1)


def _read_off(plan: StudyPlan, module: Activity, genes: int, size: float = 10.0) -> StandIn:
    """A stand-in whose released sums, of up to `size` clipping norms, can be read off."""
    return stand_in(plan, module, genes, size)


def _nobody(stand: StandIn, module: Activity) -> Patients:
    everyone = canary_patients(module, stand.plan, _FEW)
    if module not in IMAGES:
        everyone = replace(everyone, rows=torch.zeros(1, _NOISE_GENES).expand(_FEW, -1))
    return everyone[torch.zeros(0, dtype=torch.int64)]


def _sum(stand: StandIn, patients: Patients, block: Mechanism, draws: Randomness | None = None) -> Tensor:
    """The un-noised sum of one step, in clipping norms."""
    return flat(heard(stand, patients, block, Noiseless(draws)))


def _extremes(module: Activity, plan: StudyPlan) -> dict[str, Patients]:
    """Patients made to move a sum as far as can be, each by itself."""
    plain = alike(module, plan, _FEW, 1)

    def with_rows(change: Callable[[Tensor], Tensor]) -> Patients:
        return replace(plain, rows=change(plain.rows.clone()))

    def one_value(value: float) -> Callable[[Tensor], Tensor]:
        def change(rows: Tensor) -> Tensor:
            rows.view(-1)[0] = value
            return rows

        return change

    if module in IMAGES:
        features = plain.morphology.clone()
        features[:, 0] = 1e5
        return {
            "nothing extreme": plain,
            "an extreme feature": replace(plain, morphology=features),
            "values of 60,000": with_rows(lambda rows: rows.float().sign().mul(6e4).half()),
            "an infinite value": with_rows(one_value(math.inf)),
            "a value that is no number": with_rows(one_value(math.nan)),
        }
    return {
        "one large value": plain,
        "large values throughout": with_rows(lambda rows: rows.amax() * torch.ones_like(rows)),
        "values of 1e30": with_rows(lambda rows: rows.sign() * 1e30),
        "an infinite value": with_rows(one_value(math.inf)),
        "a value that is no number": with_rows(one_value(math.nan)),
    }
