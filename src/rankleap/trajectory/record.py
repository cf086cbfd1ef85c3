"""Writes a trajectory: one small safetensors file of rank-k factors per step, and an index that lists what is complete.

Matrices are kept as triplets with their residuals, angles and norms, fused experts each on its own, vectors as they are;
exactly zero tensors are left out. Each matrix starts from the directions of the step before, which saves most of the work.
The step's file is written before the index names it, so a kill in between loses nothing and shows nothing half-written.

A run that another trainer is writing can be followed: a checkpoint is released in two moves, a rename and a removal, after its
factors are on disk and can be read. The trainer never sees half of one, and a crash leaves the checkpoint, the factors or both.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rankleap.checkpoints import (
    Checkpoint,
    Delta,
    DeltaRows,
    FullCheckpoint,
    LowRank,
    Run,
    base_of,
    dense,
    is_zero,
    open_run,
)
from rankleap.checkpoints.source import open_safetensors
from rankleap.cluster import map_over
from rankleap.errors import CheckpointError, DiskSpaceError, TrajectoryError
from rankleap.files import read_json, require_space, write_aside, write_json
from rankleap.lowrank import Factors, Workspace, factorise, factorise_experts
from rankleap.lowrank.factors import SEPARATED
from rankleap.trajectory.path import (
    FORMAT,
    INDEX,
    CheckpointTrajectory,
    lazy_delta,
    read_factors,
    run_trajectory,
    step_file,
)

PIECE_NUMBERS = 1 << 28
"""Entries that a worker factors at a time, about: a gigabyte of float32, seconds of work."""


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

    def add(self, step: int, deltas: Iterable[tuple[str, Delta | DeltaRows]]) -> None:
        """Factor the deltas of one step and write them; a step that is there already is replaced."""
        self.steps()  # before any work: it refuses a directory of another base
        workspace, before = Workspace(), self.before(step)
        parts: dict[str, Tensor] = {}
        for name, delta in deltas:
            parts |= parts_of(name, delta, self.rank, before, workspace)
        self.write(step, parts)

    def write(self, step: int, parts: dict[str, Tensor]) -> None:
        """Write the factors of one step, made by ``parts_of``."""
        steps = self.steps()
        require_space(self.directory, self.size_bytes())
        with write_aside(step_file(self.directory, step)) as aside:
            try:
                save_file(parts, aside, metadata={"step": str(step)})
            # The disk may fill up after it was asked for its space.
            except (OSError, SafetensorError) as error:
                raise DiskSpaceError(
                    f"cannot write {step_file(self.directory, step)}: {error}; nothing was lost"
                ) from None
        self._write_index(sorted({*steps, step}))

    def before(self, step: int) -> Path | None:
        """The file of the newest step recorded before ``step``."""
        earlier = [s for s in self.steps() if s < step]
        return step_file(self.directory, earlier[-1]) if earlier else None

    def keep_until(self, step: int) -> None:
        """Forget steps after ``step``: a run that resumes there will write them again."""
        steps = self.steps()
        if any(s > step for s in steps):
            # The files stay: the index alone says what is recorded, and each is replaced when its step returns.
            self._write_index([s for s in steps if s <= step])

    def size_bytes(self) -> int:
        """Bytes that one step takes at most."""
        numbers = sum(
            # Sides, σ, residual and angle of each triplet, and two norms, for each expert.
            torch.Size(shape[:-2]).numel() * (self.rank * (shape[-2] + shape[-1] + 3) + 2)
            if len(shape) in (2, 3)
            else torch.Size(shape).numel()
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


def require_recorded(recording: Recording, step: int) -> None:
    """Raise ``TrajectoryError`` unless the index lists a step and its file can be read."""
    if step not in recording.steps():
        raise TrajectoryError(f"{recording.directory} does not list step {step}; record it first")
    open_safetensors(step_file(recording.directory, step))


def unseparated(recording: Recording, step: int) -> list[str]:
    """Tensors whose first direction is not its own at a step: near-equal singular values share one (``Factors.angle_R``)."""
    with open_safetensors(step_file(recording.directory, step)) as opened:
        keys = [key for key in opened.keys() if key.endswith("|angle")]  # noqa: SIM118
        return [key.rpartition("|")[0] for key in keys if not bool((opened.get_tensor(key)[..., 0] <= SEPARATED).all())]


def recording_of(run: Run, base_name: str | None, directory: Path, rank: int) -> tuple[Recording, CheckpointTrajectory]:
    """Where the factors of a run on disk go, and the exact deltas that they are made from."""
    name, base = base_of(run, base_name)
    trajectory = run_trajectory(run, base)
    return open_recording(directory, name, base, rank, trajectory.shapes), trajectory


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tensors of one step, for one worker."""

    checkpoint: Checkpoint
    base: FullCheckpoint
    names: Sequence[str]
    rank: int
    before: Path | None
    device: str


def factor_piece(piece: Piece) -> dict[str, Tensor]:
    """Factors of a piece, ready to be written."""
    workspace = Workspace(device=piece.device)
    parts: dict[str, Tensor] = {}
    for name in piece.names:
        delta = lazy_delta(piece.checkpoint, name, piece.base)
        parts |= parts_of(name, delta, piece.rank, piece.before, workspace, where=str(piece.checkpoint.directory))
    return parts


def record_step(
    recording: Recording,
    trajectory: CheckpointTrajectory,
    step: int,
    workers: int = 1,
    address: str | None = None,
    device: str = "cpu",
    on_poll: Callable[[], None] | None = None,
) -> None:
    """Factor one step of a run on disk, in ``workers`` processes or on Ray at ``address``, and write it."""
    before = recording.before(step)
    pieces = [
        Piece(trajectory.checkpoints[step], trajectory.base, names, recording.rank, before, device)
        for names in _shared_out(recording.shapes, workers)
    ]
    parts: dict[str, Tensor] = {}
    map_over(factor_piece, pieces, workers, on_poll, address=address, on_result=lambda _, part: parts.update(part))
    recording.write(step, parts)


