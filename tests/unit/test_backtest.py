"""The back-test: what is straight is found, what is chance is refused, and nothing later than the origin is used."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rankleap.checkpoints import Delta, LowRank, dense
from rankleap.evaluation import Evaluation
from rankleap.leap import Candidates, Leap, backtest
from rankleap.predictors import PREDICTORS, Forecast, Mixture, get_predictor
from rankleap.records import Problem
from rankleap.trajectory import Trajectory

STEPS = tuple(range(10, 110, 10))
SIDE = 40
EXTRAPOLATE = ("window", "weight-linear")
COEFFICIENTS = (0.25, 0.5, 1.0, 1.5)


def draws(seed: int) -> torch.Tensor:
    return torch.randn(len(STEPS), SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def path_of(kind: str, seed: int = 0) -> dict[str, list[Delta]]:
    noise, (point, drift) = draws(seed), draws(seed + 100)[:2]
    deltas = {
        "noise round the base": noise,
        "noise round a point": 3 * point + noise,
        "walk": noise.cumsum(0),
        "line": torch.tensor(STEPS)[:, None, None] * drift,
        "drift in a walk": (noise + 3 * drift).cumsum(0),
    }[kind]
    return {"w": list(deltas), "b": [delta[0] for delta in deltas]}


def test_a_straight_path_is_followed_exactly_and_accepted(memory_trajectory: Any) -> None:
    trajectory = memory_trajectory(STEPS, path_of("line"))
    found = backtest(trajectory, Candidates(EXTRAPOLATE, (2, 4, None), (1.0,)))
    assert found.refusal is None
    for skill in found.skills:
        assert not skill.reason
        assert min(skill.against[rival] for rival in ("hold", "base", "own denoising")) > 0
    ahead = {skill.window: skill.horizons for skill in found.skills if skill.method == "weight-linear"}
    # Two checkpoints reach one ahead, four reach three; there nothing is missed. Of five leaps one is cut to two ahead.
    assert [ahead[2][1], ahead[4][3]] == pytest.approx([1, 1], abs=1e-6)
    assert ahead[4][2] == pytest.approx(1 - 4 / 5 * 1 / 4, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["noise round the base", "noise round a point", "walk"])
def test_chance_is_refused_whatever_the_window_and_coefficient(memory_trajectory: Any, kind: str, seed: int) -> None:
    trajectory = memory_trajectory(STEPS, path_of(kind, seed))
    found = backtest(trajectory, Candidates(EXTRAPOLATE, (2, 3, 4, None), COEFFICIENTS))
    assert all(skill.reason for skill in found.skills)
    assert str(found.refusal).startswith("do not leap: the best of 32, ")
    # Averages and RELEX only denoise: round the base they undo the run, else it is for the gate to say.
    denoised = backtest(trajectory, Candidates(("average", "relex"), (None,), (1.0,)))
    assert (denoised.refusal is None) == (kind != "noise round the base")
    assert all(skill.denoises for skill in denoised.skills)


def test_denoising_does_not_pass_for_extrapolation(memory_trajectory: Any) -> None:
    for seed in range(4):
        trajectory = memory_trajectory(STEPS, path_of("noise round a point", seed))
        (skill,) = backtest(trajectory, Candidates(("relex",), (None,), (1.0,), target=130)).skills
        assert skill.against["hold"] > 0 > skill.against["own denoising"]
        assert not skill.denoises
        assert "its own forecast of the last step" in skill.reason


def test_drift_is_found_in_noise_of_its_own_size(memory_trajectory: Any) -> None:
    found = backtest(memory_trajectory(STEPS, path_of("drift in a walk")), Candidates(("window",), (4,), (1.0,)))
    assert found.refusal is None
    assert 0 < found.skills[0].against["hold"] < 1


def test_a_run_that_turned_back_is_refused(memory_trajectory: Any) -> None:
    there, back = path_of("line")["w"][:5], path_of("line")["w"][3::-1]
    trajectory = memory_trajectory(STEPS[:9], {"w": there + back})
    assert backtest(trajectory, Candidates(("weight-linear",), (6,), (1.0,))).refusal


def test_skills_are_the_ratios_that_they_are_said_to_be(memory_trajectory: Any) -> None:
    trajectory = memory_trajectory(STEPS[:5], {name: path[:5] for name, path in path_of("drift in a walk").items()})
    (skill,) = backtest(trajectory, Candidates(("window",), (2,), (1.5,))).skills
    paths = [torch.cat([dense(trajectory.delta(name, s)).flatten() for name in ("w", "b")]) for s in STEPS[:5]]
    miss = hold = base = repeat = 0.0
    for k in (2, 3, 4):
        # It claims to stand 15 steps on, so the checkpoint 20 steps on is the first that counts; the last leap is cut to 10.
        leap = paths[k - 1] + (1.5 if k < 4 else 1) * (paths[k - 1] - paths[k - 2])
        for t in range(min(k + 1, 4), 5):
            again = paths[k - 1] + (t - k + 1) * (paths[k - 1] - paths[k - 2])
            miss, hold = miss + torch.dist(leap, paths[t]) ** 2, hold + torch.dist(paths[k - 1], paths[t]) ** 2
            base, repeat = base + paths[t].norm() ** 2, repeat + torch.dist(again, paths[t]) ** 2
    wanted = {"hold": 1 - miss / hold, "base": 1 - miss / base, "repeat-last": 1 - miss / repeat}
    wanted = {rival: float(value) for rival, value in wanted.items()}
    assert {rival: skill.against[rival] for rival in wanted} == pytest.approx(wanted, rel=1e-5)


def test_products_and_forecasts_of_any_kind_give_the_same_skill(memory_trajectory: Any, monkeypatch: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = STEPS[:6]
    path: list[Delta] = [
        LowRank(s * torch.ones(SIDE, 1) + torch.randn(SIDE, 1, generator=generator), torch.ones(1, SIDE)) for s in steps
    ]
    products, whole = (memory_trajectory(steps, {"w": one}) for one in (path, [dense(delta) for delta in path]))
    candidates = Candidates(("window", "relex"), (3,), (0.5, 1.0))
    first, second = (backtest(one, candidates) for one in (products, whole))
    for one, other in zip(first.skills, second.skills, strict=True):
        assert one.against == pytest.approx(other.against, abs=1e-4)
    seen = get_predictor("window", 3).fit(products)
    assert isinstance(seen, Mixture)
    from rankleap.leap.backtest import _distances, _Seen  # the slow way, which no linear method takes

    class Opaque(Forecast):
        method, origin, reach = seen.method, seen.origin, seen.reach

        def delta(self, name: str, step: float | None = None, coefficient: float = 1.0) -> Delta:
            return fit.delta(name, step, coefficient)

        def to_json(self) -> dict[str, object]:
            return {}

    prefix = _Seen(products, 4, products.gram)
    fit = get_predictor("window", 3).fit(prefix)
    fast, slow = (_distances(Leap(one, 1.5), None, prefix, "w")[4:] for one in (fit, Opaque()))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-2)


def test_nothing_after_the_origin_is_seen(memory_trajectory: Any) -> None:
    class Watched(memory_trajectory):
        pass

    steps, path = STEPS[:6], path_of("line")
    asked: list[Sequence[int]] = []
    real = Candidates.predictors

    class Spied(Candidates):
        def predictors(self, whole: Trajectory) -> Any:
            for method, window, predictor in real(self, whole):
                yield method, window, lambda seen, p=predictor: asked.append(seen.steps) or p(seen)

    trajectory = Watched(steps, {name: one[:6] for name, one in path.items()})
    backtest(trajectory, Spied(("window",), (2,), (1.0,)))
    assert asked[1:] == [steps[:k] for k in range(2, 6)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_checkpoints_to_test_refuse_nothing(memory_trajectory: Any, count: int) -> None:
    trajectory = memory_trajectory(STEPS[:count], {name: path[:count] for name, path in path_of("walk").items()})
    found = backtest(trajectory, Candidates(("window",), (None,), (1.0,)))
    assert found.refusal is None
    assert not found.skills[0].against


def test_accuracy_decides_where_it_is_measured_and_is_counted(memory_trajectory: Any) -> None:
    trajectory = memory_trajectory(STEPS[:6], {name: path[:6] for name, path in path_of("walk").items()})
    problems, asked = [Problem(f"validation-{i}", "", "") for i in range(5)], []
    better: set[float] = set()

    def score(leap: Leap | None, some: Sequence[Problem]) -> Evaluation:
        assert leap is not None and list(some) == problems
        asked.append((leap.forecast.method, leap.trajectory.steps[-1], leap.coefficient))
        return Evaluation(
            "t", (), np.full((5, 2), leap.forecast.method != "hold" and leap.coefficient in better), {}, 1, 0
        )

    candidates = Candidates(("window",), (2,), (0.5, 1.0))
    assert backtest(trajectory, candidates, score, problems).refusal == (
        "do not leap: the best of 2, window × 0.5, is no gain in accuracy (+0.000)"
    )
    better.add(1.0)
    found = backtest(trajectory, candidates, score, problems)
    assert [skill.accuracy_gain for skill in found.skills] == [0.0, 1.0]
    assert found.refusal is None
    # Four origins, each scored once, and two leaps from each.
    assert found.samples_spent == 12 * 10
    assert sorted(asked[12:])[:4] == [("hold", s, 1.0) for s in (20, 30, 40, 50)]


@pytest.mark.parametrize("method", PREDICTORS)
@pytest.mark.parametrize("kind", ["noise round the base", "walk"])
def test_no_method_passes_chance_for_a_forecast(memory_trajectory: Any, method: str, kind: str) -> None:
    trajectory = memory_trajectory(STEPS, path_of(kind, seed=1))
    scores = {step: 0.2 + 0.004 * step for step in STEPS}
    found = backtest(trajectory, Candidates((method,), (None,), (0.5, 1.0), scores=scores))
    # What stands at no step ahead is no forecast: off a walk it is the gate's to judge.
    assert all(skill.reason or (kind == "walk" and skill.denoises) for skill in found.skills)
    if kind != "walk":
        assert str(found.refusal).startswith("do not leap: the best of 2, ")


@pytest.mark.parametrize("method", [m for m, row in PREDICTORS.items() if row.continues != "nothing"])
def test_a_straight_path_in_some_noise_passes_for_every_linear_method(memory_trajectory: Any, method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    drift = torch.outer(*torch.randn(2, SIDE, generator=generator))
    path = [step * drift + torch.randn(SIDE, SIDE, generator=generator) for step in STEPS]
    trajectory = memory_trajectory(STEPS, {"w": path})
    scores = {step: 0.2 + 0.004 * step for step in STEPS}
    found = backtest(trajectory, Candidates((method,), (None,), (1.0,), scores=scores))
    assert found.refusal is None
    assert found.skills[0].against["base"] > 0.9


def test_a_forecast_that_only_betters_its_own_denoising_is_refused(memory_trajectory: Any) -> None:
    direction = draws(0)[0]
    trajectory = memory_trajectory(STEPS, {"w": [3.0**t * direction for t in range(len(STEPS))]})
    # A line through what accelerates is behind the last checkpoint even one step later.
    (skill,) = backtest(trajectory, Candidates(("relex",), (None,), (1.0,), target=110)).skills
    assert min(skill.against["own denoising"], skill.against["base"]) > 0 > skill.against["hold"]
    assert skill.reason.startswith("no nearer to what came than standing still (")
