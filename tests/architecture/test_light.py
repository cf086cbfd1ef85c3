"""Help is for people who wait: parsing, grading and reading a recipe load no torch."""

import subprocess
import sys

from rankleap.cli import app

HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "altair", "scipy", "ray"}
LIGHT = ["cli", "tasks", "records", "config", "errors", "files", "cluster", "report"]


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``code``."""
    program = f"{code}\nimport sys\nprint()\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_light_modules_load_nothing_heavy() -> None:
    loaded = loaded_by(f"import {', '.join(f'rankleap.{module}' for module in LIGHT)}")
    assert "rankleap" in loaded
    assert loaded & HEAVY == set()


def test_no_help_loads_anything_heavy() -> None:
    verbs = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert {"demo", "train", "inspect", "trajectory", "leap", "evaluate", "report", "doctor"} <= set(verbs)
    code = f"""
import sys
from rankleap.cli import main
for arguments in {[["--help"], *([verb, "--help"] for verb in verbs)]!r}:
    sys.argv = ["rankleap", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, (arguments, end.code)
    else:
        raise AssertionError(arguments)
"""
    assert loaded_by(code) & HEAVY == set()
