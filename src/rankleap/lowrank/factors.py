"""Singular triplets of one delta, exact or converged to a residual, with two certificates carried along.

    ΔW ≈ Σ_k σ_k u_k v_kᵀ        residual_k = max(‖ΔW v_k - σ_k u_k‖, ‖ΔWᵀ u_k - σ_k v_k‖) / σ₁
                                  angle_k    = residual_k · σ₁ / (distance of σ_k to the nearest other singular value)

The residual says that it is a triplet; the angle, Wedin's bound on the sine between u_k, v_k and the true ones (Stewart &
Sun, Matrix Perturbation Theory, §V.4), says whether it has a direction of its own: near-equal singular values have none.

A product L·R is factored exactly without multiplying it out: L = Q_l·C_l, Rᵀ = Q_r·C_r, and the SVD of the small core
C_l·C_rᵀ. A small dense matrix gets a full SVD; a large one block Lanczos (``lanczos``), straight from the files if need be.

Shapes: M rows, N columns, R triplets, K the smaller side of a core, E fused experts. float32 in, float32 out.

Whole spectra, where they are asked for: of the delta, and of its energy in the base's own singular basis.

    W_0 = Σ_i s_i a_i b_iᵀ        energy_i = (a_iᵀ ΔW b_i)² / ‖ΔW‖²_F          (after 2512.23165, spectral analysis)
    off_principal(k) = 1 - Σ_{i,j<k} (a_iᵀ ΔW b_j)² / ‖ΔW‖²_F                   (after 2511.08567)

A full SVD of one 7B-sized matrix takes minutes on two cores, hence only for the tensors that are asked for.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankleap.checkpoints import Delta, DeltaRows, LowRank, inner
from rankleap.checkpoints.delta import BLOCK_BYTES, not_finite, require_finite, row_slices
from rankleap.errors import InputError, NotConvergedError
from rankleap.lowrank.lanczos import Blocks, lanczos

FULL_SVD_SIDE = 256
"""Up to this smaller side a full SVD costs little more than converging a few triplets, and gives Σσ."""
TOLERANCE = 1e-4
"""Largest residual, relative to σ₁, that counts as converged."""
SEPARATED = 0.02
"""Largest angle, in radians, of a vector that may be called the direction of its singular value."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Top singular triplets of one matrix's delta, strongest first; empty for a delta that is exactly zero.

    ``norm`` is ‖ΔW‖_F of the whole delta and ``nuclear`` its Σσ (``None`` where the full spectrum was not computed).
    """

    left_MR: Tensor
    sigma_R: Tensor
    right_RN: Tensor
    residual_R: Tensor
    angle_R: Tensor
    norm: float
    nuclear: float | None

    @property
    def separated_R(self) -> Tensor:
        """Which triplets have a direction of their own; the others span one together with their neighbours."""
        return self.angle_R <= SEPARATED

    def low_rank(self) -> LowRank:
        """The truncated delta as a product."""
        return LowRank(self.left_MR * self.sigma_R, self.right_RN)


@dataclass(slots=True)
class Workspace:
    """Memory for one dense delta at a time, reused: fresh pages cost more than reading the file does.

    A delta that does not fit in ``limit_bytes`` is read from its files again at every pass, if these are on this machine.
    """

    limit_bytes: int = 1 << 30
    device: str = "cpu"
    _buffer: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        """Raise ``InputError`` for a device that is not here, before any work is done elsewhere."""
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"device {self.device!r} cannot be used here ({reason}); choose cpu") from None

    def blocks(self, delta: DeltaRows) -> Blocks:
        """Row blocks of a matrix: from the files on the first pass, from memory on later ones."""
        size = delta.shape.numel()
        if 4 * size > self.limit_bytes and delta.is_local:
            return lambda: delta.read(None, None)
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, device=self.device)
        matrix_MN = self._buffer[:size].view(delta.shape)
        passes = [lambda: delta.read(None, matrix_MN)]  # used up by the first pass

        return lambda: passes.pop()() if passes else resident_blocks(matrix_MN)


def resident_blocks(delta_MN: Tensor) -> list[Tensor]:
    """Row blocks of a matrix in memory: of the cache's size on a CPU, the whole of it elsewhere."""
    size_bytes = delta_MN.nbytes if delta_MN.is_cuda else BLOCK_BYTES
    return [delta_MN[rows] for rows in row_slices(delta_MN.shape, size_bytes)]


