"""Fit the generator to the sites' noisy mean embedding: post-processing, without privacy cost.

The loss is the squared distance between the private mean embedding and that of the generator's patients (Harder et al.
2021; 2023). Four things are done against noise, all by public numbers:

- *Unbiased gradients from small batches.* A batch's own mean differs from the generator's, and its square would reward
  a generator that varies less. The distance is therefore taken as the product of two independent halves, each against
  a running mean of the other.
- *The discrepancy principle* (Morozov 1966). A perfect generator would still lie the noise's norm away from the noisy
  mean, so training stops when the distance has come down to it; where it starts below, nothing is trained.
- *A public prior.* Each coordinate is aimed at what is expected of a site given its noisy mean: the public mean, where the
  noise hides the site's. The same holds for coordinates that no site sent, in which the generator might drift otherwise.
- *Few, small, averaged steps.* Adam with a falling rate, and the mean of the last weights. Rates above 1e-4 swing about
  the aim and ruin the images while every running mean looks fitted, so the distance that is reported is measured anew,
  on fresh draws of the generator that is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsynth.engines.embedding import COUNT_WEIGHT, Embedding, crossed, plan_embedding
from fedsynth.models.condition import condition, slice_positions
from fedsynth.models.images import make_generator
from fedsynth.models.interfaces import ImageGenerator
from fedsynth.plan import StudyPlan
from fedsynth.progress import track
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles

SLICES = 4  # of each synthetic patient in a batch
# Memories of running means: of what the gradient is taken against (a long one lags behind the generator, which then
# swings about the aim), of what is compared with the noise, and of the weights.
_FAST, _SLOW, _AVERAGE = 0.8, 0.95, 0.9
_MEASUREMENTS = 24  # batches in which the distance is measured before and after
_BETAS = (0.5, 0.99)
_NOMINAL_ERROR = 0.25  # relative error of a declared number of patients
_FEWEST_KNOWN = 0.1  # share of patients with a known label below which their block is not read


@dataclass(frozen=True)
class Target:
    """What the sites' noisy sum says of the mean embedding.

    Attributes:
        mean: (dimensions,) noisy mean of the weighted coordinates.
        noise: (dimensions,) standard deviation of its noise, infinite where a coordinate says nothing.
        patients: estimated number of patients.
    """

    mean: Tensor
    noise: Tensor
    patients: float

    @property
    def used(self) -> int:
        """Coordinates that say something."""
        return int(torch.isfinite(self.noise).sum())


def read_total(embedding: Embedding, total: Tensor, noise_sd: float, nominal_patients: int) -> Target:
    """Estimate the mean embedding from the noisy sum (size,) of all sites.

    The number of patients is the declared one corrected by the noisy count, each by its precision. The label's coordinates
    hold nothing of patients whose label is unknown, so they are divided by the number of the others.

    Args:
        embedding: the embedding.
        total: the sum over sites.
        noise_sd: standard deviation of its noise in each coordinate. Where it is 0, in a study without privacy, the error of
            the mean is that of sampling: how far the mean of as many other patients would lie from it.
        nominal_patients: declared by the sites that contributed.
    """
    counts = total[: embedding.counts].double() / COUNT_WEIGHT
    count_variance = (noise_sd / COUNT_WEIGHT) ** 2
    of_count, of_nominal = 1 / (embedding.counts * count_variance + 1e-9), (_NOMINAL_ERROR * nominal_patients) ** -2
    patients = float((counts.sum() * of_count + nominal_patients * of_nominal) / (of_count + of_nominal))
    patients = max(patients, 1.0)
    unknown = float(counts[-1].clamp(min=0)) if counts[-1] > 2 * math.sqrt(count_variance) else 0.0
    known = max(1 - unknown / patients, 0.0)
    divisor = torch.full((len(embedding.chosen),), patients, dtype=torch.float64)
    divisor[embedding.of_label] = patients * known
    says = embedding.chosen_weight > 0
    if known < _FEWEST_KNOWN:
        says = says & ~embedding.of_label
    mean = torch.where(says, total[embedding.counts :].double() / divisor.clamp(min=1e-6), 0.0)
    noise = torch.where(says, _error_of_mean(embedding, noise_sd, divisor.clamp(min=1e-6)), torch.inf)
    return Target(mean.float(), noise.float(), patients)


def _error_of_mean(embedding: Embedding, noise_sd: float, patients: Tensor) -> Tensor:
    """(dimensions,) standard deviation of each weighted mean over `patients` (dimensions,)."""
    if noise_sd > 0:
        return noise_sd / patients
    variance = embedding.state["variance"].flatten()[embedding.chosen].double().clamp(min=1e-12)
    return embedding.chosen_weight * (variance / patients).sqrt()


def posterior(embedding: Embedding, target: Target) -> tuple[Tensor, Tensor]:
    """Where the generator's mean (unweighted, flattened) should lie, and the weights of the squared distance to it.

    A site's mean is expected about the public patients', which is 0, within `Embedding.prior`; the noisy mean moves that
    expectation as far as its precision allows (Wiener filter). Coordinates on which the sum says nothing are pulled to the
    public mean as well, lest the generator drift in them.
    """
    prior, variance = embedding.prior.flatten(), embedding.state["variance"].flatten()
    aim = torch.zeros_like(prior)
    weight = embedding.chosen_weight.clamp(min=1e-12)
    noise = (target.noise / weight) ** 2
    expected = prior[embedding.chosen]
    share = torch.where(torch.isfinite(noise), expected / (expected + noise), 0.0)
    aim[embedding.chosen] = share * target.mean / weight
    metric = variance.clamp(min=1e-12).rsqrt()
    said = torch.zeros_like(metric, dtype=torch.bool)
    said[embedding.chosen] = torch.isfinite(target.noise)
    said[:: embedding.prior.shape[1]] = True  # the deviations themselves, crossed with 1
    return aim, torch.where(said, metric, 0.0)


@dataclass(frozen=True)
class FitSettings:
    """How the generator is fitted.

    Attributes:
        steps: at most so many.
        batch: slices a step.
        learning_rate: of Adam at the start; it falls to 0 (cosine).
    """

    steps: int = 150
    batch: int = 64
    learning_rate: float = 5e-5


@dataclass(frozen=True)
class FitResult:
    """A fitted generator and how well it fits; distances are in units of the noise of one coordinate.

    Attributes:
        state: the generator.
        residual_before: estimated distance of the start from the noisy mean, without the error of its own estimation.
        residual_after: the same of the fitted generator.
        noise_norm: the distance that noise alone makes: below it nothing is left to be learnt.
        steps: that were taken.
    """

    state: State
    residual_before: float
    residual_after: float
    noise_norm: float
    steps: int


class _Generated:
    """Mean embeddings of the generator's patients."""

    def __init__(
        self,
        plan: StudyPlan,
        model: ImageGenerator,
        embedding: Embedding,
        profiles: SyntheticProfiles,
        draws: torch.Generator,
    ) -> None:
        self._model, self._embedding, self._draws = model, embedding, draws
        self._depth, self._positions = plan.image.slices, slice_positions(plan.image.slices)
        self._profiles = profiles
        self._conditions = embedding.conditions(profiles.morphology, profiles.labels)

    def coordinates(self, patients: int) -> Tensor:
        """(patients, DEVIATIONS * (1 + Q)), unweighted, of newly drawn patients, `SLICES` of each."""
        shown = min(SLICES, self._depth)
        rows = torch.randint(len(self._profiles.labels), (patients,), generator=self._draws)
        places = torch.rand(patients, self._depth, generator=self._draws).argsort(dim=1)[:, :shown].flatten()
        z = torch.randn(patients, self._model.latent_dim, generator=self._draws).repeat_interleave(shown, dim=0)
        many = rows.repeat_interleave(shown)
        code = condition(
            self._profiles.labels[many],
            self._profiles.morphology[many],
            self._positions[places],
            self._embedding.classes,
        )
        # Halves the time of a step on a CPU; weights, features and loss stay in float32.
        with torch.autocast("cpu", torch.bfloat16):
            slices = self._model(z, code)
        deviations = self._embedding.deviations(slices.float(), places, self._conditions[many])
        return crossed(deviations.reshape(patients, shown, -1).mean(dim=1), self._conditions[rows])


