"""The glossary: what the stages hand to each other, as frozen records of plain values.

Importing this module imports neither torch nor transformers, so the CLI and grader workers may use it freely.
"""

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its reference answer; ``id`` is unique over all splits of its task."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a grader said of one completion.

    ``how`` is ``exact`` or ``numeric`` for an answer that was compared, ``unparsable`` where no answer could be
    found, ``timeout`` and ``grader_error`` where the grader itself failed: those two are counted, never hidden in a 0.
    """

    score: float
    how: Literal["exact", "numeric", "unparsable", "timeout", "grader_error"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One graded completion of one problem."""

    problem_id: str
    index: int
    completion: str
    tokens: int
    truncated: bool
    score: float
    how: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its two-sided confidence interval."""

    value: float
    low: float
    high: float
