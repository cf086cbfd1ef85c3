"""Reads deltas, gives factors (one matrix, one step) or a temporal basis (one matrix, all steps)."""

from rankleap.lowrank.factors import Factors, factorise, rank_one_shares
from rankleap.lowrank.temporal import TemporalBasis, gram, temporal_basis

__all__ = ["Factors", "TemporalBasis", "factorise", "gram", "rank_one_shares", "temporal_basis"]
