"""Writes a trajectory: one small safetensors file of rank-k factors per step, and an index that lists what is complete.

Matrices are kept as triplets with their residuals and norms, vectors as they are; exactly zero tensors are left out.
The step's file is written before the index names it, so a kill in between loses nothing and shows nothing half-written.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from rankleap.checkpoints import Delta, FullCheckpoint, Run, base_of, dense, is_zero
from rankleap.errors import TrajectoryError
from rankleap.files import read_json, require_space, write_aside, write_json
from rankleap.lowrank import Factors, factorise
from rankleap.trajectory.path import FORMAT, INDEX, CheckpointTrajectory, run_trajectory, step_file


@dataclass(frozen=True, slots=True)
class Recording:
    """Where a trajectory is written, since which base, and how many triplets of each matrix."""

    directory: Path
    base: str
    fingerprint: str
    rank: int
    shapes: Mapping[str, tuple[int, ...]]

    def steps(self) -> list[int]:
        """Steps already recorded; raises ``TrajectoryError`` if they were recorded with another base, rank or tensors."""
        if not (self.directory / INDEX).exists():
            return []
        index = read_json(self.directory / INDEX)
        for key, mine in (("fingerprint", self.fingerprint), ("rank", self.rank)):
            if index[key] != mine:
                raise TrajectoryError(
                    f"{self.directory} was recorded with {key} {index[key]}, now it is {mine}; "
                    "delete it or write to another directory"
                )
        if {name: tuple(shape) for name, shape in index["shapes"].items()} != dict(self.shapes):
            raise TrajectoryError(
                f"{self.directory} was recorded with other tensors ({len(index['shapes'])}, now {len(self.shapes)}); "
                "delete it or write to another directory"
            )
        return index["steps"]

    def add(self, step: int, deltas: Iterable[tuple[str, Delta]]) -> None:
        """Factor the deltas of one step and write them; a step that is there already is replaced."""
        steps = self.steps()  # before anything is written: it refuses a directory of another base
        require_space(self.directory, self.size_bytes())
        parts: dict[str, torch.Tensor] = {}
        for name, delta in deltas:
            parts |= _parts(name, delta, self.rank)
        with write_aside(step_file(self.directory, step)) as aside:
            save_file(parts, aside, metadata={"step": str(step)})
        self._write_index(sorted({*steps, step}))

    def keep_until(self, step: int) -> None:
        """Forget steps after ``step``: a run that resumes there will write them again."""
        steps = self.steps()
        if any(s > step for s in steps):
            # The files stay: the index alone says what is recorded, and each is replaced when its step returns.
            self._write_index([s for s in steps if s <= step])

    def size_bytes(self) -> int:
        """Bytes that one step takes at most."""
        numbers = sum(
            self.rank * (shape[0] + shape[1] + 2) + 2 if len(shape) == 2 else torch.Size(shape).numel()
            for shape in self.shapes.values()
        )
        return 4 * numbers

    def _write_index(self, steps: list[int]) -> None:
        index = {
            "format": FORMAT,
            "base": self.base,
            "fingerprint": self.fingerprint,
            "rank": self.rank,
            "steps": steps,
        }
        write_json(self.directory / INDEX, {**index, "shapes": self.shapes})


def open_recording(directory: Path, base_name: str, base: FullCheckpoint, rank: int, names: Iterable[str]) -> Recording:
    """A recording of the named tensors since ``base``."""
    return Recording(directory, base_name, base.fingerprint(), rank, {name: base.shapes[name] for name in names})


def recording_of(run: Run, base_name: str | None, directory: Path, rank: int) -> tuple[Recording, CheckpointTrajectory]:
    """Where the factors of a run on disk go, and the exact deltas that they are made from."""
    name, base = base_of(run, base_name)
    trajectory = run_trajectory(run, base)
    return open_recording(directory, name, base, rank, trajectory.shapes), trajectory


def _parts(name: str, delta: Delta, rank: int) -> dict[str, torch.Tensor]:
    if is_zero(delta):
        return {}
    if len(delta.shape) != 2:
        return {f"{name}|vector": dense(delta).contiguous()}
    factors: Factors = factorise(delta, rank)
    # A tensor knows no null, so an unknown Σσ is NaN.
    norms = [factors.norm, float("nan") if factors.nuclear is None else factors.nuclear]
    return {
        f"{name}|left": factors.left_MR,
        f"{name}|sigma": factors.sigma_R,
        f"{name}|right": factors.right_RN,
        f"{name}|residual": factors.residual_R,
        f"{name}|norms": torch.tensor(norms),
    }
