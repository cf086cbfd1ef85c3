"""``rankleap leap``: a new checkpoint from a run, chosen on validation and gated."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rankleap.cli.show import Base, Json, RunDirectory, extras, show_json, show_table
from rankleap.errors import InputError

if TYPE_CHECKING:
    from rankleap.config import Recipe
    from rankleap.leap import Decision


def leap(
    directory: RunDirectory,
    method: Annotated[list[str] | None, typer.Option(help="A predictor; several are chosen among.")] = None,
    coefficient: Annotated[
        list[float] | None, typer.Option(help="How far: 0 is the origin, 1 the method's own reach.")
    ] = None,
    window: Annotated[
        list[int] | None, typer.Option(help="How many of the last checkpoints to look at; default all.")
    ] = None,
    until: Annotated[int | None, typer.Option(help="Ignore checkpoints after this step.")] = None,
    base: Base = None,
    task: Annotated[str | None, typer.Option(help="Task to choose and gate on; default the run's own.")] = None,
    problems: Annotated[
        int, typer.Option(min=4, help="Validation problems: half to choose on, half for the gate.")
    ] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Completions of each problem.")] = 4,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest completion; default the run's own.")] = None,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="One-sided confidence that the gate asks for.")
    ] = 0.8,
    max_norm_ratio: Annotated[float, typer.Option(min=1.0, help="Largest ‖leap - base‖ / ‖last - base‖.")] = 4.0,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="Largest forward KL(base‖leap), nats a token; unset: not measured.")
    ] = None,
    as_: Annotated[
        Literal["full", "adapter"], typer.Option("--as", help="Write all weights, or a LoRA adapter.")
    ] = "full",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Where to write; default DIRECTORY/leaps/METHOD/step-S-cC.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the samples.")] = 0,
    as_json: Json = False,
) -> None:
    """Extrapolate a run, choose how far on validation, gate, and write the leap if it is accepted."""
    with extras("choosing a leap on a task"):
        from rankleap.evaluation import Sampling
        from rankleap.leap import Candidates, GateSettings, Trial, open_source, try_leaps, write_decision

    source = open_source(directory, base, until)
    recipe = _of_run(directory)
    chosen_task = task or (recipe.task.name if recipe else None)
    if chosen_task is None:
        raise InputError(f"{directory} was not trained by rankleap, so its task is not known; give --task")
    sampling = Sampling(max_new_tokens=max_tokens or (recipe.train.max_completion_tokens if recipe else 512))
    trial = Trial(chosen_task, problems, samples, sampling, seed, rank if as_ == "adapter" else None)
    # Up to a little beyond the method's own reach: longer straight leaps lose (docs/log.md).
    candidates = Candidates(method or ["window"], window or [None], coefficient or [0.5, 1.0, 1.5])
    decision = try_leaps(source, candidates, trial, GateSettings(confidence, max_norm_ratio, max_kl))
    # A rejected leap is shown and not written, so that every leap on disk has passed.
    written = None
    if decision.verdict.accepted:
        target = out or directory / "leaps" / decision.leap.forecast.method / decision.leap.directory_name()
        written = write_decision(decision, source, target, trial.adapter_rank)
    _show(decision, written, as_json)


def _show(decision: "Decision", written: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    verdict = decision.verdict
    if as_json:
        facts = {"tried": decision.tried, "gate": asdict(verdict), "written": written, "wall_s": decision.wall_s}
        show_json({"step": decision.step, "method": decision.leap.forecast.method, **facts})
        return
    show_table(f"tried on the choosing half of the validation problems, from step {decision.step}", decision.tried)
    gain = verdict.difference
    rows = [
        {"": "gate", "value": "accepted" if verdict.accepted else "rejected: " + "; ".join(verdict.reasons)},
        {"": "gain over the last checkpoint", "value": f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"},
        {"": "norm ratio", "value": f"{verdict.norm_ratio:.2f}"},
        {"": "written to", "value": written or "nothing: the last checkpoint stays"},
    ]
    show_table(f"{decision.leap.forecast.method}, coefficient {decision.leap.coefficient}, on the gate half", rows)


def _of_run(directory: Path) -> "Recipe | None":
    """The recipe of a run that rankleap trained."""
    from rankleap.config import make_recipe
    from rankleap.files import read_json

    config = directory / "config.json"
    values = read_json(config) if config.exists() else {}
    return make_recipe(values, str(config)) if "train" in values else None
