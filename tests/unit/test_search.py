"""The winner is chosen on one half of the problems and judged on the other."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rankleap.checkpoints import Delta
from rankleap.errors import InputError, TrajectoryError, UnknownNameError
from rankleap.leap import Candidates, Decision, GateSettings, Leap, search
from rankleap.records import Problem
from rankleap.trajectory import Trajectory

PROBLEMS = [Problem(f"validation-{i}", f"{i} + 1 =", str(i + 1)) for i in range(20)]
CHOOSING, GATING = PROBLEMS[:10], PROBLEMS[10:]
GATE = GateSettings(confidence=0.8, max_norm_ratio=10.0)
Merit = Callable[[Leap | None], float]


class Judge:
    """Scores a leap by its merit, with noise of its own on each problem, and remembers what it was asked."""

    def __init__(self, choosing: Merit, gating: Merit) -> None:
        self.merits, self.asked = (choosing, gating), []

    def __call__(self, leap: Leap | None, problems: Sequence[Problem]) -> NDArray[np.float64]:
        self.asked.append((leap, list(problems)))
        merit = self.merits[problems[0] in GATING](leap)
        return np.array([[merit + 0.01 * (int(p.answer) % 3), merit] for p in problems])


@pytest.fixture
def trajectory(memory_trajectory: Any) -> Trajectory:
    steps = (10, 20, 40, 50)
    path: list[Delta] = [step * torch.ones(3, 2) for step in steps]
    return memory_trajectory(steps, {"w": path})


def best_at(coefficient: float) -> Merit:
    return lambda leap: 0.0 if leap is None else 1.0 - abs(leap.coefficient - coefficient)


def run(trajectory: Trajectory, judge: Judge, *, methods: Sequence[str] = ("window",), **kwargs: Any) -> Decision:
    candidates = Candidates(methods, kwargs.pop("windows", (None,)), kwargs.pop("coefficients", (0.5, 1.0, 2.0)))
    return search(trajectory, candidates, judge, kwargs.pop("problems", PROBLEMS), kwargs.pop("gate", GATE), **kwargs)


def test_the_best_on_the_choosing_half_wins_whatever_the_gate_half_would_say(trajectory: Trajectory) -> None:
    decision = run(trajectory, Judge(choosing=best_at(1.0), gating=best_at(2.0)))
    assert decision.leap.coefficient == 1.0
    assert [row["coefficient"] for row in decision.tried] == [0.5, 1.0, 2.0]
    assert [row["score"] for row in decision.tried] == pytest.approx([0.5045, 1.0045, 0.0045], abs=1e-3)
    assert decision.step == 50


def test_the_gate_sees_the_winner_and_its_origin_on_the_other_half_only(trajectory: Trajectory) -> None:
    judge = Judge(best_at(1.0), best_at(1.0))
    decision = run(trajectory, judge)
    assert [problems for _, problems in judge.asked] == [CHOOSING] * 3 + [GATING] * 2
    assert [leap for leap, _ in judge.asked[3:]] == [decision.leap, None]
    assert decision.verdict.accepted
    assert decision.verdict.difference.value == pytest.approx(1.0)


def test_luck_on_the_choosing_half_does_not_pass_the_gate(trajectory: Trajectory) -> None:
    decision = run(trajectory, Judge(choosing=best_at(2.0), gating=lambda leap: 0.5))
    assert not decision.verdict.accepted
    assert "is not above zero" in decision.verdict.reasons[0]


def test_a_single_candidate_has_nothing_to_be_chosen_among(trajectory: Trajectory) -> None:
    judge = Judge(best_at(1.0), best_at(1.0))
    decision = run(trajectory, judge, coefficients=(1.0,))
    assert [problems for _, problems in judge.asked] == [GATING] * 2
    assert [row["score"] for row in decision.tried] == [None]


def test_the_first_of_equals_wins_every_time(trajectory: Trajectory) -> None:
    methods, flat = ("weight-linear", "window"), lambda leap: 0.5
    first, again = (run(trajectory, Judge(flat, flat), methods=methods) for _ in range(2))
    assert first.leap.forecast.method == again.leap.forecast.method == "weight-linear"
    assert first.tried == again.tried
    assert first.verdict == again.verdict


def test_scores_below_zero_are_compared_too(trajectory: Trajectory) -> None:
    decision = run(trajectory, Judge(lambda leap: best_at(2.0)(leap) - 5, best_at(1.0)))
    assert decision.leap.coefficient == 2.0


def test_every_method_window_and_coefficient_is_tried_once(trajectory: Trajectory) -> None:
    judge = Judge(best_at(1.0), best_at(1.0))
    decision = run(trajectory, judge, methods=("window", "relex"), windows=(2, None, 4, 9), coefficients=(0.5, 1.0))
    tried = [(row["method"], row["window"], row["coefficient"]) for row in decision.tried]
    assert tried == [(m, w, c) for m in ("window", "relex") for w in (2, 4) for c in (0.5, 1.0)]


def test_the_norm_of_the_winner_is_held_against_it(trajectory: Trajectory) -> None:
    judge = Judge(best_at(2.0), best_at(2.0))
    decision = run(trajectory, judge, gate=GateSettings(0.8, max_norm_ratio=1.5))
    # The window spans 30 steps of 50: a leap of twice its reach ends at 110.
    assert decision.verdict.norm_ratio == pytest.approx((50 + 2 * 30) / 50)
    assert decision.verdict.reasons == ("norm ratio 2.20 is above 1.50",)


def test_divergence_is_measured_on_the_winner_and_the_gate_half(trajectory: Trajectory) -> None:
    asked: list[tuple[Leap, list[Problem]]] = []

    def kl(leap: Leap, problems: Sequence[Problem]) -> float:
        asked.append((leap, list(problems)))
        return 0.5

    judge = Judge(best_at(1.0), best_at(1.0))
    decision = run(trajectory, judge, gate=GateSettings(0.8, 10.0, max_kl=0.1), kl=kl)
    assert asked == [(decision.leap, GATING)]
    assert decision.verdict.reasons == ("forward KL is 0.500, at most 0.100 is allowed",)


def test_too_few_problems_or_checkpoints_or_nothing_to_try_is_refused(trajectory: Trajectory) -> None:
    judge = Judge(best_at(1.0), best_at(1.0))
    with pytest.raises(InputError, match="at least 4 validation problems, got 3"):
        run(trajectory, judge, problems=PROBLEMS[:3])
    with pytest.raises(TrajectoryError, match="window needs at least 2 checkpoints, got 1"):
        run(trajectory.until(10), judge)
    with pytest.raises(TrajectoryError, match="no leap to try"):
        run(trajectory, judge, coefficients=())
    with pytest.raises(UnknownNameError, match="'windwo' does not exist; did you mean 'window'"):
        run(trajectory, judge, methods=("windwo",))
    assert judge.asked == []
