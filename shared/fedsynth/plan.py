"""The study plan: one TOML file that names everything that matters, identified by its digest.

A site approves a digest, so two plans that differ in any value are two studies. Unknown keys are errors: a misspelt
privacy parameter must never fall back to a default unseen.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedsynth.errors import UsageError
from fedsynth.morphology import FEATURES
from fedsynth.toml import load_toml

# What a site computes privately, in the order in which a study runs it. `moments` and `embedding` are statistics that a
# site releases once; the others train in many private steps.
Module = Literal["moments", "autoencoder", "radiogenomics", "embedding", "gan", "translation"]
MODULES: tuple[Module, ...] = ("moments", "autoencoder", "radiogenomics", "embedding", "gan", "translation")
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan", "translation")
# What a site can be asked for: a module, which uses training patients, or, when all modules are done, an evaluation of the
# generator on held-out patients. No patient is both, so each population has an account of its own.
Activity = Literal["moments", "autoencoder", "radiogenomics", "embedding", "gan", "translation", "evaluation"]
ACTIVITIES: tuple[Activity, ...] = (*MODULES, "evaluation")
Population = Literal["train", "holdout"]

# As `fedsynth.dp.accounting.PRV_LEAST_DELTA`, which cannot be imported here without all of torch.
_PRV_LEAST_DELTA = 1e-10

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class Section(BaseModel):
    """A table of the plan: immutable, unknown keys forbidden, no conversion of text or truth values to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ImagePlan(Section):
    """The grid that every patient is resampled to: `slices` axial planes of `size` x `size` pixels, LPS order."""

    sequences: list[str] = ["T1", "T1c", "FLAIR"]
    size: Literal[32, 64, 128, 256] = 64
    slices: Count = 16
    pixel_spacing_mm: Positive = 3.0
    slice_spacing_mm: Positive = 7.0

    @model_validator(mode="after")
    def _sequences_are_distinct(self) -> Self:
        if not self.sequences or len(set(self.sequences)) != len(self.sequences):
            raise ValueError("image.sequences must name at least one sequence, each once")
        return self


