"""One task at the site, from the question to the answer: policy, charge, training, storage, reply."""

from __future__ import annotations

import hashlib
import math
import re
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedsynth.budget import charge
from fedsynth.domains import source_and_target
from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness, SeededRandomness, SystemRandomness
from fedsynth.engines import embedding, moments
from fedsynth.errors import JobFailed, Refused
from fedsynth.evaluation.site_scores import evaluators, evaluators_template
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.images import make_companion, make_generator
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.plan import Activity, Module, SiteEvaluationPlan, StatisticPlan, StudyPlan
from fedsynth.profiles import profile_model, profile_template
from fedsynth.records import (
    EVALUATORS,
    PUBLIC,
    WEIGHTS,
    State,
    check_reply,
    check_state,
    check_task,
    from_record,
    norm_limit,
    progress_of,
    progress_record,
    state_digest,
    task_weights,
    to_record,
)
from fedsynth.translation import translator_template
from fedsynth_client.cohort import Cohort, load_cohort, read_entries, split_digest
from fedsynth_client.ledger import Ledger, Limit, Standing, Task
from fedsynth_client.outbox import Outbox, check_ledger_is_whole
from fedsynth_client.policy import (
    SitePolicy,
    check_evaluation,
    check_module,
    check_patients,
    check_plan,
    lifetime_epsilon,
)
from fedsynth_client.site import Site
from fedsynth_client.training.adversarial import ImagePatients, train_gan
from fedsynth_client.training.block import BlockResult, public_generator
from fedsynth_client.training.evaluation import evaluate_holdout
from fedsynth_client.training.profiles import train_autoencoder, train_radiogenomics
from fedsynth_client.training.statistic import release_statistic
from fedsynth_client.training.translation import train_translation

_POOL = 1024  # synthetic conditions drawn for one block of the generator


def answer(site: Site, module: Activity, content: RecordDict, recipient: str) -> RecordDict:
    """Do what a message asks, if the policy and the ledger allow it, and return the reply's content.

    Args:
        site: the site.
        module: the module that the message type names, or the evaluation.
        content: the message's content (`fedsynth.records`).
        recipient: to whom the reply goes, for the log of what was sent.

    Raises:
        FedsynthError: a refusal or failure; its code may leave the site, its text may not.
    """
    policy = site.policy()
    task, head = _task(content, module, policy.site)
    plan = site.plan(task.study)
    check_plan(policy, plan)
    if not 1 <= task.round <= plan.rounds(module):
        raise Refused("round_not_in_plan", f"The plan has no round {task.round} of {module}.")
    check_module(policy, module)
    if module == "evaluation":
        check_evaluation(policy, plan)
    check_task(content, ("task", *task_weights(plan, module)))
    with site.alone():
        ledger, outbox = site.ledger(), Outbox(site.folder)
        _check_not_set_back(ledger, head)
        if ledger.reply_digest(task) is None:
            _run(site, policy, plan, task, content, ledger, outbox)
        return _reply(policy, plan, task, ledger, outbox, recipient)


def _run(
    site: Site, policy: SitePolicy, plan: StudyPlan, task: Task, content: RecordDict, ledger: Ledger, outbox: Outbox
) -> None:
    last = ledger.last_released_round(task.study, task.module)
    if task.round < last:
        raise Refused("round_passed", f"This site already released round {last} of {task.module}.")
    # Everything that can be wrong with the message or the cohort is found before anything is spent.
    site.check_cohort(plan)
    cohort, split = _patients(site, plan, task.module)
    if task.module == "evaluation":
        ledger.check_not_moved(task.study, split)
    else:
        check_patients(policy, task.module, len(cohort))
    check_ledger_is_whole(ledger, outbox)
    incoming = _incoming(plan, task, content)
    local: State = {}
    if task.module in ("gan", "translation"):
        local = outbox.local_state(Task(task.study, task.module, last))
        if not local and last:
            site.log.warning(
                "%s round %d: the local state of round %d is gone; starting anew", task.module, task.round, last
            )
    if task.module == "gan" and not local:
        local = _discriminator_start(plan, content)

    cost = charge(plan, policy.site, task.module)
    block = cost.mechanism
    randomness = _randomness(plan, task)
    # A mechanism without noise is not private however its noise would be drawn.
    private = randomness.private and block.noise_multiplier > 0
    standing = ledger.charge(
        task,
        block,
        max_grad_norm=cost.max_grad_norm,
        private=private,
        study_limit=Limit(cost.study_epsilon, plan.privacy.delta),
        lifetime_limit=Limit(lifetime_epsilon(policy, plan, cost.population), policy.max_delta),
        accountant=plan.privacy.accountant,
        population=cost.population,
        split=split,
    )
    if standing is Standing.WITHHELD:
        raise JobFailed(
            "result_withheld",
            f"The result of {task.module} round {task.round} could not be released, and the round cannot run again.",
            "Its charge stands; the study must go on without it.",
        )
    site.log.info(
        "%s round %d: %s charge, %d steps%s",
        task.module,
        task.round,
        standing.value,
        block.steps,
        "" if private else ", NOT PRIVATE",
    )
    try:
        first_step = (task.round - 1) * block.steps
        result = _train(plan, task.module, incoming, local, cohort, first_step, block, randomness)
        check_state(result.weights, WEIGHTS[task.module], norm_limit(task.module))
    except Exception as error:
        # That training failed is told, and may depend on who was drawn: to run it again under the same charge would
        # answer the same question twice.
        ledger.withheld(task, error.code if isinstance(error, JobFailed) else "training_failed")
        raise
    ledger.released(task, outbox.store(task, result))
    outbox.prune(task)


