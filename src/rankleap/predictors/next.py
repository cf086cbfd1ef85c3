"""NExt (2604.11446): a small network says where a matrix's leading direction goes next, and how strongly.

    ΔG_i = W_i - W_0    ΔL_i = W_i - W_{i-1}    ΔT_i = W_{i+k} - W_i        each by its (σ₁, u₁, v₁)
    ŝ = Dec(E_G(s_G) ‖ E_L(s_L)) for s ∈ {u, v, σ},   L1 loss,   Ŵ = W_last + α·σ̂ û v̂ᵀ        α: the coefficient

One network for all u of one length, one for all v of one length, one for σ, over all matrices at once. k is a third of the
window (5 of 15, as published); the default target is k checkpoints on, other steps are reached in proportion.

How we differ: u and v of ΔL and ΔT take the sign that they have in ΔG, which is aligned over time (the published code aligns
nothing, and half of its targets may point backwards); tensors that never moved are neither trained on nor written; each of G, L
and T is scaled to unit mean square, û and v̂ start as s_G + s_L and the network learns what to add: width 64 and 60 updates
then err no more than width 256 and 100 (docs/log.md). Norms and biases stay the last checkpoint's (under LoRA they never move).

Shapes: E examples, Q matrices, M rows, N columns, D numbers of one vector; ``_3``: G, L, T. Seeded; bit-equal on a CPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, relu

from rankleap.checkpoints import combine
from rankleap.errors import TrajectoryError
from rankleap.lowrank import factorise
from rankleap.predictors.forecast import Forecast, Predictor, RankOne
from rankleap.trajectory import Trajectory, leading_path
from rankleap.trajectory.align import AMBIGUOUS_BELOW


@dataclass(frozen=True, slots=True)
class Examples:
    """Triplets of one matrix: every row an example but the last, which is the question and has no T."""

    parts: tuple[Tensor, ...]
    """``left_E3M``, ``sigma_E31``, ``right_E3N``."""
    ambiguous: bool


@dataclass(frozen=True, kw_only=True)
class NExt(Predictor):
    """``horizon`` is k in checkpoints; the rest is about the networks."""

    needs: ClassVar[int] = 3
    name: str = "next"
    horizon: int | None = None
    hidden: int = 64
    updates: int = 60
    learning_rate: float = 2e-3
    seed: int = 0

    def fit(self, trajectory: Trajectory) -> Forecast:
        """Factor all matrices, train, and keep the one answer of each."""
        seen = trajectory.steps[self.first(trajectory) :]
        ahead = self.horizon or max(1, len(seen) // 3)
        if len(seen) < ahead + 2:
            raise TrajectoryError(
                f"{self.name} needs at least {ahead + 2} checkpoints to look {ahead} on, got {len(seen)}"
            )
        found = {name: self._examples(trajectory, name, seen, ahead) for name in self.matrices(trajectory)}
        moving = {name: examples for name, examples in found.items() if examples is not None}
        generator = torch.Generator().manual_seed(self.seed)
        left_M, sigma_1, right_N = (
            self._answers({name: examples.parts[part] for name, examples in moving.items()}, generator)
            for part in range(3)
        )
        products: dict[str, tuple[Tensor, Tensor]] = {}
        for name in moving:
            move_M = normalize(left_M[name], dim=0) * sigma_1[name].clamp_min(0)
            products[name] = torch.stack([torch.zeros_like(move_M), move_M], 1), normalize(right_N[name], dim=0)[None]
        # The mean number of steps that a target lies ahead, whatever their spacing.
        apart = sum(later - step for step, later in zip(seen, seen[ahead:], strict=False)) / (len(seen) - ahead)
        axis = -seen[-1] / apart, 1 / apart
        ambiguous = tuple(name for name, examples in moving.items() if examples.ambiguous)
        reach = seen[-1] + apart
        return RankOne(self.name, self.origin, trajectory, reach, asdict(self), products, axis, float("inf"), ambiguous)

    def _examples(self, trajectory: Trajectory, name: str, seen: Sequence[int], ahead: int) -> Examples | None:
        """Triplets of one matrix; ``None`` if it stands still or nothing ahead of any step is known."""

        def triplet(step: int, since: int | None) -> tuple[Tensor, Tensor, Tensor]:
            parts = [(1.0, trajectory.delta(name, step))]
            parts += [] if since is None else [(-1.0, trajectory.delta(name, since))]
            found = factorise(combine(parts), 1)
            if not len(found.sigma_R):
                return torch.zeros(len(found.left_MR)), torch.zeros(1), torch.zeros(found.right_RN.shape[1])
            return found.left_MR[:, 0], found.sigma_R, found.right_RN[0]

        path, _ = leading_path(trajectory.delta(name, step) for step in seen)
        rows: list[tuple[Tensor, ...]] = []
        ambiguous = bool(path.ambiguous_TR.any())
        # The step before the window is not seen; before the first of all there is the base.
        start = 0 if seen[0] == trajectory.steps[0] else 1
        for i in (*range(start, len(seen) - ahead), len(seen) - 1):
            reference = path.left_TMR[i, :, 0], path.sigma_TR[i], path.right_TRN[i, 0]
            local = triplet(seen[i], seen[i - 1] if i else None)
            target = triplet(seen[i + ahead], seen[i]) if i + ahead < len(seen) else reference
            turned = [like(reference, other) for other in (local, target)]
            stands = not all(bool(part[1]) for part in (reference, local, target))
            # An example without one of its three directions teaches nothing; the question needs only the first.
            if not stands or (i == len(seen) - 1 and bool(reference[1])):
                ambiguous |= any(guessed for _, guessed in turned)
                rows.append(tuple(torch.stack(part) for part in zip(reference, *(t for t, _ in turned), strict=True)))
        if len(rows) < 2 or not path.sigma_TR[-1]:
            return None
        return Examples(tuple(torch.stack(part) for part in zip(*rows, strict=True)), ambiguous)

    def _answers(self, rows: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The answer of every matrix; those with vectors of one length share a network."""
        answers: dict[str, Tensor] = {}
        for length in sorted({rows_E3D.shape[2] for rows_E3D in rows.values()}):
            group = {name: rows_E3D for name, rows_E3D in rows.items() if rows_E3D.shape[2] == length}
            examples_E3D = torch.cat([rows_E3D[:-1] for rows_E3D in group.values()])
            question_Q2D = torch.stack([rows_E3D[-1, :2] for rows_E3D in group.values()])
            answers |= dict(zip(group, self._trained(examples_E3D, question_Q2D, generator), strict=True))
        return answers

    def _trained(self, examples_E3D: Tensor, question_Q2D: Tensor, generator: torch.Generator) -> Tensor:
        """Train one network and ask it, Q × D."""
        scale_31 = examples_E3D.square().mean((0, 2)).sqrt()[:, None]
        examples_E3D, question_Q2D = examples_E3D / scale_31, question_Q2D / scale_31[:2]
        length, width = examples_E3D.shape[2], self.hidden
        sizes = [(length, width), (length, width), (2 * width, width), (width, length)]
        layers = [
            (torch.randn(size, generator=generator) * (2 / size[0]) ** 0.5, torch.zeros(size[1])) for size in sizes
        ]
        # The answer starts as what is known, and the network at nothing.
        layers[-1][0].zero_()
        parameters = [part.requires_grad_() for layer in layers for part in layer]

        def answer(known_B2D: Tensor) -> Tensor:
            (global_DH, a), (local_DH, b), (mix_CH, c), (out_HD, d) = layers
            code = torch.cat([relu(known_B2D[:, 0] @ global_DH + a), relu(known_B2D[:, 1] @ local_DH + b)], dim=1)
            return known_B2D[:, :2].mean(1) + relu(code @ mix_CH + c) @ out_HD + d

        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.updates, self.learning_rate / 10)
        with torch.enable_grad():
            for _ in range(self.updates):
                loss = (answer(examples_E3D) - examples_E3D[:, 2]).abs().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            return answer(question_Q2D) * scale_31[2]


def like(reference: tuple[Tensor, ...], triplet: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], bool]:
    """A triplet with the joint sign that agrees with a reference, and whether that was a guess."""
    (left_M, _, right_N), (other_M, sigma_1, other_N) = reference, triplet
    cosines = float(left_M @ other_M), float(right_N @ other_N)
    sign = -1.0 if sum(cosines) < 0 else 1.0
    guessed = max(cosines[0] * cosines[1], 0.0) < AMBIGUOUS_BELOW**2 and bool(sigma_1)
    return (sign * other_M, sigma_1, sign * other_N), guessed
