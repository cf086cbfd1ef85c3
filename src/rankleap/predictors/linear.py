"""Straight lines through the weights.

    weight-linear   the least-squares line of W against the step over the window; with two checkpoints this is
                    W_t1 + (t′-t1)/(t1-t0)·(W_t1 - W_t0), RLVR-Linearity's extrapolation (2601.04537)
    window          Ŵ(t′) = W_last + (t′ - t_last)·(W̄_late - W̄_early)/(t̄_late - t̄_early), the halves of the window averaged

How we differ from 2601.04537: any number of checkpoints at any spacing; norms are extrapolated like all else;
float32 throughout. By default both look one window ahead.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rankleap.predictors.forecast import Continues, Forecast, Predictor
from rankleap.trajectory import Trajectory, line_weights


@dataclass(frozen=True, kw_only=True)
class WeightLinear(Predictor):
    """The least-squares line through the last checkpoints."""

    needs: ClassVar[int] = 2
    continues: ClassVar[Continues] = "any line"
    name: str = "weight-linear"

    def fit(self, trajectory: Trajectory) -> Forecast:
        """Fit on the window; the same line for every tensor, since its weights depend on the steps alone."""
        first = self.first(trajectory)
        step_T = torch.tensor(trajectory.steps, dtype=torch.float64)
        at_zero_T, at_one_T = torch.zeros_like(step_T), torch.zeros_like(step_T)
        # The weights are linear in the target step, so two targets give all of them.
        at_zero_T[first:], at_one_T[first:] = line_weights(step_T[first:], 0.0), line_weights(step_T[first:], 1.0)
        reach = float(2 * step_T[-1] - step_T[first])
        return self.shared(trajectory, reach, at_zero_T, at_one_T - at_zero_T)


@dataclass(frozen=True, kw_only=True)
class Window(Predictor):
    """From the last checkpoint along the difference of two averaged halves."""

    needs: ClassVar[int] = 2
    continues: ClassVar[Continues] = "any line"
    name: str = "window"

    def fit(self, trajectory: Trajectory) -> Forecast:
        """Average the halves of the window; of an odd number the middle one counts for neither."""
        first = self.first(trajectory)
        step_T = torch.tensor(trajectory.steps, dtype=torch.float64)
        half = (len(step_T) - first) // 2
        early_T, late_T = torch.zeros_like(step_T), torch.zeros_like(step_T)
        # At least one on each side, since ``needs`` is 2.
        early_T[first : first + half], late_T[-half:] = 1 / half, 1 / half
        # Steps between the centres of the two halves, whatever the spacing.
        apart = float((late_T - early_T) @ step_T)
        per_step_T = (late_T - early_T) / apart
        at_zero_T = -per_step_T * step_T[-1]
        # At the last step the slope cancels, and W_last is left.
        at_zero_T[-1] += 1.0
        return self.shared(trajectory, float(step_T[-1]) + apart, at_zero_T, per_step_T)
