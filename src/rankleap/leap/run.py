"""Leaps from a run on disk: load the base once, try candidates in that one model, gate, write.

Checkpoints are used where they are; a directory that holds only a recorded trajectory is leapt from its rank-k factors.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rankleap.checkpoints import FullCheckpoint, base_of, dense, load_weights, open_run, resolve_base
from rankleap.errors import CheckpointError
from rankleap.evaluation import Sampling
from rankleap.evaluation.divergence import forward_kl
from rankleap.evaluation.evaluate import evaluate
from rankleap.evaluation.sampler import sample
from rankleap.leap.apply import Leap, adapter_weights, leap_weights, write_leap, write_leap_adapter
from rankleap.leap.gate import GateSettings
from rankleap.leap.search import Candidates, Decision, search
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
    disable_progress_bar()
    task = get_task(trial.task)
    problems = task.problems("validation", trial.problems)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.base.directory)
    tokenizer = AutoTokenizer.from_pretrained(source.base.directory)
    last = source.trajectory.steps[-1]

    with GraderPool(task) as pool:

        def weights(leap: Leap | None) -> Iterable[tuple[str, Tensor]]:
            if leap is None:
                return _step_weights(source, last)
            rank = trial.adapter_rank
            return leap_weights(leap, source.base) if rank is None else adapter_weights(leap, source.base, rank)

        def score(leap: Leap | None, asked: Sequence[Problem]) -> NDArray[np.float64]:
            load_weights(model, weights(leap))
            k, sampling = trial.samples, trial.sampling
            return evaluate(model, tokenizer, pool, asked, k=k, sampling=sampling, seed=trial.seed)[0].scores_PK

        def kl(leap: Leap, asked: Sequence[Problem]) -> float:
            load_weights(model, weights(leap))
            return reference.kl(model, tokenizer, asked)

        # The second model is loaded when KL is first asked for, which may be never.
        reference = BaseReference(source.base.directory, trial.sampling, trial.seed)
        measured = None if gate.max_kl is None else kl
        return search(source.trajectory, candidates, score, problems, gate, measured)


def write_decision(decision: Decision, source: Source, out: Path, adapter_rank: int | None) -> Path:
    """Write the leap of a decision as a full checkpoint, or as an adapter of rank ``adapter_rank``."""
    evidence: dict[str, object] = {"gate": asdict(decision.verdict), "tried": decision.tried, "wall_s": decision.wall_s}
    evidence["base"] = source.base_name
    if adapter_rank is None:
        return write_leap(decision.leap, source.base, out, evidence)
    return write_leap_adapter(decision.leap, source.base, out, evidence, rank=adapter_rank, base_name=source.base_name)


def _step_weights(source: Source, step: int) -> Iterable[tuple[str, Tensor]]:
    for name in source.base.shapes:
        weight = source.base.weight(name)
        moved = name in source.trajectory.shapes
        yield name, weight + dense(source.trajectory.delta(name, step)) if moved else weight