def _train(
    plan: StudyPlan,
    module: Activity,
    incoming: dict[str, State],
    local: State,
    cohort: Cohort,
    first_step: int,
    block: Mechanism,
    randomness: Randomness,
) -> BlockResult:
    if module == "evaluation":
        return evaluate_holdout(evaluators(plan, incoming), cohort, block, SiteEvaluationPlan.max_grad_norm, randomness)
    genes = torch.from_numpy(cohort.genes)
    morphology, labels = torch.from_numpy(cohort.morphology), torch.from_numpy(cohort.labels)
    if module == "moments" or module == "embedding":
        section = plan.training(module)
        rows = _rows(plan, module, incoming[PUBLIC[module]], cohort)
        return release_statistic(rows, block, section.max_grad_norm, randomness)
    if module == "autoencoder":
        return train_autoencoder(plan, incoming["autoencoder"], genes, block, randomness, first_step=first_step)
    if module == "radiogenomics":
        start = incoming["radiogenomics"]
        return train_radiogenomics(plan, start, genes, morphology, labels, block, randomness, first_step=first_step)
    if module == "translation":
        domains = source_and_target(plan, image_slices(cohort))
        start = incoming[WEIGHTS[module]]
        return train_translation(plan, start, local, domains, block, randomness, first_step)
    profiles = profile_model(plan, incoming).draw(_POOL, public_generator(randomness))
    patients = ImagePatients(image_slices(cohort), morphology, labels)
    start = incoming["generator"]
    return train_gan(plan, start, local, profiles, patients, block, randomness, first_step)


def _rows(plan: StudyPlan, module: Module, public: State, cohort: Cohort) -> torch.Tensor:
    """(N, D) rows of a statistic, one a patient."""
    morphology, labels = torch.from_numpy(cohort.morphology), torch.from_numpy(cohort.labels)
    if module == "moments":
        return moments.rows(plan, public, torch.from_numpy(cohort.genes), morphology, labels)
    return embedding.rows(plan, public, image_slices(cohort), morphology, labels)


def image_slices(cohort: Cohort) -> torch.Tensor:
    """(N, C + 1, S, H, W) float16 in [-1, 1]: image channels and whole-tumour mask channel."""
    images = torch.from_numpy(cohort.images) * 2 - 1
    mask = torch.from_numpy(cohort.masks > 0).to(torch.float16)[:, None] * 2 - 1
    return torch.cat([images, mask], dim=1)


def _patients(site: Site, plan: StudyPlan, activity: Activity) -> tuple[Cohort, str]:
    """Whose data `activity` uses, and the digest of the split that made them training or held-out patients.

    All held-out patients take part in an evaluation; of training patients those who have what a module needs.
    """
    features = tuple(plan.morphology.features)
    version = site.cohort_version()
    if activity == "evaluation":  # once a study: not worth keeping in memory
        split = split_digest(read_entries(site.cohort_path))
        held_out = load_cohort(site.cohort_path, list(features), only="holdout")
        if site.cohort_version() != version:
            raise JobFailed("cohort_changed", "The cohort was prepared anew while it was read.", "Ask again.")
        return held_out, split
    cohort, split = _training_split(site.cohort_path, version, features)
    return cohort.rows(cohort.usable_for(activity)), split


@lru_cache(maxsize=4)
def _training_split(folder: Path, version: int, features: tuple[str, ...]) -> tuple[Cohort, str]:
    """The training split in memory: a node serves many rounds from one reading (`version` changes with the files)."""
    whole = load_cohort(folder, list(features))
    return whole.split("train"), split_digest(whole.entries)


def _task(content: RecordDict, module: Activity, site: str) -> tuple[Task, str]:
    """The task, and the head of this site's ledger that the coordinator has a receipt of."""
    record = content.config_records.get("task")
    if record is None or set(record) != {"study", "module", "round", "site", "head"}:
        raise JobFailed("task_malformed", "The message carries no task, or one with unknown keys.")
    study, named, number, whose, head = (record[key] for key in ("study", "module", "round", "site", "head"))
    # Not any text: the digest becomes part of a file's name.
    if not isinstance(study, str) or not re.fullmatch(r"[0-9a-f]{64}", study):
        raise JobFailed("task_malformed", "The message's task names no plan digest.")
    if named != module or not isinstance(number, int) or isinstance(number, bool):
        raise JobFailed("task_malformed", "The message's task does not fit its type.")
    if whose != site:
        raise Refused(
            "task_of_another_site", "The coordinator takes this node for another site: it registered its key so."
        )
    if not isinstance(head, str) or not re.fullmatch(r"[0-9a-f]{64}|", head):
        raise JobFailed("task_malformed", "The message's task names no ledger entry where it should.")
    return Task(study, module, number), head


