"""Transformers and PEFT write."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def moved_model(base: Path) -> PreTrainedModel:
    """The base with every weight moved by a tenth of its size at random, the same each time."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=generator))
    return model


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones once, in float32."""
    return {name: weight.detach().float().clone() for name, weight in model.named_parameters()}


def moved_adapter(base: Path, config: LoraConfig | None = None) -> PeftModel:
    """An adapter on the base whose trainable weights have all moved."""
    torch.manual_seed(7)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        config or LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"]),
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape))
    return model


def write_full(directory: Path, base: Path) -> tuple[str, dict[str, Tensor]]:
    """A full checkpoint."""
    model = moved_model(base)
    model.save_pretrained(directory)
    return "model.safetensors", weights_of(model)


def write_adapter(directory: Path, base: Path) -> tuple[str, dict[str, Tensor]]:
    """A LoRA adapter; the weights are those of the merged model."""
    model = moved_adapter(base)
    model.save_pretrained(str(directory))
    return "adapter_model.safetensors", weights_of(model.merge_and_unload())
