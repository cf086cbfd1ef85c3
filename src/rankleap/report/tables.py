"""Tables: each is written twice, as raw numbers (CSV) and as text for a person (HTML).

A row holds plain values under the CSV's names; a column says how a row is shown.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from statistics import mean

from rankleap.records import Estimate
from rankleap.report.read import LeapDecision, Run, Study
from rankleap.report.sentences import NULLS, Statistic, interval, percent

Value = str | int | float | None
Row = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and what stands under it; numbers are set to the right."""

    heading: str
    show: Callable[[Row], str]
    number: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a caption; the first column names its row. A folded table is closed until it is asked for."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    folded: bool = False

    def csv(self) -> str:
        """The raw values, one row a line."""
        text = io.StringIO()
        # The module's own line ending is \r\n, unlike that of every other file here.
        writer = csv.DictWriter(text, fieldnames=list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def html(self) -> str:
        """A table with caption, column and row headers."""
        head = "".join(f'<th scope="col"{_class(one)}>{escape(one.heading)}</th>' for one in self.columns)
        body = "\n".join(f"<tr>{''.join(self._cells(row))}</tr>" for row in self.rows)
        name = escape(self.caption)
        table = f"<table><caption>{name}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        # Focusable, so that a wide table can be scrolled from the keyboard.
        scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{table}</div>'
        link = f'<p class="files"><a href="tables/{self.name}.csv">CSV</a></p>'
        return f"<details><summary>{name}</summary>{scroll}{link}</details>" if self.folded else scroll + link

    def _cells(self, row: Row) -> list[str]:
        first, *others = ((escape(one.show(row)), one) for one in self.columns)
        return [f'<th scope="row">{first[0]}</th>', *(f"<td{_class(one)}>{text}</td>" for text, one in others)]


def study_tables(study: Study) -> list[Table]:
    """Arms, what was saved, and the numbers under the curves."""
    return [table for table in (_arms(study), _savings(study), _curves(study)) if table.rows]


def run_tables(runs: Sequence[Run]) -> list[Table]:
    """The runs, their leap decisions and their evaluations."""
    return [table for table in (_runs(runs), _decisions(runs), _evaluations(runs)) if table.rows]


def evidence_table(run: str, statistics: Sequence[Statistic]) -> Table:
    """Medians over tensors beside the null ranges."""
    rows = [
        {
            "statistic": one.label,
            "tensors": len(one.tensors),
            "median": one.median(),
            "null": NULLS.get(null, null),
            "null_low": span[0],
            "null_high": span[1],
            "tensors_above": one.above(null),
        }
        for one in statistics
        for null in one.ranges
        if (span := one.null_range(null))
    ]
    columns = (
        _text("statistic", "statistic"),
        Column("median", lambda row: f"{row['median']:.3f}"),
        _text("null", "null"),
        Column("its 90 % range", lambda row: f"{row['null_low']:.3f} to {row['null_high']:.3f}"),
        Column("tensors above it", lambda row: f"{row['tensors_above']} of {row['tensors']}"),
    )
    return Table("evidence", f"{run}: medians over tensors beside the null ranges", columns, tuple(rows))


def _arms(study: Study) -> Table:
    rows = tuple({key: value for key, value in asdict(arm).items() if key != "curve"} for arm in study.arms)
    columns = (
        _text("arm", "name"),
        _number("learning rate", "learning_rate"),
        Column("test accuracy", lambda row: _interval(row, "accuracy", "ci_low", "ci_high")),
        _number("steps", "steps"),
        _number("wall-clock, s", "wall_s"),
        # Absent means that the level was not reached; a dash would read as not measured.
        Column("steps to target", lambda row: _show(row["steps_to_target"], "never")),
        Column("seconds to target", lambda row: _show(row["wall_to_target_s"], "never")),
        Column(
            "leaps accepted",
            lambda row: f"{row['leaps_accepted']} of {row['leaps_tried']}" if row["leaps_tried"] else "–",
        ),
    )
    return Table("arms", "Arms; the target is the plain arm's final level at the same learning rate", columns, rows)


def _savings(study: Study) -> Table:
    saved = {
        "steps_saved": study.steps_saved_fraction,
        "wall_saved": study.wall_saved_fraction,
        "steps_saved_vs_averaged": study.steps_saved_fraction_vs_averaged,
    }
    rows = [
        {
            "learning_rate": rate,
            "target": study.target_accuracy.get(rate),
            **{key: by.get(rate) for key, by in saved.items()},
        }
        for rate in study.rates()
        # A rate whose saving is null stays: not having arrived is a result.
        if any(rate in by for by in saved.values())
    ]
    columns = (
        Column("learning rate", lambda row: _show(row["learning_rate"]), number=False),
        _number("target accuracy", "target"),
        Column("steps saved", lambda row: _percent(row["steps_saved"])),
        Column("wall-clock saved", lambda row: _percent(row["wall_saved"])),
        Column("steps saved, to the averaged arm's level", lambda row: _percent(row["steps_saved_vs_averaged"])),
    )
    return Table("savings", "What the leap arm saved on the way to the target", columns, tuple(rows))


def _curves(study: Study) -> Table:
    rows = [
        {"arm": arm.name, "learning_rate": arm.learning_rate, **asdict(point)}
        for arm in study.arms
        for point in arm.curve
    ]
    columns = (
        _text("arm", "arm"),
        _number("learning rate", "learning_rate"),
        _number("step", "step"),
        _number("wall-clock, s", "wall_s"),
        Column("test accuracy", lambda row: _interval(row, "accuracy", "ci_low", "ci_high")),
        _text("weights", "weights"),
    )
    return Table("curves", "The numbers under the curves", columns, tuple(rows), folded=True)


def _runs(runs: Sequence[Run]) -> Table:
    columns = (
        _text("run", "run"),
        _text("task", "task"),
        _text("algorithm", "algorithm"),
        _text("adapter", "adapter"),
        _number("learning rate", "learning_rate"),
        _number("steps", "steps"),
        _number("training, s", "wall_s"),
        _number("first reward", "first_reward"),
        _number("last reward", "last_reward"),
        _number("factors recorded", "recorded_steps"),
    )
    return Table(
        "runs",
        "Runs; rewards are means over the first and the last tenth of the steps",
        columns,
        tuple(map(_run, runs)),
    )


def _run(run: Run) -> Row:
    # Only sections are looked into: name and seed are plain values, and leap may be null.
    recipe = {key: value if isinstance(value, dict) else {} for key, value in run.recipe.items()}
    rewards = [row.reward for row in run.metrics if row.reward is not None]
    # The reward of a single step is mostly noise.
    tenth = max(1, len(rewards) // 10)
    seconds = [row.wall_s for row in run.metrics if row.wall_s is not None]
    return {
        "run": run.name,
        "task": recipe.get("task", {}).get("name"),
        "algorithm": recipe.get("algorithm", {}).get("name"),
        "adapter": recipe.get("adapter", {}).get("method"),
        "learning_rate": recipe.get("train", {}).get("learning_rate"),
        "steps": max((row.step for row in run.metrics), default=None),
        "wall_s": seconds[-1] if seconds else None,
        "first_reward": mean(rewards[:tenth]) if rewards else None,
        "last_reward": mean(rewards[-tenth:]) if rewards else None,
        "recorded_steps": len(run.recorded),
    }


def _decisions(runs: Sequence[Run]) -> Table:
    rows = tuple(_decision(run.name, one) for run in runs for one in run.decisions)
    columns = (
        _text("run", "run"),
        _number("step", "step"),
        _text("method", "method"),
        _number("coefficient", "coefficient"),
        _number("candidates", "candidates"),
        Column("gain on validation", lambda row: _interval(row, "gain", "gain_low", "gain_high", sign="+")),
        _number("norm ratio", "norm_ratio"),
        _number("cost, s", "wall_s"),
        _text("verdict", "verdict"),
    )
    return Table("leaps", "Leaps that were tried, chosen and gated on validation problems", columns, rows)


def _decision(run: str, one: LeapDecision) -> Row:
    # With ``proceed_from = "origin"`` a leap is written and training stays on its own path.
    kept = "accepted" if one.taken else "accepted, written only"
    return {
        "run": run,
        "step": one.step,
        "method": one.method,
        "coefficient": one.coefficient,
        "candidates": len(one.tried),
        **_spread("gain", one.gain),
        "norm_ratio": one.norm_ratio,
        "wall_s": one.wall_s,
        "verdict": kept if one.accepted else "rejected: " + "; ".join(one.reasons),
    }


def _evaluations(runs: Sequence[Run]) -> Table:
    rows = [
        {
            "run": run.name,
            "task": task,
            "checkpoint": checkpoint,
            "problems": one.problems,
            "samples": one.samples,
            **_spread("avg", one.avg),
            # The largest k alone; the others are in the run's own summary.
            **_spread("pass", one.pass_at.get(max(one.pass_at, default=0))),
            "mean_tokens": one.mean_tokens,
            "truncation_rate": one.truncation_rate,
            # They score 0 like wrong answers, so they are shown beside the accuracy.
            "grader_failures": one.verdicts.get("timeout", 0) + one.verdicts.get("grader_error", 0),
        }
        for run in runs
        for task, checkpoints in run.evaluations.items()
        for checkpoint, one in checkpoints.items()
    ]
    columns = (
        _text("run", "run"),
        _text("task", "task"),
        _text("checkpoint", "checkpoint"),
        Column("problems × samples", lambda row: f"{row['problems']} × {row['samples']}"),
        Column("avg@k", lambda row: _interval(row, "avg", "avg_low", "avg_high")),
        Column("pass@k", lambda row: _interval(row, "pass", "pass_low", "pass_high")),
        _number("tokens", "mean_tokens"),
        Column("truncated", lambda row: _percent(row["truncation_rate"])),
        _number("grader failures", "grader_failures"),
    )
    return Table(
        "evaluation",
        "Evaluations; k is the number of samples of each problem",
        columns,
        tuple(rows),
        folded=len(rows) > 12,
    )


def _spread(name: str, estimate: Estimate | None) -> Row:
    """An estimate as three columns."""
    value, low, high = (estimate.value, estimate.low, estimate.high) if estimate else (None, None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _text(heading: str, key: str) -> Column:
    return Column(heading, lambda row: _show(row[key]), number=False)


def _number(heading: str, key: str) -> Column:
    return Column(heading, lambda row: _show(row[key]))


def _show(value: Value, absent: str = "–") -> str:
    return absent if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value: Value) -> str:
    return percent(value) if isinstance(value, float) else "–"


def _interval(row: Row, value: str, low: str, high: str, sign: str = "") -> str:
    """Three columns as a number with its interval."""
    numbers = [one for one in (row[value], row[low], row[high]) if isinstance(one, float)]
    return interval(*numbers, sign=sign) if len(numbers) == 3 else "–"


def _class(column: Column) -> str:
    return ' class="number"' if column.number else ""
