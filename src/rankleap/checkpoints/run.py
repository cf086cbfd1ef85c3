"""Opens a directory of checkpoints: finds the steps, recognises each layout by what is there, skips what is incomplete.

A run is any directory that holds step directories (``checkpoint-20``, ``global_step_20``, ``step_20``), itself or in
``checkpoints/``. TRL's ``ref/`` sub-adapter, ``tmp_`` directories and half-written files are no checkpoints.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rankleap.checkpoints import adapter, full
from rankleap.checkpoints.adapter import AdapterCheckpoint
from rankleap.checkpoints.base import resolve_base
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.errors import CheckpointError, InputError
from rankleap.files import read_json

Checkpoint = FullCheckpoint | AdapterCheckpoint

_STEP = re.compile(r"(?:checkpoint-|global_step_?|step[-_])(\d+)")


@dataclass(frozen=True, slots=True)
class Layout:
    """One way of laying a checkpoint out on disk: how to recognise it and how to open it."""

    name: str
    recognise: Callable[[Path], bool]
    open: Callable[[Path], Checkpoint]


LAYOUTS: dict[str, Layout] = {
    # First: a directory with an adapter's config is an adapter, whatever else was saved into it.
    "peft": Layout("PEFT adapter", lambda path: (path / adapter.CONFIG).exists(), AdapterCheckpoint),
    "hf": Layout(
        "Hugging Face full",
        lambda path: (path / full.WEIGHTS).exists() or (path / full.INDEX).exists(),
        FullCheckpoint,
    ),
}


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


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open one checkpoint directory; raises ``CheckpointError`` when it is missing, incomplete or unknown."""
    return _layout_of(directory).open(directory)


def open_run(directory: Path) -> Run:
    """Open every complete checkpoint below ``directory``; raises ``CheckpointError`` when there is none."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give a run directory that holds checkpoint-N folders")
    parent = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    found: dict[int, Checkpoint] = {}
    layouts: dict[str, Layout] = {}
    skipped: dict[str, str] = {}
    # By number, then by name: of two directories of one step always the same one wins.
    for path, step in sorted(_step_directories(parent), key=lambda item: (item[1], item[0].name)):
        try:
            if step in found:
                raise CheckpointError(f"step {step} is here twice, {found[step].directory.name} was taken")
            layout = _layout_of(path)
            # Opening reads headers only, yet a truncated file shows here and not halfway through the work.
            found[step] = layout.open(path)
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


def _layout_of(directory: Path) -> Layout:
    for layout in LAYOUTS.values():
        if layout.recognise(directory):
            return layout
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory} does not exist")
    found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
    needed = f"{full.WEIGHTS}, {full.INDEX} or {adapter.CONFIG}"
    raise CheckpointError(f"{directory} is no checkpoint that rankleap knows: needed {needed}, found {found}")


def _step_directories(parent: Path) -> list[tuple[Path, int]]:
    matches = ((path, _STEP.fullmatch(path.name)) for path in parent.iterdir() if path.is_dir())
    return [(path, int(match.group(1))) for path, match in matches if match]


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
