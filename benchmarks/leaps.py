"""Does leaping pay? Every method on three tasks, full and LoRA, at three learning rates, over seeds, against tuned baselines.

    python benchmarks/leaps.py --out runs/leaps            all of it: about three hours on two cores
    python benchmarks/leaps.py --out runs/leaps --tasks sums --adapters full --seeds 0

1. Re-grounded runs: training with gated leaps, against the plain run at the same rate (its final accuracy is the target), the
   same run averaged, and a plain run whose rate decays. Both curves are read by the rule of ``rankleap.arena``.
2. Single leaps: from step 60 of each plain run every method is chosen on validation and gated, and scored on test beside its
   origin, its forecast of the origin's own step (denoising; what is left is extrapolation) and the plain run that spent the same
   completions on training.
3. The papers' claims on the plain runs' last deltas: how much of the gain rank 1 keeps, unscaled and rescaled, beside a random
   direction of the same norm; linearity beside its nulls.

Test problems are seen by no choice. Writes OUT/leaps.json; ``benchmarks/leaps_page.py`` makes the tables and the figure of
``docs/`` from it. Interrupted, it goes on where it was.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rankleap.arena import LEAPS, TENTH, TEST_SEED, THIRD, TUNED, Arm, reach, run_arm, saved_fraction, smooth
from rankleap.checkpoints import FullCheckpoint, base_of, dense, effective_weights, load_weights, open_run
from rankleap.cluster import map_over
from rankleap.config import make_recipe
from rankleap.errors import TrajectoryError
from rankleap.evaluation import Sampling
from rankleap.evaluation.evaluate import evaluate, load_model
from rankleap.files import machine, read_json, versions, write_json
from rankleap.leap import Candidates, GateSettings, Leap, backtest, halves, leap_weights, search
from rankleap.lowrank import factorise
from rankleap.predictors import PREDICTORS
from rankleap.tasks import get_task
from rankleap.tasks.grading import GraderPool
from rankleap.trajectory import Trajectory, run_trajectory

TASKS = ("sums", "backward", "ends")
RATES = {"full": {"tenth": 3e-5, "third": 1e-4, "tuned": 3e-4}, "lora": {"tenth": 3e-4, "tuned": 3e-3}}
"""The tuned ones are those of the sweep in ``benchmarks/curves.py``."""
SETTINGS = {"tenth": LEAPS[TENTH], "third": LEAPS[THIRD], "tuned": LEAPS[TUNED]}
ARMS = ("plain", "leap", "plain, decayed")
STEPS, FROM, BATCH = 120, 60, 128
SINGLE_COEFFICIENTS, SINGLE_WINDOWS = (0.5, 1.0, 2.0), (2, 4, None)
SINGLE_RATES = ("tenth", "tuned")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the study."""

    task: str
    adapter: str
    rate: str
    seed: int
    name: str

    def arm(self, out: Path) -> Arm:
        """Its recipe and place."""
        values: dict[str, Any] = {
            "name": self.name.replace(", ", "-"),
            "seed": self.seed,
            "model": {"base": f"bundled:{self.task}"},
            "task": {"name": self.task},
            "adapter": {"method": self.adapter, "rank": 8, "alpha": 16},
            "train": {
                "steps": STEPS,
                "learning_rate": RATES[self.adapter][self.rate],
                "schedule": "linear" if self.name == "plain, decayed" else "constant",
                "save_every": 5,
                "max_completion_tokens": 24,
                "threads": 1,
            },
        }
        if self.name == "leap":
            values["leap"] = SETTINGS[self.rate]
        place = out / self.task / self.adapter / self.rate / f"seed-{self.seed}" / values["name"]
        return Arm(self.name, make_recipe(values, "leaps"), place, grid=20, samples=4, averaged=self.name == "plain")


class Examiner:
    """One live model that takes weights in turn and answers validation or test problems."""

    def __init__(self, cell: Cell) -> None:
        task = get_task(cell.task)
        self.validation, self._test = task.problems("validation", 256), task.problems("test", 400)
        self._model, self._tokenizer = load_model(f"bundled:{cell.task}")
        self._pool, self._sampling = GraderPool(task), Sampling(1.0, max_new_tokens=24)

    def close(self) -> None:
        """End the graders."""
        self._pool.close()

    def answers(self, weights: Iterable[tuple[str, Tensor]], problems: Sequence[Any], k: int, seed: int) -> Any:
        """Evaluation of these weights."""
        load_weights(self._model, weights)
        return evaluate(self._model, self._tokenizer, self._pool, problems, k=k, sampling=self._sampling, seed=seed)[0]

    def test(self, weights: Iterable[tuple[str, Tensor]]) -> float:
        """Accuracy on the test split."""
        return float(self.answers(weights, self._test, 4, TEST_SEED).scores_PK.mean())