def factorise(
    delta: Delta | DeltaRows,
    rank: int,
    tolerance: float = TOLERANCE,
    start_N: Tensor | None = None,
    workspace: Workspace | None = None,
    name: str = "the delta",
) -> Factors:
    """Top ``rank`` triplets (fewer if the matrix is smaller, none if it is zero).

    ``start_N``: a right vector to begin with, say the neighbouring step's. Triplets that stay above ``tolerance`` although
    they stand apart are a ``NotConvergedError``; NaN and infinity a ``NotFiniteError`` that names ``name``.
    """
    workspace = workspace or Workspace()
    if isinstance(delta, DeltaRows) and min(delta.shape) <= FULL_SVD_SIDE:
        delta = torch.cat(list(delta.read(None, None)))
    if isinstance(delta, LowRank):
        return _of_spectrum(delta, _svd_of_product(delta, rank), rank, tolerance)
    if isinstance(delta, Tensor) and min(delta.shape) <= FULL_SVD_SIDE:
        require_finite(delta, name, "what was read")
        return _of_spectrum(delta, torch.linalg.svd(delta, full_matrices=False), rank, tolerance)
    blocks = (lambda: resident_blocks(delta)) if isinstance(delta, Tensor) else workspace.blocks(delta)
    rows, columns = delta.shape
    found = lanczos(blocks, (rows, columns), rank, tolerance, start_N, workspace.device)
    if not math.isfinite(found.norm):
        raise not_finite(name, "what was read")
    if not len(found.sigma_R):
        return _empty(delta.shape)
    return _certified(
        (found.left_MR, found.sigma_R, found.right_RN),
        found.residual_R,
        found.next_sigma,
        (found.norm, None),
        tolerance,
    )


def factorise_experts(
    delta: Tensor | DeltaRows,
    rank: int,
    starts_EN: Tensor | None = None,
    workspace: Workspace | None = None,
    name: str = "the delta",
) -> list[Factors]:
    """Factors of every expert's matrix of a fused E × M × N tensor."""
    matrices = (delta.expert(e) if isinstance(delta, DeltaRows) else delta[e] for e in range(delta.shape[0]))
    return [
        factorise(matrix, rank, TOLERANCE, None if starts_EN is None else starts_EN[e], workspace, f"{name}[{e}]")
        for e, matrix in enumerate(matrices)
    ]


def rank_one_shares(factors: Factors) -> dict[str, float | None]:
    """The rank-1 share in its three published conventions: σ₁/Σσ (NExt), σ₁/‖ΔW‖_F (AlphaRL), σ₁²/Σσ² (RELEX)."""
    top = float(factors.sigma_R[0])
    frobenius = top / factors.norm
    return {
        "nuclear": None if factors.nuclear is None else top / factors.nuclear,
        "frobenius": frobenius,
        "energy": frobenius**2,
    }


