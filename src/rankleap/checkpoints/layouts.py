"""Every layout that a checkpoint may have on disk: where its weights lie in a step directory, and how they are opened.

A layout is recognised by what is there, never by a model's or a trainer's name. The order decides where a directory
holds several: an adapter's config first, then the most exact copy of the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankleap.checkpoints import adapter, dcp, deepspeed, full, megatron, pickled, ranks, torchtune
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


def having(patterns: Sequence[str], *folders: str) -> Callable[[Path], Path | None]:
    """The first of ``folders`` (default: the directory itself) that holds a file of the first of these patterns that is there."""

    def find(directory: Path) -> Path | None:
        places = [directory / folder for folder in folders or (".",)]
        return next((place for one in patterns for place in places if next(place.glob(one), None)), None)

    return find


# verl on Megatron keeps the model here when it writes through a bridge.
_EXPORTS = (".", "actor/huggingface", "actor/model/huggingface", "huggingface")

LAYOUTS: dict[str, Layout] = {
    # Before PEFT's, for its config may lie beside shards of the adapter; where PEFT's own weights are, "dcp" gives way.
    "megatron": Layout(
        "Megatron torch_dist", megatron.find, megatron.open_checkpoint, f"{dcp.METADATA} of a Megatron model"
    ),
    "dcp": Layout("torch distributed checkpoint", dcp.find, dcp.open_checkpoint, f"{dcp.METADATA} beside {dcp.SHARDS}"),
    # Before PEFT's, for the copy that torchtune makes for PEFT has wrong rows.
    "torchtune": Layout(
        "torchtune adapter", torchtune.find, torchtune.open_checkpoint, f"{torchtune.OWN} beside {adapter.CONFIG}"
    ),
    # A directory with an adapter's config is an adapter, whatever else was saved into it.
    "peft": Layout(
        "PEFT adapter",
        having([adapter.CONFIG], ".", "actor/lora_adapter", "lora_adapter"),
        lambda path, trust: AdapterCheckpoint(path, trust_pickle=trust),
        adapter.CONFIG,
    ),
    # This and the next before Hugging Face's, since the partitions are float32 and the export beside them is bfloat16.
    "deepspeed": Layout("DeepSpeed ZeRO", deepspeed.find, deepspeed.open_checkpoint, deepspeed.STATES),
    "verl": Layout(
        "FSDP rank files (verl, EasyR1, SkyRL)",
        having([ranks.PATTERN], "actor", ".", "policy"),
        ranks.open_ranks,
        ranks.PATTERN,
    ),
    "hf": Layout(
        "Hugging Face full",
        having([full.WEIGHTS, full.INDEX], *_EXPORTS),
        lambda path, trust: FullCheckpoint(path),
        f"{full.WEIGHTS} or {full.INDEX}",
    ),
    "hf-bin": Layout(
        "Hugging Face full, pickled",
        having([pickled.BIN, pickled.BIN_INDEX]),
        pickled.open_bin,
        f"{pickled.BIN} or {pickled.BIN_INDEX}",
    ),
    "torch": Layout(
        "torch state dict",
        having(pickled.MODEL_STATES, "policy", "."),
        pickled.open_torch,
        " or ".join(pickled.MODEL_STATES),
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
