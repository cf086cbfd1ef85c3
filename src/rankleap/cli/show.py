"""Prints results: a table for a person, JSON for a program. The only place, with the verbs, that prints."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rankleap.errors import MissingExtraError

_EXTRA_OF = {
    "trl": "train",
    "peft": "train",
    "accelerate": "train",
    "datasets": "train",
    "reasoning_gym": "train",
    "altair": "report",
    "vl_convert": "report",
}


def show_json(value: object) -> None:
    """Print a result as JSON."""
    print(json.dumps(value, indent=2, default=str))


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


def size(size_bytes: float) -> str:
    """Bytes for a person to read."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"
