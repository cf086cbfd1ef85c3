"""Every layout: what the trainer's own writer wrote is read as the model that it stands for, and damage is named."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rankleap.checkpoints import FullCheckpoint, effective_weights, open_checkpoint, open_run
from rankleap.checkpoints.layouts import LAYOUTS
from rankleap.errors import CheckpointError
from writers import WRITERS

Written = tuple[Path, str, dict[str, Tensor]]
"""The checkpoint, its file to damage, and the weights of the model that its writer had in memory."""


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request: pytest.FixtureRequest, base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    directory = tmp_path_factory.mktemp(request.param)
    return directory, *WRITERS[request.param](directory, base_directory)


def test_the_effective_weights_are_those_of_the_writers_model(written: Written, base_directory: Path) -> None:
    directory, _, expected = written
    found = dict(effective_weights(open_checkpoint(directory), FullCheckpoint(base_directory)))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)


def test_every_delta_is_effective_minus_base(written: Written, base_directory: Path) -> None:
    base, checkpoint = FullCheckpoint(base_directory), open_checkpoint(written[0])
    for name, shape in checkpoint.shapes.items():
        assert checkpoint.delta(name, base).shape == shape
        effective = checkpoint.weight(name, base) if checkpoint.kind == "adapter" else checkpoint.weight(name)  # pyright: ignore[reportCallIssue]
        delta = checkpoint.delta(name, base)
        product = delta if isinstance(delta, Tensor) else delta.left_MR @ delta.right_RN
        torch.testing.assert_close(product, effective - base.weight(name), atol=1e-6, rtol=0)


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_named_and_its_step_skipped(written: Written, tmp_path: Path, keep: float) -> None:
    directory, file, _ = written
    shutil.copytree(directory, tmp_path / "checkpoint-10")
    shutil.copytree(directory, tmp_path / "checkpoint-20")
    weights = tmp_path / "checkpoint-20" / file
    content = weights.read_bytes()
    weights.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"truncated|damaged|incomplete"):
        open_checkpoint(tmp_path / "checkpoint-20")
    run = open_run(tmp_path)
    assert run.steps == [10]
    assert Path(file).name in run.skipped["checkpoint-20"]


def test_missing_weights_are_named(written: Written, tmp_path: Path) -> None:
    directory, file, _ = written
    shutil.copytree(directory, tmp_path / "c")
    (tmp_path / "c" / file).unlink()
    with pytest.raises(CheckpointError, match=Path(file).name.partition(".")[0]):
        open_checkpoint(tmp_path / "c")
