"""What factors cost beside reading: 7B-shaped checkpoints made on the spot, ratios of the same run.

    python benchmarks/factors.py --out benchmarks/results/factors.json

Shapes are Qwen2.5-7B's: two layers with the embedding and the head, bf16. W_t = W_0 + noise + one planted direction, at
such a size that after rounding to bf16 it stands a given gap above the noise (Baik, Ben Arous and Péché's formula).
W_0 is the same at every step, the noise is new, and the direction turns by 0.2 rad a step: harder than a real run.

- *pair*: top-1 factors of every matrix from the files, cold and warm-started, beside reading both sides and
  subtracting them in float32 the plain way; medians of alternating rounds, from the page cache
- *gaps*: residual, angle and flag at four gaps on the two largest shapes of a layer, beside the planted truth
- *svd*: ``torch.linalg.svd`` of each shape of a layer, once
- *lora*: factors of a LoRA checkpoint beside merging and a full SVD
- *memory*: peak resident memory of a fresh process for the pair and for a Gram matrix over 27 steps
- *processes*: two single-threaded processes beside one
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankleap.checkpoints import AdapterCheckpoint, FullCheckpoint, LowRank, dense
from rankleap.cluster import map_over
from rankleap.files import machine, versions, write_json
from rankleap.lowrank import factorise
from rankleap.trajectory import CheckpointTrajectory
from rankleap.trajectory.record import Piece, factor_piece, open_recording, record_step

HIDDEN, INNER, KEYS, WORDS = 3584, 18944, 512, 152064
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
SHAPES = {f"model.layers.{n}.{module}.weight": shape for n in range(2) for module, shape in LAYER.items()}
SHAPES |= {"model.embed_tokens.weight": (WORDS, HIDDEN), "lm_head.weight": (WORDS, HIDDEN)}
WEIGHT_STD, NOISE_STD, TURN = 0.02, 1e-4, 0.2


def planted(shape: tuple[int, int], step: int, seed: int) -> tuple[Tensor, Tensor]:
    """The planted direction u, v of one tensor at one step, turning in a plane of its own."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.linalg.qr(torch.randn(side, 2, generator=generator))[0] for side in shape]
    turn = torch.tensor([math.cos(TURN * step), math.sin(TURN * step)])
    left_M, right_N = (side @ turn for side in sides)
    return left_M, right_N


def strength(shape: tuple[int, int], std: float, gap: float) -> float:
    """θ of a planted θ·u·vᵀ whose singular value stands at ``gap`` times the edge of noise of this ``std``."""
    rows, columns, square = *shape, std**2
    top = (gap * std * (math.sqrt(rows) + math.sqrt(columns))) ** 2
    middle = top - (rows + columns) * square
    return math.sqrt((middle + math.sqrt(max(0.0, middle**2 - 4 * rows * columns * square**2))) / 2)


