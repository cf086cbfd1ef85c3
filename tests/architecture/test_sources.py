"""What every source file must and must not hold."""

import ast
from pathlib import Path

import pytest

import rankleap

SOURCE = Path(rankleap.__file__).parent
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
LIBRARY = [path for path in FILES if path.parts[0] != "cli"]

each_file = pytest.mark.parametrize("path", FILES, ids=str)
each_library_file = pytest.mark.parametrize("path", LIBRARY, ids=str)


def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse((SOURCE / path).read_text())))


@each_file
def test_every_module_opens_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse((SOURCE / path).read_text()))


@each_file
def test_every_public_name_has_a_docstring(path: Path) -> None:
    defined = ast.FunctionDef | ast.ClassDef
    tops = [node for node in ast.parse((SOURCE / path).read_text()).body if isinstance(node, defined)]
    methods = [node for top in tops if isinstance(top, ast.ClassDef) for node in top.body if isinstance(node, defined)]
    public = [node for node in (*tops, *methods) if not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@each_library_file
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"]


@each_library_file
def test_no_error_is_caught_broadly(path: Path) -> None:
    handlers = [node for node in nodes(path) if isinstance(node, ast.ExceptHandler)]
    broad = {"Exception", "BaseException"}
    assert not [h.lineno for h in handlers if h.type is None or {n.id for n in names(h.type)} & broad]


@each_library_file
def test_nothing_probes_for_attributes(path: Path) -> None:
    calls = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "hasattr"]


@each_file
def test_no_file_is_longer_than_four_hundred_lines(path: Path) -> None:
    assert len((SOURCE / path).read_text().splitlines()) <= 400


def names(node: ast.expr) -> list[ast.Name]:
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.Name)]
