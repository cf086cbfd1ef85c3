"""``rankleap watch``: follows a run in progress by another trainer."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from rankleap.cli.show import Base, Device, Json, Rank, RunDirectory, TrustPickle, Workers, show_json


def watch(
    directory: RunDirectory,
    base: Base = None,
    rank: Rank = 4,
    out: Annotated[Path | None, typer.Option(help="Where to write; default DIRECTORY/trajectory.")] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove checkpoints once their factors are on disk; they cannot come back.")
    ] = False,
    keep: Annotated[int, typer.Option(min=1, help="With --delete: how many of the newest checkpoints stay.")] = 2,
    every: Annotated[float, typer.Option(min=0, help="Seconds between two looks.")] = 30.0,
    settle: Annotated[float, typer.Option(min=0, help="Seconds without a change before a checkpoint is read.")] = 30.0,
    until: Annotated[int | None, typer.Option(help="Leave once this step is recorded.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    workers: Workers = 1,
    device: Device = "cpu",
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
) -> None:
    """Record the factors of each new complete checkpoint as it appears; a crash in between loses nothing."""
    from rankleap.trajectory.watch import Watch, sweep

    settings = Watch(
        directory,
        out or directory / "trajectory",
        base,
        rank,
        settle,
        keep if delete else None,
        trust_pickle,
        workers,
        device,
    )
    told: dict[str, str] = {}
    # What is written is written whole, so leaving at any moment is leaving in order.
    with suppress(KeyboardInterrupt):
        while True:
            looked = sweep(settings)
            if as_json:
                show_json(
                    {"recorded": looked.recorded, "removed": looked.released, "waiting": looked.waiting}, indent=None
                )
            else:
                # Said once, not at every look.
                _tell(looked.recorded, looked.released, dict(looked.waiting.items() - told.items()))
            told = looked.waiting
            if once or (until is not None and any(step >= until for step in looked.steps)):
                return
            time.sleep(every)


def _tell(recorded: list[int], released: list[int], waiting: dict[str, str]) -> None:
    now = time.strftime("%H:%M:%S")
    for what, steps in (("recorded", recorded), ("removed", released)):
        if steps:
            print(f"{now}  {what} step {', '.join(map(str, steps))}", flush=True)
    for name, why in waiting.items():
        print(f"{now}  waiting for {name}: {why}", flush=True)
