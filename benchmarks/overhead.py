"""What ``train`` adds to a step of a bare TRL script with the same settings.

    python benchmarks/overhead.py --steps 101

The bare script is ``bare`` below: a plain ``GRPOTrainer`` on the same bundled base, problems, sampling and checkpoints, with a
reward that judges in process. They must agree first: every setting of TRL's is the same, and so is every loss. Both run in one
process and take their steps in turn, each with its own random state, so that other work on the machine hits both alike. A step
lasts until the next one begins, so each includes what is saved, logged, graded and recorded in it; the first are left out.

The overhead is the ratio of the sums over all steps, minus 1, with a 95 % interval from resampling pairs of steps; ``typical`` is
the median over pairs, which leaves the saves out. ``cpu`` is the process's own time, without the grader's process.
``control`` is the bare script against itself: what the measurement adds of its own.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from rankleap.checkpoints import resolve_base
from rankleap.config import Recipe, make_recipe
from rankleap.files import machine, versions, write_json
from rankleap.tasks import get_task
from rankleap.training import train
from rankleap.training.build import trl_config

WARM_UP = 5
SAVE_EVERY = 20
RATES = {"full": 1e-4, "lora": 1e-3}
TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
RESAMPLES = 2000


@dataclass
class Clock(TrainerCallback):
    """Seconds of each step, by the wall and of this process, and its loss; after each step the other trainer takes one."""

    mine: Semaphore
    other: Semaphore
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _start_s: tuple[float, float] = (0.0, 0.0)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Read both clocks, hand over, and begin where this trainer was."""
        self.wall_s.append(time.perf_counter() - self._start_s[0])
        self.cpu_s.append(time.process_time() - self._start_s[1])
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.other.release()
        self.mine.acquire()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        self._start_s = time.perf_counter(), time.process_time()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Keep the loss of a step."""
        self.losses += [logs["loss"]] if "loss" in logs else []


Script = Callable[[str, int, Path, Clock], None]
"""Trains a method for so many steps in a directory, telling the clock of each."""


def recipe(method: str, steps: int) -> Recipe:
    """What ``train`` runs: the defaults, on the bundled sums."""
    values = {
        "name": "overhead",
        "model": {"base": "bundled:sums"},
        "task": {"name": "sums"},
        "adapter": {"method": method, "rank": 8, "alpha": 16},
        "train": {
            "steps": steps,
            "learning_rate": RATES[method],
            "max_completion_tokens": 24,
            "save_every": SAVE_EVERY,
            "threads": 1,
        },
    }
    return make_recipe(values, "benchmark")


def bare_config(method: str, steps: int, out: Path) -> GRPOConfig:
    """The settings as a script would write them."""
    return GRPOConfig(
        output_dir=str(out / "checkpoints"),
        run_name="overhead",
        max_steps=steps,
        per_device_train_batch_size=128,
        gradient_accumulation_steps=1,
        num_generations=8,
        max_completion_length=24,
        learning_rate=RATES[method],
        lr_scheduler_type="constant",
        loss_type="grpo",
        top_k=0,
        epsilon=0.2,
        gradient_checkpointing=False,
        logging_steps=1,
        save_steps=SAVE_EVERY,
        seed=0,
        data_seed=0,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to=[],
    )


def bare(method: str, steps: int, out: Path, clock: Clock) -> None:
    """A run of TRL alone."""
    torch.set_num_threads(1)
    set_seed(0)
    base, task = resolve_base("bundled:sums"), get_task("sums")
    problems = {problem.id: problem for problem in task.problems("train", recipe(method, steps).task.train_problems)}

    def reward(completions: list[str], problem_id: list[str], **_: Any) -> list[float | None]:
        return [task.grade(text, problems[i]).score for text, i in zip(completions, problem_id, strict=True)]

    adapter = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=bare_config(method, steps, out),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": p.prompt, "problem_id": p.id} for p in problems.values()]),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=adapter if method == "lora" else None,
        callbacks=[clock],
    )
    # It would print each step; train has a file for that.
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def ours(method: str, steps: int, out: Path, clock: Clock) -> None:
    """The same by ``train``."""
    train(recipe(method, steps), out / "run", callbacks=[clock])


def require_same_settings(method: str, steps: int, out: Path) -> None:
    """Raise ``SystemExit`` with the settings of TRL's that differ."""
    theirs, own = bare_config(method, steps, out).to_dict(), trl_config(recipe(method, steps), out).to_dict()
    # The time of day is in the default name of the log directory, and rewards are weighed only after this.
    differ = {k: (v, own[k]) for k, v in theirs.items() if own[k] != v and k not in ("logging_dir", "reward_weights")}
    if differ:
        raise SystemExit(f"bare script and train differ: {differ}")


