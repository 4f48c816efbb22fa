"""A selection draws what drawing many and keeping those that fit would give, and a release is held to what it says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import ks_2samp
from torch import Tensor

from fedsynth.engines.moments import SHAPE_POINTS, Sizes
from fedsynth.errors import Refused, UsageError
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.linear_gaussian import LinearGaussianProfiles, public_prior
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.morphology import denormalise
from fedsynth.plan import GenePlan, LabelPlan, MorphologyPlan, StudyPlan
from fedsynth.profiles import NetworkProfiles, ProfileModel
from fedsynth.selected_draw import LEAST_DRAWS, LEAST_SHARE, draw_selected, measured_ranges
from fedsynth.selection import (
    Range,
    Selected,
    Selection,
    make_selection,
    mix_words,
    parse_counts,
    parse_range,
    read_selected,
    selection_faults,
    sequences_of,
    with_sequences,
    words,
)
from fedsynth.synthesis import SyntheticProfiles
from fedsynth.synthetic import SyntheticPatient

GENES, CLASSES = 20, ["a", "b", "c"]
PRIOR = [0.6, 0.3, 0.1]


@pytest.fixture(scope="module")
def plan(tiny_plan: StudyPlan) -> StudyPlan:
    """Three classes and two features; four sequences."""
    return tiny_plan.model_copy(
        update={
            "label": LabelPlan(name="kind", classes=CLASSES),
            "morphology": MorphologyPlan(features=["volume", "sphericity"], reference_sd=[0.2, 0.15]),
            "image": tiny_plan.image.model_copy(update={"sequences": ["T1", "T1c", "T2", "FLAIR"]}),
            "genes": GenePlan(
                panel=tiny_plan.genes.panel, reference_quantiles=[-2, 2], center=[0.0] * GENES, scale=[1.0] * GENES
            ),
        }
    )


@pytest.fixture(scope="module")
def gaussian() -> LinearGaussianProfiles:
    """Classes that differ in morphology, which hangs together with genes."""
    draws = torch.Generator().manual_seed(0)
    points = (torch.arange(SHAPE_POINTS, dtype=torch.float64) + 0.5) / SHAPE_POINTS
    shape = torch.special.ndtri(points).to(torch.float32).expand(2, -1).contiguous()
    public = {
        "basis": torch.linalg.qr(torch.randn(GENES, 2, generator=draws))[0],
        "genes_scale": torch.tensor([2.0, 1.0]),
        "morphology_centre": torch.tensor([0.5, 0.5]),
        "morphology_scale": torch.tensor([0.12, 0.1]),
        "morphology_shape": shape,
        "morphology_by_class": torch.zeros(3, 2),
    }
    root = 0.5 * torch.randn(4, 4, generator=draws) + torch.eye(4)
    state = {
        **public_prior(Sizes(3, 2, 2), public),
        "class_prior": torch.tensor(PRIOR),
        "means": torch.tensor([[0.0, 0.0, -0.5, 0.3], [0.5, -0.5, 0.8, -0.2], [-1.0, 0.5, 0.2, 1.0]]),
        "covariance": root @ root.T / 2,
    }
    return LinearGaussianProfiles(state, clip=6.0)


@pytest.fixture(scope="module")
def networks(plan: StudyPlan) -> NetworkProfiles:
    """Networks with their first weights, whose labels follow genes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        autoencoder, dnn = make_autoencoder(plan), make_radiogenomic_dnn(plan)
    with torch.no_grad():
        dnn.label.weight.mul_(5.0)
    return NetworkProfiles(autoencoder.eval(), dnn.eval(), 4.0, plan.morphology.reference_sd)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def physical(profiles: SyntheticProfiles, plan: StudyPlan) -> np.ndarray:
    return denormalise(profiles.morphology.numpy(), plan.morphology.features)


def alike(one: SyntheticProfiles, other: SyntheticProfiles) -> None:
    """No marginal, and no product of a gene with morphology, differs by more than chance does."""
    both = [
        np.column_stack([part.genes[:, :4], part.morphology, part.genes[:, :2] * part.morphology])
        for part in (one, other)
    ]
    p_values = [ks_2samp(both[0][:, i], both[1][:, i]).pvalue for i in range(both[0].shape[1])]
    assert min(p_values) > 1e-3 / len(p_values), p_values


