"""What alpharl and next compute, against the papers' equations written out, and what they make of noise."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rankleap.checkpoints import LowRank, dense
from rankleap.errors import TrajectoryError
from rankleap.predictors import Forecast, RankOne, get_predictor
from rankleap.predictors.alpharl import inverted_pls
from rankleap.predictors.next import NExt, like
from rankleap.trajectory import Trajectory

STEPS = tuple(range(10, 160, 10))
SCORES = {step: 0.2 + 0.002 * step + 0.01 * math.sin(step) for step in STEPS}


def noise(memory_trajectory: Any, seed: int) -> Trajectory:
    """No direction at all: every checkpoint a fresh draw round the base."""
    generator = torch.Generator().manual_seed(seed)
    return memory_trajectory(STEPS, {"w": [torch.randn(40, 30, generator=generator) for _ in STEPS]})


def drifting(memory_trajectory: Any, bend: float = 0.0, shake: float = 0.01) -> Trajectory:
    """One direction that turns a little, over small noise; the SVD is free to choose its sign at every step."""
    generator = torch.Generator().manual_seed(0)
    first, second, right = (torch.randn(n, generator=generator) for n in (40, 40, 30))
    path = [
        0.01 * s * torch.outer(first + bend * s / 100 * second, right)
        + shake * torch.randn(40, 30, generator=generator)
        for s in STEPS
    ]
    return memory_trajectory(STEPS, {"w": path})


def forward_r2(forecast: Forecast, whole: Trajectory) -> float:
    """1 - Σ‖Ŵ_t - W_t‖² / Σ‖W_last - W_t‖² over the checkpoints that the forecast has not seen."""
    last = forecast.trajectory.steps[-1]
    unseen = [step for step in whole.steps if step > last]
    truths = [dense(whole.delta("w", step)) for step in unseen]
    still = dense(whole.delta("w", last))
    missed = sum(
        float((dense(forecast.delta("w", s)) - truth).square().sum()) for s, truth in zip(unseen, truths, strict=True)
    )
    return 1 - missed / sum(float((still - truth).square().sum()) for truth in truths)


def component(path_SM: Tensor, y_S: Tensor) -> tuple[Tensor, float, Tensor]:
    """Wold's NIPALS for one component: scores z, slope of y on z, loadings p of the standardised columns."""
    standard_SM = (path_SM - path_SM.mean(0)) / path_SM.std(0)
    w_M = standard_SM.T @ (y_S - y_S.mean())
    z_S = standard_SM @ (w_M / w_M.norm())
    return z_S, float(z_S @ (y_S - y_S.mean()) / (z_S @ z_S)), standard_SM.T @ z_S / (z_S @ z_S)


def test_the_inverse_is_the_point_whose_component_predicts_the_wanted_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    path_SM = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    y_S = torch.rand(9, generator=generator, dtype=torch.float64)
    _, slope, loading_M = component(path_SM, y_S)
    expected_M = path_SM.mean(0) + path_SM.std(0) * loading_M * (0.9 - y_S.mean()) / slope
    torch.testing.assert_close(inverted_pls(path_SM, y_S) @ torch.tensor([1.0, 0.9]).double(), expected_M)


@pytest.mark.parametrize(("name", "rescaled"), [("alpharl", True), ("alpharl-unscaled", False)])
def test_alpharl_is_base_plus_inverted_direction_times_v(name: str, rescaled: bool, memory_trajectory: Any) -> None:
    # So much noise that the norm is not the leading direction's alone.
    trajectory = drifting(memory_trajectory, shake=0.1)
    triplets = [torch.linalg.svd(dense(delta), full_matrices=False) for delta in trajectory.deltas("w")]
    lefts, right_N = [left[:, 0] for left, _, _ in triplets], triplets[-1][2][0]
    # One slow direction: the last step's sign is every step's.
    signs = [torch.sign(left @ lefts[-1]) for left in lefts]
    lengths = [float(sigma.norm() if rescaled else sigma[0]) for _, sigma, _ in triplets]
    path_SM = torch.stack([s * a * left for s, a, left in zip(signs, lengths, lefts, strict=True)]).double()
    y_S = torch.tensor(list(SCORES.values()), dtype=torch.float64)
    design_S2 = torch.stack([torch.ones(15), torch.tensor(STEPS)], 1).double()
    wanted = torch.tensor([1.0, 220.0]).double() @ torch.linalg.lstsq(design_S2, y_S[:, None], driver="gels").solution
    left_M = inverted_pls(path_SM, y_S) @ torch.tensor([1.0, float(wanted)]).double()
    forecast = get_predictor(name, scores=SCORES).fit(trajectory)
    torch.testing.assert_close(
        dense(forecast.delta("w", 220, 0.7)), 0.7 * torch.outer(left_M.float(), right_N), atol=1e-4, rtol=1e-4
    )
    # No accuracy is more than 1, however far the target.
    assert torch.equal(dense(forecast.delta("w", 5000)), dense(forecast.delta("w", 9000)))


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({}, "at least 3 checkpoints, got 0"),
        ({10: 0.1, 20: 0.2}, r"got 2 \(none for steps \[30, 40"),
        (dict.fromkeys(STEPS, 0.4), "that rise over its checkpoints, got 0.4, 0.4"),
        ({step: 1 - step / 200 for step in STEPS}, "that rise over"),
        ({**SCORES, 30: math.nan}, "between 0 and 1, got nan"),
        ({step: 100 * score for step, score in SCORES.items()}, "divide percents by 100"),
    ],
)
def test_accuracies_that_say_nothing_are_refused(scores: dict[int, float], says: str, memory_trajectory: Any) -> None:
    with pytest.raises(TrajectoryError, match=f"^alpharl needs .*{says}"):
        get_predictor("alpharl", scores=scores).fit(drifting(memory_trajectory))
    get_predictor("alpharl-step").fit(drifting(memory_trajectory))


