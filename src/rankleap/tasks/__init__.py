"""Reads a task name, gives problems split three ways, judges answers. Every task is a line in ``TASKS``."""

from typing import Final

from rankleap.errors import UnknownNameError
from rankleap.tasks.reasoning_gym import ReasoningGym
from rankleap.tasks.task import Task

__all__ = ["TASKS", "ReasoningGym", "Task", "get_task"]

# Sizes at which the bundled bases solve some and miss some: equal rewards in a group give no gradient.
_TWO_DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
_SHORT_WORDS = {"min_word_len": 5, "max_word_len": 7}

TASKS: Final[dict[str, Task]] = {
    "sums": ReasoningGym("sums", "chain_sum", _TWO_DIGITS, keep=r"problem: (.+)", template="{}"),
    "backward": ReasoningGym("backward", "spell_backward", _SHORT_WORDS, keep=r": (\w+)$", template="Backward: {} ="),
    "ends": ReasoningGym("ends", "spell_backward", _SHORT_WORDS, keep=r": (\w+)$", template="Reverse: {} ="),
}


def get_task(name: str) -> Task:
    """Return the task of that name, or raise ``UnknownNameError`` with the closest names."""
    if name not in TASKS:
        raise UnknownNameError("task", name, TASKS)
    return TASKS[name]
