"""Top singular triplets of a matrix that is only ever read row block by row block.

Block Lanczos on AᵀA with full reorthogonalisation (Golub & Van Loan, Matrix Computations, 4th ed., §10.3.6). A pass takes
each row block once and gives both A·v and AᵀA·v while the block is in the cache, so it costs one read of the matrix where
the textbook's pair of products costs two; and the blocks may come straight from the checkpoint's files.

Two vectors a pass: the second one is always random, so that a warm start that has lost the top direction, or a pair
of equal singular values, is still found. In the end the triplets come from an SVD of A·V, which does not square their
condition as AᵀA does.

Shapes: M rows, N columns, B vectors a pass, J of them so far, R triplets.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Blocks = Callable[[], Iterable[Tensor]]
"""Row blocks of A from the top, float32; called once for each pass."""
MAX_PASSES = 160
"""Enough for a cold start at σ₁/σ₂ = 1.003; what needs more has no direction of its own to speak of."""
MIN_PASSES = 6
"""So long the random vector gets to find what a warm start has lost; measured, up to 4 passes can be silently wrong."""
PATIENCE = 24
"""So many passes at least before two singular values are called equal."""
APART = 5e-3
"""Relative gap to the next singular value from which a residual of 1e-4 means an angle below 0.02."""
_ROUNDING = 1e-6
"""AᵀA·v in float32 is not more exact than this share of σ₁²."""


@dataclass(frozen=True, slots=True)
class Triplets:
    """What Lanczos found: ``next_sigma`` is the most that the largest singular value left out may be."""

    left_MR: Tensor
    sigma_R: Tensor
    right_RN: Tensor
    residual_R: Tensor
    norm: float
    next_sigma: float
    passes: int


def lanczos(
    blocks: Blocks,
    shape: tuple[int, int],
    rank: int,
    tolerance: float,
    start_N: Tensor | None = None,
    device: str = "cpu",
) -> Triplets:
    """Top ``rank`` triplets, to a measured residual of ``tolerance``·σ₁ if ``MAX_PASSES`` reach it.

    A zero or non-finite matrix gives no triplets, only its norm.
    """
    generator = torch.Generator().manual_seed(0)
    first_NB = torch.randn(shape[1], 2, generator=generator)
    if start_N is not None:
        first_NB[:, 0] = start_N
    krylov = _Krylov(blocks, shape, first_NB[:, : min(2, *shape)].to(device))
    norm = krylov.norm
    if norm == 0 or not math.isfinite(norm):
        empty = torch.zeros(0)
        return Triplets(torch.zeros(shape[0], 0), empty, torch.zeros(0, shape[1]), empty, norm, 0.0, 1)
    deadline = MAX_PASSES
    while krylov.passes < deadline:
        if krylov.converged(rank, tolerance):
            if krylov.next_sigma(rank) < (1 - APART) * krylov.sigma(rank - 1):
                break
            # What seems equal may part with a few more passes, or be equal.
            deadline = min(deadline, max(2 * krylov.passes, PATIENCE))
        if not krylov.extend(generator):
            break
    left_MR, sigma_R, right_RN = krylov.triplets(rank)
    # A·v - σu is zero by construction, up to rounding: u and σ come from an SVD of A·v itself.
    miss_RN = _transposed_product(blocks, left_MR) - sigma_R[:, None] * right_RN
    residual_R = torch.linalg.vector_norm(miss_RN, dim=1) / sigma_R[0]
    left_MR, sigma_R, right_RN, residual_R = (part.cpu() for part in (left_MR, sigma_R, right_RN, residual_R))
    return Triplets(left_MR, sigma_R, right_RN, residual_R, norm, krylov.next_sigma(rank), krylov.passes + 1)


class _Krylov:
    """A growing orthonormal basis V of {v, AᵀA v, (AᵀA)² v, …} with A·V and AᵀA·V."""

    def __init__(self, blocks: Blocks, shape: tuple[int, int], first_NB: Tensor) -> None:
        self._blocks, self._shape = blocks, shape
        self.passes = 0
        self.norm = 0.0
        room = 2 * (MAX_PASSES + 1)
        # Allocated once: growing by concatenation would copy the basis at every pass.
        self._basis_JN = first_NB.new_empty(min(room, shape[1]), shape[1])
        self._image_JM, self._gram_JN = (
            first_NB.new_empty(len(self._basis_JN), shape[0]),
            torch.empty_like(self._basis_JN),
        )
        self._size = 0
        self._multiply(torch.linalg.qr(first_NB)[0].T)

    def _multiply(self, new_BN: Tensor) -> None:
        """Append orthonormal vectors and their products; one pass over the matrix."""
        old, self._size = self._size, self._size + len(new_BN)
        self._basis_JN[old : self._size] = new_BN
        image_BM, gram_BN = self._image_JM[old : self._size], self._gram_JN[old : self._size].zero_()
        row, square = 0, 0.0
        for block_mN in self._blocks():
            rows = slice(row, row := row + len(block_mN))
            # By vectors, not as one product: BLAS has no fast kernel for a matrix this narrow.
            for vector_N, image_M, gram_N in zip(new_BN, image_BM, gram_BN, strict=True):
                torch.mv(block_mN, vector_N, out=image_M[rows])
                gram_N.addmv_(block_mN.T, image_M[rows])
            if not self.passes:
                square += float(torch.linalg.vector_norm(block_mN)) ** 2
        if not self.passes:
            self.norm = math.sqrt(square) if square == square else math.nan
        self.passes += 1
        basis_JN = self._basis_JN[: self._size]
        value_J, vector_JJ = torch.linalg.eigh((basis_JN @ self._gram_JN[: self._size].T).double().cpu())
        # Largest first; rounding can leave a tiny negative eigenvalue.
        self._value_J, self._vector_JJ = value_J.flip(0).clamp_min(0), vector_JJ.flip(1).to(basis_JN)

    def extend(self, generator: torch.Generator) -> bool:
        """One more pass, with what the last products add to the basis; ``False`` when nothing is left to add."""
        basis_JN, room = self._basis_JN[: self._size], len(self._basis_JN) - self._size
        new_BN = self._gram_JN[max(0, self._size - 2) : self._size].clone()
        for number, vector_N in enumerate(new_BN):
            scale = torch.linalg.vector_norm(vector_N)
            _orthogonalise(vector_N, basis_JN, new_BN[:number])
            # An invariant subspace: what is left is rounding, so a fresh direction takes its place.
            if not torch.linalg.vector_norm(vector_N) > _ROUNDING * scale:
                vector_N.copy_(torch.randn(len(vector_N), generator=generator))
                _orthogonalise(vector_N, basis_JN, new_BN[:number])
            vector_N.div_(torch.linalg.vector_norm(vector_N))
        if room:
            self._multiply(new_BN[:room])
        return room > 0

    def converged(self, rank: int, tolerance: float) -> bool:
        """Whether the wanted triplets miss AᵀA·v = σ²v by little enough."""
        # One pair beyond the wanted ones tells how far the next singular value is.
        if self.passes < MIN_PASSES or self._size <= min(rank, *self._shape):
            return False
        top = float(self._value_J[0])
        miss_R, value_R = self._misses(rank), self._value_J[:rank]
        # Half of the tolerance goes to what the estimate does not see.
        allowed_R = (0.5 * tolerance * (top * value_R).sqrt()).clamp_min(_ROUNDING * top)
        return bool((miss_R <= allowed_R).all())

    def sigma(self, number: int) -> float:
        """Estimate of one singular value; 0 beyond the last."""
        return math.sqrt(float(self._value_J[number])) if number < self._size else 0.0

    def next_sigma(self, rank: int) -> float:
        """Upper estimate of the first singular value that is not among the triplets."""
        if self._size <= rank:
            return 0.0
        value, miss = float(self._value_J[rank]), float(self._misses(rank + 1)[rank])
        return math.sqrt(value + miss)

    def triplets(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Left vectors, singular values and right vectors from the SVD of A·V."""
        mix_RJ = self._vector_JJ[:, :rank].T
        left_MR, sigma_R, turn_RR = torch.linalg.svd((mix_RJ @ self._image_JM[: self._size]).T, full_matrices=False)
        right_RN = turn_RR @ (mix_RJ @ self._basis_JN[: self._size])
        # The shorter side may hold fewer triplets than the basis has vectors.
        return left_MR, sigma_R, right_RN[: len(sigma_R)]

    def _misses(self, count: int) -> Tensor:
        """‖AᵀA·v - σ²v‖ of the first pairs."""
        mix_RJ = self._vector_JJ[:, :count].T
        exact_RN = mix_RJ @ self._gram_JN[: self._size]
        miss_RN = exact_RN - self._value_J[:count, None].to(mix_RJ) * (mix_RJ @ self._basis_JN[: self._size])
        return torch.linalg.vector_norm(miss_RN, dim=1).double().cpu()


def _orthogonalise(vector_N: Tensor, *bases_JN: Tensor) -> None:
    # Twice is enough (Kahan and Parlett): once leaves rounding of the size of what was taken away.
    for _ in range(2):
        for basis_JN in bases_JN:
            vector_N.sub_(basis_JN.T @ (basis_JN @ vector_N))


def _transposed_product(blocks: Blocks, left_MR: Tensor) -> Tensor:
    """(AᵀU)ᵀ, R × N, in one more pass."""
    product_RN = None
    row = 0
    for block_mN in blocks():
        if product_RN is None:
            product_RN = block_mN.new_zeros(left_MR.shape[1], block_mN.shape[1])
        rows = slice(row, row := row + len(block_mN))
        for product_N, left_M in zip(product_RN, left_MR.T[:, rows], strict=True):
            product_N.addmv_(block_mN.T, left_M)
    assert product_RN is not None, "a matrix without rows has no triplets to certify"
    return product_RN
