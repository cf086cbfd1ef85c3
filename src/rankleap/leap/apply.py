"""Forecast + coefficient → the weights of a leap, one tensor at a time.

Ŵ = W_base + forecast.delta(name, step, coefficient)        float32, the origin already inside the forecast
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankleap.checkpoints import Delta, FullCheckpoint, LowRank, dense, inner
from rankleap.checkpoints.write import write_adapter, write_full
from rankleap.errors import InputError, NotFiniteError
from rankleap.files import require_space, write_aside, write_manifest
from rankleap.lowrank import factorise
from rankleap.predictors import Forecast
from rankleap.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Leap:
    """A forecast with the target and the coefficient decided; ``step`` of ``None`` is the method's own reach."""

    forecast: Forecast
    coefficient: float
    step: float | None = None

    @property
    def trajectory(self) -> Trajectory:
        """What the forecast was fitted on."""
        return self.forecast.trajectory

    def delta(self, name: str) -> Delta:
        """Delta of one tensor since the base."""
        return self.forecast.delta(name, self.step, self.coefficient)

    @property
    def target(self) -> float:
        """The step that is predicted, before the coefficient scales the way there."""
        return self.forecast.reach if self.step is None else self.step

    @property
    def start(self) -> int:
        """The origin's step."""
        return 0 if self.forecast.origin == "base" else self.trajectory.steps[-1]

    @property
    def ahead(self) -> float:
        """How many steps beyond the last checkpoint the leap claims to stand; 0 for one that only denoises."""
        return max(0.0, self.start + self.coefficient * (self.target - self.start) - self.trajectory.steps[-1])

    def describe(self) -> dict[str, object]:
        """What a manifest says of it."""
        last, target = self.trajectory.steps[-1], self.target
        facts = {"method": self.forecast.method, "origin": self.forecast.origin, "coefficient": self.coefficient}
        return {**facts, "from_step": last, "target_step": target, "forecast": self.forecast.to_json()}

    def directory_name(self) -> str:
        """``step-000400-c1.50``."""
        return f"step-{self.trajectory.steps[-1]:06d}-c{self.coefficient:.2f}"


def leap_weights(leap: Leap, base: FullCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the new checkpoint in float32; tensors that the trajectory does not know stay the base's."""
    for name in base.shapes:
        weight = base.weight(name)
        yield name, weight + dense(leap.delta(name)) if name in leap.trajectory.shapes else weight


def norm_ratio(leap: Leap) -> float:
    """‖leap - base‖ / ‖last checkpoint - base‖ over all tensors; infinite if the run has not moved but the leap has."""
    new, old = 0.0, 0.0
    for name in leap.trajectory.shapes:
        delta, last = leap.delta(name), leap.trajectory.delta(name, leap.trajectory.steps[-1])
        new, old = new + inner(delta, delta), old + inner(last, last)
    if old == 0:
        return 1.0 if new == 0 else math.inf
    return math.sqrt(new / old)


def write_leap(
    leap: Leap, base: FullCheckpoint, out: Path, evidence: dict[str, object], side_files: Path | None = None
) -> Path:
    """Write the leap in the base's format with a manifest of how it came about and what was held against it.

    Configuration and tokenizer come from ``side_files``, by default from the base.
    """
    require_space(out, base.size_bytes())
    with write_aside(out) as aside:
        loss = write_full(aside, leap_weights(leap, base), base, side_files or base.directory)
        write_manifest(aside, made_by="leap", leap=leap.describe(), rounding_loss=loss, **evidence)
    return out


def truncate(leap: Leap, rank: int) -> tuple[dict[str, LowRank], float]:
    """What of a leap an adapter of rank ``rank`` holds: a product per linear layer, and the share of ‖ΔW‖² that they keep.

    What moved elsewhere (embeddings, norms) is lost and counted; raises ``InputError`` if nothing is left.
    """
    products: dict[str, LowRank] = {}
    kept, total = 0.0, 0.0
    for name, shape in leap.trajectory.shapes.items():
        delta = leap.delta(name)
        square = inner(delta, delta)
        if not math.isfinite(square):
            raise NotFiniteError(f"{name} of the new adapter has NaN or infinity; nothing was written")
        total += square
        # PEFT gives embeddings keys of another kind, so what moves there counts as lost.
        if square > 0 and len(shape) == 2 and "embed" not in name and not name.startswith("lm_head"):
            factors = factorise(delta, min(rank, *shape))
            # σ is shared out evenly: neither factor is tiny beside the other when training goes on from them.
            half = factors.sigma_R.sqrt()
            products[name] = LowRank(factors.left_MR * half, half[:, None] * factors.right_RN)
            kept += float(torch.sum(factors.sigma_R.double() ** 2))
    if not products:
        raise InputError(
            "the leap moves no matrix of a linear layer that an adapter could hold; write a full checkpoint"
        )
    return products, kept / total if total else 1.0


def adapter_weights(leap: Leap, base: FullCheckpoint, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the base with the truncated leap added: what the adapter will be, for the gate to judge."""
    products, _ = truncate(leap, rank)
    for name in base.shapes:
        weight = base.weight(name)
        yield name, weight + dense(products[name]) if name in products else weight


def write_leap_adapter(
    leap: Leap, base: FullCheckpoint, out: Path, evidence: dict[str, object], *, rank: int, base_name: str
) -> Path:
    """Write the leap as a LoRA adapter of rank ``rank``; the manifest tells the share of ‖ΔW‖² that it keeps."""
    products, energy = truncate(leap, rank)
    with write_aside(out) as aside:
        write_adapter(
            aside, products, min(rank, max(p.left_MR.shape[1] for p in products.values())), base_name, base.directory
        )
        write_manifest(aside, made_by="leap", leap=leap.describe(), energy_kept=energy, **evidence)
    return out
