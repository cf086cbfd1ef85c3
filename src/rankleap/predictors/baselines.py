"""What every leap has to beat: standing still, and averaging.

hold       Ŵ = W_last
average    Ŵ = (1/n) Σ of the last n checkpoints: pure denoising, no extrapolation
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rankleap.predictors.forecast import Forecast, Origin, Predictor
from rankleap.trajectory import Trajectory


@dataclass(frozen=True)
class Hold(Predictor):
    """No leap."""

    name: ClassVar[str] = "hold"
    needs: ClassVar[int] = 1
    origin: ClassVar[Origin] = "last"

    def fit(self, trajectory: Trajectory) -> Forecast:
        """The last checkpoint, whatever the target."""
        # For its check alone; the last checkpoint is in every window.
        self.first(trajectory)
        weight_T = torch.zeros(len(trajectory.steps), dtype=torch.float64)
        weight_T[-1] = 1.0
        return self.shared(trajectory, trajectory.steps[-1], weight_T, torch.zeros_like(weight_T))


@dataclass(frozen=True)
class Average(Predictor):
    """The mean of the last ``window`` checkpoints."""

    name: ClassVar[str] = "average"
    needs: ClassVar[int] = 2
    origin: ClassVar[Origin] = "last"

    def fit(self, trajectory: Trajectory) -> Forecast:
        """The mean, whatever the target."""
        first = self.first(trajectory)
        weight_T = torch.zeros(len(trajectory.steps), dtype=torch.float64)
        weight_T[first:] = 1.0 / len(weight_T[first:])
        return self.shared(trajectory, trajectory.steps[-1], weight_T, torch.zeros_like(weight_T))
