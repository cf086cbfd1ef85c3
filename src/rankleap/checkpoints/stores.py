"""Files that lie elsewhere: their names and sizes, and any range of their bytes, in one small interface.

``FsspecStore`` is a folder at any address that fsspec has a driver for, ``HubStore`` a folder of one commit of a Hub repository.
What fails on the way is tried three times, and then told by ``explained`` in one line, whichever driver it was.
"""

import logging
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations, registry
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from rankleap.errors import CheckpointError, InputError, UnknownNameError

Answer = TypeVar("Answer")

WAITS_S = (0.5, 2.0)
"""Pauses between the three tries."""
TIMEOUT_S = 30
HUB = "hf://"
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
"""What is raised for a file that is not there, or not for us."""
_HUB = re.compile(r"hf://(?!buckets/)(?:(datasets|models|spaces)/)?([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")
# What the drivers raise that is no OSError. None of them need be installed, so each is looked up once its module is loaded.
_DRIVER_ERRORS = {
    "aiohttp": "ClientError",
    "azure.core.exceptions": "AzureError",
    "botocore.exceptions": "BotoCoreError",
    "gcsfs.retry": "HttpError",
    "google.auth.exceptions": "GoogleAuthError",
    "httpx": "HTTPError",
    "httpx2": "HTTPError",
}
# Trying again changes nothing.
_FINAL = (
    *ABSENT,
    OfflineModeIsEnabled,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    EntryNotFoundError,
)

log = logging.getLogger(__name__)


class Store(ABC):
    """Files at an address; their paths are relative to it. Errors are those of the driver."""

    address: str

    @abstractmethod
    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders in a folder."""

    @abstractmethod
    def files(self, folder: str, deep: bool) -> dict[str, int]:
        """Bytes of every file in a folder, ``deep``: and below, by its path."""

    @abstractmethod
    def fetch(self, path: str, start: int, stop: int | None) -> bytes:
        """One request for the bytes of a file from ``start`` up to ``stop``; the whole of it without ``stop``."""

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of a file from ``start`` up to ``stop``, tried again when the connection fails."""

        def once() -> bytes:
            found = self.fetch(path, start, stop)
            if stop is not None and len(found) > stop - start:
                raise CheckpointError(
                    f"{self.at(path)}: {stop - start:,} bytes were asked for, its server sent {len(found):,}; "
                    "it serves no parts of files, so copy the run here first"
                )
            if stop is not None and len(found) < stop - start:
                raise ConnectionError(f"{len(found):,} of {stop - start:,} bytes came")
            return found

        return _again(once)

    def at(self, path: str) -> str:
        """The address of a file or folder, for messages."""
        return f"{self.address}/{path}" if path else self.address