def _svd_of_product(delta: LowRank, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``rank`` vectors of either side, and all singular values."""
    left_KR, left_whitened_RK = _root(delta.left_MR.T)
    right_KR, right_whitened_RK = _root(delta.right_RN)
    u_KK, sigma_K, vh_KK = torch.linalg.svd(left_KR @ right_KR.T, full_matrices=False)
    left_MR = delta.left_MR @ (left_whitened_RK @ u_KK[:, :rank]).float()
    return left_MR, sigma_K.float(), (vh_KK[:rank] @ right_whitened_RK.T).float() @ delta.right_RN


def _root(factor_RN: Tensor) -> tuple[Tensor, Tensor]:
    """C and W with FᵀW orthonormal and F = C·…: the two halves of a QR factorisation of Fᵀ, from its Gram matrix.

    In float64 the Gram matrix loses nothing that float32 factors have, at a third of the cost of Householder's QR.
    """
    factor_RN = factor_RN.double()
    value_R, vector_RR = torch.linalg.eigh(factor_RN @ factor_RN.T)
    # Directions that the factor does not have, such as the padding of a smaller rank, are left out.
    kept = value_R > 1e-14 * value_R[-1:]
    root_K, vector_RK = value_R[kept].sqrt(), vector_RR[:, kept]
    return root_K[:, None] * vector_RK.T, vector_RK / root_K


def _of_spectrum(delta: Delta, svd: tuple[Tensor, Tensor, Tensor], rank: int, tolerance: float) -> Factors:
    """The top of a whole spectrum, certified against the delta itself."""
    left_MK, sigma_K, right_KN = svd
    if not sigma_K.any():
        return _empty(delta.shape)
    left_MR, sigma_R, right_RN = left_MK[:, :rank], sigma_K[:rank], right_KN[:rank]
    misses = (_apply(delta, right_RN.T) - left_MR * sigma_R, _apply(_transposed(delta), left_MR) - right_RN.T * sigma_R)
    residual_R = torch.maximum(*(torch.linalg.vector_norm(miss, dim=0) for miss in misses)) / sigma_R[0]
    norms = float(torch.linalg.vector_norm(sigma_K)), float(sigma_K.sum())
    following = float(sigma_K[rank]) if rank < len(sigma_K) else 0.0
    return _certified((left_MR, sigma_R, right_RN), residual_R, following, norms, tolerance)


def _certified(
    triplets: tuple[Tensor, Tensor, Tensor],
    residual_R: Tensor,
    next_sigma: float,
    norms: tuple[float, float | None],
    tolerance: float,
) -> Factors:
    left_MR, sigma_R, right_RN = (part.contiguous() for part in _canonical(*triplets))
    padded = torch.cat([sigma_R.new_tensor([math.inf]), sigma_R, sigma_R.new_tensor([next_sigma])])
    gap_R = torch.minimum(padded[:-2] - sigma_R, sigma_R - padded[2:]) / sigma_R[0]
    # Overlapping estimates leave no gap at all, and no bound.
    angle_R = torch.where(gap_R > 0, residual_R / gap_R, math.inf)
    # Whether it stands apart is judged by more than its own residual: an unconverged neighbour pulls both ways.
    missed = ~(residual_R <= tolerance) & ~(gap_R < 10 * residual_R)  # NaN is no certificate either
    if bool(missed.any()):
        raise NotConvergedError(
            f"the SVD of a {(len(left_MR), right_RN.shape[1])} delta has a residual of {float(residual_R.max()):.1e}·σ₁, "
            f"needed {tolerance:.0e}; ask for fewer triplets"
        )
    return Factors(left_MR, sigma_R, right_RN, residual_R, angle_R, *norms)


def _empty(shape: torch.Size) -> Factors:
    none = torch.zeros(0)
    return Factors(torch.zeros(shape[0], 0), none, torch.zeros(0, shape[1]), none, none, 0.0, 0.0)


def _canonical(left_MR: Tensor, sigma_R: Tensor, right_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One joint sign per (u, v): the largest entry of u is positive. Along a path, ``trajectory.align`` decides instead."""
    sign_R = torch.sign(left_MR.gather(0, left_MR.abs().argmax(dim=0, keepdim=True)))[0]
    return left_MR * sign_R, sigma_R, right_RN * sign_R[:, None]


def _apply(delta: Delta, vectors_NR: Tensor) -> Tensor:
    if isinstance(delta, LowRank):
        return delta.left_MR @ (delta.right_RN @ vectors_NR)
    return delta @ vectors_NR


def _transposed(delta: Delta) -> Delta:
    return LowRank(delta.right_RN.T, delta.left_MR.T) if isinstance(delta, LowRank) else delta.T


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
