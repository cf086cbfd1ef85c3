"""Numbers from scores, each with an interval that treats the problem, not the sample, as the unit of evidence.

Samples of one problem are alike, so every estimate is a mean over P problem values m_p, with standard error
s = std(m_p, ddof=1) / √P and q the two-sided Student t quantile with P − 1 degrees of freedom.

- avg@k     m_p = mean of the K scores
- pass@k    m_p = 1 − C(K − c, k) / C(K, k), unbiased, c = samples with score >= 1 (Chen et al. 2021, 2107.03374, eq. 1)
- paired    m_p = difference of two avg@k on the same problem

Values in [0, 1] get the Wilson interval (Wilson 1927) at the effective number of problems n = m(1 − m) / s²: it stays
inside [0, 1] and is honest near its ends, where m ± q·s covers as little as 25 % and has no width when no problem is
solved (`tests/unit/test_metrics.py` simulates both). All other values get m ± q·s.

Shapes: P problems, K samples of each; float64.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from rankleap.errors import InputError
from rankleap.records import Estimate

Array = NDArray[np.float64]


def avg_at_k(scores_PK: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean score over problems and their samples."""
    scores = _checked(scores_PK)
    # Yes-or-no scores cap the effective sample at their own number; graded ones have no such cap.
    return _estimate(scores.mean(axis=1), scores.size if np.isin(scores, (0, 1)).all() else None, confidence)


def pass_at_k(scores_PK: ArrayLike, k: int, confidence: float = 0.95) -> Estimate:
    """Chance that at least one of ``k`` samples of a problem succeeds (score >= 1); needs ``k`` <= K."""
    scores = _checked(scores_PK)
    n = scores.shape[1]
    if not 1 <= k <= n:
        raise InputError(
            f"pass@{k} needs at least {max(k, 1)} samples of each problem, got {n}; choose k from 1 to {n}"
        )
    failed = np.arange(n)
    # C(n−c, k)/C(n, k) for c = 0…n, each from the one before: no factorials, and exactly 0 once n − c < k.
    all_fail_c = np.concatenate([[1.0], np.cumprod(np.maximum(n - k - failed, 0) / (n - failed))])
    return _estimate(1.0 - all_fail_c[(scores >= 1).sum(axis=1)], scores.size, confidence)


def paired_difference(scores_a_PK: ArrayLike, scores_b_PK: ArrayLike, confidence: float = 0.95) -> Estimate:
    """How much higher a scores than b on the same problems, row by row; K may differ."""
    differences = _differences(scores_a_PK, scores_b_PK)
    half = _half_width(differences, confidence)
    mean = float(differences.mean())
    return Estimate(mean, mean - half, mean + half)


def smallest_resolvable_difference(
    scores_a_PK: ArrayLike, scores_b_PK: ArrayLike, confidence: float = 0.95, power: float = 0.8
) -> float:
    """The true difference that these problems would show, at this confidence, with probability ``power``."""
    differences = _differences(scores_a_PK, scores_b_PK)
    ratio = stdtrit(len(differences) - 1, power) / stdtrit(len(differences) - 1, (1 + confidence) / 2)
    # (t_power + q)·s: the usual power calculation of a two-sided test, its far tail left out.
    return float((1 + ratio) * _half_width(differences, confidence))


def ratio_of_sums(sums_P: ArrayLike, counts_P: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Σ sums / Σ counts, a mean per token, say; problems are the clusters, by linearisation (Cochran 1977, §6.3)."""
    sums, counts = np.asarray(sums_P, float), np.asarray(counts_P, float)
    if not counts.sum() > 0:
        raise InputError("a mean over tokens needs at least one token, got none")
    ratio = float(sums.sum() / counts.sum())
    half = _half_width((sums - ratio * counts) / counts.mean(), confidence)
    return Estimate(ratio, ratio - half, ratio + half)


def _estimate(values_P: Array, outcomes: int | None, confidence: float) -> Estimate:
    """Mean of values with its interval; ``outcomes`` counts the yes-or-no outcomes behind them, None if graded."""
    mean, half = float(values_P.mean()), _half_width(values_P, confidence)
    if values_P.min() < 0 or values_P.max() > 1:
        return Estimate(mean, mean - half, mean + half)
    q2 = float(stdtrit(len(values_P) - 1, (1 + confidence) / 2)) ** 2
    spread = mean * (1 - mean)
    # q²/n. No clustering makes n exceed the outcomes; without any spread n is P, as if samples of a problem all agreed.
    shrink = max(half**2 / spread, q2 / outcomes if outcomes else 0.0) if spread > 0 else q2 / len(values_P)
    center = (mean + shrink / 2) / (1 + shrink)
    reach = float(np.sqrt(shrink * spread + shrink**2 / 4)) / (1 + shrink)
    # Wilson holds the mean up to rounding; min and max make it exact.
    return Estimate(mean, min(mean, max(0.0, center - reach)), max(mean, min(1.0, center + reach)))


def _half_width(values_P: Array, confidence: float) -> float:
    """q·s, with s the standard error of the mean of the values."""
    if len(values_P) < 2:
        raise InputError(f"an interval needs at least 2 problems, got {len(values_P)}; evaluate on more problems")
    error = values_P.std(ddof=1) / np.sqrt(len(values_P))
    return float(stdtrit(len(values_P) - 1, (1 + confidence) / 2) * error)


def _differences(scores_a_PK: ArrayLike, scores_b_PK: ArrayLike) -> Array:
    a, b = _checked(scores_a_PK), _checked(scores_b_PK)
    if len(a) != len(b):
        raise InputError(f"a paired difference needs the same problems, got {len(a)} and {len(b)}")
    return a.mean(axis=1) - b.mean(axis=1)


def _checked(scores_PK: ArrayLike) -> Array:
    scores = np.asarray(scores_PK, float)
    if scores.ndim != 2 or scores.size == 0 or not np.isfinite(scores).all():
        raise InputError(
            f"scores need shape (problems, samples), not empty, all finite; got {scores.shape} "
            f"with {int((~np.isfinite(scores)).sum())} non-finite"
        )
    return scores
