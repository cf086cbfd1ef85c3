"""Runs in one of several CPU processes: ``accelerate launch --config_file FILE -m sharded OUT``."""

import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from trl.models import unwrap_model_for_generation

from rankleap.config import Recipe
from rankleap.files import write_json
from rankleap.training import train
from rankleap.training.build import build
from recipes import tiny

METHODS = ("full", "lora")
COMPARED = ("loss", "grad_norm", "reward")
STEPS = 4


def recipe(method: str) -> Recipe:
    """Losses of the first update on whole groups are zero, those of the second are not."""
    return tiny(
        adapter={"method": method, "rank": 4, "alpha": 8},
        algorithm={"iterations": 2},
        train__steps=STEPS,
        train__save_every=2,
        train__completions_per_prompt=4,
        train__micro_batch=8,
        train__max_completion_tokens=14,
    )


def drawn_alone(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions of the live model, each drawn by itself with a seed of its prompt, place in the group, and step.

    So they are the same however many processes share them out.
    """
    ids_of, drawn = [], []
    with (
        torch.random.fork_rng(),
        torch.no_grad(),
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
    ):
        for i, prompt in enumerate(prompts):
            torch.manual_seed(
                zlib.crc32(f"{prompt} {i % trainer.num_generations} {trainer.state.global_step}".encode())
            )
            ids_1P = trainer.processing_class(prompt, return_tensors="pt").input_ids
            ids_of.append(ids_1P[0].tolist())
            drawn.append(
                model.generate(ids_1P, generation_config=trainer.generation_config)[0, ids_1P.shape[1] :].tolist()
            )
    return {"prompt_ids": ids_of, "completion_ids": drawn, "logprobs": None}


def same_completions(out: Path, method: str) -> None:
    """A run on completions that do not depend on the processes; its log goes to ``METHOD.json``."""
    built = build(recipe(method), out / f"{method}-drawn-alone")
    built.trainer.rollout_func = drawn_alone
    built.trainer.train()
    built.pool.close()
    if built.trainer.is_world_process_zero():
        rows = [row for row in built.trainer.state.log_history if "loss" in row]
        kind = str(built.trainer.accelerator.distributed_type)
        write_json(
            out / f"{method}.json", {"kind": kind, "rows": [{key: row.get(key) for key in COMPARED} for row in rows]}
        )


def taken_up_again(out: Path, method: str) -> None:
    """TRL's own sampling: a run, and the same again from where it would stand after a kill during its last save."""
    run = out / method
    train(recipe(method), run)
    if PartialState().is_main_process:
        shutil.copy(run / "metrics.jsonl", run / "first.jsonl")
        (run / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").unlink()
    # A real kill ends all processes before any is started again.
    torch.distributed.barrier()
    train(recipe(method), run)


def main(out: Path) -> None:
    """All runs of this launch."""
    plain = AcceleratorState.__init__

    def on_devices(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        # Accelerate leaves FSDP out on CPU processes, though torch has it there.
        if PartialState().distributed_type is DistributedType.MULTI_CPU and "fsdp2" in out.name:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plain(self, *args, **kwargs)

    AcceleratorState.__init__ = on_devices  # pyright: ignore[reportAttributeAccessIssue]
    for method in METHODS:
        same_completions(out, method)
        taken_up_again(out, method)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
