"""What the noise leaves of a statistic that is released once, by the engines' own public numbers.

The sites' sums are added, so the noise of all of them together stands against the mean over all patients. What there is to
learn is how far that mean lies from what public knowledge says already: nobody knows it before, but its usual size is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedsynth.budget import noise_multipliers
from fedsynth.engines import embedding, moments
from fedsynth.plan import Module, StudyPlan
from fedsynth.records import PUBLIC, State
from fedsynth_server.fitting.moments import attenuation

LINK = 0.25
"""Share of a morphology feature's variance that genes explain where the link is worth having, spread over all directions."""

RESIDUAL = 0.25
"""Distance of the patients' mean embedding from the public one, in clipping norms, where no public weights tell it: that is
what the engine's own prior (means 0.4 public standard deviations away) makes of rows half of whose norm is used."""

RULE_OF_THUMB = 0.5
"""Noise norm over residual above which fits of a mean embedding learned nothing (measured over several cohort sizes)."""

_BLOCKS = {
    "class_counts": "class sizes",
    "pair_counts": "patients with genes and features",
    "class_genes": "genes by class",
    "class_morphology": "morphology by class",
    "genes": "covariances of genes",
    "link": "the link of genes and morphology",
    "morphology": "covariances of morphology",
}


@dataclass(frozen=True)
class StatisticForecast:
    """What one statistic can tell.

    Attributes:
        module: which.
        coordinates: length of a row.
        above_noise: coordinates whose expected signal is above their noise.
        learnable: share of the expected difference (squared) from public knowledge that the best linear estimate recovers.
        noise_norm, signal_norm: of the noise and of that difference; of moments, over the entries of the link alone.
        sharp: whether the plan's public weights were at hand, or only its numbers.
        sentence: the same in words.
    """

    module: Module
    coordinates: int
    above_noise: int
    learnable: float
    noise_norm: float
    signal_norm: float
    sharp: bool
    sentence: str

    @property
    def noise_to_signal(self) -> float:
        """Noise norm over signal norm."""
        return self.noise_norm / self.signal_norm


def forecast_statistic(plan: StudyPlan, module: Module, public: Mapping[str, State]) -> StatisticForecast:
    """What the statistic `module` of `plan` can tell.

    Args:
        plan: the study plan.
        module: ``"moments"`` or ``"embedding"``.
        public: public weights by record name (`fedsynth.records.PUBLIC`); what is missing is replaced by usual sizes.

    Raises:
        ValueError: the plan has no such section, or the module is no statistic.
    """
    if module == "moments":
        return _moments(plan)
    if module == "embedding":
        state = public.get(PUBLIC["embedding"])
        return _plain_embedding(plan) if state is None else _embedding(plan, state)
    raise ValueError(f"{module} is not released once")


def _noise_and_patients(plan: StudyPlan, module: Module) -> tuple[float, int]:
    """Standard deviation of the noise of the sum over all sites, and the patients whom they declare."""
    sigmas = [noise_multipliers(plan, site.name)[module] for site in plan.sites]
    return math.hypot(*sigmas), sum(site.nominal_patients for site in plan.sites)


def _moments(plan: StudyPlan) -> StatisticForecast:
    size = moments.sizes(plan)
    noise_sd, patients = _noise_and_patients(plan, "moments")
    of_genes, of_morphology = attenuation(size.components), attenuation(size.features)
    entry = math.sqrt(LINK / size.components)
    # Expected entries of the sum, a patient: of standardised moments as large as those of a link worth having; a class
    # has 1 / K of the patients, and shortened vectors lose a part of their length.
    expected = {
        "class_counts": 1 / size.classes,
        "pair_counts": 1.0,
        "class_genes": entry * of_genes.mean / size.classes,
        "class_morphology": entry * of_morphology.mean / size.classes,
        "genes": entry * of_genes.correlation,
        "link": entry * of_genes.mean * of_morphology.mean,
        "morphology": entry * of_morphology.correlation,
    }
    coordinates = above = 0
    drowned = []
    for name, variances in moments.noise_variances(size, noise_sd).items():
        rises = variances.sqrt() < expected[name] * patients
        if name in ("genes", "morphology"):  # symmetric: each pair is released once
            rises = rises[rises.new_ones(rises.shape).triu()]
        coordinates, above = coordinates + rises.numel(), above + int(rises.sum())
        if rises.numel() and 2 * int(rises.sum()) < rises.numel():
            drowned.append(_BLOCKS[name])
    link = moments.noise_variances(size, noise_sd)["link"]
    noise_norm, signal_norm = float(link.sum().sqrt()), expected["link"] * patients * math.sqrt(link.numel())
    learnable = 1 / (1 + (noise_norm / signal_norm) ** 2)
    text = f"moments: {above} of {coordinates} moments rise above the noise"
    text += f"; below it: {', '.join(drowned)}" if drowned else ""
    text += (
        f". Of a link of genes and morphology that explains {LINK:.0%} of the variance, {learnable:.0%} can be learnt."
    )
    return StatisticForecast(
        "moments",
        coordinates,
        above,
        learnable,
        noise_norm / patients,
        signal_norm / patients,
        sharp=True,  # public weights say nothing of how far the moments will be from them
        sentence=text,
    )


def _plain_embedding(plan: StudyPlan) -> StatisticForecast:
    noise_sd, patients = _noise_and_patients(plan, "embedding")
    section = plan.embedding
    if section is None:
        raise ValueError("the plan has no section embedding")
    norm = noise_sd * math.sqrt(section.dimensions) / patients
    ratio = norm / RESIDUAL
    learnable = 1 / (1 + ratio**2)
    return StatisticForecast(
        "embedding",
        embedding.row_size(plan),
        section.dimensions if ratio < 1 else 0,
        learnable,
        norm,
        RESIDUAL,
        sharp=False,
        sentence=f"embedding: without its public weights (--weights) only this is known: over {section.dimensions} "
        f"dimensions the noise has norm {norm:.3f}, the residual usually {RESIDUAL:g}. {_rule(ratio)}",
    )


def _embedding(plan: StudyPlan, state: State) -> StatisticForecast:
    noise_sd, patients = _noise_and_patients(plan, "embedding")
    found = embedding.plan_embedding(plan, state)
    noise = noise_sd / patients
    weight, residual = found.weight.double().square(), found.state["expected"].double() ** 2 + found.prior.double()
    signal = weight * residual
    used = int((weight > 0).sum())
    norm, signal_norm = noise * math.sqrt(used), math.sqrt(float(signal.sum()))
    above = int((signal > noise**2).sum())
    left = residual / (1 + signal / noise**2)
    learnable = 1 - float(left.sum() / residual.sum())
    return StatisticForecast(
        "embedding",
        found.size,
        above,
        learnable,
        norm,
        signal_norm,
        sharp=True,
        sentence=f"embedding: {used} of {len(found.chosen)} coordinates get weight, {above} rise above the noise, and "
        f"{learnable:.0%} of the expected difference from the public patients and the public generator can be learnt. "
        f"{_rule(norm / signal_norm)}",
    )


def _rule(ratio: float) -> str:
    judged = "below" if ratio <= RULE_OF_THUMB else "above"
    return f"Noise is {ratio:.2f} times the residual, {judged} the {RULE_OF_THUMB:g} at which fits stop learning."
