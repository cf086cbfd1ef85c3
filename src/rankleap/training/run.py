"""Runs a recipe into a run directory, and picks up a run that was interrupted where it stopped.

    runs/NAME/  recipe.toml  config.json  manifest.json  metrics.jsonl  checkpoints/  trajectory/  leaps/

Running the same recipe on the same directory again does only what is missing. Another recipe there is refused.
"""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars, enable_progress_bars
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from rankleap.adapters import adapter_notes, get_adapter
from rankleap.adapters.adapter import LIVE
from rankleap.checkpoints import resolve_base
from rankleap.config import Recipe
from rankleap.errors import DiskSpaceError, InputError
from rankleap.files import (
    read_json,
    require_space,
    write_json,
    write_manifest,
    write_text,
)
from rankleap.training.build import Built, build, check, round_trip
from rankleap.training.metrics import Lap, MetricsLog
from rankleap.training.recorder import TrajectoryRecorder
from rankleap.training.reground import Leaper, leap_is_missing
from rankleap.training.rewards import Rewards

log = logging.getLogger(__name__)

MEASURED_UP_TO = 10**9
"""Parameters up to which a dry run takes a few real steps on a machine without a GPU."""
LARGEST_ROUND_TRIP = 1e-3
"""Relative difference of logits between the trained model and what was saved of it that is worth a warning."""
ADAM_BYTES = 8
"""Two float32 moments for each trained parameter."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take, before it is run; ``step_s`` is measured, or ``None`` where it was not."""

    trainable: int
    total: int
    targets: tuple[str, ...]
    completions: int
    checkpoints: int
    disk_bytes: int
    step_s: float | None


def train(
    recipe: Recipe,
    out: Path,
    *,
    source: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    rewards: Rewards | None = None,
) -> Path:
    """Train to the recipe's last step, resuming if ``out`` holds a part of this run; return ``out``.

    ``rewards`` are the user's own beside the recipe's: name → (``package.module:function``, weight).
    ``source`` is the recipe file's text, kept verbatim. Raises ``RecipeError`` before anything is written if it cannot run.
    """
    check(recipe, rewards)
    _require_same_run(recipe, out, rewards or {})
    resume_from = _resumable(out)
    trained = resume_from is not None and _step(resume_from) >= recipe.train.steps
    # Killed between its last checkpoint and the leap due there, or the round trip, a run still has work to do.
    if trained and not leap_is_missing(recipe, out) and "round_trip" in read_json(out / "manifest.json"):
        log.info("%s is complete at step %d", out, recipe.train.steps)
        return out
    with _quiet():
        _run(recipe, out, source, callbacks, resume_from, rewards or {})
    return out


def _run(
    recipe: Recipe,
    out: Path,
    source: str | None,
    callbacks: Sequence[TrainerCallback],
    resume_from: Path | None,
    rewards: Rewards,
) -> None:
    new = not out.exists()
    built = build(recipe, out, rewards)
    try:
        require_space(out, _plan(recipe, built, None).disk_bytes)
        if built.trainer.is_world_process_zero():
            _describe(recipe, out, source, built, rewards)
        for callback in _callbacks(recipe, out, built, callbacks):
            built.trainer.add_callback(callback)
        # Without tqdm Transformers prints its logs instead; they are in metrics.jsonl.
        built.trainer.remove_callback(PrinterCallback)
        if resume_from and _step(resume_from) >= recipe.train.steps:
            _finish(built.trainer, resume_from)
        else:
            built.trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        _record_round_trip(recipe, out, built)
    except DiskSpaceError:
        if new and not (out / "config.json").exists():
            shutil.rmtree(out)  # the trainer makes its directory when it is built
        raise
    finally:
        built.pool.close()


def _finish(trainer: Trainer, last: Path) -> None:
    """Stand where training ended and let callbacks do what is missing there; ``Trainer.train`` would take one step more."""
    trainer._load_from_checkpoint(str(last))
    trainer.state, handler = TrainerState.load_from_json(str(last / "trainer_state.json")), trainer.callback_handler
    handler.optimizer = trainer.create_optimizer()
    handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    handler.on_train_end(trainer.args, trainer.state, trainer.control)


def _record_round_trip(recipe: Recipe, out: Path, built: Built) -> None:
    accelerator = built.trainer.accelerator
    # Of several processes each may hold but a shard.
    whole = not built.trainer.is_fsdp_enabled and not built.trainer.is_deepspeed_enabled
    if not accelerator.is_main_process:
        return
    # In float32, so without the autocast that a bfloat16 run wraps around forward.
    live = accelerator.unwrap_model(built.trainer.model, keep_fp32_wrapper=False)
    found = round_trip(recipe, out, live) if whole and not recipe.model.load_in_4bit else {}
    write_json(out / "manifest.json", read_json(out / "manifest.json") | {"round_trip": found})
    large = max(found.values(), default=0.0) > LARGEST_ROUND_TRIP
    log.log(logging.WARNING if large else logging.INFO, "round trip: %s", found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the screen: names that Transformers is about to rename, file bars, "missing" tied heads on a resume."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message="Unsupported layer type .*Norm")  # PEFT's own LN tuning
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        enable_progress_bars()


def plan(recipe: Recipe, scratch: Path, measure_steps: int = 3, rewards: Rewards | None = None) -> Plan:
    """What the recipe would take, with the seconds of a step measured on real steps in ``scratch``; the first is a warm-up."""
    check(recipe, rewards)
    short = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"steps": measure_steps, "save_every": 10**9})}
    )
    clock = _Clock()
    with _quiet():
        built = build(short, scratch, rewards)
        try:
            if built.total <= MEASURED_UP_TO or torch.cuda.is_available():
                built.trainer.add_callback(clock)
                built.trainer.remove_callback(PrinterCallback)
                # The trainer saves at its last step whatever save_steps says.
                built.trainer.args.save_strategy = "no"
                built.trainer.train()
        finally:
            built.pool.close()
    return _plan(recipe, built, clock.step_s())


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self._ends_s: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self._ends_s.append(time.perf_counter())

    def step_s(self) -> float | None:
        return (self._ends_s[-1] - self._ends_s[0]) / (len(self._ends_s) - 1) if len(self._ends_s) > 1 else None


