"""Opens a run that lies elsewhere: one step per revision of a Hub repository, or step folders at any address that fsspec knows.

Of ``hf://ORG/REPO`` each branch or tag whose name carries a step is a checkpoint (RELEX's public trajectories: ``step_1`` …
``step_500``); without such it is read as step folders, as ``hf://ORG/REPO@REVISION/FOLDER``, ``s3://bucket/run`` and every
other address are.

Opening lists the files of each step and fetches the headers of its weights, so that a truncated file shows then and not halfway
through the work. A tensor, or some of its rows, is one request for exactly its bytes, each time that it is read (5 MB more from
drivers that know no ranges, such as SFTP's). Only safetensors can be read so: eight bytes with the length of the header (little
endian), the header (JSON: name → dtype, shape and the offsets of its bytes after the header), and the tensors without gaps.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PosixPath
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations
from huggingface_hub import HfApi, HfFileSystem
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from rankleap.checkpoints import adapter, full
from rankleap.checkpoints.adapter import AdapterCheckpoint
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.checkpoints.layouts import Checkpoint
from rankleap.checkpoints.source import TensorSource, require_listed
from rankleap.errors import CheckpointError, InputError

Answer = TypeVar("Answer")
StepOfName = Callable[[str], int | None]
"""The step that the name of a folder or revision carries, if it does."""

AT_ONCE = 8
"""Steps that are opened at the same time: opening waits for answers, not for bytes."""
FIRST_BYTES = 1 << 16
"""Fetched of a weight file at once: most headers are shorter, and then their length costs no request of its own."""
WAITS_S, LIMIT_WAITS_S = (0.5, 2.0), (30.0,) * 10
"""Pauses between tries; and when there were too many requests, which the Hub counts over five minutes."""
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
# What drivers raise that is no OSError. None of them need be installed, so each is looked up once its module is loaded.
_DRIVER_ERRORS = {"aiohttp": "ClientError", "azure.core.exceptions": "AzureError", "gcsfs.retry": "HttpError"}
_DRIVER_ERRORS |= {"botocore.exceptions": "BotoCoreError", "google.auth.exceptions": "GoogleAuthError"}
_DRIVER_ERRORS |= {"httpx": "HTTPError", "httpx2": "HTTPError"}

log = logging.getLogger(__name__)


class _UnreachableError(CheckpointError):
    """There is no answer, which says nothing of the checkpoint itself."""


class RemotePath(PosixPath):
    """An address where a path is expected; it prints with all its slashes and exists on no disk."""

    def __str__(self) -> str:
        """The address; a plain path would print one slash of two."""
        text = super().__str__()
        return text.replace(":/", ":///" if text.startswith("file:") else "://", 1)


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder where a step may be: its address, and its name for its driver, of a Hub revision by the commit of now."""

    address: str
    fs: AbstractFileSystem
    root: str
    step: int | None = None

    def at(self, path: str) -> str:
        """The address of a file or folder below, for messages."""
        return self.address + path.removeprefix(self.root)

    def folders(self) -> dict[str, "_Place"]:
        """The folders in it by their names; a plain web server must list its links for this."""
        listed = self.fs.ls(self.root, detail=True)
        paths = {entry["name"].rstrip("/") for entry in listed if entry["type"] == "directory"}
        # An object store may hold an empty object that stands for the folder itself.
        return {path.rpartition("/")[2]: _Place(self.at(path), self.fs, path) for path in paths - {self.root}}

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """One request for the bytes of a file from ``start`` up to ``stop``; for the whole of it without ``stop``."""
        # The Hub's driver would read 5 MB ahead; others, given a start alone, first ask for the size.
        limits: dict[str, Any] = {"cache_type": "none"} if isinstance(self.fs, HfFileSystem) else {}
        limits |= {} if stop is None else {"start": start, "end": stop}
        found: Any = self.fs.cat_file(path, **limits)
        if stop is not None and len(found) != stop - start:
            told = f"{stop - start:,} bytes were asked for, {len(found):,} came"
            raise ConnectionError(f"{told}; copy the run here if its server serves no parts of files")
        return found

    def json(self, path: str) -> dict[str, Any]:
        """The content of a JSON file; raises ``CheckpointError``."""
        try:
            return json.loads(self.read(path))
        except ValueError as error:
            raise CheckpointError(f"{self.at(path)} is no valid JSON ({error}); copy it again") from None


