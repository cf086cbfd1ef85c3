"""What recording costs: seconds per step with and without the recorder, and disk beside full checkpoints.

    python benchmarks/recorder.py --steps 100 --rounds 5

The same GRPO run on a bundled base, saving nothing, alternately without and with a ``TrajectoryRecorder`` every 20 steps
(rank 4); the overhead is the median over rounds of the ratio of the two wall-clocks of a round, minus 1, with its range,
and, free of the noise between runs, the time clocked inside the recorder over the time outside it.
Disk: one recorded step beside one checkpoint of a full run as TRL writes it, and beside its weights alone.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from rankleap.config import Recipe, make_recipe
from rankleap.files import machine, versions, write_json
from rankleap.training import TrajectoryRecorder, train
from rankleap.training.build import build

EVERY = 20


def recipe(task: str, steps: int, save_every: int) -> Recipe:
    """A plain run."""
    values = {
        "name": "recorder",
        "model": {"base": f"bundled:{task}"},
        "task": {"name": task},
        "train": {
            "steps": steps,
            "learning_rate": 1e-4,
            "max_completion_tokens": 24,
            "save_every": save_every,
            "threads": 1,
        },
    }
    return make_recipe(values, "benchmark")


class Timed(TrajectoryRecorder):
    """A recorder that clocks itself."""

    inside_s = 0.0

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        """Record, and add up the time that it takes."""
        start_s = time.perf_counter()
        super().on_step_end(*arguments, **named)
        self.inside_s += time.perf_counter() - start_s


def seconds(task: str, steps: int, recorded: bool) -> tuple[float, float]:
    """Wall-clock of one run without checkpoints, and of it the part inside the recorder."""
    with tempfile.TemporaryDirectory() as directory:
        built = build(recipe(task, steps, EVERY), Path(directory))
        built.trainer.args.save_strategy = "no"
        built.trainer.remove_callback(PrinterCallback)
        recorder = Timed(Path(directory) / "t", f"bundled:{task}", every=EVERY)
        if recorded:
            built.trainer.add_callback(recorder)
        start_s = time.perf_counter()
        built.trainer.train()
        taken_s = time.perf_counter() - start_s
        built.pool.close()
    return taken_s, recorder.inside_s


def disk(task: str) -> dict[str, float]:
    """Bytes of one step, recorded and as a checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        out = train(recipe(task, 2, 2), Path(directory) / "run")
        checkpoint = out / "checkpoints" / "checkpoint-2"
        recorded = (out / "trajectory" / "step-000002.safetensors").stat().st_size
        whole = sum(path.stat().st_size for path in checkpoint.iterdir())
        weights = (checkpoint / "model.safetensors").stat().st_size
    ratios = {"smaller_than_checkpoint": whole / recorded, "smaller_than_weights": weights / recorded}
    return {"recorded_bytes": recorded, "checkpoint_bytes": whole, "weights_bytes": weights, **ratios}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sums")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/recorder.json"))
    asked = parser.parse_args()
    seconds(asked.task, 5, recorded=True)
    ratios, inside = [], []
    for number in range(asked.rounds):
        order = (False, True) if number % 2 == 0 else (True, False)
        taken = {recorded: seconds(asked.task, asked.steps, recorded) for recorded in order}
        (without_s, _), (with_s, inside_s) = taken[False], taken[True]
        ratios.append(with_s / without_s - 1)
        inside.append(inside_s / (with_s - inside_s))
        print(f"round {number + 1}: {without_s:.2f} s without, {with_s:.2f} s with: {ratios[-1]:+.1%}", end="")
        print(f"; {inside_s:.3f} s inside the recorder: {inside[-1]:.2%}")
    overhead = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    clocked = {"median": statistics.median(inside), "low": min(inside), "high": max(inside)}
    sizes = disk(asked.task)
    print(f"overhead: median {overhead['median']:+.1%}, from {overhead['low']:+.1%} to {overhead['high']:+.1%}")
    print(
        f"clocked inside the recorder: median {clocked['median']:.2%}, from {clocked['low']:.2%} to {clocked['high']:.2%}"
    )
    print(f"a recorded step is {sizes['smaller_than_checkpoint']:.0f}× smaller than TRL's checkpoint of it,")
    print(f"and {sizes['smaller_than_weights']:.0f}× smaller than the weights alone")
    facts = {"steps": asked.steps, "every": EVERY, "overhead": overhead, "inside": clocked, "disk": sizes}
    write_json(asked.out, {**facts, "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
