"""The report: says what it was given, promises no more, stands alone, and survives hostile text."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedsynth.errors import UsageError
from fedsynth.evaluation.values import Evaluation, Figure, Section
from fedsynth.plan import (
    TRAINED,
    AutoencoderPlan,
    GanPlan,
    GenePlan,
    PrivacyPlan,
    RadiogenomicsPlan,
    SitePlan,
    StudyPlan,
)
from fedsynth.statement import Mechanism, PrivacyStatement, SiteStatement
from fedsynth_server.outcome import ModuleOutcome, Outcome
from fedsynth_server.release.report import MODULE_TITLES, write_report

RELEASED = datetime(2026, 11, 20, 14, 30, tzinfo=UTC)
SITES = {"academic-north": 300, "regional-east": 180, "childrens-west": 120}
EPSILONS = {"academic-north": 6.8132, "regional-east": 7.4418, "childrens-west": 7.9612}

Curves = dict[str, list[dict[str, float | int | str]]]


def plan(**changes: Any) -> StudyPlan:
    genes = ["EGFR", "TP53", "IDH1", "PTEN", "ATRX", "VEGFA"]
    values: dict[str, Any] = {
        "name": "glioma-three-sites",
        "purpose": "Share a synthetic radiogenomic cohort of glioma patients for teaching and for testing pipelines.",
        "genes": GenePlan(
            panel=genes, reference_quantiles=[0.0, 2.0, 9.0], center=[3.0] * len(genes), scale=[1.5] * len(genes)
        ),
        "privacy": PrivacyPlan(epsilon=8.0, delta=1e-4),
        "autoencoder": AutoencoderPlan(
            rounds=10, steps_per_round=20, expected_batch=60, max_grad_norm=0.05, learning_rate=3e-3, budget_share=0.35
        ),
        "radiogenomics": RadiogenomicsPlan(
            rounds=8, steps_per_round=20, expected_batch=60, max_grad_norm=0.5, learning_rate=1e-3, budget_share=0.25
        ),
        "gan": GanPlan(
            rounds=20, steps_per_round=20, expected_batch=40, max_grad_norm=1.0, learning_rate=2e-4, budget_share=0.4
        ),
        "sites": [SitePlan(name=name, nominal_patients=patients) for name, patients in SITES.items()],
    }
    return StudyPlan(**(values | changes))


def statement(of: StudyPlan, **changes: Any) -> PrivacyStatement:
    sites = [
        SiteStatement(
            name=site.name,
            nominal_patients=site.nominal_patients,
            epsilon=EPSILONS[site.name],
            epsilon_lifetime=EPSILONS[site.name] + (1.25 if site.name == "regional-east" else 0.0),
            ledger_head=f"{place + 10:x}" * 64,
            mechanisms=[
                Mechanism(
                    module=module,
                    sample_rate=of.sample_rate(module, site.name),
                    noise_multiplier=2.317 + place,
                    max_grad_norm=of.training(module).max_grad_norm,
                    steps=of.training(module).steps - (40 if (place, module) == (2, "gan") else 0),
                    steps_planned=of.training(module).steps,
                    epsilon_alone=3.1371 + place / 10,
                )
                for module in of.modules
            ],
        )
        for place, site in enumerate(of.sites)
    ]
    values: dict[str, Any] = {
        "study": of.name,
        "plan_digest": of.digest,
        "private": True,
        "epsilon_budget": of.privacy.epsilon,
        "delta": of.privacy.delta,
        "accountant": "RDP",
        "accountant_version": "opacus 1.6.0",
        "noise_source": "ChaCha20-seeded generator, seed from the operating system, never stored",
        "sites": sites,
        "trust_model": "Each hospital adds its own noise before anything leaves; coordinator and recipients see noised "
        "updates only. The hospital's own machine is trusted.",
        "composition": "Releases of the same patients add up; the lifetime epsilon of each ledger counts all of them.",
        "not_covered": [
            "that a hospital takes part, and the rounded size of its cohort",
            "the choice of panel and hyper-parameters, made on public data",
            "rounding of floating-point noise",
        ],
        "intended_use": "Teaching, software tests, rehearsal of analyses.",
        "forbidden_use": "Diagnosis, treatment decisions, attempts to find out who took part.",
    }
    return PrivacyStatement(**(values | changes))


def evaluation(**changes: Any) -> Evaluation:
    sections = [
        Section(
            id="fidelity",
            title="Fidelity: do the images look like the originals?",
            explanation="Distances between feature distributions; the extractor was trained on public simulated images.",
            figures=[
                Figure(
                    metric="FID, public extractor",
                    better="lower",
                    synthetic=38.24,
                    interval=(34.9, 41.8),
                    real=6.02,
                    floor=91.7,
                    public_only=55.1,
                    note="Floor: the mean image with noise.",
                ),
                Figure(
                    metric="KID × 1000", better="lower", synthetic=21.3, real=0.4, floor=88.0, note="Floor: the same."
                ),
                Figure(metric="Recall", better="higher", synthetic=0.013, real=0.83, floor=0.0, public_only=0.12),
                Figure(
                    metric="SSIM diversity",
                    better="higher",
                    synthetic=None,
                    note="needs at least 50 synthetic patients, 40 were drawn",
                ),
            ],
        ),
        Section(
            id="utility",
            title="Utility: does a model trained on them work on real patients?",
            explanation="Train on synthetic, test on real held-out patients.",
            figures=[
                Figure(
                    metric="AUC, high against low grade",
                    better="higher",
                    synthetic=0.7312,
                    interval=(0.652, 0.804),
                    real=0.8714,
                    floor=0.5,
                    public_only=0.4437,
                    note="Floor: always the commoner class.",
                ),
                Figure(
                    metric="Dice, tumour", better="higher", synthetic=0.31, interval=(0.12, 0.46), real=0.78, floor=0.14
                ),
            ],
        ),
        Section(
            id="radiogenomics",
            title="Radiogenomics: do genes and tumours belong together?",
            explanation="Error of the radiogenomic DNN on held-out patients against ordinary linear regression.",
            figures=[
                Figure(metric="MAE, volume (mL)", better="lower", synthetic=18.4, real=14.9, floor=26.1),
                Figure(metric="MAPE, sphericity (%)", better="lower", synthetic=9.1, real=9.4, floor=9.3),
            ],
        ),
        Section(
            id="genes",
            title="Genes: does the expression table behave like the original?",
            explanation="Marginal distributions and correlations gene by gene.",
            figures=[
                Figure(metric="Correlation error", better="lower", synthetic=0.56, real=0.14, floor=0.61),
                Figure(metric="Wasserstein distance", better="lower", synthetic=0.000031, real=None, floor=0.0004),
            ],
        ),
    ]
    values: dict[str, Any] = {
        "subject": "0" * 64,
        "data": "simulated patients drawn from the MNI152 atlas; none is a person",
        "n_train": 480,
        "n_holdout": 120,
        "n_synthetic": 200,
        "sections": sections,
    }
    return Evaluation(**(values | changes))


def curves(of: StudyPlan) -> Curves:
    found: Curves = {}
    for module in of.modules:
        rows: list[dict[str, float | int | str]] = []
        if module not in TRAINED:
            found[module] = [{"round": 1, "site": site.name} for site in of.sites]
            continue
        for at in range(1, of.training(module).rounds + 1):
            for place, site in enumerate(of.sites):
                wave = ((at * 37 + place * 53) % 17) / 60
                row: dict[str, float | int | str] = {"round": at, "site": site.name}
                row["update_norm"] = 2.4 / at**0.4 + 0.3 * place + wave
                if module == "gan":
                    row["generator_loss"] = 0.2 + 0.9 * (1 - 0.9**at) + wave / 2
                rows.append(row)
        found[module] = rows
    return found


STATISTIC = {"budget_share": 0.3, "public": {"sha256": "ab" * 32, "provenance": "simulated patients"}}
WARM = {"generator_sha256": "ab" * 32, "discriminator_sha256": "cd" * 32, "provenance": "simulated patients"}


def plan_with(*, moments: bool, embedding: bool, gan: bool, warm: bool = True) -> StudyPlan:
    """A plan with other engines than the networks and the GAN alone."""
    values = plan().model_dump()
    for module, stays in (("autoencoder", not moments), ("radiogenomics", not moments), ("gan", gan)):
        values[module] = values[module] | {"budget_share": 0.15} | ({} if stays else {"rounds": 0})
    values["gan"]["warm_start"] = WARM if warm else None
    values["moments"] = STATISTIC if moments else None
    values["embedding"] = STATISTIC if embedding else None
    return StudyPlan.model_validate(values)


def outcome(of: StudyPlan) -> Outcome:
    words = {
        "moments": ("learns", 0.38, 0.31, 0.91, "learnt", True, "96% of the noisy link was kept."),
        "autoencoder": ("drowns", 4.2, None, 0.0, "drowned", True, "A round moved the weights 1.02 times as far."),
        "radiogenomics": ("partly", 1.3, 0.7, 0.67, "learnt", False, "A round moved the weights 3.10 times as far."),
        "embedding": ("learns", 0.12, 0.4, 0.62, "partly", False, "Of the squared distance, 14% was noise."),
        "gan": ("drowns", 7.0, None, None, "open", None, "What the discriminators learnt stays at the sites."),
    }
    modules = []
    for module in of.modules:
        forecast, foretold, ratio, learnt, verdict, as_forecast, sentence = words[module]
        modules.append(
            ModuleOutcome(
                module=module,
                forecast_noise_to_signal=foretold,
                forecast=forecast,
                noise_to_signal=ratio,
                learnt=learnt,
                verdict=verdict,
                as_forecast=as_forecast,
                sentence=sentence,
            )
        )
    return Outcome(plan_digest=of.digest, modules=modules)


def png(width: int = 80, height: int = 40) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (width, height), 90).save(stream, format="PNG")
    return stream.getvalue()


def report(path: Path, **changes: Any) -> str:
    the_plan = changes.get("plan", plan())
    values: dict[str, Any] = {
        "plan": the_plan,
        "statement": statement(the_plan),
        "evaluation": evaluation(),
        "curves": curves(the_plan),
        "preview_png": png(),
        "released": RELEASED,
        "n_patients": 200,
    }
    write_report(path, **(values | changes))
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Well-formedness (every element closed in order, identifiers unique), text by page, addresses by attribute."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input", "source"})
    ADDRESSES = frozenset({"src", "href", "action", "srcset", "data", "poster", "xlink:href", "formaction"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} is given twice"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def identifiers(self) -> list[str]:
        return [name for _, attributes in self.elements if (name := attributes.get("id"))]


def test_page_is_well_formed_with_unique_identifiers_and_every_reference_resolves(tmp_path: Path) -> None:
    page = Page(report(tmp_path / "report.html", comparison_png=png()))
    assert len(page.identifiers) == len(set(page.identifiers))
    for _, attributes in page.elements:
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in page.identifiers
        if (attributes.get("href") or "").startswith("#"):
            assert (attributes["href"] or "")[1:] in page.identifiers


def test_page_loads_and_runs_nothing(tmp_path: Path) -> None:
    source = report(tmp_path / "report.html", comparison_png=png())
    page = Page(source)
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in Page.ADDRESSES and value
    ]
    assert addresses
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "url(" not in source and "@import" not in source and "@font-face" not in source
    assert "http" not in source.replace("http-equiv", "")
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and "default-src 'none'" in policy


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    the_plan = plan(purpose=attack)
    figure = Figure(metric=attack, better="lower", synthetic=0.3, real=0.1, floor=0.9, note=attack)
    section = Section(id="genes", title=attack, explanation=attack, figures=[figure])
    page = Page(
        report(
            tmp_path / "report.html",
            plan=the_plan,
            statement=statement(the_plan, not_covered=[attack], trust_model=attack),
            evaluation=evaluation(data=attack, sections=[section]),
            curves={attack: [{"round": 1, "site": attack, attack: 0.5, "state": attack}]},
        )
    )
    assert "script" not in {tag for tag, _ in page.elements}
    assert not [a for tag, a in page.elements if tag == "img" and not (a["src"] or "").startswith("data:")]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 6


def test_epsilons_stand_beside_unit_and_budget_and_are_never_rounded_down(tmp_path: Path) -> None:
    page = Page(report(tmp_path / "report.html"))
    for site, exact in EPSILONS.items():
        assert site in page.text
        assert any(tag == "data" and attributes["value"] == str(exact) for tag, attributes in page.elements)
    printed = [float(value) for value in re.findall(r"ε (\d+\.\d\d) of 8\.00", page.text)]
    assert printed == [6.82, 7.45, 7.97]
    assert all(shown >= exact for shown, exact in zip(printed, EPSILONS.values(), strict=True))
    assert "8.70" in page.text, "the lifetime epsilon of the site with an earlier study"
    assert "the patient: all slices, genes and labels of one patient together" in page.text
    assert "360 / 400" in page.text, "steps charged and planned"
    assert "δ = 1 × 10⁻⁴" in page.text or "δ = 0.0001" in page.text


def test_no_guarantee_is_said_first_when_the_noise_was_seeded(tmp_path: Path) -> None:
    the_plan = plan(privacy=PrivacyPlan(epsilon=8.0, reproducible_seed=7))
    seeded = statement(the_plan, private=False, noise_source="seeded, reproducible generator")
    page = Page(report(tmp_path / "report.html", plan=the_plan, statement=seeded))
    alarm = "these numbers are not a privacy guarantee"
    assert alarm in page.text
    assert page.text.index(alarm) < page.text.index("Synthetic data")
    assert "no guarantee (seeded noise)" in page.text


def test_private_release_carries_no_alarm(tmp_path: Path) -> None:
    source = report(tmp_path / "report.html")
    assert "not a privacy guarantee" not in source
    assert 'role="alert"' not in source


def test_being_synthetic_is_never_called_anonymous(tmp_path: Path) -> None:
    page = Page(report(tmp_path / "report.html"))
    assert "This is not anonymity by itself" in page.text
    assert "NIST SP 800-226" in page.text and "EDPB Opinion 28/2024" in page.text


def test_budget_overrun_and_large_delta_are_called_by_name(tmp_path: Path) -> None:
    the_plan = plan(privacy=PrivacyPlan(epsilon=7.5, delta=6e-4))
    page = Page(report(tmp_path / "report.html", plan=the_plan))
    assert page.text.count("over budget") == 1  # childrens-west alone: 7.96 of 7.50.
    assert page.text.count("no protection at all") == 2  # 300 and 180 patients times 6e-4 are above 0.1; 120 are not.


def test_figure_that_was_not_measured_says_why(tmp_path: Path) -> None:
    page = Page(report(tmp_path / "report.html"))
    assert "not measured: needs at least 50 synthetic patients, 40 were drawn" in page.text
    assert not re.search(r"\bNone\b|\bnan\b", page.text)


def test_quality_is_read_against_floor_ceiling_and_public_only(tmp_path: Path) -> None:
    page = Page(report(tmp_path / "report.html"))
    assert "Between floor and ceiling: 62 % of the way." in page.text  # FID: (91.7 - 38.24) / (91.7 - 6.02)
    assert "No better than the public-only generator: private training added nothing here." in page.text
    assert "27 % of the way, but its interval reaches the floor: chance is not ruled out." in page.text
    assert "Real data are no better than the floor here" in page.text
    assert "Cannot be placed: no ceiling." in page.text
    assert "38.2 (34.9 to 41.8)" in page.text
    # Placed: all but the unmeasured one, the one without a ceiling, and the one whose ceiling is below its floor.
    assert "Of 7 measures that have a floor and a ceiling, 4 lie at least half-way" in page.text
    assert "surely better than what public weights give without any private patient" in page.text  # on the first page


def test_release_without_evaluation_or_curves_says_so(tmp_path: Path) -> None:
    page = Page(report(tmp_path / "report.html", evaluation=None, curves={}))
    assert "The quality of this release was not measured." in page.text
    assert "No training curve was recorded." in page.text


def test_curves_are_drawn_for_every_module_and_site(tmp_path: Path) -> None:
    page = Page(report(tmp_path / "report.html"))
    charts = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("class") == "chart"]
    assert len(charts) == 4  # update norm of three modules, loss on generated images of the GAN
    lines = [a for tag, a in page.elements if tag == "polyline"]
    assert len(lines) == 4 * len(SITES)
    for title in ("Gene autoencoder", "Radiogenomic DNN", "Conditional GAN"):
        assert title in page.text
    assert "childrens-west: from" in page.text, "what the chart shows, for those who cannot see it"


def test_provenance_names_plan_sites_time_and_how_to_check(tmp_path: Path) -> None:
    the_plan = plan()
    elsewhere = RELEASED.astimezone(timezone(timedelta(hours=9)))
    page = Page(report(tmp_path / "report.html", plan=the_plan, released=elsewhere))
    assert the_plan.digest in page.text
    assert "2026-11-20 14:30 UTC" in page.text
    assert "300 patients (declared by the site and rounded, not a count)" in page.text
    assert "sha256sum --check" in page.text and "openssl pkeyutl -verify" in page.text


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    assert report(tmp_path / "a.html") == report(tmp_path / "b.html")


def test_statement_of_another_plan_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="report_plan_mismatch"):
        report(tmp_path / "report.html", statement=statement(plan(name="another-study")))
    assert list(tmp_path.iterdir()) == []


def test_picture_that_is_no_png_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="report_not_png"):
        report(tmp_path / "report.html", preview_png=b"<svg onload=alert(1)>")


def test_time_without_zone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="time zone"):
        report(tmp_path / "report.html", released=datetime(2026, 1, 1))


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("images", ["embedding", "gan", "both", "public"])
def test_every_choice_of_engines_has_a_report(tmp_path: Path, moments: bool, images: str) -> None:
    the_plan = plan_with(moments=moments, embedding=images in ("embedding", "both"), gan=images in ("gan", "both"))
    page = Page(report(tmp_path / "report.html", plan=the_plan, outcome=outcome(the_plan)))
    for module in the_plan.modules:
        assert MODULE_TITLES[module] in page.text
    assert len(page.identifiers) == len(set(page.identifiers))
    once = [
        title for module, title in MODULE_TITLES.items() if module in ("moments", "embedding") and title in page.text
    ]
    assert ("Released once:" in page.text) == bool(once)
    assert ("the site sent the sum of all rows with Gaussian noise" in page.text) == bool(once)
    assert ("linear-Gaussian model" in page.text) == moments
    assert ("a gene autoencoder, and a deep" in page.text) == (not moments)
    assert ("fitted to one noisy mean embedding" in page.text) == (images in ("embedding", "both"))
    assert ("refined in 20 rounds" in page.text) == (images == "both")
    assert ("trained in 20 rounds" in page.text) == (images == "gan")
    assert ("no private image took part" in page.text) == (images == "public")
    # Statistics have no curve, and an empty panel must not stand in for one.
    drawn = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("class") == "chart"]
    trained = [module for module in the_plan.modules if module in TRAINED]
    assert len(drawn) == len(trained) + ("gan" in trained)


def test_forecast_and_outcome_stand_side_by_side(tmp_path: Path) -> None:
    the_plan = plan_with(moments=True, embedding=True, gan=True)
    page = Page(report(tmp_path / "report.html", plan=the_plan, outcome=outcome(the_plan)))
    assert "What the noise left to learn" in page.text
    assert "0.38: will learn 0.31 learnt as foretold 96% of the noisy link was kept." in page.text
    assert "0.12: will learn 0.4 partly learnt not as foretold" in page.text
    assert "7: will drown in noise – cannot be told What the discriminators" in page.text


def test_a_release_without_a_comparison_says_so(tmp_path: Path) -> None:
    assert "Forecast and outcome were not compared" in Page(report(tmp_path / "report.html")).text


def test_the_outcome_of_another_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="report_plan_mismatch"):
        report(tmp_path / "report.html", outcome=outcome(plan(name="another-study")))


def test_a_hostile_sentence_of_an_outcome_stays_text(tmp_path: Path) -> None:
    the_plan = plan()
    attack = "<script>alert(1)</script>"
    found = outcome(the_plan)
    hostile = found.model_copy(update={"modules": [found.modules[0].model_copy(update={"sentence": attack})]})
    page = Page(report(tmp_path / "report.html", plan=the_plan, outcome=hostile))
    assert attack in page.text and "script" not in {tag for tag, _ in page.elements}
