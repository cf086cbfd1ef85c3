"""``rankleap train``: a recipe becomes a run directory."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankleap.cli.show import Json, extras, show_json, show_table, size

if TYPE_CHECKING:
    from rankleap.training import Plan


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe in TOML; see recipes/.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override one key: train.steps=100. May be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME.")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward", help="A reward of your own with its weight: package.module:function=0.5. May be repeated."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and what it would take; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train RLVR with any adapter and algorithm; the same command resumes an interrupted run."""
    from rankleap.config import load_recipe

    resolved = load_recipe(recipe, set_ or [])
    directory = out or Path("runs") / resolved.name
    with extras("training"):
        import rankleap.training as training
    own = dict(_own_reward(asked) for asked in reward or [])
    if dry_run:
        import tempfile
        from dataclasses import asdict

        # The trainer makes its directory when it is built, so a dry run builds it elsewhere.
        with tempfile.TemporaryDirectory() as scratch:
            plan = training.plan(resolved, Path(scratch), rewards=own)
        if as_json:
            show_json({"recipe": resolved.model_dump(mode="json"), "plan": asdict(plan)})
            return
        _show_recipe(resolved.model_dump(mode="json"))
        _show_plan(plan, resolved.train.steps)
        return

    from rankleap.cli.progress import StepProgress

    # Of several processes one has the screen.
    first = os.environ.get("RANK", "0") == "0"
    training.train(
        resolved,
        directory,
        source=recipe.read_text(),
        callbacks=[StepProgress()] if first and not as_json else [],
        rewards=own,
    )
    if not first:
        return
    summary = _summary(directory)
    if as_json:
        show_json(summary)
    else:
        show_table(f"{directory}", [summary], note=f"next: rankleap leap {directory} --method window")


def _own_reward(asked: str) -> tuple[str, tuple[str, float]]:
    """Read ``package.module:function=0.5``; the path is also the name, so that two functions of one name stay apart."""
    from rankleap.errors import InputError

    path, _, weight = asked.partition("=")
    try:
        return path, (path, float(weight or 1))
    except ValueError:
        raise InputError(f"--reward {asked!r}: the weight {weight!r} is no number") from None


def _summary(directory: Path) -> dict[str, object]:
    from rankleap.files import read_jsonl
    from rankleap.training import read_decisions

    rows = read_jsonl(directory / "metrics.jsonl")
    # Arms without rewards have a loss that means something instead.
    what = "reward" if "reward" in rows[0] else "loss"
    # TRL logs None for a step on which no completion earned a reward.
    last = [row[what] for row in rows if row.get(what) is not None][-10:]
    facts = {
        "run": str(directory),
        "step": rows[-1]["step"],
        f"{what} (last 10 steps)": round(sum(last) / len(last), 4) if last else None,
    }
    leaps = read_decisions(directory)
    return {
        **facts,
        "wall_s": rows[-1]["wall_s"],
        "leaps accepted": f"{sum(row['accepted'] for row in leaps)} of {len(leaps)}",
    }


def _show_recipe(resolved: dict[str, object]) -> None:
    rows = [
        {"key": f"{section}.{key}", "value": value}
        for section, values in resolved.items()
        for key, value in (values if isinstance(values, dict) else {"": values}).items()
    ]
    show_table("recipe", [{"key": str(row["key"]).rstrip("."), "value": row["value"]} for row in rows])


def _show_plan(plan: "Plan", steps: int) -> None:
    took = (
        "not measured"
        if plan.step_s is None
        else f"{plan.step_s:.2f} s a step here, {plan.step_s * steps / 60:.1f} min in all"
    )
    share = f"{plan.trainable:,} of {plan.total:,} ({100 * plan.trainable / plan.total:.4g} %)"
    facts = {
        "trainable parameters": share,
        "adapted modules": ", ".join(plan.targets),
        "steps": steps,
        "completions": f"{plan.completions:,}",
        "checkpoints": plan.checkpoints,
        "disk": size(plan.disk_bytes),
        "time": took,
    }
    show_table("what it would take", [{"": key, "value": value} for key, value in facts.items()])
