"""Reads what ``torch.save`` wrote without running any of it: where every tensor lies, and its bytes when they are asked for.

A pickle is a program that names functions to call. Here nothing that it names is imported: the few names that tensors need
are answered by functions of this file, names that are known to be harmless (``torch.distributed``'s shards) by ``Record``, which
does nothing, and any other name is refused. That is stricter than ``torch.load(weights_only=True)``, reads files of any
torch version and device alike, and maps only the bytes of a tensor that is read, not the file.
"""

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rankleap.checkpoints.full import FullCheckpoint
from rankleap.checkpoints.source import TensorSource, files_of
from rankleap.errors import CheckpointError

BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
MODEL_STATES = ("model_state.pt", "pytorch_model_fsdp.bin")
"""SkyRL's older file, and what accelerate writes of a gathered FSDP model."""
_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a file in torch's format before 1.6; later files are zip archives."""
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}
_INERT = ("torch.distributed.", "torch.device", "torch.serialization._get_layout", "torch.nn.parameter.", "numpy.")
"""Names, or beginnings of names, that are answered by a ``Record``."""
_WRAPPERS = ("model", "state_dict", "module", "model_state_dict")
_INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What ``torch.compile``, FSDP and activation checkpointing put into names."""
_BROKEN = (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError)
# A damaged pickle that still is one calls with wrong arguments and looks up what is not there.
_WRONG = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError)


class Record:
    """Stands for an object whose class is not imported: the arguments of its constructor, and its state."""

    origin = ""
    """Full name of the class or function that it stands for."""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "Record":
        """Not ``__init__``, for a pickle makes most objects without it."""
        record = super().__new__(cls)
        record.arguments, record.state = arguments, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = _attributes(state)


# Tuples and no dataclasses, here and below: a pickle could set another path in a dataclass, and nothing in a tuple.
class StoredTensor(NamedTuple):
    """Where a tensor lies in a file: ``start`` is the byte of its first element, ``stride`` counts elements."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes from the first element to the last."""
        if 0 in self.shape:
            return 0
        return self.dtype.itemsize * (
            1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        )

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor, or some of its rows (step 1): a view of the mapped bytes, which lives as long as the tensor does."""
        if rows is not None:
            first, stop, _ = rows.indices(self.shape[0])
            start = self.start + first * self.stride[0] * self.dtype.itemsize
            return self._replace(start=start, shape=(max(0, stop - first), *self.shape[1:])).read()
        if self.size_bytes == 0:  # which cannot be mapped
            return torch.empty(self.shape, dtype=self.dtype)
        with opening(self.path):
            # Copied on write, since torch knows no read-only memory; the file itself is never written to.
            content = torch.from_numpy(np.memmap(self.path, np.uint8, "c", self.start, (self.size_bytes,)))
        # Files before torch 1.6 do not align, and unaligned numbers may not be computed with.
        aligned = content if self.start % self.dtype.itemsize == 0 else content.clone()
        return aligned.view(self.dtype).as_strided(self.shape, self.stride)


class WrappedTensor(NamedTuple):
    """A tensor of a class that holds others (``DTensor``, ``ShardedTensor``): the whole's shape, and the holder's state."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    state: Any = None


def scan_pickle(path: Path, trust_pickle: bool = False, *, inert: tuple[str, ...] = ()) -> Any:
    """What ``torch.save`` wrote: a ``StoredTensor`` for each tensor, a ``Record`` for names that begin with one of ``inert``.

    Raises ``CheckpointError`` for a missing or damaged file, and for a file that names anything else than tensors need, unless
    ``trust_pickle``: then that is imported, and the file may run any code.
    """
    return Reader(path, trust_pickle, inert).tree()


def state_dict(path: Path, trust_pickle: bool = False) -> dict[str, StoredTensor | WrappedTensor]:
    """Tensors by the names that the model itself gives them; what is no tensor is left out."""
    tree = scan_pickle(path, trust_pickle)
    for _ in range(3):
        items = tree.items() if isinstance(tree, dict) else ()
        if tensors := {name: value for name, value in items if isinstance(value, StoredTensor | WrappedTensor)}:
            return _plain_names(tensors)
        tree = next((value for name, value in items if name in _WRAPPERS), None)
    raise CheckpointError(f"{path} holds no tensors by name; a state dict is needed")


