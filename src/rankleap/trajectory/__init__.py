"""Reads factors of a run, gives a trajectory ordered over steps with aligned signs, and measures its linearity against nulls."""

from rankleap.trajectory.align import AlignedFactors, align, leading_path
from rankleap.trajectory.linearity import Linearity, LinearityEvidence, line_weights, linearity, linearity_with_nulls
from rankleap.trajectory.path import CheckpointTrajectory, RecordedTrajectory, Trajectory, run_trajectory
from rankleap.trajectory.record import Recording, open_recording, record_step, recording_of, unseparated

__all__ = [
    "AlignedFactors",
    "CheckpointTrajectory",
    "Linearity",
    "LinearityEvidence",
    "RecordedTrajectory",
    "Recording",
    "Trajectory",
    "align",
    "leading_path",
    "line_weights",
    "linearity",
    "linearity_with_nulls",
    "open_recording",
    "record_step",
    "recording_of",
    "run_trajectory",
    "unseparated",
]
