"""A trajectory: the deltas of a run since its base, ordered by step, read one tensor at a time.

Two sources, one contract: checkpoints on disk (exact deltas) and a recorded trajectory (rank-k factors). Steps are
optimizer steps, never indices; uneven spacing is fine.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from rankleap.checkpoints import (
    Checkpoint,
    Delta,
    DeltaRows,
    FullCheckpoint,
    LowRank,
    Run,
    require_same_shapes,
)
from rankleap.checkpoints.delta import BLOCK_BYTES, CHUNK_BYTES, not_finite
from rankleap.checkpoints.source import open_safetensors
from rankleap.errors import BaseMismatchError, TrajectoryError
from rankleap.files import read_json
from rankleap.lowrank import gram, gram_of_increments

INDEX = "index.json"
FORMAT = 1


class Trajectory(ABC):
    """Deltas of one run by tensor name and step."""

    def __init__(self, steps: Sequence[int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """``steps`` must increase strictly; raises ``TrajectoryError``."""
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise TrajectoryError(f"steps must increase, got {list(steps)}; remove the repeated or misplaced ones")
        self.steps = tuple(steps)
        self.shapes = dict(shapes)

    @abstractmethod
    def delta(self, name: str, step: int) -> Delta:
        """Delta of one tensor since the base at one recorded step, float32."""

    @abstractmethod
    def until(self, step: int) -> "Trajectory":
        """The same trajectory without the steps after ``step``."""

    def lazy_delta(self, name: str, step: int) -> Delta | DeltaRows:
        """The same for one that need not be in memory as a whole."""
        return self.delta(name, step)

    def deltas(self, name: str) -> list[Delta]:
        """Deltas of one tensor at every step, in order; for whole models ``gram`` needs far less memory."""
        return [self.delta(name, step) for step in self.steps]

    def gram(self, name: str, first: int = 0) -> Tensor:
        """G of one tensor's deltas from the ``first``-th step on, T × T, float64."""
        return gram([self.delta(name, step) for step in self.steps[first:]])


class CheckpointTrajectory(Trajectory):
    """Exact deltas, computed from checkpoints when they are asked for."""

    def __init__(self, base: FullCheckpoint, checkpoints: Mapping[int, Checkpoint]) -> None:
        """Raises ``BaseMismatchError`` when one does not fit the base, ``TrajectoryError`` when they cover different modules."""
        shapes, *others = (checkpoint.shapes_on(base) for checkpoint in checkpoints.values())
        later = zip(list(checkpoints.values())[1:], others, strict=True)
        if different := next((checkpoint for checkpoint, found in later if found != shapes), None):
            places = f"{next(iter(checkpoints.values())).directory} and {different.directory}"
            raise TrajectoryError(f"{places} do not hold the same tensors; keep one run in one directory")
        super().__init__(list(checkpoints), shapes)
        self.base = base
        self.checkpoints = dict(checkpoints)

    def delta(self, name: str, step: int) -> Delta:
        """Delta of one tensor since the base at one step, float32; products from LoRA stay products."""
        return self.checkpoints[step].delta(name, self.base)

    def lazy_delta(self, name: str, step: int) -> Delta | DeltaRows:
        """A product from LoRA and its kin, else row blocks of a matrix, else a vector."""
        return lazy_delta(self.checkpoints[step], name, self.base)

    def gram(self, name: str, first: int = 0) -> Tensor:
        """G of one tensor's deltas in one pass over the files, a few rows of every step at a time."""
        full = [c for c in self.checkpoints.values() if isinstance(c, FullCheckpoint)][first:]
        if not full or not self.shapes[name]:
            return super().gram(name, first)
        # The increments are differences of neighbours, so that the base is read but once.
        # However many steps there are, their blocks together fit the cache, and their chunks a modest memory.
        sizes = 8 * BLOCK_BYTES // (len(full) + 1), 16 * CHUNK_BYTES // (len(full) + 1)
        sides = [side.blocks(name, *sizes) for side in (self.base, *full)]
        blocks = (torch.stack([block.flatten() for block in rows]).diff(dim=0) for rows in zip(*sides, strict=True))
        gram_TT = gram_of_increments(blocks)
        if not bool(torch.isfinite(gram_TT).all()):
            raise not_finite(name, "one of " + ", ".join(str(checkpoint.directory) for checkpoint in full))
        return gram_TT

    def until(self, step: int) -> "CheckpointTrajectory":
        """The same trajectory without the steps after ``step``; raises ``TrajectoryError`` if none is left."""
        _require_some(self.steps, step)
        return CheckpointTrajectory(self.base, {s: c for s, c in self.checkpoints.items() if s <= step})


