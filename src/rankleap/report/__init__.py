"""Reads run and study directories, gives sentences, figures, tables and one page that works offline.

``headline`` needs nothing beyond rankleap itself; ``write_report`` needs the extra ``report`` for its figures.
"""

from collections.abc import Sequence
from pathlib import Path

from rankleap.errors import InputError
from rankleap.files import read_json, write_aside, write_manifest
from rankleap.report.read import collect
from rankleap.report.sentences import headline

__all__ = ["headline", "write_report"]

MADE_BY = "report"


def write_report(directories: Sequence[Path], out: Path) -> Path:
    """Write ``index.html``, ``figures/``, ``tables/`` and a manifest to ``out`` in one step, and return the page.

    Raises ``InputError`` for a directory that holds nothing to show, and rather than replace what is not a report.
    """
    # Here and not above, so that ``headline`` works where the extra is not installed.
    from rankleap.report.page import Section, render, sections, title

    _refuse_to_replace(out)
    groups = collect(directories)
    parts: list[Section] = sections(groups)
    with write_aside(out) as aside:
        # ``write_aside`` gives a path; making this folder makes it a directory.
        (aside / "figures").mkdir(parents=True)
        (aside / "tables").mkdir()
        for part in parts:
            for figure in part.figures:
                figure.write(aside / "figures" / figure.name)
            for table in part.tables:
                (aside / "tables" / f"{table.name}.csv").write_text(table.csv())
        (aside / "index.html").write_text(render(title(groups), parts))
        write_manifest(aside, made_by=MADE_BY, inputs=[str(directory) for directory in directories])
    return out / "index.html"


def _refuse_to_replace(out: Path) -> None:
    """Let a report replace only a report: writing puts a new directory where the old one was."""
    manifest = out / "manifest.json"
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not (manifest.is_file() and read_json(manifest).get("made_by") == MADE_BY):
        raise InputError(f"{out} exists and is not a report, so it is not replaced; choose another --out or remove it")
