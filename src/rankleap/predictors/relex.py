"""RELEX (2605.21468): the first temporal component of each tensor, extended along a line.

    Δ_t = W_t - W_0,  G = ΔΔᵀ,  v₁ = top uncentred direction over time,  c_t = ⟨Δ_t, v₁⟩
    c_t ≈ a·t + b by least squares,  Ŵ(t′) = W_0 + (a·t′ + b)·v₁

v₁ is itself a mixture of the deltas (``TemporalBasis.mix_RT``), so the forecast is one too. u and v flip together: no sign
problem. Its share of energy is not evidence of drift: a driftless walk has 0.81 (see ``trajectory.linearity``).

``relex-shrunk`` starts from the last checkpoint instead, W_last + λ·(Ŵ(t′) - W_last): its coefficient is the λ that keeps an
extrapolation near what is known to work, where the plain one has destroyed models.

How we differ: steps instead of checkpoint indices, float32 deltas instead of float16 ones, and no hidden factor on the
target. By default ``relex`` aims at the last step itself and only denoises; ``relex-shrunk`` looks one window ahead.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rankleap.lowrank import temporal_basis
from rankleap.predictors.forecast import Continues, Forecast, Line, Mixture, Origin, Predictor
from rankleap.trajectory import Trajectory, line_weights


@dataclass(frozen=True, kw_only=True)
class Relex(Predictor):
    """Rank 1 over time, linear in the step."""

    needs: ClassVar[int] = 2
    continues: ClassVar[Continues] = "lines through the base"
    name: str = "relex"
    origin: Origin = "base"

    def fit(self, trajectory: Trajectory) -> Forecast:
        """One basis and one line per tensor."""
        first = self.first(trajectory)
        step_T = torch.tensor(trajectory.steps, dtype=torch.float64)
        lines = {name: self._line(trajectory, name, first, step_T) for name in trajectory.shapes}
        ahead = step_T[-1] - step_T[first] if self.origin == "last" else 0
        return Mixture(self.name, self.origin, trajectory, float(step_T[-1] + ahead), lines)

    def _line(self, trajectory: Trajectory, name: str, first: int, step_T: torch.Tensor) -> Line:
        basis = temporal_basis(trajectory.gram(name, first))
        # The intercept stays, as published: the line need not pass through the base.
        at_zero, at_one = (float(line_weights(step_T[first:], at) @ basis.coords_TR[:, 0]) for at in (0.0, 1.0))
        mix_T = torch.nn.functional.pad(basis.mix_RT[0], (first, 0))
        return Line(at_zero * mix_T, (at_one - at_zero) * mix_T)
