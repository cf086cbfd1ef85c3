"""Help is for people who wait: parsing, grading and reading a recipe load no torch."""

import subprocess
import sys

import pytest

from rankleap.cli import app

HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "altair", "scipy", "ray"}
VERBS = sorted(command.name or command.callback.__name__ for command in app.registered_commands if command.callback)


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``code``."""
    program = f"{code}\nimport sys\nprint()\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_light_modules_load_nothing_heavy() -> None:
    modules = ["cli", "tasks", "records", "config", "errors", "files", "cluster", "report"]
    assert loaded_by(f"import {', '.join(f'rankleap.{module}' for module in modules)}") & HEAVY == set()


def test_the_package_itself_loads_nothing_at_all() -> None:
    assert {name for name in loaded_by("import rankleap") if name.startswith("numpy")} | HEAVY & loaded_by(
        "import rankleap"
    ) == set()


def test_no_help_loads_anything_heavy() -> None:
    asked = [["--help"], *([verb, "--help"] for verb in VERBS)]
    code = f"""
import sys
from rankleap.cli import main
for arguments in {asked!r}:
    sys.argv = ["rankleap", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, (arguments, end.code)
    else:
        raise AssertionError(arguments)
"""
    assert loaded_by(code) & HEAVY == set()


@pytest.mark.parametrize("verb", ["demo", "train", "inspect", "trajectory", "leap", "evaluate", "report", "doctor"])
def test_every_verb_is_there(verb: str) -> None:
    assert verb in VERBS
