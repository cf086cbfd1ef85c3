"""What reaches TRL and Transformers of a recipe's switches, and a base that merging for vLLM does not wear out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rankleap.errors import RecipeError
from rankleap.training import train
from rankleap.training.build import build, load_settings, trl_config
from rankleap.training.sync import PristineBase, restored_after
from recipes import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def test_vllm_beside_the_trainer_gets_its_share(tmp_path: Path) -> None:
    rollout = {"engine": "vllm-colocate", "memory_share": 0.4, "tensor_parallel": 2}
    config: Any = trl_config(tiny(rollout=rollout), tmp_path)
    assert (config.use_vllm, config.vllm_mode) == (True, "colocate")
    assert (config.vllm_gpu_memory_utilization, config.vllm_tensor_parallel_size) == (0.4, 2)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo", "reinforce_pp", "distillation"])
def test_a_vllm_server_is_asked_where_it_listens_by_all_that_sample(algorithm: str, tmp_path: Path) -> None:
    rollout = {"engine": "vllm-server", "server_url": "http://there:9"}
    config: Any = trl_config(tiny(algorithm={"name": algorithm}, rollout=rollout), tmp_path)
    assert (config.use_vllm, config.vllm_mode, config.vllm_server_base_url) == (True, "server", "http://there:9")


def test_without_a_word_transformers_samples(tmp_path: Path) -> None:
    config: Any = trl_config(tiny(), tmp_path)
    assert not config.use_vllm and not config.bf16 and not config.gradient_checkpointing
    assert load_settings(tiny()) == {"dtype": torch.float32}


def test_precision_checkpointing_attention_and_four_bits_are_passed_on(tmp_path: Path) -> None:
    model = {"base": "bundled:sums", "dtype": "bfloat16", "attention": "flash_attention_2", "load_in_4bit": True}
    recipe = tiny(model=model, train__gradient_checkpointing=True)
    config, loaded = trl_config(recipe, tmp_path), load_settings(recipe)
    assert config.bf16 and config.gradient_checkpointing
    assert (loaded["dtype"], loaded["attn_implementation"]) == (torch.bfloat16, "flash_attention_2")
    four = loaded["quantization_config"]
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4" and four.bnb_4bit_compute_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("package", "key", "changes"),
    [
        ("vllm", "rollout.engine", {"rollout": {"engine": "vllm-colocate"}}),
        ("bitsandbytes", "model.load_in_4bit", {"model__load_in_4bit": True, "adapter__method": "lora"}),
        ("flash_attn", "model.attention", {"model__attention": "flash_attention_2"}),
    ],
)
def test_a_switch_without_its_package_is_refused(
    package: str, key: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=f"{key}: needs {package}"):
        train(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_computed_as_asked(attention: str, tmp_path: Path) -> None:
    built = build(tiny(model__attention=attention), tmp_path)
    built.pool.close()
    assert built.trainer.model.config._attn_implementation == attention


def adapted() -> PeftModel:
    torch.manual_seed(0)
    # bfloat16, where adding an adapter and taking it away again does not give back the same number.
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, bias=False)).bfloat16()
    return get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))  # pyright: ignore[reportArgumentType]


def base_weights(model: PeftModel) -> list[torch.Tensor]:
    return [weight.detach().clone() for name, weight in model.named_parameters() if "base_layer" in name]


def synced(model: PeftModel) -> None:
    """What TRL does for every sync to vLLM, the sending left out, with the adapter somewhere else each time."""
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    model.merge_adapter()
    model.unmerge_adapter()


def test_fifty_merged_syncs_wear_a_bfloat16_base_out_and_restoring_keeps_every_bit() -> None:
    worn, kept, drifts = adapted(), adapted(), []
    start, sync = base_weights(kept), restored_after(lambda: synced(kept), PristineBase(kept), drifts.append)
    for _ in range(50):
        synced(worn)
        sync()
    assert all(torch.equal(a, b) for a, b in zip(base_weights(kept), start, strict=True))
    off = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(base_weights(worn), start, strict=True))
    # One sync's rounding each time, where without restoring they add up.
    assert len(drifts) == 50 and 0 < max(drifts) < off


def test_drift_is_the_largest_relative_difference() -> None:
    model = adapted()
    base = PristineBase(model)
    assert base.restore() == 0
    for name, weight in model.named_parameters():
        if "1.base_layer" in name:
            weight.data *= 1.5
    assert base.restore() == pytest.approx(0.5, rel=1e-2) and base.restore() == 0
