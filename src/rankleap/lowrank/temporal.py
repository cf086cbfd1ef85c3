"""Temporal low rank: what all steps of one tensor share, through the T × T Gram matrix of its deltas.

    G_st = ⟨Δ_s, Δ_t⟩_F        Δ_t = W_t - W_0

Every linear question about a path (RELEX's basis, fitted lines, forecasts, their errors) is a question about G alone:
a weighted sum Σ a_t Δ_t has the squared norm aᵀ G a. From adapters, G needs no dense matrix.

Shapes: T steps, R temporal components. G is float64.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankleap.checkpoints.delta import Delta, inner
from rankleap.errors import TrajectoryError


@dataclass(frozen=True, slots=True)
class TemporalBasis:
    """RELEX's uncentred basis of one tensor (2605.21468, §3).

    ``coords_TR`` is c_t = ⟨Δ_t, v_r⟩. The directions themselves are mixtures of the deltas: v_r = Σ_t mix_RT Δ_t.
    """

    coords_TR: Tensor
    mix_RT: Tensor
    energy_R: Tensor


def gram(deltas: Sequence[Delta]) -> Tensor:
    """G of one tensor's deltas, T × T, float64."""
    gram_TT = torch.empty(len(deltas), len(deltas), dtype=torch.float64)
    for s, first in enumerate(deltas):
        for t, second in enumerate(deltas[: s + 1]):
            gram_TT[s, t] = gram_TT[t, s] = inner(first, second)
    return gram_TT


def gram_of_increments(blocks_TD: Iterable[Tensor]) -> Tensor:
    """G in one pass, from row blocks of the increments Δ_1, Δ_2 - Δ_1, …, each T × D float32; T × T, float64.

    Summed from increments, distances along the path keep float32's relative precision: as differences of the deltas'
    own inner products, which nearly agree, they would lose it.
    """
    total_TT: Tensor | None = None
    for block_TD in blocks_TD:
        product_TT = (block_TD @ block_TD.T).double().cpu()
        total_TT = product_TT if total_TT is None else total_TT.add_(product_TT)
    if total_TT is None:
        raise TrajectoryError("a Gram matrix needs at least one row of one delta, got none")
    return total_TT.cumsum(0).cumsum(1)


def temporal_basis(gram_TT: Tensor, rank: int = 1) -> TemporalBasis:
    """Top temporal components from G = U Λ Uᵀ: coords = U √Λ, v = Λ^(-1/2) Uᵀ Δ; energy is Λ/ΣΛ.

    The sign of each component makes its last coordinate positive: the run moves forward along it.
    """
    value_T, vector_TT = torch.linalg.eigh(gram_TT)
    # eigh sorts upwards, and rounding can leave a tiny negative eigenvalue.
    value_R, vector_TR = value_T.flip(0)[:rank].clamp_min(0), vector_TT.flip(1)[:, :rank]
    vector_TR = vector_TR * torch.where(vector_TR[-1] < 0, -1.0, 1.0)
    scale_R = value_R.sqrt()
    # A component without energy has no direction; the floor keeps its mix finite.
    floor = torch.finfo(torch.float64).eps * value_T[-1].clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return TemporalBasis(vector_TR * scale_R, (vector_TR / scale_R.clamp_min(floor)).T, value_R / value_T.sum())
