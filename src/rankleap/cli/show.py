"""What the verbs share: arguments that read and behave the same, and results as a table for a person or JSON for a program."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankleap.errors import MissingExtraError

if TYPE_CHECKING:
    from rankleap.config import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RunDirectory = Annotated[Path, typer.Argument(help="A run: a directory that holds checkpoint-N folders.")]
RunLocation = Annotated[
    str,
    typer.Argument(help="A run of any trainer: a directory with step folders, hf://ORG/REPO, or a URL such as s3://…"),
]
Base = Annotated[
    str | None, typer.Option(help="What the run was trained from: a directory, a Hub name or bundled:NAME.")
]
Rank = Annotated[int, typer.Option(min=1, help="Singular triplets kept of each matrix.")]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Let pickled checkpoints name any global; opening them may run any code.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes of this machine, one thread each.")]
Device = Annotated[str, typer.Option(help="Where matrices are factored: cpu or cuda.")]

_EXTRA_OF = {
    "trl": "train",
    "peft": "train",
    "accelerate": "train",
    "datasets": "train",
    "reasoning_gym": "train",
    "altair": "report",
    "vl_convert": "report",
}


def show_json(value: object, indent: int | None = 2) -> None:
    """Print a result as JSON; on one line without an indent, for results that follow each other."""
    print(json.dumps(value, indent=indent, default=str), flush=True)


def show_table(title: str, rows: Sequence[Mapping[str, object]], *, note: str = "") -> None:
    """Print rows as a table; the first row's keys are the columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
    for column in rows[0] if rows else []:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console().print(table)


@contextmanager
def extras(need: str) -> Iterator[None]:
    """Turn a missing optional package into an error that says which extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        # Any other missing module is a broken installation, not an extra to add.
        if top not in _EXTRA_OF:
            raise
        raise MissingExtraError(need, _EXTRA_OF[top]) from None


def recipe_of(run: Path | None) -> "Recipe | None":
    """The recipe of a run that rankleap trained; ``None`` for any other."""
    from rankleap.config import make_recipe
    from rankleap.files import read_json

    config = run / "config.json" if run is not None else None
    values = read_json(config) if config is not None and config.exists() else {}
    return make_recipe(values, str(config)) if "train" in values else None


def short_list(values: Sequence[object]) -> str:
    """The values, or the first and last few of many."""
    few = values if len(values) <= 12 else [*values[:6], "…", *values[-5:]]
    return ", ".join(map(str, few))


def size(size_bytes: float) -> str:
    """Bytes for a person to read."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"
