"""Follows a run that another trainer is writing: factors of each new complete checkpoint, and only then lets it go.

A checkpoint is released in two moves, a rename and a removal, after its factors are on disk and can be read; the trainer
never sees half of one, and a crash in between leaves the checkpoint, or the factors, or both.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rankleap.checkpoints import Run, open_run
from rankleap.errors import CheckpointError
from rankleap.trajectory.record import Recording, record_step, recording_of, require_recorded

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
