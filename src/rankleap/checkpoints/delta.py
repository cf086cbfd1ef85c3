"""A delta: the difference of one tensor between two checkpoints, dense or as an unmultiplied product.

Shapes: M rows and N columns of a weight, R columns of a product's factors. Everything is float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankleap.errors import NotFiniteError


@dataclass(frozen=True, slots=True)
class LowRank:
    """The matrix ``left_MR @ right_RN``, kept as its two factors."""

    left_MR: Tensor
    right_RN: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the product."""
        return torch.Size((self.left_MR.shape[0], self.right_RN.shape[1]))


Delta = Tensor | LowRank


def dense(delta: Delta) -> Tensor:
    """Multiply a product out; a dense delta is returned as it is."""
    return delta.left_MR @ delta.right_RN if isinstance(delta, LowRank) else delta


def is_zero(delta: Delta) -> bool:
    """Whether every entry is exactly zero (a LoRA whose B was never moved counts)."""
    if isinstance(delta, LowRank):
        return not (bool(delta.left_MR.any()) and bool(delta.right_RN.any()))
    return not bool(delta.any())


def combine(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Weighted sum of deltas of one shape; products stay a product, of the summed rank, as long as all are products."""
    if all(isinstance(delta, LowRank) for delta in deltas):
        products = [delta for delta in deltas if isinstance(delta, LowRank)]
        # A weight goes into one factor alone; in both it would count squared.
        left_MR = torch.cat([weight * p.left_MR for weight, p in zip(weights, products, strict=True)], dim=1)
        return LowRank(left_MR, torch.cat([p.right_RN for p in products], dim=0))
    total = torch.zeros(deltas[0].shape)
    for weight, delta in zip(weights, deltas, strict=True):
        total.add_(dense(delta), alpha=weight)
    return total


def inner(first: Delta, second: Delta) -> float:
    """Frobenius inner product; two products are never multiplied out (tr(R₁ᵀL₁ᵀL₂R₂) through an R × R core)."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        left_RR = first.left_MR.double().T @ second.left_MR.double()
        return float((left_RR * (first.right_RN.double() @ second.right_RN.double().T)).sum())
    # float64: distances along a path are differences of inner products that nearly agree.
    return float((dense(first).double() * dense(second).double()).sum())


def require_finite(delta: Delta, name: str, where: str) -> Delta:
    """Return the delta, or raise ``NotFiniteError`` that names the tensor."""
    parts = (delta.left_MR, delta.right_RN) if isinstance(delta, LowRank) else (delta,)
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise NotFiniteError(f"{name} has NaN or infinity in {where}; training has diverged there, leave this step out")
    return delta
