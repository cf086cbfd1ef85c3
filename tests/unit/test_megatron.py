"""Megatron's torch_dist checkpoints: fused by the writer, read back as the model's own weights exactly.

The writer fuses after Megatron's documentation and torch saves, for Megatron's own writer does not run without a GPU.
"""

import argparse
import enum
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rankleap.checkpoints import open_checkpoint
from rankleap.checkpoints.layouts import LAYOUTS, layout_of
from rankleap.checkpoints.megatron import megatron_files
from rankleap.errors import CheckpointError
from writers.dcp import save
from writers.huggingface import weights_of
from writers.megatron import PADDED, megatron_state

SIZES = {
    "vocab_size": 70,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama": lambda **config: LlamaForCausalLM(LlamaConfig(**SIZES, **config)),
    "qwen2": lambda **config: Qwen2ForCausalLM(Qwen2Config(**SIZES, **config)),
    "qwen3": lambda **config: Qwen3ForCausalLM(Qwen3Config(**SIZES, **{"head_dim": 16, **config})),
}


def model_of(family: str, **config: object) -> PreTrainedModel:
    """No two weights alike, biases and norms included."""
    model = FAMILIES[family](**config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def saved(model: PreTrainedModel, directory: Path, state: dict[str, object] | None = None) -> Path:
    save(state or megatron_state(model), directory)
    model.config.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_weights_are_the_models_own(family: str, stacked: bool, tmp_path: Path) -> None:
    model = model_of(family)
    checkpoint = open_checkpoint(saved(model, tmp_path, megatron_state(model, stacked)))
    expected = weights_of(model)
    assert checkpoint.shapes == {name: tuple(weight.shape) for name, weight in expected.items()}
    for name, weight in expected.items():
        assert torch.equal(checkpoint.source.read(name), weight)


@pytest.mark.parametrize("stacked", [False, True])
def test_any_rows_are_those_of_the_whole(stacked: bool, tmp_path: Path) -> None:
    model = model_of("qwen2")
    checkpoint = open_checkpoint(saved(model, tmp_path, megatron_state(model, stacked)))
    for part in ("self_attn.q_proj.weight", "self_attn.v_proj.weight", "self_attn.k_proj.bias", "mlp.up_proj.weight"):
        name = f"model.layers.1.{part}"
        whole = checkpoint.source.read(name)
        for first, last in [(0, 1), (3, 12), (7, 9), (8, 100), (5, 5), (0, None)]:
            assert torch.equal(checkpoint.source.read(name, slice(first, last)), whole[first:last])


@pytest.mark.parametrize("prefix", ["model.", "module.", "module.module."])
def test_a_wrapper_in_the_names_changes_nothing(prefix: str, tmp_path: Path) -> None:
    model = model_of("llama")
    state = {f"{prefix}{name}": value for name, value in megatron_state(model).items() if isinstance(value, Tensor)}
    assert set(open_checkpoint(saved(model, tmp_path, state)).shapes) == set(weights_of(model))


def test_other_spellings_of_norms_and_gates_are_the_same(tmp_path: Path) -> None:
    model = model_of("qwen3")
    state = megatron_state(model, stacked=True)
    state["decoder.layers.input_layernorm.weight"] = state.pop(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    )
    state["decoder.layers.pre_mlp_layernorm.weight"] = state.pop("decoder.layers.mlp.linear_fc1.layer_norm_weight")
    fused = state.pop("decoder.layers.mlp.linear_fc1.weight")
    assert isinstance(fused, Tensor)
    state["decoder.layers.mlp.linear_fc1.weight_w"], state["decoder.layers.mlp.linear_fc1.weight_v"] = fused.chunk(2, 1)
    checkpoint = open_checkpoint(saved(model, tmp_path, state))
    for name, weight in weights_of(model).items():
        assert torch.equal(checkpoint.source.read(name), weight)


def test_tied_embeddings_are_there_once(tmp_path: Path) -> None:
    model = model_of("qwen2", tie_word_embeddings=True)
    assert set(open_checkpoint(saved(model, tmp_path)).shapes) == set(weights_of(model))


class Backend(enum.Enum):
    """Such as Megatron's own classes among its arguments."""

    FLASH = 1


def test_megatrons_own_arguments_tell_the_heads_too(tmp_path: Path) -> None:
    model = model_of("qwen3")
    save(megatron_state(model), tmp_path)
    arguments = argparse.Namespace(
        num_attention_heads=6, num_query_groups=2, group_query_attention=True, kv_channels=16, vocab_size=None,
        attention_backend=Backend.FLASH, params_dtype=torch.bfloat16,
    )  # fmt: skip
    torch.save({"args": arguments, "iteration": 100}, tmp_path / "common.pt")
    source = megatron_files(tmp_path)
    for name, weight in weights_of(model).items():
        assert torch.equal(source.read(name)[: len(weight)], weight)
    assert source.shapes["lm_head.weight"] == (PADDED, 48)  # kept, for nothing tells the vocabulary


def test_without_heads_the_config_and_the_converters_are_named(tmp_path: Path) -> None:
    save(megatron_state(model_of("llama")), tmp_path / "iter_0000100")
    with pytest.raises(CheckpointError, match=r"copy the model's config\.json .*convert_torch_dist_to_hf"):
        open_checkpoint(tmp_path / "iter_0000100")


def test_a_config_of_other_heads_is_refused(tmp_path: Path) -> None:
    saved(model_of("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    with pytest.raises(
        CheckpointError, match=r"linear_qkv\.weight has 80 rows, needed 96 for 6 query heads in 3 groups"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        "decoder.layers.0.mlp.router.weight",
        "decoder.layers.0.self_attention.linear_kv_up_proj.weight",
        "mtp.layers.0.eh_proj.weight",
    ],
)
def test_what_is_not_in_the_map_is_refused_with_the_converters(name: str, tmp_path: Path) -> None:
    model = model_of("llama")
    saved(model, tmp_path, megatron_state(model) | {name: torch.ones(3, 4, 5)})
    with pytest.raises(CheckpointError, match=rf"{name} has no place .*verl\.model_merger merge --backend megatron"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "place", [".", "dist_ckpt", "actor/dist_ckpt", "actor/model/dist_ckpt", "policy", "policy/weights/iter_0000000"]
)
def test_megatron_is_found_where_trainers_put_it(place: str, tmp_path: Path) -> None:
    save({"embedding.word_embeddings.weight": torch.ones(2, 2)}, tmp_path / place)
    assert layout_of(tmp_path) == (LAYOUTS["megatron"], tmp_path / place)


def test_an_optimizer_alone_is_no_megatron_model(tmp_path: Path) -> None:
    save({"optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": torch.ones(2)}, tmp_path / "actor/dist_ckpt")
    assert LAYOUTS["megatron"].find(tmp_path) is None


def test_shards_of_megatron_before_their_metadata_are_incomplete(tmp_path: Path) -> None:
    save(megatron_state(model_of("llama")), tmp_path / "actor/dist_ckpt")
    (tmp_path / "actor/dist_ckpt/.metadata").unlink()
    with pytest.raises(CheckpointError, match=r"dist_ckpt is incomplete: no \.metadata yet"):
        open_checkpoint(tmp_path)
