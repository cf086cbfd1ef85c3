"""The whole idea on a bundled base: plain GRPO and leaps, at a tuned learning rate and at a tenth of it.

Papers train at conservative rates; that is where a leap has the most to give, and where the honest control is the plain
run at the tuned rate, which stands in the same table.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankleap.arena.compare import summarise
from rankleap.arena.study import Arm, run_arm
from rankleap.cluster import map_over
from rankleap.config import Recipe, make_recipe
from rankleap.files import machine, versions, write_json

TUNED, TENTH = 3e-4, 3e-5
STEPS = {TUNED: 100, TENTH: 120}
LEAPS: dict[float, dict[str, Any]] = {
    TUNED: {
        "methods": ["average", "relex", "weight-linear"],
        "windows": [4],
        "coefficients": [1.0],
        "every": 20,
        "proceed_from": "origin",
    },
    TENTH: {"methods": ["weight-linear"], "coefficients": [1.0, 2.0, 4.0], "every": 10},
}


def demo_arms(out: Path) -> list[Arm]:
    """The four runs, longest first."""
    return [
        _arm(out, "leap", TENTH, LEAPS[TENTH]),
        _arm(out, "plain", TENTH, None),
        _arm(out, "leap", TUNED, LEAPS[TUNED]),
        _arm(out, "plain", TUNED, None),
    ]


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


def _arm(out: Path, name: str, rate: float, leap: dict[str, Any] | None) -> Arm:
    recipe: Recipe = make_recipe(
        {
            "name": f"{name}-{rate:g}",
            "model": {"base": "bundled:sums"},
            "task": {"name": "sums"},
            "train": {
                "steps": STEPS[rate],
                "learning_rate": rate,
                "save_every": 5,
                "max_completion_tokens": 24,
                "threads": 1,
            },
            **({"leap": {"windows": [4], **leap}} if leap else {}),
        },
        f"demo arm {name} at {rate:g}",
    )
    return Arm(name, recipe, out / recipe.name, grid=20, samples=4, averaged=name == "plain")
