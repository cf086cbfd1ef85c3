"""Does the gate keep its word? Every accepted leap of a run against its origin, paired, on test problems it never saw.

    python benchmarks/gate_on_test.py runs/demo/leap-3e-05

Prints the difference of each with its 95 % interval over problems, and how many end below zero beyond it.
"""

import argparse
from pathlib import Path

import torch

from rankleap.checkpoints import FullCheckpoint, effective_weights, open_checkpoint, resolve_base
from rankleap.config import make_recipe
from rankleap.evaluation import Sampling, paired_difference
from rankleap.evaluation.evaluate import evaluate, load_model
from rankleap.files import read_json, read_jsonl
from rankleap.leap import load_weights
from rankleap.tasks import get_task
from rankleap.tasks.grading import GraderPool


def main() -> None:
    """Score both sides of every accepted leap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    below = total = 0
    for run in asked.runs:
        recipe = make_recipe(read_json(run / "config.json"), str(run))
        task = get_task(recipe.task.name)
        problems = task.problems("test", recipe.task.test_problems)
        sampling = Sampling(recipe.train.temperature, max_new_tokens=recipe.train.max_completion_tokens)
        base = FullCheckpoint(resolve_base(recipe.model.base))
        model, tokenizer = load_model(recipe.model.base)
        with GraderPool(task) as pool:
            for row in read_jsonl(run / "leaps" / "decisions.jsonl"):
                if not row["accepted"]:
                    continue
                scores = []
                for directory in (run / row["directory"], run / "checkpoints" / f"checkpoint-{row['step']}"):
                    load_weights(model, effective_weights(open_checkpoint(directory), base))
                    found, _ = evaluate(model, tokenizer, pool, problems, k=asked.samples, sampling=sampling, seed=1)
                    scores.append(found.scores_PK)
                gain = paired_difference(*scores)
                below, total = below + (gain.high < 0), total + 1
                print(f"{run.name} step {row['step']:>4}: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
    print(f"{below} of {total} accepted leaps end below their origin beyond the interval")


if __name__ == "__main__":
    main()
