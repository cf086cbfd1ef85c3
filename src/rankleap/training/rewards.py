"""What a completion earns: the weighted sum of the task's verdict, form, length, repetition, and functions of the user's own.

    format       1 for exactly one marked answer, else 0
    repetition   (different 3-grams of tokens) / (all 3-grams) - 1 (2502.03373, C.2)

A user's function has TRL's signature, ``(prompts, completions, **columns) -> list[float | None]``; ``None`` gives none, and a
completion without any is left out and counted in ``skipped``. A function that raises, or gives something else, stops the run
with the sample it failed on: a reward that is silently wrong would be learned.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl.rewards.other_rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from rankleap.config import Recipe
from rankleap.errors import Caught, InputError, RecipeError, RunError
from rankleap.records import Problem
from rankleap.tasks.grading import GraderPool
from rankleap.tasks.task import MARKER, final_answer

Reward = Callable[..., list[float | None]]
Rewards = Mapping[str, tuple[str, float]]
"""A user's own rewards by name: an import path ``package.module:function`` and a weight."""
BUILT_IN = ("task", "format", "repetition")
SHOWN = 300
"""Characters of a prompt or completion in an error."""


def reward_functions(
    recipe: Recipe, own: Rewards, pool: GraderPool, problems: Sequence[Problem]
) -> tuple[list[Reward], list[float]]:
    """Functions for TRL and their weights: the recipe's, and the user's ``own``."""
    if not recipe.rewards and not own:
        raise RecipeError("rewards: none is asked for; name at least one, or leave the section out for the task's")
    named: dict[str, Any] = {
        "task": _task(pool, problems),
        "format": _format,
        "repetition": get_repetition_penalty_reward(),
    }
    weights = {**recipe.rewards, **{name: weight for name, (_, weight) in own.items()}}
    functions = {name: named[name] for name in recipe.rewards} | {n: import_reward(p) for n, (p, _) in own.items()}
    rewards, factors = [_checked(name, function) for name, function in functions.items()], list(weights.values())
    if buffer := recipe.algorithm.overlong_buffer:
        # Not wrapped: dynamic sampling tells it from the others by TRL's name (DAPO, 2503.14476, Eq. 13).
        punishment: Any = get_soft_overlong_punishment(recipe.train.max_completion_tokens, buffer)
        rewards, factors = [*rewards, punishment], [*factors, 1.0]
    return rewards, factors


def import_reward(path: str) -> Reward:
    """The function at ``package.module:function``; raises ``InputError`` that says what was looked for."""
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise InputError(f"a reward is named package.module:function, got {path!r}")
    try:
        found: Reward | None = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"reward {path!r} cannot be imported: {error}; is its folder on PYTHONPATH?") from None
    if not callable(found):
        raise InputError(f"reward {path!r} is {found!r}, which cannot be called")
    return found


def _task(pool: GraderPool, problems: Sequence[Problem]) -> Reward:
    by_id = {problem.id: problem for problem in problems}

    # TRL passes every column of the dataset by name, and state of its own.
    def reward(
        completions: list[str],
        problem_id: list[str],
        log_metric: Callable[[str, float], None] = lambda *_: None,
        **_: object,
    ) -> list[float | None]:
        verdicts = pool.grade([(text, by_id[which]) for text, which in zip(completions, problem_id, strict=True)])
        for verdict in verdicts:
            log_metric("grader_failures", float(verdict.how in ("timeout", "grader_error")))
            log_metric("unparsable", float(verdict.how == "unparsable"))
        return [verdict.score for verdict in verdicts]

    return reward


def _format(completions: list[str], **_: object) -> list[float | None]:
    """1 for exactly one marked final answer, else 0."""
    return [float(text.count(MARKER) == 1 and final_answer(text) is not None) for text in completions]


def _checked(name: str, function: Reward) -> Reward:
    """The function with its result checked, under the name that TRL logs it by."""

    def reward(**columns: Any) -> list[float | None]:
        count = len(columns["completions"])
        with Caught() as together:
            return _numbers(function(**columns), count)
        if isinstance(together.error, RunError):
            raise together.error  # a grader pool's own failure says already what is wrong
        # Only now one by one: most functions are far faster on a batch.
        for i in range(count):
            row = {k: [v[i]] if isinstance(v, list) and len(v) == count else v for k, v in columns.items()}
            with Caught() as alone:
                _numbers(function(**row), 1)
            if alone.error:
                sample = ", ".join(f"{k} {str(row[k][0])[:SHOWN]!r}" for k in ("prompts", "completions"))
                raise RunError(f"reward {name!r} failed: {_say(alone.error)}; on {sample}") from alone.error
        raise RunError(
            f"reward {name!r} failed on {count} completions, on none alone: {_say(together.error)}"
        ) from together.error

    reward.__name__ = name
    return reward


def _numbers(found: object, count: int) -> list[float | None]:
    if not isinstance(found, list | tuple) or len(found) != count:
        raise TypeError(f"it must return a list with a number or None for each of {count}, got {str(found)[:SHOWN]}")
    numbers = [None if value is None else float(value) for value in found]
    if not all(value is None or math.isfinite(value) for value in numbers):
        raise ValueError(f"it must return finite numbers or None, got {str(numbers)[:SHOWN]}")
    return numbers


def _say(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}"
