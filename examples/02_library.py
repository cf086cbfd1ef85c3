"""The library in a page: open a run, fit a forecast, write a leap, load it in Transformers.

    rankleap train recipes/sums-plain.toml --set train.steps=40
    python examples/02_library.py runs/sums-plain

Expected: a leap along the window of the last four checkpoints, its norm ratio (somewhat above 1), and the greedy answer of the
model before and after to one test problem.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from rankleap.leap import Leap, norm_ratio, open_source, write_leap
from rankleap.predictors import get_predictor
from rankleap.tasks import get_task


def main(run: Path) -> None:
    """Leap without choosing or gating: for looking, not for keeping."""
    source = open_source(run, base_name=None)
    forecast = get_predictor("window", window=4).fit(source.trajectory)
    leap = Leap(forecast, coefficient=0.5)
    print(f"from step {source.trajectory.steps[-1]} towards {forecast.reach:.0f}, norm ratio {norm_ratio(leap):.2f}")
    written = write_leap(leap, source.base, run / "leaps" / "example", evidence={"gate": "not asked"})
    problem = get_task("sums").problems("test", 1)[0]
    for directory in (source.base.directory, written):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
        output = model.generate(**tokenizer(problem.prompt, return_tensors="pt"), do_sample=False, max_new_tokens=24)
        print(directory.name, "→", repr(tokenizer.decode(output[0], skip_special_tokens=True)), "want", problem.answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
