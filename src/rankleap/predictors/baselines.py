"""What every leap has to beat: standing still, averaging, and the cheapest ways to go on.

hold           Ŵ = W_last
average        Ŵ = (1/n) Σ of the last n checkpoints: pure denoising, no extrapolation
ema            Ŵ = Σ w_t W_t / Σ w_t,  w_t = 2^(-(t_last - t)/half-life); by default a quarter of the window's steps
first-update   Ŵ(t′) = W_0 + (t′/t_1)·(W_t1 - W_0), t_1 the first checkpoint of the window: one update, repeated
repeat-last    Ŵ(t′) = W_n + (t′ - t_n)/(t_n - t_{n-1})·(W_n - W_{n-1}); by default once more

``first-update`` scaled a thousandfold matched 500 steps of training on MATH in an independent replication of RELEX.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankleap.predictors.forecast import Continues, Forecast, Origin, Predictor
from rankleap.trajectory import Trajectory


def only(trajectory: Trajectory, number: int) -> Tensor:
    """Weights that take one checkpoint as it is."""
    weight_T = torch.zeros(len(trajectory.steps), dtype=torch.float64)
    weight_T[number] = 1.0
    return weight_T


@dataclass(frozen=True, kw_only=True)
class Hold(Predictor):
    """No leap."""

    needs: ClassVar[int] = 1
    name: str = "hold"

    def fit(self, trajectory: Trajectory) -> Forecast:
        """The last checkpoint, whatever the target."""
        # For its check alone; the last checkpoint is in every window.
        self.first(trajectory)
        return self.shared(trajectory, trajectory.steps[-1], only(trajectory, -1))


@dataclass(frozen=True, kw_only=True)
class Average(Predictor):
    """The mean of the last ``window`` checkpoints."""

    needs: ClassVar[int] = 2
    name: str = "average"

    def fit(self, trajectory: Trajectory) -> Forecast:
        """The mean, whatever the target."""
        first = self.first(trajectory)
        weight_T = torch.zeros(len(trajectory.steps), dtype=torch.float64)
        weight_T[first:] = 1.0 / len(weight_T[first:])
        return self.shared(trajectory, trajectory.steps[-1], weight_T)


@dataclass(frozen=True, kw_only=True)
class Ema(Predictor):
    """A mean in which a checkpoint counts half as much every ``half_life`` steps back."""

    needs: ClassVar[int] = 2
    name: str = "ema"
    half_life: float | None = None

    def fit(self, trajectory: Trajectory) -> Forecast:
        """The weighted mean, whatever the target."""
        first = self.first(trajectory)
        step_T = torch.tensor(trajectory.steps, dtype=torch.float64)
        weight_T = torch.exp2((step_T - step_T[-1]) / (self.half_life or float(step_T[-1] - step_T[first]) / 4))
        weight_T[:first] = 0.0
        return self.shared(trajectory, trajectory.steps[-1], weight_T / weight_T.sum())


@dataclass(frozen=True, kw_only=True)
class FirstUpdate(Predictor):
    """The first checkpoint's delta, again and again."""

    needs: ClassVar[int] = 1
    continues: ClassVar[Continues] = "lines through the base"
    name: str = "first-update"
    origin: Origin = "base"

    def fit(self, trajectory: Trajectory) -> Forecast:
        """By default as many updates as the last checkpoint has steps."""
        first, steps = self.first(trajectory), trajectory.steps
        # A run may save its very start, and a delta of zero repeats at any pace.
        per_step_T = only(trajectory, first) / max(steps[first], 1)
        return self.shared(trajectory, steps[-1], torch.zeros_like(per_step_T), per_step_T)


@dataclass(frozen=True, kw_only=True)
class RepeatLast(Predictor):
    """The difference of the last two checkpoints, once more."""

    needs: ClassVar[int] = 2
    continues: ClassVar[Continues] = "any line"
    name: str = "repeat-last"

    def fit(self, trajectory: Trajectory) -> Forecast:
        """From the last checkpoint on, in proportion to the steps."""
        self.first(trajectory)
        before, last = trajectory.steps[-2:]
        per_step_T = (only(trajectory, -1) - only(trajectory, -2)) / (last - before)
        at_zero_T = only(trajectory, -1) - per_step_T * last
        return self.shared(trajectory, 2 * last - before, at_zero_T, per_step_T)
