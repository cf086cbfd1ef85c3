"""Reads a task name, gives problems split three ways, judges answers. Every task is a line in ``TASKS``.

Problems come from the generators of reasoning-gym, without downloads. One is drawn by index from a seeded generator; its
question is cut to the part that ``keep`` matches, and a prompt seen before is dropped. The prompt's own hash decides its
split, so the three splits are disjoint by construction, and a longer list of problems only continues a shorter one.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from rankleap.errors import InputError, MissingExtraError, UnknownNameError
from rankleap.records import Problem, Split, Verdict
from rankleap.tasks.task import Task, judge

__all__ = ["TASKS", "ReasoningGym", "Task", "get_task", "split_of"]

_FIFTHS: tuple[Split, ...] = ("train", "train", "train", "validation", "test")


def split_of(prompt: str) -> Split:
    """Return the split that a prompt belongs to: three fifths train, one validation, one test, by BLAKE2b."""
    # Not Python's own hash, which differs from one process to the next.
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return _FIFTHS[int.from_bytes(digest) % len(_FIFTHS)]


@dataclass(frozen=True, slots=True)
class ReasoningGym(Task):
    """One reasoning-gym dataset under fixed parameters; needs the extra ``train``."""

    dataset: str
    """Name of the dataset in reasoning-gym."""
    params: Mapping[str, int]
    """Settings of the generator."""
    keep: str
    """Regular expression whose first group is the part of the question that is kept."""
    template: str
    """The prompt, with ``{}`` where the kept part goes."""
    draws: int = 40_000
    """How many indices are tried, which bounds the number of distinct problems."""

    def problems(self, split: Split, count: int) -> list[Problem]:
        """Draw until ``count`` distinct problems of the split are found."""
        found: list[Problem] = []
        for prompt, answer in self._distinct() if count > 0 else ():
            if split_of(prompt) == split:
                # Numbered within the split, so that an id stays the same when more problems are asked for.
                found.append(Problem(f"{self.name}/{split}/{len(found)}", prompt, answer))
            if len(found) == count:
                return found
        if len(found) < count:
            raise InputError(f"task {self.name!r} has {len(found)} {split} problems, {count} were asked; ask for fewer")
        return found

    def grade(self, completion: str, problem: Problem) -> Verdict:
        """Compare the text after ``Answer:`` to the reference."""
        return judge(completion, problem.answer)

    def _distinct(self) -> Iterator[tuple[str, str]]:
        """Yield (prompt, answer), each prompt once, in the order of drawing."""
        try:
            import reasoning_gym
        except ImportError:
            raise MissingExtraError(f"task {self.name!r}", "train") from None
        # A constant seed, not the recipe's: every run and evaluation must mean the same problems.
        generator = reasoning_gym.create_dataset(self.dataset, seed=0, size=self.draws, **self.params)
        seen: set[str] = set()
        for index in range(self.draws):
            entry = generator[index]
            kept = re.search(self.keep, entry["question"])
            if kept is None:
                raise InputError(f"{self.keep!r} is not in the {self.dataset} question {entry['question']!r}")
            prompt = self.template.format(kept[1])
            if prompt not in seen:
                seen.add(prompt)
                yield prompt, entry["answer"]


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
