"""Distributed checkpoints: saved by one and by two processes, full and LoRA, whole, damaged and hostile."""

import os
import pickle
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as torch_metadata

from rankleap.checkpoints import AdapterCheckpoint, FullCheckpoint, effective_weights, open_checkpoint, open_run
from rankleap.checkpoints.dcp import adapter_names, model_names, source_of, tiled
from rankleap.checkpoints.layouts import LAYOUTS, layout_of
from rankleap.checkpoints.source import TensorSource
from rankleap.errors import CheckpointError
from writers.dcp import UNEVEN, save, write_by_two
from writers.huggingface import moved_adapter, moved_model, weights_of


@pytest.fixture(scope="module")
def by_two(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes saved, each way in a folder."""
    directory = tmp_path_factory.mktemp("dcp")
    write_by_two(directory, base_directory)
    return directory


@pytest.fixture
def sharded(by_two: Path, tmp_path: Path) -> Path:
    """A copy of one, to be damaged."""
    return shutil.copytree(by_two / "accelerate", tmp_path / "checkpoint-20") / "pytorch_model_fsdp_0"


@pytest.mark.parametrize("way", ["accelerate", "prime-rl", "nemo-rl", "tensor-parallel"])
def test_shards_of_two_processes_are_the_whole_model(by_two: Path, base_directory: Path, way: str) -> None:
    checkpoint, expected = open_checkpoint(by_two / way), weights_of(moved_model(base_directory))
    assert isinstance(checkpoint, FullCheckpoint)
    assert checkpoint.shapes == {name: tuple(weight.shape) for name, weight in expected.items()}
    for name, weight in expected.items():
        assert torch.equal(checkpoint.weight(name), weight)
        assert torch.equal(checkpoint.weight(name, slice(1, 19)), weight[1:19])


def test_a_megatron_model_in_shards_over_layers_rows_and_columns_is_the_whole_model(
    by_two: Path, base_directory: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(by_two / "megatron", tmp_path / "iter_0000020")
    shutil.copy(base_directory / "config.json", directory)
    checkpoint, expected = open_checkpoint(directory), weights_of(moved_model(base_directory))
    assert checkpoint.shapes == {name: tuple(weight.shape) for name, weight in expected.items()}
    for name, weight in expected.items():
        assert torch.equal(checkpoint.source.read(name), weight)


def source_at(folder: Path) -> TensorSource:
    tensors = tiled(folder)
    return source_of(tensors, tensors.values())


@pytest.mark.parametrize("dim", [0, 1])
def test_chunks_of_unequal_size_fit_together(by_two: Path, dim: int) -> None:
    source = source_at(by_two / "uneven")
    name = f"model.norm.{dim}"
    assert torch.equal(source.read(name), UNEVEN)
    for first in range(6):
        for last in range(first, 8):
            assert torch.equal(source.read(name, slice(first, last)), UNEVEN[first:last])
    assert torch.equal(tiled(by_two / "uneven")[name].box((range(1, 4), range(2, 6))), UNEVEN[1:4, 2:6])


def test_only_the_chunks_that_are_asked_for_are_read(sharded: Path) -> None:
    source = source_at(sharded)
    expected = source.read("model.model.embed_tokens.weight", slice(0, 32)).clone()
    (sharded / "__1_0.distcp").unlink()
    assert torch.equal(source.read("model.model.embed_tokens.weight", slice(0, 32)), expected)
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp does not exist"):
        source.read("model.model.embed_tokens.weight", slice(31, 33))


@pytest.mark.parametrize("way", ["adapter", "adapter-only"])
@pytest.mark.parametrize("place", [".", "pytorch_model_fsdp_0"])
def test_lora_shards_are_read_with_the_config_beside_them(
    by_two: Path, base_directory: Path, tmp_path: Path, way: str, place: str
) -> None:
    directory = shutil.copytree(by_two / way, tmp_path / "checkpoint-20")
    adapted = moved_adapter(base_directory)
    adapted.peft_config["default"].save_pretrained(str(directory / place))
    checkpoint = open_checkpoint(directory)
    assert isinstance(checkpoint, AdapterCheckpoint)
    expected = weights_of(adapted.merge_and_unload())
    assert len(checkpoint.shapes) == 4  # two modules in two layers, and nothing of the base
    for name, weight in effective_weights(checkpoint, FullCheckpoint(base_directory)):
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)


def test_lora_shards_without_a_config_say_where_to_put_one(by_two: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json.* copy .* into .*pytorch_model_fsdp_0"):
        open_checkpoint(by_two / "adapter")


def test_an_adapter_that_peft_saved_goes_before_its_shards(by_two: Path, base_directory: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(by_two / "adapter", tmp_path / "checkpoint-20")
    moved_adapter(base_directory).save_pretrained(str(directory))
    assert layout_of(directory) == (LAYOUTS["peft"], directory)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp does not exist; the checkpoint is incomplete"):
        open_checkpoint(sharded.parent)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
@pytest.mark.parametrize("file", [".metadata", "__1_0.distcp"])
def test_a_truncated_file_is_named_when_the_checkpoint_is_opened(sharded: Path, file: str, keep: float) -> None:
    content = (sharded / file).read_bytes()
    (sharded / file).write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match=rf"{file} is truncated or damaged"):
        open_checkpoint(sharded.parent)


def test_shards_before_their_metadata_are_still_being_written(sharded: Path) -> None:
    (sharded / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: no \.metadata yet"):
        open_checkpoint(sharded.parent)
    shutil.copytree(sharded, sharded.parents[1] / "checkpoint-30")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_run(sharded.parents[1])


def test_damage_within_a_shard_is_named_when_it_is_read(sharded: Path) -> None:
    source = source_at(sharded)
    (sharded / "__0_0.distcp").write_bytes(bytes((sharded / "__0_0.distcp").stat().st_size))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is truncated or damaged"):
        source.read("model.lm_head.weight")


def test_a_tensor_with_a_hole_is_refused(sharded: Path) -> None:
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.lm_head.weight"].chunks.pop()
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"only parts of model\.lm_head\.weight"):
        open_checkpoint(sharded.parent)


class Planted:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_planted_call_is_refused_by_name_and_runs_only_when_trusted(sharded: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    metadata.planner_data = Planted(tmp_path / "ran")
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"\.metadata names .*\.system, .*--trust-pickle"):
        open_checkpoint(sharded.parent)
    assert not (tmp_path / "ran").exists()
    assert open_checkpoint(sharded.parent, trust_pickle=True).shapes
    assert (tmp_path / "ran").exists()


def test_classes_of_megatron_in_the_metadata_need_not_be_there(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_checkpoint(sharded.parent).shapes
    kind = type("MCoreMetadata", (torch_metadata.Metadata,), {"__module__": "megatron.core"})
    metadata = kind(**vars(pickle.loads((sharded / ".metadata").read_bytes())))
    metadata.mcore_data = {"a": kind({})}
    with monkeypatch.context() as patch:
        for name in ("megatron", "megatron.core"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(sys.modules["megatron.core"], "MCoreMetadata", kind, raising=False)
        (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "megatron" not in sys.modules
    assert open_checkpoint(sharded.parent).shapes == expected


def test_a_folder_of_training_state_alone_holds_no_weights(tmp_path: Path) -> None:
    save({"optimizer": {"exp_avg": torch.ones(3)}, "rng_state": torch.ones(2)}, tmp_path)
    with pytest.raises(CheckpointError, match="holds no weights, only training state"):
        open_checkpoint(tmp_path)


def test_what_torch_saves_oddly_is_read_as_it_was(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    state: dict[str, Tensor] = {
        "transposed": whole.reshape(4, 6).T,
        "view": whole[3:9].reshape(2, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "empty": torch.empty(0, 4),
        "bfloat16": whole.bfloat16(),
        "float8": whole.to(torch.float8_e4m3fn),
        "layers": whole.reshape(2, 3, 4).transpose(1, 2),
    }
    save(state, tmp_path)
    source = source_at(tmp_path)
    assert source.dtypes == dict.fromkeys(state, "F32") | {
        "scalar": "F16",
        "bfloat16": "BF16",
        "float8": "torch.float8_e4m3fn",
    }
    for name, weight in state.items():
        assert source.shapes[name] == tuple(weight.shape)
        assert torch.equal(source.read(name).float(), weight.float())
        if weight.ndim:
            assert torch.equal(source.read(name, slice(1, 3)).float(), weight[1:3].float())


def test_a_head_that_repeats_the_embedding_is_left_out_as_the_base_does(tmp_path: Path) -> None:
    embedding = torch.randn(20, 4)
    save({"model": {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}}, tmp_path)
    assert list(open_checkpoint(tmp_path).shapes) == ["model.embed_tokens.weight"]


def test_size_counts_the_weights_and_not_the_optimizer(by_two: Path) -> None:
    alone, beside_optimizer = (open_checkpoint(by_two / way).size_bytes() for way in ("accelerate", "prime-rl"))
    assert alone == beside_optimizer < sum(p.stat().st_size for p in (by_two / "prime-rl" / "trainer").iterdir()) / 2


@pytest.mark.parametrize(
    ("saved", "own"),
    [
        (["app.model.model.norm.weight", "app.model.lm_head.weight"], ["model.norm.weight", "lm_head.weight"]),
        (["model.layers.0.a", "model.norm.weight"], ["model.layers.0.a", "model.norm.weight"]),
        (["model.model.layers.0.a", "model.model.norm.weight"], ["model.layers.0.a", "model.norm.weight"]),
        (["actor.module.model.language_model.a"], ["model.language_model.a"]),
        (["model._orig_mod.model.layers.0._checkpoint_wrapped_module.a.weight"], ["model.layers.0.a.weight"]),
        (
            ["_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.a", "lm_head.a"],
            ["model.layers.0.a", "lm_head.a"],
        ),
        (["module.model"], ["model"]),
        (["state_dict.model.lm_head.weight", "state_dict.model.model.x"], ["lm_head.weight", "model.x"]),
        (["model.decoder.layers.0.a", "model.output_layer.weight"], ["decoder.layers.0.a", "output_layer.weight"]),
    ],
)
def test_what_wraps_a_model_is_taken_off_its_names(saved: list[str], own: list[str]) -> None:
    assert model_names(saved) == dict(zip(own, saved, strict=True))


def test_only_the_trained_parts_of_a_live_adapter_are_kept() -> None:
    names = {
        "m.q_proj.base_layer.weight": None,
        "m.norm.weight": None,
        "m.q_proj.lora_A.default.weight": "m.q_proj.lora_A.weight",
        "m.q_proj.lora_A.ref.weight": None,  # TRL's frozen copy
        "m.q_proj.lora_magnitude_vector.default.weight": "m.q_proj.lora_magnitude_vector.weight",
        "m.lm_head.original_module.weight": None,
        "m.lm_head.modules_to_save.default.weight": "m.lm_head.modules_to_save.weight",
    }
    assert adapter_names(names, Path()) == {new: old for old, new in names.items() if new}
    assert adapter_names(["m.q.base_layer.weight", "m.q.lora_A.0", "m.q.lora_B.0"], Path()) == {
        "m.q.lora_A": "m.q.lora_A.0",
        "m.q.lora_B": "m.q.lora_B.0",
    }


def test_several_adapters_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="red and blue"):
        adapter_names(["m.q.lora_A.red.weight", "m.q.lora_A.blue.weight"], Path("here"))
