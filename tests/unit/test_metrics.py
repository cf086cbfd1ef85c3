"""Laws, closed forms and simulated coverage of the metrics."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rankleap.errors import InputError
from rankleap.evaluation.metrics import (
    avg_at_k,
    paired_difference,
    pass_at_k,
    ratio_of_sums,
    smallest_resolvable_difference,
)
from rankleap.records import Estimate

SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=9)
BINARY = arrays(float, SHAPES, elements=st.sampled_from([0.0, 1.0]))
GRADED = arrays(float, SHAPES, elements=st.floats(-2, 2, width=16))
PAIRS = SHAPES.flatmap(lambda shape: st.tuples(*[arrays(float, shape, elements=st.floats(-2, 2, width=16))] * 2))


@given(BINARY)
def test_pass_at_1_of_binary_scores_is_the_average(scores: np.ndarray) -> None:
    one, average = pass_at_k(scores, 1), avg_at_k(scores)
    assert [one.value, one.low, one.high] == pytest.approx([average.value, average.low, average.high], abs=1e-7)


@given(BINARY)
def test_pass_at_all_samples_is_the_share_of_problems_ever_solved(scores: np.ndarray) -> None:
    assert pass_at_k(scores, scores.shape[1]).value == scores.max(axis=1).mean()


@given(BINARY)
def test_pass_at_k_never_falls_as_k_grows(scores: np.ndarray) -> None:
    values = [pass_at_k(scores, k).value for k in range(1, scores.shape[1] + 1)]
    assert (np.diff(values) >= -1e-12).all()


@given(BINARY, st.data())
def test_pass_at_k_is_the_mean_over_all_draws_of_k_samples(scores: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, scores.shape[1]))
    draws = [scores[:, list(chosen)].max(axis=1) for chosen in combinations(range(scores.shape[1]), k)]
    assert pass_at_k(scores, k).value == pytest.approx(np.mean(draws))


def test_pass_at_k_matches_the_closed_form_with_many_samples() -> None:
    scores = np.zeros((2, 2000))
    scores[0, :3] = 1
    assert pass_at_k(scores, 700).value == pytest.approx((1 - comb(1997, 700) / comb(2000, 700)) / 2)


def test_a_partial_score_is_no_pass() -> None:
    assert pass_at_k([[0.99, 0.5], [1.0, 0.0]], 2).value == 0.5
    assert avg_at_k([[0.99, 0.5], [1.0, 0.0]]).value == pytest.approx(0.6225)


@given(st.one_of(BINARY, GRADED))
def test_an_interval_holds_its_value_and_bounded_scores_stay_bounded(scores: np.ndarray) -> None:
    estimate = avg_at_k(scores)
    assert estimate.low <= estimate.value <= estimate.high
    if scores.min() >= 0 and scores.max() <= 1:
        assert 0 <= estimate.low <= estimate.high <= 1


@given(GRADED)
def test_the_order_of_problems_and_samples_does_not_matter(scores: np.ndarray) -> None:
    turned = avg_at_k(scores[::-1, ::-1])
    assert avg_at_k(scores).value == pytest.approx(turned.value)
    assert avg_at_k(scores).low == pytest.approx(turned.low)


def test_an_interval_is_never_narrowed_by_repeating_samples() -> None:
    scores = np.random.default_rng(0).integers(0, 2, (20, 4)).astype(float)
    assert avg_at_k(np.tile(scores, 5)) == avg_at_k(scores)


def test_no_problem_solved_leaves_room_above_zero() -> None:
    estimate = avg_at_k(np.zeros((64, 8)))
    assert estimate.low == estimate.value == 0
    assert 0.04 < estimate.high < 0.07
    assert avg_at_k(np.ones((64, 8))).low == pytest.approx(1 - estimate.high)


def test_binary_samples_that_happen_to_agree_are_no_certainty() -> None:
    estimate = avg_at_k([[1.0, 0.0, 0.0]] * 3)
    assert estimate.low < 0.2 < 0.5 < estimate.high
    graded = avg_at_k([[0.25, 0.5]] * 3)
    assert graded.low == graded.high == 0.375


@pytest.mark.parametrize(("a", "b"), [(2, 2), (0.2, 4), (4, 0.2), (0.02, 10)])
def test_intervals_cover_the_true_average_95_times_in_100(a: float, b: float) -> None:
    generator = np.random.default_rng(0)
    truth = a / (a + b)
    chances = generator.beta(a, b, (400, 48, 1))
    trials = [avg_at_k(scores) for scores in (generator.random((400, 48, 6)) < chances).astype(float)]
    covered = np.mean([trial.low <= truth <= trial.high for trial in trials])
    assert 0.92 < covered < 0.995


def test_the_plain_t_interval_would_not_cover_near_zero() -> None:
    generator = np.random.default_rng(0)
    scores = (generator.random((400, 30, 1)) < 0.01).astype(float)
    zero = np.zeros((30, 1))
    plain = [paired_difference(trial, zero) for trial in scores]
    wilson = [avg_at_k(trial) for trial in scores]
    assert np.mean([e.low <= 0.01 <= e.high for e in plain]) < 0.35
    assert np.mean([e.low <= 0.01 <= e.high for e in wilson]) > 0.92


def test_paired_intervals_cover_and_resolve_as_promised() -> None:
    generator = np.random.default_rng(1)
    chance = generator.beta(2, 2, (400, 40, 1)) * 0.8
    a = (generator.random((400, 40, 8)) < chance + 0.1).astype(float)
    b = (generator.random((400, 40, 8)) < chance).astype(float)
    trials = [paired_difference(x, y) for x, y in zip(a, b, strict=True)]
    assert 0.92 < np.mean([trial.low <= 0.1 <= trial.high for trial in trials]) < 0.98
    needed = float(np.mean([smallest_resolvable_difference(x, y) for x, y in zip(a, b, strict=True)]))
    shifted = [trial.low - 0.1 + needed > 0 for trial in trials]
    assert 0.74 < np.mean(shifted) < 0.86


@given(GRADED)
def test_identical_scores_differ_by_exactly_nothing(scores: np.ndarray) -> None:
    assert paired_difference(scores, scores) == Estimate(0.0, 0.0, 0.0)


@given(PAIRS)
def test_swapping_the_sides_negates_the_difference(pair: tuple[np.ndarray, np.ndarray]) -> None:
    there, back = paired_difference(*pair), paired_difference(*pair[::-1])
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


@given(PAIRS)
def test_a_difference_is_the_difference_of_averages(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    assert paired_difference(a, b).value == pytest.approx(avg_at_k(a).value - avg_at_k(b).value)


def test_pairing_is_sharper_than_two_separate_intervals() -> None:
    generator = np.random.default_rng(2)
    a = generator.random((50, 1)).round() * np.ones((1, 4))
    b = np.where(generator.random(a.shape) < 0.05, 1 - a, a)
    paired, alone = paired_difference(a, b), avg_at_k(a)
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)


def test_sides_may_have_different_numbers_of_samples() -> None:
    assert paired_difference([[1, 1], [0, 1]], [[1], [0]]).value == 0.25


def test_the_bootstrap_agrees_with_the_closed_forms() -> None:
    generator = np.random.default_rng(3)
    scores = generator.random((80, 8)) < generator.random((80, 1))
    difference = scores[:40].mean(axis=1) - scores[40:].mean(axis=1)
    for exact, values in [
        (avg_at_k(scores), scores.mean(axis=1)),
        (pass_at_k(scores, 8), scores.max(axis=1)),
        (paired_difference(scores[:40], scores[40:]), difference),
    ]:
        # The percentile interval over resampled problems.
        means = values[generator.integers(len(values), size=(4000, len(values)))].mean(axis=1)
        assert exact.value == values.mean()
        assert [exact.low, exact.high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.02)


def test_a_ratio_weighs_problems_by_their_counts() -> None:
    assert ratio_of_sums([2.0, 1.0], [8, 4]) == Estimate(0.25, 0.25, 0.25)
    assert ratio_of_sums([2.0, 0.0], [2, 6]).value == 0.25


def test_ratio_intervals_cover_the_true_ratio() -> None:
    generator = np.random.default_rng(4)
    counts = generator.integers(5, 50, (400, 60))
    sums = counts * (0.3 + 0.1 * generator.standard_normal(counts.shape)) + generator.standard_normal(counts.shape)
    trials = [ratio_of_sums(s, c) for s, c in zip(sums, counts, strict=True)]
    assert 0.92 < np.mean([trial.low <= 0.3 <= trial.high for trial in trials]) < 0.98


@pytest.mark.parametrize("k", [0, 5, -1])
def test_pass_at_more_than_the_samples_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=rf"pass@{k} needs .* got 4; choose k from 1 to 4"):
        pass_at_k(np.ones((3, 4)), k)


def test_one_problem_gives_no_interval() -> None:
    with pytest.raises(InputError, match="at least 2 problems, got 1"):
        avg_at_k([[0.0, 1.0]])


def test_scores_that_are_not_numbers_or_not_a_matrix_are_refused() -> None:
    with pytest.raises(InputError, match="1 non-finite"):
        avg_at_k([[0.0], [float("nan")]])
    with pytest.raises(InputError, match=r"got \(2,\)"):
        avg_at_k([0.0, 1.0])
    with pytest.raises(InputError, match="not empty"):
        avg_at_k(np.zeros((0, 4)))


def test_different_numbers_of_problems_cannot_be_paired() -> None:
    with pytest.raises(InputError, match="same problems, got 2 and 3"):
        paired_difference(np.ones((2, 1)), np.ones((3, 1)))
