"""``rankleap trajectory``: factors of a run that any trainer made."""

from pathlib import Path
from typing import Annotated

import typer

from rankleap.cli.show import (
    Base,
    Device,
    Json,
    Rank,
    RunLocation,
    TrustPickle,
    Workers,
    short_list,
    show_json,
    show_table,
    size,
)


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
        from rankleap.analysis.evidence import write_spectra

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