def weights(shape: tuple[int, int], seed: int) -> Tensor:
    """W_0 of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    return (WEIGHT_STD * torch.randn(shape, generator=generator)).bfloat16()


def moved(base_MN: Tensor, step: int, gap: float, seed: int) -> Tensor:
    """W_t of one tensor in bf16."""
    generator = torch.Generator().manual_seed(1000 * step + seed)
    delta_MN = torch.empty(base_MN.shape).normal_(std=NOISE_STD, generator=generator)
    rows = base_MN[: min(512, len(base_MN))].float()
    # What rounding adds is measured, not derived: it depends on where the weights lie between powers of two.
    rounded = (rows + delta_MN[: len(rows)]).bfloat16().float() - rows
    shape = (base_MN.shape[0], base_MN.shape[1])
    left_M, right_N = planted(shape, step, seed)
    delta_MN.addr_(left_M, right_N, alpha=strength(shape, float(rounded.std()), gap))
    return delta_MN.add_(base_MN).bfloat16()


def write_checkpoints(root: Path, shapes: dict[str, tuple[int, int]], steps: Sequence[int], gap: float) -> None:
    """``root/base`` and ``root/checkpoint-N``, a shard for each tensor."""
    for step in (0, *steps):
        directory = root / (f"checkpoint-{step}" if step else "base")
        directory.mkdir(parents=True, exist_ok=True)
        index = {}
        for seed, (name, shape) in enumerate(shapes.items()):
            base_MN = weights(shape, seed)
            file = f"model-{seed:05d}-of-{len(shapes):05d}.safetensors"
            save_file({name: moved(base_MN, step, gap, seed) if step else base_MN}, directory / file)
            index[name] = file
        write_json(directory / "model.safetensors.index.json", {"weight_map": index})


def plain(base: FullCheckpoint, checkpoint: FullCheckpoint) -> None:
    """Read both sides of every matrix and subtract in float32, as one would write it."""
    for name in checkpoint.shapes:
        sides = []
        for side in (checkpoint, base):
            with safe_open(side.source._files[name], framework="pt") as file:  # pyright: ignore[reportAttributeAccessIssue]
                sides.append(file.get_tensor(name).float())
        sides[0] - sides[1]


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock of one call."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def pair(root: Path, shapes: dict[str, tuple[int, int]], gap: float, rounds: int) -> dict[str, object]:
    """Cold and warm top-1 factors of every matrix beside reading and subtracting."""
    write_checkpoints(root, shapes, (1, 2), gap)
    base, *points = (FullCheckpoint(root / name) for name in ("base", "checkpoint-1", "checkpoint-2"))
    recording = open_recording(root / "trajectory", "base", base, 1, base.shapes)
    path = CheckpointTrajectory(base, dict(enumerate(points, start=1)))
    record_step(recording, path, 1)
    piece = Piece(points[1], base, list(shapes), 1, None, "cpu")
    warm = Piece(points[1], base, list(shapes), 1, recording.before(2), "cpu")
    clocks: dict[str, list[float]] = {"plain": [], "cold": [], "warm": []}
    for _ in range(rounds):
        clocks["plain"].append(seconds(lambda: plain(base, points[1])))
        clocks["cold"].append(seconds(lambda: factor_piece(piece)))
        clocks["warm"].append(seconds(lambda: factor_piece(warm)))
    parts = factor_piece(warm)
    ratios = {
        kind: spread([ours / theirs for ours, theirs in zip(clocks[kind], clocks["plain"], strict=True)])
        for kind in ("cold", "warm")
    }
    return {
        "gap": gap,
        "seconds": {kind: spread(values) for kind, values in clocks.items()},
        "ratio_to_plain": ratios,
        "largest_residual": max(float(part.max()) for key, part in parts.items() if key.endswith("|residual")),
        "not_separated": sum(not float(part[0]) <= 0.02 for key, part in parts.items() if key.endswith("|angle")),
        "bytes_of_one_side": points[1].size_bytes(),
    }


def accuracy(gap: float, shape: tuple[int, int]) -> dict[str, object]:
    """Top-1 of one matrix at one gap, cold and warm: what it claims, and how far from a converged reference it is."""
    base_MN = weights(shape, 0)
    before_MN, delta_MN = (moved(base_MN, step, gap, 0).float().sub_(base_MN.float()) for step in (1, 2))
    start_N = factorise(before_MN, 1).right_RN[0]
    del before_MN
    # Far tighter, two triplets: the second one says how large the gap is after rounding.
    exact = factorise(delta_MN, 2, tolerance=1e-5)
    rows: dict[str, object] = {"shape": shape, "asked_gap": gap, "gap": float(exact.sigma_R[0] / exact.sigma_R[1])}
    for kind, start in (("cold", None), ("warm", start_N)):
        clock_s = time.perf_counter()
        factors = factorise(delta_MN, 1, start_N=start)
        clock_s = time.perf_counter() - clock_s
        found_N, true_N = factors.right_RN[0].double(), exact.right_RN[0].double()
        aside_N = found_N - (found_N @ true_N) * true_N
        rows[kind] = {
            "seconds": clock_s,
            "residual": float(factors.residual_R[0]),
            "angle_bound": float(factors.angle_R[0]),
            "separated": bool(factors.separated_R[0]),
            "angle_to_reference": float(aside_N.norm() / found_N.norm()),
        }
    return rows


def full_svd(shapes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Seconds of ``torch.linalg.svd`` by shape, one call each."""
    return {
        f"{rows}x{columns}": seconds(lambda: torch.linalg.svd(torch.randn(rows, columns), full_matrices=False))  # noqa: B023
        for rows, columns in shapes
    }


