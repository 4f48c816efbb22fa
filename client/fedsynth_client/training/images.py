"""What the networks of images are shown in a block: slices of drawn patients, and conditions of synthetic ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsynth.dp.randomness import Randomness, poisson_draw
from fedsynth.models.augmentation import Changes, augmented, draw_changes
from fedsynth.models.condition import TumourMap, condition, slice_positions, tumour_map
from fedsynth.models.growth import Stage, at_stage
from fedsynth.plan import StudyPlan
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.block import public_generator


@dataclass(frozen=True)
class ImagePatients:
    """The training patients with images, one row a patient.

    Attributes:
        slices: (N, C + 1, S, H, W) float16 in [-1, 1]: image channels and mask channel.
        morphology: (N, F) in [0, 1], NaN where not measured.
        labels: (N,) class codes, -1 where unknown.
    """

    slices: Tensor
    morphology: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Drawn:
    """The patients of one step, and which slices of them are shown how. P patients with k slices each.

    Attributes:
        rows: (P,) of the cohort.
        places: (P, k) slices.
        changes: one a slice, those of a patient being neighbours.
    """

    rows: Tensor
    places: Tensor
    changes: Changes

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Showing:
    """Draws what is shown; made by `showing`.

    Attributes:
        plan: the study plan.
        profiles: pool of synthetic conditions.
        patients: private data.
        public: stream of what concerns fakes.
        of_patients: stream of what concerns drawn patients. One of its own: what it gives out depends on how many were
            drawn, and the fakes, whose gradient is not noised, must not.
        positions: (S,) of slices, in [-1, 1].
        tumours: of the plan's conditions.
    """

    plan: StudyPlan
    profiles: SyntheticProfiles
    patients: ImagePatients
    public: torch.Generator
    of_patients: torch.Generator
    positions: Tensor
    tumours: TumourMap

    def draw(self, sample_rate: float, stage: Stage | None, randomness: Randomness) -> Drawn:
        """Poisson-sample patients, and draw slices and changes of each."""
        rows = poisson_draw(len(self.patients.labels), sample_rate, randomness)
        shape = (len(rows), self.plan.gan.slices_per_patient)
        places = torch.randint(self.plan.image.slices, shape, generator=self.of_patients)
        return Drawn(rows, places, self._changes(places.numel(), stage, self.of_patients))

    def noise(self, drawn: Drawn, *lengths: int) -> Tensor:
        """(P, k, *lengths) standard normal, of drawn patients."""
        return torch.randn(*drawn.places.shape, *lengths, generator=self.of_patients)

    def shares(self, drawn: Drawn) -> Tensor:
        """(P, k) uniform in [0, 1), of drawn patients."""
        return torch.rand(*drawn.places.shape, generator=self.of_patients)

    def slices(self, drawn: Drawn, positions: Tensor, stage: Stage | None) -> tuple[Tensor, Tensor]:
        """What is known of the patients at `positions` (p,) in the draw, unchanged.

        Returns:
            Slices (p * k, C + 1, s, s) as a stage sees them, and their conditions (p * k, c).
        """
        rows = drawn.rows[positions].repeat_interleave(drawn.places.shape[1])
        places = drawn.places[positions].flatten()
        images = self.patients.slices[rows, :, places].float()
        code = self._condition(self.patients.labels[rows], self.patients.morphology[rows], places)
        return at_stage(images, stage, self.plan.image.size), code

    def changed(
        self, drawn: Drawn, positions: Tensor, images: Tensor, code: Tensor, stage: Stage | None
    ) -> tuple[Tensor, Tensor]:
        """Slices of the patients at `positions`, or images in their place, as the discriminator is shown them."""
        items = torch.arange(drawn.places.shape[1])
        changes = drawn.changes[(positions[:, None] * len(items) + items).flatten()]
        return self._augmented(images, code, changes, stage)

    def synthetic_condition(self, count: int) -> Tensor:
        """(count, c) conditions of synthetic patients."""
        row = torch.randint(len(self.profiles.labels), (count,), generator=self.public)
        place = torch.randint(len(self.positions), (count,), generator=self.public)
        return self._condition(self.profiles.labels[row], self.profiles.morphology[row], place)

    def latent(self, count: int) -> Tensor:
        """(count, latent_dim) standard normal, of fakes."""
        return torch.randn(count, self.plan.gan.latent_dim, generator=self.public)

    def changes_of_fakes(self, count: int, stage: Stage | None) -> Changes:
        """How fakes are shown to the discriminator."""
        return self._changes(count, stage, self.public)

    def shown(self, images: Tensor, code: Tensor, changes: Changes, stage: Stage | None) -> tuple[Tensor, Tensor]:
        """Fakes and their conditions as the discriminator is shown them."""
        return self._augmented(images, code, changes, stage)

    def _condition(self, labels: Tensor, morphology: Tensor, places: Tensor) -> Tensor:
        return condition(labels, morphology, self.positions[places], len(self.plan.label.classes))

    def _size(self, stage: Stage | None) -> int:
        return self.plan.image.size if stage is None else stage.size

    def _changes(self, count: int, stage: Stage | None, generator: torch.Generator) -> Changes:
        return draw_changes(self.plan.gan.augmentation, count, self._size(stage), generator)

    def _augmented(self, images: Tensor, code: Tensor, changes: Changes, stage: Stage | None) -> tuple[Tensor, Tensor]:
        if not self.plan.gan.augmentation:
            return images, code
        # A pixel of an early stage is as wide as several of the full size, and the condition moves as far.
        wider = self.plan.image.size / self._size(stage)
        return augmented(images, code, changes, replace(self.tumours, pixel_mm=self.tumours.pixel_mm * wider))


def showing(plan: StudyPlan, profiles: SyntheticProfiles, patients: ImagePatients, randomness: Randomness) -> Showing:
    """What a block shows its networks, with streams of its own."""
    public = public_generator(randomness)
    of_patients = public_generator(randomness)
    return Showing(plan, profiles, patients, public, of_patients, slice_positions(plan.image.slices), tumour_map(plan))
