"""Reads recipes, trains many arms under one protocol, gives a comparison on the test split."""

from rankleap.arena.compare import reach, saved_fraction, summarise
from rankleap.arena.study import Arm, run_arm

__all__ = ["Arm", "reach", "run_arm", "saved_fraction", "summarise"]
