"""Addresses: which are understood, which are refused; and a Hub of one repository on this machine, asked by its own library."""

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankleap.checkpoints import FullCheckpoint
from rankleap.checkpoints.remote import FIRST_BYTES, RemotePath, RemoteRun, open_remote_run
from rankleap.errors import CheckpointError, InputError, UnknownNameError


def opened(address: str) -> RemoteRun:
    return open_remote_run(address, lambda name: int(name.removeprefix("checkpoint-")) if "-" in name else None)


def test_files_of_this_machine_have_an_address_too(run_directory: Path) -> None:
    run = opened(f"file://{run_directory}")
    assert list(run.checkpoints) == [10, 20, 30, 40]
    assert str(run.checkpoints[10].directory) == f"file://{run_directory}/checkpoint-10"
    assert torch.equal(
        run.checkpoints[10].source.read("model.norm.weight"),
        FullCheckpoint(run_directory / "checkpoint-10").tensor("model.norm.weight"),
    )


def test_an_address_keeps_its_slashes() -> None:
    place = RemotePath("s3://bucket/run")
    assert [str(one) for one in (place, place / "step_1", place.parent)] == [
        "s3://bucket/run",
        "s3://bucket/run/step_1",
        "s3://bucket",
    ]
    assert not place.exists()


def test_a_protocol_that_nobody_speaks_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="protocol 'memori' does not exist; did you mean 'memory'"):
        opened("memori://bucket/run")


def test_a_driver_that_is_not_installed_is_named() -> None:
    fsspec.register_implementation("absent", "absentfs.core.AbsentFileSystem", errtxt="Install absentfs for it")
    with pytest.raises(
        InputError, match=r"absent://run needs a driver .*\(Install absentfs for it\); run: pip install absentfs"
    ):
        opened("absent://run")


@pytest.mark.parametrize("address", ["hf://", "s3://", "memory:///"])
def test_a_protocol_alone_is_no_place(address: str) -> None:
    with pytest.raises(InputError, match=f"{address} names no place; needed an address such as"):
        opened(address)


@pytest.mark.parametrize("address", ["hf://single", "hf://buckets/org/name", "hf://org/@step_1"])
def test_a_hub_address_needs_an_owner_and_a_name(address: str) -> None:
    with pytest.raises(InputError, match="no address on the Hub; needed hf://ORG/REPO"):
        opened(address)


def test_a_hub_that_may_not_be_asked_is_told() -> None:
    with pytest.raises(CheckpointError, match=r"hf://org/run could not be read \(OfflineModeIsEnabled.*HF_HUB_OFFLINE"):
        opened("hf://org/run")


