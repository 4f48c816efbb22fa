"""How the report words numbers: as many digits as they carry, bounds rounded to the safe side, plain readings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedsynth.evaluation.values import Figure
from fedsynth.plan import GanPlan, StudyPlan, TranslationPlan

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, powers of ten written out and a true minus sign.

    >>> number(0.81649), number(123456.0), number(1e-5), number(-0.02)
    ('0.816', '123,000', '1 × 10⁻⁵', '−0.02')
    """
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -4 <= power < 7:
        text = f"{float(f'{mantissa}e{power}'):,.{max(0, digits - 1 - power)}f}"
        return _minus(_without_trailing_zeros(text))
    return _minus(f"{_without_trailing_zeros(mantissa)} × 10{str(power).translate(_SUPERSCRIPT)}")


def fixed(value: float, decimals: int) -> str:
    """`value` with `decimals` digits after the point, thousands grouped."""
    return _minus(f"{value:,.{decimals}f}")


def epsilon(value: float) -> str:
    """An epsilon, rounded *up* to two decimals: a printed guarantee is never stronger than the one that holds.

    >>> epsilon(7.991), epsilon(8.0), epsilon(0.3)
    ('8.00', '8.00', '0.30')
    """
    return "∞" if math.isinf(value) else f"{_up(value, 2):,.2f}"


def percent(share: float) -> str:
    """A share in whole per cent; what is not exactly none or all is never printed as such."""
    if 0 < share < 0.005:
        return "less than 1 %"
    if 0.995 < share < 1:
        return "more than 99 %"
    return f"{100 * share:.0f} %"


def odds_factor(value: float) -> str:
    """e^epsilon, rounded up to three significant digits: how far one patient can move the odds of any outcome."""
    if value > 700:
        return "beyond any practical number"
    factor = math.exp(value)
    step = 10.0 ** (math.floor(math.log10(factor)) - 2)
    return number(math.ceil(factor / step - 1e-9) * step)


def attacker_accuracy(value: float, delta: float) -> str:
    """Largest share of right answers of an attacker who guesses from even odds whether one patient took part.

    ``(e^epsilon + delta) / (e^epsilon + 1)``, from the trade-off of error rates that (epsilon, delta)-differential
    privacy allows (Kairouz, Oh and Viswanath, ICML 2015); rounded up to 0.1 per cent.
    Empty where that gives 100 %: the bound then rules out nothing worth a number.
    """
    bound = (1 + delta * math.exp(-value)) / (1 + math.exp(-value))
    rounded = _up(100 * bound, 1)
    return f"{rounded:.1f} %" if rounded < 100 else ""


def strength(value: float) -> str:
    """What practice calls an epsilon of this size (the tiers of Ponomareva et al., JAIR 77, 2023)."""
    if math.isinf(value):
        return "An infinite epsilon guarantees nothing at all."
    if value <= 1:
        return "An epsilon of at most 1 is called a strong formal guarantee."
    if value <= 10:
        return (
            "An epsilon between 1 and 10 is called reasonable, not strong: the worst case it allows is weak, and it is "
            "trusted because known attacks stay far below that worst case."
        )
    return "An epsilon above 10 is called weak: by itself it rules out little."


# The readings of a forecast and the verdicts after the run (`fedsynth_server.outcome`).
FORECASTS = {"learns": "will learn", "partly": "will learn a part", "drowns": "will drown in noise"}
VERDICTS = {
    "learnt": "learnt",
    "partly": "partly learnt",
    "drowned": "drowned in noise",
    "missed": "above the noise, not learnt",
    "nothing": "nothing left to learn",
    "open": "cannot be told",
}


def profile_method(plan: StudyPlan) -> str:
    """What genes, morphology and label of the synthetic patients come from."""
    noisy, trained = ("noisy ", "trained by DP-SGD") if plan.privacy.private else ("exact ", "trained without privacy")
    if plan.profile_engine == "moments":
        return (
            f"a linear-Gaussian model of genes, morphology and label, fitted to one {noisy}sum of first and second moments "
            "from each site"
        )
    return (
        f"a gene autoencoder, and a deep neural network from genes to morphology and label; both {trained} at the sites and "
        "averaged every round"
    )


def image_method(plan: StudyPlan) -> str:
    """What the images of the synthetic patients come from."""
    noisy, trained = ("noisy ", "trained by DP-SGD") if plan.privacy.private else ("exact ", "trained without privacy")
    text = "a conditional generator, " + ("started from public weights" if plan.gan.warm_start else "started at random")
    if plan.embedding is not None:
        text += f", fitted to one {noisy}mean embedding of images from each site"
    if plan.gan.rounds:
        rounds = "one round" if plan.gan.rounds == 1 else f"{plan.gan.rounds} rounds"
        verb = "refined" if plan.embedding is not None else "trained"
        text += f", {verb} in {rounds} {_beside(plan.gan, trained)}"
    if plan.embedding is None and not plan.gan.rounds:
        text += " and left as it was: no private image took part"
    if plan.translation is not None and "translation" in plan.modules:
        text += f"; {_translation(plan.translation, trained)}"
    return text


def _beside(gan: GanPlan, trained: str) -> str:
    """What saw the patients' images, and so was trained by which means."""
    if gan.architecture == "vae":
        return f"as the decoder of a variational autoencoder {trained}, whose encoders never left their sites"
    if gan.generator_is_private:
        return f"against discriminators that never left their sites, and against patients’ slices; both were {trained}"
    return f"against discriminators that were {trained} and never left their sites"