def lora(root: Path, svd_s: dict[str, float]) -> dict[str, object]:
    """Exact factors of a LoRA of rank 32 on every linear shape, beside merging and a full SVD."""
    directory = root / "lora"
    directory.mkdir(parents=True, exist_ok=True)
    shapes = {name: shape for name, shape in SHAPES.items() if ".layers.0." in name}
    tensors = {}
    for name, (rows, columns) in shapes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {
            f"{module}.lora_A.weight": torch.randn(32, columns),
            f"{module}.lora_B.weight": torch.randn(rows, 32),
        }
    save_file(tensors, directory / "adapter_model.safetensors")
    write_json(directory / "adapter_config.json", {"peft_type": "LORA", "r": 32, "lora_alpha": 64})
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, root / "zero.safetensors"
    )
    adapter, base = AdapterCheckpoint(directory), FullCheckpoint(root, "zero.safetensors")
    clocks = {name: _lora_s(adapter, name, base) for name in shapes}
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = adapter.delta(name, base)
    assert isinstance(delta, LowRank)
    sigma = torch.linalg.svdvals(dense(delta).double())[:4]
    slow_s = sum(svd_s[f"{rows}x{columns}"] for rows, columns in shapes.values())
    return {
        "seconds": clocks,
        "full_svd_seconds": slow_s,
        "times_faster": slow_s / sum(clocks.values()),
        "relative_error_of_sigma": float(((factorise(delta, 4).sigma_R.double() - sigma) / sigma).abs().max()),
    }


def _lora_s(adapter: AdapterCheckpoint, name: str, base: FullCheckpoint) -> float:
    return statistics.median(seconds(lambda: factorise(adapter.delta(name, base), 4)) for _ in range(5))


def peak_gb(*arguments: str) -> float:
    """Peak resident memory of this script in a fresh process with these arguments, in 10⁹ bytes."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def report_peak() -> None:
    """Print this process's own peak; ``ru_maxrss`` would inherit that of the parent it was forked from."""
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9)


def processes(root: Path, rounds: int) -> dict[str, object]:
    """One and two single-threaded processes on the same pieces."""
    base, point = FullCheckpoint(root / "base"), FullCheckpoint(root / "checkpoint-1")
    names = [name for name in base.shapes if ".layers." in name]
    small, pieces = (
        Piece(point, base, names[1:2], 1, None, "cpu"),
        [Piece(point, base, [n], 1, None, "cpu") for n in names * 3],
    )
    ratios = [_pieces_s(small, pieces, 1) / _pieces_s(small, pieces, 2) for _ in range(rounds)]
    return {"times_faster_with_two": spread(ratios)}


def _pieces_s(small: Piece, pieces: Sequence[Piece], workers: int) -> float:
    """Seconds of ``pieces`` in spawned processes of one thread each, from the moment that all of them have answered once."""
    arrived: list[float] = []
    several = [[small] * workers, pieces]
    items = [piece for group in several for piece in group]
    threads = torch.get_num_threads()
    # One worker is this very process.
    torch.set_num_threads(1)
    map_over(factor_piece, items, workers, on_result=lambda *_: arrived.append(time.perf_counter()))
    torch.set_num_threads(threads)
    return arrived[-1] - arrived[workers - 1]


