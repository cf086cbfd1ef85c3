"""Opens what DeepSpeed's ``save_checkpoint`` leaves, at any ZeRO stage and without DeepSpeed: float32 masters before bf16.

Each rank keeps its part of the masters as flat vectors, one for each group of parameters, row-major and without names;
``param_shapes`` in the model's file gives names, shapes and order. A weight of n elements, on W ranks, lies

    ZeRO-1/2   in one run of n in the group's vector, which is the ranks' parts laid end to end
    ZeRO-3     in a run of ⌈n/W⌉ in each rank's vector, which is that rank's groups laid end to end; the last ones are padding

Frozen parameters have no masters: the model's file has them whole (ZeRO-1/2) or as each rank's fragment (ZeRO-3).
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankleap.checkpoints.full import FullCheckpoint
from rankleap.checkpoints.pickled import StoredTensor, scan_pickle
from rankleap.checkpoints.source import Stored, TensorSource
from rankleap.errors import CheckpointError

STATES = "*_states.pt"
LATEST = "latest"
"""Beside the steps' folders, written after them: the name of the newest one."""
_MODEL = "mp_rank_00_model_states.pt"
_OF_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")
# Classes of their loss scalers, stages and fragment addresses, and of ZeRO-3's vectors, which carry a name; none is needed.
_INERT = ("deepspeed.", "torch.Tensor")
_MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
"""The optimizer's key of the masters in ZeRO-1/2 and in ZeRO-3."""


