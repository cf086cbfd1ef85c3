"""What an arm saved: where its curve reaches the plain arm's final accuracy.

    t(a) = first step at which the isotonic fit of the curve reaches a, interpolated linearly
    saved = 1 - t_leap(target) / t_plain(target),      target = the plain arm's own final accuracy on its fit

Both arms are read by the same rule. The isotonic fit (least squares, non-decreasing) keeps a lucky point from counting as
arrival; since the plain arm may reach its final level before its last step, the rule never flatters the leap by a plain
arm that had stopped improving.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression


def reach(curve: Sequence[dict[str, Any]], target: float, axis: str) -> float | None:
    """Where a curve first reaches ``target`` on ``axis`` (``step`` or ``wall_s``); ``None`` if it does not."""
    x, y = np.array([p[axis] for p in curve], float), smooth(curve)
    # The fit repeats a level up to rounding: without the margin an arm could miss its own end.
    above = np.flatnonzero(y >= target - 1e-9)
    if not len(above):
        return None
    i = int(above[0])
    if i == 0 or y[i] == y[i - 1]:
        return float(x[i])
    return float(x[i - 1] + (target - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def smooth(curve: Sequence[dict[str, Any]]) -> np.ndarray:
    """The isotonic fit of a curve's accuracy."""
    return isotonic_regression([point["accuracy"] for point in curve]).x


def saved_fraction(plain: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], axis: str) -> float | None:
    """Fraction of steps or seconds saved to the plain arm's final accuracy; ``None`` where the other arm never gets there."""
    target = float(smooth(plain)[-1])
    mine, theirs = reach(other, target, axis), reach(plain, target, axis)
    # ``theirs`` is 0 where training never rose above the base, so there is nothing to save.
    return None if mine is None or not theirs else 1 - mine / theirs


def _saved_to_end(decayed: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float | None:
    """Steps saved to the end of a decayed run; only its end counts, its earlier points are of a rate still too high."""
    mine = reach(other, decayed[-1]["accuracy"], "step")
    return None if mine is None else 1 - mine / decayed[-1]["step"]


def summarise(arms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Targets and savings of the ``leap`` arms against ``plain`` of the same learning rate, keyed by learning rate."""
    by_name = {(arm["name"], arm["learning_rate"]): arm["curve"] for arm in arms}
    plains = {rate: curve for (name, rate), curve in by_name.items() if name == "plain"}
    targets = {rate: float(smooth(curve)[-1]) for rate, curve in plains.items()}
    result: dict[str, Any] = {"target_accuracy": targets}
    for key, against, axis in (
        ("steps_saved_fraction", "plain", "step"),
        ("wall_saved_fraction", "plain", "wall_s"),
        ("steps_saved_fraction_vs_averaged", "plain, averaged", "step"),
    ):
        result[key] = {
            f"{rate:g}": saved_fraction(by_name[against, rate], by_name["leap", rate], axis)
            for rate in plains
            if ("leap", rate) in by_name and (against, rate) in by_name
        }
    result["steps_saved_fraction_vs_decayed"] = {
        f"{rate:g}": _saved_to_end(by_name["plain, decayed", rate], by_name["leap", rate])
        for rate in plains
        if ("plain, decayed", rate) in by_name and ("leap", rate) in by_name
    }
    result["arms"] = [_line(arm, targets.get(arm["learning_rate"])) for arm in arms]
    result["target_accuracy"] = {f"{rate:g}": target for rate, target in targets.items()}
    return result


def _line(arm: dict[str, Any], target: float | None) -> dict[str, Any]:
    last = arm["curve"][-1]
    arrival = {
        "steps_to_target": None if target is None else reach(arm["curve"], target, "step"),
        "wall_to_target_s": None if target is None else reach(arm["curve"], target, "wall_s"),
    }
    facts = {key: last[key] for key in ("wall_s", "accuracy", "ci_low", "ci_high")}
    return {**arm, "steps": last["step"], **facts, **arrival}