def run_cell(job: tuple[Cell, Path]) -> list[dict[str, Any]]:
    """Train and score a run; of a plain one at the rates for it, also single leaps and the papers' claims."""
    cell, out = job
    arm = cell.arm(out)
    rows = run_arm(arm)
    done = arm.out / "singles.json"
    if cell.name == "plain" and cell.rate in SINGLE_RATES and not done.exists():
        write_json(done, examine(cell, arm))
    return rows


def examine(cell: Cell, arm: Arm) -> dict[str, Any]:
    """Single leaps and claims on one plain run."""
    run = open_run(arm.out)
    base = base_of(run, None)[1]
    whole, examiner = run_trajectory(run, base), Examiner(cell)
    try:
        return {
            "leaps": single_leaps(whole.until(FROM), base, examiner, cell.seed),
            "claims": claims(whole, base, examiner),
        }
    finally:
        examiner.close()


def single_leaps(past: Trajectory, base: FullCheckpoint, examiner: Examiner, seed: int) -> list[dict[str, Any]]:
    """Every method from the last checkpoint of ``past``: chosen, gated, and scored on test whatever the gate said."""
    choosing, _ = halves(examiner.validation)
    scores = {s: _mean(examiner, _weights(past, base, s), choosing, seed) for s in past.steps}

    def score(leap: Leap | None, problems: Sequence[Any]) -> Any:
        weights = leap_weights(leap, base) if leap else _weights(past, base, past.steps[-1])
        return examiner.answers(weights, problems, 1, seed)

    origin = examiner.test(_weights(past, base, past.steps[-1]))
    rows: list[dict[str, Any]] = [{"method": "origin", "test": origin}]
    for method, row in PREDICTORS.items():
        if method == "hold":
            continue
        known = scores if row.uses_scores else None
        windows = [w for w in SINGLE_WINDOWS if w is None or w >= row.needs]
        candidates = Candidates([method], windows, SINGLE_COEFFICIENTS, scores=known)
        try:
            found = search(past, candidates, score, examiner.validation, GateSettings(0.8, 4.0))
            refusal = backtest(past, candidates).refusal
        except TrajectoryError as error:
            rows.append({"method": method, "refused": str(error)})
            continue
        leap, spent = found.leap, found.samples_spent + (len(scores) * len(choosing) if known else 0)
        own = examiner.test(leap_weights(Leap(leap.forecast, 1.0, float(past.steps[-1])), base))
        rows.append(
            {
                "method": method,
                # The first of equal means wins, as in the search.
                "window": max(found.tried, key=_scored)["window"],
                "coefficient": leap.coefficient,
                "accepted": found.verdict.accepted,
                "reasons": found.verdict.reasons,
                "backtest": refusal,
                "test": examiner.test(leap_weights(leap, base)),
                "own_step": own,
                "spent_steps": spent / BATCH,
                "wall_s": found.wall_s,
            }
        )
    return rows


def _scored(tried: dict[str, Any]) -> float:
    return -1.0 if tried["score"] is None else tried["score"]


def claims(whole: Trajectory, base: FullCheckpoint, examiner: Examiner) -> dict[str, float]:
    """Accuracy of the base, of the last checkpoint, and of its linear layers' deltas cut down to rank 1."""
    last, generator = whole.steps[-1], torch.Generator().manual_seed(0)
    layers = PREDICTORS["alpharl"].matrices(whole)

    def with_layers(change: Callable[[Tensor], Tensor]) -> Iterable[tuple[str, Tensor]]:
        for name in base.shapes:
            weight = base.weight(name)
            yield name, weight + change(dense(whole.delta(name, last))) if name in layers else weight

    def rank_one(delta_MN: Tensor, rescaled: bool) -> Tensor:
        if not delta_MN.norm():
            return delta_MN
        top = factorise(delta_MN, 1)
        product_MN = (top.left_MR * top.sigma_R) @ top.right_RN
        return product_MN * (delta_MN.norm() / product_MN.norm() if rescaled else 1.0)

    def random_one(delta_MN: Tensor) -> Tensor:
        noise_MN = torch.outer(*(torch.randn(n, generator=generator) for n in delta_MN.shape))
        return noise_MN * delta_MN.norm() / noise_MN.norm()

    return {
        "base": examiner.test(effective_weights(base, base)),
        "last": examiner.test(_weights(whole, base, last)),
        "linear layers": examiner.test(with_layers(lambda delta_MN: delta_MN)),
        "rank 1": examiner.test(with_layers(lambda delta_MN: rank_one(delta_MN, False))),
        "rank 1, rescaled": examiner.test(with_layers(lambda delta_MN: rank_one(delta_MN, True))),
        "random rank 1": examiner.test(with_layers(random_one)),
    }


