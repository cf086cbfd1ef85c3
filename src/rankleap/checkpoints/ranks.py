"""Reads the sharded weights of verl, EasyR1 and SkyRL: one ``torch.save`` of an FSDP state dict for each rank.

``model_world_size_W_rank_R.pt``, R = 0 … W-1, holds under each name a ``DTensor`` (FSDP2, and FSDP1 on a device mesh), a
``ShardedTensor`` (FSDP1 without one), or a plain tensor, which every rank has whole. Neither class is imported and no process
group is needed: shards follow each other in the order of the ranks, ``ceil(size / W)`` entries each, the last ones fewer or
none; with replicas (HSDP) the first ranks hold one whole copy.

With LoRA the names are those of a ``PeftModel`` in memory, base weights included; only the adapter is read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankleap.checkpoints.adapter import AdapterCheckpoint
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.checkpoints.pickled import Record, StoredTensor, WrappedTensor, state_dict
from rankleap.checkpoints.source import TensorSource
from rankleap.errors import CheckpointError
from rankleap.files import read_json

PATTERN = "model_world_size_*_rank_*.pt"
_NAME = re.compile(r"model_world_size_(\d+)_rank_\d+\.pt")
_CONFIG = "fsdp_config.json"
_LORA_CONFIGS = ("lora_train_meta.json", "lora_adapter/adapter_config.json")
"""Where newer and older versions of verl keep the adapter's scale."""
_ADAPTER = re.compile(r".+\.(lora_|modules_to_save\.).+")


@dataclass(frozen=True, slots=True)
class Sharded:
    """One tensor over the ranks: its pieces along ``dim``, each with the index at which it begins."""

    shape: tuple[int, ...]
    dim: int
    pieces: tuple[tuple[int, StoredTensor], ...]

    @property
    def dtype(self) -> torch.dtype:
        """That of every piece."""
        return self.pieces[0][1].dtype

    def read(self, rows: slice | None = None) -> Tensor:
        """A view of one rank's file, or a copy where several hold the rows; other ranks' files are not touched."""
        if rows is None or self.dim != 0:
            parts = [stored.read(rows) for _, stored in self.pieces]
        else:
            first, stop, _ = rows.indices(self.shape[0])
            # Of a rank that holds none of the rows, nothing is read.
            held = [stored.read(slice(max(0, first - start), max(0, stop - start))) for start, stored in self.pieces]
            parts = [part for part in held if len(part)] or held[:1]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


def rank_files(directory: Path, trust_pickle: bool = False) -> TensorSource:
    """Tensors whole over the ranks; raises ``CheckpointError`` for ranks that are missing, damaged or do not fit together."""
    files = _rank_files(directory)
    ranks = [state_dict(file, trust_pickle) for file in files]
    for file, rank in zip(files, ranks, strict=True):
        if other := rank.keys() ^ ranks[0].keys():
            raise CheckpointError(
                f"{file} and {files[0].name} differ in {', '.join(sorted(other)[:8])}; "
                "they are of different saves, copy them again or leave this step out"
            )
    tensors = {name: _joined([rank[name] for rank in ranks], name, directory) for name in ranks[0]}
    return TensorSource(tensors, sum(file.stat().st_size for file in files))


def open_ranks(directory: Path, trust_pickle: bool = False) -> FullCheckpoint | AdapterCheckpoint:
    """The checkpoint whose rank files lie here: an adapter when they hold LoRA weights, else a full one."""
    source = rank_files(directory, trust_pickle)
    adapter = {name: name for name in source.shapes if _ADAPTER.fullmatch(name)}
    if adapter:
        return AdapterCheckpoint(directory, config=_lora_config(directory), source=source.renamed(adapter))
    return FullCheckpoint(directory, source=source)