class GenePlan(Section):
    """The gene panel and the public references that a profile is mapped to.

    A profile is mapped gene-wise: its within-sample rank is replaced by the value of the reference quantile function at
    that rank, then centred and scaled per gene by public constants. No statistic of a site's patients is used.
    Abundances (counts, TPM, log TPM) and per-gene z-scores rank differently, so a study takes one `measure` or the other.
    """

    panel: list[str] = Field(min_length=2)
    measure: Literal["abundance", "zscore"] = "abundance"
    reference_quantiles: list[float] = Field(min_length=2, description="quantile function on an even grid over [0, 1]")
    center: list[float]
    scale: list[Positive]
    clip: Positive = 4.0
    min_coverage: Annotated[float, Field(gt=0, le=1)] = 0.8

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if len(set(self.panel)) != len(self.panel):
            raise ValueError("genes.panel names a gene twice")
        if not len(self.panel) == len(self.center) == len(self.scale):
            raise ValueError("genes.center and genes.scale need one value for each gene of genes.panel")
        if any(b < a for a, b in zip(self.reference_quantiles, self.reference_quantiles[1:], strict=False)):
            raise ValueError("genes.reference_quantiles must not decrease")
        return self

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of which genes in which order, measured how: what weights over genes are bound to."""
        return hashlib.sha256("\n".join([self.measure, *self.panel]).encode()).hexdigest()


class LabelPlan(Section):
    """The patient label: a column of the clinical table and its classes, in the order of their codes 0, 1, ..."""

    name: str = "grade"
    classes: list[str] = Field(default=["low", "high"], min_length=2)

    @model_validator(mode="after")
    def _classes_are_distinct(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("label.classes names a class twice")
        return self


class MorphologyPlan(Section):
    """Which features of `fedsynth.morphology.FEATURES` the study uses, in this order.

    `reference_sd` gives each feature's standard deviation on the normalised scale [0, 1] in a public population. Where it is
    given, synthetic morphology gets, as independent noise, the spread that the DNN's predictions lack; where it is empty,
    synthetic patients are all as near to the average as the predictions are.
    """

    features: list[str] = [feature.name for feature in FEATURES]
    reference_sd: list[Annotated[float, Field(ge=0, le=1)]] = Field(default=[])

    @model_validator(mode="after")
    def _features_exist(self) -> Self:
        known = {feature.name for feature in FEATURES}
        unknown = [name for name in self.features if name not in known]
        if unknown or not self.features or len(set(self.features)) != len(self.features):
            raise ValueError(
                f"morphology.features: unknown or repeated {unknown or self.features}; known: {sorted(known)}"
            )
        if self.reference_sd and len(self.reference_sd) != len(self.features):
            raise ValueError("morphology.reference_sd needs one value for each feature, or none at all")
        return self


class PrivacyPlan(Section):
    """The budget of the whole study at every site; the unit is the patient, neighbours differ by adding or removing one.

    ``epsilon = inf`` is a study without privacy, for public data and reproductions: nothing is clipped, nothing is noised.
    It is marked so in the ledger, the report and the release, and a site's policy refuses it by default.

    `accountant` ``"rdp"`` bounds epsilon by proof. ``"prv"`` needs less noise; it composes the direction of removal, and
    that addition costs less is checked numerically, not proven (`docs/accounting.md`).

    `reproducible_seed` replaces the cryptographic noise source by a seeded one. Such a run is *not private*: it is marked
    so in the ledger, the report and the release, and a site's policy refuses it by default.

    With `noise` ``"local"`` each site adds the whole noise to what it sends. ``"distributed"`` would let each site add a
    share of it, which protects nobody from a server that sees single messages; it is refused until sums are aggregated
    securely (`fedsynth.dp.composition` computes both epsilons).
    """

    unit: Literal["patient"] = "patient"
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=True)]
    delta: Annotated[float, Field(gt=0, lt=1e-2)] = 1e-5
    accountant: Literal["rdp", "prv"] = "rdp"
    noise: Literal["local", "distributed"] = "local"
    reproducible_seed: int | None = None

    @property
    def private(self) -> bool:
        """Whether the plan asks for noise at all; a seed that makes it reproducible is another matter."""
        return math.isfinite(self.epsilon)

    @model_validator(mode="after")
    def _accountant_can_tell(self) -> Self:
        if self.accountant == "prv" and self.delta < _PRV_LEAST_DELTA:
            raise ValueError(f"privacy.accountant = 'prv' needs a delta of at least {_PRV_LEAST_DELTA:g}; use 'rdp'")
        return self

    @model_validator(mode="after")
    def _noise_is_local(self) -> Self:
        if self.noise == "distributed":
            raise ValueError(
                "privacy.noise = 'distributed' needs secure aggregation, which this version does not have: the server "
                "would see every site's sum with only a share of the noise. Use 'local'."
            )
        return self


Optimizer = Literal["adam", "sgd"]
Schedule = Literal["constant", "linear", "cosine", "exponential", "step"]


class TrainingPlan(Section):
    """One module's private training at a site.

    A step draws each patient with probability ``expected_batch / nominal_patients`` (Poisson sampling), clips each drawn
    patient's gradient to `max_grad_norm` and divides the noisy sum by `expected_batch`, a public constant.
    `budget_share` weighs this module against the others; whatever the shares add up to, all modules together spend the
    plan's whole epsilon (`fedsynth.budget`). With 0 rounds the module takes no part and spends nothing.

    `schedule` takes the learning rates of all the module's networks from their whole value to `final_learning_rate` (a
    share of it) over the steps of all rounds (`fedsynth.schedules`); `momentum` is of ``"sgd"``.
    """

    rounds: Annotated[int, Field(ge=0)]
    steps_per_round: Count
    expected_batch: Count
    max_grad_norm: Positive
    learning_rate: Positive
    budget_share: Annotated[float, Field(gt=0, le=1)]
    optimizer: Optimizer = "adam"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    schedule: Schedule = "constant"
    final_learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.1

    @property
    def steps(self) -> int:
        """Private steps over all rounds."""
        return self.rounds * self.steps_per_round


class PublicWeights(Section):
    """Weights made without private data that a module starts from, bound by their `fedsynth.records.state_digest`."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    provenance: str = Field(min_length=10)


