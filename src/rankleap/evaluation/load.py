"""Loads a model to sample from: a bundled base, a name on the Hub, a full checkpoint, or a PEFT adapter on its base."""

from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rankleap.checkpoints import resolve_base
from rankleap.errors import CheckpointError
from rankleap.files import read_json


def load_model(name: str, base: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return (model, tokenizer) on the GPU where there is one; ``base`` overrides the base that an adapter names.

    Weights stay in the precision they were saved in, and an adapter stays apart: merging would round it away in bf16.
    """
    directory = resolve_base(name)
    config = directory / "adapter_config.json"
    named = (base or read_json(config).get("base_model_name_or_path")) if config.exists() else None
    if config.exists() and named is None:
        raise CheckpointError(f"{config} does not name the adapter's base; give it with --base")
    base_directory = resolve_base(named) if named else directory
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_directory)
        if base_directory != directory:
            model = _adapted(model, directory)
        # A trainer saves the tokenizer beside its adapter; a bare adapter borrows the base's.
        tokenizer = AutoTokenizer.from_pretrained(
            directory if (directory / "tokenizer.json").exists() else base_directory
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a causal language model from {directory}: {error}") from None
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    return model, tokenizer


def _adapted(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    # Here and not above, so that full checkpoints load where the extra is not installed.
    from peft import PeftModel

    return cast(PreTrainedModel, PeftModel.from_pretrained(model, directory))
