"""Opens a torch Distributed Checkpoint (``.metadata`` beside ``*.distcp``) lazily, in one process and without its classes.

``.metadata`` is a pickle: of each tensor it gives the shape and its chunks, of each chunk the file, the first byte and the
length of what ``torch.save`` wrote there. Chunks tile a tensor along any dimensions: FSDP splits the first, tensor and
expert parallelism others, Megatron stacks layers. Only the chunks, and of these the rows, that are asked for are read.
FSDP's SHARDED_STATE_DICT (accelerate, TRL), prime-rl, NeMo-RL, SkyRL and torchtitan write it.
"""

import io
import re
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from rankleap.checkpoints import adapter
from rankleap.checkpoints.adapter import AdapterCheckpoint
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.checkpoints.pickled import Reader, StoredTensor, dtype_name, opening
from rankleap.checkpoints.source import Renamed, TensorSource
from rankleap.errors import CheckpointError
from rankleap.files import read_json

METADATA = ".metadata"
SHARDS = "*.distcp"
FOLDERS = (
    ".",
    "trainer",
    "policy/weights",
    "policy/weights/model",
    "policy",
    "pytorch_model_fsdp_0",
    "model",
    "weights",
    "weights/model",
    "dist_ckpt",
    "actor",
)
"""Where it lies in a step directory: torchtitan and plain FSDP, prime-rl, NeMo-RL (two), SkyRL, accelerate, and others."""
_INERT = ("pathlib.", "megatron.", "transformer_engine.", "apex.")
"""Names in ``.metadata``, beside torch's own, that are answered by a ``Record``, which does nothing."""
_WRAPPERS = ("app", "model", "state_dict", "module", "actor", "policy")
_TRAINING = re.compile(
    rf"(?:(?:{'|'.join(_WRAPPERS)}|chained_\d+)\.)*"
    r"(?:optim\w*|(?:\w+_)?schedulers?|rng\w*|progress|data_?loaders?|train(?:er)?_state|rerun_state_machine\w*)(?:[./]|$)"
    r"|.*(?:\._extra_state\b|rotary\w*\.inv_freq$)"
)
"""What a trainer or Transformer Engine keeps for itself, and a buffer that follows from the model's config."""
_INSERTED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_OWN = {"layers", "embed_tokens", "norm", "language_model"}
"""What follows a ``model.`` that Hugging Face's own names begin with."""
_ADAPTED = re.compile(
    r"(.+\.(?:lora_\w+|miss_block|vera_\w+|ia3_l|ln_tuning_layers|modules_to_save))(?:\.(?!weight$|bias$)(\w+))?(\..+)?"
)
"""An adapter's tensor: the part, the adapter's own name, and the rest."""


