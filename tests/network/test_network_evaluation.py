"""Sites of a deployment evaluate the finished generator on held-out patients; one that does not allow it delays nobody."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from federation import STUDY, Federation

from fedsynth.evaluation.site_values import FILE, SiteEvaluation
from fedsynth.plan import MODULES, SiteEvaluationPlan, StudyPlan
from fedsynth_client.policy import save_policy
from fedsynth_client.site import Site

pytestmark = pytest.mark.network


def test_a_deployed_study_ends_with_the_sites_scores(
    new_federation: Callable[..., Federation], network_plan: Callable[..., StudyPlan]
) -> None:
    plan = network_plan(
        {"autoencoder": 1, "radiogenomics": 1, "gan": 1}, aggregation={"min_sites": 3, "round_timeout_s": 120.0}
    ).model_copy(update={"site_evaluation": SiteEvaluationPlan(epsilon=5.0)})
    federation = new_federation(plan)
    for name in federation.sites:
        site = Site(federation.folder(name))
        manifest = json.loads((site.cohort_path / "manifest.json").read_text())
        for row in manifest["patients"][:15]:
            row["split"] = "holdout"
        (site.cohort_path / "manifest.json").write_text(json.dumps(manifest))
        if name != "c":
            allowed = {"modules": [*MODULES, "evaluation"], "max_holdout_epsilon": 5.0}
            save_policy(site.policy().model_copy(update=allowed), site.policy_path)
    federation.start_study()
    federation.wait_until(federation.is_open, 60, "a gateway that knows the sites")
    federation.start(*federation.sites)
    federation.wait_until(lambda: federation.started[STUDY].poll() is not None, 400, "the end of the study")
    assert federation.started[STUDY].poll() == 0

    told = federation.told("study", "status", federation.folder(STUDY))
    assert told["phase"] == "finished"
    found = SiteEvaluation.model_validate_json((federation.folder(STUDY) / FILE).read_text())
    assert [site.site for site in found.sites] == ["a", "b"] and found.missing == {"c": "module_not_allowed"}
    for name in ("a", "b"):
        (sent,) = [each for each in federation.sent(name) if each.module == "evaluation"]
        assert sent.bytes < 2000 and set(sent.records) == {"evaluation", "progress", "receipt"}
        spent = Site(federation.folder(name)).ledger().epsilon(plan.privacy.delta, population="holdout")
        assert 4.9 < spent <= 5.0
    assert [each.module for each in federation.sent("c")] == list(plan.modules)
    federation.close()
