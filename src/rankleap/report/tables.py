"""Tables: each is written twice, as raw numbers (CSV) and as text for a person (HTML).

A row holds plain values under the CSV's names. Columns are headings with what stands under each: the value of a name,
or text made from the whole row.
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


Shown = str | Callable[[Row], str]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a caption; the first column names its row. A folded table is closed until it is asked for."""

    name: str
    caption: str
    columns: Mapping[str, Shown]
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
        numbers = [' class="number"' if self._holds_numbers(heading) else "" for heading in self.columns]
        headings = zip(numbers, map(escape, self.columns), strict=True)
        head = "".join(f'<th scope="col"{kind}>{heading}</th>' for kind, heading in headings)
        lines = []
        for row in self.rows:
            first, *others = (
                escape(_show(row[one]) if isinstance(one, str) else one(row)) for one in self.columns.values()
            )
            cells = "".join(f"<td{kind}>{text}</td>" for kind, text in zip(numbers[1:], others, strict=True))
            lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
        body = "\n".join(lines)
        name = escape(self.caption)
        table = f"<table><caption>{name}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        # Focusable, so that a wide table can be scrolled from the keyboard.
        scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{table}</div>'
        link = f'<p class="files"><a href="tables/{self.name}.csv">CSV</a></p>'
        return f"<details><summary>{name}</summary>{scroll}{link}</details>" if self.folded else scroll + link

    def _holds_numbers(self, heading: str) -> bool:
        """Numbers are set to the right, except where they name their row."""
        key = self.columns[heading]
        # Text that is made from a row is made of numbers.
        text = isinstance(key, str) and any(isinstance(row[key], str) for row in self.rows)
        return not text and heading != next(iter(self.columns))


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
    columns: dict[str, Shown] = {
        **_plain("statistic"),
        "median": lambda row: f"{row['median']:.3f}",
        **_plain("null"),
        "its 90 % range": lambda row: f"{row['null_low']:.3f} to {row['null_high']:.3f}",
        "tensors above it": lambda row: f"{row['tensors_above']} of {row['tensors']}",
    }
    return Table("evidence", f"{run}: medians over tensors beside the null ranges", columns, tuple(rows))


def _arms(study: Study) -> Table:
    rows = tuple({key: value for key, value in asdict(arm).items() if key != "curve"} for arm in study.arms)
    columns: dict[str, Shown] = {
        "arm": "name",
        **_plain("learning_rate"),
        "test accuracy": _interval("accuracy", "ci_low", "ci_high"),
        **_plain("steps"),
        "wall-clock, s": "wall_s",
        # Absent means that the level was not reached; a dash would read as not measured.
        "steps to target": lambda row: _show(row["steps_to_target"], "never"),
        "seconds to target": lambda row: _show(row["wall_to_target_s"], "never"),
        "leaps accepted": lambda row: f"{row['leaps_accepted']} of {row['leaps_tried']}" if row["leaps_tried"] else "–",
    }
    return Table("arms", "Arms; the target is the plain arm's final level at the same learning rate", columns, rows)


def _savings(study: Study) -> Table:
    saved = {
        "steps_saved": study.steps_saved_fraction,
        "wall_saved": study.wall_saved_fraction,
        "steps_saved_vs_averaged": study.steps_saved_fraction_vs_averaged,
    }
    rows = tuple(
        {
            "learning_rate": rate,
            "target": study.target_accuracy.get(rate),
            **{key: by.get(rate) for key, by in saved.items()},
        }
        for rate in study.rates()
        # A rate whose saving is null stays: not having arrived is a result.
        if any(rate in by for by in saved.values())
    )
    columns: dict[str, Shown] = {
        **_plain("learning_rate"),
        "target accuracy": "target",
        "steps saved": _percent("steps_saved"),
        "wall-clock saved": _percent("wall_saved"),
        "steps saved, to the averaged arm's level": _percent("steps_saved_vs_averaged"),
    }
    return Table("savings", "What the leap arm saved on the way to the target", columns, rows)


def _curves(study: Study) -> Table:
    rows = [
        {"arm": arm.name, "learning_rate": arm.learning_rate, **asdict(point)}
        for arm in study.arms
        for point in arm.curve
    ]
    accuracy = _interval("accuracy", "ci_low", "ci_high")
    names = _plain("arm", "learning_rate", "step")
    columns: dict[str, Shown] = {**names, "wall-clock, s": "wall_s", "test accuracy": accuracy, **_plain("weights")}
    return Table("curves", "The numbers under the curves", columns, tuple(rows), folded=True)


def _runs(runs: Sequence[Run]) -> Table:
    columns = {
        **_plain("run", "task", "algorithm", "adapter", "learning_rate", "steps"),
        "training, s": "wall_s",
        **_plain("first_reward", "last_reward"),
        "factors recorded": "recorded_steps",
    }
    caption = "Runs; rewards are means over the first and the last tenth of the steps"
    return Table("runs", caption, columns, tuple(map(_run, runs)))


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
    columns: dict[str, Shown] = {
        **_plain("run", "step", "method", "coefficient", "candidates"),
        "gain on validation": _interval("gain", "gain_low", "gain_high", sign="+"),
        "norm ratio": "norm_ratio",
        "cost, s": "wall_s",
        **_plain("verdict"),
    }
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
    columns: dict[str, Shown] = {
        **_plain("run", "task", "checkpoint"),
        "problems × samples": lambda row: f"{row['problems']} × {row['samples']}",
        "avg@k": _interval("avg", "avg_low", "avg_high"),
        "pass@k": _interval("pass", "pass_low", "pass_high"),
        "tokens": "mean_tokens",
        "truncated": _percent("truncation_rate"),
        **_plain("grader_failures"),
    }
    caption = "Evaluations; k is the number of samples of each problem"
    return Table("evaluation", caption, columns, tuple(rows), folded=len(rows) > 12)


def _spread(name: str, estimate: Estimate | None) -> Row:
    """An estimate as three columns."""
    value, low, high = (estimate.value, estimate.low, estimate.high) if estimate else (None, None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _plain(*names: str) -> dict[str, Shown]:
    """Columns headed by the names of their values."""
    return {name.replace("_", " "): name for name in names}


def _show(value: Value, absent: str = "–") -> str:
    return absent if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(name: str) -> Callable[[Row], str]:
    return lambda row: percent(value) if isinstance(value := row[name], float) else "–"


def _interval(value: str, low: str, high: str, sign: str = "") -> Callable[[Row], str]:
    """Three columns as a number with its interval."""

    def show(row: Row) -> str:
        numbers = [one for one in (row[value], row[low], row[high]) if isinstance(one, float)]
        return interval(*numbers, sign=sign) if len(numbers) == 3 else "–"

    return show
