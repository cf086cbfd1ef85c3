"""The gate: a leap never replaces a better checkpoint.

Leap and origin answer the same held-out problems. The leap passes when

    d̄ - z·se(d) > 0        d_p = mean score of the leap - mean score of the origin on problem p

with z the one-sided normal quantile of ``confidence``, and when its norm ratio ‖leap - base‖ / ‖origin - base‖, its forward
KL(base‖leap) and its weights are sound. The problems of the gate are not those on which the leap was chosen, so the choice
among many candidates cannot pass for a gain.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from rankleap.evaluation import paired_difference
from rankleap.records import Estimate


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What a leap must hold to; ``max_kl`` in nats per token, ``None`` where KL is not measured."""

    confidence: float
    max_norm_ratio: float
    max_kl: float | None = None


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """What the gate said, with the evidence; ``reasons`` is empty for an accepted leap."""

    accepted: bool
    difference: Estimate
    norm_ratio: float
    kl: float | None
    reasons: tuple[str, ...]


def judge(
    leap_PK: NDArray[np.float64],
    origin_PK: NDArray[np.float64],
    norm_ratio: float,
    kl: float | None,
    settings: GateSettings,
) -> GateVerdict:
    """Accept or reject from the scores of both on the same P problems; ``difference`` has its 95 % interval."""
    gain_P = leap_PK.mean(axis=1) - origin_PK.mean(axis=1)
    mean = float(gain_P.mean())
    # For the reader, at 95 %; the decision itself asks for the recipe's confidence.
    difference = paired_difference(leap_PK, origin_PK)
    margin = NormalDist().inv_cdf(settings.confidence) * float(gain_P.std(ddof=1)) / len(gain_P) ** 0.5
    reasons: list[str] = []
    if not mean - margin > 0:  # NaN is no gain
        reasons.append(f"gain {mean:+.3f} ± {margin:.3f} is not above zero")
    if not norm_ratio <= settings.max_norm_ratio:
        reasons.append(f"norm ratio {norm_ratio:.2f} is above {settings.max_norm_ratio:.2f}")
    if settings.max_kl is not None and (kl is None or not kl <= settings.max_kl):
        found = "was not measured" if kl is None else f"is {kl:.3f}"
        reasons.append(f"forward KL {found}, at most {settings.max_kl:.3f} is allowed")
    return GateVerdict(not reasons, difference, norm_ratio, kl, tuple(reasons))