def _plan(recipe: Recipe, built: Built, step_s: float | None) -> Plan:
    train = recipe.train
    # Rounded up, for the last step is saved too.
    saves = -(-train.steps // train.save_every)
    leaps = train.steps // recipe.leap.every if recipe.leap else 0
    kept, kept_leaps = (min(made, train.keep_checkpoints or made) for made in (saves, leaps))
    weight_bytes = 4 if recipe.model.dtype == "float32" else 2
    saved = built.total if recipe.adapter.method == "full" else built.trainable
    disk_bytes = kept * (saved * weight_bytes + built.trainable * ADAM_BYTES) + kept_leaps * saved * weight_bytes
    completions = train.steps * train.prompts_per_step * train.completions_per_prompt
    return Plan(built.trainable, built.total, built.targets, completions, saves, disk_bytes, step_s)


def _callbacks(recipe: Recipe, out: Path, built: Built, more: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    # An adapter whose files are not read has no deltas to record.
    readable = get_adapter(recipe.adapter.method).readable
    recorder = [TrajectoryRecorder(out / "trajectory", recipe.model.base, recipe.record.rank)] if readable else []
    # The recorder comes before the leaper: factors of a step are those that training reached.
    leaper = [Leaper(recipe, out, built.pool)] if recipe.leap else []
    metrics = MetricsLog(out / "metrics.jsonl")
    found = [metrics, *recorder, Lap(metrics, "record_s"), *leaper, Lap(metrics, "leap_s")]
    if not built.trainer.is_world_process_zero():
        # One process writes; the recorder stays, for a shard is gathered by all.
        found = recorder
    return [*found, *([_DescribeShards()] if built.trainer.is_fsdp_enabled else []), *more]


class _DescribeShards(TrainerCallback):
    """Puts an adapter's config beside its shards, without which nobody could tell what they mean."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and isinstance(kwargs["model"], PeftModel):
            saved = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            kwargs["model"].peft_config[LIVE].save_pretrained(str(saved))


def _describe(recipe: Recipe, out: Path, source: str | None, built: Built, rewards: Rewards) -> None:
    if (out / "config.json").exists():
        return
    resolved = recipe.model_dump(mode="json")
    write_text(out / "recipe.toml", source if source is not None else json.dumps(resolved, indent=2))
    base = resolve_base(recipe.model.base)
    write_manifest(
        out,
        made_by="train",
        base=recipe.model.base,
        base_directory=base.name,
        trainable=built.trainable,
        target_modules=built.targets,
        adapter_notes=adapter_notes(recipe),
        own_rewards=rewards,
        seed=recipe.seed,
    )
    # Last, since its presence says that the rest is described.
    write_json(out / "config.json", resolved)


def _require_same_run(recipe: Recipe, out: Path, rewards: Rewards) -> None:
    if not (out / "config.json").exists():
        return
    there, here = _flat(read_json(out / "config.json")), _flat(recipe.model_dump(mode="json"))
    differing = [key for key in sorted(there | here) if there.get(key) != here.get(key)]
    if {k: list(v) for k, v in rewards.items()} != read_json(out / "manifest.json").get("own_rewards", {}):
        differing.append("your own rewards")
    if differing:
        raise InputError(
            f"{out} holds another run (it differs in {', '.join(differing)}); choose another --out, or delete it to start afresh"
        )


def _flat(config: dict[str, Any]) -> dict[str, object]:
    sections = {name: value if isinstance(value, dict) else {"": value} for name, value in config.items()}
    return {f"{name}.{key}".rstrip("."): value for name, section in sections.items() for key, value in section.items()}


def _resumable(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end; the trainer writes ``trainer_state.json`` last. Others are removed."""
    complete: list[Path] = []
    # By number: as text, checkpoint-100 comes before checkpoint-20.
    for path in sorted((out / "checkpoints").glob("checkpoint-*"), key=_step):
        try:
            json.loads((path / "trainer_state.json").read_text())
            complete.append(path)
        except (OSError, json.JSONDecodeError):
            log.warning("%s is half-written and is removed; its step is taken again", path)
            shutil.rmtree(path, ignore_errors=True)  # another process may be at it as well
    return complete[-1] if complete else None


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
