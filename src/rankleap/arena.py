"""Reads recipes, trains many arms under one protocol, each scored on the test split along its run, gives what was saved.

An arm's curve has, at each step of one grid, the accuracy of what it would deploy there: the leap if the gate accepted one
at that step, else the checkpoint. All arms answer the same test problems with the same seed. Wall-clock is that of
training with everything in it (saving, recording, choosing and gating leaps), without the scoring for the curve.

    t(a) = first step at which the isotonic fit of the curve reaches a, interpolated linearly
    saved = 1 - t_leap(target) / t_plain(target),      target = the plain arm's own final accuracy on its fit

Both arms are read by the same rule. The isotonic fit (least squares, non-decreasing) keeps a lucky point from counting as
arrival; since the plain arm may reach its final level before its last step, the rule never flatters the leap by a plain
arm that had stopped improving.

The demo shows the whole idea on a bundled base: plain GRPO and leaps, at a tuned learning rate and at a tenth of it.
Papers train at conservative rates; that is where a leap has the most to give, and where the honest control is the plain
run at the tuned rate, which stands in the same table. At a conservative rate many small leaps pay: every five steps, as
far again as a few more windows would go. At the tuned rate going further loses, and what is left is denoising, written
as a leap while training stays on its own path.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rankleap.analysis import write_evidence
from rankleap.checkpoints import FullCheckpoint, base_of, effective_weights, load_weights, open_checkpoint, open_run
from rankleap.cluster import map_over
from rankleap.config import Recipe, make_recipe
from rankleap.evaluation import Sampling, write_evaluation
from rankleap.evaluation.evaluate import evaluate
from rankleap.files import machine, read_json, read_jsonl, versions, write_json
from rankleap.leap import Leap, leap_weights
from rankleap.predictors import get_predictor
from rankleap.tasks import get_task
from rankleap.tasks.grading import GraderPool
from rankleap.training import read_decisions, train
from rankleap.trajectory import run_trajectory

# One for all arms and steps: luck that two points share cancels in their difference.
TEST_SEED = 20_000_000
AVERAGED = 4
"""Checkpoints in the averaged baseline."""

TUNED, THIRD, TENTH = 3e-4, 1e-4, 3e-5
RATES = (TENTH, THIRD, TUNED)
STEPS = {TUNED: 120, THIRD: 120, TENTH: 120}
SMALL_LEAPS: dict[str, Any] = {
    "methods": ["weight-linear"],
    # The newest two alone, since the path bends (docs/log.md).
    "windows": [2],
    "every": 5,
    "samples": 1,
    # Any gain passes: asking more of so small a step rejects half of the good ones (docs/log.md).
    "confidence": 0.5,
}
LEAPS: dict[float, dict[str, Any]] = {
    TENTH: {**SMALL_LEAPS, "coefficients": [2.0, 4.0]},
    THIRD: {**SMALL_LEAPS, "coefficients": [1.0, 2.0]},
    TUNED: {
        "methods": ["average"],
        "windows": [4, 8, 12],
        "coefficients": [1.0],
        "every": 20,
        "samples": 2,
        "confidence": 0.5,
        "proceed_from": "origin",
    },
}


@dataclass(frozen=True, slots=True)
class Arm:
    """One run of a study: its recipe, where it goes, and how it is scored."""

    name: str
    recipe: Recipe
    out: Path
    grid: int
    samples: int
    averaged: bool = False
    """Also score the mean of the last four checkpoints at each step: the baseline that denoising has to beat."""


def run_arm(arm: Arm) -> list[dict[str, Any]]:
    """Train and score one arm; its curve, and that of its averaged twin if asked, as plain values. Done parts are not redone."""
    path = arm.out / "curve.json"
    if path.exists():
        return read_json(path)
    train(arm.recipe, arm.out)
    rows = _score(arm)
    if arm.averaged:
        # Of the plain arm alone, for a leap breaks the path whose linearity is measured.
        run = open_run(arm.out)
        write_evidence(run_trajectory(run, base_of(run, None)[1]), arm.out)
    write_json(path, rows)
    return rows


def _score(arm: Arm) -> list[dict[str, Any]]:
    recipe, run = arm.recipe, open_run(arm.out)
    base = base_of(run, None)[1]
    leaps = {row["step"]: row for row in read_decisions(arm.out)}
    logged_s = {row["step"]: row["wall_s"] for row in read_jsonl(arm.out / "metrics.jsonl")}
    trajectory = run_trajectory(run, base)
    curve, averaged = [], []
    with _Scorer(arm, base) as scorer:
        curve.append(
            {"step": 0, "wall_s": 0.0, "weights": "base", **scorer.score("base", effective_weights(base, base))}
        )
        averaged.append(curve[0])
        for step in [s for s in run.steps if s % arm.grid == 0]:
            leap = leaps.get(step, {})
            directory = arm.out / leap["directory"] if leap.get("accepted") else run.checkpoints[step].directory
            found = scorer.score(f"step-{step}", effective_weights(open_checkpoint(directory), base))
            wall_s = logged_s[step]
            curve.append(
                {"step": step, "wall_s": wall_s, "weights": "leap" if leap.get("accepted") else "checkpoint", **found}
            )
            if arm.averaged:
                # What was there at this step, and no later checkpoint.
                until = trajectory.until(step)
                # One checkpoint is its own mean.
                mean = Leap(get_predictor("average", AVERAGED).fit(until), 1.0) if len(until.steps) > 1 else None
                weights = leap_weights(mean, base) if mean else effective_weights(run.checkpoints[step], base)
                found = scorer.score(f"average-{step}", weights)
                averaged.append({"step": step, "wall_s": wall_s, "weights": "average", **found})
    facts = {"learning_rate": recipe.train.learning_rate, "seed": recipe.seed, "run": arm.out.name}
    tries = {"leaps_tried": len(leaps), "leaps_accepted": sum(row["accepted"] for row in leaps.values())}
    twin = (
        [{"name": f"{arm.name}, averaged", **facts, "leaps_tried": 0, "leaps_accepted": 0, "curve": averaged}]
        if arm.averaged
        else []
    )
    return [{"name": arm.name, **facts, **tries, "curve": curve}, *twin]


class _Scorer:
    """One live model that takes the weights of each point in turn and answers the test problems."""

    def __init__(self, arm: Arm, base: FullCheckpoint) -> None:
        recipe, task = arm.recipe, get_task(arm.recipe.task.name)
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        self._arm, self._problems = arm, task.problems("test", recipe.task.test_problems)
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base.directory)
        self._tokenizer = AutoTokenizer.from_pretrained(base.directory)
        self._sampling = Sampling(recipe.train.temperature, max_new_tokens=recipe.train.max_completion_tokens)
        self._pool = GraderPool(task)

    def __enter__(self) -> "_Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def score(self, name: str, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Accuracy with its interval; every sample is kept under ``evaluation/``."""
        load_weights(self._model, weights)
        k = self._arm.samples
        found, samples = evaluate(
            self._model, self._tokenizer, self._pool, self._problems, k=k, sampling=self._sampling, seed=TEST_SEED
        )
        write_evaluation(self._arm.out, name, found, samples)
        average = found.summary()["avg"]
        return {"accuracy": average["value"], "ci_low": average["low"], "ci_high": average["high"]}


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


