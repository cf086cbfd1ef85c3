"""Singular triplets of one delta, exact or converged to a residual, with the residual carried as a certificate.

    ΔW ≈ Σ_k σ_k u_k v_kᵀ        residual_k = max(‖ΔW v_k - σ_k u_k‖, ‖ΔWᵀ u_k - σ_k v_k‖) / σ₁

A product L·R is factored exactly without multiplying it out: L = Q_l·C_l, Rᵀ = Q_r·C_r, and the SVD of the R × R core
C_l·C_rᵀ. A small dense matrix gets a full SVD; a large one the Lanczos method (ARPACK through SciPy), whose residual is
then measured. Not converged is an error, never a guess.

Shapes: M rows, N columns, R triplets, K the smaller side of a core. float32 in, float32 out.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, svds
from torch import Tensor

from rankleap.checkpoints.delta import Delta, LowRank, dense
from rankleap.errors import NotConvergedError

FULL_SVD_SIDE = 384
"""Up to this smaller side a full SVD costs less than converging a few triplets."""
TOLERANCE = 1e-4
"""Largest residual, relative to σ₁, that counts as converged."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Top singular triplets of one matrix's delta, strongest first.

    ``norm`` is ‖ΔW‖_F of the whole delta and ``nuclear`` its Σσ (``None`` where the full spectrum was not computed).
    """

    left_MR: Tensor
    sigma_R: Tensor
    right_RN: Tensor
    residual_R: Tensor
    norm: float
    nuclear: float | None

    def low_rank(self) -> LowRank:
        """The truncated delta as a product."""
        return LowRank(self.left_MR * self.sigma_R, self.right_RN)


def factorise(delta: Delta, rank: int, tolerance: float = TOLERANCE) -> Factors:
    """Top ``rank`` triplets (fewer if the matrix is smaller); ``NotConvergedError`` above ``tolerance``."""
    if isinstance(delta, LowRank):
        left_MK, sigma_K, right_KN = _svd_of_product(delta)
    elif min(delta.shape) <= FULL_SVD_SIDE:
        left_MK, sigma_K, right_KN = torch.linalg.svd(delta, full_matrices=False)
    else:
        return _lanczos(delta, rank, tolerance)
    norm, nuclear = float(torch.linalg.vector_norm(sigma_K)), float(sigma_K.sum())
    return _certified(delta, (left_MK[:, :rank], sigma_K[:rank], right_KN[:rank]), norm, nuclear, tolerance)


def rank_one_shares(factors: Factors) -> dict[str, float | None]:
    """The rank-1 share in its three published conventions: σ₁/Σσ (NExt), σ₁/‖ΔW‖_F (AlphaRL), σ₁²/Σσ² (RELEX)."""
    top = float(factors.sigma_R[0])
    frobenius = top / factors.norm
    return {
        "nuclear": None if factors.nuclear is None else top / factors.nuclear,
        "frobenius": frobenius,
        "energy": frobenius**2,
    }


def _svd_of_product(delta: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    left_MK, left_core_KR = torch.linalg.qr(delta.left_MR)
    right_NK, right_core_KR = torch.linalg.qr(delta.right_RN.T)
    u_KK, sigma_K, vh_KK = torch.linalg.svd(left_core_KR @ right_core_KR.T, full_matrices=False)
    return left_MK @ u_KK, sigma_K, vh_KK @ right_NK.T


def _lanczos(delta_MN: Tensor, rank: int, tolerance: float) -> Factors:
    # ARPACK's own start is random, and two runs would differ in their last digits.
    start = np.random.default_rng(0).standard_normal(min(delta_MN.shape)).astype(np.float32)
    # The method cannot give every triplet of a matrix, at most all but one.
    k = min(rank, min(delta_MN.shape) - 1)
    try:
        # ARPACK's tolerance bounds another error than the residual measured below, hence the margin.
        triplets = svds(delta_MN.numpy(), k=k, tol=tolerance / 10, v0=start)  # pyright: ignore[reportArgumentType]
    except ArpackError as error:
        raise NotConvergedError(f"the SVD of a {tuple(delta_MN.shape)} delta did not converge: {error}") from None
    left_MR, sigma_R, right_RN = (np.asarray(part) for part in triplets)
    # svds promises no order.
    order = np.argsort(-sigma_R)
    left, sigma, right = (torch.from_numpy(a.copy()) for a in (left_MR[:, order], sigma_R[order], right_RN[order]))
    # ‖ΔW‖_F needs no spectrum, Σσ needs all of it: hence the None.
    return _certified(delta_MN, (left, sigma, right), float(torch.linalg.vector_norm(delta_MN)), None, tolerance)


def _certified(
    delta: Delta, triplets: tuple[Tensor, Tensor, Tensor], norm: float, nuclear: float | None, tolerance: float
) -> Factors:
    left_MR, sigma_R, right_RN = (part.contiguous() for part in _canonical(*triplets))
    forward_MR, backward_NR = _apply(delta, right_RN.T), _apply(_transposed(delta), left_MR)
    misses = (forward_MR - left_MR * sigma_R, backward_NR - right_RN.T * sigma_R)
    residual_R = torch.maximum(*(torch.linalg.vector_norm(miss, dim=0) for miss in misses)) / sigma_R[0]
    if not float(residual_R.max()) <= tolerance:  # NaN is no certificate either
        raise NotConvergedError(
            f"the SVD of a {tuple(delta.shape)} delta has a residual of {float(residual_R.max()):.1e}·σ₁, "
            f"needed {tolerance:.0e}; ask for fewer triplets"
        )
    return Factors(left_MR, sigma_R, right_RN, residual_R, norm, nuclear)


def _canonical(left_MR: Tensor, sigma_R: Tensor, right_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One joint sign per (u, v): the largest entry of u is positive. Along a path, ``trajectory.align`` decides instead."""
    sign_R = torch.sign(left_MR.gather(0, left_MR.abs().argmax(dim=0, keepdim=True)))[0]
    return left_MR * sign_R, sigma_R, right_RN * sign_R[:, None]


def _apply(delta: Delta, vectors_NR: Tensor) -> Tensor:
    if isinstance(delta, LowRank):
        return delta.left_MR @ (delta.right_RN @ vectors_NR)
    return delta @ vectors_NR


def _transposed(delta: Delta) -> Delta:
    return LowRank(delta.right_RN.T, delta.left_MR.T) if isinstance(delta, LowRank) else dense(delta).T
