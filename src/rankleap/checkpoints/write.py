"""Writes checkpoints that Transformers or PEFT load, tensor by tensor, aside and then renamed.

A full checkpoint is written in shards of at most ``SHARD_BYTES``, so the memory needed does not grow with the model.
Configuration and tokenizer files come from a checkpoint or base that has them.
"""

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankleap.checkpoints import adapter, full
from rankleap.checkpoints.delta import LowRank
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.checkpoints.source import DTYPES
from rankleap.errors import NotFiniteError
from rankleap.files import write_json

SHARD_BYTES = 1 << 30
_SIDE_FILES = ("*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab.txt")
# The index names shards of the source, and the other two are facts about its directory.
_NOT_SIDE_FILES = {full.INDEX, "trainer_state.json", "manifest.json"}


def write_full(
    directory: Path,
    weights: Iterable[tuple[str, Tensor]],
    like: FullCheckpoint,
    side_files: Path,
    shard_bytes: int = SHARD_BYTES,
) -> float:
    """Write float32 ``weights`` in the dtypes of ``like`` and copy its side files.

    Returns the rounding loss: ‖stored - exact‖ / ‖exact - like‖, which is 0 for float32 and can swallow a small leap in bf16.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    pending: dict[str, Tensor] = {}
    lost, moved = 0.0, 0.0
    for name, weight in weights:
        if not bool(torch.isfinite(weight).all()):
            raise NotFiniteError(f"{name} of the new checkpoint has NaN or infinity; nothing was written")
        # safetensors refuses what is not contiguous.
        stored = weight.to(DTYPES[like.dtypes[name]]).contiguous()
        lost += float(torch.linalg.vector_norm(stored.float() - weight)) ** 2
        moved += float(torch.linalg.vector_norm(weight - like.weight(name))) ** 2
        # Written before the limit is passed; a tensor beyond it still gets a shard of its own.
        if pending and not like.file and sum(t.nbytes for t in pending.values()) + stored.nbytes > shard_bytes:
            _write_shard(directory, len(shards), pending)
            pending, shards = {}, [*shards, []]
        pending[name] = stored
        shards[-1].append(name)
    _write_shard(directory, len(shards), pending)
    if like.file:
        (directory / "shard-00001.safetensors").rename(directory / like.file)
    else:
        _name_shards(directory, shards)
    copy_side_files(side_files, directory)
    return math.sqrt(lost / moved) if moved else 0.0


def write_adapter(
    directory: Path, products: Mapping[str, LowRank], rank: int, base_name: str, side_files: Path
) -> None:
    """Write products of rank at most ``rank`` as a PEFT LoRA adapter with scale 1, padded with zeros to one rank."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, product in products.items():
        spare = rank - product.left_MR.shape[1]
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = torch.nn.functional.pad(product.right_RN, (0, 0, 0, spare)).contiguous()
        tensors[f"{module}.lora_B.weight"] = torch.nn.functional.pad(product.left_MR, (0, spare)).contiguous()
    save_file(tensors, directory / adapter.WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        # Whole names: a suffix would also adapt modules that the leap does not move.
        "target_modules": [name.removesuffix(".weight") for name in products],
        "inference_mode": True,
    }
    write_json(directory / adapter.CONFIG, config)
    copy_side_files(side_files, directory, tokenizer_only=True)


def copy_side_files(source: Path, destination: Path, tokenizer_only: bool = False) -> None:
    """Copy configuration and tokenizer files beside the weights."""
    patterns = ("tokenizer*", "special_tokens_map.json", "*.jinja") if tokenizer_only else _SIDE_FILES
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.name not in _NOT_SIDE_FILES and path.is_file():
                shutil.copyfile(path, destination / path.name)


def _write_shard(directory: Path, number: int, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / f"shard-{number:05d}.safetensors", metadata={"format": "pt"})


def _name_shards(directory: Path, shards: list[list[str]]) -> None:
    """One shard becomes ``model.safetensors``; several get Transformers' names and an index."""
    if len(shards) == 1:
        (directory / "shard-00001.safetensors").rename(directory / full.WEIGHTS)
        return
    # The names say how many shards there are, which is known only at the end.
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number:05d}.safetensors").rename(directory / final)
        weight_map |= dict.fromkeys(names, final)
    size_bytes = sum(path.stat().st_size for path in directory.glob("model-*.safetensors"))
    # After the files that it names, so that it never promises what is not there.
    write_json(directory / full.INDEX, {"metadata": {"total_size": size_bytes}, "weight_map": weight_map})