def _check_not_set_back(ledger: Ledger, head: str) -> None:
    """The coordinator holds a receipt for `head`: a ledger without that entry is an older copy of itself.

    Raises:
        Refused: ``ledger_set_back``.
    """
    if head and all(entry.digest != head for entry in ledger.entries()):
        raise Refused(
            "ledger_set_back",
            "The coordinator holds a receipt for an entry that this ledger does not have: the ledger is an older copy, or "
            "another one.",
            "Restore the newest ledger. Until then nothing can run, since the same budget would be spent twice.",
        )


def _incoming(plan: StudyPlan, task: Task, content: RecordDict) -> dict[str, State]:
    """The weights that a task of the module carries, the discriminator's start excepted."""
    module = task.module
    if module == "moments" or module == "embedding":
        return {PUBLIC[module]: _public(plan, module, content)}
    expected = _expected(plan, module)
    incoming = {name: from_record(content, name, state) for name, state in expected.items()}
    if module == "evaluation":
        _check_evaluators(plan, incoming)
    return incoming


def _check_evaluators(plan: StudyPlan, incoming: dict[str, State]) -> None:
    """Weights from which no model can be built are to fail here, not under a charge.

    Raises:
        JobFailed: ``evaluators_unusable``.
    """
    try:
        evaluators(plan, incoming)
    except RuntimeError:  # e.g. of a singular matrix
        raise JobFailed("evaluators_unusable", "No model can be built from the weights that were sent.") from None


def _expected(plan: StudyPlan, module: Activity) -> dict[str, State]:
    if module == "evaluation":
        return {EVALUATORS: evaluators_template(plan), **profile_template(plan)}
    if module == "gan":
        return {WEIGHTS["gan"]: make_generator(plan).state_dict(), **profile_template(plan)}
    if module == "translation":
        return {WEIGHTS[module]: translator_template(plan)}
    model = make_autoencoder(plan) if module == "autoencoder" else make_radiogenomic_dnn(plan)
    return {WEIGHTS[module]: model.state_dict()}


def _public(plan: StudyPlan, module: Module, content: RecordDict) -> State:
    """The public weights that a statistic's rows are computed with: those whose digest the approved plan names."""
    template = moments.public_template(plan) if module == "moments" else embedding.public_template(plan)
    # The digest says which numbers were approved, so their size needs no limit: variances may be large.
    state, section = from_record(content, PUBLIC[module], template, largest_norm=math.inf), plan.training(module)
    if isinstance(section, StatisticPlan) and state_digest(state) != section.public.sha256:
        raise Refused("public_weights_differ", f"The public weights of {module} are not those the approved plan names.")
    return state


def _discriminator_start(plan: StudyPlan, content: RecordDict) -> State:
    """The public discriminator or encoder that a site starts from: random weights, or those whose digest the plan names."""
    state = from_record(content, "discriminator", make_companion(plan).state_dict())
    start = plan.gan.warm_start
    if start is not None and state_digest(state) != start.discriminator_sha256:
        raise Refused("warm_start_differs", "The discriminator that was sent is not the one the approved plan names.")
    return {f"model/{name}": tensor for name, tensor in state.items()}


def _randomness(plan: StudyPlan, task: Task) -> Randomness:
    seed = plan.privacy.reproducible_seed
    return SystemRandomness() if seed is None else SeededRandomness(_task_seed(seed, task))


def _task_seed(seed: int, task: Task) -> int:
    """A seed for one task of a reproducible (not private) run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}".encode()).digest()[:7], "big")


def _reply(
    policy: SitePolicy, plan: StudyPlan, task: Task, ledger: Ledger, outbox: Outbox, recipient: str
) -> RecordDict:
    digest = ledger.reply_digest(task)
    if digest is None:
        raise JobFailed("reply_lost", "The task has no stored reply.")
    weights, progress = outbox.reply(task, digest)
    delta, accountant = plan.privacy.delta, plan.privacy.accountant
    population = charge(plan, policy.site, task.module).population
    receipt = ConfigRecord(
        {
            "head": ledger.head,
            "epsilon": ledger.epsilon(delta, accountant, task.study, population=population),
            "epsilon_lifetime": ledger.epsilon(policy.max_delta, accountant, population=population),
            "steps": sum(m.steps for m in ledger.history(task.study, task.module)),
            "private": ledger.is_private(task.study),
        }
    )
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
        WEIGHTS[task.module]: to_record(weights),
        "progress": progress_record(progress),
        "receipt": receipt,
    }
    ledger.sent(task, {name: record.count_bytes() for name, record in records.items()}, digest, recipient)
    receipt["head"] = ledger.head  # of the same length; it covers the entry that this reply was sent
    content = RecordDict(records)
    check_reply(content, task.module, progress_of(plan, task.module))
    return content