def torch_files(paths: Sequence[Path], trust_pickle: bool = False) -> TensorSource:
    """Tensors of state dicts that ``torch.save`` wrote; raises ``CheckpointError`` for missing, damaged or untrusted files."""
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in state_dict(path, trust_pickle).items():
            if isinstance(tensor, WrappedTensor):
                raise CheckpointError(
                    f"{name} in {path} is a {tensor.kind}, one rank's part of a tensor; "
                    "needed the files of all ranks, named model_world_size_W_rank_R.pt"
                )
            tensors[name] = tensor
    return TensorSource(tensors, sum(path.stat().st_size for path in paths))


def open_bin(directory: Path, trust_pickle: bool = False) -> FullCheckpoint:
    """A Hugging Face full checkpoint from before safetensors: one file, or the shards that its index lists."""
    read = partial(torch_files, trust_pickle=trust_pickle)
    return FullCheckpoint(directory, source=files_of(directory, BIN, BIN_INDEX, read))


def open_torch(directory: Path, trust_pickle: bool = False) -> FullCheckpoint:
    """A full checkpoint in one file, one of ``MODEL_STATES``."""
    path = next(path for name in MODEL_STATES if (path := directory / name).exists())
    return FullCheckpoint(directory, source=torch_files([path], trust_pickle))


class _Storage(NamedTuple):
    path: Path
    start: int
    size_bytes: int
    dtype: torch.dtype


_StorageOf = Callable[[torch.dtype, str, int], _Storage]


class Reader:
    """Reads the pickles of one file; ``tree`` is ``scan_pickle``, the others are for formats that wrap what torch wrote."""

    def __init__(self, path: Path, trust_pickle: bool = False, inert: tuple[str, ...] = ()) -> None:
        self._path, self._trust_pickle, self._inert = path, trust_pickle, (*_INERT, *inert)

    def tree(self) -> Any:
        """What ``torch.save`` wrote."""
        with opening(self._path), self._path.open("rb") as file:
            # Only a zip archive begins so; `is_zipfile` would also take a file that merely ends like one.
            is_archive = file.read(2) == b"PK"
            file.seek(0)
            return self.archived(file) if is_archive else self._legacy(file)

    def plain(self) -> Any:
        """A pickle without tensors, which is the whole file."""
        with opening(self._path), self._path.open("rb") as file:
            return _Unpickler(file, self, _no_storage).load()

    def archived(self, file: Any) -> Any:
        """A zip archive: ``NAME/data.pkl`` is the tree, ``NAME/data/KEY`` are the storages, uncompressed."""
        with zipfile.ZipFile(file) as archive:
            [pickled] = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")

            def storage_of(dtype: torch.dtype, key: str, count: int) -> _Storage:
                info = archive.getinfo(f"{pickled.removesuffix('.pkl')}/{key}")
                # The directory at the end of the file says where a member's header begins; that says where its bytes do.
                file.seek(info.header_offset + 26)
                start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != count * dtype.itemsize:
                    raise ValueError(f"storage {key} has {info.file_size} bytes, needed {count} of {dtype}")
                return _Storage(self._path, start, info.file_size, dtype)

            return _Unpickler(BytesIO(archive.read(pickled)), self, storage_of).load()

    def _legacy(self, file: BinaryIO) -> Any:
        """The format before torch 1.6: the tree, then the keys of the storages, then the storages themselves."""
        sizes: dict[str, int] = {}
        starts: dict[str, int] = {}

        def storage_of(dtype: torch.dtype, key: str, count: int) -> _Storage:
            sizes[key] = count * dtype.itemsize
            return _Storage(self._path, starts.get(key, 0), sizes[key], dtype)

        magic, _, _ = (_Unpickler(file, self, _no_storage).load() for _ in range(3))
        if magic != _MAGIC:
            raise pickle.UnpicklingError("not written by torch.save")
        top = file.tell()
        _, keys = (_Unpickler(file, self, storage_of).load() for _ in range(2))
        position = file.tell()
        for key in keys:
            starts[key] = position + 8  # the number of elements comes first
            position += 8 + sizes[key]
        if position > self._path.stat().st_size:
            raise EOFError(f"needed {position} bytes")
        # Again, now that it is known where the storages lie.
        file.seek(top)
        return _Unpickler(file, self, storage_of).load()

    def answer(self, module: str, name: str) -> Any:
        """What stands for a name in the pickle; ``None`` for one that is to be imported, since the file is trusted."""
        full_name = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full_name in _KNOWN:
            return _KNOWN[full_name]
        if full_name.startswith(self._inert):
            return _record_class(full_name)
        if self._trust_pickle:
            return None
        raise CheckpointError(
            f"{self._path} names {full_name}, which weights do not need and which may run code; "
            "if you trust whoever wrote the file, --trust-pickle lets it run any code it holds"
        )


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, reader: Reader, storage_of: _StorageOf) -> None:
        super().__init__(file)
        self._reader, self._storage_of = reader, storage_of

    def find_class(self, module: str, name: str) -> Any:
        return self._reader.answer(module, name) or super().find_class(module, name)

    def persistent_load(self, saved: Any) -> Any:
        _, dtype, key, _, count, *_ = saved
        return self._storage_of(dtype, key, count)