def in_turn(method: str, steps: int, second: Script) -> dict[str, Clock]:
    """Run both, a step of each in turn."""
    turns = Semaphore(1), Semaphore(0)
    clocks = {"bare": Clock(turns[0], turns[1]), "second": Clock(turns[1], turns[0])}

    def run(what: Script, clock: Clock) -> None:
        with tempfile.TemporaryDirectory() as directory:
            clock.mine.acquire()
            try:
                require_same_settings(method, steps, Path(directory))
                what(method, steps, Path(directory), clock)
            finally:
                # Often enough for all that the other still has to do alone.
                clock.other.release(steps)

    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(run, bare, clocks["bare"]), threads.submit(run, second, clocks["second"])]
    for one in both:
        one.result()
    if clocks["bare"].losses != clocks["second"].losses:
        raise SystemExit(f"{method}: the losses of the two differ")
    return clocks


def measured(method: str, steps: int, second: Script) -> dict[str, Any]:
    """Milliseconds of a bare step, and what ``second`` adds to it by both clocks."""
    clocks = in_turn(method, steps, second)
    found: dict[str, Any] = {"bare_step_ms": 1000 * statistics.fmean(clocks["bare"].wall_s[WARM_UP:])}
    for kind in ("wall", "cpu"):
        own, theirs = (getattr(clocks[name], f"{kind}_s")[WARM_UP:] for name in ("second", "bare"))
        found[kind] = spread(list(zip(own, theirs, strict=True)), lambda p: sum(a for a, _ in p) / sum(b for _, b in p))
        found[f"typical_{kind}"] = spread([(a / b, 0.0) for a, b in zip(own, theirs, strict=True)], middle)
    return found


def middle(pairs: Sequence[tuple[float, float]]) -> float:
    """The median of the first numbers."""
    return statistics.median(first for first, _ in pairs)


def spread(
    pairs: Sequence[tuple[float, float]], ratio: Callable[[Sequence[tuple[float, float]]], float]
) -> dict[str, float]:
    """The ratio minus 1, and its 95 % interval by the bootstrap over pairs."""
    draw = random.Random(0)
    drawn = sorted(ratio(draw.choices(pairs, k=len(pairs))) - 1 for _ in range(RESAMPLES))
    return {"overhead": ratio(pairs) - 1, "low": drawn[RESAMPLES // 40], "high": drawn[-RESAMPLES // 40]}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=101)
    parser.add_argument("--out", type=Path, default=Path("runs/overhead.json"))
    asked = parser.parse_args()
    results = {method: measured(method, asked.steps, ours) for method in RATES}
    results |= {f"{method} control": measured(method, asked.steps, bare) for method in RATES}
    for method, found in results.items():
        for kind, s in ((k, v) for k, v in found.items() if isinstance(v, dict)):
            print(f"{method} {kind}: {s['overhead']:+.2%} ({s['low']:+.2%} to {s['high']:+.2%})")
    facts = {"steps": asked.steps, "save_every": SAVE_EVERY}
    write_json(asked.out, {**facts, **results, "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
