"""Trajectories from checkpoints: exact, in order, of one base."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rankleap.checkpoints import DeltaRows, FullCheckpoint, LowRank, dense, open_run
from rankleap.errors import BaseMismatchError, NotFiniteError, TrajectoryError
from rankleap.lowrank import gram_of_increments
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


def test_lazy_deltas_are_the_deltas(trajectory: CheckpointTrajectory) -> None:
    for name, shape in trajectory.shapes.items():
        lazy, exact = trajectory.lazy_delta(name, 20), trajectory.delta(name, 20)
        if len(shape) == 1:
            assert torch.equal(lazy, exact)  # pyright: ignore[reportArgumentType]
            continue
        assert isinstance(lazy, DeltaRows)
        out = torch.empty(shape)
        assert torch.equal(torch.cat(list(lazy.read(None, None))), exact)  # pyright: ignore[reportArgumentType]
        assert all(block.storage_offset() >= 0 for block in lazy.read(None, out))
        assert torch.equal(out, exact)  # pyright: ignore[reportArgumentType]


def test_lazy_deltas_of_an_adapter_are_products_or_rows(
    save_adapter: Callable[..., PeftModel], base_directory: Path, tmp_path: Path
) -> None:
    for use_dora in (False, True):
        save_adapter(tmp_path / str(use_dora) / "checkpoint-1", use_dora=use_dora)
        path = run_trajectory(open_run(tmp_path / str(use_dora)), FullCheckpoint(base_directory))
        for name, shape in path.shapes.items():
            lazy, exact = path.lazy_delta(name, 1), dense(path.delta(name, 1))
            assert isinstance(lazy, DeltaRows) == use_dora
            if isinstance(lazy, DeltaRows):
                out = torch.empty(shape)
                torch.testing.assert_close(torch.cat(list(lazy.read(None, out))), exact)
                torch.testing.assert_close(out, exact)


@pytest.mark.parametrize("first", [0, 2])
def test_the_gram_matrix_in_one_pass_is_that_of_the_deltas(trajectory: CheckpointTrajectory, first: int) -> None:
    for name in trajectory.shapes:
        rows = torch.stack([dense(delta).flatten().double() for delta in trajectory.deltas(name)[first:]])
        torch.testing.assert_close(trajectory.gram(name, first), rows @ rows.T, rtol=1e-5, atol=0)


def test_the_gram_matrix_keeps_the_distance_of_steps_that_nearly_agree() -> None:
    start, step = torch.randn(1, 10**5, generator=torch.Generator().manual_seed(0)), 2.0**-13
    far, apart = 100 * start, step * torch.ones(1, 10**5)
    gram_TT = gram_of_increments([torch.cat([far, apart])])
    distance = float(gram_TT[0, 0] + gram_TT[1, 1] - 2 * gram_TT[0, 1]) ** 0.5
    assert distance == pytest.approx(step * 10**2.5, rel=1e-3)


def test_a_step_that_is_not_finite_is_named_by_the_gram_matrix(
    run_directory: Path, base_directory: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run_directory, tmp_path / "run"))
    weights = load_file(run / "checkpoint-30" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(weights, run / "checkpoint-30" / "model.safetensors", metadata={"format": "pt"})
    trajectory = run_trajectory(open_run(run), FullCheckpoint(base_directory))
    with pytest.raises(NotFiniteError, match="up_proj"):
        trajectory.gram("model.layers.1.mlp.up_proj.weight")


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
