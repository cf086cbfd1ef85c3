"""Reads a forecast and a checkpoint, chooses how far to go on validation, gates the result, gives a new checkpoint."""

from rankleap.leap.apply import Leap, adapter_weights, leap_weights, norm_ratio, write_leap, write_leap_adapter
from rankleap.leap.backtest import BackTest, Skill, backtest
from rankleap.leap.gate import GateSettings, GateVerdict, Lengths, judge
from rankleap.leap.run import (
    BaseReference,
    Source,
    Trial,
    backtest_accuracy,
    open_source,
    read_accuracies,
    require_finite_logits,
    run_accuracies,
    try_leaps,
    write_decision,
)
from rankleap.leap.search import Candidates, Decision, halves, search

__all__ = [
    "BackTest",
    "BaseReference",
    "Candidates",
    "Decision",
    "GateSettings",
    "GateVerdict",
    "Leap",
    "Lengths",
    "Skill",
    "Source",
    "Trial",
    "adapter_weights",
    "backtest",
    "backtest_accuracy",
    "halves",
    "judge",
    "leap_weights",
    "norm_ratio",
    "open_source",
    "read_accuracies",
    "require_finite_logits",
    "run_accuracies",
    "search",
    "try_leaps",
    "write_decision",
    "write_leap",
    "write_leap_adapter",
]
