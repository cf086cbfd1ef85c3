"""Opens a Hugging Face full checkpoint lazily: names and shapes from the headers, one tensor at a time from the files.

Reads ``model.safetensors`` or the shards of ``model.safetensors.index.json``. Tied embeddings are absent from the
file and are therefore never counted twice.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rankleap.checkpoints.delta import require_finite
from rankleap.checkpoints.source import DTYPES, SafetensorsSource, TensorSource
from rankleap.errors import BaseMismatchError, CheckpointError
from rankleap.files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class FullCheckpoint:
    """All weights of a model at one step."""

    kind = "full"

    def __init__(self, directory: Path, file: str | None = None, *, source: TensorSource | None = None) -> None:
        """Read the headers, of one named file if asked; raises ``CheckpointError`` for a missing or truncated one.

        Other layouts than Hugging Face's safetensors give their own ``source``.
        """
        self.directory = directory
        self.file = file
        self.source = source or SafetensorsSource({directory / file: []} if file else _weight_files(directory))
        self.shapes, self.dtypes = self.source.shapes, self.source.dtypes

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or some of its rows, as it is stored."""
        return self.source.read(name, rows)

    def weight(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or some rows, in float32; raises ``CheckpointError`` for a quantised one, whose scale lies elsewhere."""
        if self.dtypes[name] not in DTYPES:
            raise CheckpointError(
                f"{name} of {self.directory} is stored as {self.dtypes[name]}, needed one of {', '.join(DTYPES)}; "
                "dequantise the checkpoint first"
            )
        return self.tensor(name, rows).float()

    def delta(self, name: str, base: "FullCheckpoint", rows: slice | None = None) -> Tensor:
        """``weight(name) - base.weight(name)`` in float32, or some of its rows; NaN and infinity are refused by name."""
        difference = self.weight(name, rows) - base.weight(name, rows)
        require_finite(difference, name, str(self.directory))
        return difference

    def size_bytes(self) -> int:
        """Bytes of the weight files."""
        return self.source.size_bytes()

    def fingerprint(self) -> str:
        """Hash of every tensor's name, shape and first row: tells two bases of one architecture apart at little cost."""
        digest = hashlib.blake2b(digest_size=16)
        # Sorted, since shards order the same tensors differently.
        for name in sorted(self.shapes):
            first = self.tensor(name, slice(0, 1) if self.shapes[name] else None)
            digest.update(f"{name}{self.shapes[name]}".encode())
            # As float32, for numpy has no bfloat16.
            digest.update(first.float().contiguous().numpy().tobytes())
        return digest.hexdigest()


def require_same_shapes(shapes: Mapping[str, tuple[int, ...]], base: FullCheckpoint, where: Path) -> None:
    """Raise ``BaseMismatchError`` that lists the tensors of ``where`` that the base lacks or has in another shape."""
    wrong = [
        f"  {name}: {shape} in the checkpoint, {base.shapes.get(name, 'absent')} in the base"
        for name, shape in shapes.items()
        if base.shapes.get(name) != shape
    ]
    if wrong:
        more = [f"  … and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise BaseMismatchError(
            "\n".join(
                [
                    f"{where} was not trained from the base {base.directory}:",
                    *wrong[:8],
                    *more,
                    "name the right base with --base",
                ]
            )
        )


def _weight_files(directory: Path) -> dict[Path, list[str]]:
    """The files to read, and the tensors that the index, if there is one, says each holds."""
    # The single file first, as Transformers does: saving one over shards leaves their index behind.
    if (directory / WEIGHTS).exists():
        return {directory / WEIGHTS: []}
    if (directory / INDEX).exists():
        shard_of: dict[str, str] = read_json(directory / INDEX).get("weight_map", {})
        if not shard_of:
            raise CheckpointError(f"{directory / INDEX} lists no tensors; copy it again or leave this step out")
        return {
            directory / s: [name for name in shard_of if shard_of[name] == s] for s in sorted(set(shard_of.values()))
        }
    found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) if directory.is_dir() else "no such directory"
    raise CheckpointError(f"{directory} needs {WEIGHTS} or {INDEX}; found: {found or 'nothing'}")


def as_float32(tensor: Tensor) -> Tensor:
    """A contiguous float32 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float32).contiguous()
