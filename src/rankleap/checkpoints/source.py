"""Where tensors come from: names and shapes from headers alone, values one tensor, or a few of its rows, at a time.

A layout says which source a directory is; ``FullCheckpoint`` and ``AdapterCheckpoint`` say what its tensors mean.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankleap.errors import CheckpointError
from rankleap.files import read_json

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Safetensors' names of the precisions that hold weights as they are."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored(Protocol):
    """One tensor where it lies, in whatever format: its precision is torch's, or safetensors' name of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sides of the whole tensor."""
        ...

    @property
    def dtype(self) -> torch.dtype | str:
        """Precision in the file."""
        ...

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor as it is stored, or only some rows (of the first dimension); step 1."""
        ...


class TensorSource:
    """Tensors by name; ``dtypes`` are safetensors' names (``F32``, ``BF16``, …), and torch's own of other precisions."""

    def __init__(self, tensors: Mapping[str, Stored], size_bytes: int, is_local: bool = True) -> None:
        """``size_bytes``: of the files that hold them; ``is_local``: whether reading again costs little more than memory."""
        self.tensors, self.size_bytes, self.is_local = tensors, size_bytes, is_local
        self.shapes = {name: stored.shape for name, stored in tensors.items()}
        dtypes = {name: stored.dtype for name, stored in tensors.items()}
        self.dtypes = {n: d if isinstance(d, str) else DTYPE_NAMES.get(d, str(d)) for n, d in dtypes.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor as it is stored, or only some rows."""
        return self.tensors[name].read(rows)

    def renamed(self, old_names: Mapping[str, str]) -> "TensorSource":
        """Some of the tensors: the name that each has here by its new one."""
        return TensorSource({new: self.tensors[old] for new, old in old_names.items()}, self.size_bytes, self.is_local)


class _InSafetensors(NamedTuple):
    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, rows: slice | None = None) -> Tensor:
        """A view of the memory-mapped file, which lives as long as the tensor does."""
        # Opened for each read: handles that stay open would be one for each shard of each step.
        with open_safetensors(self.path) as file:
            return file.get_tensor(self.name) if rows is None else file.get_slice(self.name)[rows]


def safetensors_files(paths: Sequence[Path]) -> TensorSource:
    """Tensors of safetensors files, from their headers; raises ``CheckpointError`` for a missing or damaged one."""
    tensors: dict[str, Stored] = {}
    for path in paths:
        with open_safetensors(path) as opened:
            for name in opened.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                header = opened.get_slice(name)
                tensors[name] = _InSafetensors(path, name, tuple(header.get_shape()), header.get_dtype())
    return TensorSource(tensors, sum(path.stat().st_size for path in paths))


def without_tied_head(source: TensorSource) -> TensorSource:
    """The source without an ``lm_head.weight`` that repeats the embedding, so that a tied pair counts once however it was saved.

    FSDP1 writes two copies, so shared storage does not tell; equal rows do, since every row of a head of its own is trained.
    """
    heads = {name for name in source.shapes if name.endswith("lm_head.weight")}
    rows = slice(0, 16)
    repeated = {
        head
        for head in heads
        for name in source.shapes.keys() - heads
        if source.shapes[name] == source.shapes[head] and torch.equal(source.read(name, rows), source.read(head, rows))
    }
    return source.renamed({name: name for name in source.shapes if name not in repeated})


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file, or raise ``CheckpointError`` that names it."""
    try:
        return safe_open(path, framework="pt")
    # The library calls a file that may not be read one that is not there.
    except (FileNotFoundError, PermissionError):
        if path.exists():
            raise CheckpointError(f"{path} may not be read by this user; change its permissions") from None
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); copy it again or leave this step out"
        ) from None


def files_of(directory: Path, single: str, index: str, read: Callable[[Sequence[Path]], TensorSource]) -> TensorSource:
    """The tensors of one file, or of the shards that an index lists; raises ``CheckpointError`` if neither is there whole."""
    # The single file first, as Transformers does: saving one over shards leaves their index behind.
    if (directory / single).exists():
        return read([directory / single])
    if not (directory / index).exists():
        found = (
            ", ".join(sorted(p.name for p in directory.iterdir())[:8]) if directory.is_dir() else "no such directory"
        )
        raise CheckpointError(f"{directory} needs {single} or {index}; found: {found or 'nothing'}")
    shard_of: dict[str, str] = read_json(directory / index).get("weight_map", {})
    source = read([directory / shard for shard in sorted(set(shard_of.values()))])
    config = directory / "config.json"
    tied = config.exists() and read_json(config).get("tie_word_embeddings")
    require_listed(directory / index, shard_of, source, tied)
    return source


def require_listed(index: object, shard_of: Mapping[str, str], source: TensorSource, tied: bool = False) -> None:
    """Raise ``CheckpointError`` for an index that lists nothing, or tensors that its shards lack."""
    if not shard_of:
        raise CheckpointError(f"{index} lists no tensors; copy it again or leave this step out")
    # torchtune's index repeats names of the base that its files rightly leave out.
    spare = {name for name in shard_of if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")}
    if lost := sorted(shard_of.keys() - source.shapes.keys() - spare):
        raise CheckpointError(
            f"{index} lists {', '.join(lost[:8])}, which {shard_of[lost[0]]} should hold and lacks; copy them again"
        )
