"""Reduced-rank extrapolation (Eddy 1979; Mesina 1977): the point at which the path would come to rest.

    U_t = (W_{t+1} - W_t)/(step_{t+1} - step_t)        γ = argmin ‖Σ γ_t U_t‖, Σ γ_t = 1        Ŵ = Σ γ_t W_{t+1}

Exact where the path is a sum of fewer geometric decays than there are differences, at even spacing. All tensors share one γ,
from the sum of their Gram matrices: the iteration that comes to rest is the whole model's, and one tensor alone has noisier
differences. A nearly straight path comes to rest far away or nowhere: ‖Ŵ - W_last‖ is at most ``cap`` times the window's own way.

Shapes: T steps, U = T - 1 differences.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankleap.predictors.baselines import only
from rankleap.predictors.forecast import Forecast, Predictor
from rankleap.trajectory import Trajectory

RIDGE = 1e-10
"""Of the trace: below it, float32 deltas have only rounding."""


@dataclass(frozen=True, kw_only=True)
class ReducedRank(Predictor):
    """The resting point of a path that bends."""

    needs: ClassVar[int] = 3
    name: str = "reduced-rank"
    cap: float = 1.0

    def fit(self, trajectory: Trajectory) -> Forecast:
        """The resting point, whatever the target."""
        first = self.first(trajectory)
        gram_TT = torch.stack([trajectory.gram(name, first) for name in trajectory.shapes]).sum(0)
        rest_T = resting_weights(gram_TT, torch.tensor(trajectory.steps[first:], dtype=torch.float64))
        last_T, first_T = (only(trajectory, number)[first:] for number in (-1, first))
        far, moved = (float(way_T @ gram_TT @ way_T) ** 0.5 for way_T in (rest_T - last_T, first_T - last_T))
        shrink = min(1.0, self.cap * moved / far) if far > 0 else 1.0
        weight_T = torch.nn.functional.pad(last_T + shrink * (rest_T - last_T), (first, 0))
        return self.shared(trajectory, trajectory.steps[-1], weight_T)


def resting_weights(gram_TT: Tensor, step_T: Tensor) -> Tensor:
    """Weights of the checkpoints whose velocity is smallest, from the Gram matrix of their deltas."""
    velocity_UT = torch.eye(len(step_T), dtype=torch.float64).diff(dim=0) / step_T.diff()[:, None]
    square_UU = velocity_UT @ gram_TT @ velocity_UT.T
    # Scale-free; the path that never moved has a trace of zero and weighs all its points alike.
    ridge = RIDGE * float(square_UU.trace()) + torch.finfo(torch.float64).tiny
    system_UU = square_UU + ridge * torch.eye(len(square_UU), dtype=torch.float64)
    share_U = torch.linalg.solve(system_UU / ridge, torch.ones(len(square_UU), dtype=torch.float64))
    return torch.nn.functional.pad(share_U / share_U.sum(), (1, 0))
