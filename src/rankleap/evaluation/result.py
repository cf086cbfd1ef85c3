"""What an evaluation was asked, what it found, and how it is kept; imports no torch, so that the command line may use it.

On disk: ``evaluation/<task>/<checkpoint>.jsonl`` with every sample, ``summary.json`` beside it.

Both files are replaced in one step. ``summary.json`` maps a checkpoint's name to its summary; several processes may
write different checkpoints at once, for it is changed under a lock.

Shapes: P problems, K samples of each.
"""

import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from rankleap.errors import InputError
from rankleap.evaluation.metrics import Array, avg_at_k, paired_difference, pass_at_k
from rankleap.files import read_json, read_jsonl, write_json, write_text
from rankleap.records import Estimate, Sample


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


def samples_path(directory: Path, task: str, checkpoint_name: str) -> Path:
    """Return where a run directory keeps the samples of a checkpoint on a task."""
    if checkpoint_name in ("", ".", "..") or "/" in checkpoint_name:
        raise InputError(f"a checkpoint is saved under a plain name, got {checkpoint_name!r}; leave out '/'")
    return directory / "evaluation" / task / f"{checkpoint_name}.jsonl"


def write_evaluation(directory: Path, checkpoint_name: str, evaluation: Evaluation, samples: Sequence[Sample]) -> Path:
    """Write an evaluation into a run directory; return the path of its samples."""
    path = samples_path(directory, evaluation.task, checkpoint_name)
    save(path, evaluation, samples)
    return path


def save(path: Path, evaluation: Evaluation, samples: Sequence[Sample]) -> None:
    """Write the line of the summary, then all samples: after a kill between the two, the settings are known."""
    path.parent.mkdir(parents=True, exist_ok=True)
    summary = evaluation.summary()
    # Read and write under one lock, or two checkpoints finished together would lose one line.
    with _locked(path.parent):
        write_json(path.parent / "summary.json", {**read_summaries(path.parent), path.stem: summary})
    write_text(path, "".join(json.dumps(asdict(sample), allow_nan=False) + "\n" for sample in samples))


def read_summaries(directory: Path) -> dict[str, Any]:
    """Read ``summary.json`` of an ``evaluation/<task>`` directory; empty if there is none yet."""
    path = directory / "summary.json"
    return read_json(path) if path.exists() else {}


def read_samples(path: Path) -> list[Sample]:
    """Read saved samples, from here or from elsewhere in the same format."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; evaluate the checkpoint first")
    samples = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            samples.append(Sample(**row))
        except TypeError as error:
            raise InputError(f"{path}, line {number} is not a sample: {error}") from None
    return samples


def read_scores(path: Path) -> tuple[tuple[str, ...], Array]:
    """Read (problem ids, scores_PK); every problem must have equally many samples."""
    evaluation = Evaluation.of(path.parent.name, read_samples(path))
    return evaluation.problem_ids, evaluation.scores_PK


def compare(path_a: Path, path_b: Path) -> Estimate:
    """How much higher a scores than b, problem by problem; both must hold the same problems, in any order."""
    (ids_a, scores_a), (ids_b, scores_b) = read_scores(path_a), read_scores(path_b)
    alone = sorted(set(ids_a) ^ set(ids_b))
    if alone:
        raise InputError(
            f"a comparison needs the same problems in both, but {len(alone)} are only in one of {path_a} and {path_b}, "
            f"such as {alone[0]!r}; evaluate both on the same split and number of problems"
        )
    place = {problem_id: row for row, problem_id in enumerate(ids_b)}
    return paired_difference(scores_a, scores_b[[place[problem_id] for problem_id in ids_a]])


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    # A file of its own: renaming a new summary into place would leave the lock on the old one.
    with (directory / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
