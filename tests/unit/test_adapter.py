"""The files of an adapter: its keys, its config, what is refused and how; what each method means is tested beside methods.py."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rankleap.checkpoints import AdapterCheckpoint, FullCheckpoint, LowRank, dense, open_checkpoint
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


def test_one_base_has_biases_to_scale_and_another_has_none(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    for name, biased in (("with", True), ("without", False)):
        make_model(attention_bias=biased).save_pretrained(tmp_path / name)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(make_model(), config).save_pretrained(str(tmp_path / "adapter"))
    checkpoint = AdapterCheckpoint(tmp_path / "adapter")
    found = {name: set(checkpoint.shapes_on(FullCheckpoint(tmp_path / name))) for name in ("with", "without")}
    assert found["without"] == set(checkpoint.shapes)
    assert {name.rpartition(".")[2] for name in found["with"] - found["without"]} == {"bias"}


def test_a_bias_is_read_under_its_own_name(save_adapter: SaveAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert AdapterCheckpoint(tmp_path).shapes["model.layers.0.self_attn.q_proj.bias"] == (32,)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("start", ["pissa_niter_16", "olora", "corda", "lora_ga"])
def test_an_initialisation_that_changes_the_base_needs_the_initial_adapter(
    save_adapter: SaveAdapter, tmp_path: Path, start: str
) -> None:
    save_adapter(tmp_path / "checkpoint-10")
    edit_config(tmp_path / "checkpoint-10", init_lora_weights=start)
    said = rf"initialised with '{start}', which changes the base.*beside the checkpoint as pissa_init/.*plain LoRA"
    with pytest.raises(CheckpointError, match=said):
        AdapterCheckpoint(tmp_path / "checkpoint-10")
    save_adapter(tmp_path / "pissa_init", seed=1)
    assert AdapterCheckpoint(tmp_path / "checkpoint-10").shapes


def test_the_start_of_another_run_is_refused(save_adapter: SaveAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path / "checkpoint-10", init_lora_weights="pissa")
    save_adapter(tmp_path / "pissa_init", r=2)
    with pytest.raises(CheckpointError, match=r"pissa_init is not the start of .*checkpoint-10: model.* another shape"):
        AdapterCheckpoint(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("start", ["loftq", "something new", None])
def test_an_initialisation_after_which_nothing_tells_the_base_is_refused(
    save_adapter: SaveAdapter, tmp_path: Path, start: str | None
) -> None:
    save_adapter(tmp_path / "checkpoint-10")
    save_adapter(tmp_path / "pissa_init", seed=1)
    edit_config(tmp_path / "checkpoint-10", init_lora_weights=start)
    with pytest.raises(CheckpointError, match=rf"initialised with {start!r}, whose base no file of the adapter tells"):
        AdapterCheckpoint(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_an_initialisation_that_keeps_the_base_is_plain_lora(
    base_directory: Path, save_adapter: SaveAdapter, tmp_path: Path, start: object
) -> None:
    save_adapter(tmp_path)
    base = FullCheckpoint(base_directory)
    name = "model.layers.0.self_attn.q_proj.weight"
    plain = dense(AdapterCheckpoint(tmp_path).delta(name, base))
    edit_config(tmp_path, init_lora_weights=start)
    assert torch.equal(dense(AdapterCheckpoint(tmp_path).delta(name, base)), plain)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "OFT"}, r"holds a OFT adapter; those that are read: LORA, .*ADALORA, .*LN_TUNING"),
        ({"peft_type": "MISS", "init_weights": "new"}, "holds a MISS new adapter; those that are read"),
        ({"peft_type": None}, "holds a None adapter"),
        ({"fan_in_fan_out": True}, "trained with fan_in_fan_out"),
        ({"use_qalora": True, "layer_replication": [[0, 2]]}, "with use_qalora, layer_replication, which is not read"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_alpha": 0}, r"adapter_config\.json has no lora_alpha above 0; write there what"),
        ({"r": None, "lora_alpha": None}, "has no r and lora_alpha above 0"),
    ],
)
def test_an_adapter_that_is_not_read_is_refused_by_name(
    save_adapter: SaveAdapter, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    save_adapter(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=said):
        AdapterCheckpoint(tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_dora_on_embeddings_is_refused_by_name(save_adapter: SaveAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path, use_dora=True, target_modules=["embed_tokens"])
    with pytest.raises(
        CheckpointError, match=r"holds .*lora_embedding_A.* of model\.embed_tokens\.weight; needed lora_A"
    ):
        AdapterCheckpoint(tmp_path)


def test_an_adapter_without_its_other_half_is_refused(save_adapter: SaveAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, tmp_path / "adapter_model.safetensors")
    said = r"holds lora_A \(4, 32\) of model\.layers\.0\.self_attn\.q_proj\.weight; needed lora_A \[R N\] \+ lora_B \[M R\]"
    with pytest.raises(CheckpointError, match=said):
        AdapterCheckpoint(tmp_path)


@pytest.mark.parametrize("shape", [(0,), (128,), (32, 3), (32, 4, 1, 1)])
def test_an_adapter_saved_without_gathering_its_shards_is_refused(
    save_adapter: SaveAdapter, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.zeros(shape)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    said = r"q_proj\.weight; needed .*if training was sharded, gather the weights before saving"
    with pytest.raises(CheckpointError, match=said):
        AdapterCheckpoint(tmp_path)


def test_a_rank_of_zero_is_refused_in_lora(save_adapter: SaveAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(0, 32)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.zeros(32, 0)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"\(0, 32\).* of model\.layers\.0\.self_attn\.q_proj\.weight; needed"):
        AdapterCheckpoint(tmp_path)


def test_a_pickled_adapter_reads_like_a_safe_one(
    base_directory: Path, save_adapter: SaveAdapter, tmp_path: Path
) -> None:
    model = save_adapter(tmp_path / "safe")
    # As OpenRLHF writes it under ZeRO-3: PEFT no longer writes pickles itself.
    model.save_pretrained(str(tmp_path / "pickled"))
    (tmp_path / "pickled" / "adapter_model.safetensors").unlink()
    torch.save(get_peft_model_state_dict(model), tmp_path / "pickled" / "adapter_model.bin")
    base, safe, pickled = (
        FullCheckpoint(base_directory),
        *(AdapterCheckpoint(tmp_path / n) for n in ("safe", "pickled")),
    )
    assert pickled.shapes == safe.shapes
    assert pickled.size_bytes() == (tmp_path / "pickled" / "adapter_model.bin").stat().st_size
    for name in safe.shapes:
        assert torch.equal(dense(pickled.delta(name, base)), dense(safe.delta(name, base)))


def test_the_safe_file_wins_over_the_pickle(save_adapter: SaveAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"no pickle")
    assert AdapterCheckpoint(tmp_path).shapes


def test_a_damaged_pickle_is_an_error_that_names_it(save_adapter: SaveAdapter, tmp_path: Path) -> None:
    model = save_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(get_peft_model_state_dict(model), tmp_path / "adapter_model.bin")
    content = (tmp_path / "adapter_model.bin").read_bytes()
    for size in (0, len(content) // 2, len(content) - 1):
        (tmp_path / "adapter_model.bin").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
            AdapterCheckpoint(tmp_path)


def test_a_pickle_that_names_a_function_is_refused_unless_it_is_trusted(
    save_adapter: SaveAdapter, tmp_path: Path
) -> None:
    model = save_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({**get_peft_model_state_dict(model), "more": os.getcwd}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"getcwd.*--trust-pickle"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path, trust_pickle=True).shapes


def test_a_config_without_weights_is_an_error_that_names_what_is_missing(
    save_adapter: SaveAdapter, tmp_path: Path
) -> None:
    save_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors does not exist; the checkpoint is incomplete"
    ):
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


def test_the_settings_are_those_of_the_config(save_adapter: SaveAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path, use_rslora=True, use_dora=True, target_modules=["q_proj"])
    found = AdapterCheckpoint(tmp_path).settings
    assert found == {"method": "rsLoRA DoRA", "rank": 4, "alpha": 12, "target_modules": ["q_proj"]}
