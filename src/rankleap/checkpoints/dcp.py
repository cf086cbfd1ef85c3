"""Opens a torch Distributed Checkpoint (``.metadata`` beside ``*.distcp``) lazily, in one process and without its classes.

``.metadata`` is a pickle: of each tensor it gives the shape and its chunks, of each chunk the file, the first byte and the
length of what ``torch.save`` wrote there. Chunks tile a tensor along any dimensions: FSDP splits the first, tensor and
expert parallelism others, Megatron stacks layers. Only the chunks, and of these the rows, that are asked for are read.
FSDP's SHARDED_STATE_DICT (accelerate, TRL), prime-rl, NeMo-RL, SkyRL and torchtitan write it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankleap.checkpoints import adapter
from rankleap.checkpoints.adapter import AdapterCheckpoint
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.checkpoints.pickled import Reader, StoredTensor, opening
from rankleap.checkpoints.source import Stored, TensorSource
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
            # The directory of a zip archive is found from its end, and bytes before the archive do no harm.
            with _Mapped(file.fileno(), self.start + self.length, access=ACCESS_READ) as mapped:
                stored = Reader(self.path).archived(mapped)
            if not isinstance(stored, StoredTensor) or stored.shape != self.sizes:
                raise ValueError(f"needed a tensor of shape {self.sizes} at byte {self.start}")
            return stored


class Tiled(NamedTuple):
    """One tensor and the chunks that tile it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor, or some rows: a view of the file where one chunk holds them all, else assembled."""
        return self.box(() if rows is None else (range(self.shape[0])[rows],))

    def box(self, sides: Sequence[range]) -> Tensor:
        """A box of the tensor: a range (step 1) for each of its first dimensions, the others whole."""
        box = [*sides, *(range(size) for size in self.shape[len(sides) :])]
        # Takes no memory until it is written to.
        whole = torch.empty([len(side) for side in box], dtype=self.dtype)
        for chunk in self.chunks:
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


def tiled(folder: Path, trust_pickle: bool = False) -> dict[str, Tiled]:
    """The model's tensors under the names that were saved; the trainer's own are left out.

    Reads ``.metadata`` and compares the files with it; raises ``CheckpointError`` for what is missing or truncated.
    """
    path = folder / METADATA
    if not path.exists():
        raise CheckpointError(
            f"{folder} is incomplete: no {METADATA} yet, which is written last; wait for it or leave this step out"
        )
    with opening(path):
        metadata = Reader(path, trust_pickle, _INERT).plain().state
        stored = _stored_chunks(metadata["storage_data"], folder)
        _require_whole(stored.values())
        tensors = {
            name: _tiled(name, entry.state, stored)
            for name, entry in metadata["state_dict_metadata"].items()
            if type(entry).__name__ == "TensorStorageMetadata" and not _TRAINING.match(name)
        }
    if not tensors:
        raise CheckpointError(f"{folder} holds no weights, only training state; needed the model's tensors")
    for name, tensor in tensors.items():
        # Chunks do not overlap, so equal sizes mean that nothing is left open.
        if sum(prod(chunk.sizes) for chunk in tensor.chunks) != prod(tensor.shape):
            raise CheckpointError(
                f"{path} lists only parts of {name}; the checkpoint is incomplete, leave this step out"
            )
    return tensors


def source_of(tensors: Mapping[str, Stored], chunks: Iterable[Tiled]) -> TensorSource:
    """A source that counts the bytes of the model's chunks alone, for the files may hold the optimizer's too."""
    return TensorSource(tensors, sum(chunk.length for tensor in chunks for chunk in tensor.chunks))


class _Mapped(mmap):
    """A mapped file, as ``zipfile`` wants it."""

    def seekable(self) -> bool:
        return True


def find(directory: Path) -> Path | None:
    """The folder of a step directory that holds a distributed checkpoint; ``None`` where PEFT's own files are."""
    # PEFT's copy of the adapter is as exact, and it has the config beside it.
    if any((directory / name).exists() for name in (adapter.WEIGHTS, adapter.PICKLED)):
        return None
    places = (directory / folder for folder in FOLDERS)
    return next((place for place in places if (place / METADATA).is_file() or any(place.glob(SHARDS))), None)


def open_checkpoint(folder: Path, trust_pickle: bool = False) -> FullCheckpoint | AdapterCheckpoint:
    """The model, or its adapter where an ``adapter_config.json`` lies in the folder or above it in the step directory."""
    tensors = tiled(folder, trust_pickle)
    source = source_of(tensors, tensors.values())
    # Wrappers first: an adapter's own names lie within the model's.
    names = model_names(source.shapes)
    if not any(_ADAPTED.fullmatch(name) for name in names):
        return FullCheckpoint(folder, source=source.renamed(names))
    config = next((place / adapter.CONFIG for place in upwards(folder) if (place / adapter.CONFIG).exists()), None)
    if config is None:
        raise CheckpointError(
            f"{folder} holds an adapter and no {adapter.CONFIG}, which tells its method and scale; "
            f"copy the run's {adapter.CONFIG} into {folder}"
        )
    saved = {new: names[name] for new, name in adapter_names(names, folder).items()}
    return AdapterCheckpoint(folder, config=read_json(config), source=source.renamed(saved), trust_pickle=trust_pickle)


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


def _tiled(name: str, tensor: dict[str, Any], stored: dict[Any, Chunk]) -> Tiled:
    boxes = [(tuple(box.state["offsets"]), tuple(box.state["sizes"])) for box in tensor["chunks"]]
    chunks = tuple(stored[name, offsets]._replace(sizes=sizes) for offsets, sizes in boxes)
    # TensorProperties gives its state as a tuple, the precision first.
    return Tiled(tuple(tensor["size"]), tensor["properties"].state[0], chunks)


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
