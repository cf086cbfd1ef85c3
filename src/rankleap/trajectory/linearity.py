"""How straight a path is, and how straight it would look by chance.

Everything is a function of one tensor's Gram matrix G_st = ⟨Δ_s, Δ_t⟩ and the steps, so a 7B model costs no more than a toy.

    rank-1 share over time    λ₁/Σλ of G                                          (RELEX, 2605.21468; uncentred)
    R² in sample              of c_t = ⟨Δ_t, v₁⟩ against the step                  (RELEX)
    R² forward                a line through the first steps, scored on the later ones, in weight space
                              1 - Σ‖Δ_t - Δ̂_t‖² / Σ‖Δ_t - Δ_hold‖²   (after NExt, 2604.11446)
                              0 is as good as standing still

The first two flatter: a driftless random walk has λ₁/Σλ = 8/π² ≈ 0.81 and R² ≈ 0.96. So each comes with its nulls of
the same shape: *noise* (independent steps), *walk* (driftless, increments of the same sizes), *permutation* (the same
deltas in another order).

Shapes: T steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankleap.errors import TrajectoryError
from rankleap.lowrank import temporal_basis

# Of three steps two would carry the line and one alone would score it.
NEEDS = 4
NULL_DIMENSIONS = 2048
"""Coordinates of a simulated null at most. Far above T its means stay as they are and its ranges narrow, so few are cautious."""


@dataclass(frozen=True, slots=True)
class Linearity:
    """Three numbers about one path."""

    share: float
    r2_in_sample: float
    r2_forward: float


@dataclass(frozen=True, slots=True)
class LinearityEvidence:
    """A path's numbers beside the 90 % range of each null."""

    measured: Linearity
    nulls: dict[str, dict[str, tuple[float, float]]]


def linearity(gram_TT: Tensor, steps: Sequence[int]) -> Linearity:
    """Share and R² of one path; at least four steps, or ``TrajectoryError``."""
    return _measure(gram_TT, _lines(steps))


def linearity_with_nulls(
    gram_TT: Tensor, steps: Sequence[int], generator: torch.Generator, draws: int = 50, freedom: int = NULL_DIMENSIONS
) -> LinearityEvidence:
    """The same beside its nulls: 5 % and 95 % quantile of each statistic over ``draws`` simulations.

    ``freedom`` is in how many directions the tensor can move; a small one strays further by chance.
    """
    lines, dimensions = _lines(steps), min(freedom, NULL_DIMENSIONS)
    simulate: dict[str, Callable[[Tensor, torch.Generator, int], Tensor]] = {
        "noise": _noise,
        "walk": _walk,
        "permutation": _permuted,
    }
    nulls = {
        name: _ranges([_measure(draw(gram_TT, generator, dimensions), lines) for _ in range(draws)])
        for name, draw in simulate.items()
    }
    return LinearityEvidence(_measure(gram_TT, lines), nulls)


def line_weights(step_T: Tensor, at: float) -> Tensor:
    """Weights h_T such that Σ h_t y_t is the least-squares line through (step_t, y_t), evaluated at ``at``."""
    centred_T = step_T - step_T.mean()
    spread = (centred_T**2).sum()
    # A single step has no slope, and its line is level.
    slope_T = centred_T / spread if spread > 0 else torch.zeros_like(step_T)
    return torch.full_like(step_T, 1 / len(step_T)) + slope_T * (at - step_T.mean())


@dataclass(frozen=True, slots=True)
class _Lines:
    """What the steps alone decide: the hat matrix of a line, and what it and standing still miss of each later delta."""

    hat_TT: Tensor
    miss_LT: Tensor
    still_LT: Tensor


def _lines(steps: Sequence[int]) -> _Lines:
    """Fit on the first two thirds of the steps, score on the later L."""
    if len(steps) < NEEDS:
        raise TrajectoryError(
            f"linearity needs at least {NEEDS} steps, got {len(steps)}: {list(steps)}; save more often"
        )
    step_T = torch.tensor(steps, dtype=torch.float64)
    seen = max(2, 2 * len(steps) // 3)
    # Rows of weights over the deltas: an error is such a sum too, with the square eᵀ G e.
    later_LT = torch.eye(len(steps), dtype=torch.float64)[seen:]
    fitted_LT = torch.zeros_like(later_LT)
    fitted_LT[:, :seen] = torch.stack([line_weights(step_T[:seen], float(at)) for at in step_T[seen:]])
    still_LT = later_LT.clone()
    # Standing still means the last step that was seen.
    still_LT[:, seen - 1] -= 1
    return _Lines(torch.stack([line_weights(step_T, float(at)) for at in step_T]), later_LT - fitted_LT, still_LT)


def _measure(gram_TT: Tensor, lines: _Lines) -> Linearity:
    basis = temporal_basis(gram_TT)
    coord_T = basis.coords_TR[:, 0]
    miss, still = (float(torch.einsum("ls,st,lt->", e, gram_TT, e)) for e in (lines.miss_LT, lines.still_LT))
    total = float(((coord_T - coord_T.mean()) ** 2).sum())
    residual = float(((coord_T - lines.hat_TT @ coord_T) ** 2).sum())
    return Linearity(
        share=float(basis.energy_R[0]),
        r2_in_sample=1 - residual / total if total > 0 else 0.0,
        r2_forward=1 - miss / still if still > 0 else 0.0,
    )


def _ranges(draws: Sequence[Linearity]) -> dict[str, tuple[float, float]]:
    def quantiles(values: list[float]) -> tuple[float, float]:
        low, high = torch.tensor(values).quantile(torch.tensor([0.05, 0.95])).tolist()
        return low, high

    return {
        "share": quantiles([draw.share for draw in draws]),
        "r2_in_sample": quantiles([draw.r2_in_sample for draw in draws]),
        "r2_forward": quantiles([draw.r2_forward for draw in draws]),
    }


def _noise(gram_TT: Tensor, generator: torch.Generator, dimensions: int) -> Tensor:
    """Independent deltas of the same norms."""
    point_TD = torch.randn(len(gram_TT), dimensions, dtype=torch.float64, generator=generator)
    point_TD = point_TD / point_TD.norm(dim=1, keepdim=True) * gram_TT.diagonal().clamp_min(0).sqrt()[:, None]
    return point_TD @ point_TD.T


def _walk(gram_TT: Tensor, generator: torch.Generator, dimensions: int) -> Tensor:
    """A walk without drift whose increments have the sizes that the path's have."""
    # A row and a column of zeros for the base, where the walk starts.
    padded = torch.nn.functional.pad(gram_TT, (1, 0, 1, 0))
    # ‖Δ_t - Δ_{t-1}‖² = G_tt + G_{t-1,t-1} - 2 G_{t-1,t}.
    square_T = (padded.diagonal()[1:] + padded.diagonal()[:-1] - 2 * padded.diagonal(1)).clamp_min(0)
    increment_TD = torch.randn(len(gram_TT), dimensions, dtype=torch.float64, generator=generator)
    increment_TD = increment_TD / increment_TD.norm(dim=1, keepdim=True) * square_T.sqrt()[:, None]
    point_TD = increment_TD.cumsum(dim=0)
    return point_TD @ point_TD.T


def _permuted(gram_TT: Tensor, generator: torch.Generator, _: int) -> Tensor:
    order = torch.randperm(len(gram_TT), generator=generator)
    return gram_TT[order][:, order]
