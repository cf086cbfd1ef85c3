"""Chooses how far to leap, then lets the gate decide: on two halves of the validation problems that share none.

1. Candidates (method × window × coefficient) answer the *choosing* half; the best mean wins. With a budget that is too small
   for all of it, by successive halving (Jamieson & Talwalkar, 1502.07943): every candidate answers a few problems, the better
   half a few more, and so on; who is clearly worse than the best goes before its turn.
2. The winner and its origin answer the *gate* half; ``gate.judge`` compares them problem by problem. What is refused may be
   halved and looked at again (see ``gate`` for why that accepts no more chance gains).

Both sample with the same seed. Nothing of the test split is ever seen. Shapes: P problems, K samples.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from rankleap.errors import InputError, NotFiniteError, TrajectoryError
from rankleap.evaluation import Evaluation
from rankleap.leap.apply import Leap, norm_ratio
from rankleap.leap.gate import GateSettings, GateVerdict, Lengths, judge
from rankleap.predictors import Predictor, get_predictor
from rankleap.records import Problem
from rankleap.trajectory import Trajectory

Score = Callable[[Leap | None, Sequence[Problem]], Evaluation]
"""Answers of a leap (``None``: of the origin) on problems; ``NotFiniteError`` from a leap that is broken."""
KL = Callable[[Leap, Sequence[Problem]], float]
FEWEST_TO_DROP = 8
"""Problems before a candidate may count as clearly worse: a spread over fewer says little."""
CLEARLY = NormalDist().inv_cdf(0.95)


@dataclass(frozen=True, slots=True)
class Candidates:
    """What is tried: every method with every window (``None``: all checkpoints) and every coefficient."""

    methods: Sequence[str]
    windows: Sequence[int | None]
    coefficients: Sequence[float]
    target: float | None = None
    """Step to predict; unset, each method's own reach."""
    budget: int | None = None
    """Answers that choosing may take over all candidates, each of K completions; unset, everyone answers everything."""
    scores: Mapping[int, float] | None = None
    """Accuracy by step on a development split, for the methods that regress on it."""

    def predictors(self, whole: Trajectory) -> Iterator[tuple[str, int | None, Callable[[Trajectory], Predictor]]]:
        """Method, window, and the predictor for the first checkpoints of ``whole``, which sees their scores alone."""
        have, last = len(whole.steps), whole.steps[-1]
        if self.target is not None and not self.target > last:
            raise TrajectoryError(f"a target must lie ahead of the last checkpoint, step {last}; got {self.target:g}")
        # Windows that reach back beyond the trajectory are one and the same.
        windows = dict.fromkeys(None if window is None or window >= have else window for window in self.windows)
        for method, window in product(self.methods, windows):
            yield method, window, lambda seen, m=method, w=window: self._predictor(m, w, seen)

    def _predictor(self, method: str, window: int | None, seen: Trajectory) -> Predictor:
        if self.scores is None:
            return get_predictor(method, window)
        return get_predictor(method, window, {s: a for s, a in self.scores.items() if s <= seen.steps[-1]})


@dataclass(frozen=True, slots=True)
class Decision:
    """What was tried, what won, what the gate said at each look, and what it all cost."""

    step: int
    tried: tuple[dict[str, object], ...]
    leap: Leap
    verdict: GateVerdict
    looks: tuple[dict[str, object], ...]
    samples_spent: int
    """Completions drawn for choosing, for the gate, and for KL."""
    wall_s: float

    def evidence(self) -> dict[str, object]:
        """What a manifest keeps of it beside the leap itself."""
        facts: dict[str, object] = {"gate": asdict(self.verdict), "looks": self.looks, "tried": self.tried}
        return {**facts, "samples_spent": self.samples_spent, "wall_s": round(self.wall_s, 3)}


def fitted(trajectory: Trajectory, candidates: Candidates) -> Iterator[tuple[dict[str, object], Leap]]:
    """Fit every candidate; raises ``TrajectoryError`` for a target that is not ahead of the trajectory."""
    for method, window, predictor in candidates.predictors(trajectory):
        forecast = predictor(trajectory).fit(trajectory)
        for coefficient in candidates.coefficients:
            facts = {"method": method, "window": window or len(trajectory.steps), "coefficient": coefficient}
            yield facts, Leap(forecast, coefficient, candidates.target)


def search(
    trajectory: Trajectory,
    candidates: Candidates,
    score: Score,
    problems: Sequence[Problem],
    gate: GateSettings,
    kl: KL | None = None,
) -> Decision:
    """Choose on the first half of ``problems``, judge on the second; raises ``TrajectoryError`` for too few checkpoints."""
    if len(problems) < 4:
        raise InputError(f"choosing and gating a leap needs at least 4 validation problems, got {len(problems)}")
    start_s, counted = time.perf_counter(), _Counted(score, kl)
    choosing, gating = halves(problems)
    options = list(fitted(trajectory, candidates))
    if not options:
        raise TrajectoryError("no leap to try: give at least one method, window and coefficient")
    # With one candidate there is nothing to choose, so nothing is spent on it.
    chosen, answers = 0, [np.empty(0)]
    if len(options) > 1:
        chosen, answers = _choose([leap for _, leap in options], counted, choosing, candidates.budget)
    leap, verdict, looks = _gated(options[chosen][1], counted, gating, gate)
    tried = tuple(
        {**facts, "problems": len(one_P), "score": float(one_P.mean()) if len(one_P) else None}
        for (facts, _), one_P in zip(options, answers, strict=True)
    )
    cost = counted.spent, time.perf_counter() - start_s
    return Decision(trajectory.steps[-1], tried, leap, verdict, tuple(looks), *cost)


