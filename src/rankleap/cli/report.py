"""``rankleap report``: one page about studies and runs. ``rankleap demo``: the whole idea on a bundled model, in minutes."""

from pathlib import Path
from typing import Annotated

import typer

from rankleap.cli.show import Json, extras, show_json, show_table


def report(
    directories: Annotated[list[Path], typer.Argument(help="Studies (with a summary.json) and runs.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; default report/ in the first directory.")] = None,
    as_json: Json = False,
) -> None:
    """Write one page that opens without a network: figures, tables, and what the numbers show."""
    from rankleap.report import write_report

    with extras("a report"):
        page = write_report(directories, out or directories[0] / "report")
    figures, tables = (sorted(str(path) for path in (page.parent / name).iterdir()) for name in ("figures", "tables"))
    if as_json:
        show_json({"page": str(page), "figures": figures, "tables": tables})
        return
    rows = [("page", str(page)), ("figures", "\n".join(figures)), ("tables", "\n".join(tables))]
    show_table("written", [{"": kind, "path": path} for kind, path in rows])


def demo(out: Annotated[Path, typer.Option(help="Where to write.")] = Path("runs/demo"), as_json: Json = False) -> None:
    """Train, leap, gate, evaluate and report on a bundled base; under four minutes on two cores."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with extras("the demo"):
        import altair  # noqa: F401 - before the training, not after it
        import vl_convert  # noqa: F401

        from rankleap.arena import demo_arms, run_demo
        from rankleap.report import headline, write_report

    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # On stderr, so that stdout holds the result alone.
    with Progress(*columns, console=Console(stderr=True), disable=as_json) as bar:
        arms = demo_arms(out)
        tasks = {arm.out: bar.add_task(arm.recipe.name, total=arm.recipe.train.steps) for arm in arms}

        def poll() -> None:
            # The arms run in processes of their own, so their metrics files are what can be watched.
            for directory, task in tasks.items():
                rows = directory / "metrics.jsonl"
                bar.update(task, completed=len(rows.read_text().splitlines()) if rows.exists() else 0)

        summary = run_demo(out, poll)
    page = write_report([out], out / "report")
    if as_json:
        show_json(summary)
        return
    show_table("accuracy on the test split, 95 % intervals", [_row(arm) for arm in summary["arms"]])
    for line in headline(summary):
        print(line)
    print(f"\npage: {page}\nnumbers: {out / 'summary.json'}")


def _row(arm: dict) -> dict[str, object]:
    reached = arm["steps_to_target"]
    return {
        "arm": arm["name"],
        "learning rate": f"{arm['learning_rate']:g}",
        "steps": arm["steps"],
        "accuracy": f"{arm['accuracy']:.3f} [{arm['ci_low']:.3f}, {arm['ci_high']:.3f}]",
        "wall-clock": f"{arm['wall_s']:.0f} s",
        "steps to target": "never" if reached is None else f"{reached:.0f}",
        "leaps": f"{arm['leaps_accepted']} of {arm['leaps_tried']}" if arm["leaps_tried"] else "",
    }
