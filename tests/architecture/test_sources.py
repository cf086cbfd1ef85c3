"""What every source file must and must not hold; each test lists the offenders."""

import ast
from pathlib import Path

import rankleap

SOURCE = Path(rankleap.__file__).parent
TREES = {path.relative_to(SOURCE): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}
LIBRARY = {path: tree for path, tree in TREES.items() if path.parts[0] != "cli"}
Definition = ast.FunctionDef | ast.ClassDef


def public(body: list[ast.stmt]) -> list[Definition]:
    return [node for node in body if isinstance(node, Definition) and not node.name.startswith("_")]


def calls_of(name: str) -> list[str]:
    return [
        f"{path}:{node.lineno}"
        for path, tree in LIBRARY.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def test_every_module_opens_with_a_docstring() -> None:
    assert TREES
    assert [str(path) for path, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_every_public_function_and_class_has_a_docstring() -> None:
    for path, tree in TREES.items():
        tops = public(tree.body)
        methods = [method for top in tops if isinstance(top, ast.ClassDef) for method in public(top.body)]
        assert [f"{path}:{node.name}" for node in (*tops, *methods) if not ast.get_docstring(node)] == []


def test_only_the_command_line_prints() -> None:
    assert calls_of("print") == []


def test_nothing_probes_for_attributes() -> None:
    assert calls_of("hasattr") == []


def test_no_error_is_caught_broadly() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path, tree in LIBRARY.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (
            node.type is None
            or {"Exception", "BaseException"} & {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
        )
    ]
    assert found == []


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    assert [str(p) for p in TREES if len((SOURCE / p).read_text().splitlines()) > 400] == []
