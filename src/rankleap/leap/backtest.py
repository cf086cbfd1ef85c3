"""Back-test: would leaps along this run have come nearer to where it went? Fitted on its first k checkpoints, for every k.

The very leap X that a candidate would make from checkpoint k is held against each later checkpoint W_t, over all tensors:

    skill over a rival = 1 - Σ‖X - W_t‖² / Σ‖rival - W_t‖²       1 exact, 0 no better, negative worse

summed over k and over the t at or beyond the step where X claims to stand (a leap beyond the last checkpoint aims at that
one instead). Rivals are standing still (*hold*), the base, the last increment repeated, and X's own forecast of step k,
which is its denoising part.
A leap has to beat hold, the base and its own denoising. Noise round a point and a driftless walk fail in expectation
whatever the method: what is unpredictable adds ‖X - W_k‖² to the error of standing still. What only denoises claims to be no
forecast, so it has to beat the base alone (else it undoes the run), and is told so: at the tuned rate of `sums` an average is
further from what came than standing still, and better. An error in weights is no error in answers: where accuracy is
measured as well (leap against standing still, each at every k), accuracy decides.

From Gram matrices alone for all methods that mix checkpoints, and products from LoRA stay products for the others.
Shapes: T steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

import torch
from torch import Tensor

from rankleap.checkpoints import Delta, inner
from rankleap.errors import TrajectoryError
from rankleap.leap.apply import Leap
from rankleap.leap.search import Candidates, Score
from rankleap.predictors import Mixture, get_predictor
from rankleap.records import Problem
from rankleap.trajectory import Trajectory

LEAST_ORIGINS = 2
RIVALS = ("hold", "base", "repeat-last", "own denoising")


@dataclass(frozen=True, slots=True)
class Skill:
    """How one candidate would have done; ``against`` is empty where there were too few checkpoints to tell."""

    method: str
    window: int
    coefficient: float
    against: dict[str, float]
    """Skill over each rival."""
    horizons: dict[int, float]
    """Skill over hold by the number of checkpoints ahead."""
    denoises: bool
    accuracy_gain: float | None
    reason: str
    """Why not to leap so; empty if nothing speaks against it."""


@dataclass(frozen=True, slots=True)
class BackTest:
    """Every candidate's skill, the verdict on all of them, and the completions that it took."""

    skills: tuple[Skill, ...]
    samples_spent: int

    @property
    def refusal(self) -> str | None:
        """Why not to leap at all; ``None`` if a candidate passed or could not be tested."""
        if not self.skills or any(not skill.reason for skill in self.skills):
            return None
        best = max(self.skills, key=lambda skill: skill.against["hold"])
        return f"do not leap: the best of {len(self.skills)}, {best.method} × {best.coefficient:g}, is {best.reason}"


