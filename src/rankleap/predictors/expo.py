"""ExPO (2404.16792): on from the last checkpoint along all that it has moved since the base.

    Ŵ = W_last + α·(W_last - W_0)        α is the coefficient; a target step t′ stands for α = (t′ - t_last)/t_last

How we differ: a time axis beside the coefficient, so that it can be held against methods that have one; float32 throughout.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rankleap.predictors.baselines import only
from rankleap.predictors.forecast import Continues, Forecast, Predictor
from rankleap.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Expo(Predictor):
    """One checkpoint, no path."""

    needs: ClassVar[int] = 1
    continues: ClassVar[Continues] = "lines through the base"
    name: str = "expo"

    def fit(self, trajectory: Trajectory) -> Forecast:
        """By default as far again as the run has come: α = 1."""
        self.first(trajectory)
        last = max(trajectory.steps[-1], 1)
        per_step_T = only(trajectory, -1) / last
        return self.shared(trajectory, 2 * last, torch.zeros_like(per_step_T), per_step_T)
