"""What each predictor costs on a 1.5B-shaped LoRA run, and NExt's networks beside the published loop.

    python benchmarks/predictors.py --out benchmarks/results/predictors.json

The run is synthetic: 15 checkpoints (steps 10 … 150) of a rank-32 LoRA on all 196 linear layers of Qwen2.5-1.5B, in PEFT's own
files. In each module two directions grow on curves that bend (one saturates, one accelerates), and every checkpoint has
noise of its own and a random walk on top. The base is a header and a hole: none of its weights is ever read.

Seconds by the clock, and of the processor (``cpu_s``), which other work on the machine does not stretch.

- *methods*: seconds to fit, to forecast and write a rank-32 adapter; error ‖Ŵ - W_200‖ / ‖W_150 - W_200‖ at step 200, which
  no method has seen (1 is standing still)
- *next*: our networks beside the published ones (twenty times the size, 1000 full-batch updates at 2e-5, PyTorch's own start) on
  the same signed examples, the whole schedule on ``--layers`` layers; cosine of û and v̂ and relative error of σ̂ at step 200.
  At full size the published loop is clocked over a few updates.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankleap.checkpoints import AdapterCheckpoint, FullCheckpoint, LowRank, combine, inner
from rankleap.checkpoints.write import write_adapter
from rankleap.files import machine, versions, write_json
from rankleap.leap import Leap, write_leap_adapter
from rankleap.lowrank import factorise
from rankleap.predictors import PREDICTORS, get_predictor
from rankleap.predictors.next import NExt
from rankleap.trajectory import CheckpointTrajectory

HIDDEN, INNER, KEYS, LAYERS, RANK = 1536, 8960, 256, 28, 32
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
STEPS, TARGET = range(10, 151, 10), 200
PUBLISHED_UPDATES, PUBLISHED_RATE, PUBLISHED_WIDTH = 1000, 2e-5, 256


def names(layers: int) -> dict[str, tuple[int, int]]:
    """Shapes of the linear layers."""
    return {f"model.layers.{n}.{module}.weight": shape for n in range(layers) for module, shape in MODULES.items()}


def write_base(directory: Path, layers: int) -> FullCheckpoint:
    """A checkpoint of the right size on paper: a header, and a hole in the file where the weights would be."""
    directory.mkdir(parents=True)
    header, at = {}, 0
    for name, (rows, columns) in names(layers).items():
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [at, at := at + 2 * rows * columns]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return FullCheckpoint(directory)


def write_run(root: Path, layers: int) -> None:
    """``checkpoint-N`` of every step and of the target."""
    walk = {name: torch.zeros(shape[0], RANK) for name, shape in names(layers).items()}
    for step in (*STEPS, TARGET):
        curves = torch.tensor([1 - math.exp(-step / 120), 0.3 * (step / 150) ** 2])
        noise = torch.Generator().manual_seed(step)
        products = {}
        for seed, (name, (rows, columns)) in enumerate(names(layers).items()):
            fixed = torch.Generator().manual_seed(seed)
            right_RN = torch.randn(RANK, columns, generator=fixed) / columns**0.5
            grow_M2, into_2R = torch.randn(rows, 2, generator=fixed), torch.randn(2, RANK, generator=fixed)
            walk[name] += 0.1 * torch.randn(rows, RANK, generator=noise)
            shake_MR = 0.1 * torch.randn(rows, RANK, generator=noise)
            left_MR = 1e-3 * ((grow_M2 * curves) @ into_2R + walk[name] + shake_MR)
            products[name] = LowRank(left_MR, right_RN)
        write_adapter(root / f"checkpoint-{step}", products, RANK, str(root / "base"), root / "base")


def distance(first: Callable[[str], Any], second: Callable[[str], Any], over: list[str]) -> float:
    """‖first - second‖ over all tensors."""
    differences = (combine([(1.0, first(name)), (-1.0, second(name))]) for name in over)
    return math.sqrt(sum(inner(difference, difference) for difference in differences))


def method(name: str, trajectory: CheckpointTrajectory, truth: AdapterCheckpoint, out: Path) -> dict[str, float]:
    """Clock one method and score it."""
    # Accuracies that rise with a bend and two points of noise, such as 500 problems have.
    wobble = torch.randn(len(STEPS), generator=torch.Generator().manual_seed(0)).tolist()
    scores = {s: 0.3 + 0.3 * (1 - math.exp(-s / 120)) + 0.02 * w for s, w in zip(STEPS, wobble, strict=True)}
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    forecast = get_predictor(name, scores=scores).fit(trajectory)
    fitted_s = time.perf_counter()
    leap = Leap(forecast, 1.0, TARGET)
    write_leap_adapter(leap, trajectory.base, out, {}, rank=RANK, base_name=str(trajectory.base.directory))
    end_s, cpu_s = time.perf_counter(), time.process_time() - start_cpu_s
    shutil.rmtree(out)
    over, last = list(trajectory.shapes), trajectory.steps[-1]
    future = {tensor: truth.delta(tensor, trajectory.base) for tensor in over}
    still = distance(lambda tensor: trajectory.delta(tensor, last), future.__getitem__, over)
    error = distance(leap.delta, future.__getitem__, over) / still
    return {"fit_s": fitted_s - start_s, "write_s": end_s - fitted_s, "cpu_s": cpu_s, "error": error}


class Published(nn.Module):
    """The published network for vectors of one length: six pairs of linear layers."""

    def __init__(self, length: int) -> None:
        """PyTorch's own start."""
        super().__init__()
        self.of_global, self.of_local = self.pairs(length, length, length), self.pairs(length, length, length)
        self.both = self.pairs(2 * length, 2 * length, length)

    def pairs(self, inputs: int, inner_size: int, outputs: int) -> nn.Sequential:
        """Narrow, wide, bend, narrow, wide."""
        width = PUBLISHED_WIDTH
        first = nn.Linear(inputs, width), nn.Linear(width, inner_size)
        return nn.Sequential(*first, nn.ReLU(), nn.Linear(inner_size, width), nn.Linear(width, outputs))

    def forward(self, known_B2D: Tensor) -> Tensor:
        """The answer, B × D."""
        parts = self.of_global(known_B2D[:, 0]), self.of_local(known_B2D[:, 1])
        return self.both(torch.cat(parts, dim=-1))


