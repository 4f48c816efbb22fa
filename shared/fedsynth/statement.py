"""The privacy statement of a release (`privacy.json`), after the reporting list of NIST SP 800-226."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from fedsynth.plan import Module


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Mechanism(_Value):
    """A module's sampled Gaussian mechanism at one site: Poisson sampling at `sample_rate`, `steps` times.

    A statistic that is released once takes every patient: `sample_rate` 1, one step, `max_grad_norm` of a patient's row.

    `steps` counts what was charged to the ledger, `steps_planned` what the plan foresaw; `epsilon_alone` is the epsilon
    of this module by itself (modules compose to less than the sum of these).
    """

    module: Module
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    steps: int
    steps_planned: int
    epsilon_alone: float


class SiteStatement(_Value):
    """What one site's ledger says it spent on this study, and its head digest, which binds the statement to the ledger.

    `epsilon_lifetime` composes everything the ledger holds, earlier studies included.
    """

    name: str
    nominal_patients: int
    epsilon: float
    epsilon_lifetime: float
    ledger_head: str
    mechanisms: list[Mechanism]


class PrivacyStatement(_Value):
    """Everything a data officer needs to judge a release's formal guarantee, and what that guarantee leaves out.

    `private` is false when noise was reproducible (a seeded run): then the epsilons are not a guarantee.
    """

    schema_version: Literal[1] = 1
    study: str
    plan_digest: str
    private: bool
    unit: Literal["patient"] = "patient"
    neighbouring: str = "data sets that differ by adding or removing all data of one patient"
    epsilon_budget: float
    delta: float
    accountant: str
    accountant_version: str
    noise_source: str
    sites: list[SiteStatement]
    trust_model: str
    composition: str
    not_covered: list[str]
    intended_use: str
    forbidden_use: str