class StatisticPlan(Section):
    """A statistic that each site releases once: the sum of one row a patient, of norm at most 1, plus Gaussian noise.

    `public` binds the public weights that a row is computed with (`fedsynth.engines`).
    """

    budget_share: Annotated[float, Field(gt=0, le=1)]
    public: PublicWeights
    # What a training section lets the plan choose is fixed here: one release, of all patients, of rows of norm 1.
    rounds: ClassVar[int] = 1
    steps_per_round: ClassVar[int] = 1
    steps: ClassVar[int] = 1
    max_grad_norm: ClassVar[float] = 1.0


class MomentsPlan(StatisticPlan):
    """First and second moments of genes (in `components` public directions), morphology and label."""

    components: Count = 12


class EmbeddingPlan(StatisticPlan):
    """Mean embedding of the images in public features, and how the server fits the generator to it."""

    dimensions: Count = 256
    fit_steps: Count = 150
    fit_batch: Count = 64
    fit_learning_rate: Positive = 5e-5


class AutoencoderPlan(TrainingPlan):
    """Gene-expression autoencoder with hidden layers ``hidden + [latent_dim] + reversed(hidden)`` (five by default)."""

    variational: bool = True
    hidden: list[Count] = Field(default=[128, 64], min_length=1)
    latent_dim: Count = 16
    activation: Literal["tanh", "relu"] = "tanh"
    kl_weight: Annotated[float, Field(ge=0)] = 0.5
    warm_start: PublicWeights | None = None


class RadiogenomicsPlan(TrainingPlan):
    """Radiogenomic DNN: genes -> morphology and label.

    `nonnegative_output` holds the weights of the morphology layer at or above 0 after each step, `nonnegative_weights` those
    of every layer: the literal wording of the radiogenomic paper, at the price of the fit.
    """

    hidden: list[Count] = Field(default=[128, 64, 32], min_length=1)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    start_from_encoder: bool = True
    nonnegative_output: bool = False
    nonnegative_weights: bool = False


class WarmStart(Section):
    """Public weights that generator and discriminator start from; the digests (`fedsynth.records.state_digest`) bind the
    sites' approval to the very weights."""

    generator_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    discriminator_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    provenance: str = Field(min_length=10)


# Which parameters of a network train: all; affine norms and biases; the last layers; or low-rank adapters beside every
# layer (`fedsynth.models.trainable`).
Trains = Literal["all", "norms", "head", "adapters"]
# What is done to every image in front of the discriminator (`fedsynth.models.augmentation`).
Augmentation = Literal["translation", "intensity", "flip", "rotation"]
# The networks that make images (`fedsynth.models.images`): DCGAN; one that grows from 8 x 8 pixels to the full size
# (PGGAN); that with self-attention and a spectrally normalised discriminator (Enhanced-GAN); a variational autoencoder.
Architecture = Literal["dcgan", "progressive", "enhanced", "vae"]
AdversarialLoss = Literal["bce", "wasserstein", "least_squares", "hinge"]

SMALLEST_IMAGE = 8  # pixels at which a growing network begins


