"""What a study's numbers say, in sentences made from them; nothing is said that a number does not carry.

An arm is compared with the arm ``plain`` at the same learning rate. Savings come from ``summary.json`` as they are;
a saving that rounds to 0 % counts as none.

Measured statistics and their nulls, turned from tensors to statistics, for figures and tables too:

    rank-1 share of one delta     σ₁/Σσ (NExt, 2604.11446), σ₁/‖ΔW‖_F (AlphaRL, 2510.00553), σ₁²/Σσ² (RELEX, 2605.21468)
    linearity over the steps      rank-1 share over time, R² in sample, R² forward (``trajectory.linearity``)

A value counts as *above* a null when it is larger than the 95 % quantile of that null for the same tensor. Shuffling the
steps cannot change a share, so there it is no null and is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rankleap.report.read import Arm, Range, Study, TensorEvidence, read_study

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

Nulls = Mapping[str, Mapping[str, Range | tuple[()] | None]]
"""By null and then by statistic, the range of one tensor."""

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
    spatial = [(one.name, one.share, {"gaussian": one.share_null}) for one in evidence]
    temporal = [(one.name, one.path, one.nulls) for one in evidence]
    found = [
        *(_statistic(key, label, False, spatial) for key, label in SHARES.items()),
        *(_statistic(key, label, True, temporal) for key, label in PATHS.items()),
    ]
    return tuple(statistic for statistic in found if statistic.tensors)


def _statistic(
    key: str, label: str, over_time: bool, tensors: Sequence[tuple[str, Mapping[str, float | None], Nulls]]
) -> Statistic:
    rows = [(name, value, nulls) for name, values, nulls in tensors if (value := values.get(key)) is not None]
    # A dict keeps the nulls in the order of the file, which a set would not.
    names = dict.fromkeys(null for *_, nulls in rows for null in nulls)
    ranges = {
        name: tuple(_informative(value, nulls.get(name, {}).get(key)) for _, value, nulls in rows) for name in names
    }
    # A null that says nothing of any tensor over time does not apply; one delta keeps its null's empty row.
    able = {name: found for name, found in ranges.items() if any(found) or not over_time}
    return Statistic(label, over_time, tuple(row[0] for row in rows), tuple(row[1] for row in rows), able)


def _informative(value: float, null: Range | tuple[()] | None) -> Range | None:
    """The range, unless it is absent or only repeats the measured value, as a share does when steps are shuffled."""
    return null if null and max(abs(end - value) for end in null) > ROUNDING else None


PLAIN, AVERAGED, LEAP = "plain", "plain, averaged", "leap"


def headline(summary: Mapping[str, Any]) -> list[str]:
    """State for each learning rate what the leaps saved, and what that does not show; ``InputError`` if malformed."""
    return study_sentences(read_study(summary, "the summary"))


def study_sentences(study: Study) -> list[str]:
    """The same from a study that was read; one paragraph per learning rate, then what the intervals leave out."""
    paragraphs = [*(" ".join(_of_rate(study, rate)) for rate in study.rates()), *_over_rates(study)]
    if any(paragraphs):
        paragraphs.append(
            "Levels are read on curves made non-decreasing, so that a lucky point is no arrival. Intervals are over the "
            "test problems; the steps and seconds saved have none, and how much seeds differ is not in them."
        )
    return [paragraph for paragraph in paragraphs if paragraph]


def evidence_sentence(run: str, statistics: Sequence[Statistic]) -> str:
    """In how many tensors each statistic over time lies above every null."""
    counts = [
        f"{one.above_all()} of {len(one.tensors)} in {one.label}"
        for one in statistics
        if one.over_time and any(one.null_range(null) for null in one.ranges)
    ]
    if not counts:
        return ""
    names = {null: NULLS.get(null, null) for one in statistics if one.over_time for null in one.ranges}
    nulls = ", ".join(names.values())
    return f"Tensors of {run} above the 90 % range of every null that applies ({nulls}): {_listed(counts)}."


def interval(value: float, low: float, high: float, sign: str = "") -> str:
    """A number with its interval; ``sign="+"`` shows the sign of positive numbers too."""
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def percent(fraction: float) -> str:
    """A fraction as a whole percentage."""
    return f"{round(100 * fraction)} %"


def _of_rate(study: Study, rate: float) -> Iterator[str]:
    plain, leap = study.arm(PLAIN, rate), study.arm(LEAP, rate)
    if plain is None or leap is None:
        arms = [arm for arm in study.arms if arm.learning_rate == rate]
        ends = [f"{_end(arm)} for {arm.name}" for arm in arms]
        yield f"At a learning rate of {rate:g} the final accuracy is {_listed(ends)}; there are no two arms to compare."
        return
    yield _steps(study, rate, plain, leap)
    yield from _wall(study.wall_saved_fraction.get(rate), plain, leap)
    yield from _averaged(study, rate)
    yield _leaps(leap)
    yield _separation(plain, leap)


def _over_rates(study: Study) -> Iterator[str]:
    """Yield the best of each arm over learning rates: a gain at a slow rate may be less than a better rate gives."""
    by_name = {name: [arm for arm in study.arms if arm.name == name] for name in (PLAIN, AVERAGED, LEAP)}
    if min(len(by_name[PLAIN]), len(by_name[LEAP])) < 2:
        return
    best = [max(arms, key=lambda arm: arm.accuracy) for arms in by_name.values() if arms]
    ends = [f"{_end(arm)} for {arm.name} (learning rate {arm.learning_rate:g})" for arm in best]
    yield f"Over the learning rates, the highest final accuracy is {_listed(ends)}."


def _steps(study: Study, rate: float, plain: Arm, leap: Arm) -> str:
    target = study.target_accuracy.get(rate)
    opening = f"At a learning rate of {rate:g} the leap arm"
    goal = f"the plain arm's final level ({plain.accuracy if target is None else target:.3f})"
    if leap.steps_to_target is None:
        return f"{opening} did not reach {goal} within its {leap.steps} steps: nothing was saved."
    # Where a summary lacks the plain arm's arrival, its last step stands for it.
    reference = plain.steps if plain.steps_to_target is None else plain.steps_to_target
    reached = f"{opening} reached {goal} after {leap.steps_to_target:.0f} steps, the plain arm after {reference:.0f}"
    return f"{reached}: {_steps_saved(study.steps_saved_fraction.get(rate))}."


def _wall(saved: float | None, plain: Arm, leap: Arm) -> Iterator[str]:
    """Yield a sentence on seconds where the target was reached and the seconds are known."""
    took_s = leap.wall_to_target_s
    if saved is None or took_s is None:
        return
    reference_s = plain.wall_s if plain.wall_to_target_s is None else plain.wall_to_target_s
    seconds = f"{took_s:.3g} s instead of {reference_s:.3g} s, choosing and gating the leaps included"
    if _positive(saved):
        yield f"Of the wall-clock time {percent(saved)} was saved ({seconds})."
    else:
        longer = f": it took {percent(-saved)} longer" if _positive(-saved) else ""
        yield f"No wall-clock time was saved{longer} ({seconds})."


def _averaged(study: Study, rate: float) -> Iterator[str]:
    if rate not in study.steps_saved_fraction_vs_averaged:
        return
    saved = study.steps_saved_fraction_vs_averaged[rate]
    told = "not reached" if saved is None else _steps_saved(saved)
    yield f"Against the plain arm with averaging, to its own final level: {told}."


def _leaps(leap: Arm) -> str:
    if leap.leaps_accepted:
        return f"The gate accepted {leap.leaps_accepted} of {leap.leaps_tried} leaps tried."
    if leap.leaps_tried:
        return f"The gate accepted none of {leap.leaps_tried} leaps tried: the arm is a plain run that paid for trying."
    return "No leap was tried."


def _separation(plain: Arm, leap: Arm) -> str:
    """Compare the ends of two arms by their intervals alone."""
    ends = f"{_end(leap)} for leap and {_end(plain)} for plain"
    # A paired test would tell more, but intervals are all that a summary holds.
    if leap.ci_low <= plain.ci_high and plain.ci_low <= leap.ci_high:
        return f"The final accuracies, {ends}, are not separated by their intervals."
    return f"The final accuracy is {'higher' if leap.accuracy > plain.accuracy else 'lower'} with leaps: {ends}."


def _end(arm: Arm) -> str:
    return interval(arm.accuracy, arm.ci_low, arm.ci_high)


def _steps_saved(saved: float | None) -> str:
    return "no steps saved" if saved is None or not _positive(saved) else f"{percent(saved)} of the steps saved"


def _positive(saved: float) -> bool:
    return round(100 * saved) > 0


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
