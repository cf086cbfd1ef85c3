"""Builds what a recipe asks for: base model, adapter, rewards, and a TRL trainer whose settings are all said explicitly."""

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from rankleap.adapters import (
    adapter_callbacks,
    adapter_mistakes,
    get_adapter,
    largest_difference,
    prepare,
    require_injected,
    require_rank,
    target_modules,
    with_adapter,
)
from rankleap.algorithms import ALGORITHMS, algorithm_settings, get_algorithm
from rankleap.algorithms.sampling import SamplingConfig
from rankleap.checkpoints import (
    AdapterCheckpoint,
    FullCheckpoint,
    LowRank,
    effective_weights,
    load_weights,
    open_checkpoint,
    resolve_base,
)
from rankleap.checkpoints.write import write_adapter
from rankleap.config import Recipe, RolloutSection
from rankleap.errors import InputError, RankleapError, RecipeError, UnknownNameError
from rankleap.evaluation import Sampling
from rankleap.evaluation.evaluate import evaluate, load_model
from rankleap.evaluation.result import read_samples
from rankleap.files import write_aside, write_jsonl
from rankleap.predictors import PREDICTORS
from rankleap.predictors.alpharl import AlphaRL
from rankleap.records import Problem
from rankleap.tasks import get_task
from rankleap.tasks.grading import GraderPool
from rankleap.tasks.task import MARKER
from rankleap.training.rewards import BUILT_IN, Rewards, reward_functions
from rankleap.training.sync import DRIFT, PristineBase, restored_after


@dataclass(frozen=True, slots=True)
class Built:
    """A trainer ready to run, the pool that grades for it, and what trains."""

    trainer: Trainer
    pool: GraderPool
    targets: tuple[str, ...]
    trainable: int
    total: int


def check(recipe: Recipe, rewards: Rewards | None = None) -> None:
    """Check what the types cannot: names, and numbers that must fit each other; all mistakes in one error.

    ``rewards`` are those of the user beside the recipe's.
    """
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
    mistakes += [
        f"  {line}"
        for line in [*adapter_mistakes(recipe), *_algorithm_misfits(recipe, rewards or {}), *_misfits(recipe)]
    ]
    if mistakes:
        raise RecipeError(f"recipe {recipe.name!r} cannot run:\n" + "\n".join(mistakes))


