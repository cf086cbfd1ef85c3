"""Transformers 4 wrote ``pytorch_model.bin``, SkyRL ``policy/model_state.pt``: ``torch.save`` of a state dict.

Transformers 5 no longer writes it, so its file and its index are made here as version 4 made them.
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from writers.huggingface import moved_model, weights_of


def save_bin(model: PreTrainedModel, directory: Path, shards: int = 1) -> None:
    """What ``save_pretrained(safe_serialization=False)`` wrote; a tied head is in the state dict too."""
    model.config.save_pretrained(directory)
    state = model.state_dict()
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return
    files = [f"pytorch_model-{number:05}-of-{shards:05}.bin" for number in range(1, shards + 1)]
    file_of = {name: files[place * shards // len(state)] for place, name in enumerate(state)}
    for file in files:
        torch.save({name: state[name] for name in state if file_of[name] == file}, directory / file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_bin(directory: Path, base: Path) -> tuple[str, dict[str, Tensor]]:
    """A full checkpoint of Transformers 4."""
    model = moved_model(base)
    save_bin(model, directory)
    return "pytorch_model.bin", weights_of(model)


def write_model_state(directory: Path, base: Path) -> tuple[str, dict[str, Tensor]]:
    """SkyRL's, of a model that DDP wraps."""
    model = moved_model(base)
    (directory / "policy").mkdir()
    torch.save(
        {f"module.{name}": tensor for name, tensor in model.state_dict().items()}, directory / "policy/model_state.pt"
    )
    return "policy/model_state.pt", weights_of(model)
