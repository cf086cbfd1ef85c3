"""Every adapter with every algorithm trains, saves, resumes and reloads, or is refused by name; ``docs/matrix.md`` says which."""

import gc
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from killed import numbers, short
from rankleap.adapters import ADAPTERS, adapter_mistakes
from rankleap.algorithms import ALGORITHMS
from rankleap.errors import RecipeError
from rankleap.files import read_json
from rankleap.training import train
from rankleap.training.build import check

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")
MATRIX = Path(__file__).parents[2] / "docs" / "matrix.md"
RENEW = "RANKLEAP_RENEW_MATRIX=1 python -m pytest tests/contracts/test_every_pair.py"
PAIRS = [(adapter, algorithm) for adapter in ADAPTERS for algorithm in ALGORITHMS]
HEAD = f"""# Adapters × algorithms

✓: two steps are trained, saved, resumed from the first step's checkpoint to the same numbers and weights, and reloaded on the
original base to the same logits, on a two-layer Llama in float32 on one CPU process. – 1: refused, for reason 1 below.

Written by `{RENEW}`; the tests fail when it is stale.
"""


@pytest.fixture(scope="module")
def found() -> Iterator[dict[tuple[str, str], str]]:
    """What became of each pair that was tried."""
    # Every trainer collects garbage when it ends, and what other tests left behind would be walked through 400 times.
    gc.collect()
    gc.freeze()
    yield {}
    gc.unfreeze()


@pytest.mark.parametrize(("adapter", "algorithm"), PAIRS)
def test_a_pair_trains_saves_resumes_and_reloads_or_is_refused_by_name(
    adapter: str, algorithm: str, small_base: Path, tmp_path: Path, found: dict[tuple[str, str], str]
) -> None:
    # A KL term where its reference is not simply the live model without its adapter.
    by_rewards = ALGORITHMS[algorithm].learns_from == "rewards"
    beta = 0.05 if ADAPTERS[adapter].start != "base" and by_rewards else 0.0
    recipe, rewards = short(adapter, algorithm, small_base, beta)
    if reasons := adapter_mistakes(recipe):
        with pytest.raises(RecipeError, match=re.escape(reasons[0])):
            check(recipe, rewards)
        found[adapter, algorithm] = "; ".join(reasons)
        return
    out, file = tmp_path / "run", "adapter_model.safetensors" if ADAPTERS[adapter].peft_class else "model.safetensors"
    last = out / "checkpoints" / "checkpoint-2"

    def trained() -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        train(recipe, out, rewards=rewards)
        differences = read_json(out / "manifest.json")["round_trip"]
        assert set(differences) == {"reloaded", *(["effective"] if ADAPTERS[adapter].readable else [])}
        assert max(differences.values()) < 1e-5
        return numbers(out), load_file(last / file)

    rows, weights = trained()
    first = load_file(last.with_name("checkpoint-1") / file)
    assert [row["step"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0 for row in rows)
    assert any(not torch.equal(weight, first[name]) for name, weight in weights.items())
    # As a run that was stopped after its first step.
    shutil.rmtree(last)
    again, weights_again = trained()
    assert again == rows
    assert all(torch.equal(weight, weights_again[name]) for name, weight in weights.items())
    found[adapter, algorithm] = "✓"


def test_the_matrix_in_the_docs_is_what_was_found(found: dict[tuple[str, str], str]) -> None:
    if len(found) < len(PAIRS):
        pytest.skip("needs every pair to have been tried, and to have passed")
    reasons = sorted(set(found.values()) - {"✓"})
    lines = [f"| | {' | '.join(ALGORITHMS)} |", "|---" * (len(ALGORITHMS) + 1) + "|"]
    for adapter in ADAPTERS:
        cells = [found[adapter, algorithm] for algorithm in ALGORITHMS]
        shown = [cell if cell == "✓" else f"– {reasons.index(cell) + 1}" for cell in cells]
        lines.append(f"| {adapter} | {' | '.join(shown)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)] or [
        "No pair is refused; settings that are: `rankleap doctor --adapters`."
    ]
    text = "\n".join([HEAD, *lines, "", *notes, ""])
    if os.environ.get("RANKLEAP_RENEW_MATRIX"):
        MATRIX.write_text(text)
    assert MATRIX.read_text() == text, f"docs/matrix.md is stale; run {RENEW}"
