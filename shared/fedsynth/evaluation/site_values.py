"""What sites found on their own held-out patients, as values (`site-evaluation.json`): every number is noisy.

A site releases one sum over its held-out patients with Gaussian noise of a known size. Means are ratios of two such
numbers, and their intervals follow from the noise alone.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

ScoreName = Literal["dice", "slices", "morphology", "label"]

FILE = "site-evaluation.json"


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ScoreMeaning(_Value):
    """What a score measures: `title` for a table, `meaning` in a sentence or two, `floor` what it is compared with."""

    name: ScoreName
    title: str
    meaning: str
    floor: str


class NoisyScore(_Value):
    """The mean of one score over held-out patients, between 0 (worst) and 1 (best), as far as the noise lets it be known.

    Attributes:
        name: which score.
        value: noisy mean, cut off at 0 and 1; None where not even the number of patients stands out of the noise, or where
            the noise came out so large that its interval holds no possible score.
        interval: 95 % interval of the mean over *these* patients: it holds the noise, not that other patients would give
            another mean; None where `value` is.
        standard_error: of `value`, due to the noise; None where `value` is.
        floor: the same mean for an answer that does not look at the patient (see `ScoreMeaning.floor`); noisy as well,
            unless it is a constant; None where `value` is, or where the score has no such answer.
        gain: 95 % interval of the difference between the score and its floor; above 0 as a whole, the generator's
            patients have taught something; None where `floor` is, or where the noise leaves no such difference.
        patients: noisy number of patients in whom the score could be measured; may be below 0.
        drowned: the noise leaves next to nothing to say: `value` is None, or its interval, not yet cut off at 0 and 1, is
            more than 0.5 wide.
    """

    name: ScoreName
    value: float | None
    interval: tuple[float, float] | None
    standard_error: float | None
    floor: float | None
    gain: tuple[float, float] | None
    patients: float
    drowned: bool


class SiteScores(_Value):
    """One site's noisy scores, and what they cost its held-out patients.

    Attributes:
        site: its name.
        epsilon: of a held-out patient in this study, at the study's delta, as the site's ledger says.
        epsilon_lifetime: of a held-out patient over all studies, at the delta of the site's policy.
        noise_multiplier: noise of the released sum over the norm (at most 1) of a patient's part in it.
        scores: one a `ScoreName`.
    """

    site: str
    epsilon: float
    epsilon_lifetime: float
    noise_multiplier: float
    scores: list[NoisyScore]


class SiteEvaluation(_Value):
    """The finished generator as the sites' held-out patients judge it.

    Attributes:
        plan_digest: of the study.
        evaluators: digest (`fedsynth.records.state_digest`) of the networks, trained on synthetic patients only, that all
            sites used.
        epsilon_budget: what the plan allows to spend of a held-out patient, at `delta`.
        private: whether all noise was unpredictable.
        meanings: what the scores are.
        sites: those that took part, by name.
        missing: code of why a site of the plan did not, by its name.
        pooled: over the patients of all sites that took part; empty when none did.
        explanation: in plain words, with its limits.
    """

    schema_version: Literal[1] = 1
    plan_digest: str
    evaluators: str
    epsilon_budget: float
    delta: float
    private: bool
    meanings: list[ScoreMeaning]
    sites: list[SiteScores]
    missing: dict[str, str]
    pooled: list[NoisyScore]
    explanation: str

    def meaning(self, name: ScoreName) -> ScoreMeaning:
        """What the score `name` is."""
        return next(each for each in self.meanings if each.name == name)
