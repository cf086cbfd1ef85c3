"""Trajectories from checkpoints: exact, in order, of one base."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from rankleap.checkpoints import FullCheckpoint, LowRank, open_run
from rankleap.errors import BaseMismatchError, TrajectoryError
from rankleap.trajectory import CheckpointTrajectory, RecordedTrajectory, run_trajectory


@pytest.fixture
def trajectory(run_directory: Path, base_directory: Path) -> CheckpointTrajectory:
    return run_trajectory(open_run(run_directory), FullCheckpoint(base_directory))


def test_deltas_are_those_of_the_checkpoints(trajectory: CheckpointTrajectory) -> None:
    assert trajectory.steps == (10, 20, 30, 40)
    assert trajectory.shapes == trajectory.base.shapes
    for name in trajectory.shapes:
        for step, delta in zip(trajectory.steps, trajectory.deltas(name), strict=True):
            expected = trajectory.checkpoints[step].weight(name) - trajectory.base.weight(name)  # pyright: ignore[reportCallIssue]
            assert torch.equal(delta, expected)  # pyright: ignore[reportArgumentType]


def test_adapters_give_products_of_the_matrices_that_they_hold(lora_run: Path, base_directory: Path) -> None:
    trajectory = run_trajectory(open_run(lora_run), FullCheckpoint(base_directory))
    assert set(trajectory.shapes) == {
        f"model.layers.{layer}.{module}.weight" for layer in (0, 1) for module in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert all(isinstance(delta, LowRank) for name in trajectory.shapes for delta in trajectory.deltas(name))


def test_the_past_is_what_lies_up_to_a_step(trajectory: CheckpointTrajectory) -> None:
    assert trajectory.until(30).steps == (10, 20, 30)
    assert trajectory.until(35).steps == (10, 20, 30)
    assert trajectory.steps == (10, 20, 30, 40)
    with pytest.raises(TrajectoryError, match=r"no checkpoint up to step 9; there are \[10, 20, 30, 40\]"):
        trajectory.until(9)


@pytest.mark.parametrize("steps", [(10, 10), (20, 10), (10, 30, 20)])
def test_steps_must_increase(memory_trajectory: type, steps: tuple[int, ...]) -> None:
    with pytest.raises(TrajectoryError, match="steps must increase, got"):
        memory_trajectory(steps, {"w": [torch.zeros(2)] * len(steps)})


def test_a_base_of_another_shape_is_refused(
    run_directory: Path, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model(intermediate_size=40).save_pretrained(tmp_path)
    with pytest.raises(
        BaseMismatchError, match=r"down_proj\.weight: \(32, 48\) in the checkpoint, \(32, 40\) in the base"
    ):
        run_trajectory(open_run(run_directory), FullCheckpoint(tmp_path))


def test_adapters_of_different_modules_are_no_one_run(
    lora_run: Path, base_directory: Path, save_adapter: Callable[..., PeftModel], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(lora_run, tmp_path / "run"))
    save_adapter(run / "checkpoint-50", target_modules=["q_proj"])
    with pytest.raises(TrajectoryError, match="do not hold the same tensors"):
        run_trajectory(open_run(run), FullCheckpoint(base_directory))


def test_a_directory_without_an_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="rankleap trajectory RUN --base BASE"):
        RecordedTrajectory(tmp_path)


def test_an_index_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"format": 99}')
    with pytest.raises(TrajectoryError, match="has format 99, this version reads 1"):
        RecordedTrajectory(tmp_path)
