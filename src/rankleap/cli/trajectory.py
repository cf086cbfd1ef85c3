"""``rankleap inspect``, ``trajectory`` and ``watch``: what a run that any trainer made holds, its factors, and following it."""

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from rankleap.cli.show import (
    Base,
    Device,
    Json,
    Rank,
    RunDirectory,
    RunLocation,
    TrustPickle,
    Workers,
    short_list,
    show_json,
    show_table,
    size,
)


def inspect(directory: RunLocation, trust_pickle: TrustPickle = False, as_json: Json = False) -> None:
    """Show what is here: layout, steps, base, adapter, tensors, size, precision, and what was skipped and why."""
    from rankleap.checkpoints import AdapterCheckpoint, open_run

    run = open_run(directory, trust_pickle)
    # One stands for all: checkpoints of mixed layouts are refused when the run is opened.
    last = run.checkpoints[run.steps[-1]]
    dtypes = Counter(last.source.dtypes.values())
    size_bytes = sum(checkpoint.size_bytes() for checkpoint in run.checkpoints.values())
    facts: dict[str, object] = {
        "run": str(run.directory),
        "layout": run.layout.name,
        "base": run.base_name(),
        "adapter": last.settings if isinstance(last, AdapterCheckpoint) else None,
        "steps": run.steps,
        "tensors": len(last.shapes),
        "dtypes": dict(dtypes),
        "size_bytes": size_bytes,
        "skipped": run.skipped,
    }
    if as_json:
        show_json(facts)
        return
    rows = {
        **facts,
        "base": facts["base"] or "not named by the run; give it with --base",
        "adapter": _listed(last.settings) if isinstance(last, AdapterCheckpoint) else "none: full weights",
        "steps": f"{len(run.steps)}: {short_list(run.steps)}",
        "dtypes": ", ".join(f"{dtype} × {count}" for dtype, count in dtypes.items()),
        "size_bytes": size(size_bytes),
        "skipped": "\n".join(f"{name}: {why}" for name, why in run.skipped.items()) or "none",
    }
    show_table("what is here", [{"": key.removesuffix("_bytes"), "value": value} for key, value in rows.items()])


def _listed(settings: dict[str, object]) -> str:
    """``LoRA, rank 16, alpha 32, on k_proj, q_proj``."""
    targets = settings.get("target_modules")
    where = ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets)
    numbers = [f"{key} {settings[key]:g}" for key in ("rank", "alpha") if key in settings]
    return ", ".join([str(settings["method"]), *numbers, f"on {where}"])


def trajectory(
    directory: RunLocation,
    base: Base = None,
    rank: Rank = 4,
    out: Annotated[Path | None, typer.Option(help="Where to write; default DIRECTORY/trajectory.")] = None,
    workers: Workers = 1,
    ray: Annotated[
        str | None, typer.Option(help="Ray's address: local, auto or ray://HOST:PORT; needs rankleap[cluster].")
    ] = None,
    device: Device = "cpu",
    spectra: Annotated[
        list[str] | None, typer.Option(help="Also whole spectra of the tensors of this glob; a full SVD each.")
    ] = None,
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
) -> None:
    """Write the rank-k factors of every checkpoint's delta since the base; only missing steps are computed."""
    from rich.progress import track

    from rankleap.checkpoints import open_run
    from rankleap.errors import CheckpointError
    from rankleap.trajectory import record_step, recording_of, unseparated

    run = open_run(directory, trust_pickle)
    if out is None and "://" in directory:
        raise CheckpointError(f"{directory} is not on this machine; say where to write its factors with --out")
    recording, path = recording_of(run, base, out or Path(directory) / "trajectory", rank)
    missing = sorted(set(path.steps) - set(recording.steps()))
    for step in track(missing, description="factoring", disable=as_json or not missing):
        record_step(recording, path, step, workers, ray, device)
    whole: list[str] = []
    if spectra:
        from rankleap.analysis import write_spectra

        whole = write_spectra(path, recording.directory.parent, spectra)
    result = {
        "trajectory": str(recording.directory),
        "steps": recording.steps(),
        "rank": rank,
        "trajectory_bytes": sum(path.stat().st_size for path in recording.directory.iterdir()),
        "checkpoint_bytes": sum(checkpoint.size_bytes() for checkpoint in run.checkpoints.values()),
        "not_separated": unseparated(recording, recording.steps()[-1]),
        "skipped": run.skipped,
        **({"spectra": whole} if spectra else {}),
    }
    if as_json:
        show_json(result)
        return
    sizes = {key: size(value) for key, value in result.items() if isinstance(value, int) and key.endswith("_bytes")}
    mixed = result["not_separated"]
    matrices = sum(len(shape) > 1 for shape in path.shapes.values())
    told = {
        "steps": short_list(result["steps"]),
        "not_separated": f"{len(mixed)} of {matrices} matrices{': ' if mixed else ''}{short_list(mixed)}",
        "skipped": "\n".join(f"{name}: {why}" for name, why in run.skipped.items()) or "none",
    }
    rows = {**result, **sizes, **told}
    show_table(
        "trajectory",
        [{"": key.replace("_bytes", " size").replace("_", " "), "value": value} for key, value in rows.items()],
        note="not separated: the first direction is one of several near-equal ones, in the last step",
    )


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
    from rankleap.trajectory.record import Watch, sweep

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