@dataclass
class Hub:
    """What a Hub of one repository holds: branches by name, folders by commit; what was asked of it, and what fails once."""

    address: str = ""
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Path] = field(default_factory=dict)
    ranges: list[tuple[str, str | None]] = field(default_factory=list)
    asked: Counter = field(default_factory=Counter)
    busy: set[str] = field(default_factory=set)

    def answer(self, url: str, span: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one GET."""
        path, deep = unquote(urlsplit(url).path), "recursive=true" in url.lower()
        kind, _, rest = path.removeprefix("/api/models/org/run").strip("/").partition("/")
        self.asked[kind] += 1
        if path.startswith("/org/run/resolve/"):
            return self.resolve(path.removeprefix("/org/run/resolve/"), span)
        if not path.startswith("/api/models/org/run"):
            return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'
        if kind == "refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in self.branches.items()]
            return 200, {}, json.dumps({"branches": refs, "tags": refs[-1:], "converts": []}).encode()
        if kind == "tree":
            commit, _, folder = rest.partition("/")
            return 200, {}, json.dumps(list(self.tree(self.commits[commit], folder, deep))).encode()
        revision = rest if kind == "revision" else "main"
        if revision not in self.branches:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b'{"error": "Invalid rev id"}'
        return 200, {}, json.dumps({"id": "org/run", "sha": self.branches[revision]}).encode()

    def tree(self, top: Path, folder: str, deep: bool) -> Iterator[dict[str, Any]]:
        for path in sorted((top / folder).rglob("*") if deep else (top / folder).iterdir()):
            entry = {"path": str(path.relative_to(top)), "oid": "0" * 40}
            yield entry | ({"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory"})

    def resolve(self, path: str, span: str | None) -> tuple[int, dict[str, str], bytes]:
        self.ranges.append((path, span))
        if path in self.busy:
            self.busy.remove(path)
            return 503, {}, b"busy"
        commit, _, name = path.partition("/")
        whole = (self.commits[commit] / name).read_bytes()
        if span is None:
            return 200, {}, whole
        first, last = (int(number) for number in span.removeprefix("bytes=").split("-"))
        return 206, {"Content-Range": f"bytes {first}-{last}/{len(whole)}"}, whole[first : last + 1]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = found.answer(self.path, self.headers["Range"])
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield found
        server.shutdown()
        thread.join()


READ_ALL = """
import re, sys
from safetensors.torch import save_file
from rankleap.checkpoints.remote import open_remote_run
from rankleap.errors import InputError

def step_of_name(name):
    match = re.fullmatch("(?:step_|checkpoint-)([0-9]+)", name)
    return int(match[1]) if match else None

for number, address in enumerate(sys.argv[2:]):
    try:
        run = open_remote_run(address, step_of_name)
    except InputError as error:
        print(error)
        continue
    print(run.checkpoints.keys(), run.skipped)
    tensors = {f"{step}|{name}": one.source.read(name) for step, one in run.checkpoints.items() for name in one.source.shapes}
    save_file(tensors, f"{sys.argv[1]}/{number}.safetensors")
"""


def read_all(hub: Hub, out: Path, *addresses: str) -> list[str]:
    """One line for each address, in a process of its own: huggingface_hub reads its settings as it is imported."""
    settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ_ALL, str(out), *addresses]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_hub_repository_is_read_by_revisions_by_folders_and_at_a_revision(
    hub: Hub, run_directory: Path, tmp_path: Path
) -> None:
    upload_of = {f"{step:040}": run_directory / f"checkpoint-{step}" for step in (10, 20, 30, 40)}
    empty = tmp_path / "empty"
    empty.mkdir()
    hub.commits = {"a" * 40: run_directory, "b" * 40: empty, **upload_of}
    hub.branches = {"main": "a" * 40, "step_50": "b" * 40, **{f"step_{int(c)}": c for c in upload_of}}
    hub.busy = {f"{20:040}/model.safetensors"}
    hub.branches["folders"] = "a" * 40
    lines = read_all(
        hub,
        tmp_path,
        "hf://org/run",
        "hf://org/run@folders",
        "hf://org/run@main/checkpoint-20",
        "hf://org/run@step_30",
        "hf://org/absent",
        "hf://org/run@absent",
    )
    assert re.fullmatch(
        r"dict_keys\(\[10, 20, 30, 40\]\) \{'step_50': 'hf://org/run@step_50 needs .* found: nothing .*", lines[0]
    )
    assert lines[1:4] == ["dict_keys([10, 20, 30, 40]) {}", "dict_keys([20]) {}", "dict_keys([30]) {}"]
    assert re.search(r"hf://org/absent could not be read \(RepositoryNotFoundError: 404 .*check the address", lines[4])
    assert re.search(
        r"hf://org/run@absent could not be read \(RevisionNotFoundError: 404 .*check the address", lines[5]
    )
    for number, steps in enumerate([[10, 20, 30, 40], [10, 20, 30, 40], [20], [30]]):
        found = load_file(tmp_path / f"{number}.safetensors")
        for step in steps:
            for name, tensor in load_file(run_directory / f"checkpoint-{step}" / "model.safetensors").items():
                assert torch.equal(found.pop(f"{step}|{name}"), tensor)
        assert not found
    assert hub.busy == set()
    assert all(span is not None for path, span in hub.ranges if path.endswith(".safetensors"))


def test_a_hub_run_costs_two_requests_for_itself_and_two_for_each_step(hub: Hub, tmp_path: Path) -> None:
    steps, weights = range(1, 31), tmp_path / "weights"
    weights.mkdir()
    save_file({name: torch.ones(64, 256) for name in ("first", "second", "third")}, weights / "model.safetensors")
    hub.commits = {f"{step:040}": weights for step in steps} | {"a" * 40: tmp_path}
    hub.branches = {"main": "a" * 40} | {f"step_{step}": f"{step:040}" for step in steps}
    hub.asked.clear()
    hub.ranges.clear()
    out = tmp_path / "out"
    out.mkdir()
    (line,) = read_all(hub, out, "hf://org/run")
    assert line == f"dict_keys({list(steps)}) {{}}"
    assert (hub.asked["refs"], hub.asked["tree"]) == (1, 30)
    assert Counter(span for _, span in hub.ranges)[f"bytes=0-{FIRST_BYTES - 1}"] == 30
    # Then three tensors of each.
    assert len(hub.ranges) == 30 + 3 * 30
