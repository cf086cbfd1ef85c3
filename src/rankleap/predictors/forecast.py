"""The contract of the family: ``Predictor.fit(trajectory)`` gives a ``Forecast``; a forecast gives deltas since the base.

    forecast.delta(name, step, coefficient) = origin + coefficient · (prediction(step) - origin)

``origin`` is what the leap starts from, explicitly: ``base`` (W₀: RELEX, AlphaRL's paper) or ``last`` (the newest
checkpoint: NExt). Coefficient 0 is the origin, 1 the method's own prediction. Everything is measured since the base, so
nothing can be added twice.

Shapes: T steps of the trajectory.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankleap.checkpoints import Delta, combine
from rankleap.errors import TrajectoryError
from rankleap.trajectory import Trajectory

Origin = Literal["base", "last"]
SHARED = "*"
"""Key of a line that holds for every tensor."""


class Forecast(ABC):
    """A fitted predictor."""

    method: str
    origin: Origin
    trajectory: Trajectory
    reach: float

    @abstractmethod
    def delta(self, name: str, step: float | None = None, coefficient: float = 1.0) -> Delta:
        """Delta of one tensor since the base, predicted for ``step`` (default: ``reach``), scaled from the origin."""

    @abstractmethod
    def to_json(self) -> dict[str, object]:
        """Everything but the trajectory, for a manifest; the forecast's own ``from_json`` reads it back."""


@dataclass(frozen=True, slots=True)
class Line:
    """Mixing weights over the steps that move in a straight line: ``a_T(step) = at_zero_T + per_step_T · step``."""

    at_zero_T: Tensor
    per_step_T: Tensor

    def at(self, step: float) -> Tensor:
        """Weights for one target step."""
        return self.at_zero_T + self.per_step_T * step


@dataclass(frozen=True, slots=True)
class Mixture(Forecast):
    """A forecast whose deltas are weighted sums of the recorded ones: what every linear method is.

    From LoRA checkpoints such a sum stays a product; no dense matrix is formed.
    """

    method: str
    origin: Origin
    trajectory: Trajectory
    reach: float
    lines: Mapping[str, Line]

    def weights(self, name: str, step: float | None = None, coefficient: float = 1.0) -> Tensor:
        """a_T of ``Σ_t a_t Δ_t``, float64, the origin included."""
        line = self.lines.get(name) or self.lines[SHARED]
        # All deltas are since the base, so the base itself weighs none of them.
        origin_T = torch.zeros(len(self.trajectory.steps), dtype=torch.float64)
        if self.origin == "last":
            origin_T[-1] = 1.0
        target_T = line.at(self.reach if step is None else step)
        return origin_T + coefficient * (target_T - origin_T)

    def delta(self, name: str, step: float | None = None, coefficient: float = 1.0) -> Delta:
        """Delta of one tensor since the base; steps that weigh nothing are not read."""
        weight_T = self.weights(name, step, coefficient)
        used = [(float(w), s) for w, s in zip(weight_T, self.trajectory.steps, strict=True) if w != 0]
        # Every weight zero is the base: a zero delta that has the shape and kind of a real one.
        used = used or [(0.0, self.trajectory.steps[-1])]
        return combine((w, self.trajectory.delta(name, s)) for w, s in used)

    def to_json(self) -> dict[str, object]:
        """Settings and weights as plain values."""
        lines = {n: [line.at_zero_T.tolist(), line.per_step_T.tolist()] for n, line in self.lines.items()}
        steps = list(self.trajectory.steps)
        return {"method": self.method, "origin": self.origin, "steps": steps, "reach": self.reach, "lines": lines}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any], trajectory: Trajectory) -> "Mixture":
        """Read what ``to_json`` gave, for the trajectory that it was fitted on."""
        if saved["steps"] != list(trajectory.steps):
            raise TrajectoryError(f"the forecast was fitted on steps {saved['steps']}, got {list(trajectory.steps)}")
        lines = {
            name: Line(*(torch.tensor(part, dtype=torch.float64) for part in parts))
            for name, parts in saved["lines"].items()
        }
        return cls(saved["method"], saved["origin"], trajectory, saved["reach"], lines)


@dataclass(frozen=True)
class Predictor(ABC):
    """Settings of a method; ``window`` is how many of the newest checkpoints it looks at (``None``: all)."""

    name: ClassVar[str]
    needs: ClassVar[int]
    origin: ClassVar[Origin]
    window: int | None = None

    @abstractmethod
    def fit(self, trajectory: Trajectory) -> Forecast:
        """Fit; raises ``TrajectoryError`` that names the method when there are too few checkpoints."""

    def first(self, trajectory: Trajectory) -> int:
        """Index of the first step in the window; checks that there are enough."""
        steps = trajectory.steps
        seen = len(steps) if self.window is None else min(self.window, len(steps))
        if seen < self.needs:
            raise TrajectoryError(
                f"{self.name} needs at least {self.needs} checkpoints, got {seen} (steps {list(steps[-seen:])}); "
                "save more often or choose 'hold'"
            )
        return len(steps) - seen

    def shared(self, trajectory: Trajectory, reach: float, at_zero_T: Tensor, per_step_T: Tensor) -> Mixture:
        """A mixture with one line for all tensors."""
        return Mixture(self.name, self.origin, trajectory, reach, {SHARED: Line(at_zero_T, per_step_T)})
