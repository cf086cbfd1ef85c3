"""Gives the triplets of one matrix one identity over time: paired by overlap, one joint sign per (u, v).

The SVD fixes (u, v) only up to a joint sign, and σ₁ ≈ σ₂ lets triplets swap places. Walking back from the last step (the
reference), each triplet takes the partner with the largest |overlap| = |⟨u_t, u_{t+1}⟩·⟨v_t, v_{t+1}⟩| and the sign that
makes ⟨u_t, u_{t+1}⟩ and ⟨v_t, v_{t+1}⟩ positive. cos = √overlap, 0 where one of the two turned round alone: no joint sign mends
that. Where cos stays below 0.5 the identity is a guess, and is flagged.
Published code flips u alone or not at all (papers: 2510.00553, 2604.11446); a sign flipped midway reverses a forecast.

Shapes: T steps, M rows, R triplets, N columns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import pad

from rankleap.checkpoints import Delta
from rankleap.lowrank import factorise

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


def leading_path(deltas: Iterable[Delta]) -> tuple[AlignedFactors, Tensor]:
    """The leading triplet (R = 1) of one matrix's last delta, followed back through the others, and ‖Δ‖_F of each (T).

    Two triplets of each step are kept until they are paired, so that σ₁ and σ₂ may change places on the way. Where a delta
    is zero its triplet is zero too, and nothing is ambiguous about it.
    """
    triplets: list[tuple[Tensor, Tensor, Tensor]] = []
    norms: list[float] = []
    for delta in deltas:
        found = factorise(delta, 2)
        missing = 2 - len(found.sigma_R)
        right_RN = pad(found.right_RN, (0, 0, 0, missing))
        triplets.append((pad(found.left_MR, (0, missing)), pad(found.sigma_R, (0, missing)), right_RN))
        norms.append(found.norm)
    both = align(triplets)
    cosine_TR = both.cosine_TR[:, :1]
    # A step is compared with the next one, so either of the two may be the one without a direction.
    still_TR = (both.sigma_TR[:, :1] == 0) | (torch.roll(both.sigma_TR[:, :1], -1, 0) == 0)
    cosine_TR = torch.where(still_TR, 1.0, cosine_TR)
    left_TMR, right_TRN = both.left_TMR[:, :, :1], both.right_TRN[:, :1]
    return AlignedFactors(left_TMR, both.sigma_TR[:, :1], right_TRN, cosine_TR), torch.tensor(norms)
