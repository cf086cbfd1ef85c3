"""Every layout: what the trainer's own writer wrote is read as the model that it stands for, and damage is named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from rankleap.checkpoints import FullCheckpoint, effective_weights, open_checkpoint, open_run
from rankleap.checkpoints.run import LAYOUTS
from rankleap.errors import CheckpointError

Written = tuple[Path, dict[str, Tensor]]
WEIGHTS = {"hf": "model.safetensors", "peft": "adapter_model.safetensors"}


@pytest.fixture(scope="module", params=LAYOUTS)
def written(
    request: pytest.FixtureRequest,
    base_directory: Path,
    save_adapter: Callable[..., PeftModel],
    weights_of: Callable[[torch.nn.Module], dict[str, Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Written]:
    """A layout's name, a checkpoint in it, and the weights of the model that its writer had in memory."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "peft":
        merged = save_adapter(directory).merge_and_unload()
        return request.param, (directory, weights_of(merged))
    assert request.param == "hf", "a new layout needs its trainer's own writer here"
    model = LlamaForCausalLM.from_pretrained(base_directory)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(directory)
    return request.param, (directory, weights_of(model))


def test_the_effective_weights_are_those_of_the_writers_model(
    written: tuple[str, Written], base_directory: Path
) -> None:
    _, (directory, expected) = written
    found = dict(effective_weights(open_checkpoint(directory), FullCheckpoint(base_directory)))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)


def test_every_delta_is_effective_minus_base(written: tuple[str, Written], base_directory: Path) -> None:
    base, checkpoint = FullCheckpoint(base_directory), open_checkpoint(written[1][0])
    for name, shape in checkpoint.shapes.items():
        assert checkpoint.delta(name, base).shape == shape
        effective = checkpoint.weight(name, base) if checkpoint.kind == "adapter" else checkpoint.weight(name)  # pyright: ignore[reportCallIssue]
        delta = checkpoint.delta(name, base)
        product = delta if isinstance(delta, Tensor) else delta.left_MR @ delta.right_RN
        torch.testing.assert_close(product, effective - base.weight(name), atol=1e-6, rtol=0)


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_named_and_its_step_skipped(
    written: tuple[str, Written], tmp_path: Path, keep: float
) -> None:
    layout, (directory, _) = written
    shutil.copytree(directory, tmp_path / "checkpoint-10")
    shutil.copytree(directory, tmp_path / "checkpoint-20")
    weights = tmp_path / "checkpoint-20" / WEIGHTS[layout]
    content = weights.read_bytes()
    weights.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=rf"checkpoint-20/{WEIGHTS[layout]} is truncated or damaged"):
        open_checkpoint(tmp_path / "checkpoint-20")
    run = open_run(tmp_path)
    assert run.steps == [10]
    assert WEIGHTS[layout] in run.skipped["checkpoint-20"]


def test_missing_weights_are_named(written: tuple[str, Written], tmp_path: Path) -> None:
    layout, (directory, _) = written
    shutil.copytree(directory, tmp_path / "c")
    (tmp_path / "c" / WEIGHTS[layout]).unlink()
    with pytest.raises(CheckpointError, match=WEIGHTS[layout]):
        open_checkpoint(tmp_path / "c")
