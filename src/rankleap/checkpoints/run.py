"""Opens a directory of checkpoints: finds the steps, tells the layout of each, skips what is incomplete and says why.

A run is a directory that holds step directories (``checkpoint-20``, ``global_step_20``, ``step_20``, ``iter_0000020``,
``epoch_1``, ``0020``), itself or in a folder that trainers put them in; or it is one checkpoint itself. TRL's ``ref/``
sub-adapter, ``tmp_`` directories and half-written files are no checkpoints.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rankleap.checkpoints.adapter import AdapterCheckpoint
from rankleap.checkpoints.base import resolve_base
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.checkpoints.layouts import Checkpoint, Layout, layout_of
from rankleap.errors import CheckpointError, InputError
from rankleap.files import read_json

_STEP = re.compile(r"(?:(?:checkpoint-|global_step_?|step[-_]?|iter_|epoch_)(\d+)(?:_hf)?|(\d+))")
_UNFINISHED = re.compile(r"(?:tmp[-_.]|\.).*\d|.*\d\.(?:tmp|incomplete)")
PARENTS = ("checkpoints", "broadcasts", "_actor", ".")
"""Where trainers put their step directories: TRL's runs of ours and prime-rl, prime-rl, OpenRLHF, everyone else."""
_LATEST = ("latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt", "latest")
STABLE = "STABLE"
"""prime-rl's empty file in a directory that is complete."""
STATE = "trainer_state.json"


@dataclass(frozen=True, slots=True)
class Run:
    """The complete checkpoints of one run in the order of their steps, and what was skipped and why."""

    directory: Path
    layout: Layout
    checkpoints: dict[int, Checkpoint]
    skipped: dict[str, str]

    @property
    def steps(self) -> list[int]:
        """Steps, increasing."""
        return list(self.checkpoints)

    def base_name(self) -> str | None:
        """The base that the run itself names, if it does."""
        config = self.directory / "config.json"
        model = read_json(config).get("model") if config.exists() else None
        if isinstance(model, dict) and "base" in model:  # else it is a model's own config, left there by a trainer
            return model["base"]
        last = self.checkpoints[self.steps[-1]]
        return last.base if isinstance(last, AdapterCheckpoint) else None


def open_checkpoint(directory: Path, trust_pickle: bool = False) -> Checkpoint:
    """Open one checkpoint directory; raises ``CheckpointError`` when it is missing, incomplete or unknown."""
    layout, place = layout_of(directory)
    return layout.open(place, trust_pickle)


def open_run(directory: Path, trust_pickle: bool = False) -> Run:
    """Open every complete checkpoint of a run; raises ``CheckpointError`` when there is none.

    ``trust_pickle`` lets pickled checkpoints name any global, so that opening them may run any code.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give a run directory that holds checkpoint-N folders")
    parent, named, skipped = _step_directories(directory)
    found: dict[int, Checkpoint] = {}
    layouts: dict[str, Layout] = {}
    # By number, then by name: of two directories of one step always the same one wins.
    for path, number in sorted(named, key=lambda item: (item[1], item[0].name)):
        try:
            step = _checked_step(path, number, found)
            layout, place = layout_of(path)
            # Opening reads headers only, yet a truncated file shows here and not halfway through the work.
            found[step] = layout.open(place, trust_pickle)
            layouts[layout.name] = layout
        # Skipped and told, so that a run can be read while its newest step is being written.
        except InputError as error:
            skipped[path.name] = str(error)
    if not found:
        reasons = "".join(f"\n  {name}: {why}" for name, why in skipped.items())
        raise CheckpointError(f"no complete checkpoint in {parent}; needed folders such as checkpoint-20{reasons}")
    if len(layouts) > 1:
        raise CheckpointError(f"{parent} mixes {' and '.join(layouts)} checkpoints; keep one kind in one directory")
    return Run(directory, next(iter(layouts.values())), found, skipped)


def step_of(path: Path) -> int | None:
    """The step of a directory by its name, else by its ``trainer_state.json``."""
    if match := _STEP.fullmatch(path.name):
        return int(match.group(1) or match.group(2))
    return _saved_step(path)


def _saved_step(path: Path) -> int | None:
    return read_json(path / STATE).get("global_step") if (path / STATE).exists() else None


def _checked_step(path: Path, step: int, found: dict[int, Checkpoint]) -> int:
    """The step, or a ``CheckpointError`` that says why this directory is not read."""
    if (saved := _saved_step(path)) not in (None, step):
        raise CheckpointError(f"its name says step {step}, its {STATE} says {saved}; rename it or leave it out")
    if step in found:
        raise CheckpointError(f"step {step} is here twice, {found[step].directory.name} was taken")
    if (
        any(sibling.is_dir() and (sibling / STABLE).exists() for sibling in path.parent.iterdir())
        and not (path / STABLE).exists()
    ):
        raise CheckpointError(f"still being written: others beside it have the marker {STABLE}, it has not")
    latest = _latest(path.parent)
    if latest is not None and step > latest:
        raise CheckpointError(f"still being written: the run's own mark says that {latest} is its newest complete step")
    return step


def _latest(parent: Path) -> int | None:
    """The newest complete step by the file in which verl, SkyRL, Megatron or DeepSpeed keeps it."""
    for name in _LATEST:
        if (parent / name).is_file() and (digits := re.search(r"\d+", (parent / name).read_text())):
            return int(digits.group())
    return None


def _step_directories(directory: Path) -> tuple[Path, list[tuple[Path, int]], dict[str, str]]:
    """The folder that holds the steps, each with its step, and what beside them is skipped already."""
    skipped: dict[str, str] = {}
    chosen: tuple[Path, list[tuple[Path, int]]] = (directory, [])
    for parent in (directory / name for name in PARENTS):
        folders = sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
        named = [(path, step) for path in folders if (step := step_of(path)) is not None]
        if named and chosen[1]:
            skipped[parent.name] = f"{len(named)} more step directories; give {parent} to read these instead"
        elif named:
            chosen = (parent, named)
            unfinished = (path for path in folders if _UNFINISHED.fullmatch(path.name) and step_of(path) is None)
            skipped |= {path.name: "still being written, by its name" for path in unfinished}
    if not chosen[1]:
        try:
            layout_of(directory)
        except CheckpointError:
            return *chosen, skipped
        # One checkpoint, given itself; a last save often has no step in its name.
        return directory.parent, [(directory, step_of(directory) or 0)], skipped
    return *chosen, skipped


def base_of(run: Run, name: str | None) -> tuple[str, FullCheckpoint]:
    """The base of a run: the one given, else the one that the run names; raises ``CheckpointError`` when there is neither."""
    chosen = name or run.base_name()
    if chosen is None:
        raise CheckpointError(
            f"{run.directory} does not name its base; give it with --base (a directory, a Hub name or bundled:NAME)"
        )
    return chosen, FullCheckpoint(resolve_base(chosen))


def effective_weights(checkpoint: Checkpoint, base: FullCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model that a checkpoint stands for, in float32; an adapter is added to the base."""
    for name in base.shapes:
        if name not in checkpoint.shapes:
            yield name, base.weight(name)
        elif isinstance(checkpoint, AdapterCheckpoint):
            yield name, checkpoint.weight(name, base)
        else:
            yield name, checkpoint.weight(name)