@dataclass(frozen=True, slots=True)
class _Vector:
    """One-dimensional tensors laid end to end."""

    parts: tuple[StoredTensor, ...]

    @property
    def size(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    def read(self, first: int, stop: int) -> Iterator[Tensor]:
        """The elements from ``first`` to ``stop``, in one piece for each tensor that they lie in."""
        for part in self.parts:
            low, high = max(first, 0), min(stop, part.shape[0])
            if low < high:
                yield part.read(slice(low, high))
            first, stop = first - part.shape[0], stop - part.shape[0]


@dataclass(frozen=True, slots=True)
class _Flat:
    """A weight that is ``length`` elements from ``offset`` of each vector in turn, row-major."""

    vectors: tuple[_Vector, ...]
    offset: int
    length: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.vectors[0].parts[0].dtype

    def read(self, rows: slice | None = None) -> Tensor:
        """The weight or some of its rows; of the files only the bytes of these rows are touched."""
        shape, first, stop = self.shape, 0, math.prod(self.shape)
        if rows is not None:
            top, bottom, _ = rows.indices(shape[0])
            width, shape = math.prod(shape[1:]), (max(0, bottom - top), *shape[1:])
            first, stop = top * width, bottom * width
        pieces: list[Tensor] = []
        for vector in self.vectors:
            pieces += vector.read(self.offset + max(first, 0), self.offset + min(stop, self.length))
            first, stop = first - self.length, stop - self.length
        # One piece stays a view of the file.
        whole = pieces[0] if len(pieces) == 1 else torch.cat([torch.empty(0, dtype=self.dtype), *pieces])
        return whole.view(shape)


class _Step:
    """One step's folder."""

    def __init__(self, directory: Path, trust_pickle: bool) -> None:
        self._directory, self._trust_pickle = directory, trust_pickle
        self.files = sorted(directory.glob(STATES))
        for path in self.files:
            if path.name != _MODEL and not _OF_RANK.fullmatch(path.name):
                raise CheckpointError(
                    f"{path} is a part of a model split by tensors, layers or experts; only data parallelism is read; "
                    "convert it with DeepSpeed first"
                )

    def weights(self) -> dict[str, Stored]:
        """The model's tensors at any stage, tied ones once, buffers left out."""
        ranks = self._optimizers()
        if ranks and _MASTERS[1] in ranks[0]:
            return dict(self._partitioned(ranks))
        return {**self._whole(), **dict(self._grouped(ranks))}

    def _optimizers(self) -> list[dict[str, Any]]:
        """The state of each rank's optimizer; raises ``CheckpointError`` unless there are as many as each says there are."""
        matches = [_OF_RANK.fullmatch(path.name) for path in self.files]
        files = {int(match[1]): match.string for match in matches if match and match[2] == "optim"}
        states: list[dict[str, Any]] = []
        for rank in sorted(files):
            path = self._directory / files[rank]
            state = _of(self._load(files[rank]), "optimizer_state_dict", path)
            counts = _of(state, "partition_count", path)
            if set(counts if isinstance(counts, list) else [counts]) != {len(files)}:
                absent = next(other for other in range(len(files) + 1) if other not in files)
                raise CheckpointError(
                    f"{path} was written by {counts} ranks, and the files of {len(files)} are here; the checkpoint is "
                    f"incomplete without {path.name.replace(f'rank_{rank}_', f'rank_{absent}_', 1)}, or mixed with another"
                )
            states.append(state)
        return states

    def _whole(self) -> dict[str, StoredTensor]:
        """The tensors of a model that every rank holds whole, in the precision that it ran in."""
        if not (self._directory / _MODEL).exists() and any("_model_" in path.name for path in self.files):
            raise CheckpointError(
                f"{self._directory} is incomplete: ZeRO-3 keeps the weights in the ranks' *_optim_states.pt, which are not here"
            )
        state, path = self._load(_MODEL), self._directory / _MODEL
        skipped = {*_of(state, "buffer_names", path), *(state.get("shared_params") or ())}
        # By where it lies: the second name of a tied weight is stored as the same bytes.
        names: dict[StoredTensor, str] = {}
        for name, tensor in _of(state, "module", path).items():
            if isinstance(tensor, StoredTensor) and name not in skipped:
                names.setdefault(tensor, name)
        return {name: tensor for tensor, name in names.items()}

    def _grouped(self, ranks: Sequence[dict[str, Any]]) -> Iterator[tuple[str, _Flat]]:
        """ZeRO-1/2."""
        if not ranks:
            self._require_finished()
            return
        path = self._directory / _MODEL
        groups = _of(self._load(_MODEL), "param_shapes", path)
        paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
        partitions = [_of(state, _MASTERS[0], self._directory) for state in ranks]
        for number, (group, padding) in enumerate(zip(groups, paddings, strict=True)):
            vector, offset = _Vector(tuple(partition[number] for partition in partitions)), 0
            for (name, shape), gap in zip(group.items(), padding, strict=True):
                yield name, _Flat((vector,), offset, math.prod(shape), tuple(shape))
                offset += math.prod(shape) + gap
            # The vector is padded to twice the ranks; how much of that is saved differs.
            self._require_fit(offset, vector.size, 2 * len(ranks))

    def _partitioned(self, ranks: Sequence[dict[str, Any]]) -> Iterator[tuple[str, _Flat]]:
        """ZeRO-3."""
        state, path = self._load(f"zero_pp_rank_0_{_MODEL}"), self._directory / f"zero_pp_rank_0_{_MODEL}"
        vectors = tuple(_Vector(tuple(state[_MASTERS[1]])) for state in ranks)
        offset = 0
        for group in _of(state, "param_shapes", path):
            for name, shape in group.items():
                length = math.ceil(math.prod(shape) / len(ranks))
                yield name, _Flat(vectors, offset, length, tuple(shape))
                offset += length
        for vector in vectors:
            self._require_fit(offset, vector.size, 1)
        frozen = state.get("frozen_param_shapes") or {}
        states = [self._load(f"zero_pp_rank_{rank}_{_MODEL}") for rank in range(len(ranks))] if frozen else []
        for name, shape in frozen.items():
            fragments = tuple(_Vector((_of(state, "frozen_param_fragments", path)[name],)) for state in states)
            self._require_fit(math.prod(shape), sum(fragment.size for fragment in fragments), len(ranks))
            yield name, _Flat(fragments, 0, fragments[0].size, tuple(shape))

    def _load(self, name: str) -> Any:
        return scan_pickle(self._directory / name, self._trust_pickle, inert=_INERT)

    def _require_fit(self, needed: int, found: int, multiple: int) -> None:
        if not needed <= found <= math.ceil(needed / multiple) * multiple:
            raise CheckpointError(
                f"{self._directory} is damaged: its partitions hold {found} numbers for parameters of {needed}; "
                "leave this step out"
            )

    def _require_finished(self) -> None:
        # The model's file is written first, so before the others come it would pass for a save without an optimizer.
        if not (self._directory.parent / LATEST).exists():
            raise CheckpointError(
                f"{self._directory} is incomplete or still being written: it has no *_optim_states.pt, and no file "
                f"{LATEST} beside it says that it was finished"
            )


def zero_files(directory: Path, trust_pickle: bool = False) -> TensorSource:
    """Weights of one step's folder; raises ``CheckpointError`` for missing, damaged, untrusted or contradicting files."""
    step = _Step(directory, trust_pickle)
    weights = step.weights()
    if adapted := next((name for name in weights if ".lora_" in name), None):
        raise CheckpointError(
            f"{directory} holds {adapted} and no adapter_config.json, which would say what it means; "
            "save the adapter with PEFT too and give that directory"
        )
    return TensorSource(weights, sum(path.stat().st_size for path in step.files))


def open_checkpoint(directory: Path, trust_pickle: bool = False) -> FullCheckpoint:
    """The model of one step's folder."""
    return FullCheckpoint(directory, source=zero_files(directory, trust_pickle))


def find(directory: Path) -> Path | None:
    """Where DeepSpeed's files of a step directory lie: in itself, or in the folder that its ``latest`` names."""
    latest = directory / LATEST
    named = [directory / latest.read_text().strip()] if latest.is_file() else sorted(directory.glob("global_step*"))
    return next((folder for folder in (directory, *named) if next(folder.glob(STATES), None)), None)


def _of(state: Any, key: str, path: Path) -> Any:
    """An entry that DeepSpeed always writes."""
    if not isinstance(state, dict) or state.get(key) is None:
        raise CheckpointError(
            f"{path} has no {key}, so DeepSpeed did not write it or it is damaged; leave this step out"
        )
    return state[key]
