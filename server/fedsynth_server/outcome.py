"""After the run: what the noise left to learn, beside what the forecast had said.

Everything here is computed from the coordinator's state, which holds noisy sums, noisy weights and what sites may say of
them: post-processing, without privacy cost. Of each kind of module another thing is known:

- *Moments*: noise over the estimated signal of the link between genes and morphology, as the fit reports it.
- *Embedding*: the squared distance of the start from the noisy mean is the sum of what was to be learnt and of the noise,
  whose part is known. What the fit took away of the former was learnt.
- *Networks that are averaged*: which directions of the change of their weights stand out of the random walk that noise
  alone makes (`fedsynth_server.random_walk`). The weights of a warm start are no longer there after the run, so of such a
  network only the lengths of its rounds tell, and those seldom.
- *GAN*: nothing. The noisy discriminators stay at their sites, and a generator moves as far when it follows a blind one.
- *Translation*: nothing. Its generators move by the moments of optimisers that stay at the sites as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn, start_from_encoder
from fedsynth.plan import Module, StudyPlan, TrainingPlan
from fedsynth.records import WEIGHTS, State
from fedsynth_server.aggregation import site_weights
from fedsynth_server.checkpoint import CurveRow, StudyState
from fedsynth_server.forecast import ModuleForecast, Reading, forecast, parameters, read
from fedsynth_server.random_walk import movement, walk

Verdict = Literal["learnt", "partly", "drowned", "missed", "nothing", "open"]

_AS_FORETOLD: dict[Verdict, tuple[Reading, ...]] = {
    "learnt": ("learns",),
    "partly": ("partly",),
    "drowned": ("drowns",),
    "missed": (),
    "nothing": ("learns",),
}
_OF_READING: dict[Reading, Verdict] = {"learns": "learnt", "partly": "partly", "drowns": "drowned"}
# How far beyond a random walk, in squares, a round must have moved before the rest is taken for signal.
_WALK_ERROR = 0.15
_PART, _LITTLE = 0.5, 0.1  # shares of what was to be learnt


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModuleOutcome(_Value):
    """One module's forecast and what came of it.

    Attributes:
        module: which.
        forecast_noise_to_signal: at the site where it was largest.
        forecast: what that ratio meant.
        noise_to_signal: the same ratio, found after the run; None where nothing stands out of the noise or nothing tells.
        learnt: share, between 0 and 1, of what was to be learnt (squared distances); None where nothing tells.
        verdict: ``learnt``, ``partly``, ``drowned``; ``missed``: the signal stands out of the noise and the fit did not
            take it up; ``nothing``: the start is as good as this little noise can tell; ``open``: cannot be told.
        as_forecast: whether the forecast had said so; None where the verdict is open.
        sentence: the same in words.
    """

    module: Module
    forecast_noise_to_signal: float
    forecast: Reading
    noise_to_signal: float | None
    learnt: float | None
    verdict: Verdict
    as_forecast: bool | None
    sentence: str


class Outcome(_Value):
    """Forecast and outcome of every module of a study (`outcome.json` of a release)."""

    schema_version: Literal[1] = 1
    plan_digest: str
    modules: list[ModuleOutcome]


def study_outcome(plan: StudyPlan, state: StudyState) -> Outcome:
    """Compare the forecast of `plan` with what its finished study left in `state`.

    Raises:
        ValueError: the state is of another plan, or a module has not finished.
    """
    if state.study != plan.digest:
        raise ValueError("the state is of another plan")
    missing = state.missing_rounds(plan)
    if missing:
        raise ValueError(f"the study has not finished: {', '.join(missing)}")
    foretold = forecast(plan, state.weights)
    return Outcome(
        plan_digest=plan.digest,
        modules=[_outcome(plan, state, foretold.worst(module)) for module in plan.modules],
    )


def _outcome(plan: StudyPlan, state: StudyState, foretold: ModuleForecast) -> ModuleOutcome:
    training = plan.training(foretold.module)
    if not plan.privacy.private:
        text = "There was no noise to learn against: what was learnt shows in the quality of the patients alone."
        return _made(foretold, "open", None, None, text)
    if foretold.module == "moments":
        return _of_moments(plan, state.fits["moments"], foretold)
    if foretold.module == "embedding":
        return _of_embedding(state.fits["embedding"], foretold)
    if foretold.module == "translation":
        return _made(
            foretold,
            "open",
            None,
            None,
            "Discriminators and the moments of all optimisers stay at the sites, so how far noise alone would have moved "
            "the translators is not known here: only held-out patients with both domains tell whether they translate.",
        )
    if foretold.module == "gan" or not isinstance(training, TrainingPlan):
        return _made(
            foretold,
            "open",
            None,
            None,
            "What the discriminators learnt stays at the sites, and a generator moves as far when it follows a blind one: "
            "only the quality of the images, beside that of the public-only generator, tells whether it helped.",
        )
    return _of_network(plan, training, state, foretold.module, foretold)


def _of_moments(plan: StudyPlan, fit: dict[str, float], foretold: ModuleForecast) -> ModuleOutcome:
    ratio, kept = fit["noise_to_signal"], min(max(fit["kept_link"], 0.0), 1.0)
    verdict = _OF_READING[read(plan, "moments", ratio)]
    sentence = (
        f"The noise of the link of genes and morphology is {_times(ratio)} its estimated size; {kept:.0%} of the noisy "
        f"link was kept, the rest shrunk away as noise."
    )
    if verdict == "drowned":
        sentence += " Either the noise hides the link, or the patients have little of one."
    return _made(foretold, verdict, ratio, 1 / (1 + ratio**2), sentence)


def _of_embedding(fit: dict[str, float], foretold: ModuleForecast) -> ModuleOutcome:
    noise, before, after = fit["noise_norm"] ** 2, fit["residual_before"] ** 2, fit["residual_after"] ** 2
    if noise == 0:  # no coordinate rises above the noise that the plan asks for
        return _made(foretold, "drowned", None, 0.0, "No coordinate was expected to rise above the noise.")
    excess = before - noise
    # The squared norm of the noise varies by its standard deviation sqrt(2 noise); the fit starts from two of them.
    if excess <= 2 * math.sqrt(2 * noise):
        if foretold.reading == "learns":
            text = "Nothing stands out of the noise, though there is little of it: the start fits already, within the noise."
            return _made(foretold, "nothing", None, None, text)
        text = "The start lies no farther from the patients than noise alone would put it: nothing could be learnt."
        return _made(foretold, "drowned", None, 0.0, text)
    share = min(max((before - after) / excess, 0.0), 1.0)
    ratio = math.sqrt(noise / excess)
    verdict: Verdict = "learnt" if share >= _PART else "partly" if share >= _LITTLE else "missed"
    sentence = (
        f"Of the squared distance between the start and the noisy mean, {noise / before:.0%} was noise; of the rest the "
        f"fit took up {share:.0%} in {fit['steps']:.0f} steps."
    )
    if verdict == "missed":
        sentence += " There was signal above the noise: a longer fit, which costs no privacy, may take it up."
    return _made(foretold, verdict, ratio, share, sentence)


def _of_network(
    plan: StudyPlan, training: TrainingPlan, state: StudyState, module: Module, foretold: ModuleForecast
) -> ModuleOutcome:
    rows = state.curves[module]
    if training.steps_per_round == 1 or not rows:
        text = "Rounds of a single step move the weights equally far with noise and without."
        return _made(foretold, "open", None, None, text)
    held = plan.radiogenomics.nonnegative_output or plan.radiogenomics.nonnegative_weights
    if module == "radiogenomics" and held:
        return _made(foretold, "open", None, None, "Weights that are held non-negative do not walk as noise would.")
    if training.optimizer != "adam" or training.schedule != "constant":
        text = "How far noise alone moves the weights is known here for Adam at a constant learning rate alone."
        return _made(foretold, "open", None, None, text)
    start = _start(plan, state, module)
    if start is None:
        return _by_length(plan, training, rows, foretold)
    # Rounds add up; within a round the sites' walks are averaged.
    by_round: dict[str, list[str]] = {}
    for row in rows:
        by_round.setdefault(str(row["round"]), []).append(str(row["site"]))
    walks = sum(sum(w**2 for w in site_weights(plan, sites).values()) for sites in by_round.values())
    noise_sd = training.learning_rate * math.sqrt(walk(training.steps_per_round) * walks)
    found = movement(start, state.weights[WEIGHTS[module]], noise_sd)
    if found.signal == 0:
        text = (
            "No direction of the change of its weights stands out of what noise alone makes "
            f"(the largest: {found.largest:.2f} times the edge of noise)."
        )
        return _made(foretold, "drowned", None, 0.0, text)
    ratio = math.sqrt((1 - found.signal) / found.signal)
    sentence = (
        f"Along one direction the weights moved {found.largest:.1f} times as far as noise alone could have moved them; "
        f"{found.signal:.0%} of the clearest direction is signal."
    )
    return _made(foretold, _OF_READING[read(plan, module, ratio)], ratio, found.signal, sentence)


def _by_length(
    plan: StudyPlan, training: TrainingPlan, rows: Sequence[CurveRow], foretold: ModuleForecast
) -> ModuleOutcome:
    """By the lengths of the sites' rounds: between that of a random walk and that of steps all in one direction."""
    steps, random_walk = training.steps_per_round, walk(training.steps_per_round)
    unit = training.learning_rate**2 * parameters(plan, foretold.module)
    mean_square = sum(float(row["update_norm"]) ** 2 for row in rows) / len(rows) / unit
    said = f"A round moved the weights {math.sqrt(mean_square / random_walk):.2f} times as far as noise alone would"
    if mean_square <= (1 + _WALK_ERROR) * random_walk:
        text = f"{said}; along which directions, which would tell more, is not known after a warm start."
        return _made(foretold, "open", None, None, text)
    signal = min((mean_square - random_walk) / (steps**2 - random_walk), 1.0)
    ratio = math.sqrt(random_walk * (1 - signal) / (steps**2 * signal * len(rows)))
    verdict = _OF_READING[read(plan, foretold.module, ratio)]
    sentence = f"{said}; over all rounds and sites that is noise of {_times(ratio)} the signal."
    return _made(foretold, verdict, ratio, 1 / (1 + ratio**2), sentence)


def _start(plan: StudyPlan, state: StudyState, module: Module) -> State | None:
    """The weights that a network of profiles started from (`fedsynth_server.checkpoint.first_state`); None if public."""
    if module == "autoencoder" and plan.autoencoder.warm_start is not None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(plan.digest[:15], 16))
        autoencoder, dnn = make_autoencoder(plan), make_radiogenomic_dnn(plan)
    if module == "autoencoder":
        return dict(autoencoder.state_dict())
    if plan.radiogenomics.start_from_encoder:
        autoencoder.load_state_dict(state.weights["autoencoder"])
        start_from_encoder(dnn, autoencoder)
    return dict(dnn.state_dict())


def _made(
    foretold: ModuleForecast, verdict: Verdict, ratio: float | None, learnt: float | None, sentence: str
) -> ModuleOutcome:
    return ModuleOutcome(
        module=foretold.module,
        forecast_noise_to_signal=foretold.noise_to_signal,
        forecast=foretold.reading,
        noise_to_signal=ratio,
        learnt=learnt,
        verdict=verdict,
        as_forecast=None if verdict == "open" else foretold.reading in _AS_FORETOLD[verdict],
        sentence=sentence,
    )


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times" if ratio < 99.5 else "more than 99 times"
