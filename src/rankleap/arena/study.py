"""A study: arms trained under one protocol, each scored on the test split along its run.

An arm's curve has, at each step of one grid, the accuracy of what it would deploy there: the leap if the gate accepted one
at that step, else the checkpoint. All arms answer the same test problems with the same seed. Wall-clock is that of
training with everything in it (saving, recording, choosing and gating leaps), without the scoring for the curve.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rankleap.analysis import write_evidence
from rankleap.checkpoints import FullCheckpoint, base_of, effective_weights, load_weights, open_checkpoint, open_run
from rankleap.config import Recipe
from rankleap.evaluation import Sampling, write_evaluation
from rankleap.evaluation.evaluate import evaluate
from rankleap.files import read_json, read_jsonl, write_json
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
