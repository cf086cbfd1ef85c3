"""Straight paths are straight, and what chance looks like is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankleap.analysis import evidence
from rankleap.checkpoints import Delta, LowRank
from rankleap.errors import TrajectoryError
from rankleap.lowrank import gram
from rankleap.trajectory import line_weights, linearity, linearity_with_nulls

uneven_steps = st.lists(st.integers(1, 1000), min_size=4, max_size=10, unique=True).map(sorted)
STEPS = [10, 20, 30, 50, 80, 130, 210, 340]


def gram_of(points_TD: Tensor) -> Tensor:
    return points_TD.double() @ points_TD.double().T


def walk(steps: int, seed: int, dimensions: int = 500) -> Tensor:
    """A walk without drift, all increments of one size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, dimensions, generator=generator, dtype=torch.float64).cumsum(0)


@given(uneven_steps, st.integers(0, 2**31))
def test_a_straight_path_through_the_base_is_straight_in_every_number(steps: list[int], seed: int) -> None:
    direction_D = torch.randn(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = linearity(gram_of(torch.tensor(steps)[:, None] * direction_D), steps)
    assert found.share == pytest.approx(1)
    assert found.r2_in_sample == pytest.approx(1)
    assert found.r2_forward == pytest.approx(1)


def test_a_straight_path_of_products_is_straight_too() -> None:
    left, right = torch.randn(20, 2), torch.randn(2, 30)
    deltas: list[Delta] = [LowRank(step * left, right) for step in STEPS]
    found = linearity(gram(deltas), STEPS)
    assert (found.share, found.r2_in_sample, found.r2_forward) == pytest.approx((1, 1, 1))


def test_it_is_the_steps_that_count_not_their_order() -> None:
    points = torch.tensor(STEPS, dtype=torch.float64)[:, None] * torch.ones(1, 3, dtype=torch.float64)
    by_index = linearity(gram_of(points), range(1, len(STEPS) + 1))
    assert by_index.r2_in_sample < 0.95
    assert by_index.r2_forward < 0.9


def test_standing_still_is_worth_nothing_forward() -> None:
    still = torch.ones(6, 4, dtype=torch.float64)
    assert linearity(gram_of(still), range(1, 7)).r2_forward == 0
    assert linearity(gram_of(still), range(1, 7)).share == pytest.approx(1)


def test_a_walk_without_drift_looks_dominant_and_forecasts_nothing() -> None:
    found = [linearity(gram_of(walk(20, seed)), range(1, 21)) for seed in range(20)]
    assert sum(f.share for f in found) / 20 == pytest.approx(8 / torch.pi**2, abs=0.06)
    assert sum(f.r2_in_sample for f in found) / 20 > 0.85
    assert sum(f.r2_forward for f in found) / 20 < -0.1


@pytest.mark.parametrize("freedom", [20, 300])
def test_a_walk_without_drift_lies_within_its_own_null(freedom: int) -> None:
    within = 0
    for seed in range(25):
        generator = torch.Generator().manual_seed(1000 + seed)
        path = gram_of(walk(8, seed, freedom))
        found = linearity_with_nulls(path, range(1, 9), generator, draws=20, freedom=freedom)
        low, high = found.nulls["walk"]["share"]
        within += low <= found.measured.share <= high
    assert within >= 19  # 90 % of 25 is 22 or 23


def test_a_tensor_with_more_freedom_strays_less_by_chance() -> None:
    path = gram_of(walk(8, 0))
    few, many = (linearity_with_nulls(path, range(8), torch.Generator().manual_seed(0), freedom=f) for f in (10, 2000))
    widths = [high - low for low, high in (evidence.nulls["walk"]["share"] for evidence in (few, many))]
    assert widths[0] > 3 * widths[1]


def test_a_straight_path_lies_above_every_null() -> None:
    path = torch.tensor(STEPS, dtype=torch.float64)[:, None] * torch.ones(1, 50, dtype=torch.float64)
    path = path + torch.randn(path.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = linearity_with_nulls(gram_of(path), STEPS, torch.Generator().manual_seed(0))
    for null in ("noise", "walk", "permutation"):
        assert found.measured.r2_forward > found.nulls[null]["r2_forward"][1]
    for null in ("noise", "walk"):
        assert found.measured.share > found.nulls[null]["share"][1]


def test_a_permutation_keeps_the_share_and_breaks_the_line() -> None:
    path = gram_of(walk(8, 0))
    found = linearity_with_nulls(path, STEPS, torch.Generator().manual_seed(0))
    assert found.nulls["permutation"]["share"] == pytest.approx((found.measured.share,) * 2)
    assert found.nulls["permutation"]["r2_in_sample"][0] < found.measured.r2_in_sample


def test_nulls_are_those_of_their_seed() -> None:
    path = gram_of(walk(6, 0))
    first, again, other = (linearity_with_nulls(path, range(6), torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_steps_are_named(count: int) -> None:
    steps = STEPS[:count]
    with pytest.raises(TrajectoryError, match=rf"at least 4 steps, got {count}: \[.*\]; save more often"):
        linearity(torch.eye(count, dtype=torch.float64), steps)


@given(uneven_steps, st.floats(-5, 5), st.floats(-5, 5), st.floats(-100, 2000))
def test_line_weights_reproduce_a_line_anywhere(steps: list[int], a: float, b: float, at: float) -> None:
    step_T = torch.tensor(steps, dtype=torch.float64)
    assert float(line_weights(step_T, at) @ (a * step_T + b)) == pytest.approx(a * at + b, abs=1e-6 * (1 + abs(at)))


@given(uneven_steps, st.integers(0, 2**31), st.floats(-100, 2000))
def test_line_weights_are_least_squares(steps: list[int], seed: int, at: float) -> None:
    step_T = torch.tensor(steps, dtype=torch.float64)
    y_T = torch.randn(len(steps), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centred = step_T - step_T.mean()
    slope = float((centred * y_T).sum() / (centred**2).sum())
    expected = float(y_T.mean()) + slope * (at - float(step_T.mean()))
    assert float(line_weights(step_T, at) @ y_T) == pytest.approx(expected, abs=1e-6 * (1 + abs(expected)))


def test_no_evidence_leaves_without_its_null(memory_trajectory: type) -> None:
    generator = torch.Generator().manual_seed(0)
    path: list[Delta] = [step * torch.ones(5, 4) + torch.randn(5, 4, generator=generator) for step in STEPS]
    products: list[Delta] = [LowRank(step * torch.ones(9, 1), torch.ones(1, 8)) for step in STEPS]
    still: list[Delta] = [torch.zeros(5, 4)] * len(STEPS)
    vector: list[Delta] = [step * torch.ones(3) for step in STEPS]
    paths = {"path": path, "product": products, "still": still, "vector": vector}
    found = evidence(memory_trajectory(STEPS, paths), draws=5)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert list(tensors) == ["path", "product"]
    for tensor in tensors.values():
        assert tensor["share"].keys() == tensor["share_null"].keys()
        assert set(tensor["nulls"]) == {"noise", "walk", "permutation"}
        assert all(ranges.keys() == tensor["path"].keys() for ranges in tensor["nulls"].values())
    low, high = tensors["path"]["share_null"]["energy"]
    assert low < high < tensors["path"]["share"]["energy"]
    # A rank-1 adapter has share 1 whatever it learned: its null says so.
    assert tensors["product"]["share_null"]["energy"] == pytest.approx([1, 1], rel=1e-4)
