"""Which weights train: full fine-tuning, LoRA (2106.09685), DoRA (2402.09353). One row per method.

Target modules are the same for every method by default (every linear layer but the head), since PEFT's own defaults
differ by method and would make a comparison of methods a comparison of modules.
"""

from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from rankleap.config import AdapterSection
from rankleap.errors import RecipeError, RunError, UnknownNameError


@dataclass(frozen=True, slots=True)
class Adapter:
    """One method: how to make its PEFT config (``None``: train every weight), and the variant PEFT must report for it."""

    name: str
    config: Callable[[AdapterSection, tuple[str, ...]], LoraConfig | None]
    is_dora: bool = False


def _lora(use_dora: bool) -> Callable[[AdapterSection, tuple[str, ...]], LoraConfig]:
    def build(settings: AdapterSection, targets: tuple[str, ...]) -> LoraConfig:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType] - PEFT computes with any number
            lora_dropout=settings.dropout,
            target_modules=list(targets),
            use_dora=use_dora,
        )

    return build


ADAPTERS: dict[str, Adapter] = {
    "full": Adapter("full", lambda settings, targets: None),
    "lora": Adapter("lora", _lora(use_dora=False)),
    "dora": Adapter("dora", _lora(use_dora=True), is_dora=True),
}


def get_adapter(name: str) -> Adapter:
    """The adapter of that name; raises ``UnknownNameError`` with the closest ones."""
    if name not in ADAPTERS:
        raise UnknownNameError("adapter", name, ADAPTERS)
    return ADAPTERS[name]


def target_modules(model: PreTrainedModel, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the modules to adapt; raises ``RecipeError`` for names that match no linear layer."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    # Left out: a head that is tied to the embeddings cannot be merged without moving them as well.
    head = model.get_output_embeddings()
    # By identity, for architectures name their heads differently.
    known = sorted({name.rpartition(".")[2] for name in linear if model.get_submodule(name) is not head})
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise RecipeError(
            f"adapter.target_modules: {', '.join(unknown)} match no linear layer; this model has {', '.join(known)}"
        )
    return asked or tuple(known)


def require_injected(model: nn.Module, adapter: Adapter, targets: tuple[str, ...]) -> int:
    """Check that what was asked is what trains; return the trainable parameter count, or raise ``RunError``."""
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(model, PeftModel):
        adapted = {name.split(".lora_")[0] for name in trainable}
        wrong = [name for name in adapted if name.rpartition(".")[2] not in targets]
        # Read from what trains: the config only repeats what was asked.
        has_dora = any("lora_magnitude_vector" in name for name in trainable)
        if wrong or not adapted or has_dora != adapter.is_dora:
            raise RunError(
                f"asked for {adapter.name} on {', '.join(targets)}, but what trains is {sorted(trainable)[:6]}"
            )
    # Both sides count a tied tensor once.
    elif adapter.name != "full" or len(trainable) != len(list(model.parameters())):
        raise RunError(f"asked for {adapter.name}, but {len(trainable)} plain tensors train")
    return sum(trainable.values())
