"""Arguments that several verbs share, so that they read and behave the same."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RunDirectory = Annotated[Path, typer.Argument(help="A run: a directory that holds checkpoint-N folders.")]
Base = Annotated[
    str | None, typer.Option(help="What the run was trained from: a directory, a Hub name or bundled:NAME.")
]
