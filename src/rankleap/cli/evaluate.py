"""``rankleap evaluate``: avg@k and pass@k with intervals, for one model, all checkpoints of a run, or saved samples."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankleap.cli.show import Base, Json, extras, recipe_of, show_json, show_table
from rankleap.errors import InputError
from rankleap.records import Estimate, Split

if TYPE_CHECKING:
    from rankleap.evaluation import Evaluation, Sampling
    from rankleap.records import Problem
    from rankleap.tasks import Task

From = Annotated[
    str | None,
    typer.Option("--extrapolate-from", help="An earlier checkpoint: decode with (1 + c)·logits - c·its logits."),
]
Coefficient = Annotated[float, typer.Option(help="c of --extrapolate-from; 0 is MODEL itself.")]


def evaluate(
    model: Annotated[str | None, typer.Argument(help="A checkpoint, an adapter, a Hub name or bundled:NAME.")] = None,
    run: Annotated[Path | None, typer.Option(help="Evaluate the base, all checkpoints and leaps of this run.")] = None,
    samples: Annotated[Path | None, typer.Option(help="Read graded samples from this file; no model needed.")] = None,
    task: Annotated[str | None, typer.Option(help="Where problems come from; default the run's own task.")] = None,
    split: Annotated[Split, typer.Option(help="Choose on validation, report on test.")] = "test",
    problems: Annotated[int, typer.Option(min=2, help="How many problems.")] = 256,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Completions of each problem.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(max=1.0, help="Nucleus of the distribution.")] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest completion; default the run's, or 512.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Completions at once; lower it if memory runs out.")] = 512,
    base: Base = None,
    extrapolate_from: From = None,
    coefficient: Coefficient = 0.5,
    out: Annotated[Path | None, typer.Option(help="Write OUT/evaluation/TASK/NAME.jsonl; default the run.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the samples.")] = 0,
    as_json: Json = False,
) -> None:
    """Sample, grade, and print metrics with intervals over problems; what is saved already is not done again."""
    from rankleap.evaluation import Evaluation, Sampling, read_samples

    if sum(given is not None for given in (model, run, samples)) != 1:
        raise InputError("give one thing to evaluate: MODEL, --run DIR or --samples FILE")
    if extrapolate_from is not None and model is None:
        raise InputError("--extrapolate-from goes with one MODEL, the later checkpoint")
    if samples is not None:
        _show({samples.stem: Evaluation.of(samples.parent.name, read_samples(samples))}, samples.parent.name, as_json)
        return
    recipe = recipe_of(run)
    task = task or (recipe.task.name if recipe else None)
    if task is None:
        raise InputError("which task to evaluate on is not known; give --task")
    longest = max_tokens or (recipe.train.max_completion_tokens if recipe else 512)
    sampling = Sampling(temperature, top_p, longest, batch_size)
    # The task comes before any model: a wrong name or a missing extra is told at once.
    with extras("evaluating on a task"):
        from rankleap.tasks import get_task

        chosen = get_task(task)
        asked = chosen.problems(split, problems)
    # Without MODEL there is a run; ``or Path()`` is for the type checker alone.
    targets = {_name_of(model): model} if model is not None else _targets(run or Path(), base)
    early = None if extrapolate_from is None else (extrapolate_from, coefficient)
    if early is not None:
        # A name of its own, so that its samples are not taken for the model's.
        targets = {f"{name}-from-{_name_of(early[0])}-c{coefficient:g}": where for name, where in targets.items()}
    done = _evaluate_all(targets, (base, early), (chosen, asked), (k, sampling, seed), out or run)
    _show(done, f"{task}, {split}", as_json)


def _evaluate_all(
    targets: dict[str, str],
    beside: tuple[str | None, tuple[str, float] | None],
    posed: "tuple[Task, list[Problem]]",
    draw: "tuple[int, Sampling, int]",
    out: Path | None,
) -> "dict[str, Evaluation]":
    """Evaluate every target, on disk where ``out`` says so; ``beside`` it the base, and what to extrapolate its logits from."""
    from rich.console import Console
    from rich.progress import track
    from transformers.utils.logging import disable_progress_bar

    from rankleap.evaluation.evaluate import evaluate, evaluate_checkpoint, load_model
    from rankleap.evaluation.result import samples_path
    from rankleap.leap.logits import load_extrapolated
    from rankleap.tasks.grading import GraderPool

    disable_progress_bar()
    (base, early), (task, problems), (k, sampling, seed) = beside, posed, draw
    done = {}
    # One pool for all checkpoints, so that its processes start once.
    with GraderPool(task) as pool:
        for name, where in track(targets.items(), "evaluating", console=Console(stderr=True)):
            # Only a promise: nothing is loaded where every sample is on disk already.
            load = (
                partial(load_model, where, base) if early is None else partial(load_extrapolated, where, *early, base)
            )
            if out is None:
                model, tokenizer = load()
                done[name], _ = evaluate(model, tokenizer, pool, problems, k=k, sampling=sampling, seed=seed)
            else:
                path = samples_path(out, task.name, name)
                done[name] = evaluate_checkpoint(path, load, pool, problems, k=k, sampling=sampling, seed=seed)
    return done


def _targets(run: Path, base: str | None) -> dict[str, str]:
    """Names and places of the base (where it is known), the checkpoints and the leaps of a run."""
    from rankleap.checkpoints import open_run

    opened = open_run(run)
    known = base or opened.base_name()
    # The base stands first, for gains are told over the first.
    targets = {"base": known} if known else {}
    targets |= {f"checkpoint-{step}": str(one.directory) for step, one in opened.checkpoints.items()}
    leaps = sorted(path.parent for path in (run / "leaps").glob("*/*/manifest.json"))
    return targets | {f"{leap.parent.name}-{leap.name}": str(leap) for leap in leaps}


def _name_of(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].removeprefix("bundled:")


def _show(done: "dict[str, Evaluation]", title: str, as_json: bool) -> None:
    from rankleap.evaluation import paired_difference

    summaries = {name: evaluation.summary() for name, evaluation in done.items()}
    first = next(iter(done))
    gains = {
        name: paired_difference(evaluation.scores_PK, done[first].scores_PK)
        for name, evaluation in done.items()
        if name != first
    }
    if as_json:
        show_json({name: {**line, **_since(first, gains.get(name))} for name, line in summaries.items()})
        return
    k = max(line["samples"] for line in summaries.values())
    rows = []
    for name, line in summaries.items():
        most = list(line["pass"])[-1]
        rows.append(
            {
                "checkpoint": name,
                f"avg@{k}": _text(Estimate(**line["avg"])),
                f"pass@{most}": _text(Estimate(**line["pass"][most])),
                f"gain over {first}": _text(gains[name], sign="+") if name in gains else "",
                "tokens": f"{line['mean_tokens']:.1f}",
                "truncated": f"{line['truncation_rate']:.1%}",
            }
        )
    failures = sum(line["verdicts"].get(how, 0) for line in summaries.values() for how in ("timeout", "grader_error"))
    failed = f"; the grader failed {failures} times, scored 0" if failures else ""
    problems = summaries[first]["problems"]
    show_table(title, rows, note=f"{problems} problems, 95 % intervals over problems, gains paired{failed}")


def _since(first: str, gain: Estimate | None) -> dict[str, object]:
    return {} if gain is None else {"gain": {"over": first, **asdict(gain)}}


def _text(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
