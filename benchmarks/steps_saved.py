"""Steps and wall-clock that leaps save to reach the plain arm's final accuracy, over learning rates and seeds.

    python benchmarks/steps_saved.py --tasks sums backward --seeds 0 1 2 --out runs/steps_saved

For each task and learning rate (tuned, a third, a tenth) and seed: plain GRPO, the same with its last four checkpoints
averaged, plain with a rate that decays to zero, and plain with leaps chosen and gated on validation problems. Scored on
400 test problems × 4. The savings are those of ``rankleap.arena``: both curves read by the same rule, what the
leaps cost counted in the wall-clock.
Intervals over seeds are Student's t at 95 %. Prints a table, writes ``summary.json``; interrupted, it goes on where it was.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from rankleap.arena import RATES, STEPS, Arm, make_arm, run_arm, summarise
from rankleap.cluster import map_over
from rankleap.files import machine, versions, write_json

ARMS = ("plain", "leap", "plain, decayed")
MEASURES = (
    "steps_saved_fraction",
    "wall_saved_fraction",
    "steps_saved_fraction_vs_averaged",
    "steps_saved_fraction_vs_decayed",
)


def arms_of(task: str, seed: int, out: Path, rates: list[float], names: list[str]) -> list[Arm]:
    """The named arms at every learning rate."""
    return [make_arm(out / task / f"seed-{seed}", name, task, rate, seed) for rate in rates for name in names]


def interval(values: list[float]) -> tuple[float, float | None, float | None]:
    """Mean with its 95 % t interval over seeds."""
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return mean, None, None
    half = float(student_t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return mean, mean - half, mean + half


def table(per_seed: dict[tuple[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per task, learning rate and measure; seeds in which the leap arm never arrives are counted, not dropped."""
    rows = []
    seeds_of: dict[str, list[int]] = {}
    for task, seed in per_seed:
        seeds_of.setdefault(task, []).append(seed)
    for task, seeds in seeds_of.items():
        for measure in MEASURES:
            for rate in per_seed[task, seeds[0]][measure]:
                found = [per_seed[task, seed][measure][rate] for seed in seeds]
                arrived = [value for value in found if value is not None]
                row = {"task": task, "learning_rate": float(rate), "measure": measure, "seeds": len(seeds)}
                mean, low, high = interval(arrived) if arrived else (None, None, None)
                rows.append({**row, "arrived": len(arrived), "mean": mean, "low": low, "high": high, "each": found})
    return rows


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["sums", "backward"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/steps_saved"))
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    jobs = [
        (task, seed, arm)
        for seed in asked.seeds
        for task in asked.tasks
        for arm in arms_of(task, seed, asked.out, asked.rates, asked.arms)
    ]
    results = map_over(run_arm, [arm for _, _, arm in jobs], asked.workers)
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for (task, seed, _), found in zip(jobs, results, strict=True):
        rows.setdefault((task, seed), []).extend(found)
    per_seed = {key: summarise(found) for key, found in rows.items()}
    lines = table(per_seed)
    for line in lines:
        if line["mean"] is None:
            shown = "never reached"
        else:
            ends = "" if line["low"] is None else f" [{line['low']:+.2f}, {line['high']:+.2f}]"
            shown = f"{line['mean']:+.2f}{ends}"
        each = ", ".join("never" if value is None else f"{value:+.2f}" for value in line["each"])
        print(f"{line['task']:>9} {line['learning_rate']:>8g} {line['measure']:<34} {shown:<24} seeds: {each}")
    final = {f"{task}/seed-{seed}": found for (task, seed), found in per_seed.items()}
    steps = {f"{rate:g}": STEPS[rate] for rate in asked.rates}
    facts = {"steps": steps, "table": lines, "studies": final, "machine": machine(), "versions": versions()}
    write_json(asked.out / "summary.json", facts)


if __name__ == "__main__":
    main()
