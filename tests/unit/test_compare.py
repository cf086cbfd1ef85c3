"""Where a curve arrives, and what a leap saved: one rule for both arms."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankleap.arena import reach, saved_fraction, smooth, summarise

accuracies = st.lists(st.floats(0, 1), min_size=2, max_size=8)


def curve(*accuracies: float, every: int = 10, rate_s: float = 2.0) -> list[dict[str, float]]:
    return [{"step": every * i, "wall_s": rate_s * every * i, "accuracy": a} for i, a in enumerate(accuracies)]


def test_arrival_is_interpolated_between_two_points() -> None:
    assert reach(curve(0.0, 0.4, 0.8), 0.6, "step") == pytest.approx(15)
    assert reach(curve(0.0, 0.4, 0.8), 0.6, "wall_s") == pytest.approx(30)
    assert reach(curve(0.0, 0.4, 0.8), 0.4, "step") == pytest.approx(10)


def test_a_curve_that_starts_above_the_target_is_there_at_once() -> None:
    assert reach(curve(0.5, 0.6), 0.4, "step") == 0


def test_a_target_that_is_never_reached_has_no_arrival() -> None:
    assert reach(curve(0.0, 0.4, 0.5), 0.6, "step") is None
    assert saved_fraction(curve(0.0, 0.9), curve(0.0, 0.5), "step") is None


def test_a_lucky_point_is_no_arrival() -> None:
    lucky = curve(0.0, 0.9, 0.3, 0.3, 0.9)
    assert smooth(lucky).tolist() == pytest.approx([0, 0.5, 0.5, 0.5, 0.9])
    assert reach(lucky, 0.6, "step") == pytest.approx(32.5)


def test_a_plateau_is_reached_where_it_starts() -> None:
    assert reach(curve(0.0, 0.5, 0.5, 0.5), 0.5, "step") == pytest.approx(10)


@given(accuracies)
def test_an_arm_saves_nothing_over_itself(values: list[float]) -> None:
    saved = saved_fraction(curve(*values), curve(*values), "step")
    assert saved is None or saved == pytest.approx(0)


@given(accuracies, st.floats(0, 1))
def test_arrival_lies_within_the_curve_and_a_higher_target_comes_no_earlier(values: list[float], target: float) -> None:
    low, high = reach(curve(*values), target / 2, "step"), reach(curve(*values), target, "step")
    assert low is None or 0 <= low <= 10 * (len(values) - 1)
    assert high is None or (low is not None and low <= high + 1e-6)


def test_the_fraction_saved_is_measured_against_the_plain_arms_own_arrival() -> None:
    plain, leap = curve(0.0, 0.4, 0.8, 0.8, 0.8), curve(0.0, 0.8, 0.8)
    assert saved_fraction(plain, leap, "step") == pytest.approx(0.5)


def test_a_summary_compares_arms_of_one_learning_rate() -> None:
    def arm(name: str, rate: float, *values: float) -> dict[str, object]:
        points = [{**p, "ci_low": 0.0, "ci_high": 1.0} for p in curve(*values)]
        return {"name": name, "learning_rate": rate, "curve": points}

    arms = [arm("plain", 1e-3, 0.0, 0.4, 0.8), arm("leap", 1e-3, 0.0, 0.8, 0.8), arm("plain", 1e-4, 0.0, 0.1, 0.2)]
    summary = summarise(arms)
    assert summary["target_accuracy"] == {"0.001": pytest.approx(0.8), "0.0001": pytest.approx(0.2)}
    assert summary["steps_saved_fraction"] == {"0.001": pytest.approx(0.5)}
    assert [row["steps_to_target"] for row in summary["arms"]] == [20, 10, 20]
