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
from steps_saved import interval

from rankleap.files import read_json, write_text

RATES = ("tenth", "third", "tuned")
DOCS = Path(__file__).parent.parent / "docs"


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


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown; the first row's keys head it."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)] if rows else []
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def groups(rows: Sequence[dict[str, Any]], *keys: str) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Rows by the values of ``keys``, in their first order."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def regrounded(rows: Sequence[dict[str, Any]]) -> str:
    """What leaps during training saved."""

    def cells(found: list[dict[str, Any]]) -> dict[str, str]:
        def of(key: str) -> list[float | None]:
            return [row[key] for row in found if key in row]

        over = [row["final_leap"] - row["final_plain"] for row in found]
        return {
            "seeds": str(len(found)),
            "steps saved": shown(of("steps_saved")),
            "of the averaged run's": shown(of("steps_saved_vs_averaged")),
            "of the decayed run's": shown(of("steps_saved_vs_decayed")),
            "wall-clock saved": shown(of("wall_saved")),
            "final accuracy over plain's": shown(over, digits=3),
            "worst point against plain's": shown(of("worst_against_plain"), digits=3),
            "steps a point: plain": shown(of("icer_plain"), sign=False, digits=1),
            "with leaps": shown(of("icer_leap"), sign=False, digits=1),
        }

    return table([arm | cells(found) for arm, found in arms(rows)])


def arms(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, str], list[dict[str, Any]]]]:
    """Rows of each task, adapter and rate, with the cells that name them."""
    grouped = groups(rows, "task", "adapter", "rate").items()
    return [(dict(zip(("task", "weights", "rate"), key, strict=True)), found) for key, found in grouped]


def singles(runs: Sequence[dict[str, Any]]) -> str:
    """What one leap from step 60 did, by method."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        origin = run["leaps"][0]["test"]
        for row in run["leaps"][1:]:
            by_method.setdefault(row["method"], []).append({**row, "origin": origin, "plain": run["plain"]})

    def cells(found: list[dict[str, Any]]) -> dict[str, str]:
        done = [row for row in found if "test" in row]
        passed = [row["test"] - row["origin"] for row in done if row["accepted"]]
        at_cost = [row["test"] - at(row["plain"], 60 + row["spent_steps"]) for row in done]
        return {
            "gain on test": shown([row["test"] - row["origin"] for row in done], digits=3),
            "denoising": shown([row["own_step"] - row["origin"] for row in done], digits=3),
            "extrapolation": shown([row["test"] - row["own_step"] for row in done], digits=3),
            "over plain at the same cost": shown(at_cost, digits=3),
            "passed the gate": f"{len(passed)} of {len(found)}",
            "back-test said no": f"{sum(bool(row['backtest']) for row in done)}",
            "of those passed: gain": shown(passed, digits=3),
            "worst": f"{min(passed):+.3f}" if passed else "–",
        }

    return table([{"method": method} | cells(found) for method, found in by_method.items()])


def at(curve: Sequence[dict[str, Any]], step: float) -> float:
    """Accuracy of a curve at a step between its points."""
    return float(np.interp(step, [p["step"] for p in curve], [p["accuracy"] for p in curve]))


def claims(runs: Sequence[dict[str, Any]]) -> str:
    """Share of the plain run's gain that rank 1 keeps."""
    rows = []
    for arm, found in arms(runs):
        facts = [run["claims"] for run in found]
        gain = shown([one["last"] - one["base"] for one in facts], digits=3)
        # A share of next to nothing is no share.
        moved = [one for one in facts if one["last"] - one["base"] > 0.02]
        kept = {
            kind: shown([(one[kind] - one["base"]) / (one["last"] - one["base"]) for one in moved])
            for kind in ("linear layers", "rank 1", "rank 1, rescaled", "random rank 1")
        }
        rows.append(arm | {"gain of the run": gain} | kept)
    return table(rows)


def linearity(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over matrices and seeds, each beside its nulls' 95 % quantile."""
    beside = {
        "share": ("first component's share", "noise", "walk"),
        "r2_in_sample": ("R² in sample", "walk"),
        "r2_forward": ("R² forward", "walk", "permutation"),
    }

    def cells(found: list[dict[str, Any]]) -> dict[str, str]:
        shown_by: dict[str, str] = {}
        for statistic, (name, *nulls) in beside.items():
            for null in ("measured", *nulls):
                values = [row[statistic][null] for row in found if null in row.get(statistic, {})]
                head = name if null == "measured" else f"{name}: {null}"
                shown_by[head] = f"{median(values):.2f}" if values else "–"
        return shown_by

    return table([arm | cells(found) for arm, found in arms(rows)])


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
