"""What a coordinator types before a study: a plan from declared sizes, and its forecast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedsynth.engines.embedding import public_template
from fedsynth.errors import UsageError
from fedsynth.models.images import make_discriminator, make_generator
from fedsynth.plan import EmbeddingPlan, PublicWeights, StudyPlan, load_plan, save_plan
from fedsynth.records import PUBLIC
from fedsynth_server.cli import study
from fedsynth_server.warm_start import public_starts, save_warm_start

UNKNOWN = PublicWeights(sha256="0" * 64, provenance="weights of a test")

PANEL = "gene\tcenter\tscale\n" + "".join(f"G{i}\t0.{i}\t1.{i}\n" for i in range(9))


def new(tmp_path: Path, *extra: str, panel: str = PANEL) -> Path:
    (tmp_path / "panel.tsv").write_text(panel)
    out = tmp_path / "plan.toml"
    arguments = ["new", str(out), "--panel", str(tmp_path / "panel.tsv"), "--name", "trial"]
    arguments += ["--purpose", "a trial of the software", *(extra or ("--site", "a=200", "--site", "b=400"))]
    result = CliRunner().invoke(study, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return out


def test_new_writes_a_plan_that_loads_and_holds_what_was_said(tmp_path: Path) -> None:
    plan = load_plan(new(tmp_path, "--site", "a=200", "--site", "b=400", "--epsilon", "3"))
    assert {site.name: site.nominal_patients for site in plan.sites} == {"a": 200, "b": 400}
    assert plan.privacy.epsilon == 3
    assert plan.genes.panel == [f"G{i}" for i in range(9)]
    assert plan.genes.scale[3] == 1.3


def test_new_never_writes_over_a_plan(tmp_path: Path) -> None:
    before = new(tmp_path).read_bytes()
    with pytest.raises(UsageError, match="already there"):
        new(tmp_path, "--site", "a=100")
    assert (tmp_path / "plan.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("site", "panel", "code"),
    [
        ("a", PANEL, "site_malformed"),
        ("a=-4", PANEL, "site_malformed"),
        ("Clinic A=40", PANEL, "site_malformed"),
        ("a=200", "gene\tcenter\nG0\t0\n", "panel_unreadable"),
        ("a=200", "gene\tcenter\tscale\nG0\t0\t\nG1\t0\t1\n", "panel_unreadable"),
        ("a=200", "gene\tcenter\tscale\nG0\t0\t1\nG0\t0\t1\n", "plan_invalid"),
        ("a=200", "gene\tcenter\tscale\nG0\t0\t-1\nG1\t0\t1\n", "plan_invalid"),
    ],
)
def test_new_says_what_is_wrong(tmp_path: Path, site: str, panel: str, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        new(tmp_path, "--site", site, panel=panel)
    assert caught.value.code == code
    assert not (tmp_path / "plan.toml").exists()


def check(*arguments: str) -> str:
    result = CliRunner().invoke(study, ["check", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_check_prints_cost_and_advice_before_anything_is_spent(tmp_path: Path) -> None:
    path = new(tmp_path, "--site", "tiny=30")
    shown = check(str(path))
    assert "all modules together epsilon" in shown and "added up" in shown
    assert "gan will drown in noise" in shown and "twice the epsilon" in shown
    assert "Recommended for profiles: networks (the plan follows it)" in shown
    found = json.loads(check(str(path), "--json"))["data"]
    assert found["digest"] == load_plan(path).digest
    assert found["epsilon"]["tiny"] == pytest.approx(10.0, abs=0.1) and found["epsilon"]["tiny"] <= 10.0
    assert {row["module"] for row in found["modules"]} == {"autoencoder", "radiogenomics", "gan"}
    assert [(each["part"], each["follows"]) for each in found["engines"]] == [("profiles", True), ("images", True)]
    assert {each["module"] for each in found["levers"]} >= {"gan"}
    assert found["budgets"][0]["epsilon_summed"] > found["budgets"][0]["epsilon"]


def test_check_warns_of_a_delta_near_one_over_the_cohort(tmp_path: Path) -> None:
    loose = new(tmp_path, "--site", "a=200", "--delta", "5e-3")
    assert "a delta near 1 / n" in check(str(loose))
    (tmp_path / "other").mkdir()
    assert "a delta near 1 / n" not in check(str(new(tmp_path / "other", "--site", "a=200")))


@pytest.fixture(scope="module")
def with_embedding(tiny_plan: StudyPlan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plan with an embedding, and the file of its public weights."""
    folder = tmp_path_factory.mktemp("weights")
    embedding = tiny_plan.model_copy(
        update={"embedding": EmbeddingPlan(budget_share=0.5, public=UNKNOWN, dimensions=20)}
    )
    state = public_template(embedding)
    state["variance"], state["expected"] = (torch.full_like(state["variance"], value) for value in (0.5, 0.1))
    weights = {
        "generator": make_generator(tiny_plan).state_dict(),
        "discriminator": make_discriminator(tiny_plan).state_dict(),
        PUBLIC["embedding"]: state,
    }
    save_warm_start(folder / "weights.safetensors", weights, {"data": "made for a test"})
    starts = public_starts(folder / "weights.safetensors", tiny_plan.genes)
    assert starts.embedding is not None
    named = tiny_plan.model_dump() | {
        "embedding": {"budget_share": 0.2, "public": starts.embedding.model_dump(), "dimensions": 20},
        "autoencoder": tiny_plan.autoencoder.model_dump() | {"budget_share": 0.1},
        "gan": tiny_plan.gan.model_dump() | {"budget_share": 0.3},
    }
    save_plan(StudyPlan.model_validate(named), folder / "plan.toml")
    return folder / "plan.toml", folder / "weights.safetensors"


def test_public_weights_sharpen_the_forecast(with_embedding: tuple[Path, Path]) -> None:
    plan, weights = map(str, with_embedding)
    plain, sharp = (json.loads(check(plan, "--json", *more))["data"] for more in ((), ("--weights", weights)))
    assert [each["sharp"] for each in plain["statistics"]] == [False]
    assert [each["sharp"] for each in sharp["statistics"]] == [True]
    assert "rise above the noise" in sharp["statistics"][0]["sentence"]
    # The file holds a generator, so that images need not come from a gan trained from scratch.
    assert plain["engines"][1]["recommended"] == "gan"
    assert sharp["engines"][1]["recommended"] in ("embedding", "public only")


def test_weights_of_another_plan_are_refused(with_embedding: tuple[Path, Path], tmp_path: Path) -> None:
    plan, weights = with_embedding
    text = plan.read_text()
    digest = load_plan(plan).embedding.public.sha256  # type: ignore[union-attr]
    (tmp_path / "plan.toml").write_text(text.replace(digest, "0" * 64))
    with pytest.raises(UsageError) as caught:
        check(str(tmp_path / "plan.toml"), "--weights", str(weights))
    assert caught.value.code == "warm_start_differs"
