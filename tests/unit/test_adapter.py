"""The effective delta of an adapter equals PEFT's own merged model minus the base, without going through it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankleap.checkpoints import AdapterCheckpoint, FullCheckpoint, LowRank, dense
from rankleap.errors import CheckpointError, NotFiniteError

SaveAdapter = Callable[..., PeftModel]
WeightsOf = Callable[[torch.nn.Module], dict[str, Tensor]]

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 5}},
    "rslora-patterns": {
        "use_rslora": True,
        "rank_pattern": {"layers.0.mlp.down_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "dora": {"use_dora": True},
    "modules-to-save": {"modules_to_save": ["lm_head", "norm"]},
    "all-linear": {"target_modules": "all-linear"},
    "rank-above-the-matrix": {"r": 40, "target_modules": ["k_proj"]},
    "untrained-b-is-zero": {"init_lora_weights": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_effective_delta_is_the_merged_model_minus_the_base(
    variant: str, base_directory: Path, save_adapter: SaveAdapter, weights_of: WeightsOf, tmp_path: Path
) -> None:
    merged = weights_of(save_adapter(tmp_path, **VARIANTS[variant]).merge_and_unload())
    base, checkpoint = FullCheckpoint(base_directory), AdapterCheckpoint(tmp_path)
    moved = {name for name, weight in merged.items() if not torch.equal(weight, base.weight(name))}
    assert moved == set(checkpoint.shapes)
    for name, shape in checkpoint.shapes.items():
        delta = checkpoint.delta(name, base)
        assert shape == tuple(delta.shape) == base.shapes[name]
        torch.testing.assert_close(dense(delta), merged[name] - base.weight(name), atol=2e-6, rtol=0)
        torch.testing.assert_close(checkpoint.weight(name, base), merged[name], atol=2e-6, rtol=0)


def test_a_lora_delta_stays_the_product_of_its_factors(
    base_directory: Path, save_adapter: SaveAdapter, tmp_path: Path
) -> None:
    save_adapter(tmp_path)
    base, checkpoint = FullCheckpoint(base_directory), AdapterCheckpoint(tmp_path)
    for name in checkpoint.shapes:
        delta = checkpoint.delta(name, base)
        assert isinstance(delta, LowRank)
        assert delta.left_MR.shape[1] == 4


def test_a_dora_delta_is_dense(base_directory: Path, save_adapter: SaveAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path, use_dora=True)
    base, checkpoint = FullCheckpoint(base_directory), AdapterCheckpoint(tmp_path)
    assert all(isinstance(checkpoint.delta(name, base), Tensor) for name in checkpoint.shapes)


def test_a_bf16_merge_would_lose_what_the_product_keeps(
    base_directory: Path, save_adapter: SaveAdapter, tmp_path: Path
) -> None:
    model = save_adapter(tmp_path, init_lora_weights=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(1e-3)
    model.save_pretrained(str(tmp_path))
    base, checkpoint = FullCheckpoint(base_directory), AdapterCheckpoint(tmp_path)
    name = next(iter(checkpoint.shapes))
    exact, start = dense(checkpoint.delta(name, base)), base.weight(name)
    through_bf16 = (start + exact).bfloat16().float() - start.bfloat16().float()
    assert torch.nn.functional.cosine_similarity(exact.flatten(), through_bf16.flatten(), dim=0) < 0.9


def test_a_bias_is_read_under_its_own_name(save_adapter: SaveAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert AdapterCheckpoint(tmp_path).shapes["model.layers.0.self_attn.q_proj.bias"] == (32,)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "eva", "corda"])
def test_an_initialisation_that_changes_the_base_is_refused(
    save_adapter: SaveAdapter, tmp_path: Path, start: str
) -> None:
    save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
    with pytest.raises(CheckpointError, match=rf"initialised with '{start}', which changes the base.*plain LoRA"):
        AdapterCheckpoint(tmp_path)


def test_pissa_as_peft_saves_it_is_refused(save_adapter: SaveAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path, init_lora_weights="pissa")
    with pytest.raises(CheckpointError, match="'pissa'"):
        AdapterCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "IA3 adapter"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_qalora": True}, "with use_qalora"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    save_adapter: SaveAdapter, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=said):
        AdapterCheckpoint(tmp_path)


@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'"
)
@pytest.mark.parametrize("changes", [{"target_modules": ["embed_tokens"]}, {"lora_bias": True}])
def test_parts_that_are_not_s_b_a_are_refused_by_name(
    save_adapter: SaveAdapter, tmp_path: Path, changes: dict[str, Any]
) -> None:
    save_adapter(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=r"holds .*(lora_embedding_A|lora_B\.bias).* of model\..*; needed lora_A"):
        AdapterCheckpoint(tmp_path)


def test_an_adapter_without_its_other_half_is_refused(save_adapter: SaveAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds lora_A of model\.layers\.0\.self_attn\.q_proj\.weight"):
        AdapterCheckpoint(tmp_path)


@pytest.mark.parametrize("shape", [(0,), (128,), (32, 3), (32, 4, 1, 1)])
def test_an_adapter_saved_without_gathering_its_shards_is_refused(
    save_adapter: SaveAdapter, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.zeros(shape)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"of model\.layers\.0\.self_attn\.q_proj\.weight are no matrices"):
        AdapterCheckpoint(tmp_path)


def test_a_number_that_is_none_is_refused_by_the_tensors_name(
    base_directory: Path, save_adapter: SaveAdapter, tmp_path: Path
) -> None:
    save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(NotFiniteError, match=r"layers\.0\.self_attn\.q_proj\.weight has NaN"):
        AdapterCheckpoint(tmp_path).delta("model.layers.0.self_attn.q_proj.weight", FullCheckpoint(base_directory))


def test_an_adapter_names_its_base(base_directory: Path, save_adapter: SaveAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    assert AdapterCheckpoint(tmp_path).base == str(base_directory)
