"""Opens a Hugging Face full checkpoint lazily: names and shapes from the headers, one tensor at a time from the files.

Reads ``model.safetensors`` or the shards of ``model.safetensors.index.json``. Tied embeddings are absent from the
file and are therefore never counted twice.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rankleap.checkpoints.delta import BLOCK_BYTES, CHUNK_BYTES, DeltaRows, require_finite, row_slices
from rankleap.checkpoints.source import DTYPES, TensorSource, files_of, safetensors_files, without_tied_head
from rankleap.errors import BaseMismatchError, CheckpointError

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
        found = source or files_of(directory, file or WEIGHTS, INDEX, safetensors_files)
        self.source = without_tied_head(found)
        self.shapes, self.dtypes = self.source.shapes, self.source.dtypes

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or some of its rows, as it is stored."""
        return self.source.read(name, rows)

    def weight(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or some rows, in float32; raises ``CheckpointError`` for a quantised one, whose scale lies elsewhere."""
        self._require_plain(name)
        return self.tensor(name, rows).float()

    def _require_plain(self, name: str) -> None:
        if self.dtypes[name] not in DTYPES:
            raise CheckpointError(
                f"{name} of {self.directory} is stored as {self.dtypes[name]}, needed one of {', '.join(DTYPES)}; "
                "dequantise the checkpoint first"
            )

    def delta(self, name: str, base: "FullCheckpoint", rows: slice | None = None) -> Tensor:
        """``weight(name) - base.weight(name)`` in float32, or some of its rows; NaN and infinity are refused by name."""
        difference = self.weight(name, rows) - base.weight(name, rows)
        require_finite(difference, name, str(self.directory))
        return difference

    def shapes_on(self, base: "FullCheckpoint") -> dict[str, tuple[int, ...]]:
        """Every tensor with its shape; ``BaseMismatchError`` unless the base has all of them, alike, and no more."""
        require_same_shapes(self.shapes, base, self.directory)
        if lacking := [name for name in base.shapes if name not in self.shapes]:
            raise BaseMismatchError(
                f"{self.directory} lacks {len(lacking)} tensors of the base {base.directory}, such as {lacking[0]}; "
                "it is incomplete, or --base names another model"
            )
        return dict(self.shapes)

    def lazy_delta(self, name: str, base: "FullCheckpoint") -> DeltaRows:
        """The same in row blocks, never as a whole; NaN and infinity are for the reader to find in its norm."""
        self._require_plain(name)
        base._require_plain(name)
        shape = torch.Size(self.shapes[name])

        def read(expert: int | None, out: Tensor | None) -> Iterator[Tensor]:
            for new, old, top in self._chunks(name, base, expert):
                # On another device the cache is no matter and each call costs, so a chunk is one block.
                block_bytes = CHUNK_BYTES * 2 if out is not None and out.is_cuda else BLOCK_BYTES
                for rows in row_slices(new.shape, block_bytes):
                    if out is None:
                        yield new[rows].float() - old[rows].float()
                        continue
                    block = out[top + rows.start : top + rows.stop]
                    sides = (part[rows].to(out.device, torch.float32) for part in (new, old))
                    yield torch.sub(*sides, out=block)

        return DeltaRows(shape, read, self.source.is_local and base.source.is_local)

    def blocks(self, name: str, block_bytes: int = BLOCK_BYTES, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """One tensor in float32, row block by row block, of which a chunk is read at a time."""
        self._require_plain(name)
        for rows in row_slices(torch.Size(self.shapes[name]), chunk_bytes):
            chunk = self.tensor(name, rows)
            yield from (chunk[part].float() for part in row_slices(chunk.shape, block_bytes))

    def _chunks(self, name: str, base: "FullCheckpoint", expert: int | None) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Both sides as they are stored, a few rows of the tensor or one expert's matrix at a time, and where they begin."""
        if expert is not None:
            rows = slice(expert, expert + 1)
            yield self.tensor(name, rows)[0], base.tensor(name, rows)[0], 0
            return
        for rows in row_slices(torch.Size(self.shapes[name]), CHUNK_BYTES):
            yield self.tensor(name, rows), base.tensor(name, rows), rows.start

    def size_bytes(self) -> int:
        """Bytes of the weight files."""
        return self.source.size_bytes

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


def as_float32(tensor: Tensor) -> Tensor:
    """A contiguous float32 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float32).contiguous()
