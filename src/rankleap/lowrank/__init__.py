"""Reads deltas, gives factors (one matrix, one step) or a temporal basis (one matrix, all steps)."""

from rankleap.lowrank.factors import Factors, Workspace, factorise, factorise_experts, rank_one_shares
from rankleap.lowrank.temporal import TemporalBasis, gram, gram_of_increments, temporal_basis

__all__ = [
    "Factors",
    "TemporalBasis",
    "Workspace",
    "factorise",
    "factorise_experts",
    "gram",
    "gram_of_increments",
    "rank_one_shares",
    "temporal_basis",
]
