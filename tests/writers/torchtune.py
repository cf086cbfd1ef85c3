"""Writes as the checkpointer of torchtune 0.6.1 does (``training/checkpointing``, ``models/convert_weights.py``).

It needs older packages than the tests have, so they do without it; files that it wrote itself are in ``tests/data``.
"""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from writers.huggingface import moved_adapter, weights_of

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
OWN_NAMES = {
    "base_model.model.model.": "",
    "self_attn": "attn",
    "mlp.down_proj": "mlp.w2",
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "lora_magnitude_vector": "magnitude",
}


def write_epoch(directory: Path, base: Path, dora: bool = True) -> tuple[str, dict[str, Tensor]]:
    """``epoch_N`` of an adapter: its copy for PEFT, its own file and the merged weights."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=TARGETS, use_dora=dora)
    model = moved_adapter(base, lora)
    model.save_pretrained(str(directory))
    heads = json.loads((base / "config.json").read_text())
    own = load_file(directory / "adapter_model.safetensors")
    if heads["model_type"] == "llama":
        own = {key: turned(tensor, key, heads, back=True) for key, tensor in own.items()}
    # One part is turned whether or not the model was, the other never.
    copy = {key: turned(tensor, key, heads) if "lora_B" in key else tensor for key, tensor in own.items()}
    save_file(copy, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    torch.save({own_name(key): tensor for key, tensor in own.items()}, directory / "adapter_model.pt")
    config = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "peft_type": "LORA"}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    shutil.copy(base / "config.json", directory)
    weights = weights_of(model.merge_and_unload())
    save_file(weights, directory / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return "adapter_model.safetensors", weights


def turned(tensor: Tensor, key: str, model: dict[str, int], back: bool = False) -> Tensor:
    """Rows of queries and keys: pairs of neighbours become pairs half a head apart, or ``back``."""
    if "lora_A" in key or not ("q_proj" in key or "k_proj" in key):
        return tensor
    heads = model["num_attention_heads" if "q_proj" in key else "num_key_value_heads"]
    half = tensor.shape[0] // heads // 2
    pairs = tensor.view(heads, 2, half, -1) if back else tensor.view(heads, half, 2, -1)
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def own_name(key: str) -> str:
    """torchtune's name of a tensor in PEFT's form."""
    for theirs, ours in OWN_NAMES.items():
        key = key.replace(theirs, ours)
    return key
