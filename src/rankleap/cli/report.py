"""``rankleap report``: one page, with figures and tables, about studies and runs."""

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
