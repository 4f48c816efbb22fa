"""Which engines a study of this size should use, and whether its plan does.

`fedsynth.recommend` says which engines suit the sites' sizes and the public weights at hand; the forecast of what it
recommends then leaves out what would drown in its noise all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fedsynth.plan import Module, StudyPlan
from fedsynth.recommend import PublicStarts, recommend
from fedsynth.records import State
from fedsynth_server.forecast import noise_to_signal, read
from fedsynth_server.levers import TO_BE_NAMED, ratio_text

Images = Literal["embedding + gan", "embedding", "gan", "public only"]


@dataclass(frozen=True)
class EngineAdvice:
    """Advice on one part of a synthetic patient.

    Attributes:
        part: ``"profiles"`` (genes, morphology, label) or ``"images"``.
        recommended, planned: engines.
        reason: one sentence with figures.
    """

    part: Literal["profiles", "images"]
    recommended: str
    planned: str
    reason: str

    @property
    def follows(self) -> bool:
        """Whether the plan does what is recommended."""
        return self.recommended == self.planned


def image_engine(plan: StudyPlan) -> Images:
    """What the images of `plan` are learnt by."""
    if "embedding" in plan.modules:
        return "embedding + gan" if "gan" in plan.modules else "embedding"
    return "gan" if "gan" in plan.modules else "public only"


def engine_advice(
    plan: StudyPlan, starts: PublicStarts, public: Mapping[str, State] | None = None
) -> list[EngineAdvice]:
    """Which engines suit `plan`'s sites, budget and public weights.

    Args:
        plan: the study plan.
        starts: public weights at hand beside those that the plan names.
        public: weights that sharpen the forecast, see `forecast`.
    """
    known = PublicStarts(
        gan=plan.gan.warm_start or starts.gan,
        autoencoder=plan.autoencoder.warm_start or starts.autoencoder,
        moments=plan.moments.public if plan.moments else starts.moments,
        embedding=plan.embedding.public if plan.embedding else starts.embedding,
    )
    return [_profiles(plan, known, public or {}), _images(plan, known, public or {})]


def _profiles(plan: StudyPlan, known: PublicStarts, public: Mapping[str, State]) -> EngineAdvice:
    chosen = _recommended(plan, known)
    other_start = replace(known, moments=None if chosen.profile_engine == "moments" else TO_BE_NAMED)
    other = _recommended(plan, other_start)
    reason = f"{_sizes(plan)}, noise to signal is {_figure(chosen, _PROFILE_MODULES, public)}"
    if other.profile_engine != chosen.profile_engine:
        reason += f", against {_figure(other, _PROFILE_MODULES, public)}"
        if other.profile_engine == "moments":
            reason += ", which need public directions and scales of expression over the plan's panel"
    return EngineAdvice("profiles", chosen.profile_engine, plan.profile_engine, f"{reason}.")


def _images(plan: StudyPlan, known: PublicStarts, public: Mapping[str, State]) -> EngineAdvice:
    candidate = _recommended(plan, known)
    chosen, drowned = candidate, [m for m in _image_modules(candidate) if _reads(candidate, m, public) == "drowns"]
    if drowned and known.gan is not None:
        # Images can come from the public generator as it is, so what drowns is not worth its part of the budget.
        chosen = _without_images(candidate, drowned)
    engine = image_engine(chosen)
    reason = _sizes(plan)
    if drowned:
        reason += f", noise to signal is {_figure(candidate, drowned, public)}: "
        if known.gan is None:
            reason += "it drowns, but nothing else makes images without public weights"
        else:
            reason += "what drowns is not worth a part of the budget"
    elif _image_modules(chosen):
        reason += f", noise to signal is {_figure(chosen, _image_modules(chosen), public)}"
        other = _recommended(plan, replace(known, embedding=None))
        if image_engine(other) != engine and _image_modules(other):
            reason += f", against {_figure(other, _image_modules(other), public)}"
    else:
        reason += ", no private engine of images is recommended"
    return EngineAdvice("images", engine, image_engine(plan), f"{reason}.")


_PROFILE_MODULES: list[Module] = ["moments", "autoencoder", "radiogenomics"]


def _recommended(plan: StudyPlan, starts: PublicStarts) -> StudyPlan:
    """`plan` with the sections that are recommended; a plan to compute with, which nobody has validated."""
    return plan.model_copy(
        update=vars(
            recommend([site.nominal_patients for site in plan.sites], starts, plan.privacy.epsilon, plan.privacy.delta)
        )
    )


def _image_modules(plan: StudyPlan) -> list[Module]:
    return [module for module in plan.modules if module in ("embedding", "gan")]


def _without_images(plan: StudyPlan, modules: list[Module]) -> StudyPlan:
    gan = plan.gan.model_copy(update={"rounds": 0}) if "gan" in modules else plan.gan
    return plan.model_copy(update={"gan": gan, "embedding": None if "embedding" in modules else plan.embedding})


def _worst(plan: StudyPlan, module: Module, public: Mapping[str, State]) -> float:
    return max(noise_to_signal(plan, site.name, module, public) for site in plan.sites)


def _reads(plan: StudyPlan, module: Module, public: Mapping[str, State]) -> str:
    return read(plan, module, _worst(plan, module, public))


def _figure(plan: StudyPlan, modules: list[Module], public: Mapping[str, State]) -> str:
    """The noise-to-signal ratio of those of `modules` that take part, the largest first."""
    ratios = {module: _worst(plan, module, public) for module in modules if module in plan.modules}
    ordered = sorted(ratios.items(), key=lambda item: -item[1])
    return " and ".join(f"{ratio_text(ratio)} for {module}" for module, ratio in ordered)


def _sizes(plan: StudyPlan) -> str:
    sizes = sorted({site.nominal_patients for site in plan.sites})
    patients = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    sites = f"each of {len(plan.sites)} sites" if len(plan.sites) > 1 else "one site"
    return f"With {patients} patients at {sites} and epsilon {plan.privacy.epsilon:g}"
