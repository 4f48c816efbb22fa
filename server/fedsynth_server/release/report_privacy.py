"""The report's privacy section: what each site spent, beside the budget, and what that means in plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedsynth.statement import PrivacyStatement, SiteStatement
from fedsynth_server.release import wording


@dataclass(frozen=True)
class SiteView:
    """A site's statement beside the budget.

    Attributes:
        share: composed epsilon over budget; 1 without privacy, where both are infinite.
        bar, budget_mark: both as shares of the bar, which ends at the budget or at the largest epsilon above it.
        over: the composed epsilon is above the budget.
        thin: delta times the number of patients is above 0.1, too much for a chance of no protection at all.
    """

    statement: SiteStatement
    share: float
    bar: float
    budget_mark: float
    over: bool
    thin: bool


@dataclass(frozen=True)
class PrivacyView:
    """The statement as the template needs it; `worst` is the site whose patients are protected least."""

    worst: SiteStatement
    sites: list[SiteView]
    earlier_studies: bool
    strength: str
    odds_factor: str
    attacker_accuracy: str


def privacy(statement: PrivacyStatement) -> PrivacyView:
    """The view of a statement, which names at least one site."""
    worst = max(statement.sites, key=lambda site: site.epsilon)
    if statement.without_privacy:
        return _without(statement, worst)
    budget = statement.epsilon_budget
    scale = max(budget, *(site.epsilon for site in statement.sites if math.isfinite(site.epsilon)), 0.0)
    return PrivacyView(
        worst=worst,
        sites=[
            SiteView(
                statement=site,
                share=site.epsilon / budget,
                bar=min(1.0, site.epsilon / scale),
                budget_mark=budget / scale,
                over=site.epsilon > budget * (1 + 1e-9),
                thin=statement.delta * site.nominal_patients > 0.1,
            )
            for site in statement.sites
        ],
        earlier_studies=any(site.epsilon_lifetime > site.epsilon * (1 + 1e-9) for site in statement.sites),
        strength=wording.strength(worst.epsilon),
        odds_factor=wording.odds_factor(worst.epsilon),
        attacker_accuracy=wording.attacker_accuracy(worst.epsilon, statement.delta),
    )


def _without(statement: PrivacyStatement, worst: SiteStatement) -> PrivacyView:
    """The view of a study without privacy, which has no budget to stay within."""
    sites = [SiteView(site, share=1.0, bar=1.0, budget_mark=1.0, over=False, thin=False) for site in statement.sites]
    return PrivacyView(
        worst, sites, False, wording.strength(worst.epsilon), wording.odds_factor(worst.epsilon), attacker_accuracy=""
    )