@pytest.mark.parametrize("name", ["alpharl", "alpharl-unscaled", "alpharl-step", "next"])
@pytest.mark.parametrize("seed", [0, 1])
def test_noise_gives_no_forward_r2_and_its_signs_are_flagged(name: str, seed: int, memory_trajectory: Any) -> None:
    whole = noise(memory_trajectory, seed)
    forecast = get_predictor(name, scores=SCORES).fit(whole.until(100))
    assert isinstance(forecast, RankOne)
    assert forecast.ambiguous == ("w",)
    # Going on from the last draw along anything is further off than staying; to the base, W_0 = 0, it is half as far.
    held = 1 - sum(float(dense(whole.delta("w", s)).square().sum()) for s in STEPS if s > 100) / sum(
        float((dense(whole.delta("w", s)) - dense(whole.delta("w", 100))).square().sum()) for s in STEPS if s > 100
    )
    assert forward_r2(forecast, whole) < (held if forecast.origin == "base" else 0.0)


def test_in_sample_one_component_fits_noise_nearly_perfectly() -> None:
    generator = torch.Generator().manual_seed(0)
    path_SM = torch.randn(15, 4096, generator=generator, dtype=torch.float64)
    y_S = torch.tensor(list(SCORES.values()), dtype=torch.float64)
    z_S, slope, _ = component(path_SM, y_S)
    assert 1 - (y_S - y_S.mean() - slope * z_S).square().sum() / (y_S - y_S.mean()).square().sum() > 0.97


@pytest.mark.parametrize("name", ["alpharl", "next"])
def test_a_path_with_a_direction_is_foreseen_and_not_flagged(name: str, memory_trajectory: Any) -> None:
    whole = drifting(memory_trajectory, bend=0.3)
    forecast = get_predictor(name, scores=SCORES).fit(whole.until(100))
    assert isinstance(forecast, RankOne)
    assert forecast.ambiguous == ()
    assert forward_r2(forecast, whole) > 0.5


def test_next_reaches_its_horizon_from_the_last_checkpoint_and_other_steps_in_proportion(
    memory_trajectory: Any,
) -> None:
    trajectory = drifting(memory_trajectory)
    forecast = get_predictor("next").fit(trajectory)
    last = dense(trajectory.delta("w", STEPS[-1]))
    assert forecast.reach == 150 + 50
    move = dense(forecast.delta("w")) - last
    torch.testing.assert_close(dense(forecast.delta("w", 175)) - last, 0.5 * move, atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(move, rtol=1e-4) == 1


def test_next_does_not_mind_the_signs_that_an_svd_gives(memory_trajectory: Any) -> None:
    left, right = torch.randn(6), torch.randn(5)
    reference = (left, torch.ones(1), right)
    (turned, _, turned_right), guessed = like(reference, (-left, torch.ones(1), -right))
    assert torch.equal(turned, left)
    assert torch.equal(turned_right, right)
    assert not guessed
    assert like(reference, (-left, torch.ones(1), right))[1]


def test_another_seed_is_another_network(memory_trajectory: Any) -> None:
    trajectory = drifting(memory_trajectory, bend=0.3)
    first, second = (dense(NExt(seed=seed).fit(trajectory).delta("w")) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert (first - second).norm() < 0.1 * first.norm()


def test_what_is_frozen_or_no_linear_layer_is_left_out(memory_trajectory: Any) -> None:
    moving = drifting(memory_trajectory).deltas("w")
    still = [LowRank(torch.zeros(40, 1), torch.zeros(1, 30))] * 15
    trajectory = memory_trajectory(STEPS, {"w": moving, "embed_tokens.weight": moving, "frozen": still})
    alone = memory_trajectory(STEPS, {"w": moving})
    for name in ("alpharl", "next"):
        both, one = (get_predictor(name, scores=SCORES).fit(path) for path in (trajectory, alone))
        assert isinstance(both, RankOne)
        assert set(both.products) == {"w"}
        assert torch.equal(dense(both.delta("w")), dense(one.delta("w")))