def _weights(trajectory: Trajectory, base: FullCheckpoint, step: int) -> Iterable[tuple[str, Tensor]]:
    return leap_weights(Leap(PREDICTORS["hold"].fit(trajectory.until(step)), 1.0), base)


def _mean(examiner: Examiner, weights: Iterable[tuple[str, Tensor]], problems: Sequence[Any], seed: int) -> float:
    return float(examiner.answers(weights, problems, 1, seed).scores_PK.mean())


def summary(cell: Cell, out: Path) -> dict[str, Any]:
    """What one leap arm saved against its plain twins, with what it cost."""
    curves = {
        row["name"]: row["curve"]
        for name in ARMS
        if (path := replace(cell, name=name).arm(out).out / "curve.json").exists()
        for row in read_json(path)
    }
    plain, leap = curves["plain"], curves["leap"]
    target, ends = float(smooth(plain)[-1]), [curve[-1]["accuracy"] for curve in (plain, leap)]
    gains = [end - plain[0]["accuracy"] for end in ends]
    found = {
        "target": target,
        "steps_to_target": reach(leap, target, "step"),
        "wall_to_target_s": reach(leap, target, "wall_s"),
        "steps_saved": saved_fraction(plain, leap, "step"),
        "wall_saved": saved_fraction(plain, leap, "wall_s"),
        "steps_saved_vs_averaged": saved_fraction(curves["plain, averaged"], leap, "step"),
        "final_plain": ends[0],
        "final_leap": ends[1],
        "worst_against_plain": min(b["accuracy"] - a["accuracy"] for a, b in zip(plain, leap, strict=True)),
        # Steps for each percentage point over the base (NExt's ICER).
        "icer_plain": STEPS / (100 * gains[0]) if gains[0] > 0 else None,
        "icer_leap": STEPS / (100 * gains[1]) if gains[1] > 0 else None,
    }
    if "plain, decayed" in curves:
        end = curves["plain, decayed"][-1]["accuracy"]
        mine = reach(leap, end, "step")
        found |= {"final_decayed": end, "steps_saved_vs_decayed": None if mine is None else 1 - mine / STEPS}
    return {**asdict(cell), **found}


def main() -> None:
    """Run what is missing, two at a time, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--adapters", nargs="+", default=list(RATES))
    parser.add_argument("--rates", nargs="+", default=["tenth", "third", "tuned"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/leaps"))
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    cells = [
        Cell(task, adapter, rate, seed, name)
        for seed in asked.seeds
        for task in asked.tasks
        for adapter in asked.adapters
        for rate in asked.rates
        for name in asked.arms
        # A rate that decays is the tuned baseline of the tuned rate; elsewhere the run is far from its noise floor.
        if rate in RATES[adapter] and (name != "plain, decayed" or rate == "tuned")
    ]
    map_over(run_cell, [(cell, asked.out) for cell in cells], asked.workers)
    rows = [summary(cell, asked.out) for cell in cells if cell.name == "leap"]
    singles = [
        {**asdict(cell), **read_json(path), "plain": read_json(path.parent / "curve.json")[0]["curve"]}
        for cell in cells
        if (path := cell.arm(asked.out).out / "singles.json").exists()
    ]
    evidence = [
        {**asdict(cell), **linearity(read_json(path))}
        for cell in cells
        if (path := cell.arm(asked.out).out / "analysis" / "evidence.json").exists()
    ]
    curves = [
        {"panel": f"{cell.task}, {cell.adapter}", "rate": cell.rate, "seed": cell.seed, "name": row["name"], **point}
        for cell in cells
        for row in read_json(cell.arm(asked.out).out / "curve.json")
        for point in row["curve"]
    ]
    found = {"regrounded": rows, "singles": singles, "evidence": evidence, "curves": curves}
    write_json(asked.out / "leaps.json", {**found, "machine": machine(), "versions": versions()})


def linearity(found: dict[str, Any]) -> dict[str, Any]:
    """Medians over matrices of a run's evidence, each with the median of its nulls' 95 % quantiles."""
    tensors, result = found["tensors"], {}
    for key in ("share", "r2_in_sample", "r2_forward"):
        values = [t["path"][key] for t in tensors if t["path"].get(key) is not None]
        if values:
            nulls = {
                null: median(ends[1] for t in tensors if (ends := t["nulls"][null].get(key)))
                for null in tensors[0]["nulls"]
                if any(t["nulls"][null].get(key) for t in tensors)
            }
            result[key] = {"measured": median(values), **nulls}
    return result


if __name__ == "__main__":
    main()
