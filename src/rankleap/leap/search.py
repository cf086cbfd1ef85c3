"""Chooses how far to leap, then lets the gate decide: on two halves of the validation problems that share none.

1. Every candidate (method × window × coefficient) answers the *choosing* half; the best mean wins.
2. The winner and its origin answer the *gate* half; ``gate.judge`` compares them problem by problem.

Both sample with the same seed. Nothing of the test split is ever seen.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from rankleap.errors import InputError, TrajectoryError
from rankleap.leap.apply import Leap, norm_ratio
from rankleap.leap.gate import GateSettings, GateVerdict, judge
from rankleap.predictors import get_predictor
from rankleap.records import Problem
from rankleap.trajectory import Trajectory

Score = Callable[[Leap | None, Sequence[Problem]], NDArray[np.float64]]
"""Scores of a leap (``None``: of the origin) on problems: P × K."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """What is tried: every method with every window (``None``: all checkpoints) and every coefficient."""

    methods: Sequence[str]
    windows: Sequence[int | None]
    coefficients: Sequence[float]


@dataclass(frozen=True, slots=True)
class Decision:
    """What was tried, what won, what the gate said, and what it all cost."""

    step: int
    tried: tuple[dict[str, object], ...]
    leap: Leap
    verdict: GateVerdict
    wall_s: float


def fitted(trajectory: Trajectory, candidates: Candidates) -> Iterator[tuple[dict[str, object], Leap]]:
    """Fit every candidate; windows that reach back beyond the trajectory are one and the same."""
    have = len(trajectory.steps)
    windows = dict.fromkeys(None if window is None or window >= have else window for window in candidates.windows)
    for method, window in product(candidates.methods, windows):
        forecast = get_predictor(method, window).fit(trajectory)
        for coefficient in candidates.coefficients:
            yield {"method": method, "window": window or have, "coefficient": coefficient}, Leap(forecast, coefficient)


def search(
    trajectory: Trajectory,
    candidates: Candidates,
    score: Score,
    problems: Sequence[Problem],
    gate: GateSettings,
    kl: Callable[[Leap, Sequence[Problem]], float] | None = None,
) -> Decision:
    """Choose on the first half of ``problems``, judge on the second; raises ``TrajectoryError`` for too few checkpoints."""
    if len(problems) < 4:
        raise InputError(f"choosing and gating a leap needs at least 4 validation problems, got {len(problems)}")
    start_s = time.perf_counter()
    choosing, gating = problems[: len(problems) // 2], problems[len(problems) // 2 :]
    options = list(fitted(trajectory, candidates))
    if not options:
        raise TrajectoryError("no leap to try: give at least one method, window and coefficient")
    # With one candidate there is nothing to choose, so nothing is spent on it.
    means = [float(score(leap, choosing).mean()) for _, leap in options] if len(options) > 1 else [None]
    # The first of equal means wins, so the recipe's order breaks ties.
    leap = max(zip(means, options, strict=True), key=lambda item: item[0] or 0.0)[1][1]
    divergence = kl(leap, gating) if kl else None
    verdict = judge(score(leap, gating), score(None, gating), norm_ratio(leap), divergence, gate)
    tried = tuple({**facts, "score": mean} for (facts, _), mean in zip(options, means, strict=True))
    return Decision(trajectory.steps[-1], tried, leap, verdict, time.perf_counter() - start_s)
