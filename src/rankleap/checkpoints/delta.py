"""A delta: the difference of one tensor between two checkpoints; dense, as an unmultiplied product, or still in the files.

Shapes: M rows and N columns of a weight, R columns of a product's factors; fused experts come before them. Everything is float32.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rankleap.errors import NotFiniteError


@dataclass(frozen=True, slots=True)
class LowRank:
    """The matrix ``left_MR @ right_RN``, or one for each expert, kept as its two factors."""

    left_MR: Tensor
    right_RN: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the product."""
        return torch.Size((*self.left_MR.shape[:-1], self.right_RN.shape[-1]))


Delta = Tensor | LowRank

BLOCK_BYTES = 1 << 20
"""A row block in float32 stays in a core's own cache between its uses."""
CHUNK_BYTES = 1 << 24
"""So much of a file is mapped at a time, however large the tensor."""


@dataclass(frozen=True, slots=True)
class DeltaRows:
    """A dense delta that is read from the files row block by row block, as often as asked.

    ``read(expert, out)`` gives the blocks of one expert's matrix (``None``: of the tensor itself) from the top; with ``out``,
    a float32 tensor of its shape on any device, they are written there and are views of it.
    """

    shape: torch.Size
    read: Callable[[int | None, Tensor | None], Iterator[Tensor]]
    is_local: bool = True
    """Whether it may be read again at every pass; what comes over a network is kept, however large."""

    def expert(self, number: int) -> "DeltaRows":
        """The matrix of one of the fused experts."""
        return DeltaRows(self.shape[1:], lambda _, out: self.read(number, out), self.is_local)


def row_slices(shape: torch.Size, size_bytes: int) -> Iterator[slice]:
    """Slices of the first dimension, of about ``size_bytes`` of float32 each."""
    height = max(1, size_bytes // max(4, 4 * math.prod(shape[1:])))
    return (slice(top, min(top + height, shape[0])) for top in range(0, shape[0], height))


def dense(delta: Delta) -> Tensor:
    """Multiply a product out; a dense delta is returned as it is."""
    return delta.left_MR @ delta.right_RN if isinstance(delta, LowRank) else delta


def is_zero(delta: Delta) -> bool:
    """Whether every entry is exactly zero (a LoRA whose B was never moved counts)."""
    if isinstance(delta, LowRank):
        return not (bool(delta.left_MR.any()) and bool(delta.right_RN.any()))
    return not bool(delta.any())


def combine(weighted: Iterable[tuple[float, Delta]]) -> Delta:
    """Weighted sum of one or more deltas of one shape; products stay a product, of the summed rank, as long as all are products.

    Deltas are taken one by one, so that an iterator of dense ones never holds two.
    """
    products: list[LowRank] = []
    total: Tensor | None = None
    for weight, delta in weighted:
        if isinstance(delta, LowRank):
            # A weight goes into one factor alone; in both it would count squared.
            products.append(LowRank(weight * delta.left_MR, delta.right_RN))
        else:
            total = weight * delta if total is None else total.add_(delta, alpha=weight)
    if total is None:
        left_MR = torch.cat([product.left_MR for product in products], dim=-1)
        return LowRank(left_MR, torch.cat([product.right_RN for product in products], dim=-2))
    for product in products:
        total.add_(dense(product))
    return total


def inner(first: Delta, second: Delta) -> float:
    """Frobenius inner product; two products are never multiplied out (tr(R₁ᵀL₁ᵀL₂R₂) through an R × R core)."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        left_RR = first.left_MR.double().mT @ second.left_MR.double()
        return float((left_RR * (first.right_RN.double() @ second.right_RN.double().mT)).sum())
    # float64: distances along a path are differences of inner products that nearly agree.
    return float((dense(first).double() * dense(second).double()).sum())


def require_finite(delta: Delta, name: str, where: str) -> Delta:
    """Return the delta, or raise ``NotFiniteError`` that names the tensor."""
    parts = (delta.left_MR, delta.right_RN) if isinstance(delta, LowRank) else (delta,)
    # A norm shows both at a thirtieth of the cost of looking at each entry; only if it overflowed are they looked at.
    if not all(math.isfinite(float(torch.linalg.vector_norm(p))) or bool(torch.isfinite(p).all()) for p in parts):
        raise not_finite(name, where)
    return delta


def not_finite(name: str, where: str) -> NotFiniteError:
    """The error for a tensor that training has broken."""
    return NotFiniteError(f"{name} has NaN or infinity in {where}; training has diverged there, leave this step out")