def halves(problems: Sequence[Problem]) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """The choosing half and the gate half."""
    return problems[: len(problems) // 2], problems[len(problems) // 2 :]


class _Counted:
    """Score and KL that remember how many completions they took."""

    def __init__(self, score: Score, kl: KL | None) -> None:
        self._score, self._kl, self.spent = score, kl, 0

    def score(self, leap: Leap | None, problems: Sequence[Problem]) -> Evaluation:
        found = self._score(leap, problems)
        self.spent += found.scores_PK.size
        return found

    def kl(self, leap: Leap, problems: Sequence[Problem]) -> float | None:
        if self._kl is None:
            return None
        self.spent += len(problems)  # one completion of the base for each
        return self._kl(leap, problems)


def _choose(
    leaps: Sequence[Leap], counted: _Counted, choosing: Sequence[Problem], budget: int | None
) -> tuple[int, list[NDArray[np.float64]]]:
    """Index of the winner, and each leap's mean score on the problems that it answered, in order."""
    whole = len(leaps) * len(choosing)
    left = whole if budget is None else min(budget, whole)
    if left < len(leaps):
        raise InputError(f"a budget of {left} answers cannot try {len(leaps)} candidates once; give more, or try fewer")
    rungs = 1 if left == whole else math.ceil(math.log2(len(leaps)))
    answers, alive, seen = [np.empty(0) for _ in leaps], list(range(len(leaps))), 0
    for after in reversed(range(rungs)):
        # An equal share of what is left for each rung, so fewer who are alive answer more.
        more = min(max(1, left // (after + 1) // len(alive)), left // len(alive), len(choosing) - seen)
        for i in tuple(alive) if more else ():
            try:
                found = counted.score(leaps[i], choosing[seen : seen + more])
                answers[i] = np.concatenate([answers[i], found.scores_PK.mean(axis=1)])
            except NotFiniteError:  # a broken model answers nothing, and may not end a training run
                answers[i] = np.empty(0)
                alive.remove(i)
        seen, left = seen + more, left - more * len(alive)
        # The first of equal means wins, so the recipe's order breaks ties.
        alive.sort(key=lambda i: (-answers[i].mean(), i))
        if after and alive:
            best_P = answers[alive[0]]
            alive = [i for i in alive[: -(-len(alive) // 2)] if not _clearly_worse(answers[i] - best_P)]
        if len(alive) < 2:
            break
    return (alive or [0])[0], answers


def _clearly_worse(difference_P: NDArray[np.float64]) -> bool:
    error = (
        float(difference_P.std(ddof=1)) / len(difference_P) ** 0.5 if len(difference_P) >= FEWEST_TO_DROP else math.inf
    )
    return float(difference_P.mean()) + CLEARLY * error < 0


def _gated(
    leap: Leap, counted: _Counted, gating: Sequence[Problem], gate: GateSettings
) -> tuple[Leap, GateVerdict, list[dict[str, object]]]:
    """Look, shrink and look again; the leap as it was last looked at, what was said of it, and every look."""
    error, origin, shrinks_left = 1 - gate.confidence, None, gate.shrinks
    looks: list[dict[str, object]] = []
    while True:
        ratio = norm_ratio(leap)
        try:
            if not math.isfinite(ratio):
                raise NotFiniteError("the leap has NaN or infinite weights, or leaves a run that has not moved")
            divergence = counted.kl(leap, gating)
            unsound = gate.unsound(ratio, divergence)
            if unsound and shrinks_left:
                verdict = GateVerdict(False, None, ratio, divergence, unsound)
            else:
                spent = error / 2 if shrinks_left else error
                error -= spent
                found = counted.score(leap, gating)
                origin = origin or counted.score(None, gating)
                settings, lengths = replace(gate, confidence=1 - spent), Lengths.of(found, origin)
                verdict = judge(found.scores_PK, origin.scores_PK, ratio, divergence, settings, lengths)
        except NotFiniteError as broken:
            # Half of NaN is NaN: what is broken is not shrunk.
            shrinks_left, verdict = 0, GateVerdict(False, None, ratio, None, (str(broken),))
        gain = verdict.difference and verdict.difference.value
        looks.append({"coefficient": leap.coefficient, "gain": gain, "reasons": list(verdict.reasons)})
        if verdict.accepted or not shrinks_left:
            return leap, verdict, looks
        leap, shrinks_left = replace(leap, coefficient=leap.coefficient / 2), shrinks_left - 1