def _translation(section: TranslationPlan, trained: str) -> str:
    """What the images owe to the translation; of one between slices without and with tumour, that it is nothing."""
    if section.domains == "tumour":
        return (
            f"networks that translate slices without tumour to slices with tumour and back were {trained} as well, on the "
            "sites’ images; no synthetic patient was drawn with them, since mask, morphology and genes would not follow"
        )
    rounds = "one round" if section.rounds == 1 else f"{section.rounds} rounds"
    return (
        f"a patient’s {section.target} is translated from its {section.source} by a network {trained} on the sites’ "
        f"unpaired images in {rounds} and averaged every round, against discriminators that never left their sites"
    )


Verdict = Literal["ceiling", "between", "floor", "open"]


@dataclass(frozen=True)
class Reading:
    """A figure in plain words.

    Attributes:
        place: where the synthetic value lies, 0 at the floor and 1 at the ceiling; None where that cannot be said.
        verdict: ``floor`` when not above the floor or not told apart from it, ``ceiling`` when at least half-way to the
            ceiling, ``between`` otherwise; ``open`` when it has no place.
        beats_public_only: better than the public-only generator, its whole interval included; None without one.
        sentences: the reading, one thought a sentence.
    """

    place: float | None
    verdict: Verdict
    beats_public_only: bool | None
    sentences: tuple[str, ...]


def reading(figure: Figure) -> Reading:
    """Read `figure` against its floor, its ceiling and the public-only generator, as far as they were measured."""
    if figure.synthetic is None:
        return Reading(None, "open", None, ())
    place, verdict, sentences = _against_floor_and_ceiling(figure, figure.synthetic)
    beats, sentence = _against_public_only(figure, figure.synthetic)
    return Reading(place, verdict, beats, (*sentences, *sentence))


def beside(figure: Figure) -> str:
    """A figure in a sentence: its value and interval, beside what real data reach and a trivial answer.

    >>> beside(Figure(metric="AUC", better="higher", synthetic=0.731, interval=(0.65, 0.80), real=0.871, floor=0.5))
    'AUC: 0.731 (0.65 to 0.8); real data reach 0.871, a trivial answer 0.5.'
    """
    if figure.synthetic is None:
        return f"{figure.metric}: not measured."
    text = f"{figure.metric}: {number(figure.synthetic)}"
    if figure.interval is not None:
        text += f" ({number(figure.interval[0])} to {number(figure.interval[1])})"
    others = [
        f"{who} {number(value)}"
        for who, value in (("real data reach", figure.real), ("a trivial answer", figure.floor))
        if value is not None
    ]
    return f"{text}; {', '.join(others)}." if others else f"{text}."


def _against_floor_and_ceiling(figure: Figure, value: float) -> tuple[float | None, Verdict, tuple[str, ...]]:
    if figure.better == "none":
        return None, "open", (_against_real(figure, value),)
    if figure.floor is None or figure.real is None:
        missing = [name for name, bound in (("floor", figure.floor), ("ceiling", figure.real)) if bound is None]
        return None, "open", (f"Cannot be placed: no {' and no '.join(missing)}.",)
    if gain(figure, figure.real, figure.floor) <= 0:
        return None, "open", ("Real data are no better than the floor here, so this measure cannot rank the release.",)
    place = (value - figure.floor) / (figure.real - figure.floor)
    if place <= 0:
        return place, "floor", ("No better than the floor." if place == 0 else "Worse than the floor.",)
    where = "At the ceiling or beyond it." if place >= 1 else f"Between floor and ceiling: {percent(place)} of the way."
    if _reaches(figure, figure.floor):
        return place, "floor", (f"{where[:-1]}, but its interval reaches the floor: chance is not ruled out.",)
    return place, "ceiling" if place >= 0.5 else "between", (where,)


def _against_real(figure: Figure, value: float) -> str:
    """For a quantity without a good direction: whether it is that of real data."""
    if figure.real is None:
        return "There is no value of real data to compare it with."
    if figure.interval is not None and figure.interval[0] <= figure.real <= figure.interval[1]:
        return "Not told apart from real data."
    if value == figure.real:
        return "As in real data."
    size = "" if figure.real == 0 else f" by {percent(abs(value / figure.real - 1))}"
    return f"{'Above' if value > figure.real else 'Below'} real data{size}."


def _against_public_only(figure: Figure, value: float) -> tuple[bool | None, tuple[str, ...]]:
    if figure.public_only is None or figure.better == "none":
        return None, ()
    if gain(figure, value, figure.public_only) <= 0:
        return False, ("No better than the public-only generator: private training added nothing here.",)
    if _reaches(figure, figure.public_only):
        return False, ("Its interval reaches the public-only generator.",)
    return True, ("Better than the public-only generator.",)


def gain(figure: Figure, value: float, over: float) -> float:
    """By how much `value` is better than `over`, in the figure's direction."""
    return value - over if figure.better == "higher" else over - value


def decimals(figure: Figure) -> int | None:
    """Digits after the point that the interval supports (two digits of its half-width); None without an interval."""
    if figure.interval is None:
        return None
    half = abs(figure.interval[1] - figure.interval[0]) / 2
    return min(6, max(0, 1 - math.floor(math.log10(half)))) if half > 0 and math.isfinite(half) else None


def _reaches(figure: Figure, bound: float) -> bool:
    return figure.interval is not None and min(gain(figure, end, bound) for end in figure.interval) <= 0


def _up(value: float, places: int) -> float:
    # The inner rounding keeps 8.000000000000001 from becoming 8.01.
    return math.ceil(round(value * 10**places, 6)) / 10**places


def _without_trailing_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _minus(text: str) -> str:
    return text.replace("-", "−", 1) if text.startswith("-") else text