@dataclass(frozen=True, slots=True)
class FsspecStore(Store):
    """A folder of any file system that fsspec has a driver for."""

    address: str
    fs: AbstractFileSystem
    root: str

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders in a folder; a plain web server must list its links for this."""
        top = self._path(folder)
        listed = _again(lambda: self.fs.ls(top, detail=True))
        names = (entry["name"].rstrip("/") for entry in listed if entry["type"] == "directory")
        # An object store may hold an empty object that stands for the folder itself.
        return [name.rpartition("/")[2] for name in names if name != top]

    def files(self, folder: str, deep: bool) -> dict[str, int]:
        """Bytes of every file in a folder, ``deep``: and below, by its path."""
        depth = None if deep else 1
        found: Any = _again(lambda: self.fs.find(self._path(folder), maxdepth=depth, detail=True))
        return {name.removeprefix(f"{self.root}/"): self._size(name, entry["size"]) for name, entry in found.items()}

    def _size(self, name: str, listed: int | None) -> int:
        # A web server's list has no sizes; asking for each is a request, so only of those that need one.
        if listed is None and name.endswith(".safetensors"):
            return _again(lambda: self.fs.size(name)) or 0
        return listed or 0

    def fetch(self, path: str, start: int, stop: int | None) -> bytes:
        """One ranged request."""
        # Given a start alone, some drivers would first ask for the size.
        limits = {} if stop is None else {"start": start, "end": stop}
        found: Any = self.fs.cat_file(self._path(path), **limits)
        return found

    def _path(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root


@dataclass(frozen=True, slots=True)
class HubStore(Store):
    """A folder of one commit of a Hub repository; by its hash, so that an upload meanwhile changes nothing.

    Not fsspec's own driver for the Hub, which asks twice about each revision and reads 5 MB beyond each range.
    """

    address: str
    repo_type: str
    repo: str
    commit: str
    root: str = ""

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders in a folder."""
        return [entry.path.rpartition("/")[2] for entry in self._tree(folder, False) if not isinstance(entry, RepoFile)]

    def files(self, folder: str, deep: bool) -> dict[str, int]:
        """Bytes of every file in a folder, ``deep``: and below, by its path."""
        found = (entry for entry in self._tree(folder, deep) if isinstance(entry, RepoFile))
        return {entry.path.removeprefix(f"{self.root}/"): entry.size for entry in found}

    def _tree(self, folder: str, recursive: bool) -> list[Any]:
        top = self._path(folder) or None
        # It has tries of its own, and waits when told of a limit of requests.
        tree = HfApi().list_repo_tree(
            self.repo, top, recursive=recursive, revision=self.commit, repo_type=self.repo_type
        )
        return list(tree)

    def fetch(self, path: str, start: int, stop: int | None) -> bytes:
        """One ranged request."""
        url = hf_hub_url(self.repo, self._path(path), repo_type=self.repo_type, revision=self.commit)
        # A range of a compressed answer would be of other bytes.
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        headers |= {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        # Waits as long as the Hub says when there were too many requests; other failures are for the caller's tries.
        answer = http_backoff(
            "GET", url, headers=headers, timeout=TIMEOUT_S, retry_on_exceptions=(), retry_on_status_codes=429
        )
        hf_raise_for_status(answer)
        return answer.content

    def _path(self, path: str) -> str:
        return "/".join(part for part in (self.root, path) if part)


def fsspec_store(location: str) -> FsspecStore:
    """The folder at an address; raises ``InputError`` when there is no driver for it."""
    protocol = location.partition("://")[0].rpartition("::")[2]
    if protocol not in {*registry, *known_implementations}:
        raise UnknownNameError("protocol", protocol, {*registry, *known_implementations})
    try:
        fs, root = url_to_fs(location)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        hint = "" if package == "fsspec" else f"; run: pip install {package}"
        raise InputError(f"{location} needs a driver that is not installed ({error}){hint}") from None
    # Drivers live on and remember what they have listed; a run grows meanwhile.
    fs.invalidate_cache()
    return FsspecStore(location, fs, root.rstrip("/"))


def hub_stores(location: str) -> tuple[HubStore, list[HubStore]]:
    """The repository at the revision asked for, and all its branches and tags if none was asked for; raises ``InputError``."""
    match = _HUB.fullmatch(location)
    if not match:
        raise InputError(f"{location} is no address on the Hub; needed hf://ORG/REPO[@REVISION][/FOLDER]")
    repo_type, repo, revision, folder = match.groups()
    repo_type = (repo_type or "models").removesuffix("s")
    api = HfApi()
    info = _again(lambda: api.repo_info(repo, repo_type=repo_type, revision=revision, timeout=TIMEOUT_S))
    store = HubStore(location, repo_type, repo, info.sha or revision or "main", folder or "")
    if revision or folder:
        return store, []
    refs = _again(lambda: api.list_repo_refs(repo, repo_type=repo_type))
    # By name, for a tag beside a branch of the same name is the same step.
    commits = {ref.name: ref.target_commit for ref in (*refs.tags, *refs.branches)}
    return store, [HubStore(f"{location}@{name}", repo_type, repo, commit) for name, commit in commits.items()]


def _again(call: Callable[[], Answer]) -> Answer:
    """What the call gives, after up to three tries; what another try cannot change is raised at once."""
    for wait_s in WAITS_S:
        try:
            return call()
        except _FINAL:
            raise
        except _failures() as error:
            log.info("trying again in %s s: %s", wait_s, cause_of(error))
            time.sleep(wait_s)
    return call()


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Tell a failure of the driver as a ``CheckpointError``."""
    try:
        yield
    except (*_FINAL, *_failures()) as error:
        raise CheckpointError(
            f"{place} could not be read ({cause_of(error)}); check the address, your credentials and the network, then try again"
        ) from None


def _failures() -> tuple[type[BaseException], ...]:
    """What drivers raise when there is no answer; called when something was raised, so its module is loaded."""
    loaded = ((sys.modules.get(module), name) for module, name in _DRIVER_ERRORS.items())
    return (OSError, *(vars(module)[name] for module, name in loaded if module))


def cause_of(error: BaseException) -> str:
    """One line of what a driver says, which may be a page."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
