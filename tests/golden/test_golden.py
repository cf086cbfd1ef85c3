"""One fixed trajectory through every predictor and measure: numbers may change on purpose, never by a refactor.

To renew on purpose: delete ``golden.json``, run once (it fails and writes a new one), and read the difference.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankleap.analysis import evidence
from rankleap.checkpoints import dense
from rankleap.leap import Leap, norm_ratio
from rankleap.predictors import PREDICTORS, get_predictor

GOLDEN = Path(__file__).parent / "golden.json"
STEPS = (10, 20, 35, 40, 60, 80)
SCORES = {10: 0.1, 20: 0.25, 35: 0.3, 40: 0.4, 60: 0.45, 80: 0.5}


def bent_path() -> dict[str, list[torch.Tensor]]:
    """Drift that bends, noise on top; one matrix and one vector, written with plain arithmetic on fixed grids."""
    row, column = torch.arange(12.0), torch.arange(7.0)
    drift = torch.outer(torch.sin(row), torch.cos(column))
    bend = torch.outer(torch.cos(2 * row), torch.sin(3 * column))
    ripple = torch.outer(torch.sin(5 * row + 1), torch.cos(4 * column + 2))
    matrix = [1e-3 * s * drift + 1e-5 * s**2 * bend + 1e-2 * torch.sin(torch.tensor(1.0 * s)) * ripple for s in STEPS]
    return {"w": matrix, "b": [1e-3 * s * torch.sin(column) for s in STEPS]}


def measured(memory_trajectory: Callable[..., Any]) -> dict[str, Any]:
    trajectory = memory_trajectory(STEPS, bent_path())
    found: dict[str, Any] = {}
    for name in PREDICTORS:
        for window in (None, 4):
            leap = Leap(get_predictor(name, window, SCORES).fit(trajectory), coefficient=1.5, step=100.0)
            delta = dense(leap.delta("w"))
            found[f"{name}/{window}"] = [float(delta.norm()), float(delta[3, 2]), float(delta[11, 6]), norm_ratio(leap)]
    tensor = evidence(trajectory)["tensors"][0]
    found["evidence"] = [*tensor["path"].values(), *tensor["share"].values()]
    return found


def test_the_golden_numbers_stand(memory_trajectory: Callable[..., Any]) -> None:
    found = measured(memory_trajectory)
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{GOLDEN} was missing and is written now; read it, then run again")
    wanted = json.loads(GOLDEN.read_text())
    assert found.keys() == wanted.keys()
    for key, numbers in wanted.items():
        assert found[key] == pytest.approx(numbers, rel=1e-5, abs=1e-9), key
