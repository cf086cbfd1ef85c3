"""Figures, each defined once: as panels for the page (interactive, as wide as their place) and as one static picture.

A definition says what is drawn; colours, which differ between light and dark, are in ``themes.json``. Arms differ in colour,
dash and shape, so that a figure can be read in grey and by the colour-blind.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import altair as alt

from rankleap.files import read_json
from rankleap.report.read import Arm, Run, Study
from rankleap.report.sentences import AVERAGED, LEAP, NULLS, PLAIN, Statistic

WIDTH, HEIGHT = 370, 250
"""Of one panel, in pixels of the static picture; two stand side by side."""
MOST_POINTS = 2000
"""Rows of one reward panel; more cannot be told apart on a screen and make the page heavy."""
DASHES = [[7, 4], [2, 3], [1, 0], [9, 3, 2, 3], [4, 2], [12, 4]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


THEMES: dict[str, dict[str, Any]] = read_json(Path(__file__).with_name("themes.json"))
"""A Vega-Lite configuration each for ``light`` and ``dark``."""


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """Panels under one caption, ``columns`` in a row; ``name`` is the stem of its files."""

    name: str
    caption: str
    panels: tuple[alt.LayerChart, ...]
    columns: int = 2

    def specs(self) -> list[dict[str, Any]]:
        """One Vega-Lite definition per panel, without colours, as wide as the place it is put in."""
        # Altair refuses more than 5000 rows unless told otherwise.
        with alt.data_transformers.enable("default", max_rows=None):
            return [panel.properties(width="container").to_dict() for panel in self.panels]

    def write(self, stem: Path) -> None:
        """Write the panels as one picture, light, as ``stem``.svg and, twice as fine, ``stem``.png."""
        # A row is as wide as two panels of WIDTH, however many stand in it.
        panels = [panel.properties(width=WIDTH * 2 // self.columns) for panel in self.panels]
        whole = alt.concat(*panels, columns=self.columns, config=alt.Config.from_dict(THEMES["light"]), spacing=28)
        with alt.data_transformers.enable("default", max_rows=None):
            whole.save(stem.with_suffix(".svg"))
            whole.save(stem.with_suffix(".png"), scale_factor=2)


def accuracy_figure(study: Study) -> Figure:
    """Accuracy on the test split against steps and against seconds, one row of panels per learning rate."""
    panels = [
        _accuracy_panel(study, rate, field, title)
        for rate in dict.fromkeys(arm.learning_rate for arm in study.arms if arm.curve)
        for field, title in (("step", "optimizer steps"), ("wall_s", "wall-clock seconds"))
    ]
    caption = (
        "Accuracy on the test split, with intervals over problems. Rings mark weights that are a leap; the dashed line "
        "is the target, the plain arm's final level. Each learning rate has its own scale. Seconds include "
        "choosing and gating leaps."
    )
    return Figure("accuracy", caption, tuple(panels))


def reward_figure(runs: Sequence[Run]) -> Figure:
    """Training reward against the step, raw and smoothed, one panel per run."""
    caption = "Mean reward of each training step (faint) and its running mean over a tenth of the run (strong)."
    panels = tuple(_reward_panel(run) for run in runs if any(row.reward is not None for row in run.metrics))
    return Figure("reward", caption, panels)


def evidence_figures(statistics: Sequence[Statistic]) -> tuple[Figure, ...]:
    """Measured values of all tensors beside their nulls: dominance of one delta, and linearity over the steps."""
    captions = {
        "dominance": "Rank-1 share of the last delta: nuclear σ₁/Σσ, Frobenius σ₁/‖ΔW‖, energy σ₁²/Σσ².",
        "linearity": "How straight the path is; R² forward is scored on steps that the fit has not seen, and shuffling "
        "steps cannot change a share.",
    }
    reading = "Each tensor has a line of its own, the first on top: a dot is measured, a bar the 90 % range of chance."
    return tuple(
        # Captions are in the order of the flag: False is one delta, True is over the steps.
        Figure(name, f"{caption} {reading}", tuple(_evidence_panel(one) for one in shown), columns=3)
        for over_time, (name, caption) in enumerate(captions.items())
        if (shown := [one for one in statistics if one.over_time == bool(over_time)])
    )


def _accuracy_panel(study: Study, rate: float, field: str, title: str) -> alt.LayerChart:
    arms = [arm for arm in study.arms if arm.learning_rate == rate]
    rows = [row for arm in arms for row in _curve(arm)]
    # The scale knows every arm of the study, the legend those of this rate: colours agree between panels.
    names, here = _order(study.arms), _order(arms)
    x = alt.X(f"{field}:Q", title=title, axis=alt.Axis(grid=False, tickCount=6))
    scale = alt.Scale(domain=_span(arms), nice=False)
    y = alt.Y("accuracy:Q", title="test accuracy", scale=scale, axis=alt.Axis(tickCount=6))
    color = alt.Color("arm:N", scale=alt.Scale(domain=names), legend=alt.Legend(symbolOpacity=1, values=here))
    dash = alt.StrokeDash("arm:N", scale=alt.Scale(domain=names, range=DASHES))
    shape = alt.Shape("arm:N", scale=alt.Scale(domain=names, range=SHAPES))
    chart = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y, color=color)
    band = chart.mark_area(opacity=0.14).encode(
        alt.Y("ci_low:Q", scale=scale, title="test accuracy"), alt.Y2("ci_high:Q")
    )
    # Left alone, a line is sorted along x, where a leap and its checkpoint tie.
    line = chart.mark_line(strokeWidth=2.5).encode(strokeDash=dash, order="index:Q")
    tooltip = _tooltips("arm", "step", "wall_s", "accuracy", "ci_low", "ci_high")
    points = chart.mark_point(filled=True, size=40, opacity=1).encode(shape=shape, tooltip=tooltip)
    leaps = alt.Chart(alt.Data(values=[row for row in rows if row["weights"] == "leap"])).encode(x=x, y=y)
    rings = leaps.mark_point(style="leap", filled=False, size=190, strokeWidth=1.8, opacity=1)
    layers = [band, line, points, rings]
    target = study.target_accuracy.get(rate)
    if target is not None:
        layers.append(alt.Chart(alt.Data(values=[{"target": target}])).mark_rule(style="target").encode(y="target:Q"))
    name = f"learning rate {rate:g}"
    return alt.LayerChart(layer=layers, height=HEIGHT, title=name, description=f"Accuracy against {title}, {name}")


def _order(arms: Sequence[Arm]) -> list[str]:
    """Names of arms; the three of every study come first, so that each always has the same colour, dash and shape."""
    names = dict.fromkeys(arm.name for arm in arms)
    usual = [name for name in (PLAIN, AVERAGED, LEAP) if name in names]
    return [*usual, *(name for name in names if name not in usual)]


def _curve(arm: Arm) -> list[dict[str, Any]]:
    """Points in the order in which they were reached: a leap stands at the same step as its checkpoint."""
    return [{"arm": arm.name, "index": index, **asdict(point)} for index, point in enumerate(arm.curve)]


def _span(arms: Sequence[Arm]) -> list[float]:
    """Accuracies that hold every interval, in twentieths, so that both panels of a learning rate have one scale."""
    points = [point for arm in arms for point in arm.curve]
    low, high = min(point.ci_low for point in points), max(point.ci_high for point in points)
    return [int(low * 20) / 20, min(1.0, (int(high * 20) + 1) / 20)]


def _reward_panel(run: Run) -> alt.LayerChart:
    rows = [{"step": row.step, "reward": row.reward} for row in run.metrics if row.reward is not None]
    rows = rows[:: 1 + len(rows) // MOST_POINTS]
    # Half of the window to each side: a tenth of the run in all.
    half = max(1, len(rows) // 20)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("step:Q", title="optimizer steps", axis=alt.Axis(grid=False, tickCount=6))
    )
    raw = base.mark_line(style="raw").encode(y=alt.Y("reward:Q", title="reward"))
    smoothed = base.transform_window(smoothed="mean(reward)", frame=[-half, half], sort=[alt.SortField("step")])
    tooltip = [alt.Tooltip("step:Q"), alt.Tooltip("smoothed:Q", format=".3f")]
    smooth = smoothed.mark_line(style="smooth").encode(y="smoothed:Q", tooltip=tooltip)
    return alt.LayerChart(layer=[raw, smooth], height=180, title=run.name, description=f"Training reward of {run.name}")


def _evidence_panel(statistic: Statistic) -> alt.LayerChart:
    order = ["measured", *(NULLS.get(null, null) for null in statistic.ranges)]
    tensors = enumerate(zip(statistic.tensors, statistic.measured, strict=True))
    dots = [{"row": "measured", "place": place, "tensor": tensor, "value": value} for place, (tensor, value) in tensors]
    bars = _bars(statistic)
    # R² forward has no lower end: a few wild tensors would squeeze all others into a corner.
    lowest = min([0.0, *(row["value"] for row in dots), *(row["low"] for row in bars)])
    label = statistic.label + ("; below −1 drawn at −1" if lowest < -1 else "")
    scale = alt.Scale(domain=[max(-1.0, lowest), 1.0], clamp=True, nice=False)
    value = alt.X("value:Q", scale=scale, axis=alt.Axis(tickCount=5), title=None)
    y = alt.Y("row:N", sort=order, title=None, scale=alt.Scale(domain=order, paddingInner=0.25))
    # The domain of a single tensor would have no width.
    offset = alt.YOffset("place:Q", scale=alt.Scale(domain=[0, max(1, len(dots) - 1)]))
    nulls = alt.Chart(alt.Data(values=bars)).encode(y, offset, tooltip=_tooltips("tensor", "low", "high"))
    thick = max(1.0, min(4.0, 60 / len(dots)))
    ranges = nulls.mark_rule(style="null", strokeWidth=thick).encode(alt.X("low:Q", scale=scale), alt.X2("high:Q"))
    # A range can be narrower than a pixel; its middle is drawn like a measured value, so that it is seen as well.
    middles = nulls.mark_circle(style="null", size=28, opacity=1).encode(value)
    measured = alt.Chart(alt.Data(values=dots)).encode(value, y, offset, tooltip=_tooltips("tensor", "value"))
    layers = [ranges, middles, measured.mark_circle(style="measured", size=28, opacity=1)]
    return alt.LayerChart(layer=layers, height=55 * len(order), title=label, description=f"{label}, every tensor")


def _bars(statistic: Statistic) -> list[dict[str, Any]]:
    """The range of each tensor under each null, with its middle as ``value``."""
    return [
        {
            "row": NULLS.get(null, null),
            "place": place,
            "tensor": tensor,
            "low": low,
            "value": (low + high) / 2,
            "high": high,
        }
        for null, ranges in statistic.ranges.items()
        for place, (tensor, one) in enumerate(zip(statistic.tensors, ranges, strict=True))
        if one is not None
        for low, high in [one]
    ]


def _tooltips(name: str, *numbers: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{name}:N"), *(alt.Tooltip(f"{number}:Q", format=".4~g") for number in numbers)]
