"""Every adapter of the published comparison on every bundled base, each at a learning rate of its own.

    python benchmarks/curves.py --out runs/curves

For each base and adapter: a sweep of short runs over learning rates half a decade apart, judged by the mean training reward
of the last ten steps (test problems are not touched), widened while the best rate lies at an end of those tried; then one
run at the best rate, scored on 400 test problems × 2 every twenty steps. GRPO, 16 prompts × 8 completions, rank 8, one seed:
the curves say that each arm learns what it can, not which arm is best. Writes ``curves.json`` and ``curves.png``;
interrupted, it goes on where it was.
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import altair as alt

from rankleap.adapters import get_adapter
from rankleap.arena import Arm, run_arm
from rankleap.config import Recipe, make_recipe
from rankleap.files import machine, read_json, read_jsonl, versions, write_json
from rankleap.training import train

ADAPTERS = (
    "full lora dora miss adalora loraplus rslora pissa milora lorafa vera ln ia3".split()  # noqa: SIM905
)
RATES = [10 ** (k / 2) for k in range(-11, 3)]
"""Half a decade apart, from 3e-6 to 10."""
FIRST = {"full": 1e-4, "pissa": 1e-4, "milora": 1e-4, "loraplus": 3e-4, "vera": 1e-2, "ia3": 1e-2, "ln": 1e-3}
"""About where a sweep begins; elsewhere at 1e-3. Three rates from there on are tried before it is widened."""
SWEEP_STEPS, STEPS, LAST = 40, 100, 10


def recipe(task: str, adapter: str, rate: float, steps: int) -> Recipe:
    """One run; all arms differ in the adapter and its rate alone."""
    values: dict[str, Any] = {
        "name": f"{adapter}-{rate:.2g}-{steps}",
        "model": {"base": f"bundled:{task}"},
        "task": {"name": task},
        "adapter": {"method": adapter, "rank": 8, "alpha": 16},
        "train": {
            "steps": steps,
            "learning_rate": rate,
            "max_completion_tokens": 24,
            "save_every": 20,
            "keep_checkpoints": 1 if steps == SWEEP_STEPS else None,
            "threads": 1,
        },
    }
    return make_recipe(values, "curves")


def reward(task: str, adapter: str, rate: float, out: Path) -> float:
    """Mean training reward at the end of a short run; one that broke off counts as none."""
    asked = recipe(task, adapter, rate, SWEEP_STEPS)
    rows = read_jsonl(train(asked, out / "sweep" / asked.name) / "metrics.jsonl")
    return mean(row["reward"] for row in rows[-LAST:])


def best_rate(task: str, adapter: str, out: Path) -> dict[float, float]:
    """Rewards by rate; the best is not at an end, unless the rates themselves end there."""
    start = min(range(len(RATES)), key=lambda i: abs(RATES[i] - FIRST.get(adapter, 1e-3)))
    tried = {i: reward(task, adapter, RATES[i], out) for i in range(start, start + 3)}
    while True:
        best = max(tried, key=lambda i: tried[i])
        wanted = [i for i in (best - 1, best + 1) if i not in tried and 0 <= i < len(RATES)]
        if not wanted:
            return {RATES[i]: tried[i] for i in sorted(tried)}
        tried |= {i: reward(task, adapter, RATES[i], out) for i in wanted}


def arm(task: str, adapter: str, out: Path) -> dict[str, Any]:
    """Sweep, then the curve at the best rate."""
    path = out / f"{adapter}.json"
    if path.exists():
        return read_json(path)
    swept = best_rate(task, adapter, out)
    rate = max(swept, key=lambda r: swept[r])
    asked = recipe(task, adapter, rate, STEPS)
    curve = run_arm(Arm(adapter, asked, out / asked.name, grid=20, samples=2))[0]["curve"]
    manifest = read_json(out / asked.name / "manifest.json")
    found = {"task": task, "adapter": adapter, "rate": rate, "sweep": swept, "curve": curve}
    facts = {key: manifest[key] for key in ("trainable", "target_modules", "round_trip")}
    write_json(path, found | facts | {"paper_range": get_adapter(adapter).rates})
    return read_json(path)


def figure(arms: list[dict[str, Any]]) -> alt.TopLevelMixin:
    """Thirteen curves a base, the full one drawn behind each."""
    rows = [
        {"base": one["task"], "adapter": f"{one['adapter']} ({one['rate']:.2g})", "arm": one["adapter"], **point}
        for one in arms
        for point in one["curve"]
    ]
    band = alt.Chart().mark_area(opacity=0.2).encode(x="step:Q", y="ci_low:Q", y2="ci_high:Q")
    y = alt.Y("accuracy:Q", title="test accuracy", scale=alt.Scale(domain=[0, 1]))
    line = alt.Chart().mark_line(point=True).encode(x=alt.X("step:Q", title="optimizer steps"), y=y)
    panel = alt.layer(band, line).properties(width=150, height=110)
    order = [adapter for adapter in ADAPTERS if any(one["adapter"] == adapter for one in arms)]
    bases = {
        base: panel.properties(data=alt.Data(values=[row for row in rows if row["base"] == base])).facet(
            facet=alt.Facet(
                "adapter:N",
                title=None,
                sort=[r["adapter"] for name in order for r in rows if r["arm"] == name and r["base"] == base],
            ),
            columns=5,
            title=f"base {base}",
        )
        for base in dict.fromkeys(row["base"] for row in rows)
    }
    return alt.vconcat(*bases.values())


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["sums", "backward"])
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--out", type=Path, default=Path("runs/curves"))
    asked = parser.parse_args()
    arms = []
    for task in asked.tasks:
        for adapter in asked.adapters:
            arms.append(arm(task, adapter, asked.out / task))
            one, last = arms[-1], arms[-1]["curve"][-1]
            shown = " ".join(f"{float(rate):.2g}:{value:.2f}" for rate, value in one["sweep"].items())
            ends = f"{one['curve'][0]['accuracy']:.3f} -> {last['accuracy']:.3f} [{last['ci_low']:.3f}, {last['ci_high']:.3f}]"
            print(
                f"{task:>9} {adapter:<9} rate {one['rate']:<8.2g} trainable {one['trainable']:>7} {ends}  {shown}",
                flush=True,
            )
    write_json(asked.out / "curves.json", {"arms": arms, "machine": machine(), "versions": versions()})
    figure(arms).save(asked.out / "curves.png", scale_factor=2)


if __name__ == "__main__":
    main()
