"""Privacy over several sites: disjoint patients, patients at several sites, and noise that the sites share.

The unit is the patient. A site's own epsilon (`fedsynth.dp.accounting.epsilon` over its history) protects its patients
against everybody who sees what the site sends, the coordinator included.

Disjoint sites: a patient at one site only touches that site's releases; all else is post-processing of them and of data
without the patient. The study's epsilon is then the largest of its sites' (parallel composition: McSherry 2009,
theorem 4). Sites cannot check this without comparing patients, so a study states it as an assumption, and
`overlap_epsilon` says what a patient pays for whom it is wrong.

Shared noise: when sites release sums that are only ever seen added up, each may add a part of the noise (distributed
noise: Dwork et al. 2006, "Our data, ourselves"). Whoever sees a single message sees too little noise, so this is valid
towards the server only under secure aggregation. `two_epsilons` gives what holds with it and what is left without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedsynth.dp.accounting import Accountant, Mechanism, epsilon


def study_epsilon(histories: Mapping[str, Sequence[Mechanism]], delta: float, accountant: Accountant = "rdp") -> float:
    """Epsilon of the study for a patient who is at one site only: the largest over the sites; 0 without sites.

    Args:
        histories: every site's mechanisms.
        delta: in (0, 1); it is not divided among the sites.
        accountant: see `fedsynth.dp.accounting.epsilon`.
    """
    return max((epsilon(history, delta, accountant) for history in histories.values()), default=0.0)


def overlap_epsilon(
    histories: Mapping[str, Sequence[Mechanism]], delta: float, accountant: Accountant = "rdp"
) -> float:
    """Epsilon for a patient who is at *all* of these sites: all their mechanisms composed.

    For a patient at two of five sites, ask for those two. The sites draw, clip and noise independently, and adding or
    removing the patient changes every one of these cohorts by one, so the histories compose like rounds of one site.
    """
    return epsilon([mechanism for history in histories.values() for mechanism in history], delta, accountant)


def distributed_noise(sigma_total: float, sites: int, *, unreliable: int = 0) -> float:
    """Standard deviation that each site adds, so that the sum over the sites has at least `sigma_total`.

    Args:
        sigma_total: standard deviation that the sum needs, in units of its sensitivity.
        sites: number of sites that add up, K.
        unreliable: number of sites, t, that may drop out or tell the server their noise; the sum keeps `sigma_total`
            as long as no more than these do.

    Returns:
        ``sigma_total / sqrt(sites - unreliable)``.

    Raises:
        ValueError: `sigma_total` is not positive, or no reliable site would be left.

    >>> distributed_noise(2.0, 4), distributed_noise(2.0, 5, unreliable=1)
    (1.0, 1.0)
    """
    if not (sigma_total > 0 and math.isfinite(sigma_total)):
        raise ValueError(f"sigma_total must be positive and finite, not {sigma_total}")
    if not 0 <= unreliable < sites:
        raise ValueError(f"of {sites} sites, {unreliable} cannot be unreliable: at least one must be left")
    return sigma_total / math.sqrt(sites - unreliable)


@dataclass(frozen=True)
class TwoEpsilons:
    """What shared noise guarantees, to a patient who is at one site.

    Attributes:
        towards_server: against a server that sees each site's message by itself, with that site's part of the noise.
            The guarantee that holds when secure aggregation is off, fails, or is not believed.
        towards_recipients: against all who see sums only: recipients of what is made from them and, under secure
            aggregation, the server. Holds while at most `unreliable` sites drop out or side with the observer.
        unreliable: that tolerance.
    """

    towards_server: float
    towards_recipients: float
    unreliable: int


def two_epsilons(
    history: Sequence[Mechanism], sites: int, delta: float, accountant: Accountant = "rdp", *, unreliable: int = 0
) -> TwoEpsilons:
    """Both epsilons of releases whose noise is shared by `sites` sites.

    Args:
        history: the mechanisms of the *sums*: noise multipliers are totals, as `distributed_noise` takes them. All sites
            clip to the same norm, and messages are added unweighted; a release that is not a sum of the sites'
            messages (averaged weights after local steps) has no place here.
        sites: number of sites that add up.
        delta: in (0, 1).
        accountant: see `fedsynth.dp.accounting.epsilon`.
        unreliable: see `distributed_noise`.

    Raises:
        ValueError: as of `distributed_noise`.
    """
    single = [
        replace(m, noise_multiplier=distributed_noise(m.noise_multiplier, sites, unreliable=unreliable))
        for m in history
    ]
    return TwoEpsilons(epsilon(single, delta, accountant), epsilon(history, delta, accountant), unreliable)
