"""The contract of the family: ``Predictor.fit(trajectory)`` gives a ``Forecast``; a forecast gives deltas since the base.

    forecast.delta(name, step, coefficient) = origin + coefficient · (prediction(step) - origin)

``origin`` is what the leap starts from, explicitly: ``base`` (W₀: RELEX, AlphaRL's paper) or ``last`` (the newest
checkpoint: NExt). Coefficient 0 is the origin, 1 the method's own prediction. Everything is measured since the base, so
nothing can be added twice.

Shapes: T steps of the trajectory; M rows and N columns of a matrix.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankleap.checkpoints import Delta, LowRank, combine
from rankleap.errors import TrajectoryError
from rankleap.trajectory import Trajectory

Origin = Literal["base", "last"]
Continues = Literal["any line", "lines through the base", "rank-one lines through the base", "nothing"]
"""Which straight paths a method continues exactly."""
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
        """Everything but the trajectory, for a manifest; ``read_forecast`` reads it back."""

    def target(self, step: float | None = None) -> float:
        """The step that is meant (default: ``reach``); raises ``TrajectoryError`` when it is behind the origin."""
        first, step = 0 if self.origin == "base" else self.trajectory.steps[-1], self.reach if step is None else step
        if not step >= first:  # NaN is nowhere ahead
            raise TrajectoryError(
                f"{self.method} cannot leap to step {step:g}, behind its origin ({self.origin}); "
                f"choose a step from {first} on, or fit on fewer checkpoints"
            )
        return step


def require_same_steps(saved: Mapping[str, Any], trajectory: Trajectory) -> None:
    """Raise ``TrajectoryError`` unless a saved forecast was fitted on these steps."""
    if saved["steps"] != list(trajectory.steps):
        raise TrajectoryError(f"the forecast was fitted on steps {saved['steps']}, got {list(trajectory.steps)}")


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
        target_T = line.at(self.target(step))
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
        require_same_steps(saved, trajectory)
        lines = {
            name: Line(*(torch.tensor(part, dtype=torch.float64) for part in parts))
            for name, parts in saved["lines"].items()
        }
        return cls(saved["method"], saved["origin"], trajectory, saved["reach"], lines)


@dataclass(frozen=True, slots=True)
class RankOne(Forecast):
    """A forecast that adds one product to each matrix: ``origin + coefficient · (at_zero_M + per_unit_M · y) right_N``.

    ``y`` is a line in the step, at most ``ceiling``. Tensors without a product stay at the origin.
    """

    method: str
    origin: Origin
    trajectory: Trajectory
    reach: float
    settings: Mapping[str, object]
    products: Mapping[str, tuple[Tensor, Tensor]]
    """``at_zero_M`` and ``per_unit_M`` as columns, ``right_N`` as a row."""
    axis: tuple[float, float]
    ceiling: float
    ambiguous: tuple[str, ...]
    """Matrices in which a sign is a guess (``trajectory.align``)."""

    def delta(self, name: str, step: float | None = None, coefficient: float = 1.0) -> Delta:
        """Delta of one tensor since the base; a matrix moves by a product of rank 1."""
        at_zero, per_step = self.axis
        y = min(at_zero + per_step * self.target(step), self.ceiling)
        terms: list[tuple[float, Delta]] = []
        if name in self.products and coefficient != 0:
            left_M2, right_1N = self.products[name]
            terms.append((coefficient, LowRank(left_M2 @ torch.tensor([[1.0], [y]]), right_1N)))
        # The last delta also gives the base's zero its shape and kind.
        if self.origin == "last" or not terms:
            last = self.trajectory.delta(name, self.trajectory.steps[-1])
            terms.insert(0, (1.0 if self.origin == "last" else 0.0, last))
        return combine(terms)

    def to_json(self) -> dict[str, object]:
        """The settings: fitting again gives the same bits, and the products would be megabytes."""
        facts = {"method": self.method, "origin": self.origin, "steps": list(self.trajectory.steps)}
        return {**facts, "reach": self.reach, "settings": self.settings, "ambiguous": list(self.ambiguous)}


@dataclass(frozen=True, kw_only=True)
class Predictor(ABC):
    """Settings of a method; ``window`` is how many of the newest checkpoints it looks at (``None``: all)."""

    needs: ClassVar[int]
    continues: ClassVar[Continues] = "nothing"
    uses_scores: ClassVar[bool] = False
    """Whether there is a field ``scores`` for pairs of a step and its accuracy."""
    name: str
    origin: Origin = "last"
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

    def matrices(self, trajectory: Trajectory) -> list[str]:
        """Matrices of linear layers, which the published rank-1 methods move; raises ``TrajectoryError`` for fused experts."""
        if fused := [name for name, shape in trajectory.shapes.items() if len(shape) == 3]:
            raise TrajectoryError(
                f"{self.name} reads matrices, {fused[0]} holds fused experts; choose 'relex' or 'window'"
            )
        kinds = ("embed", "lm_head")
        return [n for n, shape in trajectory.shapes.items() if len(shape) == 2 and not any(kind in n for kind in kinds)]

    def shared(
        self, trajectory: Trajectory, reach: float, at_zero_T: Tensor, per_step_T: Tensor | None = None
    ) -> Mixture:
        """A mixture with one line for all tensors; by default a level one, whatever the target."""
        line = Line(at_zero_T, torch.zeros_like(at_zero_T) if per_step_T is None else per_step_T)
        return Mixture(self.name, self.origin, trajectory, reach, {SHARED: line})