def gram_of_run(root: Path) -> dict[str, object]:
    """Seconds of the Gram matrix over every step in ``root``, beside reading the same tensors the plain way."""
    base = FullCheckpoint(root / "base")
    steps = sorted(int(path.name.rpartition("-")[2]) for path in root.glob("checkpoint-*"))
    path = CheckpointTrajectory(base, {step: FullCheckpoint(root / f"checkpoint-{step}") for step in steps})
    plain_s = sum(seconds(lambda: plain(base, path.checkpoints[step])) for step in steps)  # noqa: B023  # pyright: ignore[reportArgumentType]
    gram_s = sum(seconds(lambda: path.gram(name)) for name in path.shapes)  # noqa: B023
    return {"steps": len(steps), "seconds": gram_s, "plain_seconds": plain_s, "ratio_to_plain": gram_s / plain_s}


def peak_of(kind: str, root: Path) -> None:
    """The work whose peak memory is asked for, in this process."""
    base = FullCheckpoint(root / "base")
    if kind == "pair":
        factor_piece(Piece(FullCheckpoint(root / "checkpoint-2"), base, list(base.shapes), 4, None, "cpu"))
    else:
        gram_of_run(root)
    report_peak()


def main() -> None:
    """Run what is asked and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("runs/benchmark-factors"), help="needs 30 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=27)
    parser.add_argument("--parts", nargs="*", default=["pair", "gaps", "svd", "lora", "memory", "processes"])
    parser.add_argument("--peak", choices=["pair", "gram"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        peak_of(given.peak, given.scratch)
        return
    root: Path = given.scratch
    one_layer = {name: shape for name, shape in SHAPES.items() if ".layers.0." in name}
    tensor = {"model.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN)}
    found: dict[str, object] = {"versions": versions(), "machine": machine(), "threads": torch.get_num_threads()}
    svd_s = full_svd(sorted(set(one_layer.values()))) if {"svd", "lora"} & set(given.parts) else {}
    if "pair" in given.parts:
        found["pair"] = {"1.2": pair(root / "pair", SHAPES, 1.2, given.rounds)}
        found["pair_of_one_layer"] = {
            str(gap): pair(root / f"layer-{gap}", one_layer, gap, given.rounds) for gap in (3, 1.2, 1.03)
        }
    if "gaps" in given.parts:
        shapes = [(INNER, HIDDEN), (HIDDEN, HIDDEN)]
        found["gaps"] = [accuracy(gap, shape) for gap in (3, 1.2, 1.03, 1.003) for shape in shapes]
    if "svd" in given.parts:
        ours = {f"{m}x{n}": _top(m, n) for m, n in set(one_layer.values())}
        found["svd"] = {
            "full_seconds": svd_s,
            "ours_seconds": ours,
            "times_faster": {shape: svd_s[shape] / ours[shape] for shape in ours},
        }
    if "lora" in given.parts:
        found["lora"] = lora(root, svd_s)
    if "memory" in given.parts:
        write_checkpoints(root / "steps", tensor, range(1, given.steps + 1), 1.2)
        found["gram"] = gram_of_run(root / "steps")
        found["peak_gb"] = {
            "pair": peak_gb("--peak", "pair", "--scratch", str(root / "pair")),
            f"gram over {given.steps} steps": peak_gb("--peak", "gram", "--scratch", str(root / "steps")),
        }
    if "processes" in given.parts:
        found["processes"] = processes(root / "pair", given.rounds)
    print(found)
    if given.out:
        write_json(given.out, found)


def _top(rows: int, columns: int) -> float:
    """Seconds of the top-1 of one matrix of this shape at a gap of 1.2, cold."""
    base_MN = weights((rows, columns), 0)
    delta_MN = moved(base_MN, 1, 1.2, 0).float().sub_(base_MN.float())
    return min(seconds(lambda: factorise(delta_MN, 1)) for _ in range(3))


if __name__ == "__main__":
    main()
