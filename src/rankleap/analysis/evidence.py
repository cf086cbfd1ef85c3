"""Rank-1 dominance and linearity of every matrix, beside what chance would show on the same shape.

    in space   share of σ₁ in the last delta, three conventions; null: a Gaussian matrix of the same shape
    over time  share of the first temporal component and R², in sample and forward; nulls of ``trajectory.linearity``

No number leaves here without its null (the 90 % range of simulations).
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from rankleap.checkpoints import Delta, LowRank, is_zero
from rankleap.files import write_json
from rankleap.lowrank import factorise, gram, rank_one_shares
from rankleap.trajectory import Trajectory, linearity_with_nulls

SHARE_DRAWS = 20


def evidence(trajectory: Trajectory, seed: int = 0, draws: int = 20) -> dict[str, object]:
    """Evidence for every matrix that moved, as plain values; at least four steps."""
    generator = torch.Generator().manual_seed(seed)
    nulls: dict[tuple[tuple[int, ...], int], dict[str, list[float]]] = {}
    tensors: list[dict[str, object]] = []
    for name, shape in trajectory.shapes.items():
        deltas = trajectory.deltas(name)
        # A vector has no spectrum, and what has not moved no direction.
        if len(shape) != 2 or is_zero(deltas[-1]):
            continue
        key = (shape, _rank(deltas[-1]))
        # A null depends on shape and rank alone, so layers of one shape share it.
        if key not in nulls:
            nulls[key] = _share_null(*key, generator)
        freedom = key[1] * (sum(shape) - key[1])  # of the matrices of this shape and rank
        path = linearity_with_nulls(gram(deltas), trajectory.steps, generator, draws, freedom)
        share = rank_one_shares(factorise(deltas[-1], 1))
        facts = {"name": name, "shape": list(shape), "share": share, "share_null": nulls[key]}
        tensors.append({**facts, "path": asdict(path.measured), "nulls": path.nulls})
    return {"steps": list(trajectory.steps), "tensors": tensors}


def write_evidence(trajectory: Trajectory, directory: Path) -> dict[str, object]:
    """Write ``analysis/evidence.json`` into a run directory."""
    found = evidence(trajectory)
    write_json(directory / "analysis" / "evidence.json", found)
    return found


def _rank(delta: Delta) -> int:
    """The largest rank that the delta can have: an adapter's null has the adapter's rank, not the matrix's."""
    return min(*delta.shape, delta.left_MR.shape[1]) if isinstance(delta, LowRank) else min(delta.shape)


def _share_null(shape: tuple[int, ...], rank: int, generator: torch.Generator) -> dict[str, list[float]]:
    rows, columns = shape
    draws: list[dict[str, float | None]] = []
    for _ in range(SHARE_DRAWS):
        if rank == min(shape):
            null: Delta = torch.randn(rows, columns, generator=generator)
        else:
            # Two Gaussian factors, as an adapter has: the spectrum of their product is not a Gaussian matrix's.
            null = LowRank(
                torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
            )
        draws.append(rank_one_shares(factorise(null, 1)))
    return {kind: _range([value for draw in draws if (value := draw[kind]) is not None]) for kind in draws[0]}


def _range(values: Sequence[float]) -> list[float]:
    return torch.tensor(values).quantile(torch.tensor([0.05, 0.95])).tolist() if values else []
