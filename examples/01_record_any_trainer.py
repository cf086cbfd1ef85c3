"""Record the trajectory of your own TRL run in one line, then ask how straight it is.

    python examples/01_record_any_trainer.py        about a minute on two CPU cores

Expected here: 4 recorded steps, a trajectory some 30 times smaller than the checkpoints would be, and for each matrix a
share and an R² that lie near or above those of a random walk, whose own are printed beside them.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from rankleap.checkpoints import resolve_base
from rankleap.lowrank import gram
from rankleap.tasks import get_task
from rankleap.training import TrajectoryRecorder
from rankleap.trajectory import RecordedTrajectory, linearity_with_nulls


def main() -> None:
    """Train a little with plain TRL, recording as it goes."""
    base, task = resolve_base("bundled:sums"), get_task("sums")
    problems = {problem.prompt: problem for problem in task.problems("train", 500)}

    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        return [task.grade(text, problems[prompt]).score for prompt, text in zip(prompts, completions, strict=True)]

    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(base),
            processing_class=AutoTokenizer.from_pretrained(base),
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in problems]),
            args=GRPOConfig(
                output_dir=scratch,
                max_steps=40,
                per_device_train_batch_size=64,
                max_completion_length=24,
                learning_rate=1e-4,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
            ),
            callbacks=[TrajectoryRecorder(Path(scratch) / "trajectory", base="bundled:sums", every=10)],  # the one line
        )
        trainer.train()
        trajectory = RecordedTrajectory(Path(scratch) / "trajectory")
        print("recorded steps:", trajectory.steps)
        generator = torch.Generator().manual_seed(0)
        for name in [name for name, shape in trajectory.shapes.items() if len(shape) == 2][:6]:
            found = linearity_with_nulls(gram(trajectory.deltas(name)), trajectory.steps, generator)
            low, high = found.nulls["walk"]["share"]
            print(f"{name:45} share over time {found.measured.share:.2f}, of a random walk {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