def same(one: SyntheticProfiles, other: SyntheticProfiles) -> bool:
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("genes", "morphology", "labels"))


@pytest.mark.parametrize("engine", ["gaussian", "networks"])
def test_without_a_choice_of_patients_it_is_what_the_model_draws_to_the_last_bit(
    engine: str, plan: StudyPlan, request: pytest.FixtureRequest
) -> None:
    model: ProfileModel = request.getfixturevalue(engine)
    drawn = draw_selected(model, plan, Selection(patients=30, sequences=("T1c",)), seeded(1))
    assert same(drawn.profiles, model.draw(30, seeded(1)))
    assert (drawn.tried, drawn.fitting) == (30, 30)


@pytest.mark.parametrize("engine", ["gaussian", "networks"])
def test_a_selection_is_distributed_as_those_of_many_draws_who_fit(
    engine: str, plan: StudyPlan, request: pytest.FixtureRequest
) -> None:
    model: ProfileModel = request.getfixturevalue(engine)
    many = model.draw(60_000, seeded(11))
    middle = np.median(physical(many, plan), axis=0)
    where = (Range(feature="volume", least=float(middle[0])), Range(feature="sphericity", most=float(middle[1])))
    fits = (physical(many, plan)[:, 0] >= where[0].least) & (physical(many, plan)[:, 1] <= where[1].most)
    two = torch.from_numpy(fits) & (many.labels != 1)
    drawn = draw_selected(model, plan, Selection(patients=3000, only=("a", "c"), where=where), seeded(2))
    alike(drawn.profiles, many.take(torch.nonzero(two)[:, 0]))
    share = drawn.fitting / drawn.tried
    assert share == pytest.approx(float(two.float().mean()), abs=5 * (share / drawn.tried) ** 0.5)
    shares = [
        float((part.labels == 0).float().mean()) for part in (drawn.profiles, many.take(torch.nonzero(two)[:, 0]))
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)
    # Given its class, and how many of which were asked for, a patient is one of that class who fits.
    counts = draw_selected(model, plan, Selection(patients=2500, counts={"a": 1500, "b": 1000}, where=where), seeded(3))
    for code, number in ((0, 1500), (1, 1000)):
        own = counts.profiles.take(torch.nonzero(counts.profiles.labels == code)[:, 0])
        assert len(own.labels) == number
        alike(own, many.take(torch.nonzero(torch.from_numpy(fits) & (many.labels == code))[:, 0]))


def test_a_class_that_can_be_asked_for_is_drawn_without_waste(gaussian: LinearGaussianProfiles) -> None:
    rare = gaussian.draw_class(2, 6000, seeded(1))
    assert rare.labels.tolist() == [2] * 6000
    many = gaussian.draw(60_000, seeded(2))
    alike(rare, many.take(torch.nonzero(many.labels == 2)[:, 0]))


@pytest.mark.parametrize("engine", ["gaussian", "networks"])
def test_balance_gives_the_minority_as_many_patients_and_mixes_them(
    engine: str, plan: StudyPlan, request: pytest.FixtureRequest
) -> None:
    selection = Selection(patients=301, balance=True)
    drawn = draw_selected(request.getfixturevalue(engine), plan, selection, seeded(5)).profiles
    assert torch.bincount(drawn.labels).tolist() == [101, 100, 100]
    assert torch.bincount(drawn.labels[:150]).min() > 30  # a half of a release holds every class
    again = draw_selected(request.getfixturevalue(engine), plan, selection, seeded(5)).profiles
    assert same(drawn, again)
    assert not same(drawn, draw_selected(request.getfixturevalue(engine), plan, selection, seeded(6)).profiles)