class RecordedTrajectory(Trajectory):
    """The rank-k factors that the recorder or ``rankleap trajectory`` wrote."""

    def __init__(self, directory: Path, last_step: int | None = None) -> None:
        """Read the index; raises ``TrajectoryError`` when there is none or it is of another format."""
        if not (directory / INDEX).exists():
            raise TrajectoryError(f"{directory} holds no {INDEX}; make one with: rankleap trajectory RUN --base BASE")
        self.index = read_json(directory / INDEX)
        if self.index.get("format") != FORMAT:
            raise TrajectoryError(
                f"{directory / INDEX} has format {self.index.get('format')}, this version reads {FORMAT}"
            )
        steps = [step for step in self.index["steps"] if last_step is None or step <= last_step]
        super().__init__(steps, {name: tuple(shape) for name, shape in self.index["shapes"].items()})
        self.directory = directory

    def delta(self, name: str, step: int) -> Delta:
        """The recorded delta: a product of rank k for a matrix or each expert's, a dense vector, zero if it had not moved."""
        parts = read_factors(step_file(self.directory, step), name)
        shape = self.shapes[name]
        if "vector" in parts:
            return parts["vector"]
        if "left" in parts:
            return LowRank(parts["left"] * parts["sigma"][..., None, :], parts["right"])
        if len(shape) not in (2, 3):
            return torch.zeros(shape)
        # A product of rank 0, so that its sum with other products stays a product.
        return LowRank(torch.zeros(*shape[:-1], 0), torch.zeros(*shape[:-2], 0, shape[-1]))

    def until(self, step: int) -> "RecordedTrajectory":
        """The same trajectory without the steps after ``step``; raises ``TrajectoryError`` if none is left."""
        _require_some(self.steps, step)
        return RecordedTrajectory(self.directory, step)

    def require_base(self, base: FullCheckpoint) -> None:
        """Raise ``BaseMismatchError`` unless the trajectory was recorded since this very base."""
        require_same_shapes(self.shapes, base, self.directory)
        if base.fingerprint() != self.index["fingerprint"]:
            raise BaseMismatchError(
                f"{self.directory} was recorded since {self.index['base']}, whose weights are not those of {base.directory}; "
                "name the right base with --base"
            )


def lazy_delta(checkpoint: Checkpoint, name: str, base: FullCheckpoint) -> Delta | DeltaRows:
    """A delta of one checkpoint that is not read as a whole: a product, row blocks, or a vector."""
    if len(base.shapes[name]) < 2:
        return checkpoint.delta(name, base)
    return checkpoint.lazy_delta(name, base)


def _require_some(steps: Sequence[int], last: int) -> None:
    if not any(step <= last for step in steps):
        raise TrajectoryError(f"no checkpoint up to step {last}; there are {list(steps)}")


def step_file(directory: Path, step: int) -> Path:
    """Where the factors of one step are kept."""
    return directory / f"step-{step:06d}.safetensors"


def read_factors(file: Path, name: str) -> dict[str, torch.Tensor]:
    """Parts of one tensor in a step's file: ``left, sigma, right, residual, angle, norms``, or ``vector``; none if zero."""
    with open_safetensors(file) as opened:
        keys = [key for key in opened.keys() if key.rpartition("|")[0] == name]  # noqa: SIM118
        return {key.rpartition("|")[2]: opened.get_tensor(key) for key in keys}


def run_trajectory(run: Run, base: FullCheckpoint) -> CheckpointTrajectory:
    """The exact trajectory of a run on disk; raises ``TrajectoryError`` if its adapters cover different modules."""
    return CheckpointTrajectory(base, run.checkpoints)
