"""Leaps from a run on disk: load the base once, try candidates in that one model, gate, write.

Checkpoints are used where they are; a directory that holds only a recorded trajectory is leapt from its rank-k factors.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rankleap.checkpoints import FullCheckpoint, base_of, load_weights, open_run, resolve_base
from rankleap.errors import CheckpointError, InputError, NotFiniteError
from rankleap.evaluation import Evaluation, Sampling, read_samples
from rankleap.evaluation.evaluate import evaluate
from rankleap.evaluation.result import samples_path
from rankleap.evaluation.sampler import evaluation_mode, forward_kl, sample, tokenize
from rankleap.files import read_json
from rankleap.leap.apply import Leap, adapter_weights, leap_weights, write_leap, write_leap_adapter
from rankleap.leap.backtest import BackTest, backtest
from rankleap.leap.gate import GateSettings
from rankleap.leap.search import KL, Candidates, Decision, Score, halves, search
from rankleap.predictors import get_predictor
from rankleap.records import Problem
from rankleap.tasks import get_task
from rankleap.tasks.grading import GraderPool
from rankleap.trajectory import RecordedTrajectory, Trajectory, run_trajectory


class BaseReference:
    """Forward KL(base‖leap), which predicts forgetting where norms do not (RL's Razor, 2509.04259).

    The base is loaded when first needed; it costs the memory of a second model.
    """

    def __init__(self, directory: Path, sampling: Sampling, seed: int) -> None:
        """``directory`` holds the base; one completion of each problem is drawn from it with ``seed``."""
        self._directory, self._sampling, self._seed = directory, sampling, seed

    @cached_property
    def _model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self._directory)

    def kl(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> float:
        """Forward KL in nats per token on completions that the base itself gives to these problems."""
        self._model.to(model.device)  # pyright: ignore[reportArgumentType]
        prompts = [problem.prompt for problem in problems]
        # Drawn with one seed at every call, so all leaps are held against the same completions.
        drawn = sample(self._model, tokenizer, prompts, 1, self._sampling, self._seed)
        return forward_kl(self._model, model, tokenizer, prompts, drawn).value


@dataclass(frozen=True, slots=True)
class Trial:
    """How leaps are tried: on which task, with how many validation problems and samples of each."""

    task: str
    problems: int
    samples: int
    sampling: Sampling
    seed: int
    adapter_rank: int | None = None
    """Rank of the adapter that the leap will be written as; the gate judges what is written, truncation included."""


@dataclass(frozen=True, slots=True)
class Source:
    """A trajectory on disk with its base."""

    trajectory: Trajectory
    base: FullCheckpoint
    base_name: str


def open_source(directory: Path, base_name: str | None, until: int | None = None) -> Source:
    """The trajectory of a run: exact from its checkpoints, or from ``trajectory/`` where there are none."""
    recorded = next((path for path in (directory, directory / "trajectory") if (path / "index.json").exists()), None)
    try:
        run = open_run(directory)
        name, base = base_of(run, base_name)
        trajectory: Trajectory = run_trajectory(run, base)
    except CheckpointError:
        # Checkpoints that are there but cannot be read are not silently replaced by their factors.
        if recorded is None or (directory / "checkpoints").is_dir():
            raise
        trajectory = RecordedTrajectory(recorded)
        name = base_name or trajectory.index["base"]
        base = FullCheckpoint(resolve_base(name))
        trajectory.require_base(base)
    return Source(trajectory if until is None else trajectory.until(until), base, name)


def try_leaps(source: Source, candidates: Candidates, trial: Trial, gate: GateSettings) -> Decision:
    """Choose and gate a leap; nothing is written."""
    problems = get_task(trial.task).problems("validation", trial.problems)
    with _scoring(source, trial) as (score, kl):
        return search(source.trajectory, candidates, score, problems, gate, None if gate.max_kl is None else kl)


def backtest_accuracy(source: Source, candidates: Candidates, trial: Trial) -> BackTest:
    """The back-test in weights and in accuracy, on the choosing half of the validation problems."""
    choosing, _ = halves(get_task(trial.task).problems("validation", trial.problems))
    with _scoring(source, trial) as (score, _):
        return backtest(source.trajectory, candidates, score, choosing)


@contextmanager
def _scoring(source: Source, trial: Trial) -> Iterator[tuple[Score, KL]]:
    """Score and KL of leaps in one live model."""
    disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.base.directory)
    tokenizer = AutoTokenizer.from_pretrained(source.base.directory)
    # The second model is loaded when KL is first asked for, which may be never.
    reference = BaseReference(source.base.directory, trial.sampling, trial.seed)
    k, sampling, seed = trial.samples, trial.sampling, trial.seed

    def weights(leap: Leap | None) -> Iterable[tuple[str, Tensor]]:
        if leap is None:
            return leap_weights(Leap(get_predictor("hold").fit(source.trajectory), 1.0), source.base)
        rank = trial.adapter_rank
        return leap_weights(leap, source.base) if rank is None else adapter_weights(leap, source.base, rank)

    with GraderPool(get_task(trial.task)) as pool:

        def score(leap: Leap | None, asked: Sequence[Problem]) -> Evaluation:
            load_weights(model, weights(leap))
            require_finite_logits(model, tokenizer, asked[0].prompt)
            return evaluate(model, tokenizer, pool, asked, k=k, sampling=sampling, seed=seed)[0]

        def kl(leap: Leap, asked: Sequence[Problem]) -> float:
            load_weights(model, weights(leap))
            return reference.kl(model, tokenizer, asked)

        yield score, kl


def require_finite_logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Raise ``NotFiniteError`` if a model answers one prompt with NaN or infinity, before sampling trips over it."""
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad():
        logits = model(input_ids=torch.tensor(tokenize(tokenizer, [prompt]), device=device)).logits
    if not bool(torch.isfinite(logits).all()):
        raise NotFiniteError("the leap's logits have NaN or infinity")


def run_accuracies(directory: Path, task: str, problems: Sequence[Problem], steps: Sequence[int]) -> dict[int, float]:
    """Accuracy by step of a run's own evaluations, on those of ``problems`` that all of its evaluated steps answered.

    Empty if none was evaluated; raises ``InputError`` if what was answered are other problems, such as the test split's.
    """
    asked, by_step = {problem.id for problem in problems}, {}
    for step in steps:
        path = samples_path(directory, task, f"checkpoint-{step}")
        if path.exists():
            by_step[step] = samples = read_samples(path)
            asked &= {one.problem_id for one in samples}
            if not asked:
                raise InputError(
                    f"{path} answers {samples[0].problem_id!r} and its like; accuracies for a leap need the validation problems "
                    "that it is chosen on: rankleap evaluate --run DIR --split validation --out ELSEWHERE, then --scores"
                )
    return {step: fmean(one.score for one in samples if one.problem_id in asked) for step, samples in by_step.items()}


def read_accuracies(file: Path) -> dict[int, float]:
    """Accuracies that a user gives: ``{"split": "validation", "accuracy": {"20": 0.31, …}}``; the test split is refused."""
    found = read_json(file)
    split = found.get("split") if isinstance(found, dict) else None
    if split not in ("validation", "train"):
        raise InputError(
            f"{file} must say that its accuracies are of split 'validation' or 'train', got {split!r}; test accuracies may not "
            'choose a leap. Write {"split": "validation", "accuracy": {"20": 0.31, …}}'
        )
    try:
        return {int(step): float(value) for step, value in found["accuracy"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f'{file} needs "accuracy", a number for each step; got {error!r}') from None


def write_decision(
    decision: Decision, source: Source, out: Path, adapter_rank: int | None, more: Mapping[str, object] | None = None
) -> Path:
    """Write the leap of a decision as a full checkpoint, or as an adapter of rank ``adapter_rank``; ``more`` is told as well."""
    evidence = {**decision.evidence(), "base": source.base_name, **(more or {})}
    if adapter_rank is None:
        return write_leap(decision.leap, source.base, out, evidence)
    return write_leap_adapter(decision.leap, source.base, out, evidence, rank=adapter_rank, base_name=source.base_name)
