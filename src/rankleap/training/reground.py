"""Re-grounding: train, leap, train on from there, inside one run (RL-Extra, 2601.04537, made resumable and gated).

At every ``leap.every`` steps, right after the trainer's own checkpoint is on disk, candidates are fitted on the checkpoints
since the last accepted leap, chosen and gated on validation problems, and an accepted leap is written to ``leaps/`` and put
into the live model. ``leaps/decisions.jsonl`` has a line per attempt. A checkpoint is therefore always what training
reached, a leap always a directory of its own; after a kill the decision is read back, or the attempt made again.

Leaps here move the *trained* tensors: all weights, or the adapter's own (A, B, m), so that training can go on in them.

Adam's moments, n steps leapt: *carry* keeps both; *reset* forgets both, so that each next step has the size of the learning
rate in every coordinate, noise or not (as the published re-grounding does, which restarts its optimizer); *rescale* keeps the
second, the scale of gradients, which n steps of the same run would hardly change, and multiplies the first by β₁ⁿ, the weight
that Adam itself would give today's gradients then: a direction that the leap has walked already is not walked again, and the
next steps are small until fresh gradients have formed one.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankleap.checkpoints import FullCheckpoint, adapter, load_weights, resolve_base
from rankleap.config import LeapSection, Recipe
from rankleap.errors import RunError
from rankleap.evaluation import Evaluation, Sampling
from rankleap.evaluation.evaluate import evaluate
from rankleap.files import append_jsonl, read_jsonl, write_aside, write_jsonl
from rankleap.leap import (
    BaseReference,
    Candidates,
    Decision,
    GateSettings,
    Leap,
    leap_weights,
    require_finite_logits,
    search,
    write_leap,
)
from rankleap.records import Problem
from rankleap.tasks import get_task
from rankleap.tasks.grading import GraderPool
from rankleap.trajectory import CheckpointTrajectory

DECISIONS = "decisions.jsonl"
GATE_SEED_OFFSET = 1_000_003
"""Keeps the validation samples' seeds apart from the training seed's own small offsets."""


@dataclass
class Leaper(TrainerCallback):
    """Attempts a leap after every ``leap.every``-th step and lets training go on from it if the gate accepts.

    ``pool`` grades the validation problems; the model's random state is left as it was.
    """

    recipe: Recipe
    out: Path
    pool: GraderPool

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start afresh, or go back to exactly where the run stood: with the leap of this step applied, or yet to be tried."""
        # Fails now, not at the first step that is due, where the recipe has no [leap].
        self._leap_settings()
        self._problems = get_task(self.recipe.task.name).problems("validation", self.recipe.task.validation_problems)
        self._base, self._file = self._open_base(kwargs["model"], state.global_step)
        train, base = self.recipe.train, resolve_base(self.recipe.model.base)
        self._sampling = Sampling(train.temperature, max_new_tokens=train.max_completion_tokens)
        self._reference = BaseReference(base, self._sampling, self.recipe.seed)
        # Attempts at steps that will be taken again are forgotten with them.
        made = [row for row in read_decisions(self.out) if row["step"] <= state.global_step]
        write_jsonl(self.out / "leaps" / DECISIONS, made)
        here = [row for row in made if row["step"] == state.global_step]
        if here and here[0]["taken"]:
            self._go_on_from(self.out / here[0]["directory"], here[0]["ahead"], kwargs)
        elif not here and self._due(state.global_step):
            self._attempt(state.global_step, kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attempt a leap when one is due; the trainer's checkpoint of this step is already on disk."""
        if self._due(state.global_step):
            self._attempt(state.global_step, kwargs)

    def _due(self, step: int) -> bool:
        return step > 0 and step % self._leap_settings().every == 0

    def _leap_settings(self) -> LeapSection:
        if self.recipe.leap is None:
            raise RunError("a Leaper needs a recipe with a [leap] section")
        return self.recipe.leap

    def _open_base(self, model: nn.Module, step: int) -> tuple[FullCheckpoint, str | None]:
        """What deltas are measured from: the base, or the adapter as it was initialised (kept in ``leaps/start``)."""
        if not isinstance(model, PeftModel):
            return FullCheckpoint(resolve_base(self.recipe.model.base)), None
        start = self.out / "leaps" / "start"
        # On a resume the live adapter is no longer the initial one.
        if step == 0:
            with write_aside(start) as aside:
                model.save_pretrained(str(aside))
        return FullCheckpoint(start, adapter.WEIGHTS), adapter.WEIGHTS

    def _attempt(self, step: int, kwargs: dict[str, Any]) -> None:
        settings = self._leap_settings()
        lengths = settings.max_length_ratio, settings.max_truncation_rise
        gate = GateSettings(settings.confidence, settings.max_norm_ratio, settings.max_kl, *lengths, settings.shrinks)
        budget = settings.budget and settings.budget // settings.samples
        candidates = Candidates(settings.methods, settings.windows, settings.coefficients, budget=budget)
        # From disk: a leap is held against the very weights that a resume would load.
        origin = FullCheckpoint(self.out / "checkpoints" / f"checkpoint-{step}", self._file)
        with _aside_of_training(kwargs["model"]):
            score = self._scorer(step, origin, kwargs)
            kl = None if settings.max_kl is None else self._kl(kwargs)
            decision = search(self._trajectory(step, origin), candidates, score, self._problems, gate, kl)
            directory = self._write(decision, origin)
            taken = settings.proceed_from == "leap" and directory is not None
            if directory is not None and taken:
                self._go_on_from(self.out / directory, decision.leap.ahead, kwargs)
            else:
                # Scoring swaps the live weights, and which it leaves there is the search's own affair.
                _load(kwargs["model"], ((name, origin.weight(name)) for name in origin.shapes))
        # After the leap is on disk: a kill in between makes the attempt again.
        append_jsonl(self.out / "leaps" / DECISIONS, _row(decision, directory, taken))
        self._forget_old()

    def _forget_old(self) -> None:
        """Leaps are as large as checkpoints, and as many of them are kept; the newest one is where the next round starts."""
        keep = self.recipe.train.keep_checkpoints
        written = [self.out / row["directory"] for row in read_decisions(self.out) if row["accepted"]]
        for directory in written[:-keep] if keep else []:
            shutil.rmtree(directory, ignore_errors=True)

    def _trajectory(self, step: int, origin: FullCheckpoint) -> CheckpointTrajectory:
        """Checkpoints since the last leap that training went on from; that leap itself is the first of them."""
        # The jump itself is no step of training and would be read as speed, so the path starts anew after it.
        taken = [row for row in read_decisions(self.out) if row["taken"] and row["step"] < step]
        start = taken[-1]["step"] if taken else 0
        points = {start: FullCheckpoint(self.out / taken[-1]["directory"], self._file) if taken else self._base}
        for saved in range(start + self.recipe.train.save_every, step, self.recipe.train.save_every):
            points[saved] = FullCheckpoint(self.out / "checkpoints" / f"checkpoint-{saved}", self._file)
        return CheckpointTrajectory(self._base, {**points, step: origin})

    def _scorer(
        self, step: int, origin: FullCheckpoint, kwargs: dict[str, Any]
    ) -> Callable[[Leap | None, Sequence[Problem]], Evaluation]:
        model, tokenizer, sampling = kwargs["model"], kwargs["processing_class"], self._sampling
        # Leap and origin share a seed, which couples their samples; each step has its own, so no luck lasts.
        seed = self.recipe.seed + GATE_SEED_OFFSET * step
        samples = self._leap_settings().samples

        def score(leap: Leap | None, problems: Sequence[Problem]) -> Evaluation:
            weights = (
                leap_weights(leap, self._base) if leap else ((name, origin.weight(name)) for name in origin.shapes)
            )
            _load(model, weights)
            require_finite_logits(model, tokenizer, problems[0].prompt)
            return evaluate(model, tokenizer, self.pool, problems, k=samples, sampling=sampling, seed=seed)[0]

        return score

    def _kl(self, kwargs: dict[str, Any]) -> Callable[[Leap, Sequence[Problem]], float]:
        def kl(leap: Leap, problems: Sequence[Problem]) -> float:
            _load(kwargs["model"], leap_weights(leap, self._base))
            return self._reference.kl(kwargs["model"], kwargs["processing_class"], problems)

        return kl

    def _write(self, decision: Decision, origin: FullCheckpoint) -> str | None:
        """Write an accepted leap; its directory relative to the run."""
        if not decision.verdict.accepted:
            return None
        relative = f"leaps/{decision.leap.forecast.method}/{decision.leap.directory_name()}"
        write_leap(
            decision.leap,
            self._base,
            self.out / relative,
            decision.evidence(),
            side_files=origin.directory,
        )
        return relative

    def _go_on_from(self, directory: Path, ahead: float, kwargs: dict[str, Any]) -> None:
        leap, optimizer = FullCheckpoint(directory, self._file), kwargs["optimizer"]
        _load(kwargs["model"], ((name, leap.weight(name)) for name in leap.shapes))
        if self._leap_settings().optimizer_state == "reset":
            optimizer.state.clear()
        if self._leap_settings().optimizer_state == "rescale":
            for group in optimizer.param_groups:
                for moments in (optimizer.state[weight] for weight in group["params"] if weight in optimizer.state):
                    moments["exp_avg"].mul_(group["betas"][0] ** ahead)


def read_decisions(out: Path) -> list[dict[str, Any]]:
    """Every leap that a run has attempted so far, in order."""
    path = out / "leaps" / DECISIONS
    return read_jsonl(path) if path.exists() else []


def leap_is_missing(recipe: Recipe, out: Path) -> bool:
    """Whether a run was killed between its last checkpoint and the leap that was due there."""
    if recipe.leap is None or recipe.train.steps % recipe.leap.every:
        return False
    return not any(row["step"] == recipe.train.steps for row in read_decisions(out))


@contextmanager
def _aside_of_training(model: nn.Module) -> Iterator[None]:
    """Leave the random state, the mode and the gradient switch as training had them."""
    # The rollouts that follow must be those of a run in which nothing was tried.
    training = model.training
    with torch.random.fork_rng(), torch.no_grad():
        yield
    model.train(training)


def _load(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy weights into the live model; adapter tensors go by PEFT's names for them."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, dict(weights))
        return
    load_weights(model, weights)


def _row(decision: Decision, directory: str | None, taken: bool) -> dict[str, Any]:
    verdict, evidence = decision.verdict, decision.evidence()
    return {
        "step": decision.step,
        "accepted": verdict.accepted,
        "taken": taken,
        "directory": directory,
        "method": decision.leap.forecast.method,
        "coefficient": decision.leap.coefficient,
        "ahead": decision.leap.ahead,
        "gain": verdict.difference and asdict(verdict.difference),
        # JSON has no infinity, which is what a leap from a run that has not moved has.
        "norm_ratio": verdict.norm_ratio if math.isfinite(verdict.norm_ratio) else None,
        "kl": verdict.kl,
        "lengths": verdict.lengths and asdict(verdict.lengths),
        "reasons": list(verdict.reasons),
        **{fact: evidence[fact] for fact in ("looks", "tried", "samples_spent", "wall_s")},
    }
