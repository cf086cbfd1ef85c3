"""What an evaluation was asked and what it found; imports no torch, so that the command line and reports may use it.

Shapes: P problems, K samples of each.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from rankleap.errors import InputError
from rankleap.evaluation.metrics import Array, avg_at_k, pass_at_k
from rankleap.records import Sample


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn; temperature 0 is greedy decoding."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 512
    """Completions generated at once: bounds the memory, and is no part of the distribution."""

    def __post_init__(self) -> None:
        # Each bound is written so that NaN fails it.
        wrong = [
            f"{name}: should be {bound}, got {value}"
            for name, bound, value, good in (
                ("temperature", "at least 0", self.temperature, 0 <= self.temperature < float("inf")),
                ("top_p", "above 0 and at most 1", self.top_p, 0 < self.top_p <= 1),
                ("max_new_tokens", "at least 1", self.max_new_tokens, self.max_new_tokens >= 1),
                ("batch_size", "at least 1", self.batch_size, self.batch_size >= 1),
            )
            if not good
        ]
        if wrong:
            raise InputError(f"sampling is not valid: {'; '.join(wrong)}")

    def settings(self) -> dict[str, float]:
        """Return what decides the distribution of completions, and so which samples may be pooled."""
        return {"temperature": self.temperature, "top_p": self.top_p, "max_new_tokens": self.max_new_tokens}


# No generated ==: comparing arrays gives an array, not a yes or no.
@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Scores of one model on the problems of one task, and how they came about."""

    task: str
    problem_ids: tuple[str, ...]
    scores_PK: Array
    verdicts: Mapping[str, int]
    """How often each kind of verdict was given; ``timeout`` and ``grader_error`` are the grader's own failures."""
    mean_tokens: float
    truncation_rate: float
    seconds: float = 0.0
    settings: Mapping[str, float] = field(default_factory=dict)
    """Of the sampling; empty for samples that came from elsewhere."""

    @classmethod
    def of(cls, task: str, samples: Sequence[Sample], seconds: float = 0.0, **settings: float) -> Self:
        """Gather samples, which may come in any order; every problem must have equally many."""
        scores: dict[str, list[float]] = {}
        for sample in samples:
            scores.setdefault(sample.problem_id, []).append(sample.score)
        counts = sorted({len(row) for row in scores.values()})
        if len(counts) != 1:
            raise InputError(
                f"task {task!r}: every problem needs equally many samples, "
                + (f"got from {counts[0]} to {counts[-1]}; evaluate again to fill up" if counts else "got none at all")
            )
        return cls(
            task,
            tuple(scores),
            np.array(list(scores.values()), float),
            dict(Counter(sample.how for sample in samples)),
            float(np.mean([sample.tokens for sample in samples])),
            float(np.mean([sample.truncated for sample in samples])),
            seconds,
            settings,
        )

    def summary(self) -> dict[str, Any]:
        """Everything worth a line, as plain values: avg@K, pass@k for each power of two up to K, and the rest."""
        problems, samples = self.scores_PK.shape
        # Powers of two up to K, as the papers plot pass@k.
        powers = [2**i for i in range(samples.bit_length())]
        return {
            "task": self.task,
            "problems": problems,
            "samples": samples,
            "avg": asdict(avg_at_k(self.scores_PK)),
            "pass": {str(k): asdict(pass_at_k(self.scores_PK, k)) for k in powers},
            "mean_tokens": self.mean_tokens,
            "truncation_rate": self.truncation_rate,
            "verdicts": dict(self.verdicts),
            "seconds": self.seconds,
            # Samples that came from elsewhere have no time of their own.
            "samples_per_s": problems * samples / self.seconds if self.seconds > 0 else None,
            "settings": dict(self.settings),
        }
