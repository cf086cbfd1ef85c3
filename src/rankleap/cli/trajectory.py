"""``rankleap trajectory``: factors of a run that any trainer made."""

from pathlib import Path
from typing import Annotated

import typer

from rankleap.cli.options import Base, Json, RunDirectory
from rankleap.cli.show import show_json, show_table, size


def trajectory(
    directory: RunDirectory,
    base: Base = None,
    rank: Annotated[int, typer.Option(min=1, help="Singular triplets kept of each matrix.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Where to write; default DIRECTORY/trajectory.")] = None,
    as_json: Json = False,
) -> None:
    """Write the rank-k factors of every checkpoint's delta since the base; only missing steps are computed."""
    from rich.progress import track

    from rankleap.checkpoints import open_run
    from rankleap.trajectory import recording_of

    run = open_run(directory)
    recording, path = recording_of(run, base, out or directory / "trajectory", rank)
    missing = sorted(set(path.steps) - set(recording.steps()))
    for step in track(missing, description="factoring", disable=as_json or not missing):
        # A generator, so that one tensor's delta is in memory at a time.
        recording.add(step, ((name, path.delta(name, step)) for name in path.shapes))
    result = {
        "trajectory": str(recording.directory),
        "steps": recording.steps(),
        "rank": rank,
        "trajectory_bytes": sum(path.stat().st_size for path in recording.directory.iterdir()),
        "checkpoint_bytes": sum(checkpoint.size_bytes() for checkpoint in run.checkpoints.values()),
    }
    if as_json:
        show_json(result)
    else:
        sizes = {key: size(value) for key, value in result.items() if isinstance(value, int) and key != "rank"}
        show_table("trajectory", [{"": key, "value": sizes.get(key, value)} for key, value in result.items()])
