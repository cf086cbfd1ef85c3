"""Who may import whom, as a table; a stage that is not in it, or that reaches outside its row, is red."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rankleap

SOURCE = Path(rankleap.__file__).parent
OPEN = {"errors", "config", "records", "files", "cluster"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "records": set(),
    "files": {"errors"},
    "config": {"errors"},
    "cluster": {"errors"},
    "checkpoints": set(),
    "tasks": set(),
    "adapters": set(),
    "algorithms": set(),
    "report": set(),
    "lowrank": {"checkpoints"},
    "trajectory": {"lowrank", "checkpoints"},
    "predictors": {"trajectory", "lowrank", "checkpoints"},
    "evaluation": {"tasks", "checkpoints"},
    "analysis": {"trajectory", "lowrank", "checkpoints"},
    "leap": {"predictors", "trajectory", "lowrank", "checkpoints", "evaluation", "tasks"},
    "training": {
        "adapters",
        "algorithms",
        "tasks",
        "checkpoints",
        "trajectory",
        "predictors",
        "leap",
        "evaluation",
    },
}
MAY_IMPORT["arena"] = set(MAY_IMPORT) - {"report"}
MAY_IMPORT["cli"] = set(MAY_IMPORT)

FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def stage_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_stages(source: str, path: Path) -> Iterator[tuple[str, int]]:
    """Every stage that a file imports, at its top or inside a function, with the line; ``path`` is below the package."""
    package = ("rankleap", *path.parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parent, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *below = name.split(".")
            if top == "rankleap" and below:
                yield below[0], node.lineno


def trespasses(path: Path) -> list[str]:
    stage = stage_of(path)
    allowed = MAY_IMPORT[stage] | {stage} | (set() if stage in OPEN else OPEN)
    return [
        f"{path}:{line}: {stage} may not import {other}"
        for other, line in imported_stages((SOURCE / path).read_text(), path)
        if other not in allowed
    ]


STAGES = sorted({stage_of(path) for path in FILES} - {"__init__"})


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_only_what_its_row_allows(stage: str) -> None:
    assert stage in MAY_IMPORT, f"{stage} has no row: say in this table what it may import"
    assert [trespass for path in FILES if stage_of(path) == stage for trespass in trespasses(path)] == []


def test_every_row_is_a_stage() -> None:
    assert sorted(MAY_IMPORT) == STAGES


def test_only_the_model_loader_of_evaluation_reads_checkpoints() -> None:
    files = [path for path in FILES if stage_of(path) == "evaluation"]
    readers = [path for path in files if "checkpoints" in dict(imported_stages((SOURCE / path).read_text(), path))]
    assert [path.name for path in readers] == ["evaluate.py"]


def test_the_table_is_a_pipeline_and_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {stage for stage, needs in MAY_IMPORT.items() if needs <= done | {stage}} - done
        assert ready, f"a circle among {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


def test_an_import_is_found_wherever_it_hides() -> None:
    source = """
def f():
    import rankleap.cli.show
    from rankleap import report, errors
    from ..leap import gate
    from . import factors
    if TYPE_CHECKING:
        from rankleap.arena.study import Arm
    import torch, rankleaping.cli
"""
    found = [stage for stage, _ in imported_stages(source, Path("lowrank/imaginary.py"))]
    assert sorted(found) == ["arena", "cli", "errors", "leap", "lowrank", "report"]


def test_the_top_level_imports_nothing() -> None:
    nodes = ast.walk(ast.parse((SOURCE / "__init__.py").read_text()))
    assert not [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
