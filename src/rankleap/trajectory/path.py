"""A trajectory: the deltas of a run since its base, ordered by step, read one tensor at a time.

Two sources, one contract: checkpoints on disk (exact deltas) and a recorded trajectory (rank-k factors). Steps are
optimizer steps, never indices; uneven spacing is fine.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from rankleap.checkpoints import (
    Checkpoint,
    Delta,
    FullCheckpoint,
    LowRank,
    Run,
    require_same_shapes,
)
from rankleap.checkpoints.source import open_safetensors
from rankleap.errors import BaseMismatchError, TrajectoryError
from rankleap.files import read_json

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

    def deltas(self, name: str) -> list[Delta]:
        """Deltas of one tensor at every step, in order."""
        return [self.delta(name, step) for step in self.steps]


class CheckpointTrajectory(Trajectory):
    """Exact deltas, computed from checkpoints when they are asked for."""

    def __init__(self, base: FullCheckpoint, checkpoints: Mapping[int, Checkpoint]) -> None:
        """Raises ``BaseMismatchError`` when a checkpoint does not fit the base."""
        for checkpoint in checkpoints.values():
            require_same_shapes(checkpoint.shapes, base, checkpoint.directory)
        first = next(iter(checkpoints.values()))
        super().__init__(list(checkpoints), first.shapes)
        self.base = base
        self.checkpoints = dict(checkpoints)

    def delta(self, name: str, step: int) -> Delta:
        """Delta of one tensor since the base at one step, float32; products from LoRA stay products."""
        return self.checkpoints[step].delta(name, self.base)

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
        """The recorded delta: a product of rank k for a matrix, a dense vector for a vector, zero if it had not moved."""
        parts = read_factors(self.directory, step, name)
        shape = self.shapes[name]
        if "vector" in parts:
            return parts["vector"]
        if "left" in parts:
            return LowRank(parts["left"] * parts["sigma"], parts["right"])
        # A product of rank 0, so that its sum with other products stays a product.
        return torch.zeros(shape) if len(shape) != 2 else LowRank(torch.zeros(shape[0], 0), torch.zeros(0, shape[1]))

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


def _require_some(steps: Sequence[int], last: int) -> None:
    if not any(step <= last for step in steps):
        raise TrajectoryError(f"no checkpoint up to step {last}; there are {list(steps)}")


def step_file(directory: Path, step: int) -> Path:
    """Where the factors of one step are kept."""
    return directory / f"step-{step:06d}.safetensors"


def read_factors(directory: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    """Stored parts of one tensor at one step: ``left, sigma, right, residual, norm``, or ``vector``; empty if zero."""
    with open_safetensors(step_file(directory, step)) as file:
        keys = [key for key in file.keys() if key.rpartition("|")[0] == name]  # noqa: SIM118
        return {key.rpartition("|")[2]: file.get_tensor(key) for key in keys}


def run_trajectory(run: Run, base: FullCheckpoint) -> CheckpointTrajectory:
    """The exact trajectory of a run on disk; raises ``TrajectoryError`` if its adapters cover different modules."""
    first, *others = (set(checkpoint.shapes) for checkpoint in run.checkpoints.values())
    if any(names != first for names in others):
        raise TrajectoryError(
            f"{run.directory}: its checkpoints do not hold the same tensors; keep one run in one directory"
        )
    return CheckpointTrajectory(base, run.checkpoints)
