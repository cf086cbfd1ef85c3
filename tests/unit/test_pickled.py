"""What ``torch.save`` wrote: read lazily, and never run."""

import argparse
import functools
import json
import operator
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from rankleap.checkpoints import FullCheckpoint, open_checkpoint
from rankleap.checkpoints.pickled import (
    Record,
    StoredTensor,
    scan_pickle,
    state_dict,
    torch_files,
)
from rankleap.checkpoints.source import without_tied_head
from rankleap.errors import CheckpointError
from writers.torch_files import save_bin

MAPS = Path("/proc/self/maps")


class Calls:
    """A pickle that calls when it is loaded, as an attacker would write it."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def save(value: object, path: Path, is_archive: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=is_archive, pickle_protocol=protocol)
    return path


def rebuilt(shape: tuple[int, ...], offset: int = 0, state: object = None) -> Calls:
    """A tensor as its pickle describes it, on a storage of two numbers."""
    function, (storage, *_) = torch.ones(2).__reduce_ex__(2)[:2]
    arguments = (storage, offset, shape, (1,) * len(shape), False, OrderedDict())
    return Calls(function, arguments, state)


@pytest.mark.parametrize("is_archive", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_planted_call_never_runs_and_is_named(tmp_path: Path, is_archive: bool, protocol: int) -> None:
    call = Calls(os.system, (f"touch {tmp_path / 'ran'}",))
    path = save({"w": torch.ones(2), "x": call}, tmp_path / "model_state.pt", is_archive, protocol)
    with pytest.raises(
        CheckpointError, match=r"model_state\.pt names posix\.system, .*--trust-pickle lets it run any code"
    ):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert state_dict(path, trust_pickle=True).keys() == {"w"}
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cposix\nsystem\n(S'touch ran'\ntR.",
        b"(S'touch ran'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'touch ran'\no.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R.",
        b"c__builtin__\ngetattr\n(cposix\nsystem\nS'__call__'\ntR(S'touch ran'\ntR.",
        b"ctorch.distributed.tensor\nDTensor\n(cposix\nsystem\nS'touch ran'\ntR.",
    ],
    ids=["reduce", "instance", "object", "version 4", "attribute", "argument"],
)
def test_no_opcode_reaches_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opcodes: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(opcodes)
    with pytest.raises(CheckpointError, match=r"names posix\.system"):
        scan_pickle(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        ("builtins.eval", eval, ("1",)),
        ("io.open", open, ("ran", "w")),
        ("torch.hub.load", torch.hub.load, ("somewhere", "something")),
        ("torch.serialization.load", torch.load, ("ran",)),
        ("functools.partial", functools.partial, (len,)),
        ("operator.attrgetter", operator.attrgetter, ("system",)),
    ],
)
def test_only_what_tensors_need_may_be_named(
    tmp_path: Path, name: str, function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    with pytest.raises(CheckpointError, match=f"a.pt names {name}, which weights do not need"):
        scan_pickle(save({"w": torch.ones(2), "x": Calls(function, arguments)}, tmp_path / "a.pt"))


def test_what_a_pickle_gets_cannot_be_turned_against_the_reader(tmp_path: Path) -> None:
    for state in ({"path": "another", "start": 0}, (None, {"shape": (99,)})):
        with pytest.raises(CheckpointError, match="damaged"):
            scan_pickle(save({"w": rebuilt((2,), state=state)}, tmp_path / "a.pt"))


@pytest.mark.parametrize(("shape", "offset"), [((3,), 0), ((2,), 1), ((2,), -1), ((2, 2, 2), 0)])
def test_a_tensor_that_reaches_out_of_its_storage_is_refused(
    tmp_path: Path, shape: tuple[int, ...], offset: int
) -> None:
    assert scan_pickle(save(rebuilt((2,)), tmp_path / "whole.pt")).shape == (2,)
    with pytest.raises(CheckpointError, match="reaches over the end of its storage"):
        scan_pickle(save(rebuilt(shape, offset), tmp_path / "a.pt"))


def test_an_unknown_class_is_read_once_it_is_trusted_or_declared_inert(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace"):
        scan_pickle(path)
    assert scan_pickle(path, trust_pickle=True)["args"] == argparse.Namespace(lr=1)
    record = scan_pickle(path, inert=("argparse.",))["args"]
    assert isinstance(record, Record)
    assert (record.origin, record.state) == ("argparse.Namespace", {"lr": 1})


def test_a_trusted_class_that_is_not_installed_is_named(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    # The name has as many letters, so the archive stays whole but for its checksum, which the older format lacks.
    save(torch.load(path, weights_only=False), path, is_archive=False)
    path.write_bytes(path.read_bytes().replace(b"argparse", b"argparsf"))
    with pytest.raises(CheckpointError, match=r"not installed here \(No module named 'argparsf'\)"):
        scan_pickle(path, trust_pickle=True)


@pytest.mark.parametrize("is_archive", [True, False])
def test_every_tensor_is_read_as_torch_reads_it(tmp_path: Path, is_archive: bool) -> None:
    numbers = torch.arange(24.0)
    tensors: dict[str, Tensor] = {
        "odd": torch.arange(3, dtype=torch.uint8),  # leaves what follows unaligned in the older format
        **{str(dtype): numbers.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64)},
        **{str(dtype): numbers.to(dtype) for dtype in (torch.int32, torch.int16, torch.int8, torch.bool)},
        "matrix": numbers.view(4, 6),
        "transposed": numbers.view(4, 6).t(),
        "part": numbers.view(4, 6)[1:3, 2:5],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }
    if is_archive:
        tensors |= {"float8": numbers.to(torch.float8_e4m3fn), "uint16": numbers.to(torch.uint16)}
    path = save(OrderedDict(tensors), tmp_path / "a.pt", is_archive)
    source = torch_files([path])
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert (source.dtypes["part"], source.dtypes["torch.bfloat16"], source.dtypes["odd"]) == (
        "F32",
        "BF16",
        "torch.uint8",
    )
    assert source.size_bytes == path.stat().st_size
    for name, tensor in tensors.items():
        found = source.read(name)
        assert (found.dtype, found.stride()) == (tensor.dtype, tensor.stride())
        assert torch.equal(found.double(), tensor.double())
        assert found.data_ptr() % found.element_size() == 0
        if tensor.ndim:
            assert torch.equal(source.read(name, slice(1, 3)).double(), tensor[1:3].double())
            assert torch.equal(source.read(name, slice(-2, None)).double(), tensor[-2:].double())


def test_values_are_read_when_they_are_asked_for_and_can_be_written_to(tmp_path: Path) -> None:
    path = save({"w": torch.ones(4, 2)}, tmp_path / "a.pt")
    source = torch_files([path])
    content = path.read_bytes()
    path.write_bytes(content.replace(torch.ones(8).numpy().tobytes(), torch.full((8,), 2.0).numpy().tobytes()))
    assert torch.equal(source.read("w"), torch.full((4, 2), 2.0))
    source.read("w").zero_()
    assert torch.equal(source.read("w"), torch.full((4, 2), 2.0))
    path.write_bytes(content[:100])
    with pytest.raises(CheckpointError, match="truncated"):
        source.read("w")


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not tell what is mapped")
def test_only_the_rows_that_are_read_are_in_memory(tmp_path: Path) -> None:
    path = save({"w": torch.ones(1024, 1024)}, tmp_path / "a.pt")

    def mapped_bytes() -> int:
        spans = (line.split()[0].split("-") for line in MAPS.read_text().splitlines() if str(path) in line)
        return sum(int(stop, 16) - int(start, 16) for start, stop in spans)

    source = torch_files([path])
    assert mapped_bytes() == 0
    rows = source.read("w", slice(500, 510))
    assert rows.nbytes <= mapped_bytes() <= rows.nbytes + (1 << 17)
    del rows
    assert mapped_bytes() == 0


def test_a_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    source = torch_files([save({"w": torch.ones(2)}, tmp_path / "a.pt")])
    assert torch.equal(pickle.loads(pickle.dumps(source)).read("w"), torch.ones(2))


def test_wrappers_are_taken_off_and_what_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    inner = {"module._orig_mod.layers.0._fsdp_wrapped_module.w": torch.ones(2), "module.b": torch.zeros(1)}
    path = save(
        {"state_dict": {"module": {**inner, "step": 3, "name": "x", "bytes": b"x"}}, "lr": 0.1}, tmp_path / "a.pt"
    )
    assert state_dict(path).keys() == {"layers.0.w", "b"}
    assert state_dict(save({"module.w": torch.ones(1), "b": torch.ones(1)}, path)).keys() == {"module.w", "b"}
    for nothing in ([torch.ones(2)], {"lr": 0.1}, {"model": None}):
        with pytest.raises(CheckpointError, match=r"a\.pt holds no tensors by name"):
            state_dict(save(nothing, path))
    endless: dict[str, Any] = {}
    endless["model"] = endless
    with pytest.raises(CheckpointError, match="holds no tensors"):
        state_dict(save(endless, path))


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("is_archive", [True, False])
def test_a_truncated_file_is_noticed_when_it_is_opened(tmp_path: Path, is_archive: bool, keep: float) -> None:
    path = save({"w": torch.ones(1000), "v": torch.ones(10)}, tmp_path / "a.pt", is_archive)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"a\.pt is truncated or damaged \(.+\); copy it again"):
        torch_files([path])


def test_what_torch_did_not_write_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match=r"a\.pt does not exist; the checkpoint is incomplete"):
        scan_pickle(path)
    for content in (b"not a pickle", b"PK not an archive", pickle.dumps({"w": 1}), pickle.dumps([1, 2]) * 3):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            scan_pickle(path)
    save({"w": torch.ones(1000)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as compressed:
        for name in archive.namelist():
            compressed.writestr(name, archive.read(name))
    with pytest.raises(CheckpointError, match=r"b\.pt is truncated or damaged"):
        scan_pickle(tmp_path / "b.pt")


def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / "a.pt")
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=r"a\.pt may not be read by this user"):
            scan_pickle(path)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_bin_has_the_tensors_that_a_safetensors_file_would(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, is_tied: bool, shards: int
) -> None:
    model = make_model(tie_word_embeddings=is_tied)
    assert isinstance(model, LlamaForCausalLM)
    save_bin(model, tmp_path / "bin", shards)
    model.save_pretrained(tmp_path / "safe")
    pickled, safe = open_checkpoint(tmp_path / "bin"), open_checkpoint(tmp_path / "safe")
    assert isinstance(pickled, FullCheckpoint) and isinstance(safe, FullCheckpoint)
    assert ("lm_head.weight" in pickled.shapes) is not is_tied
    assert (pickled.shapes, pickled.dtypes) == (safe.shapes, safe.dtypes)
    assert all(torch.equal(pickled.tensor(name), safe.tensor(name)) for name in safe.shapes)
    assert pickled.fingerprint() == safe.fingerprint()


def test_a_tied_head_is_known_by_its_values(tmp_path: Path) -> None:
    embedding = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    state = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    source = without_tied_head(torch_files([save(state, tmp_path / "a.pt")]))
    assert list(source.shapes) == ["model.embed_tokens.weight"]
    state["lm_head.weight"][0] += 1
    assert len(without_tied_head(torch_files([save(state, tmp_path / "a.pt")])).shapes) == 2


def test_shards_that_lack_what_the_index_lists_are_refused(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    save_bin(make_model(), tmp_path, shards=2)
    index = tmp_path / "pytorch_model.bin.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["more.weight"] = "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps(listed))
    with pytest.raises(
        CheckpointError, match=r"lists more\.weight, which pytorch_model-00001-of-00002\.bin should hold"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin does not exist"):
        open_checkpoint(tmp_path)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="lists no tensors"):
        open_checkpoint(tmp_path)


def test_a_stored_tensor_says_where_its_bytes_are(tmp_path: Path) -> None:
    path = save({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "a.pt")
    stored = scan_pickle(path)["w"]
    assert isinstance(stored, StoredTensor)
    content = path.read_bytes()[stored.start : stored.start + stored.size_bytes]
    assert content == torch.arange(6.0).numpy().tobytes()
