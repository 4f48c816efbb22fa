"""A plan is what its file says, no more and no less, and its digest tells any two plans apart."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsynth.dp.accounting import PRV_LEAST_DELTA
from fedsynth.errors import ExitCode, UsageError
from fedsynth.plan import MODULES, TRAINED, StudyPlan, load_plan, save_plan

TRAINING = {"rounds": 2, "steps_per_round": 5, "expected_batch": 10, "max_grad_norm": 1.0, "learning_rate": 0.001}

PLAN: dict[str, Any] = {
    "name": "glioma-1",
    "purpose": "Synthetic glioma patients for method research",
    "image": {"sequences": ["T1c", "FLAIR"], "size": 32, "slices": 4},
    "genes": {
        "panel": ["EGFR", "IDH1", "TP53"],
        "reference_quantiles": [0.0, 1.0, 4.0, 9.0],
        "center": [4.0, 5.0, 6.0],
        "scale": [1.0, 2.0, 1.5],
    },
    "privacy": {"epsilon": 8.0},
    "autoencoder": {**TRAINING, "budget_share": 0.3},
    "radiogenomics": {**TRAINING, "budget_share": 0.3},
    "gan": {**TRAINING, "budget_share": 0.35},
    "sites": [{"name": "north", "nominal_patients": 100}, {"name": "south", "nominal_patients": 60}],
}

WARM_START = {"generator_sha256": "a" * 64, "discriminator_sha256": "b" * 64, "provenance": "public simulated cohort"}

PUBLIC = {"sha256": "c" * 64, "provenance": "public simulated patients"}

Path_ = tuple[str | int, ...]


def changed(values: dict[str, Any], path: Path_, value: object) -> dict[str, Any]:
    """A copy of `values` with the value at `path` set."""
    result = copy.deepcopy(values)
    place: Any = result
    for key in path[:-1]:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
    place[path[-1]] = value
    return result


# The same study with both statistics in place of the networks over profiles and beside the GAN.
STATISTICS = {
    **PLAN,
    "moments": {"budget_share": 0.4, "public": PUBLIC},
    "embedding": {"budget_share": 0.25, "public": PUBLIC},
    "autoencoder": {**TRAINING, "rounds": 0, "budget_share": 0.3},
    "radiogenomics": {**TRAINING, "rounds": 0, "budget_share": 0.3},
}


def write(values: dict[str, Any], folder: Path) -> Path:
    path = folder / "plan.toml"
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path


def refused(values: dict[str, Any], folder: Path) -> str:
    """The message with which a plan of these values is refused."""
    with pytest.raises(UsageError) as caught:
        load_plan(write(values, folder))
    assert caught.value.code == "plan_invalid"
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value.message


def leaves(value: object, path: Path_ = ()) -> list[tuple[Path_, object]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    if isinstance(value, list):
        return [leaf for place, inner in enumerate(value) for leaf in leaves(inner, (*path, place))]
    return [(path, value)]


# Values for which "a little more" or "with a letter more" is no valid plan.
OTHERS: dict[Path_, object] = {
    ("image", "size"): 64,
    ("genes", "measure"): "zscore",
    ("genes", "reference_quantiles", 3): 10.0,
    ("genes", "min_coverage"): 0.7,
    ("privacy", "accountant"): "prv",
    ("privacy", "delta"): 1e-6,
    ("privacy", "reproducible_seed"): 0,
    ("autoencoder", "activation"): "relu",
    ("gan", "warm_start"): WARM_START,
    ("autoencoder", "warm_start"): {"sha256": "a" * 64, "provenance": "public expression profiles"},
    ("gan", "ema_decay"): 0.5,
    ("gan", "architecture"): "enhanced",
    ("gan", "loss"): "hinge",
    ("gan", "lipschitz"): "gradient_penalty",
    ("gan", "penalty_at"): "fakes",
    ("translation",): {**TRAINING, "budget_share": 0.05, "source": "T1c", "target": "FLAIR"},
    ("translation", "domains"): "tumour",
    **{(module, "optimizer"): "sgd" for module in TRAINED},
    **{(module, "schedule"): "cosine" for module in TRAINED},
    ("gan", "discriminator_trains"): "norms",
    ("gan", "generator_trains"): "adapters",
    ("aggregation", "weighting"): "equal",
    ("aggregation", "min_sites"): 2,
    ("aggregation", "max_update_norm"): 1.5,
    ("site_evaluation",): {"epsilon": 1.0},
    **{("sites", place, "countersign_key"): "c" * 64 for place in range(3)},
    ("embedding",): {"budget_share": 0.05, "public": PUBLIC},
    ("embedding", "public", "sha256"): "e" * 64,
    ("moments", "public", "sha256"): "e" * 64,
    **{(module, "budget_share"): 0.1 for module in MODULES},
}
# Only one value is valid, so nothing can be confused.
# Or the value alone makes no plan: moments take the place of other modules, a robust rule needs sites to compare.
FIXED: set[Path_] = {
    ("schema_version",),
    ("privacy", "unit"),
    ("privacy", "noise"),
    ("moments",),
    ("aggregation", "rule"),
    ("gan", "discriminator_norm"),  # the other value is for studies without privacy
}
# Morphology features are a choice from a list: leaving one out is the change.
ALL_LEAVES = [
    (values, path, value)
    for values in (PLAN, STATISTICS)
    for path, value in leaves(StudyPlan.model_validate(values).model_dump(mode="json"))
    if path not in FIXED and path[0] != "morphology" and (values is PLAN or path[0] in ("moments", "embedding"))
]


def another(path: Path_, value: object) -> object:
    if path in OTHERS:
        return OTHERS[path]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, int):
        return value + 1
    assert isinstance(value, float)
    return value + 0.0078125


def test_the_rule_of_aggregation_counts_for_the_digest(tmp_path: Path) -> None:
    site = PLAN["sites"][0]
    values = {**PLAN, "sites": [{**site, "name": name} for name in ("north", "south", "east")]}
    plans = [
        StudyPlan.model_validate({**values, "aggregation": {"rule": rule, "weighting": "equal", "min_sites": 3}})
        for rule in ("mean", "median", "trimmed_mean")
    ]
    assert len({plan.digest for plan in plans}) == 3
    save_plan(plans[1], tmp_path / "plan.toml")
    assert load_plan(tmp_path / "plan.toml") == plans[1]


@pytest.mark.parametrize(
    ("values", "path", "value"), ALL_LEAVES, ids=[".".join(map(str, path)) for _, path, _ in ALL_LEAVES]
)
def test_every_value_counts_for_the_digest_and_survives_the_file(
    values: dict[str, Any], path: Path_, value: object, tmp_path: Path
) -> None:
    plan = StudyPlan.model_validate(values)
    full = plan.model_dump(mode="json")
    other = StudyPlan.model_validate(changed(full, path, another(path, value)))
    assert other.digest != plan.digest
    save_plan(other, tmp_path / "plan.toml")
    again = load_plan(tmp_path / "plan.toml")
    assert again == other
    assert again.digest == other.digest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("morphology", "features"), ["volume"]),
        (("image", "sequences"), ["FLAIR", "T1c"]),
        (("label", "classes"), ["high", "low"]),
        (("sites",), [{"name": "south", "nominal_patients": 60}, {"name": "north", "nominal_patients": 100}]),
        (("autoencoder", "hidden"), [128]),
    ],
)
def test_the_order_and_number_of_list_items_count_for_the_digest(path: Path_, value: object) -> None:
    assert StudyPlan.model_validate(changed(PLAN, path, value)).digest != StudyPlan.model_validate(PLAN).digest


def reordered(value: object) -> object:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def test_comments_order_spelling_and_defaults_written_out_do_not_change_the_digest(tmp_path: Path) -> None:
    digest = StudyPlan.model_validate(PLAN).digest
    turned = tomli_w.dumps(reordered(PLAN))  # type: ignore[arg-type]
    path = tmp_path / "plan.toml"
    path.write_text("# approved in spring\n" + turned.replace("epsilon = 8.0", "epsilon = 8 # a whole number"))
    assert "epsilon = 8 #" in path.read_text()
    assert load_plan(path).digest == digest
    save_plan(StudyPlan.model_validate(PLAN), path)
    assert len(tomllib.loads(path.read_text())) > len(PLAN)
    assert load_plan(path).digest == digest
    assert len(digest) == 64


@settings(max_examples=30, deadline=None)
@given(
    epsilon=st.floats(1e-3, 100, allow_subnormal=False),
    purpose=st.text(st.characters(blacklist_categories=["Cs"]), min_size=10, max_size=40),
    panel=st.lists(st.text(min_size=1, max_size=8).filter(str.isprintable), min_size=2, max_size=5, unique=True),
)
def test_any_valid_plan_survives_the_file(
    epsilon: float, purpose: str, panel: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = changed(changed(PLAN, ("privacy", "epsilon"), epsilon), ("purpose",), purpose)
    numbers = [1.0 + i / 7 for i in range(len(panel))]
    values["genes"] |= {"panel": panel, "center": numbers, "scale": numbers}
    plan = StudyPlan.model_validate(values)
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    save_plan(plan, path)
    assert load_plan(path) == plan
    assert load_plan(path).digest == plan.digest


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [("epsilonn",), ("privacy", "epsilom"), ("gan", "max_grad_nrom"), ("sites", 0, "patients"), ("genes", "Clip")],
)
def test_an_unknown_key_is_refused_by_its_name(path: Path_, tmp_path: Path) -> None:
    assert ".".join(map(str, path)) in refused(changed(PLAN, path, 1), tmp_path)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    message = refused(changed(changed(PLAN, ("privacy", "epsilon"), -1.0), ("gan", "rounds"), -1), tmp_path)
    assert "privacy.epsilon" in message
    assert "gan.rounds" in message


@pytest.mark.parametrize(
    "path", [("privacy", "epsilon"), ("genes",), ("gan", "budget_share"), ("sites",), ("name",), ("genes", "center")]
)
def test_what_has_no_default_must_be_given(path: Path_, tmp_path: Path) -> None:
    values = copy.deepcopy(PLAN)
    place = values
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    assert ".".join(map(str, path)) in refused(values, tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("privacy", "epsilon"), "8"),
        (("privacy", "epsilon"), True),
        (("privacy", "delta"), "1e-5"),
        (("privacy", "reproducible_seed"), "1"),
        (("gan", "rounds"), "3"),
        (("gan", "rounds"), 3.0),
        (("gan", "rounds"), True),
        (("gan", "max_grad_norm"), "1.0"),
        (("autoencoder", "variational"), "yes"),
        (("autoencoder", "variational"), 1),
        (("autoencoder", "hidden"), ["128"]),
        (("genes", "center", 0), "4"),
        (("image", "size"), "32"),
        (("image", "sequences"), "T1c"),
        (("sites", 0, "nominal_patients"), "100"),
        (("schema_version",), "1"),
        (("name",), 5),
    ],
)
def test_a_value_of_another_type_is_not_converted(path: Path_, value: object, tmp_path: Path) -> None:
    assert ".".join(map(str, path)) in refused(changed(PLAN, path, value), tmp_path)


def test_a_whole_number_may_stand_where_a_real_one_is_meant(tmp_path: Path) -> None:
    plan = load_plan(write(changed(PLAN, ("gan", "max_grad_norm"), 1), tmp_path))
    assert plan == StudyPlan.model_validate(PLAN)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("privacy", "epsilon"), 0.0, "greater than 0"),
        (("privacy", "epsilon"), float("nan"), "greater than 0"),
        (("privacy", "delta"), 0.0, "greater than 0"),
        (("privacy", "delta"), 0.01, "less than 0.01"),
        (("privacy", "unit"), "slice", "patient"),
        (("gan", "max_grad_norm"), 0.0, "greater than 0"),
        (("gan", "budget_share"), 0.5, "add up to 1.100"),
        (("gan", "budget_share"), 1.5, "less than or equal to 1"),
        (("gan", "expected_batch"), 61, "nominal_patients of site 'south'"),
        (("gan", "warm_start"), WARM_START | {"generator_sha256": "A" * 64}, "warm_start"),
        (("image", "size"), 48, "64, 128 or 256"),
        (("image", "sequences"), [], "at least one sequence"),
        (("image", "sequences"), ["T1c", "T1c"], "each once"),
        (("genes", "panel"), ["EGFR", "EGFR", "TP53"], "twice"),
        (("genes", "panel"), ["EGFR", "TP53"], "one value for each gene"),
        (("genes", "scale"), [1.0, 2.0], "one value for each gene"),
        (("genes", "scale"), [1.0, 0.0, 1.0], "greater than 0"),
        (("genes", "reference_quantiles"), [0.0, 2.0, 1.0], "must not decrease"),
        (("genes", "min_coverage"), 1.1, "less than or equal to 1"),
        (("label", "classes"), ["low"], "at least 2"),
        (("label", "classes"), ["low", "low"], "twice"),
        (("morphology", "features"), ["volume", "colour"], "colour"),
        (("morphology", "features"), ["volume", "volume"], "repeated"),
        (("morphology", "features"), [], "unknown or repeated"),
        (("autoencoder", "hidden"), [], "at least 1"),
        (("radiogenomics", "hidden"), [], "at least 1"),
        (("radiogenomics", "dropout"), 1.0, "less than 1"),
        (("sites",), [], "at least 1"),
        (("sites", 1, "name"), "north", "used twice"),
        (("sites", 1, "name"), "South Clinic", "pattern"),
        (("sites", 1, "name"), "../south", "pattern"),
        (("aggregation", "min_sites"), 3, "larger than the number of sites"),
        (("schema_version",), 2, "schema_version"),
        (("privacy", "noise"), "distributed", "secure aggregation"),
        (("moments",), {"budget_share": 0.05, "public": PUBLIC}, "has to have 0 rounds"),
        (("autoencoder", "rounds"), 0, "nothing makes profiles"),
        (("gan", "rounds"), 0, "nothing makes images"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(path: Path_, value: object, told: str, tmp_path: Path) -> None:
    assert told in refused(changed(PLAN, path, value), tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"architecture": "vae", "augmentation": ["intensity"]}, "has none"),
        ({"architecture": "vae", "discriminator_steps": 2}, "leave it at 1"),
        ({"l1_weight": 1.0, "discriminator_steps": "adaptive"}, "leave it at 1"),
        ({"feature_matching_weight": 1.0, "discriminator_steps": 5}, "leave it at 1"),
        ({"loss": "wasserstein", "discriminator_steps": "adaptive"}, "no place where real ends"),
        ({"lipschitz": "gradient_penalty", "discriminator_norm": "batch"}, "each image's own slope"),
        ({"lipschitz": "weight_clip", "discriminator_trains": "head"}, "has to be 'all'"),
    ],
)
def test_options_of_images_that_contradict_one_another_are_refused(
    options: dict[str, object], told: str, tmp_path: Path
) -> None:
    plan = copy.deepcopy(PLAN)
    plan["gan"].update(options)
    assert told in refused(plan, tmp_path)


def test_a_delta_below_what_prv_can_tell_is_refused_with_it_alone(tmp_path: Path) -> None:
    tiny = changed(PLAN, ("privacy", "delta"), PRV_LEAST_DELTA / 2)
    assert load_plan(write(tiny, tmp_path)).privacy.accountant == "rdp"
    assert "use 'rdp'" in refused(changed(tiny, ("privacy", "accountant"), "prv"), tmp_path)
    least = changed(changed(PLAN, ("privacy", "delta"), PRV_LEAST_DELTA), ("privacy", "accountant"), "prv")
    assert load_plan(write(least, tmp_path)).privacy.delta == PRV_LEAST_DELTA


def test_a_file_that_is_absent_or_no_toml_is_refused(tmp_path: Path) -> None:
    for content, code in ((None, "plan_missing"), (b"a = [", "plan_not_toml"), (b"\xff\xfe", "plan_not_toml")):
        path = tmp_path / f"{code}.toml"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UsageError) as caught:
            load_plan(path)
        assert caught.value.code == code
    with pytest.raises(UsageError, match="plan_missing"):
        load_plan(tmp_path)


def test_a_plan_cannot_be_changed_after_it_was_read() -> None:
    plan = StudyPlan.model_validate(PLAN)
    with pytest.raises(ValueError, match="frozen"):
        plan.privacy.epsilon = 100.0


def test_a_statistic_is_one_release_of_every_patient() -> None:
    plan = StudyPlan.model_validate(STATISTICS)
    assert plan.modules == ("moments", "embedding", "gan")
    assert plan.profile_engine == "moments"
    for module in ("moments", "embedding"):
        training = plan.training(module)
        assert (training.rounds, training.steps_per_round, training.steps, training.max_grad_norm) == (1, 1, 1, 1.0)
        assert plan.sample_rate(module, "south") == 1.0


def test_modules_without_rounds_take_no_part_and_no_budget() -> None:
    plan = StudyPlan.model_validate(PLAN)
    assert plan.modules == ("autoencoder", "radiogenomics", "gan")
    public = StudyPlan.model_validate(changed(changed(PLAN, ("gan", "rounds"), 0), ("gan", "warm_start"), WARM_START))
    assert public.modules == ("autoencoder", "radiogenomics")
    assert StudyPlan.model_validate(changed(public.model_dump(mode="json"), ("gan", "budget_share"), 1.0)).modules
    with pytest.raises(ValueError, match="no section moments"):
        plan.training("moments")


def test_steps_and_rates_follow_from_the_plan() -> None:
    plan = StudyPlan.model_validate(PLAN)
    assert plan.training("gan").steps == 10
    assert plan.sample_rate("gan", "north") == 0.1
    assert plan.sample_rate("gan", "south") == 10 / 60
    with pytest.raises(UsageError, match="west"):
        plan.site("west")
