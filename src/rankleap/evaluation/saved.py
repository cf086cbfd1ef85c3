"""Evaluations on disk: ``evaluation/<task>/<checkpoint>.jsonl`` with every sample, ``summary.json`` beside it.

Both files are replaced in one step. ``summary.json`` maps a checkpoint's name to its summary; several processes may
write different checkpoints at once, for it is changed under a lock.
"""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankleap.errors import InputError
from rankleap.evaluation.metrics import Array, paired_difference
from rankleap.evaluation.result import Evaluation
from rankleap.files import read_json, read_jsonl, write_json, write_text
from rankleap.records import Estimate, Sample


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
