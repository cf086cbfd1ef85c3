"""The contract of a task, and how a final answer is found and compared.

A completion ends in ``Answer: X``. The text after the last marker, to the end of its line, is the answer. It is compared
as text, spaces collapsed, and then, when both sides are plain decimal numbers, as exact decimals: ``+085.0`` is ``85``.
Nothing of a completion is ever evaluated, and the work is linear in its length.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from rankleap.records import Problem, Split, Verdict

MARKER: Final = "Answer:"
# Digits are bounded, so arithmetic on them is too; ASCII, because \d takes those of every script.
_NUMBER: Final = re.compile(r"[+-]?\d{1,64}(\.\d{1,64})?", re.ASCII)
# Commas only where thousands go: 1,5 is not 15.
_GROUPED: Final = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d{1,64})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Task(ABC):
    """A source of problems, split three ways, with its own judge."""

    name: str

    @abstractmethod
    def problems(self, split: Split, count: int) -> list[Problem]:
        """Return the first ``count`` problems of a split: the same at every call; ``InputError`` if there are fewer."""

    @abstractmethod
    def grade(self, completion: str, problem: Problem) -> Verdict:
        """Judge one completion: 1 for the right final answer, 0 for any other or none."""


def final_answer(completion: str) -> str | None:
    """Return the text after the last ``Answer:``, spaces collapsed, or None where there is none."""
    # The last marker, since reasoning may name other candidates on the way.
    _, marker, tail = completion.rpartition(MARKER)
    lines = tail.strip().splitlines()
    return " ".join(lines[0].split()) if marker and lines else None


def judge(completion: str, reference: str) -> Verdict:
    """Compare the final answer of a completion to the reference, as text and then as a number."""
    answer = final_answer(completion)
    if answer is None:
        return Verdict(0.0, "unparsable")
    if answer == " ".join(reference.split()):
        return Verdict(1.0, "exact")
    given, wanted = _number(answer), _number(reference)
    if given is None or wanted is None:
        return Verdict(0.0, "exact")
    return Verdict(float(given == wanted), "numeric")


def _number(text: str) -> Decimal | None:
    """Read a plain decimal number, thousands commas allowed; no exponents, so a short text cannot be a huge number."""
    plain = text.replace(",", "") if _GROUPED.fullmatch(text) else text
    return Decimal(plain) if _NUMBER.fullmatch(plain) else None
