"""Writes files and directories so that a kill at any moment leaves either the old state or the new one, never half of it.

Everything is written beside its destination under a dotted name, fsynced, then renamed. Every output directory
holds a ``manifest.json`` that says what it was made from.
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from rankleap.errors import DiskSpaceError, InputError

_PACKAGES = ("rankleap", "torch", "transformers", "trl", "peft", "safetensors", "numpy")


@contextmanager
def write_aside(destination: Path) -> Iterator[Path]:
    """Yield a path to write a file or directory to; rename it to ``destination`` on success, remove it on failure."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, for a rename is one step only within one file system.
    aside = destination.parent / f".{destination.name}.{uuid4().hex[:8]}.aside"
    try:
        yield aside
        # Before the rename, or a power cut could leave the new name on an empty file.
        _sync(aside)
        if aside.is_dir() and destination.is_dir():
            # Renamed away first: a kill while deleting would leave half of the old directory in its place.
            old = destination.rename(aside.with_suffix(".old"))
            aside.rename(destination)
            shutil.rmtree(old)
        else:
            aside.replace(destination)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step."""
    with write_aside(path) as aside:
        aside.write_text(text)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON to ``path`` in one step."""
    # NaN is no JSON, and other readers refuse the whole file for it.
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON, or raise ``InputError`` that names the file and the place."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not valid JSON: {error}; it may be half-written, delete it and run again"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines in one step, in place of what was there."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object as a line; a last line that a kill cut short is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened for appending, the position is the end, so it tells whether there is anything.
    with path.open("a+b") as file:
        if file.tell() and _last_byte(file) != b"\n":
            write_text(path, "".join(json.dumps(whole) + "\n" for whole in read_jsonl(path)))
    # Opened again: the mending above may have put a new file in its place.
    with path.open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a last line cut short by a kill is dropped, any other bad line is an ``InputError``."""
    rows = []
    lines = path.read_text().split("\n")  # not splitlines, which also splits at separators inside a JSON string
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            # A line that ends in a newline was written whole, so its mistake is no kill's.
            if number < len(lines):
                raise InputError(f"{path}, line {number} is not valid JSON: {error.msg}") from None
    return rows


def write_manifest(directory: Path, *, made_by: str, **facts: object) -> None:
    """Write ``manifest.json``: what made this directory, from what, with which versions."""
    write_json(
        directory / "manifest.json",
        {"made_by": made_by, "command": sys.argv, **facts, "versions": versions(), "machine": machine()},
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    """The processor and its core count, enough to read a wall-clock number by."""
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count() or 1}


def require_space(directory: Path, need_bytes: int) -> None:
    """Raise ``DiskSpaceError`` unless ``need_bytes`` fit on the disk that holds ``directory``."""
    # The directory may not exist yet; its nearest parent that does is on the same disk.
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < need_bytes:
        raise DiskSpaceError(
            f"writing {directory} needs {need_bytes / 1e6:,.1f} MB, the disk has {free_bytes / 1e6:,.1f} MB free; "
            "free some space or choose another directory"
        )


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _sync(path: Path) -> None:
    """Flush a file, or a directory with everything in it, to the disk."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in [*files, *([path] if path.is_dir() else [])]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