@dataclass(frozen=True, slots=True)
class _Span:
    """A tensor's bytes in a safetensors file of a place."""

    place: _Place
    path: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int

    def read(self, rows: slice | None = None) -> Tensor:
        """One request for the bytes of the tensor or of these rows; raises ``CheckpointError`` when there is no answer."""
        shape, start, stop = self.shape, self.start, self.stop
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            row_bytes = (stop - start) // max(shape[0], 1)
            shape = (max(last - first, 0), *shape[1:])
            start, stop = start + first * row_bytes, start + (first + shape[0]) * row_bytes
        address = self.place.at(self.path)
        found = _answered(address, lambda: self.place.read(self.path, start, stop)) if start < stop else b""
        # As a file of this one tensor the library reads it, whatever its dtype.
        entry = {"dtype": self.dtype, "shape": shape, "data_offsets": [0, len(found)]}
        header = json.dumps({self.name: entry}).encode()
        try:
            return load(len(header).to_bytes(8, "little") + header + found)[self.name]
        except (SafetensorError, KeyError) as error:
            raise CheckpointError(
                f"{self.name} of {address} cannot be read as {entry} ({error!r}); dequantise it, or copy it again"
            ) from None


def _remote_files(place: _Place, paths: Iterable[str], files: Mapping[str, Any]) -> TensorSource:
    """Tensors of safetensors files, from their headers; ``files`` is what the driver says of each. Raises ``CheckpointError``."""
    tensors: dict[str, _Span] = {}
    total_bytes = 0
    for path in paths:
        if path not in files:
            there = ", ".join(sorted(place.at(file) for file in files)[:8]) or "nothing"
            raise CheckpointError(
                f"{place.at(path)} does not exist; found: {there}; "
                "if it is pickled (.pt, .bin, .distcp), copy that step here first"
            )
        # A web server's list has no sizes.
        size_bytes = files[path].get("size") or place.fs.size(path) or 0
        total_bytes += size_bytes
        tensors |= {span.name: span for span in _spans(place, path, size_bytes)}
    return TensorSource(tensors, total_bytes, is_local=False)


def _spans(place: _Place, path: str, size: int) -> list[_Span]:
    """What the header of one file says, which must promise as many bytes as the file has."""
    first_bytes = min(size, FIRST_BYTES)
    first = place.read(path, 0, first_bytes) if size else b""
    begin = end = 8 + int.from_bytes(first[:8], "little")
    spans: list[_Span] = []
    try:
        # A length beyond the file leaves no JSON.
        text = first[8:begin] + (place.read(path, first_bytes, begin) if first_bytes < begin <= size else b"")
        for name, entry in json.loads(text).items():
            if name != "__metadata__":
                start, stop = (begin + offset for offset in entry["data_offsets"])
                spans.append(_Span(place, path, name, tuple(entry["shape"]), entry["dtype"], start, stop))
                end = max(end, stop)
        if end != size:
            raise ValueError(f"it has {size:,} bytes, its header promises {end:,}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{place.at(path)} is truncated or damaged ({error!r}); copy it again or leave this step out"
        ) from None
    return spans


def open_remote(
    location: str, step_of_name: StepOfName, parents: Sequence[str]
) -> tuple[dict[int, Checkpoint], dict[str, str]]:
    """Every complete checkpoint at an address by its step, and what was skipped and why.

    ``step_of_name`` gives the step that a folder or revision names, if it does. Step folders are looked for in each of
    ``parents``, and the first that holds some wins; without any, the address is itself one checkpoint. Raises
    ``CheckpointError`` when there is no answer (no step is skipped for that); ``InputError`` for no address, or a driver that
    is not installed.
    """
    places = _answered(location, lambda: _places(location.rstrip("/"), step_of_name, parents))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        opened = list(pool.map(_opened, places))
    found: dict[int, Checkpoint] = {}
    skipped: dict[str, str] = {}
    for place, checkpoint in zip(places, opened, strict=True):
        name, step = RemotePath(place.address).name.rpartition("@")[2], place.step or 0
        if isinstance(checkpoint, str):
            skipped[name] = checkpoint
        elif step in found:
            skipped[name] = f"step {step} is here twice, {found[step].directory} was taken"
        else:
            found[step] = checkpoint
    return found, skipped


def _places(location: str, step_of_name: StepOfName, parents: Sequence[str]) -> list[_Place]:
    """Every revision or folder whose name carries a step, by step and then by name; else the location itself."""
    top, revisions = _top(location)
    inside = {".": top, **top.folders()}
    for named in (revisions, *(inside[parent].folders() for parent in parents if parent in inside)):
        if found := sorted((step, name) for name in named if (step := step_of_name(name)) is not None):
            return [replace(named[name], step=step) for step, name in found]
    return [replace(top, step=step_of_name(RemotePath(location).name.rpartition("@")[2]))]