def backtest(
    trajectory: Trajectory, candidates: Candidates, score: Score | None = None, problems: Sequence[Problem] = ()
) -> BackTest:
    """Test every candidate; with ``score`` in accuracy too, on ``problems`` that the gate will not see."""
    have, grams = len(trajectory.steps), cache(trajectory.gram)
    prefixes = {k: _Seen(trajectory, k, grams) for k in range(1, have)}
    answers = _Answers(score, problems)
    skills = []
    for method, window, predictor in candidates.predictors(trajectory):
        # As many checkpoints as it will see at the end, but for two to be tested on; half of all where it sees all.
        start = max(predictor(trajectory).needs, min(window or (have + 1) // 2, have - LEAST_ORIGINS))
        forecasts = {}
        for k in range(start, have) if have - start >= LEAST_ORIGINS else ():
            try:
                forecasts[k] = predictor(prefixes[k]).fit(prefixes[k])
            except TrajectoryError:  # its first accuracies may be all alike, say
                continue
        for coefficient in candidates.coefficients:
            further = None if candidates.target is None else candidates.target - trajectory.steps[-1]
            leaps = {
                k: _within(Leap(one, coefficient, further and trajectory.steps[k - 1] + further), trajectory.steps[-1])
                for k, one in forecasts.items()
            }
            skills.append(_skill((method, window or have, coefficient), leaps, prefixes, answers))
    return BackTest(tuple(skills), answers.spent)


class _Seen(Trajectory):
    """The first checkpoints of a trajectory; all of these share its Gram matrices, which are read once."""

    def __init__(self, whole: Trajectory, count: int, grams: Callable[[str], Tensor]) -> None:
        super().__init__(whole.steps[:count], whole.shapes)
        self.whole, self.grams = whole, grams

    def delta(self, name: str, step: int) -> Delta:
        return self.whole.delta(name, step)

    def until(self, step: int) -> Trajectory:
        return self.whole.until(min(step, self.steps[-1]))

    def gram(self, name: str, first: int = 0) -> Tensor:
        return self.grams(name)[first : len(self.steps), first : len(self.steps)]

    def rivals(self) -> Tensor:
        """Squared errors of hold, base and repeat-last at every step, 3 × T; linear in G, so of all tensors at once."""
        step_T, k = torch.tensor(self.whole.steps, dtype=torch.float64), len(self.steps)
        gram_TT = torch.stack([self.grams(name) for name in self.shapes]).sum(0)
        last_T, before_T = torch.eye(len(step_T), dtype=torch.float64)[[k - 1, k - 2]]
        # Before the first checkpoint there was the base, at step 0.
        per_step_T = (last_T - before_T) / (step_T[k - 1] - step_T[k - 2]) if k > 1 else last_T / step_T[0].clamp_min(1)
        repeat_TT = last_T + (step_T - step_T[k - 1])[:, None] * per_step_T
        return torch.stack([_mixed(last_T, gram_TT), gram_TT.diagonal(), _mixed(repeat_TT, gram_TT).diagonal()])


class _Answers:
    """Mean accuracy of leaps and of the checkpoints that they leave, each of these scored once."""

    def __init__(self, score: Score | None, problems: Sequence[Problem]) -> None:
        self._score, self._problems, self.spent = score, problems, 0
        self._origins: dict[int, float] = {}

    def gain(self, leaps: dict[int, Leap], prefixes: dict[int, _Seen]) -> float | None:
        if self._score is None or not leaps:
            return None
        for k in leaps.keys() - self._origins.keys():
            self._origins[k] = self._mean(Leap(get_predictor("hold").fit(prefixes[k]), 1.0))
        return fmean(self._mean(leap) - self._origins[k] for k, leap in leaps.items())

    def _mean(self, leap: Leap) -> float:
        assert self._score is not None
        found = self._score(leap, self._problems)
        self.spent += found.scores_PK.size
        return float(found.scores_PK.mean())


def _within(leap: Leap, end: int) -> Leap:
    """The same leap, aimed nearer where it would end beyond what is known."""
    last = leap.trajectory.steps[-1]
    if last + leap.ahead <= end:
        return leap
    return replace(leap, step=max(last, leap.start + (end - leap.start) / leap.coefficient))


def _skill(
    named: tuple[str, int, float], leaps: dict[int, Leap], prefixes: dict[int, _Seen], answers: _Answers
) -> Skill:
    if not leaps:
        return Skill(*named, {}, {}, False, None, "")
    miss, rival, ahead = 0.0, dict.fromkeys(RIVALS, 0.0), {}
    for k, leap in leaps.items():
        steps = prefixes[k].whole.steps
        # What ends beyond all that is known is held against the last.
        claimed = min(steps[k - 1] + leap.ahead, steps[-1])
        for t, errors in _errors(leap, prefixes[k]):
            sums = ahead.setdefault(t - k + 1, [0.0, 0.0])
            sums[0], sums[1] = sums[0] + errors[0], sums[1] + errors[1]
            if steps[t] >= claimed:
                miss += errors[0]
                rival = {name: rival[name] + e for name, e in zip(RIVALS, errors[1:], strict=True)}
    against = {name: 1 - miss / error if error > 0 else 0.0 for name, error in rival.items()}
    denoises = all(leap.ahead == 0 for leap in leaps.values())
    if denoises or miss == rival["own denoising"]:  # one that looks at no step has no such part
        against.pop("own denoising")
    gain = answers.gain(leaps, prefixes)
    reason = _reason(against, denoises) if gain is None else "" if gain > 0 else f"no gain in accuracy ({gain:+.3f})"
    return Skill(
        *named, against, {h: 1 - x / y if y > 0 else 0.0 for h, (x, y) in ahead.items()}, denoises, gain, reason
    )


def _reason(against: dict[str, float], denoises: bool) -> str:
    ahead = {"hold": "standing still", "own denoising": "its own forecast of the last step"}
    told = {"base": "the base itself", **({} if denoises else ahead)}
    lost = [f"{words} ({against[rival]:+.2f})" for rival, words in told.items() if against.get(rival, 1.0) <= 0]
    return f"no nearer to what came than {' and '.join(lost)}" if lost else ""


def _errors(leap: Leap, seen: _Seen) -> Iterator[tuple[int, list[float]]]:
    """Index of each later step, with the squared errors of the leap and of its rivals there."""
    own_2T = torch.zeros(2, len(seen.whole.steps), dtype=torch.float64)
    for name in seen.shapes:
        own_2T[0] += _distances(leap, leap.step, seen, name)
        own_2T[1] += _distances(leap, float(seen.steps[-1]), seen, name)
    errors = torch.cat([own_2T[:1], seen.rivals(), own_2T[1:]])
    yield from ((t, errors[:, t].tolist()) for t in range(len(seen.steps), len(seen.whole.steps)))


def _distances(leap: Leap, step: float | None, seen: _Seen, name: str) -> Tensor:
    """‖X - Δ_t‖² for one tensor and all later steps, T; zero at the steps seen."""
    forecast, whole, k = leap.forecast, seen.whole, len(seen.steps)
    gram_TT = seen.grams(name)
    if isinstance(forecast, Mixture):
        weight_T = forecast.weights(name, step, leap.coefficient)
        return _mixed(torch.nn.functional.pad(weight_T, (0, len(whole.steps) - k)), gram_TT)
    delta = forecast.delta(name, step, leap.coefficient)
    cross_T = torch.zeros(len(whole.steps), dtype=torch.float64)
    for t in range(k, len(whole.steps)):
        cross_T[t] = inner(delta, whole.delta(name, whole.steps[t]))
    return inner(delta, delta) - 2 * cross_T + gram_TT.diagonal()


def _mixed(weight_T: Tensor, gram_TT: Tensor) -> Tensor:
    """‖Σ w Δ - Δ_t‖² for all t; for rows of weights, a row each."""
    cross_T = weight_T @ gram_TT
    return ((cross_T * weight_T).sum(-1, keepdim=True) - 2 * cross_T + gram_TT.diagonal()).clamp_min(0)
