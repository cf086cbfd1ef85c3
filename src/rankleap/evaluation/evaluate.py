"""Loads a model, samples and grades: in memory (``evaluate``), or onto disk with only what is missing (``evaluate_checkpoint``).

Shapes: P problems, K samples of each.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rankleap.checkpoints import FullCheckpoint, effective_weights, load_weights, open_checkpoint, resolve_base
from rankleap.checkpoints.layouts import LAYOUTS, layout_of
from rankleap.errors import CheckpointError, InputError
from rankleap.evaluation.result import Evaluation, Sampling, read_samples, read_summaries, save
from rankleap.evaluation.sampler import sample
from rankleap.files import read_json
from rankleap.records import Problem, Sample
from rankleap.tasks.grading import GraderPool
from rankleap.tasks.task import Task

Load = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]

# A kill loses about this many samples; fewer would rewrite the whole file more often.
_SAMPLES_PER_WRITE = 4096


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grader: GraderPool | Task,
    problems: Sequence[Problem],
    *,
    k: int,
    sampling: Sampling,
    seed: int,
) -> tuple[Evaluation, list[Sample]]:
    """Draw ``k`` completions of each problem and grade them, in memory; give a pool where it is done many times.

    A model in training is left as it was found, its random state too.
    """
    if isinstance(grader, Task):
        with GraderPool(grader) as pool:
            return evaluate(model, tokenizer, pool, problems, k=k, sampling=sampling, seed=seed)
    started = perf_counter()
    # One call for all: batches stay full across problems, and graders get their work in one piece.
    drawn = sample(model, tokenizer, [problem.prompt for problem in problems], k, sampling, seed)
    flat = [(problem, i, one) for problem, group in zip(problems, drawn, strict=True) for i, one in enumerate(group)]
    verdicts = grader.grade([(one.text, problem) for problem, _, one in flat])
    samples = [
        Sample(problem.id, i, one.text, one.tokens, one.truncated, verdict.score, verdict.how)
        for (problem, i, one), verdict in zip(flat, verdicts, strict=True)
    ]
    settings = {**sampling.settings(), "seed": seed}
    return Evaluation.of(grader.task.name, samples, perf_counter() - started, **settings), samples


def evaluate_checkpoint(
    path: Path, load: Load, grader: GraderPool, problems: Sequence[Problem], *, k: int, sampling: Sampling, seed: int
) -> Evaluation:
    """Bring the samples at ``path`` up to ``k`` of each problem and return their evaluation.

    What is saved is kept: only missing samples are drawn, written every few thousand, and ``load`` is called for them
    alone. Samples drawn with other settings, or of other problems, are refused rather than mixed or overwritten.
    """
    # The seed that was asked, not a block's own: the next call is compared with it.
    settings = {**sampling.settings(), "seed": seed}
    saved, seconds = _read_saved(path, problems, settings)
    lacking = [problem for problem in problems if len(saved[problem.id]) < k]
    if lacking:
        model, tokenizer = load()
        for block in _blocks(lacking, saved, k):
            have = len(saved[block[0].id])
            block_seed = _block_seed(seed, have, block)
            part, drawn = evaluate(model, tokenizer, grader, block, k=k - have, sampling=sampling, seed=block_seed)
            for one in drawn:
                saved[one.problem_id].append(replace(one, index=one.index + have))
            seconds += part.seconds
            done = _gather(grader.task.name, problems, saved, k, seconds, settings)
            # All samples, those of problems still short of k too: a kill costs one block.
            save(path, done, [one for group in saved.values() for one in group])
    return _gather(grader.task.name, problems, saved, k, seconds, settings)


def _read_saved(
    path: Path, problems: Sequence[Problem], settings: dict[str, float]
) -> tuple[dict[str, list[Sample]], float]:
    """Return what is saved of each problem, nothing included, and the seconds it took."""
    saved: dict[str, list[Sample]] = {problem.id: [] for problem in problems}
    summary = read_summaries(path.parent).get(path.stem)
    # A summary without samples is what a kill between the two writes leaves.
    if not path.exists():
        return saved, 0.0
    if summary is None or summary["settings"] != settings:
        before = "unknown settings" if summary is None else summary["settings"]
        raise InputError(f"{path} was drawn with {before}, asked were {settings}; delete it or write elsewhere")
    for one in read_samples(path):
        saved.setdefault(one.problem_id, []).append(one)
    # The asked problems were put in first, so what follows them was not asked for.
    others = list(saved)[len(problems) :]
    # More problems than asked are fine; others instead of those asked are another split.
    if others and any(not saved[problem.id] for problem in problems):
        raise InputError(
            f"{path} holds other problems than asked, such as {others[0]!r}; write each split to its own directory"
        )
    return saved, float(summary["seconds"])


def _blocks(lacking: Sequence[Problem], saved: dict[str, list[Sample]], k: int) -> Iterator[Sequence[Problem]]:
    """Cut problems into runs that lack equally many samples, each small enough to lose, of two problems at least."""
    for have, group in groupby(
        sorted(lacking, key=lambda problem: len(saved[problem.id])), key=lambda problem: len(saved[problem.id])
    ):
        alike = list(group)
        # Two at least: the summary written after the first block needs two problems for an interval.
        size = max(2, _SAMPLES_PER_WRITE // (k - have))
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _block_seed(seed: int, have: int, block: Sequence[Problem]) -> int:
    """A seed of its own for each draw: filling up with the first seed again would repeat the first samples."""
    ids = "\n".join(problem.id for problem in block)
    return int.from_bytes(hashlib.blake2b(f"{seed} {have} {ids}".encode(), digest_size=7).digest())


def _gather(
    task: str,
    problems: Sequence[Problem],
    saved: dict[str, list[Sample]],
    k: int,
    seconds: float,
    settings: dict[str, float],
) -> Evaluation:
    """Evaluate the first ``k`` samples of the problems that have them."""
    whole = [saved[problem.id][:k] for problem in problems if len(saved[problem.id]) >= k]
    return Evaluation.of(task, [one for group in whole for one in group], seconds, **settings)


def load_model(name: str, base: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return (model, tokenizer) on the GPU where there is one; ``base`` overrides the base that an adapter names.

    Weights stay in the precision they were saved in, and an adapter stays apart: merging would round it away in bf16. A
    checkpoint that neither Transformers nor PEFT reads is put into its base, in float32.
    """
    directory = resolve_base(name)
    layout, place = layout_of(directory)
    if place != directory or layout not in (LAYOUTS["hf"], LAYOUTS["hf-bin"], LAYOUTS["peft"]):
        return _foreign(directory, base)
    config = directory / "adapter_config.json"
    named = (base or read_json(config).get("base_model_name_or_path")) if config.exists() else None
    if config.exists() and named is None:
        raise CheckpointError(f"{config} does not name the adapter's base; give it with --base")
    base_directory = resolve_base(named) if named else directory
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_directory)
        if base_directory != directory:
            model = _adapted(model, directory)
        # A trainer saves the tokenizer beside its adapter; a bare adapter borrows the base's.
        tokenizer = AutoTokenizer.from_pretrained(
            directory if (directory / "tokenizer.json").exists() else base_directory
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a causal language model from {directory}: {error}") from None
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    return model, tokenizer


def _foreign(directory: Path, base: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if base is None:
        raise CheckpointError(f"{directory} holds no model that can be loaded by itself; name its base with --base")
    base_directory = resolve_base(base)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_directory, dtype=torch.float32)
    load_weights(model, effective_weights(open_checkpoint(directory), FullCheckpoint(base_directory)))
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    return model, AutoTokenizer.from_pretrained(base_directory)


def _adapted(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    # Here and not above, so that full checkpoints load where the extra is not installed.
    from peft import PeftModel

    return cast(PreTrainedModel, PeftModel.from_pretrained(model, directory))