def _top(location: str) -> tuple[_Place, dict[str, _Place]]:
    """The place at an address, and the branches and tags of a Hub repository; raises ``InputError`` for what is no address."""
    protocol, _, rest = location.partition("://")
    try:
        if not rest:
            raise ValueError("it names no place")
        fs, root = url_to_fs(location)
        # Drivers live on and remember what they have listed; a run grows meanwhile.
        fs.invalidate_cache()
        hub: Any = fs.resolve_path(root) if isinstance(fs, HfFileSystem) and not root.startswith("buckets/") else None
    except ImportError as error:
        package = known_implementations[protocol.rpartition("::")[2]]["class"].partition(".")[0]
        hint = "" if package == "fsspec" else f"; run: pip install {package}"
        raise InputError(f"{location} needs a driver that is not installed ({error}){hint}") from None
    except ValueError as error:
        raise InputError(f"{location} is no address ({error}); needed hf://ORG/REPO, s3://BUCKET/RUN or such") from None
    if hub is None:
        return _Place(location, fs, root.rstrip("/")), {}
    refs = HfApi().list_repo_refs(hub.repo_id, repo_type=hub.repo_type)
    # By name, for a tag beside a branch of the same name is the same step.
    commits = {ref.name: ref.target_commit for ref in (*refs.tags, *refs.branches)}
    repo = root.partition(hub.repo_id)[0] + hub.repo_id
    pinned = f"{repo}@{commits.get(hub.revision, hub.revision)}/{hub.path_in_repo}".rstrip("/")
    revisions = {name: _Place(f"{location}@{name}", fs, f"{repo}@{commit}") for name, commit in commits.items()}
    return _Place(location, fs, pinned), revisions if root == repo else {}


def _opened(place: _Place) -> Checkpoint | str:
    """The checkpoint of a step, or why it is skipped."""
    try:
        return _answered(place.address, lambda: _open(place))
    except _UnreachableError:
        raise
    except InputError as error:
        return str(error)


def _open(place: _Place) -> Checkpoint:
    # Below a place that names no step could be anything, other runs too.
    files: Any = place.fs.find(place.root, maxdepth=1 if place.step is None else None, detail=True)
    # The highest in the folders, and an adapter before weights beside it: a step may hold another adapter below (TRL: ref/).
    marks = [adapter.CONFIG, full.WEIGHTS, full.INDEX]
    found = [(path.count("/"), marks.index(name), path) for path in files if (name := path.rpartition("/")[2]) in marks]
    mark = min(found, default=(0, 0, f"{place.root}/{full.WEIGHTS}"))[2]
    folder, _, name = mark.rpartition("/")
    single = adapter.WEIGHTS if name == adapter.CONFIG else full.WEIGHTS
    listed = place.json(mark).get("weight_map", {}) if name == full.INDEX else {}
    source = _remote_files(place, sorted({f"{folder}/{shard}" for shard in listed.values() or [single]}), files)
    if name == full.INDEX:
        require_listed(place.at(mark), listed, source)
    label = RemotePath(place.at(folder))
    if name == adapter.CONFIG:
        return AdapterCheckpoint(label, config=place.json(mark), source=source)
    return FullCheckpoint(label, source=source)


def _answered(address: str, call: Callable[[], Answer], tries: int = 0) -> Answer:
    """What the call gives, tried again when the connection fails; a driver's error is told as a ``CheckpointError``."""
    try:
        return call()
    except _failures() as error:
        # Drivers say whole pages.
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        waits_s = LIMIT_WAITS_S if "Too Many Requests" in cause else WAITS_S
        absent = isinstance(error, _ABSENT)
        if absent or tries >= len(waits_s):
            told = f"{address} could not be read ({cause}); check it, your credentials and the network, then try again"
            raise (CheckpointError if absent else _UnreachableError)(told) from None
    log.info("trying again in %s s: %s", waits_s[tries], cause)
    time.sleep(waits_s[tries])
    return _answered(address, call, tries + 1)


def _failures() -> tuple[type[BaseException], ...]:
    """What drivers raise when there is no answer; called when something was raised, so its module is loaded."""
    loaded = [(sys.modules[module], name) for module, name in _DRIVER_ERRORS.items() if module in sys.modules]
    return (OSError, *(vars(module)[name] for module, name in loaded))