def fit(
    plan: StudyPlan,
    start: State,
    embedding: Embedding,
    target: Target,
    profiles: SyntheticProfiles,
    settings: FitSettings,
    generator: torch.Generator,
    report: Callable[[int, float], None] | None = None,
) -> FitResult:
    """Fit the generator to `target`, from `start`; a pure function of its arguments.

    Args:
        plan: image grid and architecture.
        start: the public generator.
        embedding: the embedding that `target` is of.
        target: see `read_total`.
        profiles: pool of synthetic patients whose conditions are drawn.
        settings: see `FitSettings`.
        generator: of all draws.
        report: is told the step and the present distance.
    """
    model = make_generator(plan)
    model.load_state_dict(start)
    generated = _Generated(plan, model, embedding, profiles, generator)
    aim, metric = posterior(embedding, target)
    noise_norm = math.sqrt(target.used)
    enough = math.sqrt(target.used + 2 * math.sqrt(2 * target.used))  # what noise alone exceeds once in forty times
    half = max(settings.batch // (2 * min(SLICES, plan.image.slices)), 1)

    def measured() -> Tensor:
        """Two independent estimates (2, DEVIATIONS * (1 + Q)) of the present mean."""
        with torch.no_grad():
            means = [
                torch.stack([generated.coordinates(half).mean(dim=0) for _ in range(_MEASUREMENTS)]).mean(dim=0)
                for _ in range(2)
            ]
        return torch.stack(means)

    def distance(means: Tensor) -> float:
        apart = [(mean[embedding.chosen] * embedding.chosen_weight - target.mean) / target.noise for mean in means]
        return math.sqrt(max(float((apart[0] * apart[1]).sum()), 0.0))

    slow = fast = measured()
    before = distance(slow)
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    steps = 0
    for step in track(range(1, settings.steps + 1), "Fitting the generator to the embedding", settings.steps):
        if distance(slow) <= enough:
            break
        both = generated.coordinates(2 * half).reshape(2, half, -1).mean(dim=1)
        with torch.no_grad():
            slow, fast = slow.lerp(both, 1 - _SLOW), fast.lerp(both, 1 - _FAST)
            # Each half pulls towards the aim as seen by the other: the expected gradient is that of the distance itself.
            away = (fast - aim).flip(0)
        loss = (metric * away * both).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        decay = min(_AVERAGE, step / (step + 10))
        with torch.no_grad():
            for mean, parameter in zip(average, parameters, strict=True):
                mean.lerp_(parameter, 1 - decay)
        steps = step
        if report is not None:
            report(step, distance(slow))
    with torch.no_grad():
        for mean, parameter in zip(average, parameters, strict=True):
            parameter.copy_(mean)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return FitResult(state, before, distance(measured()), noise_norm, steps)


def fit_generator(
    plan: StudyPlan,
    start: State,
    public: State,
    total: Tensor,
    noise_sd: float,
    patients: int,
    profiles: SyntheticProfiles,
    generator: torch.Generator,
) -> tuple[State, dict[str, float]]:
    """Fit the plan's generator to the sum of its sites' embeddings.

    Args:
        plan: the study plan, which has a section `embedding`.
        start: the generator to start from.
        public: the public state of the embedding.
        total: (row_size,) sum of the sites' noisy sums.
        noise_sd: standard deviation of its noise in each coordinate.
        patients: declared by the sites that contributed.
        profiles: pool of synthetic patients whose conditions are drawn.
        generator: of all draws.

    Returns:
        The fitted generator; ``residual_before``, ``residual_after``, ``noise_norm``, ``steps`` as `FitResult` has them,
        and ``patients``, the noisy estimate of their number.
    """
    section = plan.embedding
    if section is None:
        raise ValueError("the plan has no section embedding")
    embedding = plan_embedding(plan, public)
    target = read_total(embedding, total, noise_sd, patients)
    settings = FitSettings(section.fit_steps, section.fit_batch, section.fit_learning_rate)
    result = fit(plan, start, embedding, target, profiles, settings, generator)
    return result.state, {
        "residual_before": result.residual_before,
        "residual_after": result.residual_after,
        "noise_norm": result.noise_norm,
        "steps": float(result.steps),
        "patients": target.patients,
    }
