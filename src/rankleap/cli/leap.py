"""``rankleap leap``: a new checkpoint from a run, tested on its past, chosen on validation and gated."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rankleap.cli.show import Base, Json, RunDirectory, extras, recipe_of, show_json, show_table
from rankleap.errors import InputError

if TYPE_CHECKING:
    from rankleap.leap import BackTest, Candidates, Decision, Source, Trial

Method = Annotated[list[str] | None, typer.Option(help="A predictor; several are chosen among.")]
Coefficient = Annotated[list[float] | None, typer.Option(help="How far: 0 is the origin, 1 the method's own reach.")]
Window = Annotated[list[int] | None, typer.Option(help="How many of the last checkpoints to look at; default all.")]
Until = Annotated[int | None, typer.Option(help="Ignore checkpoints after this step.")]
Target = Annotated[float | None, typer.Option(help="Step to predict; default the method's own reach.")]
Task = Annotated[str | None, typer.Option(help="Task to choose and gate on; default the run's own.")]
Problems = Annotated[int, typer.Option(min=4, help="Validation problems: half to choose on, half for the gate.")]
Samples = Annotated[int, typer.Option(min=1, help="Completions of each problem.")]
Budget = Annotated[
    int | None, typer.Option(min=1, help="Completions for choosing, by successive halving; default all.")
]
Scores = Annotated[
    Path | None, typer.Option(help="Accuracies by step, for alpharl; default the run's own evaluation on validation.")
]
Tested = Annotated[
    Literal["weights", "accuracy", "off"],
    typer.Option("--backtest", help="Test leaps on the run's past first; accuracy takes completions at every step."),
]
Despite = Annotated[
    bool, typer.Option("--despite-backtest", help="Go on to choosing and the gate whatever the back-test says.")
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest completion; default the run's own.")]
Confidence = Annotated[float, typer.Option(min=0.5, max=0.999, help="One-sided confidence that the gate asks for.")]
MaxNormRatio = Annotated[float, typer.Option(min=1.0, help="Largest ‖leap - base‖ / ‖last - base‖.")]
MaxKL = Annotated[
    float | None, typer.Option(min=0, help="Largest forward KL(base‖leap), nats a token; unset: not measured.")
]
MaxLengthRatio = Annotated[float, typer.Option(min=1.0, help="Mean tokens may grow or shrink by this factor.")]
MaxTruncationRise = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of completions without an end, above the last checkpoint's.")
]
Shrinks = Annotated[int, typer.Option(min=0, help="How often a refused leap is halved; each look is stricter for it.")]
As = Annotated[Literal["full", "adapter"], typer.Option("--as", help="Write all weights, or a LoRA adapter.")]
AdapterRank = Annotated[
    int | None, typer.Option(min=1, help="Rank of the adapter; default 16, of a recorded trajectory its own.")
]
Out = Annotated[Path | None, typer.Option(help="Where to write; default DIRECTORY/leaps/METHOD/step-S-cC.")]
Seed = Annotated[int, typer.Option(min=0, help="Seeds the samples.")]


def leap(
    directory: RunDirectory,
    method: Method = None,
    coefficient: Coefficient = None,
    window: Window = None,
    until: Until = None,
    target: Target = None,
    base: Base = None,
    task: Task = None,
    problems: Problems = 256,
    samples: Samples = 4,
    budget: Budget = None,
    scores: Scores = None,
    backtest: Tested = "weights",
    despite_backtest: Despite = False,
    max_tokens: MaxTokens = None,
    confidence: Confidence = 0.8,
    max_norm_ratio: MaxNormRatio = 4.0,
    max_kl: MaxKL = None,
    max_length_ratio: MaxLengthRatio = 2.0,
    max_truncation_rise: MaxTruncationRise = 0.1,
    shrinks: Shrinks = 2,
    as_: As = "full",
    rank: AdapterRank = None,
    out: Out = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Extrapolate a run: back-test, choose how far on validation, gate, and write the leap if it is accepted."""
    with extras("choosing a leap on a task"):
        from rankleap.evaluation import Sampling
        from rankleap.leap import Candidates, GateSettings, Trial, open_source, try_leaps, write_decision

    source = open_source(directory, base, until)
    recipe = recipe_of(directory)
    chosen_task = task or (recipe.task.name if recipe else None)
    if chosen_task is None:
        raise InputError(f"{directory} was not trained by rankleap, so its task is not known; give --task")
    sampling = Sampling(max_new_tokens=max_tokens or (recipe.train.max_completion_tokens if recipe else 512))
    adapter_rank = _rank(source, rank) if as_ == "adapter" else None
    trial = Trial(chosen_task, problems, samples, sampling, seed, adapter_rank)
    methods, answers = method or ["window"], budget and budget // samples
    known = _accuracies(directory, scores, methods, source, trial)
    # Up to a little beyond the method's own reach: longer straight leaps lose (docs/log.md).
    candidates = Candidates(methods, window or [None], coefficient or [0.5, 1.0, 1.5], target, answers, known)
    tested = _back_tested(backtest, source, candidates, trial)
    if tested.refusal and not despite_backtest:
        _show(tested, None, None, as_json)
        return
    limits = GateSettings(confidence, max_norm_ratio, max_kl, max_length_ratio, max_truncation_rise, shrinks)
    decision = try_leaps(source, candidates, trial, limits)
    # A rejected leap is shown and not written, so that every leap on disk has passed.
    written = None
    if decision.verdict.accepted:
        place = out or directory / "leaps" / decision.leap.forecast.method / decision.leap.directory_name()
        written = write_decision(decision, source, place, adapter_rank, {"backtest": asdict(tested)})
    _show(tested, decision, written, as_json)


