"""Opens a run that lies elsewhere: one step per revision of a Hub repository, or step folders at any address that fsspec knows.

Of ``hf://ORG/REPO`` each branch or tag whose name carries a step is a checkpoint (RELEX's public trajectories: ``step_1`` …
``step_500``); without such it is read as step folders, as ``hf://ORG/REPO@REVISION/FOLDER``, ``s3://bucket/run`` and every
other address are.

Opening lists the files of each step and fetches the headers of its weights, ``AT_ONCE`` steps at a time, so that a truncated
file shows then and not halfway through the work; the weights stay where they are. A tensor, or some of its rows, is one request
for exactly its bytes, each time that it is read. Only safetensors can be read so; a pickle would have to be fetched as a whole.

A safetensors file is eight bytes with the length of its header (little endian), the header (JSON: name → dtype, shape and the
offsets of its bytes after the header), and the tensors without gaps.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PosixPath
from typing import Any

import torch
from torch import Tensor

from rankleap.checkpoints import adapter, full
from rankleap.checkpoints.adapter import AdapterCheckpoint
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.checkpoints.layouts import Checkpoint
from rankleap.checkpoints.source import DTYPES, TensorSource
from rankleap.checkpoints.stores import ABSENT, HUB, Store, cause_of, explained, fsspec_store, hub_stores
from rankleap.errors import CheckpointError, InputError

StepOfName = Callable[[str], int | None]
"""The step that the name of a folder or revision carries, if it does."""

AT_ONCE = 8
"""Steps that are opened at the same time: opening waits for answers, not for bytes."""
FIRST_BYTES = 1 << 16
"""Fetched of a weight file at once: most headers are shorter, and then their length costs no request of its own."""
LONGEST_HEADER_BYTES = 100_000_000
"""The format's own limit: a damaged length must not make us fetch gigabytes."""
_TORCH = DTYPES | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteRun:
    """The complete checkpoints of a remote run in the order of their steps, and what was skipped and why.

    ``layout_key`` is the key of their row in ``LAYOUTS``.
    """

    location: str
    checkpoints: dict[int, Checkpoint]
    skipped: dict[str, str]
    layout_key: str


class RemotePath(PosixPath):
    """An address where a path is expected; it prints with all its slashes and exists on no disk."""

    def __str__(self) -> str:
        """The address; a plain path would print one slash of two."""
        text = super().__str__()
        return text.replace(":/", ":///" if text.startswith("file:") else "://", 1)


@dataclass(frozen=True, slots=True)
class _Span:
    """Where the bytes of a tensor are."""

    file: str
    start: int
    stop: int


