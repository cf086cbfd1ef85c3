"""Remote runs, in a file system in memory that counts what is asked of it, and on a Hub of one repository on this machine."""

import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankleap.checkpoints import AdapterCheckpoint, FullCheckpoint, dense, open_run
from rankleap.checkpoints.remote import FIRST_BYTES, RemotePath
from rankleap.checkpoints.source import TensorSource, safetensors_files
from rankleap.errors import CheckpointError, InputError


class CountedFileSystem(MemoryFileSystem):
    """Files in memory that remember what they listed, as drivers do, and every answer; they fail or fall short when told to."""

    protocol = "counted"
    cachable = False
    store: dict[str, Any] = {}
    pseudo_dirs: list[str] = [""]
    listed: ClassVar[dict[str, list]] = {}
    answers: ClassVar[list[tuple[str, int]]] = []
    failures: ClassVar[list[tuple[str, OSError | int]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("counted://"))

    def ls(self, path: str, detail: bool = True, **kwargs: object) -> list:
        return self.listed.setdefault(path, super().ls(path, detail, **kwargs))

    def invalidate_cache(self, path: str | None = None) -> None:
        self.listed.clear()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        found = self.store[path].getvalue()[start:end]
        for failure in self.failures:
            if path.endswith(failure[0]):
                self.failures.remove(failure)
                if isinstance(failure[1], OSError):
                    raise failure[1]
                found = found[: failure[1]]
                break
        self.answers.append((path, len(found)))
        return found


fsspec.register_implementation("counted", CountedFileSystem)
Files = type[CountedFileSystem]


@pytest.fixture(autouse=True)
def files() -> Files:
    files = CountedFileSystem
    for state in (files.store, files.answers, files.failures, files.listed):
        state.clear()
    return files


def upload(directory: Path, address: str) -> str:
    fs = CountedFileSystem()
    for path in directory.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{address}/{path.relative_to(directory)}", path.read_bytes())
    return address


def source_of(path: Path) -> TensorSource:
    return open_run(upload(path.parent, "counted://run/step_1")).checkpoints[1].source


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file whose tensors are far longer than what is fetched of it at once."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(512, 256, generator=generator) for name in ("first", "second", "third")}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_remote_run_reads_as_the_same_run_on_disk_also_when_it_has_grown(run_directory: Path) -> None:
    here = open_run(run_directory)
    upload(run_directory / "checkpoint-10", "counted://run/checkpoint-10")
    assert list(open_run("counted://run").checkpoints) == [10]
    for address in (upload(run_directory, "counted://run"), "counted://run/"):
        there = open_run(address)
        assert (list(there.checkpoints), there.layout.name, there.skipped) == (here.steps, here.layout.name, {})
        for step, checkpoint in there.checkpoints.items():
            local = here.checkpoints[step]
            assert isinstance(checkpoint, FullCheckpoint) and isinstance(local, FullCheckpoint)
            assert (checkpoint.shapes, checkpoint.dtypes) == (local.shapes, local.dtypes)
            assert checkpoint.size_bytes() == local.size_bytes()
            assert all(torch.equal(checkpoint.tensor(name), local.tensor(name)) for name in local.shapes)
            assert (
                str(checkpoint.directory)
                == str(RemotePath(address) / f"checkpoint-{step}")
                == f"counted://run/checkpoint-{step}"
            )
            assert not checkpoint.directory.exists()


def test_opening_fetches_headers_and_a_tensor_only_its_own_bytes(large: Path, files: Files) -> None:
    for step in (1, 2, 3):
        upload(large.parent, f"counted://run/step_{step}")
    run = open_run("counted://run")
    assert [length for _, length in files.answers] == [FIRST_BYTES] * 3
    files.answers.clear()
    source = pickle.loads(pickle.dumps(run.checkpoints[2])).source
    assert torch.equal(source.read("second"), load_file(large)["second"])
    assert torch.equal(source.read("third", slice(100, 107)), load_file(large)["third"][100:107])
    assert source.read("first", slice(9, 9)).shape == source.read("first", slice(600, 700)).shape == (0, 256)
    place = "/run/step_2/model.safetensors"
    assert files.answers == [(place, 512 * 256 * 4), (place, 7 * 256 * 4)]


NAMES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool"


@pytest.mark.parametrize("dtype", NAMES.split())
def test_every_dtype_and_shape_reads_as_from_the_disk(dtype: str, tmp_path: Path, files: Files) -> None:
    shapes, path = [(), (0, 3), (5,), (4, 3), (3, 2, 5)], tmp_path / "model.safetensors"
    tensors = {str(shape): (10 * torch.rand(shape)).to(vars(torch)[dtype]) for shape in shapes}
    save_file(tensors, path, metadata={"longer than": "the first fetch" * FIRST_BYTES})
    remote, local = source_of(path), safetensors_files([path])
    assert [length for _, length in files.answers][:1] == [FIRST_BYTES] and len(files.answers) == 2
    assert (remote.shapes, remote.dtypes) == (local.shapes, local.dtypes)
    for name in tensors:
        for rows in (None, slice(1, 3), slice(2, None), slice(-2, None)) if local.shapes[name] else (None,):
            mine, theirs = remote.read(name, rows), local.read(name, rows)
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(mine.float(), theirs.float())


def test_a_dtype_that_torch_lacks_is_refused_when_it_is_read() -> None:
    header = json.dumps({"weight": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    CountedFileSystem().pipe_file("/run/step_1/model.safetensors", len(header).to_bytes(8, "little") + header + b"abcd")
    checkpoint = open_run("counted://run").checkpoints[1]
    with pytest.raises(CheckpointError, match=r"weight of counted://run/step_1/model\.safetensors cannot .*'F4'"):
        checkpoint.source.read("weight")


def test_shards_read_as_one_checkpoint_and_what_they_lack_is_named(base_directory: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base_directory).save_pretrained(tmp_path, max_shard_size="40KB")
    checkpoint = open_run(upload(tmp_path, "counted://run/step_5")).checkpoints[5]
    assert isinstance(checkpoint, FullCheckpoint)
    assert checkpoint.fingerprint() == FullCheckpoint(tmp_path).fingerprint()
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and checkpoint.size_bytes() == sum((tmp_path / shard).stat().st_size for shard in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for text, told in (
        (
            json.dumps({"weight_map": index | {"phantom": shards[0]}}),
            r"index\.json lists phantom, which model-.* should hold and lacks",
        ),
        (json.dumps({"weight_map": index | {"phantom": "lost"}}), r"counted://run/step_5/lost does not exist"),
        ('{"weight_map": {}}', r"step_5/model\.safetensors does not exist; found: .*index\.json"),
        ('{"weight_map": {"mod', r"index\.json is no valid JSON"),
    ):
        CountedFileSystem().pipe_file("/run/step_5/model.safetensors.index.json", text.encode())
        with pytest.raises(CheckpointError, match=told):
            open_run("counted://run")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 4000, -100, -1])
def test_a_truncated_file_is_named_and_its_step_skipped(keep: int, run_directory: Path) -> None:
    address, path = upload(run_directory, "counted://run"), "/run/checkpoint-30/model.safetensors"
    CountedFileSystem().pipe_file(path, CountedFileSystem.store[path].getvalue()[: keep or None if keep else 0])
    run = open_run(address)
    assert (list(run.checkpoints), list(run.skipped)) == ([10, 20, 40], ["checkpoint-30"])
    assert run.skipped["checkpoint-30"].startswith(f"counted:/{path} is truncated or damaged")


@pytest.mark.parametrize("change", ['"dtype" "dtipe"', '"shape":[ "shape":{', '"F32" "F64"', '"shape":[ "shape":[9,'])
def test_a_damaged_header_is_told_at_the_latest_by_its_tensor(change: str, large: Path) -> None:
    old, new = change.encode().split()
    whole = large.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].replace(old, new)
    large.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    for rows in (None, slice(3, 5)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors (is truncated or damaged|cannot be read as)"):
            source_of(large).read("first", rows)


def test_an_adapter_gives_the_deltas_of_the_same_one_on_disk(
    base_directory: Path, lora_run: Path, save_adapter: Callable[..., PeftModel], tmp_path: Path
) -> None:
    address = upload(lora_run, "counted://run")
    # TRL keeps the frozen reference adapter so, below the one that trains.
    save_adapter(tmp_path / "ref", seed=99)
    upload(tmp_path / "ref", "counted://run/checkpoint-20/ref")
    base, here, there = FullCheckpoint(base_directory), open_run(lora_run), open_run(address)
    assert (list(there.checkpoints), there.layout.name) == (here.steps, here.layout.name)
    mine, theirs = there.checkpoints[20], here.checkpoints[20]
    assert isinstance(mine, AdapterCheckpoint) and isinstance(theirs, AdapterCheckpoint)
    assert (mine.base, mine.shapes) == (str(base_directory), theirs.shapes)
    for name in theirs.shapes:
        assert torch.equal(dense(mine.delta(name, base)), dense(theirs.delta(name, base)))


def test_pickled_weights_are_not_fetched(lora_run: Path, files: Files) -> None:
    address, files_ = upload(lora_run, "counted://run"), files.store
    files_["/run/checkpoint-10/adapter_model.bin"] = files_.pop("/run/checkpoint-10/adapter_model.safetensors")
    CountedFileSystem().pipe_file("/run/checkpoint-50/pytorch_model.bin", b"pickle" * 1000)
    run = open_run(address)
    assert list(run.checkpoints) == [20, 30, 40]
    for name, needed, there in (("checkpoint-10", "adapter_", "adapter_"), ("checkpoint-50", "", "pytorch_")):
        told = rf"{name}/{needed}model.safetensors does not exist; found: .*{there}model.bin; .* copy that step here"
        assert re.search(told, run.skipped[name])
    assert not any(path.endswith(".bin") for path, _ in files.answers)


def test_steps_are_looked_for_where_trainers_put_them(run_directory: Path, lora_run: Path) -> None:
    address = upload(run_directory, "counted://run/checkpoints")
    last = run_directory / "checkpoint-40"
    for exported in ("run/exported", "verl/step_40/actor/huggingface", "draft/step_40", "somebody/below/it/step_40"):
        upload(last, f"counted://{exported}")
    upload(lora_run / "checkpoint-40", "counted://draft/step_40/draft")
    assert list(open_run(address).checkpoints) == [10, 20, 30, 40]
    assert list(open_run("counted://run/").checkpoints) == [10, 20, 30, 40]
    assert list(open_run("counted://run/checkpoints/checkpoint-20").checkpoints) == [20]
    assert list(open_run("counted://run/exported").checkpoints) == [0]
    assert str(open_run("counted://verl").checkpoints[40].directory) == "counted://verl/step_40/actor/huggingface"
    assert str(open_run("counted://draft").checkpoints[40].directory) == "counted://draft/step_40"
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in counted://somebody; .*\n.*found: nothing"):
        open_run("counted://somebody")


def test_a_step_is_taken_once_and_two_kinds_are_refused(run_directory: Path, lora_run: Path) -> None:
    for name in ("step_10", "checkpoint-10"):
        upload(run_directory / "checkpoint-10", f"counted://run/{name}")
    run = open_run("counted://run")
    assert str(run.checkpoints[10].directory) == "counted://run/checkpoint-10"
    assert run.skipped == {"step_10": "step 10 is here twice, counted://run/checkpoint-10 was taken"}
    upload(lora_run / "checkpoint-20", "counted://run/checkpoint-20")
    with pytest.raises(CheckpointError, match="counted://run mixes Hugging Face full and PEFT"):
        open_run("counted://run")


def test_a_connection_that_fails_once_is_tried_again(large: Path, files: Files) -> None:
    upload(large.parent, "counted://run/step_1")
    files.failures.append(("model.safetensors", ConnectionResetError("reset by peer")))
    run = open_run("counted://run")
    assert (list(run.checkpoints), files.failures) == ([1], [])
    files.failures.append(("model.safetensors", 1000))
    assert torch.equal(run.checkpoints[1].source.read("first"), load_file(large)["first"])
    assert files.failures == []
    files.failures.append(("model.safetensors", PermissionError("forbidden")))
    with pytest.raises(CheckpointError, match=r"counted://run/step_1/model.safetensors could not be read \(Permission"):
        run.checkpoints[1].source.read("first")


def test_a_step_that_is_gone_is_skipped_and_one_without_answer_is_not(run_directory: Path, files: Files) -> None:
    address = upload(run_directory, "counted://run")
    for error in (FileNotFoundError("no"), PermissionError("no")):
        files.failures.append(("30/model.safetensors", error))
        run = open_run(address)
        assert (list(run.checkpoints), files.failures) == ([10, 20, 40], [])
        told = f"counted://run/checkpoint-30 could not be read ({type(error).__name__}: no)"
        assert run.skipped["checkpoint-30"].startswith(told)
    files.failures += [("30/model.safetensors", ConnectionResetError("reset"))] * 3
    with pytest.raises(CheckpointError, match=r"checkpoint-30 could not be read \(ConnectionResetError: reset\)"):
        open_run(address)


def test_what_is_no_address_and_what_does_not_answer_is_told() -> None:
    fsspec.register_implementation("absent", "absentfs.core.AbsentFileSystem", errtxt="Install absentfs")
    for address, told in (
        ("memory:///", r"is no address \(it names no place\); needed hf://ORG/REPO"),
        ("hf://single", r"is no address \(.*single.*\); needed hf://ORG/REPO"),
        ("memori://run", r"is no address \(.*memori.*; needed hf://ORG/REPO"),
        ("absent://run", r"needs a driver that is not installed \(.*Install absentfs.*\); run: pip install absentfs"),
        ("counted://nowhere", r"could not be read \(FileNotFoundError: .*check it, your credentials"),
        ("hf://org/run", r"could not be read \(OfflineModeIsEnabled"),
    ):
        with pytest.raises(InputError, match=told):
            open_run(address)


class Hub(BaseHTTPRequestHandler):
    """A Hub of one repository: branches by name, folders by commit; the answers that it gives first, and what it has sent."""

    branches: dict[str, str] = {}
    commits: dict[str, Path] = {}
    busy: dict[str, list[int]] = {}
    lengths: ClassVar[Counter[int]] = Counter()

    def do_GET(self) -> None:
        status, body = self.answer(unquote(urlsplit(self.path).path).removeprefix("/api/models/").removeprefix("/"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Error-Code", body.decode() if status == 404 else "")
        self.end_headers()
        self.wfile.write(body)

    def answer(self, path: str) -> tuple[int, bytes]:
        kind, _, rest = path.removeprefix("org/run").strip("/").partition("/")
        commit, _, name = rest.partition("/")
        if self.busy.get(path):
            return self.busy[path].pop(), b"busy"
        if not path.startswith("org/run"):
            return 404, b"RepoNotFound"
        if kind == "refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in self.branches.items()]
            return 200, json.dumps({"branches": refs, "tags": refs[-1:], "converts": []}).encode()
        if kind == "tree":
            return 200, json.dumps(self.tree(self.commits[commit], name)).encode()
        if kind == "resolve":
            first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
            body = (self.commits[commit] / name).read_bytes()[first : last + 1]
            self.lengths[len(body)] += 1
            return 206, body
        known = (rest or "main") in {*self.branches, *self.commits}
        return (200, b'{"id": "org/run"}') if known else (404, b"RevisionNotFound")

    def tree(self, top: Path, folder: str) -> list[dict[str, Any]]:
        paths = (top / folder).rglob("*") if "recursive=true" in self.path.lower() else (top / folder).iterdir()
        entries = [{"path": str(path.relative_to(top)), "oid": "0" * 40, "size": path.stat().st_size} for path in paths]
        return [entry | {"type": "file" if (top / entry["path"]).is_file() else "directory"} for entry in entries]


READ_ALL = """
import sys, time
from safetensors.torch import save_file
from rankleap.checkpoints import open_run
from rankleap.errors import InputError

time.sleep = lambda seconds: None
for number, address in enumerate(sys.argv[2:]):
    try:
        run = open_run(address)
    except InputError as error:
        print(error)
        continue
    print(run.checkpoints.keys(), run.skipped)
    tensors = {f"{step}|{name}": one.source.read(name) for step, one in run.checkpoints.items() for name in one.source.shapes}
    save_file(tensors, f"{sys.argv[1]}/{number}.safetensors")
"""


def test_a_hub_repository_is_read_by_revisions_and_by_folders_of_one(run_directory: Path, tmp_path: Path) -> None:
    uploads = {f"{step:040}": run_directory / f"checkpoint-{step}" for step in (10, 20, 30, 40)}
    Hub.commits = {"a" * 40: run_directory, "b" * 40: tmp_path, **uploads}
    Hub.branches = {"main": "a" * 40, "step_50": "b" * 40, **{f"step_{int(commit)}": commit for commit in uploads}}
    Hub.busy = {f"org/run/resolve/{20:040}/model.safetensors": [503], f"org/run/revision/{30:040}": [429] * 5}
    places = ["run", f"run@{'a' * 40}", "run@main/checkpoint-20", "run@step_30", "absent", "run@absent"]
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # A process of its own: huggingface_hub reads its settings as it is imported.
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", READ_ALL, str(tmp_path), *(f"hf://org/{place}" for place in places)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | own, timeout=60)
        server.shutdown()
    assert (done.returncode, any(Hub.busy.values())) == (0, False), done.stderr
    lines = done.stdout.splitlines()
    told = r"dict_keys\(\[10, 20, 30, 40\]\) \{'step_50': 'hf://org/run@step_50/model.safetensors does not exist; .*"
    assert re.fullmatch(told, lines[0])
    assert lines[1:4] == ["dict_keys([10, 20, 30, 40]) {}", "dict_keys([20]) {}", "dict_keys([30]) {}"]
    for line, place, what in zip(lines[4:], places[4:], ["repository", "revision"], strict=True):
        assert re.match(rf"hf://org/{place} could not be read \(FileNotFoundError: .*{what} not found", line)
    asked: Counter[int] = Counter()
    for number, steps in enumerate([[10, 20, 30, 40], [10, 20, 30, 40], [20], [30]]):
        found = load_file(tmp_path / f"{number}.safetensors")
        for step in steps:
            path = run_directory / f"checkpoint-{step}" / "model.safetensors"
            asked[min(path.stat().st_size, FIRST_BYTES)] += 1
            for name, tensor in load_file(path).items():
                assert torch.equal(found.pop(f"{step}|{name}"), tensor)
                asked[tensor.nbytes] += 1
            # The beginnings of the head and of the embedding are compared, once, to tell whether they are tied.
            asked[load_file(path)["lm_head.weight"][:16].nbytes] += 2
        assert not found
    assert Hub.lengths == asked
