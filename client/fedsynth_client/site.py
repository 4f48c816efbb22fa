"""A site's folder: where everything of one hospital lies, and nothing of another.

Layout::

    policy.toml      what the hospital allows
    sources.toml     where its files are (may lie elsewhere)
    plans/           plans that were approved here, one file a digest; plans/offered/: those that were only looked at
    cohort/          the prepared cohort
    ledger.sqlite    the privacy ledger
    training.lock    held by the one process that works on a task
    state/           local models (discriminator, optimiser moments); they never leave
    outbox/          stored replies, kept so that a lost one can be sent again
    site.log         what happened, with causes; stays at home
    node.toml        where the coordinator is and which keys the node uses (`fedsynth_client.node.settings`)
    keys/            node key, certificates, the secret between node and runner
    run/, logs/      what the node's processes leave of themselves
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedsynth.errors import Refused, UsageError
from fedsynth.files import read_json
from fedsynth.plan import StudyPlan, load_plan, save_plan
from fedsynth_client.ledger import Ledger
from fedsynth_client.policy import SitePolicy, load_policy, save_policy


@dataclass(frozen=True)
class Site:
    """The site whose folder is `folder`."""

    folder: Path

    @property
    def policy_path(self) -> Path:
        """Where the policy lies."""
        return self.folder / "policy.toml"

    @property
    def cohort_path(self) -> Path:
        """Where the prepared cohort lies."""
        return self.folder / "cohort"

    @property
    def ledger_path(self) -> Path:
        """Where the ledger lies."""
        return self.folder / "ledger.sqlite"

    def policy(self) -> SitePolicy:
        """The policy, read anew: a change takes effect at once."""
        return load_policy(self.policy_path)

    def plan(self, digest: str) -> StudyPlan:
        """The approved plan of that digest.

        Raises:
            Refused: ``plan_not_approved``: the site holds no such plan. ``plan_altered``: the file is not that plan.
        """
        path = self.folder / "plans" / f"{digest}.toml"
        if not path.is_file():
            raise Refused("plan_not_approved", f"This site holds no approved plan of digest {digest}.")
        plan = load_plan(path)
        if plan.digest != digest:
            raise Refused("plan_altered", f"{path} was changed after it was approved.", "Approve the plan anew.")
        return plan

    def approve(self, plan: StudyPlan) -> None:
        """Store `plan` and add its digest to the policy's approved plans."""
        (self.folder / "plans").mkdir(parents=True, exist_ok=True)
        save_plan(plan, self.folder / "plans" / f"{plan.digest}.toml")
        policy = self.policy()
        if plan.digest not in policy.approved_plans:
            approved = [*policy.approved_plans, plan.digest]
            save_policy(policy.model_copy(update={"approved_plans": approved}), self.policy_path)

    def offer(self, plan: StudyPlan) -> Path:
        """Keep a copy of a plan that was looked at, so that it can be approved by its digest; returns the copy's path."""
        path = self._offered(plan.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_plan(plan, path)
        return path

    def offered(self, digest: str) -> StudyPlan:
        """The plan of that digest which was looked at, or approved, here.

        Raises:
            UsageError: ``plan_not_offered``.
            Refused: ``plan_altered``.
        """
        if (self.folder / "plans" / f"{digest}.toml").is_file():
            return self.plan(digest)
        if not self._offered(digest).is_file():
            raise UsageError(
                "plan_not_offered",
                f"This site has seen no plan of digest {digest}.",
                "Look at the plan's file first: fedsynth site plan show FOLDER FILE.",
            )
        plan = load_plan(self._offered(digest))
        if plan.digest != digest:
            raise Refused("plan_altered", f"{self._offered(digest)} was changed.", "Look at the plan's file again.")
        return plan

    def _offered(self, digest: str) -> Path:
        return self.folder / "plans" / "offered" / f"{digest}.toml"

    def ledger(self) -> Ledger:
        """The ledger."""
        return Ledger(self.ledger_path)

    def cohort_version(self) -> int:
        """Modification time (ns) of the prepared cohort's manifest.

        Raises:
            UsageError: ``cohort_missing``.
        """
        try:
            return (self.cohort_path / "manifest.json").stat().st_mtime_ns
        except FileNotFoundError:
            raise UsageError(
                "cohort_missing", f"{self.folder} holds no prepared cohort.", "Run `fedsynth site prepare`."
            ) from None

    def check_cohort(self, plan: StudyPlan) -> None:
        """Refuse a cohort that was prepared on another grid, panel or label than `plan`'s, or with other references.

        Raises:
            UsageError: ``cohort_missing``.
            Refused: ``cohort_of_other_settings``.
        """
        self.cohort_version()
        manifest = read_json(self.cohort_path / "manifest.json")
        sections = {"image": plan.image, "genes": plan.genes, "label": plan.label}
        differ = [name for name, asked in sections.items() if manifest.get(name) != asked.model_dump(mode="json")]
        if differ:
            raise Refused(
                "cohort_of_other_settings",
                f"The cohort was prepared with other settings than this plan's ({', '.join(differ)}).",
                "Prepare a cohort for this plan with `fedsynth site prepare`.",
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process or thread works on a task of this site, and keep others waiting.

        Two that ran the same task at once would make two noisy results under one charge. The operating system lifts the
        lock when its holder dies.
        """
        with (self.folder / "training.lock").open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @cached_property
    def log(self) -> logging.Logger:
        """The site's own log; it stays in the folder and is not passed on to any other logger."""
        logger = logging.getLogger(f"fedsynth_client.site.{self.folder.resolve()}")
        if not logger.handlers:
            handler = logging.FileHandler(self.folder / "site.log", encoding="utf-8")
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False
        return logger
