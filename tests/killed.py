"""Runs that are as short as they can be, and runs that are cut short."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankleap.algorithms import ALGORITHMS
from rankleap.config import Recipe
from rankleap.files import read_jsonl
from rankleap.training import train
from recipes import tiny

UNEVEN = {"uneven": ("killed:uneven", 1.0)}


def uneven(completions: list[str], **_: Any) -> list[float]:
    """A reward that tells apart completions of a model that knows nothing: by their letters."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def short(
    adapter: str, algorithm: str, base: Path, beta: float = 0.0, **changes: Any
) -> tuple[Recipe, dict[str, tuple[str, float]]]:
    """Two steps of a pair on ``small_base``, with ``changes`` to ``[train]``, and the rewards to train it with."""
    learns_from = ALGORITHMS[algorithm].learns_from
    teachers = {"teacher": "bundled:sums", "samples": str(base / "right.jsonl")}
    sizes = {"steps": 2, "prompts_per_step": 2, "completions_per_prompt": 4, "max_completion_tokens": 4}
    by_rewards = learns_from == "rewards"
    recipe = tiny(
        model__base=str(base),
        task__train_problems=8,
        adapter={"method": adapter, "rank": 2, "alpha": 4},
        algorithm={"name": algorithm, "teacher": teachers.get(learns_from), "beta": beta},
        # Without the task's, no process for its grader has to start.
        rewards={} if by_rewards else {"task": 1.0},
        **{f"train__{key}": value for key, value in (sizes | changes).items()},
    )
    return recipe, UNEVEN if by_rewards else {}


def numbers(out: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics without what clocks and memory say."""
    rows = read_jsonl(out / "metrics.jsonl")
    return [{key: v for key, v in row.items() if not key.endswith("_s") and key != "peak_memory_bytes"} for row in rows]


class KillBefore(TrainerCallback):
    """Ends the process's work before the step that follows ``step`` finished ones, as a kill between two would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class KillAmid(TrainerCallback):
    """Counts calls and returns of Python and C in each step, and in the logging and saving after it; writes them to ``counts``.

    At the ``at``-th of these, (step, is the step over, count), a SIGKILL ends the process.
    """

    def __init__(self, counts: Path, at: tuple[int, bool, int] | None) -> None:
        self.path, self.at = counts, at
        self.seen: list[tuple[int, bool, int]] = []

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._count(state.global_step + 1, False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._count(state.global_step, True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._count(0, False)
        sys.setprofile(None)
        self.path.write_text(json.dumps(self.seen))

    def _count(self, step: int, over: bool) -> None:
        self.seen.append((step, over, 0))

        def count(*_: Any) -> None:
            now = self.seen[-1] = (step, over, self.seen[-1][2] + 1)
            if now == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)


FORK = multiprocessing.get_context("forkserver")
# Loaded once in the server, and not in each of the processes that it forks.
FORK.set_forkserver_preload(["rankleap.training", "transformers.models.llama.modeling_llama"])


def train_apart(
    recipe: Recipe, out: Path, rewards: dict[str, tuple[str, float]], at: tuple[int, bool, int] | None
) -> int | None:
    """Exit code of a process of its own that trains with a ``KillAmid``, whose counts are beside ``out``."""
    process = FORK.Process(target=_train, args=(recipe, out, rewards, at))
    process.start()
    process.join()
    return process.exitcode


def _train(recipe: Recipe, out: Path, rewards: dict[str, tuple[str, float]], at: tuple[int, bool, int] | None) -> None:
    train(recipe, out, rewards=rewards, callbacks=[KillAmid(out.with_suffix(".json"), at)])
