"""Reads a trajectory, gives what RL did to the weights: rank-1 shares and linearity, each beside its nulls."""

from rankleap.analysis.evidence import evidence, write_evidence

__all__ = ["evidence", "write_evidence"]
