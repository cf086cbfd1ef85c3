"""Puts the results of ``benchmarks/leaps.py`` into ``docs/leaps-results.md`` and ``docs/leaps.png``.

    python benchmarks/leaps_page.py benchmarks/results/leaps.json

Every figure is a mean over seeds with its 95 % interval (Student's t);
a seed in which an arm never arrives is left out of the mean and named.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import altair as alt
import numpy as np
from scipy.stats import t as student_t

from rankleap.files import read_json, write_text

RATES = ("tenth", "third", "tuned")
DOCS = Path(__file__).parent.parent / "docs"


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % t interval; without an interval for one value."""
    mean, n = float(np.mean(values)), len(values)
    half = float(student_t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")
    return mean, mean - half, mean + half


def shown(values: Iterable[float | None], scale: float = 1.0, digits: int = 2, sign: bool = True) -> str:
    """``+.62 [+.58, +.66]``, with how many of the seeds never arrived."""
    every = list(values)
    there = [value * scale for value in every if value is not None]
    if not there:
        return "never" if every else "–"
    mean, low, high = interval(there)
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    ends = f" [{form.format(low)}, {form.format(high)}]" if len(there) > 1 else ""
    missing = f" (never in {len(every) - len(there)} of {len(every)})" if len(there) < len(every) else ""
    return form.format(mean) + ends + missing


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def groups(rows: Sequence[dict[str, Any]], *keys: str) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Rows by the values of ``keys``, in their first order."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def regrounded(rows: Sequence[dict[str, Any]]) -> str:
    """What leaps during training saved."""
    head = [
        "task",
        "weights",
        "rate",
        "seeds",
        "steps saved",
        "of the averaged run's",
        "of the decayed run's",
        "wall-clock saved",
    ]
    head += ["final accuracy over plain's", "worst point against plain's", "steps a point: plain", "with leaps"]

    def cells(found: list[dict[str, Any]]) -> list[str]:
        def of(key: str) -> list[float | None]:
            return [row[key] for row in found if key in row]

        over = [row["final_leap"] - row["final_plain"] for row in found]
        return [
            str(len(found)),
            shown(of("steps_saved")),
            shown(of("steps_saved_vs_averaged")),
            shown(of("steps_saved_vs_decayed")),
            shown(of("wall_saved")),
            shown(over, digits=3),
            shown(of("worst_against_plain"), digits=3),
            shown(of("icer_plain"), sign=False, digits=1),
            shown(of("icer_leap"), sign=False, digits=1),
        ]

    return table(head, ([*key, *cells(found)] for key, found in groups(rows, "task", "adapter", "rate").items()))


def singles(runs: Sequence[dict[str, Any]]) -> str:
    """What one leap from step 60 did, by method, over the tasks' and adapters' runs at one rate."""
    head = [
        "method",
        "gain on test",
        "denoising",
        "extrapolation",
        "over plain at the same cost",
        "passed the gate",
        "back-test said no",
    ]
    head += ["of those passed: gain", "worst"]
    by_method: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        origin = run["leaps"][0]["test"]
        for row in run["leaps"][1:]:
            by_method.setdefault(row["method"], []).append({**row, "origin": origin, "plain": run["plain"]})

    def cells(found: list[dict[str, Any]]) -> list[str]:
        done = [row for row in found if "test" in row]
        gain = [row["test"] - row["origin"] for row in done]
        passed = [row["test"] - row["origin"] for row in done if row["accepted"]]
        return [
            shown(gain, digits=3),
            shown([row["own_step"] - row["origin"] for row in done], digits=3),
            shown([row["test"] - row["own_step"] for row in done], digits=3),
            shown([row["test"] - at(row["plain"], 60 + row["spent_steps"]) for row in done], digits=3),
            f"{len(passed)} of {len(found)}",
            f"{sum(bool(row['backtest']) for row in done)}",
            shown(passed, digits=3),
            f"{min(passed):+.3f}" if passed else "–",
        ]

    return table(head, ([method, *cells(found)] for method, found in by_method.items()))


def at(curve: Sequence[dict[str, Any]], step: float) -> float:
    """Accuracy of a curve at a step between its points."""
    return float(np.interp(step, [p["step"] for p in curve], [p["accuracy"] for p in curve]))


def claims(runs: Sequence[dict[str, Any]]) -> str:
    """Share of the plain run's gain that rank 1 keeps."""
    kinds = ["linear layers", "rank 1", "rank 1, rescaled", "random rank 1"]
    rows = []
    for key, found in groups(runs, "task", "adapter", "rate").items():
        facts = [run["claims"] for run in found]
        moved = [one for one in facts if one["last"] - one["base"] > 0.02]
        gain = shown([one["last"] - one["base"] for one in facts], digits=3)
        # A share of next to nothing is no share.
        kept = [[(one[kind] - one["base"]) / (one["last"] - one["base"]) for one in moved] for kind in kinds]
        rows.append([*key, gain, *(shown(values) for values in kept)])
    return table(["task", "weights", "rate", "gain of the run", *kinds], rows)


def linearity(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over matrices and seeds, each beside its nulls' 95 % quantile."""
    head = [
        "task",
        "weights",
        "rate",
        "first component's share",
        "noise",
        "walk",
        "R² in sample",
        "walk",
        "R² forward",
        "walk",
        "permutation",
    ]
    wanted = [
        ("share", "measured"),
        ("share", "noise"),
        ("share", "walk"),
        ("r2_in_sample", "measured"),
        ("r2_in_sample", "walk"),
    ]
    wanted += [("r2_forward", "measured"), ("r2_forward", "walk"), ("r2_forward", "permutation")]

    def of(found: list[dict[str, Any]], statistic: str, null: str) -> str:
        values = [row[statistic][null] for row in found if null in row.get(statistic, {})]
        return f"{median(values):.2f}" if values else "–"

    grouped = groups(rows, "task", "adapter", "rate")
    return table(head, ([*key, *(of(found, *pair) for pair in wanted)] for key, found in grouped.items()))


def figure(curves: Sequence[dict[str, Any]]) -> alt.TopLevelMixin:
    """Mean test accuracy over seeds against steps, a panel per task, adapter and rate."""
    names, colours = (
        ["plain", "plain, averaged", "plain, decayed", "leap"],
        ["#868e96", "#0072b2", "#00794f", "#c8500a"],
    )
    legend = alt.Legend(symbolOpacity=1, symbolStrokeWidth=2, symbolType="stroke")
    arm = alt.Color("name:N", title=None, scale=alt.Scale(domain=names, range=colours), legend=legend)
    dash = alt.StrokeDash("name:N", title=None, scale=alt.Scale(domain=names, range=[[6, 3], [2, 2], [1, 3], [1, 0]]))
    x, y = alt.X("step:Q", title="optimizer steps"), alt.Y("mean(accuracy):Q", title="test accuracy")
    band = (
        alt.Chart().mark_errorband(extent="stdev", opacity=0.15).encode(x=x, y=alt.Y("accuracy:Q", title=""), color=arm)
    )
    panel = alt.layer(band, alt.Chart().mark_line().encode(x=x, y=y, color=arm, strokeDash=dash))
    # Not facets: a combination that was not run would shift the others into its place.
    panels = [
        panel.properties(data=alt.Data(values=found), title=f"{name}, {rate}", width=190, height=120)
        for (name, rate), found in groups(curves, "panel", "rate").items()
    ]
    return alt.concat(*panels, columns=len(RATES))


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).parent / "results" / "leaps.json")
    found = read_json(parser.parse_args().results)
    parts = [
        "# Leaps: the tables\n\nGenerated by `python benchmarks/leaps.py`; what they say: [leaps.md](leaps.md).",
        "## Leaps during training\n\n![accuracy against steps](leaps.png)\n\n" + regrounded(found["regrounded"]),
    ]
    for (task, adapter, rate), runs in groups(found["singles"], "task", "adapter", "rate").items():
        parts.append(f"## One leap from step 60: {task}, {adapter}, {rate}\n\n" + singles(runs))
    parts.append("## Rank 1 of the last delta\n\nShare of the run's gain that is left.\n\n" + claims(found["singles"]))
    parts.append("## Linearity beside its nulls\n\n" + linearity(found["evidence"]))
    write_text(DOCS / "leaps-results.md", "\n\n".join(parts) + "\n")
    figure(found["curves"]).save(DOCS / "leaps.png", scale_factor=1.5)


if __name__ == "__main__":
    main()
