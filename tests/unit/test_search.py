"""The winner is chosen on one half of the problems and judged on the other."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from rankleap.checkpoints import Delta
from rankleap.errors import InputError, NotFiniteError, TrajectoryError, UnknownNameError
from rankleap.evaluation import Evaluation
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

    def __call__(self, leap: Leap | None, problems: Sequence[Problem]) -> Evaluation:
        self.asked.append((leap, list(problems)))
        merit = self.merits[problems[0] in GATING](leap)
        return answered([[merit + 0.01 * (int(p.answer) % 3), merit] for p in problems])

    @property
    def completions(self) -> int:
        return sum(2 * len(problems) for _, problems in self.asked)


def answered(scores: Any, mean_tokens: float = 10.0, truncation_rate: float = 0.0) -> Evaluation:
    return Evaluation("t", (), np.array(scores), {}, mean_tokens, truncation_rate)


@pytest.fixture
def trajectory(memory_trajectory: Any) -> Trajectory:
    steps = (10, 20, 40, 50)
    path: list[Delta] = [step * torch.ones(3, 2) for step in steps]
    return memory_trajectory(steps, {"w": path})


def best_at(coefficient: float) -> Merit:
    return lambda leap: 0.0 if leap is None else 1.0 - abs(leap.coefficient - coefficient)


def run(trajectory: Trajectory, judge: Judge, *, methods: Sequence[str] = ("window",), **kwargs: Any) -> Decision:
    windows, coefficients = kwargs.pop("windows", (None,)), kwargs.pop("coefficients", (0.5, 1.0, 2.0))
    more = {key: kwargs.pop(key) for key in ("target", "budget") if key in kwargs}
    candidates = Candidates(methods, windows, coefficients, **more)
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
    assert decision.verdict.difference
    assert decision.verdict.difference.value == pytest.approx(1.0)
    assert decision.samples_spent == judge.completions == 2 * 50


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
    assert decision.samples_spent == judge.completions + len(GATING)
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


def test_a_target_must_lie_ahead_and_is_what_the_leap_aims_at(trajectory: Trajectory) -> None:
    judge = Judge(best_at(1.0), best_at(1.0))
    assert run(trajectory, judge, target=90).leap.ahead == pytest.approx(40)
    for behind in (50, 20, math.nan):
        with pytest.raises(TrajectoryError, match=r"ahead of the last checkpoint, step 50; got"):
            run(trajectory, Judge(best_at(1.0), best_at(1.0)), target=behind)


@pytest.mark.parametrize(("coefficient", "ahead"), [(0.0, 0), (1.0, 30), (2.0, 60)])
def test_a_leap_says_how_far_ahead_it_stands(trajectory: Trajectory, coefficient: float, ahead: float) -> None:
    assert run(trajectory, Judge(best_at(1), best_at(1)), coefficients=(coefficient,)).leap.ahead == ahead
    denoising = run(trajectory, Judge(best_at(1), best_at(1)), methods=("relex",), coefficients=(0.5,)).leap
    assert denoising.ahead == 0  # half of the way from the base is behind


MANY = tuple(i / 10 for i in range(1, 17))


@pytest.mark.parametrize("budget", [16, 40, 64, 100, 159])
def test_halving_keeps_to_its_budget_and_finds_the_best(trajectory: Trajectory, budget: int) -> None:
    first, again = Judge(best_at(0.7), best_at(0.7)), Judge(best_at(0.7), best_at(0.7))
    decision = run(trajectory, first, coefficients=MANY, budget=budget)
    assert decision.leap.coefficient == 0.7
    choosing = [(leap.coefficient, problems) for leap, problems in first.asked[:-2] if leap]
    assert budget / 2 <= sum(len(problems) for _, problems in choosing) <= budget
    assert decision.samples_spent == first.completions
    answered_by = {c: [p for who, problems in choosing if who == c for p in problems] for c in MANY}
    # Everyone answers the first problems, the better ones more, and nobody one twice.
    assert all(problems == CHOOSING[: len(problems)] for problems in answered_by.values())
    assert len(answered_by[0.7]) == max(map(len, answered_by.values()))
    assert [row["problems"] for row in decision.tried] == [len(answered_by[c]) for c in MANY]
    assert run(trajectory, again, coefficients=MANY, budget=budget).tried == decision.tried


def test_a_budget_that_suffices_changes_nothing(trajectory: Trajectory) -> None:
    free, enough = Judge(best_at(0.7), best_at(0.7)), Judge(best_at(0.7), best_at(0.7))
    decisions = run(trajectory, free, coefficients=MANY), run(trajectory, enough, coefficients=MANY, budget=160)
    assert decisions[0].tried == decisions[1].tried
    assert [asked for _, asked in free.asked] == [asked for _, asked in enough.asked]


def test_who_is_clearly_worse_goes_before_the_half(trajectory: Trajectory) -> None:
    problems = [Problem(f"validation-{i}", f"{i} + 1 =", str(i + 1)) for i in range(200)]
    judge = Judge(lambda leap: float(leap is not None and leap.coefficient == 0.7), best_at(0.7))
    decision = run(trajectory, judge, coefficients=MANY, budget=640, problems=problems)
    assert {row["problems"] for row in decision.tried} == {10}  # one is left after the first round of 160
    assert decision.leap.coefficient == 0.7


def test_a_budget_that_cannot_try_everyone_once_is_refused(trajectory: Trajectory) -> None:
    judge = Judge(best_at(1.0), best_at(1.0))
    with pytest.raises(InputError, match="a budget of 2 answers cannot try 3 candidates once"):
        run(trajectory, judge, budget=2)
    assert judge.asked == []


def test_a_refused_leap_is_halved_until_it_passes_and_every_look_is_told(trajectory: Trajectory) -> None:
    judge = Judge(best_at(2.0), best_at(0.5))
    decision = run(trajectory, judge, coefficients=(2.0,), gate=GateSettings(0.8, 10.0, shrinks=3))
    assert decision.verdict.accepted
    assert [look["coefficient"] for look in decision.looks] == [2.0, 1.0]
    assert decision.looks[0]["reasons"] and not decision.looks[1]["reasons"]
    # The origin answers once for all looks.
    assert [leap and leap.coefficient for leap, _ in judge.asked] == [2.0, None, 1.0]
    assert decision.samples_spent == judge.completions == 2 * 30


def test_a_leap_that_never_passes_is_rejected_after_its_last_shrink(trajectory: Trajectory) -> None:
    decision = run(trajectory, Judge(best_at(2), lambda leap: 0.5), gate=GateSettings(0.8, 10.0, shrinks=2))
    assert not decision.verdict.accepted
    assert [look["coefficient"] for look in decision.looks] == [2.0, 1.0, 0.5]


def test_too_large_a_norm_shrinks_without_a_look_at_the_scores(trajectory: Trajectory) -> None:
    judge = Judge(best_at(2.0), best_at(0.5))
    decision = run(trajectory, judge, coefficients=(2.0,), gate=GateSettings(0.8, 1.5, shrinks=2))
    assert [look["coefficient"] for look in decision.looks] == [2.0, 1.0, 0.5]
    assert [leap and leap.coefficient for leap, _ in judge.asked] == [0.5, None]
    # All of the error was left for the one look: a gain of this size needs no more than 0.8 asks.
    assert decision.verdict.accepted


@pytest.mark.parametrize(("tokens", "truncated"), [(25.0, 0.0), (4.0, 0.0), (10.0, 0.25)])
def test_completions_that_ramble_or_break_off_shrink_the_leap(
    trajectory: Trajectory, tokens: float, truncated: float
) -> None:
    def score(leap: Leap | None, problems: Sequence[Problem]) -> Evaluation:
        broken = leap is not None and leap.coefficient > 0.5
        return answered(
            [[float(leap is not None)] * 2] * len(problems), *((tokens, truncated) if broken else (10, 0.1))
        )

    candidates, gate = Candidates(("window",), (None,), (1.0,)), GateSettings(0.8, 10.0, shrinks=1)
    decision = search(trajectory, candidates, score, PROBLEMS, gate)
    assert decision.verdict.accepted and decision.leap.coefficient == 0.5
    (reason,) = decision.looks[0]["reasons"]  # pyright: ignore[reportGeneralTypeIssues]
    assert ("truncation rises by 0.150" if tokens == 10 else "times as long, outside 0.50 to 2.00") in reason


def test_a_broken_candidate_is_passed_over_and_a_broken_winner_is_rejected(trajectory: Trajectory) -> None:
    def score(leap: Leap | None, problems: Sequence[Problem]) -> Evaluation:
        assert leap is None or leap.coefficient < math.inf, "what has no finite weights is asked nothing"
        if leap and leap.coefficient >= 2:
            raise NotFiniteError("the leap's logits have NaN or infinity")
        return answered([[float(leap is not None)] * 2] * len(problems))

    for coefficients, chosen in (((2.0, 1.0), 1.0), ((2.0, 3.0), 2.0), ((3.0,), 3.0), ((math.inf,), math.inf)):
        candidates = Candidates(("window",), (None,), coefficients)
        decision = search(trajectory, candidates, score, PROBLEMS, GateSettings(0.8, 10.0, shrinks=2))
        assert decision.leap.coefficient == chosen
        assert decision.verdict.accepted == (chosen == 1)
        assert chosen == 1 or "NaN or inf" in decision.verdict.reasons[0]
        assert chosen == 1 or decision.verdict.difference is None


@pytest.mark.parametrize("shrinks", [0, 1, 4])
def test_looking_again_accepts_no_more_chance_gains_than_the_level(trajectory: Trajectory, shrinks: int) -> None:
    problems = [Problem(f"validation-{i}", "", "") for i in range(256)]
    generator, runs, level = np.random.default_rng(0), 600, 0.2

    # Every look draws its answers anew, which is where several looks inflate most.
    def score(leap: Leap | None, asked: Sequence[Problem]) -> Evaluation:
        return answered(generator.random((len(asked), 2)))

    candidates, gate = Candidates(("window",), (2,), (1.0,)), GateSettings(1 - level, 10.0, shrinks=shrinks)
    decisions = [search(trajectory, candidates, score, problems, gate) for _ in range(runs)]
    accepted = sum(decision.verdict.accepted for decision in decisions) / runs
    assert accepted <= level + NormalDist().inv_cdf(0.999) * (level * (1 - level) / runs) ** 0.5
    assert accepted > level / 3
