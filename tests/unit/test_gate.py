"""The gate: equal is not better, a clear gain passes, and every reason to refuse is said."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rankleap.errors import InputError
from rankleap.evaluation import paired_difference
from rankleap.leap import GateSettings, Lengths, judge

SETTINGS = GateSettings(confidence=0.8, max_norm_ratio=4.0)
Scores = NDArray[np.float64]

scores = st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=20).map(np.array)


def better(by: float, problems: int = 50) -> tuple[Scores, Scores]:
    """Leap and origin, the leap better by so much on average."""
    generator = np.random.default_rng(0)
    origin = generator.random((problems, 4))
    return origin + by + 0.1 * generator.standard_normal((problems, 4)), origin


@given(scores)
def test_equal_scores_are_rejected(same: Scores) -> None:
    verdict = judge(same, same.copy(), 1.0, None, SETTINGS)
    assert not verdict.accepted
    assert verdict.difference and verdict.difference.value == 0
    assert len(verdict.reasons) == 1
    assert "is not above zero" in verdict.reasons[0]


def test_a_clear_gain_is_accepted_and_its_reverse_is_not() -> None:
    leap, origin = better(0.1)
    assert judge(leap, origin, 1.5, None, SETTINGS).reasons == ()
    assert judge(leap, origin, 1.5, None, SETTINGS).accepted
    assert not judge(origin, leap, 1.5, None, SETTINGS).accepted


@given(st.data())
def test_a_leap_and_its_origin_never_both_win(data: st.DataObject) -> None:
    first = data.draw(scores)
    second = np.array(data.draw(st.lists(st.floats(0, 1), min_size=first.size, max_size=first.size))).reshape(
        first.shape
    )
    one, other = judge(first, second, 1.0, None, SETTINGS), judge(second, first, 1.0, None, SETTINGS)
    assert not (one.accepted and other.accepted)
    assert one.difference and other.difference
    assert one.difference.value == pytest.approx(-other.difference.value)
    assert one.difference.low == pytest.approx(-other.difference.high)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.99])
def test_the_gain_must_exceed_its_standard_error_times_the_one_sided_quantile(confidence: float) -> None:
    _, origin = better(0.0)
    noise = np.random.default_rng(1).standard_normal((50, 1))
    noise = noise - noise.mean()
    threshold = NormalDist().inv_cdf(confidence) * float(noise.std(ddof=1)) / 50**0.5
    settings = replace(SETTINGS, confidence=confidence)
    assert judge(origin + noise + threshold + 1e-6, origin, 1.0, None, settings).accepted
    assert not judge(origin + noise + threshold - 1e-6, origin, 1.0, None, settings).accepted


def test_the_difference_is_reported_as_the_paired_one() -> None:
    leap, origin = better(0.1)
    assert judge(leap, origin, 1.0, None, SETTINGS).difference == paired_difference(leap, origin)


def test_pairing_sees_a_gain_that_the_problems_spread_hides() -> None:
    origin = np.linspace(0, 1, 40)[:, None] @ np.ones((1, 2))
    verdict = judge(origin + 0.01, origin, 1.0, None, replace(SETTINGS, confidence=0.999))
    assert verdict.accepted


def test_every_reason_is_given() -> None:
    same = np.ones((4, 2))
    verdict = judge(same, same, 4.5, 0.3, GateSettings(0.8, 4.0, max_kl=0.2))
    assert verdict.reasons == (
        "gain +0.000 ± 0.000 is not above zero",
        "norm ratio 4.50 is above 4.00",
        "forward KL is 0.300, at most 0.200 is allowed",
    )
    assert (verdict.norm_ratio, verdict.kl) == (4.5, 0.3)


@pytest.mark.parametrize("ratio", [4.01, float("inf"), float("nan")])
def test_a_norm_ratio_that_is_not_within_its_limit_rejects(ratio: float) -> None:
    assert judge(*better(0.1), 4.0, None, SETTINGS).accepted
    (reason,) = judge(*better(0.1), ratio, None, SETTINGS).reasons
    assert reason.startswith("norm ratio")


@pytest.mark.parametrize("kl", [0.21, float("inf"), float("nan"), None])
def test_a_divergence_that_is_not_within_its_limit_rejects(kl: float | None) -> None:
    limited = GateSettings(0.8, 4.0, max_kl=0.2)
    assert judge(*better(0.1), 1.0, 0.2, limited).accepted
    (reason,) = judge(*better(0.1), 1.0, kl, limited).reasons
    assert reason.startswith("forward KL")


def test_a_divergence_without_a_limit_is_only_reported() -> None:
    verdict = judge(*better(0.1), 1.0, 9.0, SETTINGS)
    assert verdict.accepted
    assert verdict.kl == 9.0


def test_a_score_that_is_no_number_is_an_error() -> None:
    leap, origin = better(0.1)
    leap[3, 1] = float("nan")
    with pytest.raises(InputError, match="1 non-finite"):
        judge(leap, origin, 1.0, None, SETTINGS)


@pytest.mark.parametrize(
    ("ratio", "rise", "said"),
    [
        (2.0, 0.1, None),
        (0.5, -0.5, None),
        (2.01, 0.0, "2.01 times as long"),
        (0.49, 0.0, "0.49 times as long"),
        (1.0, 0.11, "truncation rises by 0.110, at most 0.100"),
        (float("nan"), 0.0, "nan times as long"),
    ],
)
def test_completions_that_grow_shrink_or_break_off_reject(ratio: float, rise: float, said: str | None) -> None:
    verdict = judge(*better(0.1), 1.0, None, SETTINGS, Lengths(ratio, rise))
    assert verdict.accepted == (said is None)
    assert said is None or said in verdict.reasons[0]