def _lora_config(directory: Path) -> dict[str, Any]:
    file = next((directory / name for name in _LORA_CONFIGS if (directory / name).exists()), None)
    config = read_json(file) if file else {}
    if not (config.get("r") and config.get("lora_alpha")):
        found = (
            f"found {file} with r={config.get('r')} and lora_alpha={config.get('lora_alpha')}" if file else "none found"
        )
        raise CheckpointError(
            f"{directory} holds LoRA weights, whose scale needs r and lora_alpha: {found}; write those of the training into "
            f'{directory / _LORA_CONFIGS[0]}, such as {{"r": 32, "lora_alpha": 64, "task_type": "CAUSAL_LM"}}'
        )
    return {"peft_type": "LORA", **config}


def _rank_files(directory: Path) -> list[Path]:
    """The file of every rank; raises ``CheckpointError`` when one is missing or it is unclear how many there are."""
    worlds = {int(match[1]) for file in directory.glob(PATTERN) if (match := _NAME.fullmatch(file.name))}
    # Rewritten by each save, so it tells which files are the newest where an earlier save had another number of ranks.
    if (directory / _CONFIG).exists() and (newest := read_json(directory / _CONFIG).get("world_size")):
        worlds = {newest}
    if len(worlds) != 1:
        raise CheckpointError(
            f"{directory} holds shards of {' and of '.join(map(str, sorted(worlds)))} ranks; keep those of one save"
        )
    [world] = worlds
    files = [directory / f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world)]
    if lost := [file.name for file in files if not file.exists()]:
        raise CheckpointError(f"{directory} lacks {', '.join(lost[:8])}; the checkpoint is incomplete")
    return files


def _joined(parts: Sequence[StoredTensor | WrappedTensor], name: str, directory: Path) -> Sharded:
    """One tensor from what each rank holds of it, in the order of the ranks."""
    whole = parts[0]
    if any((type(part), part.shape) != (type(whole), whole.shape) for part in parts):
        raise CheckpointError(f"{name} in {directory} has another shape on some rank; the files are of different saves")
    if isinstance(whole, StoredTensor):
        return Sharded(whole.shape, 0, ((0, whole),))
    dim, held = _dim(whole, name, directory), [stored for part in parts for stored in _held(part)]
    if dim is None:
        return Sharded(whole.shape, 0, ((0, held[0]),))
    size, start, pieces = whole.shape[dim], 0, []
    for stored in held:
        # What comes after one whole copy are its replicas. An empty tensor keeps one piece, for its type.
        if (start < size and stored.shape[dim]) or not pieces:
            pieces.append((start, stored))
            start += stored.shape[dim]
    if start != size:
        raise CheckpointError(
            f"the shards of {name} in {directory} have {start} of {size} entries along dimension {dim}; "
            "the files are of different saves or damaged, copy them again or leave this step out"
        )
    return Sharded(whole.shape, dim, tuple(pieces))


def _held(part: StoredTensor | WrappedTensor) -> list[StoredTensor]:
    """What one rank's file holds of a tensor."""
    match part:
        case WrappedTensor("DTensor", state={"_local_tensor": StoredTensor() as stored}):
            return [stored]
        case WrappedTensor("ShardedTensor", state=(shards, *_)):
            return [shard.state["tensor"] for shard in shards]
    return []


def _dim(tensor: WrappedTensor, name: str, directory: Path) -> int | None:
    """The dimension that is sharded, ``None`` when every rank has it all; raises ``CheckpointError`` for other placements."""
    placements: list[str] = [tensor.kind]
    match tensor:
        case WrappedTensor("ShardedTensor"):  # FSDP1 shards rows only
            return 0
        case WrappedTensor("DTensor", state={"_spec": Record(state={"placements": records})}):
            placements = [type(record).__name__ for record in records]
            if placements[-1] in ("Shard", "Replicate") and {*placements[:-1]} <= {"Replicate"}:
                return records[-1].state["dim"] if placements[-1] == "Shard" else None
    raise CheckpointError(
        f"{name} in {directory} is placed as {', '.join(placements)}; needed shards along one dimension, or replicas of them; "
        "merge the checkpoint with the trainer's own tool and read that"
    )