def _no_storage(dtype: torch.dtype, key: str, count: int) -> _Storage:
    raise pickle.UnpicklingError(f"storage {key} where none can be")


def _record_class(full_name: str) -> type[Record]:
    return type(full_name.rpartition(".")[2], (Record,), {"origin": full_name})


def _tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> StoredTensor:
    # Version 3 gives the type beside an untyped storage.
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), storage.dtype)
    stored = StoredTensor(storage.path, storage.start + offset * dtype.itemsize, dtype, tuple(shape), tuple(stride))
    end = stored.start + stored.size_bytes
    if min(offset, *shape, *stride, 0) < 0 or end > max(stored.start, storage.start + storage.size_bytes):
        raise ValueError(f"a tensor of shape {stored.shape} reaches over the end of its storage")
    return stored


def _wrapper(kind: type, dtype: torch.dtype, shape: tuple[int, ...], *_: Any) -> WrappedTensor:
    return WrappedTensor(kind.__name__, dtype, tuple(shape))


def _from_type(build: Callable[..., Any], kind: Any, arguments: tuple[Any, ...], state: Any) -> Any:
    built = build(*arguments)
    return built._replace(state=_attributes(state)) if isinstance(built, WrappedTensor) else built


def _attributes(state: Any) -> Any:
    # A class with slots gives a pair: its dictionary, which may be none, and the slots.
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        return {**(state[0] or {}), **state[1]}
    return state


_KNOWN: dict[str, Any] = {
    **_DTYPES,
    **_STORAGES,
    "torch.Size": torch.Size,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    # How pickles of version 2 name a class within a class, and write bytes; the codec is not looked up, for that imports it.
    "builtins.getattr": lambda owner, name: _record_class(f"{owner.__name__}.{name}"),
    "_codecs.encode": lambda text, codec: text.encode("latin1"),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}
"""Answers to the names that tensors need."""


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is opened or unpickled into a ``CheckpointError`` that names it."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete") from None
    except PermissionError:
        raise CheckpointError(f"{path} may not be read by this user; change its permissions") from None
    except ImportError as error:
        raise CheckpointError(f"{path} needs what is not installed here ({error}); install it and read again") from None
    except (*_BROKEN, *_WRONG) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path} is truncated or damaged ({reason}); copy it again or leave this step out"
        ) from None


def _plain_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    # DDP wraps the whole model, so every name begins with its prefix or none does.
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    plain = {}
    for name, tensor in tensors.items():
        for inserted in _INSERTED:
            name = name.replace(inserted, "")
        plain[name.removeprefix(prefix)] = tensor
    return plain
