"""What other stages wrote, read into records and checked; every part is optional.

    study   summary.json                     arms of one experiment, their curves and what was saved
    run     metrics.jsonl                    one row per optimizer step
            leaps/decisions.jsonl            one row per leap that was tried
            evaluation/**/summary.json       checkpoint name -> its numbers
            analysis/evidence.json           dominance and linearity of each tensor beside their nulls
            config.json, trajectory/index.json   what was trained, what was recorded

Keys that are not known are left alone, so that an older report reads a newer run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from rankleap.errors import InputError
from rankleap.files import read_json, read_jsonl
from rankleap.records import Estimate

Range = tuple[FiniteFloat, FiniteFloat]
"""5 % and 95 % quantile of a null."""
# JSON has only text as keys; pydantic reads them back as numbers.
ByRate = dict[float, FiniteFloat | None]
"""A number for each learning rate."""


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation on the test split; ``weights`` is ``base``, ``checkpoint``, ``leap`` or ``average``."""

    step: int
    wall_s: FiniteFloat
    accuracy: FiniteFloat
    ci_low: FiniteFloat
    ci_high: FiniteFloat
    weights: str = "checkpoint"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of training; its target is the final level of the arm ``plain`` at the same learning rate."""

    name: str
    learning_rate: FiniteFloat
    steps: int
    wall_s: FiniteFloat
    accuracy: FiniteFloat
    ci_low: FiniteFloat
    ci_high: FiniteFloat
    steps_to_target: FiniteFloat | None = None
    wall_to_target_s: FiniteFloat | None = None
    leaps_tried: int = 0
    leaps_accepted: int = 0
    curve: tuple[Point, ...] = ()


@dataclass(frozen=True, slots=True)
class Study:
    """``summary.json``; fractions are of the plain arm's cost, choosing and gating of leaps included."""

    name: str
    arms: tuple[Arm, ...]
    task: str = ""
    target_accuracy: ByRate = field(default_factory=dict)
    steps_saved_fraction: ByRate = field(default_factory=dict)
    wall_saved_fraction: ByRate = field(default_factory=dict)
    steps_saved_fraction_vs_averaged: ByRate = field(default_factory=dict)
    machine: dict[str, str | int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    runs: tuple[str, ...] = ()

    def rates(self) -> tuple[float, ...]:
        """Learning rates in the order of the arms."""
        return tuple(dict.fromkeys(arm.learning_rate for arm in self.arms))

    def arm(self, name: str, learning_rate: float) -> Arm | None:
        """The arm of that name at that learning rate."""
        return next((arm for arm in self.arms if (arm.name, arm.learning_rate) == (name, learning_rate)), None)


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One optimizer step."""

    step: int
    wall_s: FiniteFloat | None = None
    reward: FiniteFloat | None = None


@dataclass(frozen=True, slots=True)
class LeapDecision:
    """One leap that was tried; ``reasons`` says why it was rejected."""

    step: int
    accepted: bool
    method: str
    coefficient: FiniteFloat
    gain: Estimate | None = None
    norm_ratio: FiniteFloat | None = None
    reasons: tuple[str, ...] = ()
    tried: tuple[dict[str, Any], ...] = ()
    wall_s: FiniteFloat | None = None
    taken: bool = False


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """Numbers of one checkpoint on one task."""

    avg: Estimate
    problems: int = 0
    samples: int = 0
    pass_at: dict[int, Estimate] = field(default_factory=dict)
    mean_tokens: FiniteFloat | None = None
    truncation_rate: FiniteFloat | None = None
    verdicts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorEvidence:
    """Measured statistics of one tensor by name, and the range of each under each null."""

    name: str
    share: dict[str, FiniteFloat | None] = field(default_factory=dict)
    # Empty where the spectrum was not computed, for then there is no Σσ to compare.
    share_null: dict[str, Range | tuple[()] | None] = field(default_factory=dict)
    path: dict[str, FiniteFloat | None] = field(default_factory=dict)
    nulls: dict[str, dict[str, Range | None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """What one run directory holds; a part that is missing is empty."""

    name: str
    path: Path
    recipe: dict[str, Any]
    metrics: tuple[MetricRow, ...]
    decisions: tuple[LeapDecision, ...]
    evaluations: dict[str, dict[str, EvaluationSummary]]
    evidence: tuple[TensorEvidence, ...]
    recorded: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """A study with its runs, or the runs that were given by themselves; ``missing`` runs are named but not there."""

    study: Study | None
    runs: tuple[Run, ...]
    missing: tuple[str, ...] = ()


def read_study(values: object, source: str) -> Study:
    """Check the values of a ``summary.json``; ``source`` names it in errors."""
    return _checked(Study, values, source)


def collect(directories: Sequence[Path]) -> tuple[Group, ...]:
    """Read every directory: one group per study, and one for the runs that no study lists."""
    studies = [_study_group(directory) for directory in directories if (directory / "summary.json").is_file()]
    # A run given beside the study that lists it would be shown twice.
    listed = {run.path.resolve() for group in studies for run in group.runs}
    alone = []
    for directory in directories:
        # Resolved, since ``.`` has no name of its own.
        run = _read_run(directory, directory.resolve().name)
        if run is not None and directory.resolve() not in listed:
            alone.append(run)
        elif run is None and not (directory / "summary.json").is_file():
            raise InputError(
                f"a report needs a study (summary.json) or a run (metrics.jsonl, trajectory/, evaluation/, leaps/ or "
                f"analysis/), {directory} holds none of them; check the path or train there first"
            )
    return (*studies, *([Group(None, tuple(alone))] if alone else []))


def _study_group(directory: Path) -> Group:
    path = directory / "summary.json"
    study = read_study(read_json(path), str(path))
    runs = {name: _read_run(directory / name, name) for name in study.runs}
    found = tuple(run for run in runs.values() if run is not None)
    return Group(study, found, tuple(name for name, run in runs.items() if run is None))


def _read_run(directory: Path, name: str) -> Run | None:
    """Read one run, or return nothing where there is no part of one."""
    run = Run(
        name=name,
        path=directory,
        recipe=_recipe(directory / "config.json"),
        metrics=_rows(MetricRow, directory / "metrics.jsonl"),
        decisions=_rows(LeapDecision, directory / "leaps" / "decisions.jsonl"),
        evaluations={
            path.parent.relative_to(directory / "evaluation").as_posix(): _evaluations(path)
            for path in sorted((directory / "evaluation").glob("**/summary.json"))
        },
        evidence=_listed(tuple[TensorEvidence, ...], directory / "analysis" / "evidence.json", "tensors"),
        recorded=_listed(tuple[int, ...], directory / "trajectory" / "index.json", "steps"),
    )
    parts = (run.metrics, run.decisions, run.evaluations, run.evidence, run.recorded)
    # A run that has only begun holds its recipe and nothing else.
    return run if any(parts) or "train" in run.recipe else None


def _recipe(path: Path) -> dict[str, Any]:
    """The resolved recipe; a model's own ``config.json`` is not one."""
    values = _checked(dict[str, Any], read_json(path), str(path)) if path.is_file() else {}
    return values if "train" in values else {}


def _rows(kind: Any, path: Path) -> Any:
    if not path.is_file():
        return ()
    return tuple(_checked(kind, row, f"{path}, line {number}") for number, row in enumerate(read_jsonl(path), start=1))


def _evaluations(path: Path) -> dict[str, EvaluationSummary]:
    rows = _checked(dict[str, dict[str, Any]], read_json(path), str(path))
    # "pass" is a word of Python's own, so the field has another name.
    renamed = {name: {**row, "pass_at": row.get("pass", {})} for name, row in rows.items()}
    return _checked(dict[str, EvaluationSummary], renamed, str(path))


def _listed(kind: Any, path: Path, key: str) -> Any:
    """What a file has under one key; nothing where there is no file."""
    if not path.is_file():
        return ()
    values = _checked(dict[str, Any], read_json(path), str(path))
    return _checked(kind, values.get(key, ()), str(path))


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Build the checker of a type once: it takes a hundred times as long as checking a row."""
    return TypeAdapter(kind)


def _checked(kind: Any, value: object, source: str) -> Any:
    """Check plain values against a type; the first mistake is an ``InputError`` that names its place."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        # One is enough: a program wrote the file, and its mistakes repeat in every row.
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        got = "" if first["type"] == "missing" else f", got {str(first['input'])[:80]!r}"
        raise InputError(
            f"{source} is not what a report can read: {where}: {first['msg']}{got}; write it again or remove it"
        ) from None