def build(recipe: Recipe, out: Path, rewards: Rewards | None = None) -> Built:
    """Load, adapt and wire up; nothing but a teacher's samples is written yet. The caller closes ``pool``.

    ``rewards`` are those of the user beside the recipe's, by name: an import path and a weight.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    set_seed(recipe.seed)  # the adapter's random initialisation comes before the trainer seeds itself
    base = resolve_base(recipe.model.base)
    # Said, since Transformers otherwise takes the file's dtype, and bf16 swallows RL's small updates.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, **load_settings(recipe))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    total = sum(p.numel() for p in model.parameters())
    adapter = get_adapter(recipe.adapter.method)
    targets = target_modules(model, recipe.adapter.target_modules, adapter.targets)
    require_rank(model, adapter, recipe.adapter, targets)
    task = get_task(recipe.task.name)
    problems = task.problems("train", recipe.task.train_problems)
    settings: Any = trl_config(recipe, out, processes())
    # A teacher's samples are drawn once; the other processes read them.
    with settings.main_process_first():
        rows, lessons = _lessons(recipe, out, problems)
    pool = GraderPool(task)
    if get_algorithm(recipe.algorithm.name).learns_from == "rewards":
        lessons["reward_funcs"], weights = reward_functions(recipe, rewards or {}, pool, problems)
        settings.reward_weights = weights
    trainer = with_adapter(get_algorithm(recipe.algorithm.name).trainer, adapter, recipe.adapter)(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter.config(recipe.adapter, targets, recipe.train.steps),
        callbacks=adapter_callbacks(adapter),
        **lessons,
    )
    # The trainer injects the adapter and may wrap the model: only what it holds now will train.
    live = trainer.accelerator.unwrap_model(trainer.model)
    prepare(live, adapter, recipe.algorithm.beta)
    if recipe.rollout.engine != "transformers" and isinstance(live, PeftModel):
        # Looked up each time, for the trainer empties its metrics after every log.
        report, generation = lambda drift: trainer._metrics["train"][DRIFT].append(drift), trainer.vllm_generation
        generation.sync_weights = restored_after(generation.sync_weights, PristineBase(live), report)
    return Built(trainer, pool, targets, require_injected(live, adapter, targets), total)


def round_trip(recipe: Recipe, out: Path, model: Any) -> dict[str, float]:
    """How far logits of the trained model are from those of what is on disk, in float32, relative to the largest logit.

    ``reloaded``: loaded on the original base by PEFT (or Transformers); ``effective``: the weights that ``checkpoints`` reads.
    An adapter whose start was taken out of the base is written for that to ``out/adapter``, as plain LoRA of twice the rank.
    """
    base, adapter = resolve_base(recipe.model.base), get_adapter(recipe.adapter.method)
    model = model.to("cpu", torch.float32)
    tokens_BT = torch.arange(64).reshape(2, 32) % model.get_input_embeddings().num_embeddings
    # Inside the run, for the start of an adapter is looked for beside it.
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        saved = portable = Path(scratch)
        model.save_pretrained(saved)
        if adapter.start != "base":
            portable = out / "adapter"
            _write_plain(AdapterCheckpoint(saved), portable, base)
        # In the run's own precision first: a base that was rounded when it was loaded is so again.
        source, dtype = saved if adapter.peft_class is None else base, getattr(torch, recipe.model.dtype)
        fresh = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).float()
        reloaded = fresh if adapter.peft_class is None else PeftModel.from_pretrained(fresh, portable)
        found = {"reloaded": largest_difference(model, reloaded, tokens_BT)}
        if adapter.readable:
            fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            load_weights(fresh, effective_weights(open_checkpoint(saved), FullCheckpoint(base)))
            found["effective"] = largest_difference(model, fresh, tokens_BT)
    return found


def _write_plain(checkpoint: AdapterCheckpoint, directory: Path, base: Path) -> None:
    full = FullCheckpoint(base)
    deltas = {name: checkpoint.delta(name, full) for name in checkpoint.shapes_on(full)}
    products = {name: delta for name, delta in deltas.items() if isinstance(delta, LowRank)}
    with write_aside(directory) as aside:
        write_adapter(aside, products, max(d.right_RN.shape[0] for d in products.values()), str(base), base)


def _lessons(recipe: Recipe, out: Path, problems: Sequence[Problem]) -> tuple[list[dict[str, str]], dict[str, object]]:
    """Rows of the dataset, and what the trainer learns from besides."""
    learns_from, teacher = get_algorithm(recipe.algorithm.name).learns_from, str(recipe.algorithm.teacher)
    if learns_from == "answers":
        return [{"prompt": p.prompt, "completion": f" {MARKER} {p.answer}"} for p in problems], {}
    if learns_from == "samples":
        return _demonstrations(recipe, out, problems), {}
    # Problems travel by id, so the answers stay with the grader.
    rows = [{"prompt": p.prompt, "problem_id": p.id} for p in problems]
    if learns_from == "rewards":
        return rows, {}
    model, tokenizer = load_model(teacher)
    # Distributions are compared token by token.
    if tokenizer.get_vocab() != AutoTokenizer.from_pretrained(resolve_base(recipe.model.base)).get_vocab():
        raise InputError(
            f"algorithm.teacher: {teacher} has another vocabulary than {recipe.model.base}; use a relative"
        )
    return rows, {"teacher_model": model}


def _demonstrations(recipe: Recipe, out: Path, problems: Sequence[Problem]) -> list[dict[str, str]]:
    """Right completions of a teacher: those at its path, or sampled once, one of each problem that the run will reach."""
    train, teacher = recipe.train, str(recipe.algorithm.teacher)
    path = Path(teacher) if teacher.endswith(".jsonl") else out / "demonstrations.jsonl"
    if not path.exists() and not teacher.endswith(".jsonl"):
        reached = problems[: train.steps * train.prompts_per_step * train.completions_per_prompt]
        sampling = Sampling(train.temperature, max_new_tokens=train.max_completion_tokens)
        task = get_task(recipe.task.name)
        samples = evaluate(*load_model(teacher), task, reached, k=1, sampling=sampling, seed=recipe.seed)[1]
        write_jsonl(path, [asdict(one) for one in samples])
    prompts = {p.id: p.prompt for p in problems}
    right = [one for one in read_samples(path) if one.score == 1 and not one.truncated]
    if not right or not {one.problem_id for one in right} <= prompts.keys():
        raise InputError(
            f"{path} must hold right samples, all of {recipe.task.name}'s {len(problems)} train problems; it has "
            f"{len(right)} right ones, such as of {[one.problem_id for one in right][:1]}: sample with --split train"
        )
    return [{"prompt": prompts[one.problem_id], "completion": one.completion} for one in right]


def processes() -> int:
    """Processes of this launch, as ``accelerate launch`` and ``torchrun`` tell each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def load_settings(recipe: Recipe) -> dict[str, Any]:
    """Keywords with which Transformers loads the recipe's base."""
    dtype = getattr(torch, recipe.model.dtype)
    settings: dict[str, Any] = {"dtype": dtype}
    if recipe.model.attention:
        settings["attn_implementation"] = recipe.model.attention
    if recipe.model.load_in_4bit:
        # NF4 with doubly quantised constants is what QLoRA is (2305.14314, §3).
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        settings["quantization_config"] = BitsAndBytesConfig(**four, bnb_4bit_compute_dtype=dtype)
    return settings