class PublishedNExt(NExt):
    """Our factors and signs, the published networks and schedule."""

    def _trained(self, examples_E3D: Tensor, question_Q2D: Tensor, generator: torch.Generator) -> Tensor:
        torch.manual_seed(self.seed)
        model = Published(examples_E3D.shape[2])
        optimizer = torch.optim.AdamW(model.parameters(), lr=PUBLISHED_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PUBLISHED_UPDATES, PUBLISHED_RATE / 10)
        for _ in range(self.updates):
            loss = (model(examples_E3D[:, :2]) - examples_E3D[:, 2]).abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return model(question_Q2D)


def networks(
    predictor: NExt, trajectory: CheckpointTrajectory, truth: AdapterCheckpoint, examples: dict[str, Any]
) -> dict[str, float]:
    """Seconds in the networks alone, and how near they come to the leading triplet of W_200 - W_150."""
    generator, start_s, start_cpu_s = torch.Generator().manual_seed(0), time.perf_counter(), time.process_time()
    answers = [predictor._answers({n: e.parts[part] for n, e in examples.items()}, generator) for part in range(3)]
    spent = {"train_s": time.perf_counter() - start_s, "cpu_s": time.process_time() - start_cpu_s}
    cosines, misses = [], []
    for name in examples:
        ahead = [(1.0, truth.delta(name, trajectory.base)), (-1.0, trajectory.delta(name, trajectory.steps[-1]))]
        real = factorise(combine(ahead), 1)
        left, right = real.left_MR[:, 0], real.right_RN[0]
        # Signs of a single triplet are free, jointly; ours are those of W_150 - W_0.
        of_left, of_right = (
            torch.cosine_similarity(a[name], b, dim=0) for a, b in zip(answers[::2], (left, right), strict=True)
        )
        sign = -1 if of_left + of_right < 0 else 1
        cosines.append((float(sign * of_left), float(sign * of_right)))
        misses.append(abs(float(answers[1][name]) / float(real.sigma_R[0]) - 1))
    left, right = (sum(column) / len(column) for column in zip(*cosines, strict=True))
    return {**spent, "cos_left": left, "cos_right": right, "sigma_error": sum(misses) / len(misses)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/predictors.json"))
    parser.add_argument("--methods", nargs="*", default=list(PREDICTORS))
    parser.add_argument("--layers", type=int, default=1, help="layers on which the published schedule runs whole")
    parser.add_argument("--clocked", type=int, default=3, help="published updates clocked at full size")
    asked = parser.parse_args()
    facts: dict[str, Any] = {"steps": list(STEPS), "target": TARGET, "rank": RANK, "layers": asked.layers}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        base = write_base(root / "base", LAYERS)
        write_run(root, LAYERS)
        truth = AdapterCheckpoint(root / f"checkpoint-{TARGET}")
        trajectory = CheckpointTrajectory(base, {s: AdapterCheckpoint(root / f"checkpoint-{s}") for s in STEPS})
        facts["methods"] = {}
        for name in asked.methods:
            found = facts["methods"][name] = method(name, trajectory, truth, root / "leap")
            print(
                f"{name:18s} fit {found['fit_s']:6.1f} s, write {found['write_s']:6.1f} s, error {found['error']:.3f}"
            )
        every = {name: NExt()._examples(trajectory, name, STEPS, len(STEPS) // 3) for name in trajectory.shapes}
        some = {name: every[name] for name in names(asked.layers)}
        facts["next"] = {}
        for label, predictor, examples in (
            ("ours", NExt(), some),
            ("published", PublishedNExt(updates=PUBLISHED_UPDATES), some),
            ("ours, all layers", NExt(), every),
            ("published, all layers, clocked", PublishedNExt(updates=asked.clocked), every),
        ):
            found = facts["next"][label] = networks(predictor, trajectory, truth, examples)
            print(f"{label:32s} {', '.join(f'{key} {value:.3f}' for key, value in found.items())}")
    seconds = {label: found["cpu_s"] for label, found in facts["next"].items()}
    whole_s = seconds["published, all layers, clocked"] * PUBLISHED_UPDATES / asked.clocked
    facts["faster"] = {"some": seconds["published"] / seconds["ours"], "all": whole_s / seconds["ours, all layers"]}
    print(
        "the published loop takes " + ", ".join(f"{ratio:.0f}× ({which})" for which, ratio in facts["faster"].items())
    )
    write_json(asked.out, {**facts, "threads": torch.get_num_threads(), "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
