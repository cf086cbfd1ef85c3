"""Every predictor: what any forecast must keep to, whatever its method; the settings are those of ``PREDICTORS`` alone."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankleap.checkpoints import Delta, LowRank, dense
from rankleap.errors import TrajectoryError, UnknownNameError
from rankleap.predictors import PREDICTORS, Forecast, get_predictor
from rankleap.trajectory import Trajectory

STEPS = (10, 20, 50, 60, 100)
CONTINUE_A_LINE = {"weight-linear": "any", "window": "any", "relex": "through the base"}
STAND_STILL = {"hold", "average"}

each = pytest.mark.parametrize("name", PREDICTORS)
each_window = pytest.mark.parametrize("window", [None, 3])
uneven_steps = st.lists(st.integers(1, 1000), min_size=2, max_size=8, unique=True).map(sorted)


@pytest.fixture(params=["dense", "products"])
def trajectory(request: pytest.FixtureRequest, memory_trajectory: Any) -> Trajectory:
    """A matrix that moves with noise, one that never does, and for dense deltas a vector."""
    generator = torch.Generator().manual_seed(0)
    if request.param == "products":
        moving: list[Delta] = [
            LowRank(torch.randn(6, 2, generator=generator) + 0.1 * s, torch.randn(2, 5, generator=generator))
            for s in STEPS
        ]
        return memory_trajectory(STEPS, {"w": moving, "still": [LowRank(torch.zeros(4, 2), torch.ones(2, 4))] * 5})
    moving = [0.1 * s + torch.randn(6, 5, generator=generator) for s in STEPS]
    vectors: list[Delta] = [0.1 * s + torch.randn(7, generator=generator) for s in STEPS]
    return memory_trajectory(STEPS, {"w": moving, "still": [torch.zeros(4, 4)] * 5, "v": vectors})


def predicted(forecast: Forecast, step: float | None = None, coefficient: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: dense(forecast.delta(name, step, coefficient)) for name in forecast.trajectory.shapes}


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, delta in first.items():
        assert torch.equal(delta, second[name]), name


def test_every_predictor_says_whether_it_continues_a_line() -> None:
    assert {*CONTINUE_A_LINE, *STAND_STILL} == set(PREDICTORS)


def test_an_unknown_predictor_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="predictor 'widnow' does not exist; did you mean 'window'"):
        get_predictor("widnow")


@each
def test_a_predictor_goes_by_its_name(name: str, trajectory: Trajectory) -> None:
    assert get_predictor(name).name == name
    assert get_predictor(name).fit(trajectory).method == name


@pytest.mark.parametrize("name", CONTINUE_A_LINE)
@given(steps=uneven_steps, at=st.floats(0, 3000), window=st.none() | st.integers(2, 8), seed=st.integers(0, 2**31))
def test_a_straight_path_continues_straight(
    memory_trajectory: Any, name: str, steps: list[int], at: float, window: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    drift, start = (torch.randn(4, 3, generator=generator) for _ in range(2))
    start = start if CONTINUE_A_LINE[name] == "any" else torch.zeros(4, 3)
    path = memory_trajectory(steps, {"w": [start + 0.01 * step * drift for step in steps]})
    found = dense(get_predictor(name, window).fit(path).delta("w", at))
    # A line through steps that lie close together magnifies the rounding of float32.
    magnified = 1 + (at + steps[-1]) / min(later - earlier for earlier, later in pairwise(steps))
    torch.testing.assert_close(found, start + 0.01 * at * drift, atol=1e-5 * magnified, rtol=0)


@each
@each_window
def test_coefficient_zero_is_the_origin_exactly(name: str, window: int | None, trajectory: Trajectory) -> None:
    forecast = get_predictor(name, window).fit(trajectory)
    for tensor in trajectory.shapes:
        last = dense(trajectory.delta(tensor, STEPS[-1]))
        origin = {"base": torch.zeros_like(last), "last": last}[forecast.origin]
        for step in (None, 0, 1000.0):
            assert torch.equal(dense(forecast.delta(tensor, step, 0.0)), origin)


@each
@each_window
@pytest.mark.parametrize("coefficient", [-0.5, 0.5, 2.0])
def test_the_coefficient_scales_the_way_from_the_origin(
    name: str, window: int | None, coefficient: float, trajectory: Trajectory
) -> None:
    forecast = get_predictor(name, window).fit(trajectory)
    origin, whole = predicted(forecast, None, 0.0), predicted(forecast, None, 1.0)
    for tensor, delta in predicted(forecast, None, coefficient).items():
        expected = origin[tensor] + coefficient * (whole[tensor] - origin[tensor])
        torch.testing.assert_close(delta, expected, atol=1e-4, rtol=1e-4)


@each
@each_window
def test_the_default_target_is_the_methods_own_reach(name: str, window: int | None, trajectory: Trajectory) -> None:
    forecast = get_predictor(name, window).fit(trajectory)
    assert math.isfinite(forecast.reach)
    assert forecast.reach >= STEPS[-1]
    assert_same_bits(predicted(forecast), predicted(forecast, forecast.reach))


@each
@each_window
def test_what_never_moved_is_not_moved(name: str, window: int | None, trajectory: Trajectory) -> None:
    assert not dense(get_predictor(name, window).fit(trajectory).delta("still", 500)).any()


@each
def test_the_trajectory_is_left_alone(name: str, trajectory: Trajectory) -> None:
    before = {(tensor, s): dense(trajectory.delta(tensor, s)).clone() for tensor in trajectory.shapes for s in STEPS}
    predicted(get_predictor(name).fit(trajectory), 500, 2.0)
    assert trajectory.steps == STEPS
    for (tensor, step), delta in before.items():
        assert torch.equal(dense(trajectory.delta(tensor, step)), delta)


@each
@each_window
def test_the_same_path_gives_the_same_forecast_to_the_bit(
    name: str, window: int | None, trajectory: Trajectory
) -> None:
    first, again = (get_predictor(name, window).fit(trajectory) for _ in range(2))
    for step in (None, 137.0):
        assert_same_bits(predicted(first, step, 1.5), predicted(again, step, 1.5))


@each
def test_only_the_window_is_seen(name: str, trajectory: Trajectory, memory_trajectory: Any) -> None:
    paths: dict[str, list[Delta]] = {tensor: trajectory.deltas(tensor) for tensor in trajectory.shapes}
    other = {tensor: [path[-1], path[-2], *path[2:]] for tensor, path in paths.items()}
    window = len(STEPS) - 2
    seen = get_predictor(name, window).fit(trajectory)
    assert_same_bits(
        predicted(seen, 300), predicted(get_predictor(name, window).fit(memory_trajectory(STEPS, other)), 300)
    )


@each
def test_too_few_checkpoints_are_refused_by_the_methods_name(name: str, memory_trajectory: Any) -> None:
    needs = PREDICTORS[name].needs
    few = memory_trajectory(STEPS[: needs - 1], {"w": [torch.ones(2, 2)] * (needs - 1)} if needs > 1 else {})
    with pytest.raises(TrajectoryError, match=rf"^{name} needs at least {needs} checkpoints, got {needs - 1}"):
        get_predictor(name).fit(few)
    enough = memory_trajectory(STEPS[:needs], {"w": [torch.ones(2, 2)] * needs})
    assert torch.isfinite(dense(get_predictor(name).fit(enough).delta("w"))).all()


@pytest.mark.parametrize("name", [name for name, predictor in PREDICTORS.items() if predictor.needs > 1])
def test_a_window_with_too_few_checkpoints_is_refused(name: str, trajectory: Trajectory) -> None:
    seen = PREDICTORS[name].needs - 1
    with pytest.raises(TrajectoryError, match=rf"{name} needs at least .* got {seen} \(steps \[100\]\)"):
        get_predictor(name, seen).fit(trajectory)


@each
@each_window
def test_a_saved_forecast_gives_the_same_deltas(name: str, window: int | None, trajectory: Trajectory) -> None:
    forecast = get_predictor(name, window).fit(trajectory)
    saved = json.loads(json.dumps(forecast.to_json(), allow_nan=False))
    again = type(forecast).from_json(saved, trajectory)  # pyright: ignore[reportAttributeAccessIssue]
    assert (again.method, again.origin, again.reach) == (forecast.method, forecast.origin, forecast.reach)
    for step, coefficient in ((None, 1.0), (137.0, 0.3), (500.0, 2.0)):
        assert_same_bits(predicted(again, step, coefficient), predicted(forecast, step, coefficient))


@each
def test_a_saved_forecast_is_read_with_its_own_trajectory_only(name: str, trajectory: Trajectory) -> None:
    forecast = get_predictor(name).fit(trajectory)
    with pytest.raises(TrajectoryError, match=r"was fitted on steps \[10, 20, 50, 60, 100\], got \[10, 20, 50\]"):
        type(forecast).from_json(forecast.to_json(), trajectory.until(50))  # pyright: ignore[reportAttributeAccessIssue]


@each
@each_window
def test_products_stay_products(name: str, window: int | None, memory_trajectory: Any) -> None:
    side = 200_000  # a dense matrix would take 160 GB
    path: list[Delta] = [LowRank(torch.full((side, 1), float(step)), torch.ones(1, side)) for step in STEPS]
    delta = get_predictor(name, window).fit(memory_trajectory(STEPS, {"w": path})).delta("w", 200, 1.5)
    assert isinstance(delta, LowRank)
    assert delta.shape == (side, side)
