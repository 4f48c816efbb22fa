"""What an audit of a plan's mechanisms found, as values."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from fedsynth.plan import Activity


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AuditedModule(_Value):
    """A module that was run once with canaries, each of which was in or out by a fair coin (Steinke et al., 2023).

    Attributes:
        module: of the plan; or ``"evaluation"``, the release of held-out patients' scores.
        site: whose mechanism (sample rate and noise) was audited.
        claimed_epsilon: of this module alone, as its accountant says, at `delta`.
        canaries: m, all of whose memberships were drawn.
        guesses: how many memberships the auditor guessed (it may abstain).
        correct: how many of these guesses were right.
        confidence: of `epsilon_bound`, e.g. 0.95.
        epsilon_bound: the largest epsilon that the guesses refute; the mechanism is at least as bad as that.
        reachable: the bound that the audit would have given if all guesses had been right: no bound can be above it. Below
            `claimed_epsilon`, the audit could not have refuted the claim whatever the mechanism did.
        looks: how many ways to guess were fixed before the run. `guesses`, `correct` and `epsilon_bound` are those of the
            most telling one, each at confidence ``1 - (1 - confidence) / looks``.
        model: what the module was run with, in words.
    """

    module: Activity
    site: str
    claimed_epsilon: float
    delta: float
    sample_rate: float
    noise_multiplier: float
    steps: int
    canaries: int
    guesses: int
    correct: int
    confidence: float
    epsilon_bound: float
    reachable: float
    looks: int = 1
    model: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing that was claimed is refuted."""
        return self.epsilon_bound <= self.claimed_epsilon


class MechanismCheck(_Value):
    """A property of the private computation that was tested directly, e.g. that the noise has the variance it should.

    Attributes:
        id: ``"noise-scale"``, ...
        finding: what was measured, in a sentence with its numbers.
    """

    id: str
    title: str
    module: Activity | None
    ok: bool
    finding: str


class Audit(_Value):
    """The audit of one plan's mechanisms by one version of the code; no patient takes part.

    Attributes:
        code: SHA-256 over the sources of the packages that were audited (`fedsynth.auditing.code.code_digest`).
    """

    schema_version: Literal[1] = 1
    plan_digest: str
    code: str
    software: str
    modules: list[AuditedModule]
    checks: list[MechanismCheck]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every check holds and no claimed epsilon is refuted."""
        return all(module.ok for module in self.modules) and all(check.ok for check in self.checks)
