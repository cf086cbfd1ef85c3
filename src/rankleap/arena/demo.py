"""The whole idea on a bundled base: plain GRPO and leaps, at a tuned learning rate and at a tenth of it.

Papers train at conservative rates; that is where a leap has the most to give, and where the honest control is the plain
run at the tuned rate, which stands in the same table.

At a conservative rate many small leaps pay: every five steps, as far again as a few more windows would go. At the tuned
rate going further loses, and what is left is denoising, written as a leap while training stays on its own path.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankleap.arena.compare import summarise
from rankleap.arena.study import Arm, run_arm
from rankleap.cluster import map_over
from rankleap.config import make_recipe
from rankleap.files import machine, versions, write_json

TUNED, THIRD, TENTH = 3e-4, 1e-4, 3e-5
RATES = (TENTH, THIRD, TUNED)
STEPS = {TUNED: 120, THIRD: 120, TENTH: 120}
SMALL_LEAPS: dict[str, Any] = {
    "methods": ["weight-linear"],
    # The newest two alone, since the path bends (docs/log.md).
    "windows": [2],
    "every": 5,
    "samples": 1,
    # Any gain passes: asking more of so small a step rejects half of the good ones (docs/log.md).
    "confidence": 0.5,
}
LEAPS: dict[float, dict[str, Any]] = {
    TENTH: {**SMALL_LEAPS, "coefficients": [2.0, 4.0]},
    THIRD: {**SMALL_LEAPS, "coefficients": [1.0, 2.0]},
    TUNED: {
        "methods": ["average"],
        "windows": [4, 8, 12],
        "coefficients": [1.0],
        "every": 20,
        "samples": 2,
        "confidence": 0.5,
        "proceed_from": "origin",
    },
}


def make_arm(out: Path, name: str, task: str, rate: float, seed: int = 0) -> Arm:
    """One run on the bundled base of a task: ``plain``, ``plain, decayed`` (to zero, linearly) or ``leap``."""
    train = {
        "steps": STEPS[rate],
        "learning_rate": rate,
        "schedule": "linear" if name == "plain, decayed" else "constant",
        "save_every": 5,
        "max_completion_tokens": 24,
        # Two arms run side by side on two cores.
        "threads": 1,
    }
    values: dict[str, Any] = {
        "name": f"{name.replace(', ', '-')}-{rate:g}",
        "seed": seed,
        "model": {"base": f"bundled:{task}"},
        "task": {"name": task},
        "train": train,
    }
    if name == "leap":
        values["leap"] = LEAPS[rate]
    recipe = make_recipe(values, f"{name} at {rate:g}")
    # The averaged twin costs no training, only scoring, so every plain run has one.
    return Arm(name, recipe, out / recipe.name, grid=20, samples=4, averaged=name == "plain")


def demo_arms(out: Path) -> list[Arm]:
    """The four runs, longest first."""
    return [make_arm(out, name, "sums", rate) for rate in (TENTH, TUNED) for name in ("leap", "plain")]


def run_demo(out: Path, on_poll: Callable[[], None] | None = None) -> dict[str, Any]:
    """Run the arms two at a time and write ``summary.json``; what is done already is not redone."""
    arms = demo_arms(out)
    rows = [row for rows in map_over(run_arm, arms, 2, on_poll) for row in rows]
    rows.sort(key=lambda row: (-row["learning_rate"], row["name"] != "plain", row["name"]))
    runs = [arm.out.name for arm in arms]
    summary = {
        "name": "demo",
        "task": "sums",
        **summarise(rows),
        "machine": machine(),
        "versions": versions(),
        "runs": runs,
    }
    write_json(out / "summary.json", summary)
    return summary