class GanPlan(TrainingPlan):
    """The networks that make images. Each private step trains the local discriminator once; every `discriminator_steps` of
    them are followed by one generator step, which sees private data only through the discriminator (but for
    `l1_weight`, `feature_matching_weight` and ``"vae"``, below).

    With ``"adaptive"`` that number climbs 1, 2, 5, 10, 20, ... (never above `steps_per_round`) as the discriminator's
    moving-average accuracy on fakes, of memory `adaptive_memory`, falls to `adaptive_accuracy` (Bie, Kamath, Zhang
    2023). The number of private steps, and so the charge, stays what the plan says.

    `discriminator_trains` and `generator_trains` leave the rest of a network as it was sent; `adapter_rank` is the rank of
    low-rank adapters. `augmentation` shifts, recolours, mirrors and turns images in front of the discriminator, real
    and fake alike.

    `growth` says for how many rounds each resolution trains, from 8 x 8 pixels, doubling up to the image's size; the first
    `fade_in` (a share) of a resolution's steps blend it in. Empty: everything trains at full size from the start.

    `spectral_norm` divides every weight of the discriminator by its largest singular value (Miyato et al. 2018), in place
    of `discriminator_norm`; the architecture ``"enhanced"`` always does.

    `loss` is the adversarial loss (`fedsynth.losses`). `lipschitz` bounds the discriminator's slope: ``"weight_clip"``
    clamps its weights to [-`weight_clip`, `weight_clip`] after each step; ``"gradient_penalty"`` adds `penalty_weight` times
    the penalty at ``"interpolates"`` of a patient's slice and a fake, where it is part of the patient's gradient, or at
    ``"fakes"`` alone, where it touches no patient.

    `l1_weight` and `feature_matching_weight` hold the generator's image for a patient's own condition against the patient's
    slice. The generator's own gradient is then private: it is clipped and noised together with the discriminator's, as
    one vector, under the same charge.

    A variational autoencoder has an encoder in the discriminator's place, which stays at the site; decoder and encoder
    have one private gradient. `kl_weight` weighs its divergence.

    With 0 rounds the generator is the public one, or that one fitted to the embedding.
    """

    architecture: Architecture = "dcgan"
    latent_dim: Count = 64
    generator_width: Count = 32
    discriminator_width: Count = 16
    discriminator_norm: Literal["group", "batch"] = "group"
    spectral_norm: bool = False
    growth: list[Count] = []
    fade_in: Annotated[float, Field(ge=0, le=1)] = 0.5
    loss: AdversarialLoss = "bce"
    lipschitz: Literal["none", "weight_clip", "gradient_penalty"] = "none"
    weight_clip: Positive = 0.01
    penalty_weight: Positive = 10.0
    penalty_at: Literal["interpolates", "fakes"] = "interpolates"
    l1_weight: Annotated[float, Field(ge=0)] = 0.0
    feature_matching_weight: Annotated[float, Field(ge=0)] = 0.0
    kl_weight: Annotated[float, Field(ge=0)] = 0.02
    discriminator_steps: Count | Literal["adaptive"] = 1
    adaptive_accuracy: Annotated[float, Field(gt=0, lt=1)] = 0.6
    adaptive_memory: Annotated[float, Field(ge=0, lt=1)] = 0.9
    discriminator_trains: Trains = "all"
    generator_trains: Trains = "all"
    adapter_rank: Count = 4
    augmentation: list[Augmentation] = []
    generator_batch: Count = 32
    generator_learning_rate: Positive = 2e-4
    slices_per_patient: Count = 1
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    warm_start: WarmStart | None = None

    @property
    def grows(self) -> bool:
        """Whether the networks are made of one part a resolution."""
        return self.architecture in ("progressive", "enhanced")

    @property
    def generator_is_private(self) -> bool:
        """Whether the generator's own gradient touches private images, and so is clipped, noised and charged."""
        return self.architecture == "vae" or self.l1_weight > 0 or self.feature_matching_weight > 0

    @model_validator(mode="after")
    def _augmentations_are_distinct(self) -> Self:
        if len(set(self.augmentation)) != len(self.augmentation):
            raise ValueError("gan.augmentation names one twice")
        return self

    @model_validator(mode="after")
    def _growth_fits(self) -> Self:
        if self.growth and not self.grows:
            raise ValueError(f"gan.growth: the architecture {self.architecture!r} does not grow; leave it empty")
        if self.growth and sum(self.growth) != self.rounds:
            raise ValueError(f"gan.growth adds up to {sum(self.growth)} rounds, gan.rounds is {self.rounds}")
        return self

    @model_validator(mode="after")
    def _options_belong_together(self) -> Self:
        if self.architecture == "vae" and (
            self.l1_weight or self.feature_matching_weight or self.lipschitz != "none" or self.loss != "bce"
        ):
            raise ValueError(
                "gan.architecture = 'vae' has no discriminator: leave loss, lipschitz, l1_weight and "
                "feature_matching_weight out"
            )
        if self.discriminator_norm == "batch" and self.architecture != "dcgan":
            raise ValueError("gan.discriminator_norm = 'batch' is of the architecture 'dcgan' alone")
        if self.architecture == "vae" and self.augmentation:
            raise ValueError(
                "gan.augmentation changes what a discriminator is shown, and the architecture 'vae' has none"
            )
        if self.generator_is_private and self.discriminator_steps != 1:
            raise ValueError(
                "gan.discriminator_steps: with the architecture 'vae', l1_weight or feature_matching_weight both networks "
                "have one private gradient and move together: leave it at 1"
            )
        if self.discriminator_steps == "adaptive" and self.loss == "wasserstein":
            raise ValueError(
                "gan.discriminator_steps = 'adaptive' asks which fakes are seen through, and the scores of loss = "
                "'wasserstein' have no place where real ends: give a number of steps"
            )
        self._lipschitz_fits()
        self._spectral_norm_fits()
        return self

    def _lipschitz_fits(self) -> None:
        if self.lipschitz == "gradient_penalty" and self.discriminator_norm == "batch":
            raise ValueError(
                "gan.lipschitz = 'gradient_penalty' is of each image's own slope, which gan.discriminator_norm = 'batch' "
                "makes one of the batch: leave one of them out"
            )
        if self.lipschitz == "weight_clip" and self.discriminator_trains != "all":
            raise ValueError(
                "gan.lipschitz = 'weight_clip' clamps all weights of the discriminator, so gan.discriminator_trains has to "
                "be 'all'"
            )

    def _spectral_norm_fits(self) -> None:
        if self.spectral_norm and self.architecture == "vae":
            raise ValueError("gan.spectral_norm: the architecture 'vae' has no discriminator")
        if self.spectral_norm and self.discriminator_norm == "batch":
            raise ValueError("gan.discriminator_norm = 'batch' would undo gan.spectral_norm: leave one of them out")
        normalised = self.spectral_norm or self.architecture == "enhanced"
        if normalised and self.discriminator_trains == "adapters":
            raise ValueError(
                "gan.discriminator_trains = 'adapters' cannot be merged into spectrally normalised weights"
            )
        if normalised and self.lipschitz == "weight_clip":
            raise ValueError(
                "gan.lipschitz = 'weight_clip' clamps weights whose scale spectral normalisation undoes: leave it out"
            )


