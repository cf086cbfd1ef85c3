"""Saves tiny adapters with torchtune's own checkpointer, as its LoRA recipes call it: the files as it leaves them.

    pip install torchtune torchao==0.14.1 torchdata transformers    # made with torchtune 0.6.1, torch 2.13.0, transformers 5.23.0
    python make_torchtune.py

``torchtune-NAME`` has the ``base``, a Hugging Face directory, and ``epoch_0``, where the merged weights lie beside the adapter.
"""

import sys
from pathlib import Path

import torch
from torchtune import training
from torchtune.models.llama3 import lora_llama3
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import (
    get_adapter_params,
    get_adapter_state_dict,
    get_lora_module_names,
    get_merged_lora_ckpt,
)
from torchtune.training import FullModelHFCheckpointer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BUILDER_SIZES = {
    "vocab_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 16,
    "max_seq_len": 8,
    "intermediate_dim": 12,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
LORA = {"lora_attn_modules": ATTENTION, "apply_lora_to_mlp": True, "lora_rank": 2, "lora_alpha": 6}


def save(directory: Path, base: PreTrainedModel, model: TransformerDecoder, model_type: str) -> None:
    """Move the adapter at random and save it with the merged weights."""
    base.save_pretrained(directory / "base", max_shard_size="8KB")
    files = [path.name for path in (directory / "base").glob("*.safetensors")]
    checkpointer = FullModelHFCheckpointer(str(directory / "base"), files, model_type, str(directory))
    model.load_state_dict(checkpointer.load_checkpoint()["model"], strict=False)
    torch.manual_seed(1)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    with torch.no_grad():
        for weight in get_adapter_params(model).values():
            weight.add_(0.1 * torch.randn_like(weight))
    config = {
        "r": LORA["lora_rank"],
        "lora_alpha": LORA["lora_alpha"],
        "target_modules": get_lora_module_names(ATTENTION, apply_lora_to_mlp=True, apply_lora_to_output=False),
        "peft_type": "LORA",
    }
    merged = get_merged_lora_ckpt({name: weight.clone() for name, weight in model.state_dict().items()}, 2, 6)
    saved = {training.MODEL_KEY: merged, training.ADAPTER_KEY: get_adapter_state_dict(model.state_dict())}
    checkpointer.save_checkpoint(saved | {training.ADAPTER_CONFIG: config}, epoch=0)


if __name__ == "__main__":
    top = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    torch.manual_seed(0)
    qwen = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    save(top / "torchtune-qwen2-lora", qwen, lora_qwen2(**BUILDER_SIZES, **LORA, tie_word_embeddings=True), "QWEN2")
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    save(top / "torchtune-llama-dora", llama, lora_llama3(**BUILDER_SIZES, **LORA, use_dora=True), "LLAMA3")
    for leftover in top.glob("torchtune-*/**/generation_config.json"):
        leftover.unlink()
