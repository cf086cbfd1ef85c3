"""torchtune's epochs: files that it wrote itself, whose adapters and merged weights must be one and the same model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rankleap.checkpoints import AdapterCheckpoint, FullCheckpoint, effective_weights, open_checkpoint, open_run
from rankleap.errors import CheckpointError
from writers.torchtune import write_epoch

DATA = Path(__file__).parent.parent / "data"
RUNS = [DATA / "torchtune-qwen2-lora", DATA / "torchtune-llama-dora"]


@pytest.fixture(params=RUNS, ids=lambda run: run.name)
def run(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def epoch(run: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(run / "epoch_0", tmp_path / "epoch_0"))


def merged(epoch: Path) -> dict[str, Tensor]:
    return {name: weight for path in epoch.glob("model-*") for name, weight in load_file(path).items()}


def assert_the_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)


def test_the_adapter_is_the_model_that_torchtune_merged(run: Path) -> None:
    checkpoint = open_checkpoint(run / "epoch_0")
    assert checkpoint.kind == "adapter"
    assert len(checkpoint.shapes) == 14
    assert_the_same(dict(effective_weights(checkpoint, FullCheckpoint(run / "base"))), merged(run / "epoch_0"))


def test_the_merged_weights_are_read_where_no_adapter_is(run: Path, epoch: Path) -> None:
    for path in epoch.glob("adapter_*"):
        path.unlink()
    checkpoint = open_checkpoint(epoch)
    assert checkpoint.kind == "full"
    assert_the_same(dict(effective_weights(checkpoint, FullCheckpoint(run / "base"))), merged(epoch))


def test_epochs_are_steps_of_a_run(run: Path, epoch: Path) -> None:
    shutil.copytree(epoch, epoch.parent / "epoch_1")
    (epoch.parent / "recipe_state").mkdir()
    opened = open_run(epoch.parent)
    assert (opened.steps, opened.skipped) == ([1, 2], {})
    assert opened.layout.name == "torchtune adapter"


def test_a_method_that_torchtune_does_not_name_is_told() -> None:
    methods = [open_checkpoint(run / "epoch_0") for run in RUNS]
    assert [checkpoint.settings["method"] for checkpoint in methods if isinstance(checkpoint, AdapterCheckpoint)] == [
        "LoRA",
        "DoRA",
    ]


def test_rows_of_the_adapters_tensors_are_those_of_the_whole(run: Path) -> None:
    checkpoint = open_checkpoint(run / "epoch_0")
    for key in checkpoint.source.shapes:
        assert torch.equal(checkpoint.source.read(key, slice(1, 3)), checkpoint.source.read(key)[1:3])


def test_a_pickled_copy_is_read_alike(run: Path, epoch: Path) -> None:
    torch.save(load_file(epoch / "adapter_model.safetensors"), epoch / "adapter_model.bin")
    (epoch / "adapter_model.safetensors").unlink()
    assert_the_same(dict(effective_weights(open_checkpoint(epoch), FullCheckpoint(run / "base"))), merged(epoch))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_are_put_right_for_each_family_and_method(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, family: str, dora: bool
) -> None:
    make_model(family, num_attention_heads=8).save_pretrained(tmp_path / "base")
    _, expected = write_epoch(tmp_path / "epoch_0", tmp_path / "base", dora)
    assert_the_same(
        dict(effective_weights(open_checkpoint(tmp_path / "epoch_0"), FullCheckpoint(tmp_path / "base"))), expected
    )


def test_another_tool_that_orders_its_copy_right_changes_nothing(run: Path, epoch: Path) -> None:
    checkpoint = open_checkpoint(epoch)
    right = {key: checkpoint.source.read(key).clone().contiguous() for key in checkpoint.source.shapes}
    save_file(right, epoch / "adapter_model.safetensors")
    assert_the_same(dict(effective_weights(open_checkpoint(epoch), FullCheckpoint(run / "base"))), merged(epoch))


def test_an_own_file_that_is_truncated_or_of_another_adapter_is_named(epoch: Path) -> None:
    content = (epoch / "adapter_model.pt").read_bytes()
    (epoch / "adapter_model.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"adapter_model\.pt is truncated"):
        open_checkpoint(epoch)
    torch.save({"layers.0.attn.q_proj.lora_b.weight": torch.ones(2, 2)}, epoch / "adapter_model.pt")
    with pytest.raises(CheckpointError, match=r"adapter_model\.pt needs layers\.\d\.attn\..*leave this step out"):
        open_checkpoint(epoch)


@pytest.mark.parametrize("heads", [None, 3])
def test_heads_that_do_not_fit_the_adapter_are_refused(epoch: Path, heads: int | None) -> None:
    config = json.loads((epoch / "config.json").read_text())
    config |= {"model_type": "llama", "num_key_value_heads": heads, "num_attention_heads": heads}
    (epoch / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config\.json says num_\w+ is {heads}, which does not fit"):
        open_checkpoint(epoch)