class TranslationPlan(TrainingPlan):
    """Two generators that translate slices between two domains, and a discriminator of each (CycleGAN, Zhu et al. 2017),
    with least-squares losses, cycle and identity losses.

    A fake is here a translated *private* slice, so nothing is public: the gradients of all four networks are one vector
    a patient, clipped and noised as one. The two generators are averaged; the discriminators stay at the site.

    ``"sequences"`` translates `source` to `target` and back, two of the plan's sequences; ``"tumour"`` translates slices
    without tumour to slices with tumour and back, all sequences at once.
    """

    domains: Literal["sequences", "tumour"] = "sequences"
    source: str = ""
    target: str = ""
    width: Count = 16
    cycle_weight: Annotated[float, Field(ge=0)] = 10.0
    identity_weight: Annotated[float, Field(ge=0)] = 5.0
    slices_per_patient: Count = 1

    @model_validator(mode="after")
    def _domains_are_named(self) -> Self:
        if self.domains == "sequences" and (not self.source or not self.target or self.source == self.target):
            raise ValueError("translation.source and translation.target must name two sequences")
        if self.domains == "tumour" and (self.source or self.target):
            raise ValueError("translation.domains = 'tumour' has no source and target: leave them out")
        return self


class AggregationPlan(Section):
    """How the server averages: weights are public constants (never true counts), `min_sites` replies close a round.

    Against a site that sends poisoned weights, `rule` takes the coordinate-wise ``"median"`` or ``"trimmed_mean"`` (leaving
    out the largest and the smallest `trim` of the values; Yin et al. 2018) in place of the mean, and `max_update_norm`
    bounds how far (L2) one site may move a module's weights in a round: a longer update is shortened to it. They govern
    trained modules. Statistics are sums; a site's is refused when it is larger than its declared patients can make it.
    """

    weighting: Literal["nominal", "equal"] = "nominal"
    rule: Literal["mean", "median", "trimmed_mean"] = "mean"
    trim: Annotated[float, Field(gt=0, lt=0.5)] = 0.34
    max_update_norm: Positive | None = None
    min_sites: Count = 1
    round_timeout_s: Positive = 3600.0

    @model_validator(mode="after")
    def _robust_rules_have_sites_to_compare(self) -> Self:
        if self.rule != "mean" and (self.weighting != "equal" or self.min_sites < 3):
            raise ValueError(
                f"aggregation.rule = '{self.rule}' compares sites one against another: it needs weighting = 'equal' and "
                "min_sites of at least 3"
            )
        if self.rule == "trimmed_mean" and self.trim * self.min_sites < 1:
            raise ValueError(
                f"aggregation.trim = {self.trim:g} leaves nobody out of {self.min_sites} sites (aggregation.min_sites): "
                "trim times min_sites must be at least 1"
            )
        return self


