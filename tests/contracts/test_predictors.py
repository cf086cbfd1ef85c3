"""Every predictor: what any forecast must keep to, whatever its method; the settings are those of ``PREDICTORS`` alone."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankleap.checkpoints import Delta, LowRank, combine, dense
from rankleap.errors import TrajectoryError, UnknownNameError
from rankleap.predictors import PREDICTORS, Forecast, Predictor, get_predictor, read_forecast
from rankleap.predictors.next import NExt
from rankleap.trajectory import Trajectory

STEPS = (10, 20, 50, 60, 100)
CONTINUE_A_LINE = [name for name, row in PREDICTORS.items() if row.continues != "nothing"]

each = pytest.mark.parametrize("name", PREDICTORS)
each_window = pytest.mark.parametrize("window", [None, 3])
uneven_steps = st.lists(st.integers(1, 1000), min_size=3, max_size=8, unique=True).map(sorted)


def scored(name: str, window: int | None = None) -> Predictor:
    """With an accuracy that is a line in the step, for the methods that ask for one."""
    return get_predictor(name, window, {step: 1e-4 * step for step in range(1, 1001)})


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


def test_an_unknown_predictor_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="predictor 'widnow' does not exist; did you mean 'window'"):
        get_predictor("widnow")


@each
def test_a_predictor_goes_by_its_name(name: str, trajectory: Trajectory) -> None:
    assert get_predictor(name).name == name
    assert scored(name).fit(trajectory).method == name


@pytest.mark.parametrize("name", CONTINUE_A_LINE)
@given(steps=uneven_steps, ahead=st.floats(0, 2000), window=st.none() | st.integers(3, 8), seed=st.integers(0, 2**31))
def test_a_straight_path_continues_straight(
    memory_trajectory: Any, name: str, steps: list[int], ahead: float, window: int | None, seed: int
) -> None:
    generator, kind, at = torch.Generator().manual_seed(seed), PREDICTORS[name].continues, steps[-1] + ahead
    drift, start = (torch.randn(4, 3, generator=generator) for _ in range(2))
    if kind != "any line":
        start = torch.zeros(4, 3)
    if kind == "rank-one lines through the base":
        drift = torch.outer(drift[:, 0], drift[0])
    path = memory_trajectory(steps, {"w": [start + 0.01 * step * drift for step in steps]})
    found = dense(scored(name, window).fit(path).delta("w", at))
    # A line through steps that lie close together magnifies the rounding of float32.
    magnified = 1 + (at + steps[-1]) / min(later - earlier for earlier, later in pairwise(steps))
    torch.testing.assert_close(found, start + 0.01 * at * drift, atol=1e-5 * magnified, rtol=0)


@each
@each_window
def test_coefficient_zero_is_the_origin_exactly(name: str, window: int | None, trajectory: Trajectory) -> None:
    forecast = scored(name, window).fit(trajectory)
    for tensor in trajectory.shapes:
        last = dense(trajectory.delta(tensor, STEPS[-1]))
        origin = {"base": torch.zeros_like(last), "last": last}[forecast.origin]
        for step in (None, 100, 1000.0):
            assert torch.equal(dense(forecast.delta(tensor, step, 0.0)), origin)


@each
@each_window
@pytest.mark.parametrize("coefficient", [-0.5, 0.5, 2.0])
def test_the_coefficient_scales_the_way_from_the_origin(
    name: str, window: int | None, coefficient: float, trajectory: Trajectory
) -> None:
    forecast = scored(name, window).fit(trajectory)
    origin, whole = predicted(forecast, None, 0.0), predicted(forecast, None, 1.0)
    for tensor, delta in predicted(forecast, None, coefficient).items():
        expected = origin[tensor] + coefficient * (whole[tensor] - origin[tensor])
        torch.testing.assert_close(delta, expected, atol=1e-4, rtol=1e-4)


@each
@each_window
def test_the_default_target_is_the_methods_own_reach(name: str, window: int | None, trajectory: Trajectory) -> None:
    forecast = scored(name, window).fit(trajectory)
    assert math.isfinite(forecast.reach)
    assert forecast.reach >= STEPS[-1]
    assert_same_bits(predicted(forecast), predicted(forecast, forecast.reach))


@each
def test_a_target_behind_the_origin_is_refused(name: str, trajectory: Trajectory) -> None:
    forecast = scored(name).fit(trajectory)
    first = {"base": 0, "last": STEPS[-1]}[forecast.origin]
    forecast.delta("w", first)
    for behind in (first - 1, math.nan):
        with pytest.raises(TrajectoryError, match=rf"^{name} cannot leap to step .* from {first} on"):
            forecast.delta("w", behind)


@each
@each_window
def test_what_never_moved_is_not_moved(name: str, window: int | None, trajectory: Trajectory) -> None:
    assert not dense(scored(name, window).fit(trajectory).delta("still", 500)).any()


@each
def test_the_trajectory_is_left_alone(name: str, trajectory: Trajectory) -> None:
    before = {(tensor, s): dense(trajectory.delta(tensor, s)).clone() for tensor in trajectory.shapes for s in STEPS}
    predicted(scored(name).fit(trajectory), 500, 2.0)
    assert trajectory.steps == STEPS
    for (tensor, step), delta in before.items():
        assert torch.equal(dense(trajectory.delta(tensor, step)), delta)


@each
@each_window
def test_the_same_path_gives_the_same_forecast_to_the_bit(
    name: str, window: int | None, trajectory: Trajectory
) -> None:
    first, again = (scored(name, window).fit(trajectory) for _ in range(2))
    for step in (None, 137.0):
        assert_same_bits(predicted(first, step, 1.5), predicted(again, step, 1.5))


@each
def test_only_the_window_is_seen(name: str, trajectory: Trajectory, memory_trajectory: Any) -> None:
    paths: dict[str, list[Delta]] = {tensor: trajectory.deltas(tensor) for tensor in trajectory.shapes}
    other = {tensor: [path[-1], path[-2], *path[2:]] for tensor, path in paths.items()}
    window = len(STEPS) - 2
    seen = scored(name, window).fit(trajectory)
    assert_same_bits(predicted(seen, 300), predicted(scored(name, window).fit(memory_trajectory(STEPS, other)), 300))


@each
def test_too_few_checkpoints_are_refused_by_the_methods_name(name: str, memory_trajectory: Any) -> None:
    needs = PREDICTORS[name].needs
    few = memory_trajectory(STEPS[: needs - 1], {"w": [torch.ones(2, 2)] * (needs - 1)} if needs > 1 else {})
    with pytest.raises(TrajectoryError, match=rf"^{name} needs at least {needs} checkpoints, got {needs - 1}"):
        scored(name).fit(few)
    enough = memory_trajectory(STEPS[:needs], {"w": [torch.ones(2, 2)] * needs})
    assert torch.isfinite(dense(scored(name).fit(enough).delta("w"))).all()


@pytest.mark.parametrize("name", [name for name, predictor in PREDICTORS.items() if predictor.needs > 1])
def test_a_window_with_too_few_checkpoints_is_refused(name: str, trajectory: Trajectory) -> None:
    seen = PREDICTORS[name].needs - 1
    with pytest.raises(TrajectoryError, match=rf"{name} needs at least .* got {seen} \(steps \[.*100\]\)"):
        scored(name, seen).fit(trajectory)


@each
@each_window
def test_a_saved_forecast_gives_the_same_deltas(name: str, window: int | None, trajectory: Trajectory) -> None:
    forecast = scored(name, window).fit(trajectory)
    saved = json.loads(json.dumps(forecast.to_json(), allow_nan=False))
    again = read_forecast(saved, trajectory)
    assert (again.method, again.origin, again.reach) == (forecast.method, forecast.origin, forecast.reach)
    for step, coefficient in ((None, 1.0), (137.0, 0.3), (500.0, 2.0)):
        assert_same_bits(predicted(again, step, coefficient), predicted(forecast, step, coefficient))


@each
def test_a_saved_forecast_is_read_with_its_own_trajectory_only(name: str, trajectory: Trajectory) -> None:
    forecast = scored(name).fit(trajectory)
    with pytest.raises(TrajectoryError, match=r"was fitted on steps \[10, 20, 50, 60, 100\], got \[10, 20, 50\]"):
        read_forecast(forecast.to_json(), trajectory.until(50))


@each
@each_window
def test_adapter_space_says_what_full_space_says(name: str, window: int | None, memory_trajectory: Any) -> None:
    """The same run as products and multiplied out; what an adapter of the product writes is in ``test_leaps``."""
    generator = torch.Generator().manual_seed(3)
    drift = LowRank(torch.randn(12, 1, generator=generator), torch.randn(1, 9, generator=generator))
    parts = [(torch.randn(12, 3, generator=generator), torch.randn(3, 9, generator=generator)) for _ in STEPS]
    path = [combine([(0.1 * s, drift), (0.1, LowRank(*part))]) for s, part in zip(STEPS, parts, strict=True)]
    thin, full = memory_trajectory(STEPS, {"w": path}), memory_trajectory(STEPS, {"w": [dense(d) for d in path]})
    found, wanted = (scored(name, window).fit(each_path).delta("w", 130, 1.5) for each_path in (thin, full))
    assert isinstance(found, LowRank)
    # A network's updates magnify the last bit in which the two SVDs differ.
    assert (dense(found) - dense(wanted)).norm() < 2e-3 * dense(wanted).norm()


@each
@each_window
def test_products_stay_products(name: str, window: int | None, memory_trajectory: Any) -> None:
    side, generator = 200_000, torch.Generator().manual_seed(0)  # a dense matrix would take 160 GB
    left, right = torch.randn(side, 1, generator=generator), torch.randn(1, side, generator=generator)
    path: list[Delta] = [LowRank(step * left, right) for step in STEPS]
    predictor = scored(name, window)
    if isinstance(predictor, NExt):  # its networks are as wide as the matrix
        predictor = replace(predictor, hidden=4, updates=2)
    delta = predictor.fit(memory_trajectory(STEPS, {"w": path})).delta("w", 200, 1.5)
    assert isinstance(delta, LowRank)
    assert delta.shape == (side, side)
