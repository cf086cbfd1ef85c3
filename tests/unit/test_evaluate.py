"""Laws of evaluations: in memory, on disk, resumed, compared."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

import rankleap
from rankleap.cli.evaluate import evaluate as evaluate_verb
from rankleap.errors import CheckpointError, InputError
from rankleap.evaluation import (
    Evaluation,
    Sampling,
    avg_at_k,
    compare,
    paired_difference,
    pass_at_k,
    read_samples,
    read_scores,
    write_evaluation,
)
from rankleap.evaluation.evaluate import evaluate, evaluate_checkpoint, load_model
from rankleap.evaluation.result import read_summaries, samples_path
from rankleap.records import Estimate, Problem, Sample
from rankleap.tasks import get_task
from rankleap.tasks.grading import GraderPool

BASE = Path(rankleap.__file__).parent / "bases" / "sums"
TASK = get_task("sums")
PROBLEMS = [Problem(f"sums/test/{i}", f"{20 + i} + {40 - 2 * i} =", str(60 - i)) for i in range(6)]
SHORT = Sampling(max_new_tokens=20)


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool(TASK) as pool:
        yield pool


class Loader:
    """Hands out the model and counts how often it was asked."""

    def __init__(self, loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
        self.loaded = loaded
        self.calls = 0

    def __call__(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        self.calls += 1
        return self.loaded


def samples_of(scores_PK: list[list[float]]) -> list[Sample]:
    return [
        Sample(f"p{p}", k, f"Answer: {score}\u2028", 5, False, score, "exact")
        for p, row in enumerate(scores_PK)
        for k, score in enumerate(row)
    ]


def write(directory: Path, name: str, scores_PK: list[list[float]]) -> Path:
    samples = samples_of(scores_PK)
    return write_evaluation(directory, name, Evaluation.of("made up", samples, 2.0), samples)


def test_an_evaluation_is_its_samples_graded(loaded, pool) -> None:
    evaluation, samples = evaluate(*loaded, pool, PROBLEMS, k=4, sampling=SHORT, seed=0)
    assert evaluation.problem_ids == tuple(problem.id for problem in PROBLEMS)
    assert evaluation.scores_PK.shape == (6, 4)
    by_id = {problem.id: problem for problem in PROBLEMS}
    for one in samples:
        verdict = TASK.grade(one.completion, by_id[one.problem_id])
        assert (one.score, one.how) == (verdict.score, verdict.how)
    assert evaluation.scores_PK.tolist() == [[one.score for one in samples[4 * p : 4 * p + 4]] for p in range(6)]
    assert sum(evaluation.verdicts.values()) == len(samples) == 24
    assert 0 < evaluation.scores_PK.mean() < 1


def test_the_same_seed_gives_the_same_evaluation(loaded, pool) -> None:
    once, again, other = (evaluate(*loaded, pool, PROBLEMS, k=2, sampling=SHORT, seed=seed)[1] for seed in (0, 0, 1))
    assert once == again != other


def test_a_task_may_stand_in_for_a_pool(loaded, pool) -> None:
    with_task = evaluate(*loaded, TASK, PROBLEMS, k=1, sampling=SHORT, seed=0)[1]
    assert with_task == evaluate(*loaded, pool, PROBLEMS, k=1, sampling=SHORT, seed=0)[1]


def test_a_summary_has_every_power_of_two_and_plain_values(loaded, pool) -> None:
    evaluation, samples = evaluate(*loaded, pool, PROBLEMS, k=5, sampling=Sampling(max_new_tokens=11), seed=3)
    summary = json.loads(json.dumps(evaluation.summary(), allow_nan=False))
    assert list(summary["pass"]) == ["1", "2", "4"]
    assert Estimate(**summary["avg"]) == avg_at_k(evaluation.scores_PK)
    assert Estimate(**summary["pass"]["4"]) == pass_at_k(evaluation.scores_PK, 4)
    assert (summary["task"], summary["problems"], summary["samples"]) == ("sums", 6, 5)
    assert summary["truncation_rate"] == np.mean([one.truncated for one in samples]) > 0
    assert summary["mean_tokens"] == np.mean([one.tokens for one in samples])
    assert summary["samples_per_s"] == pytest.approx(30 / summary["seconds"])
    assert summary["settings"] == {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 11, "seed": 3}


def test_unequal_numbers_of_samples_are_refused() -> None:
    with pytest.raises(InputError, match="equally many samples, got from 1 to 2"):
        Evaluation.of("made up", samples_of([[1.0, 0.0], [1.0]]))
    with pytest.raises(InputError, match="none at all"):
        Evaluation.of("made up", [])


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    path = write(tmp_path, "checkpoint-20", [[1.0, 0.0], [0.5, 1.0]])
    assert path == tmp_path / "evaluation" / "made up" / "checkpoint-20.jsonl"
    assert read_samples(path) == samples_of([[1.0, 0.0], [0.5, 1.0]])
    ids, scores = read_scores(path)
    assert ids == ("p0", "p1")
    assert scores.tolist() == [[1.0, 0.0], [0.5, 1.0]]


def test_the_summary_gathers_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, "checkpoint-20", [[1.0], [0.0]])
    write(tmp_path, "step-000400-c1.50", [[1.0], [1.0]])
    write(tmp_path, "checkpoint-20", [[0.0], [0.0]])
    summaries = read_summaries(tmp_path / "evaluation" / "made up")
    assert {name: line["avg"]["value"] for name, line in summaries.items()} == {
        "checkpoint-20": 0.0,
        "step-000400-c1.50": 1.0,
    }


def test_checkpoints_written_at_once_are_all_in_the_summary(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda step: write(tmp_path, f"checkpoint-{step}", [[1.0], [0.0]]), range(24)))
    assert len(read_summaries(tmp_path / "evaluation" / "made up")) == 24


def test_a_name_with_a_slash_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave out '/'"):
        samples_path(tmp_path, "sums", "leaps/relex")


def test_comparing_pairs_problems_by_name_whatever_their_order(tmp_path: Path) -> None:
    a, b = [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]], [[0.0], [1.0], [0.0]]
    path_a = write(tmp_path, "a", a)
    mixed = samples_of(b)[::-1]
    path_b = write_evaluation(tmp_path, "b", Evaluation.of("made up", mixed), mixed)
    assert compare(path_a, path_b) == paired_difference(a, b)
    assert compare(path_a, path_a) == Estimate(0.0, 0.0, 0.0)


def test_other_problems_cannot_be_compared(tmp_path: Path) -> None:
    path_a = write(tmp_path, "a", [[1.0], [0.0]])
    path_b = write(tmp_path, "b", [[1.0], [0.0], [1.0]])
    with pytest.raises(InputError, match=r"1 are only in one of .* such as 'p2'"):
        compare(path_a, path_b)


def test_files_that_are_missing_or_foreign_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing.jsonl does not exist; evaluate"):
        read_scores(tmp_path / "nothing.jsonl")
    (tmp_path / "foreign.jsonl").write_text('{"text": "4"}\n{"text": "5"}\n')
    with pytest.raises(InputError, match=r"foreign.jsonl, line 1 is not a sample"):
        read_samples(tmp_path / "foreign.jsonl")


def test_a_finished_evaluation_is_read_and_not_repeated(loaded, pool, tmp_path: Path) -> None:
    path, load = samples_path(tmp_path, "sums", "base"), Loader(loaded)
    first = evaluate_checkpoint(path, load, pool, PROBLEMS, k=3, sampling=SHORT, seed=0)
    stored = path.read_bytes()
    again = evaluate_checkpoint(path, load, pool, PROBLEMS, k=3, sampling=replace(SHORT, batch_size=2), seed=0)
    assert load.calls == 1
    assert path.read_bytes() == stored
    assert again.summary() == first.summary() == read_summaries(path.parent)["base"]


def test_only_missing_problems_are_drawn(loaded, pool, tmp_path: Path) -> None:
    path, load = samples_path(tmp_path, "sums", "base"), Loader(loaded)
    evaluate_checkpoint(path, load, pool, PROBLEMS[:4], k=2, sampling=SHORT, seed=0)
    early = read_samples(path)
    graded = sum(pool.counts.values())
    longer = evaluate_checkpoint(path, load, pool, PROBLEMS, k=2, sampling=SHORT, seed=0)
    assert sum(pool.counts.values()) - graded == 4
    assert read_samples(path)[:8] == early
    assert longer.scores_PK.shape == (6, 2)
    assert read_summaries(path.parent)["base"]["problems"] == 6


def test_more_samples_add_new_ones_to_the_old(loaded, pool, tmp_path: Path) -> None:
    path, load = samples_path(tmp_path, "sums", "base"), Loader(loaded)
    evaluate_checkpoint(path, load, pool, PROBLEMS, k=8, sampling=Sampling(temperature=3.0, max_new_tokens=20), seed=0)
    early = set(read_samples(path))
    more = evaluate_checkpoint(path, load, pool, PROBLEMS, k=16, sampling=Sampling(3.0, max_new_tokens=20), seed=0)
    samples = read_samples(path)
    assert more.scores_PK.shape == (6, 16)
    assert early < set(samples)
    for problem in PROBLEMS:
        mine = [one for one in samples if one.problem_id == problem.id]
        assert [one.index for one in mine] == list(range(16))
        assert [one.completion for one in mine[:8]] != [one.completion for one in mine[8:]]


def test_fewer_problems_or_samples_are_taken_from_what_is_there(loaded, pool, tmp_path: Path) -> None:
    path, load = samples_path(tmp_path, "sums", "base"), Loader(loaded)
    whole = evaluate_checkpoint(path, load, pool, PROBLEMS, k=4, sampling=SHORT, seed=0)
    part = evaluate_checkpoint(path, load, pool, PROBLEMS[1:4], k=2, sampling=SHORT, seed=0)
    assert load.calls == 1
    assert part.scores_PK.tolist() == whole.scores_PK[1:4, :2].tolist()
    assert len(read_samples(path)) == 24


def test_half_an_evaluation_is_continued(loaded, pool, tmp_path: Path) -> None:
    path, load = samples_path(tmp_path, "sums", "base"), Loader(loaded)
    evaluate_checkpoint(path, load, pool, PROBLEMS, k=2, sampling=SHORT, seed=0)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7]) + lines[7][:20])
    whole = evaluate_checkpoint(path, load, pool, PROBLEMS, k=2, sampling=SHORT, seed=0)
    assert load.calls == 2
    assert whole.scores_PK.shape == (6, 2)
    assert path.read_text().splitlines(keepends=True)[:7] == lines[:7]


@pytest.mark.parametrize("changed", [{"sampling": replace(SHORT, temperature=0.6)}, {"seed": 1}])
def test_samples_of_other_settings_are_not_mixed(loaded, pool, tmp_path: Path, changed: dict[str, object]) -> None:
    path, load = samples_path(tmp_path, "sums", "base"), Loader(loaded)
    asked = {"k": 2, "sampling": SHORT, "seed": 0}
    evaluate_checkpoint(path, load, pool, PROBLEMS, **asked)
    with pytest.raises(InputError, match=r"base.jsonl was drawn with .* delete it or write elsewhere"):
        evaluate_checkpoint(path, load, pool, PROBLEMS, **{**asked, **changed})


def test_splits_are_not_mixed_in_one_file(loaded, pool, tmp_path: Path) -> None:
    path, load = samples_path(tmp_path, "sums", "base"), Loader(loaded)
    evaluate_checkpoint(path, load, pool, PROBLEMS[:3], k=1, sampling=SHORT, seed=0)
    with pytest.raises(InputError, match=r"holds other problems than asked, such as 'sums/test/0'"):
        evaluate_checkpoint(path, load, pool, PROBLEMS[3:], k=1, sampling=SHORT, seed=0)


def test_reading_saved_scores_does_not_import_torch() -> None:
    code = "import sys, rankleap.evaluation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


@pytest.fixture
def run(loaded, tmp_path: Path) -> Path:
    """A run with two checkpoints and one leap, all with the weights of the base."""
    model, tokenizer = loaded
    for place in ("checkpoints/checkpoint-10", "checkpoints/checkpoint-20", "leaps/relex/step-000040-c1.00"):
        model.save_pretrained(tmp_path / "run" / place)
        tokenizer.save_pretrained(tmp_path / "run" / place)
    (tmp_path / "run/leaps/relex/step-000040-c1.00/manifest.json").write_text("{}")
    train = {"steps": 20, "learning_rate": 1e-4, "max_completion_tokens": 20}
    config = {"name": "r", "model": {"base": "bundled:sums"}, "task": {"name": "sums"}, "train": train}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    return tmp_path / "run"


def call(*words: object) -> dict[str, dict[str, object]]:
    """Run the verb and read the JSON it prints."""
    app = typer.Typer()
    app.command()(evaluate_verb)
    done = CliRunner().invoke(app, [str(word) for word in (*words, "--json")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_verb_evaluates_a_whole_run_once(run: Path) -> None:
    asked = ("--run", run, "--problems", 4, "-k", 2)
    first = call(*asked)
    assert list(first) == ["base", "checkpoint-10", "checkpoint-20", "relex-step-000040-c1.00"]
    assert first["checkpoint-10"]["gain"] == {"over": "base", "value": 0.0, "low": 0.0, "high": 0.0}
    assert first["base"]["settings"]["max_new_tokens"] == 20
    assert sorted(path.stem for path in (run / "evaluation" / "sums").glob("*.jsonl")) == sorted(first)
    assert call(*asked) == first


def test_the_verb_evaluates_one_model_and_saved_samples(tmp_path: Path) -> None:
    evaluated = call("bundled:sums", "--task", "sums", "--problems", 4, "-k", 2, "--max-tokens", 20, "--out", tmp_path)
    read = call("--samples", tmp_path / "evaluation" / "sums" / "sums.jsonl")
    assert list(evaluated) == list(read) == ["sums"]
    assert evaluated["sums"]["avg"] == read["sums"]["avg"]


def test_the_verb_wants_exactly_one_thing_and_a_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give one thing to evaluate"):
        call()
    with pytest.raises(InputError, match="give one thing to evaluate"):
        call("bundled:sums", "--run", tmp_path)
    with pytest.raises(InputError, match="give --task"):
        call("bundled:sums")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
def test_an_adapter_is_loaded_on_the_base_it_names_or_the_one_given(loaded, tmp_path: Path) -> None:
    _, tokenizer = loaded
    fresh = AutoModelForCausalLM.from_pretrained(BASE)
    adapted = get_peft_model(fresh, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    ids = tokenizer("1 + 1 =", return_tensors="pt")["input_ids"]
    for base in (None, "bundled:sums"):
        model, its_tokenizer = load_model(str(tmp_path), base)
        assert torch.equal(model(ids).logits, adapted.eval()(ids).logits)
        assert its_tokenizer("1 + 1 =")["input_ids"] == ids[0].tolist()


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path} is no checkpoint that rankleap knows: found nothing"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not name the adapter's base; give it with --base"):
        load_model(str(tmp_path))
