"""Full checkpoints: the same tensors however they were saved, and no tensor twice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rankleap.checkpoints import FullCheckpoint, require_same_shapes
from rankleap.checkpoints.delta import CHUNK_BYTES
from rankleap.errors import BaseMismatchError, CheckpointError, NotFiniteError

MakeModel = Callable[..., PreTrainedModel]
WeightsOf = Callable[[torch.nn.Module], dict[str, Tensor]]


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_tensors_are_the_models_own_however_sharded_and_tied(
    make_model: MakeModel, weights_of: WeightsOf, tmp_path: Path, family: str, tied: bool, shard: str
) -> None:
    model = make_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert bool(shards(tmp_path)) == (shard == "20KB")
    checkpoint, expected = FullCheckpoint(tmp_path), weights_of(model)
    assert ("lm_head.weight" in checkpoint.shapes) != tied
    assert checkpoint.shapes == {name: tuple(weight.shape) for name, weight in expected.items()}
    for name, weight in expected.items():
        assert torch.equal(checkpoint.weight(name), weight)


def test_weights_are_float32_whatever_is_stored(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    checkpoint = FullCheckpoint(tmp_path)
    assert set(checkpoint.dtypes.values()) == {"BF16"}
    assert checkpoint.tensor("model.norm.weight").dtype == torch.bfloat16
    assert checkpoint.weight("model.norm.weight").dtype == torch.float32


def test_a_single_file_saved_over_shards_counts_alone(make_model: MakeModel, tmp_path: Path) -> None:
    make_model(seed=0).save_pretrained(tmp_path, max_shard_size="20KB")
    newer = make_model(seed=1)
    newer.save_pretrained(tmp_path)
    found = FullCheckpoint(tmp_path).weight("lm_head.weight")
    assert torch.equal(found, newer.get_parameter("lm_head.weight"))


def test_a_missing_shard_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="20KB")
    lost = shards(tmp_path)[2]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"{lost.name} does not exist; the checkpoint is incomplete"):
        FullCheckpoint(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}'])
def test_an_index_without_tensors_is_no_checkpoint(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json lists no tensors"):
        FullCheckpoint(tmp_path)


def test_a_shard_without_a_tensor_of_the_index_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = tmp_path / index["weight_map"]["model.norm.weight"]
    kept = {name: tensor for name, tensor in load_file(shard).items() if name != "model.norm.weight"}
    save_file(kept, shard)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        FullCheckpoint(tmp_path)


def test_a_quantised_weight_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"w of .* is stored as I8, needed one of F32"):
        FullCheckpoint(tmp_path).weight("w")


def test_a_delta_is_the_difference_in_float32(run_directory: Path, base_directory: Path) -> None:
    base, checkpoint = FullCheckpoint(base_directory), FullCheckpoint(run_directory / "checkpoint-40")
    for name in base.shapes:
        assert torch.equal(checkpoint.delta(name, base), checkpoint.weight(name) - base.weight(name))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_by_the_tensors_name(base_directory: Path, tmp_path: Path, bad: float) -> None:
    tensors = load_file(base_directory / "model.safetensors")
    tensors["model.norm.weight"][3] = bad
    save_file(tensors, tmp_path / "model.safetensors")
    base, checkpoint = FullCheckpoint(base_directory), FullCheckpoint(tmp_path)
    checkpoint.delta("lm_head.weight", base)
    with pytest.raises(NotFiniteError, match=rf"model\.norm\.weight has NaN or infinity in {tmp_path}"):
        checkpoint.delta("model.norm.weight", base)


def test_another_base_is_refused_with_names_and_shapes(
    make_model: MakeModel, base_directory: Path, tmp_path: Path
) -> None:
    make_model("llama", intermediate_size=40, tie_word_embeddings=True).save_pretrained(tmp_path)
    checkpoint, base = FullCheckpoint(base_directory), FullCheckpoint(tmp_path)
    with pytest.raises(BaseMismatchError) as caught:
        require_same_shapes(checkpoint.shapes, base, checkpoint.directory)
    message = str(caught.value)
    assert "lm_head.weight: (64, 32) in the checkpoint, absent in the base" in message
    assert "layers.0.mlp.down_proj.weight: (32, 48) in the checkpoint, (32, 40) in the base" in message
    assert str(base_directory) in message
    require_same_shapes(base.shapes, base, tmp_path)


def test_many_mismatches_are_counted_not_listed(make_model: MakeModel, base_directory: Path, tmp_path: Path) -> None:
    make_model("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    checkpoint = FullCheckpoint(base_directory)
    with pytest.raises(BaseMismatchError, match="… and 1 more"):
        require_same_shapes(checkpoint.shapes, FullCheckpoint(tmp_path), base_directory)


def test_a_fingerprint_tells_bases_of_one_architecture_apart(
    make_model: MakeModel, base_directory: Path, tmp_path: Path
) -> None:
    make_model(seed=1).save_pretrained(tmp_path / "other")
    shutil.copytree(base_directory, tmp_path / "copy")
    first, copy, other = (FullCheckpoint(d) for d in (base_directory, tmp_path / "copy", tmp_path / "other"))
    assert first.fingerprint() == copy.fingerprint() != other.fingerprint()


def test_a_fingerprint_does_not_depend_on_sharding(make_model: MakeModel, base_directory: Path, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert FullCheckpoint(tmp_path).fingerprint() == FullCheckpoint(base_directory).fingerprint()


def test_a_directory_without_weights_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"needs model\.safetensors .* found: pytorch_model\.bin"):
        FullCheckpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        FullCheckpoint(tmp_path / "none")


def test_the_size_is_that_of_the_files(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert FullCheckpoint(tmp_path).size_bytes() == sum(path.stat().st_size for path in shards(tmp_path))


def test_a_tied_head_that_is_stored_twice_counts_once(make_model: MakeModel, tmp_path: Path) -> None:
    for name, scale in (("base", 1.0), ("run", 1.5)):
        model = make_model(tie_word_embeddings=True)
        model.save_pretrained(tmp_path / name)
        tensors = {key: scale * value for key, value in load_file(tmp_path / name / "model.safetensors").items()}
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    base, checkpoint = FullCheckpoint(tmp_path / "base"), FullCheckpoint(tmp_path / "run")
    assert "lm_head.weight" not in checkpoint.shapes_on(base)
    assert "lm_head.weight" not in base.shapes


def test_a_checkpoint_that_lacks_tensors_of_its_base_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["model.norm.weight"]
    (tmp_path / "run").mkdir()
    save_file(tensors, tmp_path / "run" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match=r"lacks 1 tensors of the base .*, such as model\.norm\.weight"):
        FullCheckpoint(tmp_path / "run").shapes_on(FullCheckpoint(tmp_path / "base"))


def test_names_that_an_index_repeats_in_vain_are_no_damage(make_model: MakeModel, tmp_path: Path) -> None:
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = next(iter(index["weight_map"].values()))
    index["weight_map"] |= {"lm_head.weight": shard, "model.layers.0.self_attn.rotary_emb.inv_freq": shard}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lm_head.weight" not in FullCheckpoint(tmp_path).shapes


def test_row_blocks_of_a_tensor_of_several_chunks_are_the_whole(tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("run", 1.0)):
        (tmp_path / name).mkdir()
        tensor = value + torch.arange(3000 * 2048, dtype=torch.float32).reshape(3000, 2048) * (1 + value)
        assert tensor.nbytes > CHUNK_BYTES
        save_file({"w": tensor}, tmp_path / name / "model.safetensors")
    base, run = (FullCheckpoint(tmp_path / name) for name in ("base", "run"))
    out, expected = torch.empty(3000, 2048), run.delta("w", base)
    lazy = run.lazy_delta("w", base)
    assert torch.equal(torch.cat(list(lazy.read(None, None))), expected)
    assert sum(len(block) for block in lazy.read(None, out)) == 3000
    assert torch.equal(out, expected)
    assert torch.equal(torch.cat(list(run.blocks("w"))), run.weight("w"))