class SiteEvaluationPlan(Section):
    """Evaluation of the finished generator by the sites, on their held-out patients.

    Nothing was trained on held-out patients, so they have an epsilon of their own, at the delta of the plan: each site
    releases one noisy sum over them, of one row of norm at most 1 a patient. A site whose policy does not allow it leaves
    this round out and no other.
    """

    epsilon: Positive
    rounds: ClassVar[int] = 1
    max_grad_norm: ClassVar[float] = 1.0  # of a row; a statistic's name for it


class SitePlan(Section):
    """A taking-part site and the public size of its cohort, which the hospital declares (a rounded figure, not a count).

    `countersign_key` is the site's Ed25519 public key (32 bytes, hex, from ``fedsynth site countersign-key``): nothing that
    the site took part in is released without its signature.
    """

    name: Name
    nominal_patients: Count
    countersign_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class StudyPlan(Section):
    """The whole plan. `digest` is the study's identity."""

    schema_version: Literal[1] = 1
    name: Name
    purpose: str = Field(min_length=10)
    image: ImagePlan = ImagePlan()
    genes: GenePlan
    label: LabelPlan = LabelPlan()
    morphology: MorphologyPlan = MorphologyPlan()
    privacy: PrivacyPlan
    moments: MomentsPlan | None = None
    autoencoder: AutoencoderPlan
    radiogenomics: RadiogenomicsPlan
    embedding: EmbeddingPlan | None = None
    gan: GanPlan
    translation: TranslationPlan | None = None
    aggregation: AggregationPlan = AggregationPlan()
    site_evaluation: SiteEvaluationPlan | None = None
    sites: list[SitePlan] = Field(min_length=1)

    @model_validator(mode="after")
    def _whole_is_consistent(self) -> Self:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError("sites: a name is used twice")
        if self.aggregation.min_sites > len(names):
            raise ValueError("aggregation.min_sites is larger than the number of sites")
        self._engines_are_complete()
        self._images_can_be_made()
        shares = sum(self.training(module).budget_share for module in self.modules)
        if shares > 1 + 1e-9:
            raise ValueError(f"the modules' budget_share add up to {shares:.3f}; at most 1 can be spent")
        for site in self.sites:
            for module in self.modules:
                training = self.training(module)
                if isinstance(training, TrainingPlan) and training.expected_batch > site.nominal_patients:
                    raise ValueError(
                        f"{module}.expected_batch is larger than nominal_patients of site {site.name!r}: "
                        "no patient can be drawn with a probability above 1"
                    )
        return self

    def _engines_are_complete(self) -> None:
        networks = self.autoencoder.rounds > 0 and self.radiogenomics.rounds > 0
        if self.moments is None and not networks:
            raise ValueError(
                "nothing makes profiles: neither moments, nor rounds of both autoencoder and radiogenomics"
            )
        if self.moments is not None and (self.autoencoder.rounds or self.radiogenomics.rounds):
            raise ValueError(
                "profiles come from moments or from autoencoder and radiogenomics: one has to have 0 rounds"
            )
        if self.embedding is None and self.gan.rounds == 0 and self.gan.warm_start is None:
            raise ValueError("nothing makes images: no embedding, no round of the gan, no public generator")

    def _images_can_be_made(self) -> None:
        resolutions = (self.image.size // SMALLEST_IMAGE).bit_length()
        if self.gan.growth and len(self.gan.growth) != resolutions:
            raise ValueError(
                f"gan.growth names {len(self.gan.growth)} resolutions; from {SMALLEST_IMAGE} to {self.image.size} pixels "
                f"there are {resolutions}"
            )
        if self.gan.discriminator_norm == "batch" and self.privacy.private:
            raise ValueError(
                "gan.discriminator_norm = 'batch' mixes patients, so no patient's gradient could be clipped; it is for "
                "studies without privacy (privacy.epsilon = inf)"
            )
        if self.translation is not None and self.translation.domains == "sequences":
            for key, name in (("source", self.translation.source), ("target", self.translation.target)):
                if name not in self.image.sequences:
                    raise ValueError(f"translation.{key} names {name!r}, which is not among image.sequences")

    @property
    def images_identity(self) -> str:
        """SHA-256 (hex) of which sequences and morphology features in which order: what weights over images are bound to."""
        return hashlib.sha256(json.dumps([self.image.sequences, self.morphology.features]).encode()).hexdigest()

    @property
    def label_identity(self) -> str:
        """SHA-256 (hex) of the label and its classes in their order: what statistics by class are bound to."""
        return hashlib.sha256(json.dumps([self.label.name, self.label.classes]).encode()).hexdigest()

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules that take part, in the order in which they run."""
        return tuple(module for module in MODULES if self._section(module) is not None and self.training(module).rounds)

    @property
    def activities(self) -> tuple[Activity, ...]:
        """All that sites are asked for, in order: the modules, and an evaluation where the plan has one."""
        return self.modules if self.site_evaluation is None else (*self.modules, "evaluation")

    def rounds(self, activity: Activity) -> int:
        """How many rounds of `activity` the plan has; 0 of one that takes no part."""
        if activity not in self.activities:
            return 0
        return SiteEvaluationPlan.rounds if activity == "evaluation" else self.training(activity).rounds

    @property
    def profile_engine(self) -> Literal["moments", "networks"]:
        """What genes, morphology and label of synthetic patients come from."""
        return "networks" if self.moments is None else "moments"

    def _section(self, module: Module) -> TrainingPlan | StatisticPlan | None:
        return {
            "moments": self.moments,
            "autoencoder": self.autoencoder,
            "radiogenomics": self.radiogenomics,
            "embedding": self.embedding,
            "gan": self.gan,
            "translation": self.translation,
        }[module]

    def training(self, module: Module) -> TrainingPlan | StatisticPlan:
        """The section of `module`.

        Raises:
            ValueError: the plan has none.
        """
        section = self._section(module)
        if section is None:
            raise ValueError(f"the plan has no section {module}")
        return section

    def site(self, name: str) -> SitePlan:
        """The site called `name`.

        Raises:
            UsageError: the plan does not name it.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise UsageError("site_not_in_plan", f"The plan {self.name!r} does not name a site {name!r}.")

    def sample_rate(self, module: Module, site: str) -> float:
        """Probability with which one step of `module` draws a patient of `site`; 1 for a statistic, which takes all."""
        training = self.training(module)
        if isinstance(training, StatisticPlan):
            return 1.0
        return training.expected_batch / self.site(site).nominal_patients

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of all values, defaults included: comments and order do not matter."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_plan(path: Path) -> StudyPlan:
    """Read and validate a plan.

    Raises:
        UsageError: ``plan_missing``, ``plan_not_toml`` or ``plan_invalid``, with every offending key named.
    """
    return load_toml(path, StudyPlan, "plan")


def save_plan(plan: StudyPlan, path: Path) -> None:
    """Write `plan` as TOML; `load_plan` gives back an equal plan."""
    path.write_text(tomli_w.dumps(plan.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