def _rollout_settings(rollout: RolloutSection) -> dict[str, Any]:
    if rollout.engine == "transformers":
        return {}
    if rollout.engine == "vllm-server":
        return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": rollout.server_url}
    shares = {"vllm_gpu_memory_utilization": rollout.memory_share, "vllm_tensor_parallel_size": rollout.tensor_parallel}
    return {"use_vllm": True, "vllm_mode": "colocate", **shares}


def trl_config(recipe: Recipe, out: Path, count: int = 1) -> TrainingArguments:
    """TRL's settings for a recipe, in each of ``count`` processes that share out a step's completions."""
    train, algorithm = recipe.train, get_algorithm(recipe.algorithm.name)
    batch = train.prompts_per_step * train.completions_per_prompt
    micro = train.micro_batch or batch
    settings: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "max_steps": train.steps,
        "per_device_train_batch_size": micro // count,
        "gradient_accumulation_steps": batch // micro,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup_steps,
        # Decay moves weights without any reward, and a trajectory would record it as learning.
        "weight_decay": 0.0,
        "max_grad_norm": train.max_grad_norm,
        "gradient_checkpointing": train.gradient_checkpointing,
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
    if algorithm.learns_from in ("rewards", "teacher"):
        # Truncated sampling would draw from another distribution than the one whose log-probabilities train.
        settings |= {"temperature": train.temperature, "top_p": 1.0, "top_k": 0}
        settings["max_completion_length"] = train.max_completion_tokens
        settings |= _rollout_settings(recipe.rollout)
    if algorithm.learns_from == "rewards":
        settings |= {"num_generations": train.completions_per_prompt, "num_iterations": recipe.algorithm.iterations}
        settings["beta"] = recipe.algorithm.beta
    if issubclass(algorithm.config, SamplingConfig):
        settings["agreement_every"] = train.agreement_every
    return algorithm.config(**settings, **algorithm_settings(recipe.algorithm))


