"""Reads any trainer's run directory, gives weights and effective deltas by name and step, writes checkpoints."""

from rankleap.checkpoints.adapter import AdapterCheckpoint
from rankleap.checkpoints.delta import Delta, DeltaRows, LowRank, combine, dense, inner, is_zero
from rankleap.checkpoints.full import FullCheckpoint, require_same_shapes
from rankleap.checkpoints.layouts import Checkpoint
from rankleap.checkpoints.run import (
    Run,
    base_of,
    bundled_bases,
    effective_weights,
    load_weights,
    open_checkpoint,
    open_run,
    resolve_base,
)

__all__ = [
    "AdapterCheckpoint",
    "Checkpoint",
    "Delta",
    "DeltaRows",
    "FullCheckpoint",
    "LowRank",
    "Run",
    "base_of",
    "bundled_bases",
    "combine",
    "dense",
    "effective_weights",
    "inner",
    "is_zero",
    "load_weights",
    "open_checkpoint",
    "open_run",
    "require_same_shapes",
    "resolve_base",
]