class Chunk(NamedTuple):
    """A box of a tensor: where it begins in the tensor, its sides, and where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int

    def read(self, box: Sequence[range]) -> Tensor:
        """A box of this chunk: a view of the mapped file; raises ``CheckpointError`` for damaged bytes."""
        stored = self._stored()
        skipped = sum(side.start * step for side, step in zip(box, stored.stride, strict=True))
        return stored._replace(
            start=stored.start + skipped * stored.dtype.itemsize, shape=tuple(len(side) for side in box)
        ).read()

    def _stored(self) -> StoredTensor:
        with opening(self.path), self.path.open("rb") as file:
            stored = Reader(self.path).archived(io.BufferedReader(_Window(file, self.start, self.length)))
            if not isinstance(stored, StoredTensor) or stored.shape != self.sizes:
                raise ValueError(f"needed a tensor of shape {self.sizes} at byte {self.start}")
            return stored._replace(start=stored.start + self.start)


class DcpSource(TensorSource):
    """The model's tensors under the names that were saved; the trainer's own are left out."""

    def __init__(self, folder: Path, trust_pickle: bool = False) -> None:
        """Read ``.metadata`` and compare the files with it; raises ``CheckpointError`` for what is missing or truncated."""
        if not (folder / METADATA).exists():
            raise CheckpointError(
                f"{folder} is incomplete: no {METADATA} yet, which is written last; wait for it or leave this step out"
            )
        with opening(folder / METADATA):
            metadata = Reader(folder / METADATA, trust_pickle, _INERT).plain().state
            stored = _stored_chunks(metadata["storage_data"], folder)
            _require_whole(stored.values())
            tensors = {
                name: entry.state
                for name, entry in metadata["state_dict_metadata"].items()
                if type(entry).__name__ == "TensorStorageMetadata" and not _TRAINING.match(name)
            }
            self._chunks = {name: _chunks(name, tensor, stored) for name, tensor in tensors.items()}
            self.shapes = {name: tuple(tensor["size"]) for name, tensor in tensors.items()}
            # TensorProperties gives its state as a tuple, the precision first.
            self._types = {name: tensor["properties"].state[0] for name, tensor in tensors.items()}
            self.dtypes = {name: dtype_name(dtype) for name, dtype in self._types.items()}
        if not tensors:
            raise CheckpointError(f"{folder} holds no weights, only training state; needed the model's tensors")
        for name, chunks in self._chunks.items():
            # Chunks do not overlap, so equal sizes mean that nothing is left open.
            if sum(prod(chunk.sizes) for chunk in chunks) != prod(self.shapes[name]):
                raise CheckpointError(
                    f"{folder / METADATA} lists only parts of {name}; the checkpoint is incomplete, leave this step out"
                )

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or some rows: a view of the file where one chunk holds them all, else assembled."""
        return self.box(name, () if rows is None else (range(self.shapes[name][0])[rows],))

    def box(self, name: str, sides: Sequence[range]) -> Tensor:
        """A box of a tensor: a range (step 1) for each of its first dimensions, the others whole."""
        box = [*sides, *(range(size) for size in self.shapes[name][len(sides) :])]
        # Takes no memory until it is written to.
        whole = torch.empty([len(side) for side in box], dtype=self._types[name])
        for chunk in self._chunks[name]:
            ends = zip(box, chunk.offsets, chunk.sizes, strict=True)
            shared = [range(max(side.start, at), min(side.stop, at + size)) for side, at, size in ends]
            if not all(shared):
                continue
            part = chunk.read([_moved(side, at) for side, at in zip(shared, chunk.offsets, strict=True)])
            # All rows in one shard, which is usual: nothing is copied.
            if part.shape == whole.shape:
                return part
            places = (_moved(side, within.start) for side, within in zip(shared, box, strict=True))
            whole[tuple(slice(place.start, place.stop) for place in places)] = part
        return whole

    def size_bytes(self) -> int:
        """Bytes of the model's chunks; the files may hold the optimizer's too."""
        return sum(chunk.length for chunks in self._chunks.values() for chunk in chunks)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own: the directory of a zip archive is found from its end."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (0, self._at, self._length)[whence] + offset
        if self._at < 0:
            raise ValueError(f"byte {self._at} was asked for")
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        content = self._file.read(min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def find(directory: Path) -> Path | None:
    """The folder of a step directory that holds a distributed checkpoint; ``None`` where PEFT's own files are."""
    # PEFT's copy of the adapter is as exact, and it has the config beside it.
    if any((directory / name).exists() for name in (adapter.WEIGHTS, adapter.PICKLED)):
        return None
    places = (directory / folder for folder in FOLDERS)
    return next((place for place in places if (place / METADATA).is_file() or any(place.glob(SHARDS))), None)


def open_checkpoint(folder: Path, trust_pickle: bool = False) -> FullCheckpoint | AdapterCheckpoint:
    """The model, or its adapter where an ``adapter_config.json`` lies in the folder or above it in the step directory."""
    source = DcpSource(folder, trust_pickle)
    # Wrappers first: an adapter's own names lie within the model's.
    names = model_names(source.shapes)
    if not any(_ADAPTED.fullmatch(name) for name in names):
        return FullCheckpoint(folder, source=Renamed(source, names))
    config = next((place / adapter.CONFIG for place in upwards(folder) if (place / adapter.CONFIG).exists()), None)
    if config is None:
        raise CheckpointError(
            f"{folder} holds an adapter and no {adapter.CONFIG}, which tells its method and scale; "
            f"copy the run's {adapter.CONFIG} into {folder}"
        )
    saved = {new: names[name] for new, name in adapter_names(names, folder).items()}
    return AdapterCheckpoint(folder, config=read_json(config), source=Renamed(source, saved), trust_pickle=trust_pickle)


def upwards(folder: Path) -> list[Path]:
    """A folder that ``find`` gave and those above it, up to the step directory."""
    here = folder.absolute()
    depth = max((len(Path(inner).parts) for inner in FOLDERS if here.as_posix().endswith(f"/{inner}")), default=0)
    return [here, *here.parents[:depth]]


def model_names(names: Iterable[str]) -> dict[str, str]:
    """The model's own name of each saved name: without what wraps the model, or modules in it, and what a trainer adds.

    A leading component that all share is taken off (``app.model.``), but not the ``model.`` of Hugging Face's own names.
    """
    parts = {name: [part for part in name.split(".") if part not in _INSERTED] for name in names}
    while _is_wrapped(list(parts.values())):
        parts = {name: own[1:] for name, own in parts.items()}
    return {".".join(own): name for name, own in parts.items()}


def adapter_names(names: Iterable[str], where: Path) -> dict[str, str]:
    """The names of an adapter's tensors without the adapter's own, and the saved name of each; frozen ones are left out.

    Takes the names of PEFT's live model (``….lora_A.default.weight``), of its files, and of prime-rl's (``….lora_A.0``);
    TRL's frozen copy ``ref`` is left out. Raises ``CheckpointError`` if ``where`` holds several other adapters.
    """
    names = list(names)
    # PEFT's files name whole tensors as the model does; a live model's frozen ones are named so.
    is_live = any(".base_layer." in name for name in names)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _ADAPTED.fullmatch(name):
            part, owner, rest = match.groups(default="")
            found.setdefault(owner or "default", {})[part + rest] = name
        elif not is_live:
            found.setdefault("default", {})[name] = name
    if len(found) > 1 and "default" not in found:
        raise CheckpointError(f"{where} holds several adapters, {' and '.join(found)}; save one of them alone")
    return found["default"] if "default" in found else next(iter(found.values()))


def _is_wrapped(names: Sequence[Sequence[str]]) -> bool:
    first = {parts[0] for parts in names}
    if len(first) > 1 or not first <= set(_WRAPPERS) or min(map(len, names)) < 2:
        return False
    return first != {"model"} or not _OWN & {parts[1] for parts in names}


def _stored_chunks(storage: dict[Any, Any], folder: Path) -> dict[tuple[str, tuple[int, ...] | None], Chunk]:
    """Where everything lies, by its name and its place in the tensor; objects have no place."""
    found = {}
    for index, info in storage.items():
        name, offset = index.state["fqn"], index.state.get("offset")
        at, path = info.state, folder / info.state["relative_path"]
        if descriptors := at.get("transform_descriptors"):
            raise CheckpointError(
                f"{path} was written through {descriptors}, which is not read; save without extensions"
            )
        place = None if offset is None else tuple(offset)
        found[name, place] = Chunk(place or (), (), path, at["offset"], at["length"])
    return found


def _chunks(name: str, tensor: dict[str, Any], stored: dict[Any, Chunk]) -> list[Chunk]:
    boxes = [(tuple(box.state["offsets"]), tuple(box.state["sizes"])) for box in tensor["chunks"]]
    return [stored[name, offsets]._replace(sizes=sizes) for offsets, sizes in boxes]


def _require_whole(chunks: Iterable[Chunk]) -> None:
    """Raise ``CheckpointError`` that names a file which is missing or ends before its last chunk does."""
    # Of the optimizer's too: a rank's file holds both, and a save that was cut short is no checkpoint.
    ends: dict[Path, int] = {}
    for chunk in chunks:
        ends[chunk.path] = max(ends.get(chunk.path, 0), chunk.start + chunk.length)
    for path, end in ends.items():
        with opening(path):
            if (there := path.stat().st_size) < end:
                raise EOFError(f"needed {end:,} bytes, found {there:,}")


def _moved(side: range, by: int) -> range:
    return range(side.start - by, side.stop - by)