def _shared_out(shapes: Mapping[str, tuple[int, ...]], workers: int) -> list[list[str]]:
    """Names in groups of about equal work, the largest tensors first so that none is left for the end."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    limit = min(PIECE_NUMBERS, sum(sizes.values()) // (4 * workers) + 1)
    groups: list[list[str]] = [[]]
    held = 0
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if groups[-1] and held + sizes[name] > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += sizes[name]
    return groups


def parts_of(
    name: str,
    delta: Delta | DeltaRows,
    rank: int,
    before: Path | None = None,
    workspace: Workspace | None = None,
    *,
    where: str = "the live model",
) -> dict[str, Tensor]:
    """What is kept of one tensor's delta, by the keys of the step's file; nothing of an exactly zero one."""
    label = f"{name} of {where}"
    if len(delta.shape) not in (2, 3):
        vector = torch.cat(list(delta.read(None, None))) if isinstance(delta, DeltaRows) else delta
        return {} if is_zero(vector) else {f"{name}|vector": dense(vector).contiguous()}
    right = None if before is None else read_factors(before, name).get("right")
    # Their sum holds all of them: Lanczos finds each again from it.
    start = None if right is None else right.sum(dim=-2)
    if len(delta.shape) == 2:
        factors = factorise(delta, rank, start_N=start, workspace=workspace, name=label)
        return _named(name, factors) if len(factors.sigma_R) else {}
    assert not isinstance(delta, LowRank), "no adapter gives products of fused experts"
    return _stacked(name, factorise_experts(delta, rank, start, workspace, label))


def _named(name: str, factors: Factors) -> dict[str, Tensor]:
    # A tensor knows no null, so an unknown Σσ is NaN.
    norms = [factors.norm, float("nan") if factors.nuclear is None else factors.nuclear]
    return {
        f"{name}|left": factors.left_MR,
        f"{name}|sigma": factors.sigma_R,
        f"{name}|right": factors.right_RN,
        f"{name}|residual": factors.residual_R,
        f"{name}|angle": factors.angle_R,
        f"{name}|norms": torch.tensor(norms),
    }


def _stacked(name: str, experts: Sequence[Factors]) -> dict[str, Tensor]:
    """Factors of all experts, padded with zeros to the rank of the richest."""
    rank = max(len(factors.sigma_R) for factors in experts)
    if not rank:
        return {}
    pad = torch.nn.functional.pad
    padded = []
    for factors in experts:
        spare = rank - len(factors.sigma_R)
        sides = (
            pad(factors.left_MR, (0, spare)),
            pad(factors.sigma_R, (0, spare)),
            pad(factors.right_RN, (0, 0, 0, spare)),
        )
        bounds = pad(factors.residual_R, (0, spare)), pad(factors.angle_R, (0, spare))
        padded.append(_named(name, Factors(*sides, *bounds, factors.norm, factors.nuclear)))
    return {key: torch.stack([parts[key] for parts in padded]) for key in padded[0]}


RELEASED = ".released"


@dataclass(frozen=True, slots=True)
class Watch:
    """What is followed and how: see ``rankleap watch --help``."""

    directory: Path
    out: Path
    base: str | None
    rank: int
    settle_s: float
    keep: int | None
    """How many of the newest checkpoints stay; ``None``: all of them."""
    trust_pickle: bool = False
    workers: int = 1
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Sweep:
    """What one look at the run did."""

    recorded: list[int]
    released: list[int]
    waiting: dict[str, str]
    steps: list[int]
    """Every step that is recorded by now."""


def sweep(watch: Watch) -> Sweep:
    """Record what is new and complete, release what may go; a run that has nothing complete yet is waited for."""
    _remove_released(watch.directory)
    try:
        run = open_run(watch.directory, watch.trust_pickle)
    except CheckpointError as error:
        return Sweep([], [], {str(watch.directory): str(error)}, [])
    recording, path = recording_of(run, watch.base, watch.out, watch.rank)
    waiting = dict(run.skipped)
    recorded: list[int] = []
    for step in sorted(set(path.steps) - set(recording.steps())):
        if (age_s := _age_s(run.directories[step])) < watch.settle_s:
            waiting[run.directories[step].name] = f"changed {age_s:.0f} s ago, needed {watch.settle_s:.0f} s of rest"
            continue
        record_step(recording, path, step, watch.workers, device=watch.device)
        recorded.append(step)
    return Sweep(recorded, _release(run, recording, watch), waiting, recording.steps())


def _age_s(directory: Path) -> float:
    """Seconds since anything in a directory changed."""
    return time.time() - max(path.stat().st_mtime for path in (directory, *directory.rglob("*")))


def _release(run: Run, recording: Recording, watch: Watch) -> list[int]:
    """Remove the checkpoints whose factors are recorded, but for the newest ones: a trainer resumes from them."""
    if watch.keep is None:
        return []
    recorded = set(recording.steps())
    older = [step for step in run.steps[: len(run.steps) - watch.keep] if step in recorded]
    released: list[int] = []
    for step in older:
        directory = run.directories[step]
        if _age_s(directory) < watch.settle_s:
            continue
        require_recorded(recording, step)
        aside = directory.with_name(f".{directory.name}{RELEASED}")
        directory.rename(aside)
        shutil.rmtree(aside)
        released.append(step)
    return released


def _remove_released(directory: Path) -> None:
    """Finish what a crash in the middle of a removal left."""
    for aside in directory.glob(f"**/.*{RELEASED}"):
        shutil.rmtree(aside)
