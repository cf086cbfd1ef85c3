"""Rank-1 dominance and linearity of every matrix, beside what chance would show on the same shape.

    in space   share of σ₁ in the last delta, three conventions; null: a Gaussian matrix of the same shape
    over time  share of the first temporal component and R², in sample and forward; nulls of ``trajectory.linearity``

No number leaves here without its null (the 90 % range of simulations).
"""

from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors.torch import save_file

from rankleap.checkpoints import Delta, LowRank, is_zero
from rankleap.errors import UnknownNameError
from rankleap.files import write_aside, write_json
from rankleap.lowrank import factorise, rank_one_shares
from rankleap.lowrank.factors import base_basis, energy_in_base, spectrum
from rankleap.trajectory import CheckpointTrajectory, Trajectory, linearity_with_nulls

SHARE_DRAWS = 20


def evidence(trajectory: Trajectory, seed: int = 0, draws: int = 20) -> dict[str, object]:
    """Evidence for every matrix that moved, as plain values; at least four steps."""
    generator = torch.Generator().manual_seed(seed)
    nulls: dict[tuple[tuple[int, ...], int], dict[str, list[float]]] = {}
    tensors: list[dict[str, object]] = []
    for name, shape in trajectory.shapes.items():
        # A vector has no spectrum, and what has not moved no direction.
        if len(shape) != 2 or is_zero(last := trajectory.delta(name, trajectory.steps[-1])):
            continue
        key = (shape, _rank(last))
        # A null depends on shape and rank alone, so layers of one shape share it.
        if key not in nulls:
            nulls[key] = _share_null(*key, generator)
        freedom = key[1] * (sum(shape) - key[1])  # of the matrices of this shape and rank
        path = linearity_with_nulls(trajectory.gram(name), trajectory.steps, generator, draws, freedom)
        share = rank_one_shares(factorise(last, 1))
        facts = {"name": name, "shape": list(shape), "share": share, "share_null": nulls[key]}
        tensors.append({**facts, "path": asdict(path.measured), "nulls": path.nulls})
    return {"steps": list(trajectory.steps), "tensors": tensors}


def write_evidence(trajectory: Trajectory, directory: Path) -> dict[str, object]:
    """Write ``analysis/evidence.json`` into a run directory."""
    found = evidence(trajectory)
    write_json(directory / "analysis" / "evidence.json", found)
    return found


def write_spectra(trajectory: CheckpointTrajectory, directory: Path, globs: Sequence[str]) -> list[str]:
    """Write ``analysis/spectra.safetensors`` of every matrix whose name fits one of ``globs``; gives the names.

    NAME|spectrum: T × K singular values; NAME|energy, NAME|outside: T × K of ``energy_in_base``, where a
    delta unrelated to the base has 1 - k²/(M·N) outside. Raises ``UnknownNameError`` when no name fits.
    """
    matrices = [name for name, shape in trajectory.shapes.items() if len(shape) == 2]
    names = [name for name in matrices if any(fnmatch(name, glob) for glob in globs)]
    if not names:
        raise UnknownNameError("matrix", ", ".join(globs), matrices)
    parts: dict[str, torch.Tensor] = {}
    for name in names:
        # The base's SVD is the costly part, so a tensor is taken through all steps before the next.
        basis = base_basis(trajectory.base.weight(name))
        deltas = [trajectory.delta(name, step) for step in trajectory.steps]
        energies, outsides = zip(*(energy_in_base(delta, basis) for delta in deltas), strict=True)
        parts[f"{name}|spectrum"] = torch.stack([spectrum(delta) for delta in deltas])
        parts |= {f"{name}|energy": torch.stack(energies), f"{name}|outside": torch.stack(outsides)}
    with write_aside(directory / "analysis" / "spectra.safetensors") as aside:
        save_file(parts, aside, metadata={"steps": ",".join(map(str, trajectory.steps))})
    return names


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
