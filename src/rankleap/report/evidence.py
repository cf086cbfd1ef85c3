"""Measured statistics and their nulls, turned from tensors to statistics: for figure, table and sentence.

    rank-1 share of one delta     σ₁/Σσ (NExt, 2604.11446), σ₁/‖ΔW‖_F (AlphaRL, 2510.00553), σ₁²/Σσ² (RELEX, 2605.21468)
    linearity over the steps      rank-1 share over time, R² in sample, R² forward (``trajectory.linearity``)

A value counts as *above* a null when it is larger than the 95 % quantile of that null for the same tensor. Shuffling the
steps cannot change a share, so there it is no null and is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rankleap.report.read import Range, TensorEvidence

SHARES = {
    "nuclear": "rank-1 share, nuclear (NExt)",
    "frobenius": "rank-1 share, Frobenius (AlphaRL)",
    "energy": "rank-1 share, energy (RELEX)",
}
PATHS = {"share": "rank-1 share over time", "r2_in_sample": "R² in sample", "r2_forward": "R² forward"}
NULLS = {
    "gaussian": "Gaussian matrix",
    "noise": "independent noise",
    "walk": "driftless walk",
    "permutation": "shuffled steps",
}

ROUNDING = 1e-5
"""Differences below this are those of float32 arithmetic."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """One statistic of all tensors; ``ranges`` has, for each null, the range of each tensor, or ``None``."""

    label: str
    over_time: bool
    tensors: tuple[str, ...]
    measured: tuple[float, ...]
    ranges: dict[str, tuple[Range | None, ...]]

    def median(self) -> float:
        """Median over tensors."""
        return median(self.measured)

    def null_range(self, null: str) -> Range | None:
        """Medians over tensors of the two ends of a null."""
        known = [one for one in self.ranges[null] if one is not None]
        # A median of each end, for one wild tensor would stretch a range over all.
        return (median(low for low, _ in known), median(high for _, high in known)) if known else None

    def above(self, null: str) -> int:
        """How many tensors lie above that null."""
        return sum(value > one[1] for value, one in zip(self.measured, self.ranges[null], strict=True) if one)

    def above_all(self) -> int:
        """How many tensors lie above every null that they have."""
        by_tensor = zip(self.measured, *self.ranges.values(), strict=True)
        # A tensor without a null was compared with nothing, so it lies above nothing.
        return sum(any(nulls) and all(one is None or value > one[1] for one in nulls) for value, *nulls in by_tensor)


def statistics(evidence: Sequence[TensorEvidence]) -> tuple[Statistic, ...]:
    """Every statistic that at least one tensor has, spatial shares first."""
    spatial = [_share(key, label, evidence) for key, label in SHARES.items()]
    temporal = [_path(key, label, evidence) for key, label in PATHS.items()]
    return tuple(statistic for statistic in (*spatial, *temporal) if statistic.tensors)


def _share(key: str, label: str, evidence: Sequence[TensorEvidence]) -> Statistic:
    rows = [(one.name, value, one.share_null.get(key)) for one in evidence if (value := one.share.get(key)) is not None]
    ranges = {"gaussian": tuple(_informative(value, null) for _, value, null in rows)}
    return Statistic(label, False, tuple(row[0] for row in rows), tuple(row[1] for row in rows), ranges)


def _path(key: str, label: str, evidence: Sequence[TensorEvidence]) -> Statistic:
    rows = [(one, value) for one in evidence if (value := one.path.get(key)) is not None]
    # A dict keeps the nulls in the order of the file, which a set would not.
    names = dict.fromkeys(null for one, _ in rows for null in one.nulls)
    ranges = {
        name: tuple(_informative(value, one.nulls.get(name, {}).get(key)) for one, value in rows) for name in names
    }
    able = {name: found for name, found in ranges.items() if any(found)}
    return Statistic(label, True, tuple(one.name for one, _ in rows), tuple(value for _, value in rows), able)


def _informative(value: float, null: Range | tuple[()] | None) -> Range | None:
    """The range, unless it is absent or only repeats the measured value, as a share does when steps are shuffled."""
    return null if null and max(abs(end - value) for end in null) > ROUNDING else None
