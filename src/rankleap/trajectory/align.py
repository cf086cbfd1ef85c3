"""Gives the triplets of one matrix one identity over time: paired by overlap, one joint sign per (u, v).

The SVD fixes (u, v) only up to a joint sign, and σ₁ ≈ σ₂ lets triplets swap places. Walking back from the last step (the
reference), each triplet takes the partner with the largest |overlap| = |⟨u_t, u_{t+1}⟩·⟨v_t, v_{t+1}⟩| and the sign that
makes ⟨u_t, u_{t+1}⟩ and ⟨v_t, v_{t+1}⟩ positive. cos = √overlap, 0 where one of the two turned round alone: no joint sign mends
that. Where cos stays below 0.5 the identity is a guess, and is flagged.
Published code flips u alone or not at all (papers: 2510.00553, 2604.11446); a sign flipped midway reverses a forecast.

Shapes: T steps, M rows, R triplets, N columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

AMBIGUOUS_BELOW = 0.5


@dataclass(frozen=True, slots=True)
class AlignedFactors:
    """Factors of one matrix over time; ``cosine_TR`` compares each step with the next one (1 at the last)."""

    left_TMR: Tensor
    sigma_TR: Tensor
    right_TRN: Tensor
    cosine_TR: Tensor

    @property
    def ambiguous_TR(self) -> Tensor:
        """Where sign and pairing could not be told."""
        return self.cosine_TR < AMBIGUOUS_BELOW


def align(triplets: Sequence[tuple[Tensor, Tensor, Tensor]]) -> AlignedFactors:
    """Align ``(left_MR, sigma_R, right_RN)`` of successive steps, all of one rank, to the last step."""
    left_MR, sigma_R, right_RN = triplets[-1]
    aligned = [(left_MR, sigma_R, right_RN, torch.ones_like(sigma_R))]
    for left, sigma, right in reversed(triplets[:-1]):
        next_left_MR, _, next_right_RN, _ = aligned[-1]
        cos_left_RR, cos_right_RR = next_left_MR.T @ left, next_right_RN @ right.T
        # One to one: each triplet's own best partner could be the same for two of them.
        _, partner = linear_sum_assignment(-(cos_left_RR * cos_right_RR).abs().numpy())
        order = torch.from_numpy(partner)
        cos_left_R, cos_right_R = (cos_RR.gather(1, order[:, None])[:, 0] for cos_RR in (cos_left_RR, cos_right_RR))
        # The sum has the sign of the clearer of the two cosines.
        sign_R = torch.where(cos_left_R + cos_right_R < 0, -1.0, 1.0)
        cos_R = (cos_left_R * cos_right_R).clamp_min(0).sqrt()
        aligned.append((left[:, order] * sign_R, sigma[order], right[order] * sign_R[:, None], cos_R))
    columns = zip(*reversed(aligned), strict=True)
    return AlignedFactors(*(torch.stack(column) for column in columns))