def _algorithm_misfits(recipe: Recipe, own: Rewards) -> list[str]:
    asked, train, algorithm = recipe.algorithm, recipe.train, ALGORITHMS.get(recipe.algorithm.name)
    if algorithm is None:
        return []
    learns_from, longest, problems = algorithm.learns_from, train.max_completion_tokens, recipe.task.train_problems
    has_teacher = learns_from in ("samples", "teacher")
    no_use = {
        "beta": asked.beta > 0 and learns_from != "rewards",
        "iterations": asked.iterations > 1 and learns_from != "rewards",
        "overlong_buffer": asked.overlong_buffer is not None and learns_from != "rewards",
        "dynamic_sampling": bool(asked.dynamic_sampling) and not algorithm.resamples,
        "teacher": asked.teacher is not None and not has_teacher,
    }
    prompts = train.prompts_per_step * (train.completions_per_prompt if learns_from == "teacher" else 1)
    wrong = {
        f"algorithm.teacher: {asked.name} needs one": has_teacher and asked.teacher is None,
        f"algorithm.overlong_buffer: {asked.overlong_buffer} is more than train.max_completion_tokens = {longest}": (
            (asked.overlong_buffer or 0) > longest
        ),
        f"rewards: {asked.name} learns from none; leave them out": (
            learns_from != "rewards" and (bool(own) or recipe.rewards != {"task": 1.0})
        ),
        **{
            f"rewards: {UnknownNameError('reward', name, BUILT_IN)} (your own come by --reward)": name not in BUILT_IN
            for name in recipe.rewards
        },
        f"rewards: your own need names other than {', '.join(BUILT_IN)}, and finite weights": not all(
            name not in BUILT_IN and math.isfinite(weight) for name, (_, weight) in own.items()
        ),
        # TRL drops a step that is not full, and would end without having taken one.
        f"task.train_problems: {problems} do not fill a step of {prompts} prompts": (
            problems < prompts and learns_from in ("rewards", "teacher")
        ),
        # Completions are not in a checkpoint, so a resume between two updates on them would draw others.
        f"train.save_every: {train.save_every} must be a multiple of algorithm.iterations = {asked.iterations}": (
            train.save_every % asked.iterations > 0
        ),
    }
    useless = [
        f"algorithm.{key}: has no meaning for {asked.name}; leave it out" for key, said in no_use.items() if said
    ]
    return useless + [line for line, met in wrong.items() if met]


def _process_misfits(recipe: Recipe, count: int) -> list[str]:
    train, tensor_parallel = recipe.train, recipe.rollout.tensor_parallel
    micro = train.micro_batch or train.prompts_per_step * train.completions_per_prompt
    wrong = {
        # Whole groups in each process: their rewards are compared there when groups are drawn anew.
        f"train.prompts_per_step: {train.prompts_per_step} prompts cannot be shared out among {count} processes": (
            train.prompts_per_step % count > 0
        ),
        f"train.micro_batch: {micro} completions cannot be shared out among {count} processes": micro % count > 0,
        f"rollout.tensor_parallel: {tensor_parallel} must divide the {count} processes": (
            recipe.rollout.engine == "vllm-colocate" and count % tensor_parallel > 0
        ),
        # Each process would try, judge and write the same leap.
        f"leap: not in {count} processes; train without [leap], then use `rankleap leap` on the run": (
            recipe.leap is not None and count > 1
        ),
    }
    return [line for line, met in wrong.items() if met]


def _misfits(recipe: Recipe) -> list[str]:
    train, leap = recipe.train, recipe.leap
    batch = train.prompts_per_step * train.completions_per_prompt
    found: list[str] = []
    if train.micro_batch and (batch % train.micro_batch or train.micro_batch % train.completions_per_prompt):
        found.append(
            f"train.micro_batch: {train.micro_batch} must divide the {batch} completions of a step "
            f"and hold whole groups of {train.completions_per_prompt}"
        )
    found += _process_misfits(recipe, processes())
    needed = {
        "vllm": ("rollout.engine", recipe.rollout.engine != "transformers"),
        "bitsandbytes": ("model.load_in_4bit", recipe.model.load_in_4bit),
        "flash_attn": ("model.attention", recipe.model.attention == "flash_attention_2"),
        "flash_attn_3": ("model.attention", recipe.model.attention == "flash_attention_3"),
    }
    for package, (key, asked) in needed.items():
        if asked and find_spec(package) is None:
            found.append(f"{key}: needs {package}, which is not installed; install it, or leave {key} out")
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
            found.append(f"leap.methods: {UnknownNameError('predictor', method, PREDICTORS)}")
        elif isinstance(row := PREDICTORS[method], AlphaRL) and not row.on_step:
            found.append(
                f"leap.methods: {method!r} regresses on accuracies, which no one measures during training; use 'alpharl-step', "
                "or rankleap leap on the finished run"
            )
    return found
