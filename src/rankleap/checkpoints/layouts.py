"""Every layout that a checkpoint may have on disk: where its weights lie in a step directory, and how they are opened.

A layout is recognised by what is there, never by a model's or a trainer's name. The order decides where a directory
holds several: an adapter's config first, then the most exact copy of the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rankleap.checkpoints import adapter, full
from rankleap.checkpoints.adapter import AdapterCheckpoint
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.errors import CheckpointError

Checkpoint = FullCheckpoint | AdapterCheckpoint


@dataclass(frozen=True, slots=True)
class Layout:
    """One way of laying a checkpoint out on disk."""

    name: str
    find: Callable[[Path], Path | None]
    """The folder of a step directory that holds the weights; ``None`` when it is of another layout."""
    open: Callable[[Path, bool], Checkpoint]
    """Open that folder; the flag says whether pickles may name any global (``--trust-pickle``)."""
    needs: str
    """What it is recognised by, for a message."""


def having(pattern: str, *folders: str) -> Callable[[Path], Path | None]:
    """The first of ``folders`` (default: the directory itself) that holds a file of this pattern."""

    def find(directory: Path) -> Path | None:
        places = (directory / folder for folder in folders or (".",))
        return next((place for place in places if next(place.glob(pattern), None)), None)

    return find


LAYOUTS: dict[str, Layout] = {
    # First: a directory with an adapter's config is an adapter, whatever else was saved into it.
    "peft": Layout(
        "PEFT adapter",
        having(adapter.CONFIG, ".", "actor/lora_adapter", "lora_adapter"),
        lambda path, trust: AdapterCheckpoint(path),
        adapter.CONFIG,
    ),
    "hf": Layout(
        "Hugging Face full",
        lambda path: having(full.WEIGHTS)(path) or having(full.INDEX)(path),
        lambda path, trust: FullCheckpoint(path),
        f"{full.WEIGHTS} or {full.INDEX}",
    ),
}


def layout_of(directory: Path) -> tuple[Layout, Path]:
    """The layout of one step directory and the folder that holds its weights; raises ``CheckpointError``."""
    for layout in LAYOUTS.values():
        if found := layout.find(directory):
            return layout, found
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory} does not exist")
    found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
    needed = "; ".join(layout.needs for layout in LAYOUTS.values())
    raise CheckpointError(f"{directory} is no checkpoint that rankleap knows: found {found}; needed one of: {needed}")
