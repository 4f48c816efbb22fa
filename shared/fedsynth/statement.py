"""The privacy statement of a release (`privacy.json`), after the reporting list of NIST SP 800-226."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from fedsynth.epsilons import Epsilon
from fedsynth.plan import Module


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Mechanism(_Value):
    """A module's sampled Gaussian mechanism at one site: Poisson sampling at `sample_rate`, `steps` times.

    A statistic that is released once takes every patient: `sample_rate` 1, one step, `max_grad_norm` of a patient's row.

    `steps` counts what was charged to the ledger, `steps_planned` what the plan foresaw; `epsilon_alone` is the epsilon
    of this module by itself (modules compose to less than the sum of these). Without privacy `noise_multiplier` is 0,
    nothing was clipped, and `epsilon_alone` is infinite.
    """

    module: Module
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    steps: int
    steps_planned: int
    epsilon_alone: Epsilon


class HoldoutStatement(_Value):
    """What a site's held-out patients spent, on whom nothing was trained: one noisy sum of scores of the generator.

    They are other people than the training patients, so nothing adds up: `epsilon` is theirs in this study, and
    `epsilon_lifetime` over all studies. A row was clipped to `max_grad_norm`, and every held-out patient took part.
    """

    epsilon: Epsilon
    epsilon_lifetime: Epsilon
    noise_multiplier: float
    max_grad_norm: float


class SiteStatement(_Value):
    """What one site's ledger says it spent on this study, and its head digest, which binds the statement to the ledger.

    `epsilon` and `mechanisms` are of training patients; `holdout` is of held-out patients, None where no answer of theirs
    was received: they spent nothing, or (the answer was lost or late) at most the statement's `holdout_epsilon_budget`.
    `epsilon_lifetime` composes everything the ledger holds, earlier studies included.
    """

    name: str
    nominal_patients: int
    epsilon: Epsilon
    epsilon_lifetime: Epsilon
    ledger_head: str
    mechanisms: list[Mechanism]
    holdout: HoldoutStatement | None = None


class PrivacyStatement(_Value):
    """Everything a data officer needs to judge a release's formal guarantee, and what that guarantee leaves out.

    `private` is false when noise was reproducible (a seeded run): then the epsilons are not a guarantee. It is false of a
    study without privacy, too, whose epsilons are infinite: in JSON they are ``null`` (`fedsynth.epsilons`).
    `holdout_epsilon_budget` is what the plan allows to spend of a held-out patient, None where it has no evaluation.
    """

    schema_version: Literal[1] = 1
    study: str
    plan_digest: str
    private: bool
    unit: Literal["patient"] = "patient"
    neighbouring: str = "data sets that differ by adding or removing all data of one patient"
    epsilon_budget: Epsilon
    holdout_epsilon_budget: float | None = None
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

    @property
    def without_privacy(self) -> bool:
        """Whether the study was one without privacy: nothing was clipped or noised."""
        return math.isinf(self.epsilon_budget)

    @model_validator(mode="after")
    def _is_not_called_private_without_privacy(self) -> Self:
        if self.private and (self.without_privacy or any(math.isinf(site.epsilon) for site in self.sites)):
            raise ValueError("private: an infinite epsilon protects nobody")
        return self
