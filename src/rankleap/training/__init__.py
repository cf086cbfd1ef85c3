"""Reads a recipe, runs the trainer, writes a run directory."""

from rankleap.training.recorder import TrajectoryRecorder
from rankleap.training.reground import read_decisions
from rankleap.training.run import Plan, plan, train

__all__ = ["Plan", "TrajectoryRecorder", "plan", "read_decisions", "train"]
