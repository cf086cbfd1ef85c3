"""Builds what a recipe asks for: base model, adapter, rewards, and a TRL trainer whose settings are all said explicitly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from rankleap.adapters import get_adapter, require_injected, target_modules
from rankleap.algorithms import algorithm_settings
from rankleap.checkpoints import resolve_base
from rankleap.config import Recipe
from rankleap.errors import RankleapError, RecipeError
from rankleap.predictors import PREDICTORS
from rankleap.records import Problem
from rankleap.tasks import get_task
from rankleap.tasks.grading import GraderPool


@dataclass(frozen=True, slots=True)
class Built:
    """A trainer ready to run, the pool that grades for it, and what trains."""

    trainer: GRPOTrainer
    pool: GraderPool
    targets: tuple[str, ...]
    trainable: int
    total: int


def check(recipe: Recipe) -> None:
    """Check what the recipe's types cannot: names, and numbers that must fit each other; all mistakes in one error."""
    mistakes: list[str] = []
    checks: list[tuple[str, Callable[[], object]]] = [
        ("task.name", lambda: get_task(recipe.task.name)),
        ("adapter.method", lambda: get_adapter(recipe.adapter.method)),
        ("algorithm.name", lambda: algorithm_settings(recipe.algorithm)),
        # Last, for a base on the Hub is downloaded here.
        ("model.base", lambda: resolve_base(recipe.model.base)),
    ]
    for where, look_up in checks:
        try:
            look_up()
        except RankleapError as error:
            mistakes.append(f"  {where}: {error}")
    mistakes += [f"  {line}" for line in _misfits(recipe)]
    if mistakes:
        raise RecipeError(f"recipe {recipe.name!r} cannot run:\n" + "\n".join(mistakes))


def build(recipe: Recipe, out: Path, callbacks: Sequence[TrainerCallback] = ()) -> Built:
    """Load, adapt and wire up; nothing is written yet. The caller closes ``pool``."""
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    set_seed(recipe.seed)  # the adapter's random initialisation comes before the trainer seeds itself
    base = resolve_base(recipe.model.base)
    # Said, since Transformers otherwise takes the file's dtype, and bf16 swallows RL's small updates.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, recipe.model.dtype))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    total = sum(p.numel() for p in model.parameters())
    adapter, targets = get_adapter(recipe.adapter.method), target_modules(model, recipe.adapter.target_modules)
    task = get_task(recipe.task.name)
    problems = task.problems("train", recipe.task.train_problems)
    pool = GraderPool(task)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=_reward(pool, problems),
        args=trl_config(recipe, out),
        # Problems travel by id, so the answers stay with the grader.
        train_dataset=Dataset.from_list([{"prompt": p.prompt, "problem_id": p.id} for p in problems]),
        processing_class=tokenizer,
        peft_config=adapter.config(recipe.adapter, targets),
        callbacks=list(callbacks),
    )
    # The trainer injects the adapter and may wrap the model: only what it holds now will train.
    live = trainer.accelerator.unwrap_model(trainer.model)
    return Built(trainer, pool, targets, require_injected(live, adapter, targets), total)


def trl_config(recipe: Recipe, out: Path) -> GRPOConfig:
    """TRL's settings for a recipe."""
    train = recipe.train
    batch = train.prompts_per_step * train.completions_per_prompt
    micro = train.micro_batch or batch
    settings: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "max_steps": train.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "num_generations": train.completions_per_prompt,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup_steps,
        # Decay moves weights without any reward, and a trajectory would record it as learning.
        "weight_decay": 0.0,
        "max_grad_norm": train.max_grad_norm,
        "gradient_checkpointing": train.gradient_checkpointing,
        "max_completion_length": train.max_completion_tokens,
        "temperature": train.temperature,
        # Truncated sampling would draw from another distribution than the one whose log-probabilities train.
        "top_p": 1.0,
        "top_k": 0,
        "beta": recipe.algorithm.beta,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": train.save_every,
        "save_total_limit": train.keep_checkpoints,
        "report_to": list(train.report_to),
        "run_name": recipe.name,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        # Evaluation samples on CPU and CUDA alone, so other accelerators are left aside.
        "use_cpu": not torch.cuda.is_available(),
        # TRL's default is bf16, so a float32 run has to say no.
        "bf16": recipe.model.dtype == "bfloat16",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return GRPOConfig(**settings, **algorithm_settings(recipe.algorithm))


def _reward(pool: GraderPool, problems: Sequence[Problem]) -> Callable[..., list[float | None]]:
    by_id = {problem.id: problem for problem in problems}

    # TRL passes every column of the dataset by name, and state of its own.
    def reward(completions: list[str], problem_id: list[str], **_: object) -> list[float | None]:
        pairs = [(text, by_id[which]) for text, which in zip(completions, problem_id, strict=True)]
        return [verdict.score for verdict in pool.grade(pairs)]

    return reward


def _misfits(recipe: Recipe) -> list[str]:
    train, leap = recipe.train, recipe.leap
    batch = train.prompts_per_step * train.completions_per_prompt
    found: list[str] = []
    if train.micro_batch and (batch % train.micro_batch or train.micro_batch % train.completions_per_prompt):
        found.append(
            f"train.micro_batch: {train.micro_batch} must divide the {batch} completions of a step "
            f"and hold whole groups of {train.completions_per_prompt}"
        )
    if leap and leap.every % train.save_every:
        found.append(
            f"leap.every: {leap.every} is no multiple of train.save_every = {train.save_every}; leaps start from saves"
        )
    if leap and train.keep_checkpoints and train.keep_checkpoints * train.save_every < leap.every:
        found.append(
            f"train.keep_checkpoints: {train.keep_checkpoints} saves do not reach back over leap.every = {leap.every} steps"
        )
    for method in leap.methods if leap else ():
        if method not in PREDICTORS:
            found.append(f"leap.methods: predictor {method!r} does not exist; known: {', '.join(PREDICTORS)}")
    return found
