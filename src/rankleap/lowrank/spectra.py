"""Whole spectra, where they are asked for: of the delta, and of its energy in the base's own singular basis.

    W_0 = Σ_i s_i a_i b_iᵀ        energy_i = (a_iᵀ ΔW b_i)² / ‖ΔW‖²_F          (after 2512.23165, spectral analysis)
    off_principal(k) = 1 - Σ_{i,j<k} (a_iᵀ ΔW b_j)² / ‖ΔW‖²_F                   (after 2511.08567)

A full SVD of one 7B-sized matrix takes minutes on two cores, hence only for the tensors that are asked for.
Shapes: M rows, N columns, K the smaller side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rankleap.checkpoints import Delta, inner
from rankleap.lowrank.factors import Factors


@dataclass(frozen=True, slots=True)
class BaseBasis:
    """The singular basis of one matrix of the base."""

    left_MK: Tensor
    right_KN: Tensor


def base_basis(weight_MN: Tensor) -> BaseBasis:
    """Singular basis of a base weight, principal directions first."""
    left_MK, _, right_KN = torch.linalg.svd(weight_MN.float(), full_matrices=False)
    return BaseBasis(left_MK, right_KN)


def spectrum(delta: Delta) -> Tensor:
    """All singular values of a delta, largest first; of a product those that it can have, through its core."""
    if isinstance(delta, Tensor):
        return torch.linalg.svdvals(delta)
    left_core, right_core = torch.linalg.qr(delta.left_MR)[1], torch.linalg.qr(delta.right_RN.T)[1]
    return torch.linalg.svdvals(left_core @ right_core.T)


def stable_rank(factors: Factors) -> float:
    """‖ΔW‖²_F / σ₁²: 1 for a rank-one delta, K for one with equal singular values."""
    return (factors.norm / float(factors.sigma_R[0])) ** 2


def energy_in_base(delta: Delta, basis: BaseBasis) -> tuple[Tensor, Tensor]:
    """Energy on each pair of the base's directions, and the share outside the block of the first k of them, k = 1 … K."""
    # (aᵀ ΔW b) of every pair; an unmultiplied product is taken through its factors.
    if isinstance(delta, Tensor):
        core_KK = basis.left_MK.T @ delta @ basis.right_KN.T
    else:
        core_KK = (basis.left_MK.T @ delta.left_MR) @ (delta.right_RN @ basis.right_KN.T)
    square_KK = core_KK.double() ** 2
    total = inner(delta, delta)
    block_K = square_KK.cumsum(0).cumsum(1).diagonal()
    return (square_KK.diagonal() / total).float(), (1 - block_K / total).float()