@dataclass(frozen=True)
class OneIn:
    """A model of which one patient in so many is large."""

    rarity: int

    def draw(self, count: int, generator: torch.Generator) -> SyntheticProfiles:
        large = torch.rand(count, generator=generator) < 1 / self.rarity
        morphology = torch.stack([torch.where(large, 0.9, 0.2), torch.full((count,), 0.5)], dim=1)
        return SyntheticProfiles(torch.zeros(count, GENES), morphology, torch.zeros(count, dtype=torch.long))

    def draw_class(self, code: int, count: int, generator: torch.Generator) -> SyntheticProfiles:
        return self.draw(count if code == 0 else 0, generator)

    def share_of_class(self, code: int) -> float:
        return 1.0

    def predict(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def test_a_subset_that_is_too_rare_is_refused_with_the_share_that_was_found(plan: StudyPlan) -> None:
    large = (Range(feature="volume", least=100.0),)
    with pytest.raises(
        Refused, match=r"Of \d+ synthetic profiles that the model drew, \d+ fit .* 1 in 1000"
    ) as refusal:
        draw_selected(OneIn(5000), plan, Selection(patients=200, where=large), seeded(1))
    assert refusal.value.code == "subset_too_rare"
    # A class of which the model draws nobody is refused as well, and by its name.
    with pytest.raises(Refused, match=f"Of {LEAST_DRAWS} .* of class b, 0 fit"):
        draw_selected(OneIn(2), plan, Selection(patients=2, balance=True, only=("a", "b")), seeded(1))
    # So few would be found before `LEAST_DRAWS`, and they are as rare.
    for seed in range(20):
        with pytest.raises(Refused, match="fewer than 1 in 1000"):
            draw_selected(OneIn(5000), plan, Selection(patients=1, where=large), seeded(seed))
    found = draw_selected(OneIn(300), plan, Selection(patients=50, where=large), seeded(1))
    assert (physical(found.profiles, plan)[:, 0] >= 100).all()
    assert found.fitting / found.tried > LEAST_SHARE


def test_a_class_that_can_be_asked_for_is_refused_where_it_is_too_rare(
    plan: StudyPlan, gaussian: LinearGaussianProfiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = (Range(feature="volume", least=20.0),)
    share = float((physical(gaussian.draw_class(2, 20_000, seeded(0)), plan)[:, 0] >= 20.0).mean())
    assert 0.1 < share < 0.95
    assert gaussian.share_of_class(2) == pytest.approx(PRIOR[2], abs=1e-6)
    for prior, where in ((0.0005, ()), (0.0012 if share < 0.8 else 0.00105, few)):
        monkeypatch.setattr(gaussian, "_prior", torch.tensor([0.6, 0.4 - prior, prior], dtype=torch.float64))
        with pytest.raises(Refused, match=r"of class c, itself .* of all patients, .* fewer than 1 in 1000"):
            draw_selected(gaussian, plan, Selection(patients=2, counts={"c": 2}, where=where), seeded(1))
    monkeypatch.setattr(gaussian, "_prior", torch.tensor([0.6, 0.398, 0.002], dtype=torch.float64))
    drawn = draw_selected(gaussian, plan, Selection(patients=2, counts={"c": 2}), seeded(1))
    assert drawn.profiles.labels.tolist() == [2, 2]


def test_what_is_typed_becomes_a_selection_in_the_plans_order(plan: StudyPlan) -> None:
    def make(patients: int | None = None, **parts: Any) -> Selection:
        return make_selection(plan, patients, default_patients=150, **parts)

    assert make() == Selection(patients=150)
    assert not make().chooses
    counted = make(counts=parse_counts(["c=7", "a=3"]))
    assert (counted.patients, list(counted.counts.items())) == (10, [("a", 3), ("c", 7)])
    both = make(where=[parse_range("sphericity<=0.8"), parse_range("volume>=20"), parse_range(" volume <= 5e1 ")])
    assert both.where == (Range(feature="volume", least=20, most=50), Range(feature="sphericity", most=0.8))
    assert make(sequences=["FLAIR", "T1"]).sequences == ("T1", "FLAIR")
    assert make(sequences=["FLAIR", "T1", "T2", "T1c"], only=["c", "b", "a"]) == make()  # all of them is no choice
    assert make(12, only=["b"]).per_class(CLASSES) == {"b": 12}
    assert make(12, only=["b", "a"]).per_class(CLASSES) is None
    assert make(5, only=["c", "b"], balance=True).per_class(CLASSES) == {"b": 3, "c": 2}
    assert make(1, balance=True).per_class(CLASSES) == {"a": 1}


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ({"counts": {"d": 3}}, "selection_unknown"),
        ({"only": ["d"]}, "selection_unknown"),
        ({"sequences": ["PD"]}, "selection_unknown"),
        ({"where": [Range(feature="flair_ratio", least=1)]}, "selection_unknown"),
        ({"where": [Range(feature="volume", least=300)]}, "selection_outside"),
        ({"where": [Range(feature="sphericity", most=0)]}, "selection_outside"),
        ({"counts": {"a": 3}, "balance": True}, "selection_disagrees"),
        ({"counts": {"a": 3}, "patients": 4}, "selection_disagrees"),
        ({"counts": {"a": 3}, "only": ["a"]}, "selection_disagrees"),
    ],
)
def test_what_the_plan_lacks_or_what_does_not_fit_together_is_refused(
    plan: StudyPlan, parts: dict[str, Any], code: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        make_selection(plan, **({"patients": None} | parts), default_patients=10)
    assert refusal.value.code == code


@pytest.mark.parametrize("text", ["volume", "volume>20", "volume>=x", "volume>=nan", "volume>=inf", ">=3", "a>=1<=2"])
def test_a_range_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_range(text)
    assert refusal.value.code == "selection_range"


@pytest.mark.parametrize("given", [["a"], ["a=0"], ["a=-1"], ["a=1.5"], ["=3"], ["a=1", "a=2"]])
def test_counts_of_another_form_are_refused(given: list[str]) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_counts(given)
    assert refusal.value.code == "selection_count"


def test_two_ranges_that_leave_nothing_are_refused(plan: StudyPlan) -> None:
    where = [parse_range("volume>=50"), parse_range("volume<=20")]
    with pytest.raises(UsageError, match="volume is empty") as refusal:
        make_selection(plan, 3, default_patients=3, where=where)
    assert refusal.value.code == "selection_disagrees"


def patient(voxels: int, plan: StudyPlan) -> SyntheticPatient:
    """A tumour of so many voxels in a bright head."""
    image = plan.image
    mask = np.zeros((image.slices, image.size, image.size), dtype=np.uint8)
    mask[1, 4:24, 4:24] = (np.arange(400) < voxels).reshape(20, 20)
    images = np.full((len(image.sequences), *mask.shape), 0.5, dtype=np.float32)
    return SyntheticPatient("SYN0001", "a", np.zeros(GENES, np.float32), np.ones(2, np.float32), images, mask)


def test_what_was_asked_for_is_measured_in_the_drawn_masks(plan: StudyPlan) -> None:
    voxel_ml = 3.0 * 3.0 * 7.0 / 1000
    where = (Range(feature="volume", least=100 * voxel_ml), Range(feature="sphericity", most=1.0))
    volume, sphericity = measured_ranges(plan, [patient(n, plan) for n in (0, 99, 100, 200)], where)
    assert (volume.patients, volume.without_tumour, volume.measurable, volume.fulfilling) == (4, 1, 3, 2)
    assert volume.median == pytest.approx(100 * voxel_ml)
    assert (sphericity.measurable, sphericity.fulfilling) == (3, 3)
    assert "2 of 4 have it, median 6.3 mL; in 1 it could not be measured." in volume.words
    assert measured_ranges(plan, [patient(9, plan)], ()) == ()
    (nothing,) = measured_ranges(plan, [patient(0, plan)], where[:1])
    assert nothing.words.endswith("it could be measured in none of the images and masks.")


def test_a_release_is_held_to_what_it_says_was_selected(plan: StudyPlan) -> None:
    morphology = np.array([[30.0, 0.5], [40.0, 0.6], [25.0, 0.4]], dtype=np.float32)

    def faults(labels: list[str], **parts: Any) -> list[str]:
        asked = Selection.model_validate({"patients": 3} | parts)
        (measured,) = [measured_ranges(plan, [patient(9, plan)] * asked.patients, asked.where)]
        return selection_faults(Selected(asked=asked, tried=9, fitting=9, measured=measured), plan, labels, morphology)

    assert faults(["a", "b", "c"], balance=True) == []
    assert "classes" in faults(["a", "a", "c"], balance=True)[0]
    assert "classes" in faults(["a", "a", "c"], counts={"a": 1, "c": 2})[0]
    assert faults(["a", "a", "c"], only=("a", "c")) == []
    assert "classes" in faults(["a", "b", "c"], only=("a", "c"))[0]
    assert "says 4 patients" in faults(["a", "a", "a"], patients=4, sequences=("T1",))[0]
    assert faults(["a"] * 3, where=({"feature": "volume", "least": 25.0},)) == []
    assert "1 patients were not drawn" in faults(["a"] * 3, where=({"feature": "volume", "least": 26.0},))[0]
    assert "which the plan lacks" in faults(["a"] * 3, sequences=("PD",))[0]


def test_what_was_selected_reads_back_and_nonsense_does_not(plan: StudyPlan) -> None:
    asked = make_selection(plan, 4, default_patients=1, where=[parse_range("volume>=5")], sequences=["T2"])
    selected = Selected(
        asked=asked, tried=10, fitting=6, measured=measured_ranges(plan, [patient(90, plan)] * 4, asked.where)
    )
    assert read_selected(selected.model_dump_json().encode(), plan) == selected
    for content in (b"", b"{}", selected.model_dump_json().replace('"tried":10', '"tried":5').encode()):
        with pytest.raises(Refused) as refusal:
            read_selected(content, plan)
        assert refusal.value.code == "release_unreadable"
    with pytest.raises(ValidationError):
        Selected(asked=asked, tried=10, fitting=6)  # says nothing of the range


@pytest.mark.parametrize(
    "asked",
    [
        {"only": ["z"], "balance": True},
        {"counts": {"z": 3}},
        {"sequences": ["PD"]},
        {"where": [{"feature": "age", "least": 1.0, "most": None}]},
    ],
)
def test_a_selection_of_what_the_plan_lacks_is_refused_where_it_is_read(asked: dict[str, Any], plan: StudyPlan) -> None:
    measured = [
        {"asked": each, "patients": 3, "without_tumour": 0, "measurable": 3, "fulfilling": 3, "median": 2.0}
        for each in asked.get("where", [])
    ]
    written = {"asked": {"patients": 3, **asked}, "tried": 3, "fitting": 3, "measured": measured}
    with pytest.raises(Refused, match="that the plan lacks") as refusal:
        read_selected(json.dumps(written).encode(), plan)
    assert refusal.value.code == "release_unreadable"


@pytest.mark.parametrize(
    "lie",
    [
        {"patients": 900},
        {"measurable": 5},
        {"fulfilling": 4},
        {"without_tumour": -1},
        {"measurable": 0, "fulfilling": 0},
    ],
)
def test_figures_of_a_selection_that_cannot_be_are_refused(lie: dict[str, int], plan: StudyPlan) -> None:
    asked = {"feature": "volume", "least": 1.0, "most": None}
    measured = {"asked": asked, "patients": 3, "without_tumour": 0, "measurable": 3, "fulfilling": 3, "median": 2.0}
    written = {"asked": {"patients": 3, "where": [asked]}, "tried": 9, "fitting": 5, "measured": [measured]}
    read_selected(json.dumps(written).encode(), plan)
    with pytest.raises(Refused):
        read_selected(json.dumps({**written, "measured": [measured | lie]}).encode(), plan)
    with pytest.raises(Refused):
        read_selected(json.dumps({**written, "fitting": 2}).encode(), plan)  # three were kept


def test_people_are_told_what_was_chosen(plan: StudyPlan) -> None:
    asked = make_selection(plan, 9, default_patients=1, balance=True, where=[parse_range("volume>=20")])
    told = " ".join(words(asked, plan))
    assert "The class mix was chosen, not that of the hospitals (kind: 3 a, 3 b, 3 c)." in told
    assert "volume of at least 20 mL" in told
    sequences = Selected(asked=Selection(patients=1, sequences=("T2", "FLAIR")), tried=1, fitting=1)
    assert sequences_of(plan, sequences) == ("T2", "FLAIR")
    assert words(sequences.asked, plan) == [
        "Of the study’s MR sequences the images hold T2, FLAIR; T1, T1c were left out."
    ]
    assert mix_words(sequences.asked, plan) == []
    assert with_sequences(plan, ("T2",)).image.sequences == ["T2"]
    assert with_sequences(plan, sequences_of(plan, None)) is plan