def make_arm(out: Path, name: str, task: str, rate: float, seed: int = 0) -> Arm:
    """One run on the bundled base of a task: ``plain``, ``plain, decayed`` (to zero, linearly) or ``leap``."""
    train = {
        "steps": STEPS[rate],
        "learning_rate": rate,
        "schedule": "linear" if name == "plain, decayed" else "constant",
        "save_every": 5,
        "max_completion_tokens": 24,
        # Two arms run side by side on two cores.
        "threads": 1,
    }
    values: dict[str, Any] = {
        "name": f"{name.replace(', ', '-')}-{rate:g}",
        "seed": seed,
        "model": {"base": f"bundled:{task}"},
        "task": {"name": task},
        "train": train,
    }
    if name == "leap":
        values["leap"] = LEAPS[rate]
    recipe = make_recipe(values, f"{name} at {rate:g}")
    # The averaged twin costs no training, only scoring, so every plain run has one.
    return Arm(name, recipe, out / recipe.name, grid=20, samples=4, averaged=name == "plain")


def demo_arms(out: Path) -> list[Arm]:
    """The four runs, longest first."""
    return [make_arm(out, name, "sums", rate) for rate in (TENTH, TUNED) for name in ("leap", "plain")]


def run_demo(out: Path, on_poll: Callable[[], None] | None = None) -> dict[str, Any]:
    """Run the arms two at a time and write ``summary.json``; what is done already is not redone."""
    arms = demo_arms(out)
    rows = [row for rows in map_over(run_arm, arms, 2, on_poll) for row in rows]
    rows.sort(key=lambda row: (-row["learning_rate"], row["name"] != "plain", row["name"]))
    runs = [arm.out.name for arm in arms]
    summary = {
        "name": "demo",
        "task": "sums",
        **summarise(rows),
        "machine": machine(),
        "versions": versions(),
        "runs": runs,
    }
    write_json(out / "summary.json", summary)
    return summary