def _rank(source: "Source", rank: int | None) -> int:
    from rankleap.trajectory import RecordedTrajectory

    if not isinstance(source.trajectory, RecordedTrajectory):
        return rank or 16
    recorded: int = source.trajectory.index["rank"]
    if rank and rank > recorded:
        raise InputError(
            f"an adapter of rank {rank} needs as many recorded triplets, {source.trajectory.directory} has {recorded}; "
            f"ask for --rank {recorded}, or record again with rankleap trajectory --rank {rank}"
        )
    return rank or recorded


def _accuracies(
    directory: Path, file: Path | None, methods: list[str], source: "Source", trial: "Trial"
) -> dict[int, float] | None:
    """What the user gives, else the run's own, where a method asks for any."""
    from rankleap.leap import halves, read_accuracies, run_accuracies
    from rankleap.predictors import get_predictor
    from rankleap.tasks import get_task

    if file is not None:
        return read_accuracies(file)
    if not any(get_predictor(method).uses_scores for method in methods):
        return None
    choosing, _ = halves(get_task(trial.task).problems("validation", trial.problems))
    return run_accuracies(directory, trial.task, choosing, source.trajectory.steps)


def _back_tested(how: str, source: "Source", candidates: "Candidates", trial: "Trial") -> "BackTest":
    from rankleap.leap import BackTest, backtest, backtest_accuracy

    if how == "off":
        return BackTest((), 0)
    if how == "accuracy":
        return backtest_accuracy(source, candidates, trial)
    return backtest(source.trajectory, candidates)


def _show(tested: "BackTest", decision: "Decision | None", written: Path | None, as_json: bool) -> None:
    from rankleap.leap.backtest import RIVALS

    if as_json:
        facts = {"backtest": {**asdict(tested), "refusal": tested.refusal}, "written": written}
        if decision is not None:
            named = {"step": decision.step, "method": decision.leap.forecast.method}
            facts |= {**named, "ambiguous_signs": _ambiguous(decision), **decision.evidence()}
        show_json(facts)
        return
    rows = [
        {
            "method": skill.method,
            "window": skill.window,
            "coefficient": skill.coefficient,
            **{f"over {rival}": f"{skill.against[rival]:+.2f}" if rival in skill.against else "" for rival in RIVALS},
            # The reason of the best alone is told, below: a sentence in each row would fill the screen.
            "verdict": "no"
            if skill.reason
            else ("only denoises" if skill.denoises else "yes" if skill.against else "too few to test"),
        }
        for skill in tested.skills
    ]
    if rows:
        show_table("back-test: skill in weights on the run's own past; 1 exact, 0 no better", rows)
    if decision is None:
        print(f"{tested.refusal}. Nothing was written; to see what the gate says all the same: --despite-backtest")
        return
    verdict, gain = decision.verdict, decision.verdict.difference
    show_table(f"tried on the choosing half of the validation problems, from step {decision.step}", decision.tried)
    lengths = verdict.lengths
    rows = [
        {"": "gate", "value": "accepted" if verdict.accepted else "rejected: " + "; ".join(verdict.reasons)},
        {
            "": "gain over the last checkpoint",
            "value": gain and f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]",
        },
        {"": "norm ratio", "value": f"{verdict.norm_ratio:.2f}"},
        {"": "length, truncation", "value": lengths and f"× {lengths.ratio:.2f}, {lengths.truncation_rise:+.1%}"},
        {"": "coefficients looked at", "value": ", ".join(f"{look['coefficient']:g}" for look in decision.looks)},
        {
            "": "completions, seconds",
            "value": f"{decision.samples_spent + tested.samples_spent}, {decision.wall_s:.1f}",
        },
        {"": "signs that are a guess", "value": ", ".join(_ambiguous(decision)) or "none"},
        {"": "written to", "value": written or "nothing: the last checkpoint stays"},
    ]
    show_table(f"{decision.leap.forecast.method}, coefficient {decision.leap.coefficient}, on the gate half", rows)


def _ambiguous(decision: "Decision") -> list[str]:
    """Matrices whose aligned sign is a guess, by methods that read factors."""
    found = decision.leap.forecast.to_json().get("ambiguous", [])
    return [str(name) for name in found] if isinstance(found, list) else []
