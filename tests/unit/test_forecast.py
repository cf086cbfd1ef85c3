"""What each method says it computes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankleap.checkpoints import LowRank, dense
from rankleap.predictors import Mixture, get_predictor
from rankleap.trajectory import Trajectory

STEPS = (10, 20, 50, 60, 100)
seeds = st.integers(0, 2**31)


class Counting(Trajectory):
    """Counts what is read."""

    def __init__(self, deltas: Sequence[Tensor]) -> None:
        super().__init__(STEPS[: len(deltas)], {"w": tuple(deltas[0].shape)})
        self.path, self.read = deltas, []

    def delta(self, name: str, step: int) -> Tensor:
        self.read.append(step)
        return self.path[self.steps.index(step)]

    def until(self, step: int) -> "Counting":
        raise NotImplementedError


def noisy(seed: int, steps: int = 5) -> Counting:
    generator = torch.Generator().manual_seed(seed)
    return Counting([torch.randn(6, 5, generator=generator) + 0.1 * step for step in STEPS[:steps]])


@given(seeds, st.floats(100, 1000))
def test_hold_is_the_last_checkpoint_whatever_the_target(seed: int, step: float) -> None:
    path = noisy(seed)
    assert torch.equal(dense(get_predictor("hold").fit(path).delta("w", step, 3.0)), path.path[-1])


@given(seeds, st.integers(2, 8), st.floats(100, 1000))
def test_average_is_the_mean_of_the_window_whatever_the_target(seed: int, window: int, step: float) -> None:
    path = noisy(seed)
    found = dense(get_predictor("average", window).fit(path).delta("w", step))
    torch.testing.assert_close(found, torch.stack([*path.path[-window:]]).mean(0))


def test_weight_linear_through_two_checkpoints_is_their_line() -> None:
    path = noisy(0, steps=2)
    found = dense(get_predictor("weight-linear").fit(path).delta("w", 55))
    torch.testing.assert_close(found, path.path[1] + (55 - 20) / (20 - 10) * (path.path[1] - path.path[0]))


@given(seeds, st.integers(2, 5))
def test_weight_linear_is_least_squares_entry_by_entry(seed: int, window: int) -> None:
    path = noisy(seed)
    found = dense(get_predictor("weight-linear", window).fit(path).delta("w", 130)).double()
    design = torch.tensor([[1.0, step] for step in STEPS[-window:]], dtype=torch.float64)
    target = torch.stack([delta.flatten().double() for delta in path.path[-window:]])
    solution = torch.linalg.lstsq(design, target, driver="gels").solution
    expected = (torch.tensor([[1.0, 130.0]], dtype=torch.float64) @ solution).reshape(6, 5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_window_goes_from_the_last_checkpoint_along_the_difference_of_two_halves() -> None:
    path = noisy(0)
    early, late = (path.path[1] + path.path[2]) / 2, (path.path[3] + path.path[4]) / 2
    slope = (late - early) / ((60 + 100) / 2 - (20 + 50) / 2)
    forecast = get_predictor("window", 4).fit(path)
    torch.testing.assert_close(dense(forecast.delta("w", 120)), path.path[4] + 20 * slope)
    assert forecast.reach == 100 + 45


def test_of_an_odd_window_the_middle_counts_for_neither_half() -> None:
    path = noisy(0)
    slope = ((path.path[3] + path.path[4]) - (path.path[0] + path.path[1])) / 2 / (80 - 15)
    torch.testing.assert_close(dense(get_predictor("window").fit(path).delta("w", 120)), path.path[4] + 20 * slope)


@given(seeds)
def test_relex_is_a_line_on_the_first_uncentred_direction(seed: int) -> None:
    path = noisy(seed)
    rows_TD = torch.stack([delta.flatten().double() for delta in path.path])
    direction_D = torch.linalg.svd(rows_TD, full_matrices=False)[2][0]
    coords_T = rows_TD @ direction_D
    step_T = torch.tensor(STEPS, dtype=torch.float64)
    centred_T = step_T - step_T.mean()
    line = coords_T.mean() + (centred_T @ coords_T) / (centred_T @ centred_T) * (150 - step_T.mean())
    found = dense(get_predictor("relex").fit(path).delta("w", 150)).double()
    torch.testing.assert_close(found, (line * direction_D).reshape(6, 5), atol=1e-4, rtol=0)


def test_relex_fits_each_tensor_by_itself(memory_trajectory: Any) -> None:
    first, second = noisy(0), noisy(1)
    both = memory_trajectory(STEPS, {"a": [*first.path], "b": [*second.path]})
    forecast = get_predictor("relex").fit(both)
    for name, alone in (("a", first), ("b", second)):
        torch.testing.assert_close(
            dense(forecast.delta(name, 150)), dense(get_predictor("relex").fit(alone).delta("w", 150))
        )


def test_the_weights_of_a_mixture_hold_the_origin_once() -> None:
    forecast = get_predictor("window", 2).fit(noisy(0))
    assert isinstance(forecast, Mixture)
    assert forecast.weights("w", coefficient=0.0).tolist() == [0, 0, 0, 0, 1]
    # One reach on, with the base nowhere in it: the weights sum to one, so nothing is counted twice.
    assert forecast.weights("w").tolist() == pytest.approx([0, 0, 0, -1, 2])
    assert forecast.weights("w", coefficient=3.0).tolist() == pytest.approx([0, 0, 0, -3, 4])


def test_a_forecast_from_the_base_starts_with_nothing() -> None:
    forecast = get_predictor("relex").fit(noisy(0))
    assert isinstance(forecast, Mixture)
    assert forecast.weights("w", coefficient=0.0).tolist() == [0] * 5
    half, whole = forecast.weights("w", 150, 0.5), forecast.weights("w", 150, 1.0)
    torch.testing.assert_close(2 * half, whole)


def test_checkpoints_that_weigh_nothing_are_not_read() -> None:
    path = noisy(0)
    forecast = get_predictor("weight-linear", 2).fit(path)
    path.read.clear()
    forecast.delta("w")
    assert path.read == [60, 100]


def test_a_mixture_of_products_has_the_rank_of_its_terms(memory_trajectory: Any) -> None:
    path = memory_trajectory(STEPS, {"w": [LowRank(torch.randn(9, 2), torch.randn(2, 8)) for _ in STEPS]})
    delta = get_predictor("weight-linear", 3).fit(path).delta("w")
    assert isinstance(delta, LowRank)
    assert delta.left_MR.shape[1] == 3 * 2


def test_ema_halves_the_weight_of_a_checkpoint_every_half_life_back() -> None:
    path = noisy(0)
    forecast = get_predictor("ema").fit(path)
    assert isinstance(forecast, Mixture)
    # By default a quarter of the window's 90 steps.
    weight_T = torch.tensor([2 ** -((100 - step) / 22.5) for step in STEPS], dtype=torch.float64)
    torch.testing.assert_close(forecast.weights("w", 500), weight_T / weight_T.sum())


def test_relex_shrunk_goes_from_the_last_checkpoint_a_share_of_the_way_to_relex() -> None:
    path = noisy(0)
    shrunk, relex = (get_predictor(name).fit(path) for name in ("relex-shrunk", "relex"))
    assert shrunk.reach == 100 + 90
    found, far = dense(shrunk.delta("w", 150, 0.3)), dense(relex.delta("w", 150))
    torch.testing.assert_close(found, path.path[-1] + 0.3 * (far - path.path[-1]), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("slowest", [0.5, 0.99])
def test_reduced_rank_finds_where_decays_come_to_rest_but_goes_no_further_than_it_came(
    memory_trajectory: Any, slowest: float
) -> None:
    rest, fast, slow = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    path = [rest + 0.2**t * fast + slowest**t * slow for t in range(5)]
    found = dense(get_predictor("reduced-rank").fit(memory_trajectory((1, 2, 3, 4, 5), {"w": path})).delta("w"))
    moved = float((path[-1] - path[0]).norm())
    if slowest == 0.5:
        torch.testing.assert_close(found, rest, atol=1e-2, rtol=0)
    else:
        assert float((found - path[-1]).norm()) == pytest.approx(moved, rel=1e-4)
