"""All attacks from a curious coordinator's view, site by site, from a transcript of the training's messages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from fedsynth.attacks.descriptions import Described
from fedsynth.attacks.generator import generator_approach
from fedsynth.attacks.rates import MIN_PATIENTS
from fedsynth.attacks.scored import Attempt, Scored, parted
from fedsynth.attacks.sums import (
    filter_with_the_population_known,
    filter_with_the_rest_known,
    statistic_rows,
    usable,
    volumes,
)
from fedsynth.attacks.transcript import Transcript
from fedsynth.attacks.updates import (
    Loss,
    image_loss,
    loss_drop,
    network,
    patient_loss,
    translation_loss,
    update_alignment,
)
from fedsynth.budget import noise_multipliers
from fedsynth.evaluation.patients import Patients
from fedsynth.metrics.domain_extractor import DomainExtractor
from fedsynth.metrics.measurable import NotMeasurable, require_rows
from fedsynth.models.growth import stage_at
from fedsynth.plan import Module, StudyPlan, TrainingPlan
from fedsynth.records import PUBLIC

_NAMES: dict[Module, str] = {
    "moments": "moments",
    "autoencoder": "autoencoder",
    "radiogenomics": "radiogenomic DNN",
    "embedding": "embedding",
    "gan": "generator",
    "translation": "translators",
}
_TOTAL = "total"
_SEEN = "the weights of every round that it sent to the site and got back"
_SAMPLE = " and a sample of the population (held-out patients of the sites who are not among the non-members)"
_WORST_CASE = (
    "The worst case that differential privacy is defined against. Who knows all others knows the noise of this run, too, "
    "and ranks patients by it; so the area is that of this run and can lie above what epsilon allows on average, the more "
    "so the more alike patients are, and no bound of epsilon is drawn from it. That the noise is what it should be is what "
    "the audit asks."
)
_THROUGH_D = (
    "The site's discriminator, the only network that sees patients' images, never leaves the site; the coordinator has the "
    "generator alone."
)
_OWN_GRADIENT = (
    "What else is at the site, a discriminator or an encoder, never leaves it; but the generator has a private gradient "
    "of its own, so its updates are attacked as well."
)
_DISTANCE_ALONE = (
    "The loss is the generator's distance from the patient's slices alone: what a discriminator's features or an encoder "
    "add stays at the site."
)
_CYCLE_ALONE = (
    "The loss is that of cycle and identity alone: the adversarial loss needs the discriminators, which never leave the "
    "site."
)


def coordinator_attacks(
    plan: StudyPlan,
    transcript: Transcript,
    train: Patients,
    holdout: Patients,
    described: tuple[Described, Described],
    reference: NDArray[np.integer],
    extractor: DomainExtractor,
    rng: np.random.Generator,
) -> Iterator[Attempt[Scored]]:
    """What can be attempted with the transcript, module by module.

    Args:
        plan: the study plan.
        transcript: the messages of training.
        train: members, of whom each site's must be all that it trained on.
        holdout: non-members of the same sites.
        described: both, as features.
        reference: rows of `holdout` who serve as a sample of the population where an attacker has one.
        extractor: that made the features.
        rng: seeds latent draws.
    """
    seed = int(rng.integers(2**62))
    is_reference = np.isin(np.arange(len(holdout)), reference)
    absent = [site for site in transcript.sites if site not in train.site_names]
    if absent or not transcript.modules:
        yield "The coordinator's view", partial(_unmatched, absent)
    for module in transcript.modules:
        inside, outside = usable(module, train), usable(module, holdout)
        sites = [site for site in transcript.sites if site in train.site_names and transcript.rounds(module, site)]
        if module in PUBLIC:
            rows = partial(_of_sums, plan, transcript, module, train, holdout, inside, outside, is_reference, sites)
            yield f"Matched filter, {_NAMES[module]}", rows
        elif module == "gan":
            yield (
                "Approach of the generator",
                partial(
                    _of_generator, plan, transcript, train, holdout, inside, outside, sites, described, extractor, seed
                ),
            )
        if module not in PUBLIC and (module != "gan" or plan.gan.generator_is_private):
            yield (
                f"Updates of the {_NAMES[module]}",
                partial(
                    _of_updates, plan, transcript, module, train, holdout, inside, outside, is_reference, sites, seed
                ),
            )


Flags = NDArray[np.bool_]


def _of_sums(
    plan: StudyPlan,
    transcript: Transcript,
    module: Module,
    train: Patients,
    holdout: Patients,
    inside: Flags,
    outside: Flags,
    is_reference: Flags,
    sites: list[str],
) -> list[Scored]:
    public = transcript.sent(module, 1)[PUBLIC[module]]
    members, others = (
        statistic_rows(plan, module, public, patients.rows(flags))
        for patients, flags in ((train, inside), (holdout, outside))
    )
    sample = others[is_reference[outside]]
    name, scored = _NAMES[module], []
    for site in sites:
        total = transcript.reply(module, 1, site)[_TOTAL].double().numpy()
        own = members[_of_site(train, site)[inside]]
        held = _of_site(holdout, site)[outside]
        noise, declared = noise_multipliers(plan, site)[module], plan.site(site).nominal_patients
        scored.append(
            Scored(
                f"matched-filter-{module}",
                f"Matched filter, {name}, the rest known",
                "coordinator",
                "the site's noisy sum, and every other patient of the site",
                "Neyman and Pearson 1933; Dong et al. 2022 (Gaussian differential privacy)",
                *filter_with_the_rest_known(total, own, others[held]),
                site=site,
                note=_WORST_CASE,
                proves=False,
            )
        )
        if len(sample) >= MIN_PATIENTS:
            judged = others[held & ~is_reference[outside]]
            scored.append(
                Scored(
                    f"population-filter-{module}",
                    f"Matched filter, {name}, the population known",
                    "coordinator",
                    f"the site's noisy sum{_SAMPLE}",
                    "Homer et al. 2008; Sankararaman et al. 2009",
                    *filter_with_the_population_known(total, own, judged, sample, declared, noise),
                    site=site,
                )
            )
    return scored


def _of_updates(
    plan: StudyPlan,
    transcript: Transcript,
    module: Module,
    train: Patients,
    holdout: Patients,
    inside: Flags,
    outside: Flags,
    is_reference: Flags,
    sites: list[str],
    seed: int,
) -> list[Scored]:
    training = plan.training(module)
    if not isinstance(training, TrainingPlan):
        raise ValueError(f"{module} is not trained in rounds")
    genes, morphology, labels = (
        torch.from_numpy(np.concatenate([getattr(train, part)[inside], getattr(holdout, part)[outside]]))
        for part in ("genes", "morphology", "labels")
    )
    count = int(inside.sum())
    sample = (count + np.flatnonzero(is_reference[outside])).tolist()
    require_rows("held-out patients", labels.numpy()[count:], 2)
    members = {site: np.flatnonzero(_of_site(train, site)[inside]).tolist() for site in sites}
    held = {site: count + np.flatnonzero(_of_site(holdout, site)[outside]) for site in sites}
    judged = {site: (numbers[~is_reference[outside][numbers - count]]).tolist() for site, numbers in held.items()}
    model = network(plan, module)
    if module == "translation" or module == "gan":
        slices = torch.cat([volumes(train.rows(inside)), volumes(holdout.rows(outside))])
    if module == "translation":
        loss = translation_loss(plan, slices)
    elif module == "gan":
        loss = image_loss(plan, morphology, labels, slices, torch.Generator().manual_seed(seed))
    else:
        loss = patient_loss(plan, module, genes, morphology, labels, torch.Generator().manual_seed(seed))
    scored_rows = {site: members[site] + judged[site] for site in sites}

    def of_round(number: int) -> Loss:
        if module != "gan":
            return loss
        stage, latents = stage_at(plan, number * training.steps_per_round - 1), torch.Generator().manual_seed(seed)
        return image_loss(plan, morphology, labels, slices, latents, stage)

    aligned = update_alignment(model, loss, scored_rows, sample, transcript, module, training.max_grad_norm, of_round)
    everybody = {site: members[site] + held[site].tolist() for site in sites}
    dropped = loss_drop(model, loss, everybody, transcript, module)
    computed = {"translation": _CYCLE_ALONE, "gan": _DISTANCE_ALONE}.get(module, "")
    name, scored = _NAMES[module], []
    for site in sites:
        scored += [
            Scored(
                f"update-alignment-{module}",
                f"Alignment with the updates of the {name}",
                "coordinator",
                f"{_SEEN}{_SAMPLE}",
                "Nasr et al. 2019; Li et al. 2022 (cosine attack)",
                *parted(aligned[site], len(members[site])),
                site=site,
                note=" ".join(
                    [
                        "Directions count less the more the gradients of reference patients vary along them.",
                        *([computed] if computed else []),
                    ]
                ),
            ),
            Scored(
                f"loss-drop-{module}",
                f"Loss of the {name} before and after",
                "coordinator",
                _SEEN,
                "Yeom et al. 2018; Watson et al. 2022",
                *parted(dropped[site], len(members[site])),
                site=site,
                note=computed,
            ),
        ]
    return scored


def _of_generator(
    plan: StudyPlan,
    transcript: Transcript,
    train: Patients,
    holdout: Patients,
    inside: Flags,
    outside: Flags,
    sites: list[str],
    described: tuple[Described, Described],
    extractor: DomainExtractor,
    seed: int,
) -> list[Scored]:
    morphology, labels = (
        torch.from_numpy(np.concatenate([getattr(train, part)[inside], getattr(holdout, part)[outside]]))
        for part in ("morphology", "labels")
    )
    slices = np.concatenate([described[0].slices[inside], described[1].slices[outside]])
    count = int(inside.sum())
    members = {site: np.flatnonzero(_of_site(train, site)[inside]).tolist() for site in sites}
    others = {site: (count + np.flatnonzero(_of_site(holdout, site)[outside])).tolist() for site in sites}
    rows = {site: members[site] + others[site] for site in sites}
    scores = generator_approach(plan, morphology, labels, slices, rows, extractor, transcript, seed)
    return [
        Scored(
            "generator-approach",
            "Approach of the generator to the patient",
            "coordinator",
            f"{_SEEN}, and a public feature network",
            "as Chen et al. 2020, over rounds",
            *parted(scores[site], len(members[site])),
            site=site,
            note=_OWN_GRADIENT if plan.gan.generator_is_private else _THROUGH_D,
        )
        for site in sites
    ]


def _unmatched(absent: list[str]) -> list[Scored]:
    if absent:
        raise NotMeasurable(f"replies of {', '.join(absent)} but no patients of theirs")
    raise NotMeasurable("the transcript holds no reply")


def _of_site(patients: Patients, site: str) -> Flags:
    """(N,) who is of `site`; nobody where the patients are of other sites."""
    if site not in patients.site_names:
        return np.zeros(len(patients), dtype=bool)
    return np.asarray(patients.sites == patients.site_names.index(site), dtype=np.bool_)
