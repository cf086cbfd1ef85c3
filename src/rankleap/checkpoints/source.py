"""Where tensors come from: names and shapes from headers alone, values one tensor, or a few of its rows, at a time.

A layout says which source a directory is; ``FullCheckpoint`` and ``AdapterCheckpoint`` say what its tensors mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankleap.errors import CheckpointError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Safetensors' names of the precisions that hold weights as they are."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSource(ABC):
    """Tensors by name; ``dtypes`` are safetensors' names (``F32``, ``BF16``, …)."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    is_local = True
    """Whether reading again costs little more than memory does."""

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor as it is stored, or only some rows (of the first dimension); step 1."""

    @abstractmethod
    def size_bytes(self) -> int:
        """Bytes of the files that hold the tensors."""


class SafetensorsSource(TensorSource):
    """Tensors of one or more safetensors files."""

    def __init__(self, files: Mapping[Path, Sequence[str]]) -> None:
        """Read the headers of files and check the names that an index lists for each; raises ``CheckpointError``."""
        self.shapes, self.dtypes = {}, {}
        self._files: dict[str, Path] = {}
        for path, listed in files.items():
            with open_safetensors(path) as opened:
                for name in opened.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    header = opened.get_slice(name)
                    self.shapes[name] = tuple(header.get_shape())
                    self.dtypes[name] = header.get_dtype()
                    self._files[name] = path
            if lost := [name for name in listed if name not in self.shapes]:
                raise CheckpointError(
                    f"{path} lacks {', '.join(lost[:8])}, which the index says it holds; copy it again"
                )

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A view of the memory-mapped file, which lives as long as the tensor does."""
        # Opened for each read: handles that stay open would be one for each shard of each step.
        with open_safetensors(self._files[name]) as file:
            return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]

    def size_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in set(self._files.values()))


class Renamed(TensorSource):
    """Some tensors of another source under the names that the model itself gives them."""

    def __init__(self, source: TensorSource, old_names: Mapping[str, str]) -> None:
        """``old_names`` maps a new name to the source's own; what is not in it is left out."""
        self.shapes = {new: source.shapes[old] for new, old in old_names.items()}
        self.dtypes = {new: source.dtypes[old] for new, old in old_names.items()}
        self._source, self._old_names, self.is_local = source, dict(old_names), source.is_local

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The source's tensor."""
        return self._source.read(self._old_names[name], rows)

    def size_bytes(self) -> int:
        """Bytes of the source's files."""
        return self._source.size_bytes()


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
    return Renamed(source, {name: name for name in source.shapes if name not in repeated}) if repeated else source


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