class RemoteSafetensors(TensorSource):
    """Tensors of one or more safetensors files in a store."""

    is_local = False

    def __init__(self, store: Store, files: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> None:
        """Fetch the headers of files and check the names that an index lists for each; raises ``CheckpointError``."""
        self.shapes, self.dtypes = {}, {}
        self._store = store
        self._spans: dict[str, _Span] = {}
        self._size_bytes = sum(sizes.get(file, 0) for file in files)
        for file, listed in files.items():
            if file not in sizes:
                raise CheckpointError(f"{store.at(file)} does not exist; the checkpoint is incomplete")
            for name, dtype, shape, span in _tensors(store, file, sizes[file]):
                self.shapes[name], self.dtypes[name], self._spans[name] = shape, dtype, span
            if lost := [name for name in listed if name not in self.shapes]:
                raise CheckpointError(
                    f"{store.at(file)} lacks {', '.join(lost[:8])}, which the index says it holds; copy it again"
                )

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One request for the bytes of the tensor or of these rows; raises ``CheckpointError`` when there is no answer."""
        shape, dtype, span = self.shapes[name], _TORCH.get(self.dtypes[name]), self._spans[name]
        place = self._store.at(span.file)
        if dtype is None:
            raise CheckpointError(
                f"{name} of {place} is stored as {self.dtypes[name]}, needed one of {', '.join(DTYPES)}; "
                "dequantise the checkpoint first"
            )
        start, stop = span.start, span.stop
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            shape = (max(last - first, 0), *shape[1:])
            start += first * math.prod(shape[1:]) * dtype.itemsize
            stop = start + math.prod(shape) * dtype.itemsize
        if start == stop:
            return torch.empty(shape, dtype=dtype)
        with explained(place):
            found = self._store.read(span.file, start, stop)
        # A tensor may be written to, bytes may not.
        return torch.frombuffer(bytearray(found), dtype=dtype).reshape(shape)

    def size_bytes(self) -> int:
        """Bytes of the weight files."""
        return self._size_bytes


def _tensors(store: Store, file: str, size: int) -> Iterator[tuple[str, str, tuple[int, ...], _Span]]:
    """Name, dtype, shape and bytes of every tensor of a file, from its header; raises ``CheckpointError``."""
    first = store.read(file, 0, min(size, FIRST_BYTES)) if size else b""
    begin = 8 + int.from_bytes(first[:8], "little")
    if size < 8 or begin > min(size, LONGEST_HEADER_BYTES):
        raise _damaged(store.at(file), f"its header does not fit into its {size:,} bytes")
    text = first[8:begin] + (store.read(file, len(first), begin) if begin > len(first) else b"")
    end = begin
    try:
        for name, entry in json.loads(text).items():
            if name == "__metadata__":
                continue
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if dtype in _TORCH and stop - start != math.prod(shape) * _TORCH[dtype].itemsize:
                raise ValueError(f"{name} has {stop - start:,} bytes for {dtype} {shape}")
            end = max(end, begin + stop)
            yield name, dtype, shape, _Span(file, begin + start, begin + stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(store.at(file), f"its header cannot be read, {error!r}") from None
    if end != size:
        raise _damaged(store.at(file), f"it has {size:,} bytes, its header promises {end:,}")


def _damaged(place: str, why: str) -> CheckpointError:
    return CheckpointError(f"{place} is truncated or damaged ({why}); copy it again or leave this step out")


def open_remote_run(location: str, step_of_name: StepOfName, parents: Sequence[str] = (".",)) -> RemoteRun:
    """Open every complete checkpoint at an address; ``step_of_name`` gives the step that a folder or revision names, if it does.

    Step folders are looked for in each of ``parents``, and the first that holds some wins; without any, the address is itself
    one checkpoint. Incomplete steps are skipped and told. Raises ``CheckpointError`` when no step is complete, when two kinds
    are mixed, and when the place cannot be reached (no step is skipped for that); ``InputError`` for an address that is none
    or whose driver is not installed.
    """
    if not location.partition("://")[2].strip("/"):
        raise InputError(f"{location} names no place; needed an address such as s3://BUCKET/RUN or hf://ORG/REPO")
    with explained(location):
        places = _places(location.rstrip("/"), step_of_name, parents)
        log.info("opening %d steps of %s", len(places), location)
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            opened = list(pool.map(_opened, places))
        finally:
            # After a failure the steps that wait would only fail one after the other.
            pool.shutdown(cancel_futures=True)
    found: dict[int, Checkpoint] = {}
    skipped: dict[str, str] = {}
    for place, checkpoint in zip(places, opened, strict=True):
        if isinstance(checkpoint, str):
            skipped[place.name] = checkpoint
        elif place.step in found:
            skipped[place.name] = f"step {place.step} is here twice, {found[place.step].directory} was taken"
        else:
            found[place.step] = checkpoint
    return RemoteRun(location, found, skipped, _only_kind(location, found, skipped))


def _only_kind(location: str, found: Mapping[int, Checkpoint], skipped: Mapping[str, str]) -> str:
    kinds = sorted({"peft" if isinstance(checkpoint, AdapterCheckpoint) else "hf" for checkpoint in found.values()})
    if len(kinds) > 1:
        raise CheckpointError(f"{location} mixes {' and '.join(kinds)} checkpoints; keep one kind in one place")
    if not kinds:
        reasons = "".join(f"\n  {name}: {why}" for name, why in skipped.items())
        raise CheckpointError(
            f"no complete checkpoint in {location}; needed folders, or revisions of a Hub repository, such as step_20{reasons}"
        )
    return kinds[0]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a step may be."""

    name: str
    step: int
    store: Store
    folder: str
    deep: bool
    """Whether its weights may lie in a folder below."""


def _places(location: str, step_of_name: StepOfName, parents: Sequence[str]) -> list[_Place]:
    """Every revision or folder whose name carries a step, by step and then by name; else the location itself."""

    def named(places: Iterable[tuple[str, Store, str]]) -> list[_Place]:
        steps = ((name, step_of_name(name), store, folder) for name, store, folder in places)
        found = [_Place(name, step, store, folder, True) for name, step, store, folder in steps if step is not None]
        return sorted(found, key=lambda place: (place.step, place.name))

    store, revisions = hub_stores(location) if location.startswith(HUB) else (fsspec_store(location), [])
    if places := named((one.address.rpartition("@")[2], one, "") for one in revisions):
        return places
    top = store.folders()
    for parent in parents:
        folders = top if parent == "." else store.folders(parent) if parent in top else []
        if places := named((name, store, name if parent == "." else f"{parent}/{name}") for name in folders):
            return places
    name = re.split("[/@]", location)[-1]
    step = step_of_name(name)
    # Below a place that names no step could be anything, other runs too.
    return [_Place(name, step or 0, store, "", step is not None)]


def _opened(place: _Place) -> Checkpoint | str:
    """The checkpoint of a step, or why it is skipped."""
    try:
        return _open(place)
    # A trainer may also delete its oldest step between our listing and our reading.
    except (InputError, *ABSENT) as error:
        return str(error) if isinstance(error, InputError) else f"{place.store.at(place.folder)}: {cause_of(error)}"


def _open(place: _Place) -> Checkpoint:
    store, files = place.store, place.store.files(place.folder, place.deep)
    # The highest in the folders, and an adapter before weights beside it: a step may hold another adapter below (TRL: ref/).
    marks = [adapter.CONFIG, full.WEIGHTS, full.INDEX]
    marked = [path for path in files if path.rpartition("/")[2] in marks]
    if not marked:
        raise _lacking(store.at(place.folder), " or ".join(marks), files)
    mark = min(marked, key=lambda path: (path.count("/"), marks.index(path.rpartition("/")[2])))
    folder, slash, name = mark.rpartition("/")
    here, label = folder + slash, RemotePath(store.at(folder))
    if name != adapter.CONFIG:
        shards = {mark: []} if name == full.WEIGHTS else _shards(store, mark, here)
        return FullCheckpoint(label, source=RemoteSafetensors(store, shards, files))
    if here + adapter.WEIGHTS not in files:
        raise _lacking(str(label), adapter.WEIGHTS, files)
    source = RemoteSafetensors(store, {here + adapter.WEIGHTS: []}, files)
    return AdapterCheckpoint(label, config=_json(store, mark), source=source)


def _lacking(place: str, needed: str, files: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"{place} needs {needed}; found: {', '.join(sorted(files)[:8]) or 'nothing'} "
        "(what is pickled, .pt, .bin and .distcp, is not read from afar: copy this step here first)"
    )


def _shards(store: Store, index: str, here: str) -> dict[str, list[str]]:
    """The files that an index names, and the tensors that it says each holds."""
    shard_of: dict[str, str] = _json(store, index).get("weight_map", {})
    if not shard_of:
        raise CheckpointError(f"{store.at(index)} lists no tensors; copy it again or leave this step out")
    return {
        here + shard: [name for name in shard_of if shard_of[name] == shard] for shard in sorted({*shard_of.values()})
    }


def _json(store: Store, path: str) -> dict[str, Any]:
    try:
        return json.loads(store.read(path))
    except ValueError as error:
        raise CheckpointError(
            f"{store.at(path)} is no valid JSON: {error}; it may be half-written, copy it again"
        ) from None
