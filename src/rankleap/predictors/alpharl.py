"""AlphaRL (2510.00553 §4): each matrix's leading direction, as a line in the accuracy that it goes with.

    û_t = α_t σ₁ u₁ of W_t - W_0,  α_t = ‖ΔW‖_F/σ₁ (Eq. 3)        y_t: accuracy, or the step itself (``alpharl-step``)
    X = (û - mean)/std,  w ∝ Xᵀ(y - ȳ),  z = Xw,  y ≈ ȳ + a·z,  X ≈ z pᵀ        one-component partial least squares
    û(y*) = mean + std·p·(y* - ȳ)/a,        Ŵ = W_0 + û(y*) v₁ᵀ,  v₁ of the last one with a score

y* of a target step is the accuracy that a line through the measured ones reaches there, 1 at most; the default target is one
window ahead. The coefficient is the paper's λ: 0 the base, 1 the method's own (the paper's scan peaks near 0.7). Rescaling lets
one direction carry the norm of all, fivefold at a rank-1 share of 19 %; ``alpharl-unscaled`` is without α_t.
As in the paper embeddings, the head, norms and biases stay the base's.

How we differ: accuracies as they are (the paper divides by the final one, which a run does not know yet; its code aims at 1.7),
avg@k on a development split instead of pass@n on the test set; signs aligned with u and v together; added to the base, where the
code adds the whole prediction to a checkpoint that holds most of it already. R² in sample says nothing: noise has 0.99.

Shapes: S scored steps, M rows, N columns. float64 inside.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankleap.errors import TrajectoryError
from rankleap.predictors.forecast import Continues, Forecast, Origin, Predictor, RankOne
from rankleap.trajectory import Trajectory, leading_path, line_weights


@dataclass(frozen=True, kw_only=True)
class AlphaRL(Predictor):
    """A rank-1 update for each matrix; ``scores`` are pairs of step and accuracy, unused with ``on_step``."""

    needs: ClassVar[int] = 3
    continues: ClassVar[Continues] = "rank-one lines through the base"
    uses_scores: ClassVar[bool] = True
    name: str = "alpharl"
    origin: Origin = "base"
    scores: Sequence[tuple[int, float]] = ()
    rescaled: bool = True
    on_step: bool = False

    def fit(self, trajectory: Trajectory) -> Forecast:
        """One component per matrix; raises ``TrajectoryError`` for accuracies that are missing or do not rise."""
        steps, y_S, axis = self._progress(trajectory)
        products: dict[str, tuple[Tensor, Tensor]] = {}
        ambiguous: list[str] = []
        for name in self.matrices(trajectory):
            path, norm_S = leading_path(trajectory.delta(name, step) for step in steps)
            if not path.sigma_TR[-1]:
                continue
            if path.ambiguous_TR.any():
                ambiguous.append(name)
            length_S = norm_S if self.rescaled else path.sigma_TR[:, 0]
            left_M2 = inverted_pls((length_S[:, None] * path.left_TMR[:, :, 0]).double(), y_S)
            products[name] = left_M2.float(), path.right_TRN[-1]
        first, ceiling = trajectory.steps[self.first(trajectory)], float("inf") if self.on_step else 1.0
        reach = float(2 * trajectory.steps[-1] - first)
        return RankOne(
            self.name, self.origin, trajectory, reach, asdict(self), products, axis, ceiling, tuple(ambiguous)
        )

    def _progress(self, trajectory: Trajectory) -> tuple[list[int], Tensor, tuple[float, float]]:
        """Steps that count, y of each, and y as a line in the step."""
        seen = trajectory.steps[self.first(trajectory) :]
        if self.on_step:
            return list(seen), torch.tensor(seen, dtype=torch.float64), (0.0, 1.0)
        what_to_do = "evaluate every checkpoint on the development split (avg@k), or choose 'alpharl-step'"
        score_of = dict(self.scores)
        steps = [step for step in seen if step in score_of]
        if len(steps) < self.needs:
            missing = [step for step in seen if step not in score_of]
            raise TrajectoryError(
                f"{self.name} needs the accuracies of at least {self.needs} checkpoints, got {len(steps)} "
                f"(none for steps {missing}); {what_to_do}"
            )
        if wrong := [score_of[step] for step in steps if not 0 <= score_of[step] <= 1]:  # NaN is no accuracy either
            raise TrajectoryError(
                f"{self.name} needs accuracies between 0 and 1, got {wrong[0]:g}; divide percents by 100"
            )
        y_S, step_S = (torch.tensor(v, dtype=torch.float64) for v in ([score_of[s] for s in steps], steps))
        at_zero, at_one = (float(line_weights(step_S, at) @ y_S) for at in (0.0, 1.0))
        # A falling line would aim at something worse than what is there.
        if not at_one - at_zero > 1e-12:
            found = ", ".join(f"{score:g}" for score in y_S.tolist())
            raise TrajectoryError(
                f"{self.name} needs accuracies that rise over its checkpoints, got {found}; {what_to_do}"
            )
        return steps, y_S, (at_zero, at_one - at_zero)


def inverted_pls(path_SM: Tensor, y_S: Tensor) -> Tensor:
    """What one component of partial least squares says of the path at any y: its value at 0 and its slope, M × 2."""
    mean_M, spread_M = path_SM.mean(0), path_SM.std(0)
    standard_SM = (path_SM - mean_M) / torch.where(spread_M > 0, spread_M, 1.0)
    centred_S = y_S - y_S.mean()
    z_S = standard_SM @ (standard_SM.T @ centred_S)
    # z ∝ Xw; its scale cancels. A path that does not go with y has no slope.
    agreement = float(z_S @ centred_S)
    slope_M = spread_M * (standard_SM.T @ z_S) / agreement if agreement > 0 else torch.zeros_like(mean_M)
    return torch.stack([mean_M - slope_M * y_S.mean(), slope_M], dim=1)
