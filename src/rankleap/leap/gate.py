"""The gate: a leap never replaces a better checkpoint.

Leap and origin answer the same held-out problems. The leap passes when

    d̄ - z·se(d) > 0        d_p = mean score of the leap - mean score of the origin on problem p

with z the one-sided normal quantile of ``confidence``, and when its norm ratio ‖leap - base‖ / ‖origin - base‖, its forward
KL(base‖leap), the length of its completions and its weights are sound. The problems of the gate are not those on which the
leap was chosen, so the choice among many candidates cannot pass for a gain.

A leap that is refused may be shrunk and looked at again on the same problems. So that several looks accept no more chance
gains than one would, they share its error 1 - ``confidence``: a look that others may follow takes half of what is left, the
last one the rest (Bonferroni's bound, so it holds however alike the looks are). What is refused by its norm or KL alone was
not looked at: neither knows a score.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from rankleap.evaluation import Evaluation, paired_difference
from rankleap.records import Estimate


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What a leap must hold to; ``max_kl`` in nats per token, ``None`` where KL is not measured."""

    confidence: float
    max_norm_ratio: float
    max_kl: float | None = None
    max_length_ratio: float = 2.0
    """Mean tokens of a completion, leap to origin or origin to leap: both rambling and answers cut short break a model."""
    max_truncation_rise: float = 0.1
    """Share of completions that meet no end, above the origin's own."""
    shrinks: int = 0
    """How often a refused leap is halved and looked at again."""

    def unsound(self, norm_ratio: float, kl: float | None) -> tuple[str, ...]:
        """What speaks against a leap before it has answered anything; NaN is within no limit."""
        reasons: list[str] = []
        if not norm_ratio <= self.max_norm_ratio:
            reasons.append(f"norm ratio {norm_ratio:.2f} is above {self.max_norm_ratio:.2f}")
        if self.max_kl is not None and (kl is None or not kl <= self.max_kl):
            found = "was not measured" if kl is None else f"is {kl:.3f}"
            reasons.append(f"forward KL {found}, at most {self.max_kl:.3f} is allowed")
        return tuple(reasons)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Completions of a leap beside its origin's: ratio of their mean tokens, rise of the truncation rate."""

    ratio: float
    truncation_rise: float

    @classmethod
    def of(cls, leap: Evaluation, origin: Evaluation) -> "Lengths":
        """Compare two evaluations on the same problems."""
        # A completion has its end token at least, so neither mean is zero.
        return cls(leap.mean_tokens / origin.mean_tokens, leap.truncation_rate - origin.truncation_rate)


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """What the gate said, with the evidence; ``reasons`` is empty for an accepted leap, ``difference`` None if not measured."""

    accepted: bool
    difference: Estimate | None
    norm_ratio: float
    kl: float | None
    reasons: tuple[str, ...]
    lengths: Lengths | None = None


def judge(
    leap_PK: NDArray[np.float64],
    origin_PK: NDArray[np.float64],
    norm_ratio: float,
    kl: float | None,
    settings: GateSettings,
    lengths: Lengths | None = None,
) -> GateVerdict:
    """Accept or reject from the scores of both on the same P problems; ``difference`` has its 95 % interval."""
    gain_P = leap_PK.mean(axis=1) - origin_PK.mean(axis=1)
    mean = float(gain_P.mean())
    # For the reader, at 95 %; the decision itself asks for the recipe's confidence.
    difference = paired_difference(leap_PK, origin_PK)
    margin = NormalDist().inv_cdf(settings.confidence) * float(gain_P.std(ddof=1)) / len(gain_P) ** 0.5
    # NaN is no gain.
    reasons = [] if mean - margin > 0 else [f"gain {mean:+.3f} ± {margin:.3f} is not above zero"]
    reasons += settings.unsound(norm_ratio, kl)
    longest, rise = settings.max_length_ratio, settings.max_truncation_rise
    if lengths and not 1 / longest <= lengths.ratio <= longest:
        reasons.append(f"completions are {lengths.ratio:.2f} times as long, outside {1 / longest:.2f} to {longest:.2f}")
    if lengths and not lengths.truncation_rise <= rise:
        reasons.append(f"truncation rises by {lengths.truncation_rise:.3f}, at most {rise:.3f} is allowed")
    return GateVerdict(not reasons, difference, norm_ratio, kl, tuple(reasons), lengths)
