"""Reads a forecast and a checkpoint, chooses how far to go on validation, gates the result, gives a new checkpoint."""

from rankleap.leap.apply import Leap, adapter_weights, leap_weights, norm_ratio, write_leap, write_leap_adapter
from rankleap.leap.gate import GateSettings, GateVerdict, judge
from rankleap.leap.run import BaseReference, Source, Trial, open_source, try_leaps, write_decision
from rankleap.leap.search import Candidates, Decision, search

__all__ = [
    "BaseReference",
    "Candidates",
    "Decision",
    "GateSettings",
    "GateVerdict",
    "Leap",
    "Source",
    "Trial",
    "adapter_weights",
    "judge",
    "leap_weights",
    "norm_ratio",
    "open_source",
    "search",
    "try_leaps",
    "write_decision",
    "write_leap",
    "write_leap_adapter",
]
