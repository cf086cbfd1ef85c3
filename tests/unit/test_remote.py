"""Remote runs, in a file system in memory that counts what is asked of it."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankleap.checkpoints import AdapterCheckpoint, FullCheckpoint, dense, open_run
from rankleap.checkpoints.remote import FIRST_BYTES, RemoteRun, RemoteSafetensors, open_remote_run
from rankleap.checkpoints.source import SafetensorsSource
from rankleap.checkpoints.stores import fsspec_store
from rankleap.errors import CheckpointError


class CountedFileSystem(MemoryFileSystem):
    """Files in memory at ``counted://`` that remembers what it listed, as drivers do, and the length of every answer.

    It fails, or cuts an answer short, when told to.
    """

    protocol = "counted"
    cachable = False
    store: dict[str, Any] = {}
    pseudo_dirs: list[str] = [""]
    listed: ClassVar[dict[str, list]] = {}
    answers: ClassVar[list[tuple[str, int]]] = []
    failures: ClassVar[list[tuple[str, OSError | int]]] = []
    serves_ranges: ClassVar[list[bool]] = [True]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("counted://"))

    def ls(self, path: str, detail: bool = True, **kwargs: object) -> list:
        return self.listed.setdefault(path, super().ls(path, detail, **kwargs))

    def invalidate_cache(self, path: str | None = None) -> None:
        self.listed.clear()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        whole = self.store[path].getvalue()
        found = whole[start:end] if self.serves_ranges[0] else whole
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


@pytest.fixture(autouse=True)
def files() -> type[CountedFileSystem]:
    files = CountedFileSystem
    for state in (files.store, files.answers, files.failures, files.listed):
        state.clear()
    files.serves_ranges[:] = [True]
    return files


def step_of_name(name: str) -> int | None:
    match = re.fullmatch(r"(?:checkpoint-|step_|.+-step-)(\d+)", name)
    return int(match[1]) if match else None


def upload(directory: Path, address: str) -> str:
    fs = CountedFileSystem()
    for path in directory.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{address}/{path.relative_to(directory)}", path.read_bytes())
    return address


def opened(address: str, **settings: tuple[str, ...]) -> RemoteRun:
    return open_remote_run(address, step_of_name, **settings)


def source_of(path: Path) -> RemoteSafetensors:
    upload(path.parent, "counted://files")
    return RemoteSafetensors(fsspec_store("counted://files"), {path.name: []}, {path.name: path.stat().st_size})


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file whose tensors are far longer than what is fetched of it at once."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(512, 256, generator=generator) for name in ("first", "second", "third")}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_remote_run_reads_as_the_same_run_on_disk(run_directory: Path) -> None:
    here, there = open_run(run_directory), opened(upload(run_directory, "counted://bucket/run"))
    assert (list(there.checkpoints), there.layout_key, there.skipped) == (here.steps, "hf", {})
    for step, checkpoint in there.checkpoints.items():
        local = here.checkpoints[step]
        assert isinstance(checkpoint, FullCheckpoint) and isinstance(local, FullCheckpoint)
        assert (checkpoint.shapes, checkpoint.dtypes) == (local.shapes, local.dtypes)
        assert checkpoint.size_bytes() == local.size_bytes()
        assert all(torch.equal(checkpoint.tensor(name), local.tensor(name)) for name in local.shapes)
        assert str(checkpoint.directory) == f"counted://bucket/run/checkpoint-{step}"


def test_a_run_that_grows_is_read_anew(run_directory: Path) -> None:
    upload(run_directory / "checkpoint-10", "counted://run/checkpoint-10")
    assert list(opened("counted://run").checkpoints) == [10]
    upload(run_directory / "checkpoint-20", "counted://run/checkpoint-20")
    assert list(opened("counted://run").checkpoints) == [10, 20]


def test_opening_fetches_headers_and_a_tensor_only_its_own_bytes(large: Path, files: type[CountedFileSystem]) -> None:
    for step in (1, 2, 3):
        upload(large.parent, f"counted://run/step_{step}")
    run = opened("counted://run")
    assert [length for _, length in files.answers] == [FIRST_BYTES] * 3
    files.answers.clear()
    tensor = run.checkpoints[2].source.read("second")
    assert files.answers == [("/run/step_2/model.safetensors", 512 * 256 * 4)]
    assert torch.equal(tensor, load_file(large)["second"])


def test_rows_cost_only_their_own_bytes(large: Path, files: type[CountedFileSystem]) -> None:
    source = source_of(large)
    files.answers.clear()
    assert torch.equal(source.read("third", slice(100, 107)), load_file(large)["third"][100:107])
    assert [length for _, length in files.answers] == [7 * 256 * 4]


def test_no_bytes_cost_no_request(large: Path, files: type[CountedFileSystem]) -> None:
    source = source_of(large)
    files.answers.clear()
    assert source.read("first", slice(9, 9)).shape == (0, 256)
    assert source.read("first", slice(600, 700)).shape == (0, 256)
    assert files.answers == []


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS], ids=str)
def test_every_dtype_and_shape_reads_as_from_the_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    shapes = [(), (0, 3), (5,), (4, 3), (3, 2, 5)]
    tensors = {str(shape): (10 * torch.rand(shape)).to(dtype) for shape in shapes}
    save_file(tensors, tmp_path / "all.safetensors", metadata={"format": "pt"})
    remote, local = source_of(tmp_path / "all.safetensors"), SafetensorsSource({tmp_path / "all.safetensors": []})
    assert (remote.shapes, remote.dtypes) == (local.shapes, local.dtypes)
    for name in tensors:
        for rows in (None, slice(1, 3), slice(2, None), slice(-2, None)) if local.shapes[name] else (None,):
            mine, theirs = remote.read(name, rows), local.read(name, rows)
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(mine.float(), theirs.float())


def test_a_dtype_that_torch_lacks_is_refused_when_it_is_read(files: type[CountedFileSystem]) -> None:
    header = json.dumps({"weight": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    CountedFileSystem().pipe_file("/run/step_1/model.safetensors", len(header).to_bytes(8, "little") + header + b"abcd")
    checkpoint = opened("counted://run").checkpoints[1]
    with pytest.raises(CheckpointError, match=r"weight of counted://run/step_1/model\.safetensors is stored as F4"):
        checkpoint.source.read("weight")


def test_a_header_longer_than_the_first_fetch_costs_one_more(tmp_path: Path, files: type[CountedFileSystem]) -> None:
    save_file({f"layer.{number:04}": torch.full((2,), number) for number in range(2000)}, tmp_path / "many.safetensors")
    source = source_of(tmp_path / "many.safetensors")
    assert len(files.answers) == 2
    assert len(source.shapes) == 2000
    assert source.read("layer.1234").tolist() == [1234, 1234]


@pytest.fixture
def sharded(base_directory: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "sharded" / "step_5"
    AutoModelForCausalLM.from_pretrained(base_directory).save_pretrained(directory, max_shard_size="40KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def test_shards_read_as_one_checkpoint(sharded: Path) -> None:
    run, local = opened(upload(sharded.parent, "counted://run")), FullCheckpoint(sharded)
    checkpoint = run.checkpoints[5]
    assert isinstance(checkpoint, FullCheckpoint) and checkpoint.fingerprint() == local.fingerprint()
    assert checkpoint.size_bytes() == local.size_bytes()


def test_a_missing_shard_is_named_and_its_step_skipped(sharded: Path, run_directory: Path) -> None:
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    upload(sharded, "counted://run/step_5")
    upload(run_directory / "checkpoint-10", "counted://run/checkpoint-10")
    run = opened("counted://run")
    assert list(run.checkpoints) == [10]
    assert run.skipped["step_5"].startswith(f"counted://run/step_5/{lost.name} does not exist")


def test_an_index_that_names_what_no_shard_holds_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.phantom.weight"] = sorted(listed["weight_map"].values())[0]
    for text, told in (
        (json.dumps(listed), r"lacks model\.phantom\.weight"),
        ('{"weight_map": {}}', r"index\.json lists no tensors"),
        ('{"weight_map": {"mod', r"index\.json is no valid JSON"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=told):
            opened(upload(sharded.parent, "counted://run"))


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 4000, -100, -1])
def test_a_truncated_file_is_named_and_its_step_skipped(keep: int, run_directory: Path) -> None:
    address = upload(run_directory, "counted://run")
    path = "/run/checkpoint-30/model.safetensors"
    CountedFileSystem().pipe_file(path, CountedFileSystem.store[path].getvalue()[: keep or None if keep else 0])
    run = opened(address)
    assert list(run.checkpoints) == [10, 20, 40]
    assert list(run.skipped) == ["checkpoint-30"]
    assert re.match(
        r"counted://run/checkpoint-30/model\.safetensors is truncated or damaged", run.skipped["checkpoint-30"]
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"dtype"', b'"dtipe"'), (b'"shape":[', b'"shape":{'), (b'"F32"', b'"F64"'), (b'"shape":[', b'"shape":[9,')],
)
def test_a_damaged_header_is_told(old: bytes, new: bytes, large: Path) -> None:
    whole = large.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].replace(old, new, 1)
    large.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        source_of(large)


def test_an_impossible_header_length_fetches_nothing_more(files: type[CountedFileSystem]) -> None:
    CountedFileSystem().pipe_file("/run/step_1/model.safetensors", b"\xff" * 200_000)
    with pytest.raises(CheckpointError, match="its header does not fit"):
        opened("counted://run")
    assert [length for _, length in files.answers] == [FIRST_BYTES]


def test_an_adapter_gives_the_deltas_of_the_same_one_on_disk(
    base_directory: Path, lora_run: Path, save_adapter: Callable[..., PeftModel], tmp_path: Path
) -> None:
    address = upload(lora_run, "counted://run")
    # TRL keeps the frozen reference adapter so, below the one that trains.
    save_adapter(tmp_path / "ref", seed=99)
    upload(tmp_path / "ref", "counted://run/checkpoint-20/ref")
    base, here, there = FullCheckpoint(base_directory), open_run(lora_run), opened(address)
    assert (list(there.checkpoints), there.layout_key) == (here.steps, "peft")
    mine, theirs = there.checkpoints[20], here.checkpoints[20]
    assert isinstance(mine, AdapterCheckpoint) and isinstance(theirs, AdapterCheckpoint)
    assert mine.base == str(base_directory)
    assert mine.shapes == theirs.shapes
    for name in theirs.shapes:
        assert torch.equal(dense(mine.delta(name, base)), dense(theirs.delta(name, base)))


def test_an_adapter_without_its_weights_is_no_checkpoint(lora_run: Path, files: type[CountedFileSystem]) -> None:
    address = upload(lora_run, "counted://run")
    files.store["/run/checkpoint-10/adapter_model.bin"] = files.store.pop(
        "/run/checkpoint-10/adapter_model.safetensors"
    )
    run = opened(address)
    assert list(run.checkpoints) == [20, 30, 40]
    assert re.search(r"needs adapter_model.safetensors; found: .*adapter_model.bin", run.skipped["checkpoint-10"])


def test_the_folders_that_trainers_put_steps_in_are_looked_into(run_directory: Path) -> None:
    address = upload(run_directory, "counted://run/checkpoints")
    upload(run_directory / "checkpoint-40", "counted://run/exported")
    assert list(opened(address).checkpoints) == [10, 20, 30, 40]
    assert list(opened("counted://run/", parents=("checkpoints", ".")).checkpoints) == [10, 20, 30, 40]


def test_an_address_may_be_one_checkpoint(run_directory: Path) -> None:
    upload(run_directory / "checkpoint-40", "counted://run/checkpoint-40")
    upload(run_directory / "checkpoint-40", "counted://run/final")
    assert list(opened("counted://run/checkpoint-40").checkpoints) == [40]
    assert list(opened("counted://run/final").checkpoints) == [0]


def test_what_lies_somewhere_below_an_address_is_not_taken_for_its_checkpoint(run_directory: Path) -> None:
    upload(run_directory, "counted://bucket/somebody/run")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in counted://bucket; .*\n.*found: nothing"):
        opened("counted://bucket")


def test_weights_in_a_folder_of_the_step_are_found(run_directory: Path) -> None:
    upload(run_directory / "checkpoint-40", "counted://run/step_40/actor/huggingface")
    assert str(opened("counted://run").checkpoints[40].directory) == "counted://run/step_40/actor/huggingface"


def test_an_adapter_below_full_weights_is_not_taken_for_them(run_directory: Path, lora_run: Path) -> None:
    upload(run_directory / "checkpoint-40", "counted://run/step_40")
    upload(lora_run / "checkpoint-40", "counted://run/step_40/draft")
    assert str(opened("counted://run").checkpoints[40].directory) == "counted://run/step_40"


def test_two_kinds_in_one_place_are_refused(run_directory: Path, lora_run: Path) -> None:
    upload(run_directory / "checkpoint-10", "counted://run/checkpoint-10")
    upload(lora_run / "checkpoint-20", "counted://run/checkpoint-20")
    with pytest.raises(CheckpointError, match="counted://run mixes hf and peft"):
        opened("counted://run")


def test_a_step_that_is_there_twice_is_taken_once_and_told(run_directory: Path) -> None:
    for name in ("step_10", "checkpoint-10"):
        upload(run_directory / "checkpoint-10", f"counted://run/{name}")
    run = opened("counted://run")
    assert str(run.checkpoints[10].directory) == "counted://run/checkpoint-10"
    assert run.skipped == {"step_10": "step 10 is here twice, counted://run/checkpoint-10 was taken"}


def test_pickled_weights_are_not_fetched(files: type[CountedFileSystem]) -> None:
    CountedFileSystem().pipe_file("/run/step_1/pytorch_model.bin", b"pickle" * 1000)
    with pytest.raises(
        CheckpointError, match=r"(?s)no complete checkpoint.*found: step_1/pytorch_model.bin .*copy this step"
    ):
        opened("counted://run")
    assert files.answers == []


def test_nothing_there_is_told() -> None:
    with pytest.raises(CheckpointError, match=r"counted://nowhere could not be read \(FileNotFoundError"):
        opened("counted://nowhere")


def test_a_connection_that_fails_once_is_tried_again(large: Path, files: type[CountedFileSystem]) -> None:
    upload(large.parent, "counted://run/step_1")
    files.failures.append(("model.safetensors", ConnectionResetError("reset by peer")))
    run = opened("counted://run")
    assert (list(run.checkpoints), files.failures) == ([1], [])
    files.failures.append(("model.safetensors", 1000))
    assert torch.equal(run.checkpoints[1].source.read("first"), load_file(large)["first"])
    assert files.failures == []


def test_a_place_that_stays_unreachable_fails_and_skips_nothing(
    run_directory: Path, files: type[CountedFileSystem]
) -> None:
    address = upload(run_directory, "counted://run")
    files.failures += [("checkpoint-30/model.safetensors", ConnectionResetError("reset by peer"))] * 3
    with pytest.raises(
        CheckpointError, match=r"counted://run could not be read \(ConnectionResetError: reset by peer\)"
    ):
        opened(address)


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("forbidden")])
def test_a_step_that_is_deleted_or_forbidden_is_skipped_at_once(
    error: OSError, run_directory: Path, files: type[CountedFileSystem]
) -> None:
    address = upload(run_directory, "counted://run")
    files.failures.append(("checkpoint-30/model.safetensors", error))
    run = opened(address)
    assert list(run.checkpoints) == [10, 20, 40]
    assert run.skipped == {"checkpoint-30": f"counted://run/checkpoint-30: {type(error).__name__}: {error}"}


def test_a_tensor_that_cannot_be_read_is_told(large: Path, files: type[CountedFileSystem]) -> None:
    source = source_of(large)
    files.failures.append(("model.safetensors", PermissionError("forbidden")))
    with pytest.raises(CheckpointError, match=r"counted://files/model.safetensors could not be read \(PermissionError"):
        source.read("first")


def test_a_server_without_ranges_is_told(large: Path, files: type[CountedFileSystem]) -> None:
    source = source_of(large)
    files.serves_ranges[:] = [False]
    files.answers.clear()
    with pytest.raises(
        CheckpointError, match=r"524,288 bytes were asked for, its server sent 1,573,\d+; .* copy the run"
    ):
        source.read("first")
    assert len(files.answers) == 1


def test_a_remote_checkpoint_can_be_sent_to_another_process(large: Path) -> None:
    upload(large.parent, "counted://run/step_1")
    checkpoint = pickle.loads(pickle.dumps(opened("counted://run").checkpoints[1]))
    assert torch.equal(checkpoint.tensor("second"), load_file(large)["second"])
    assert str(checkpoint.directory) == "counted://run/step_1"
