"""Rewards: how they add up, what is refused, and what stops a run."""

import math
from pathlib import Path
from typing import Any

import pytest

from rankleap.cli import main
from rankleap.config import Recipe
from rankleap.errors import InputError, RecipeError, RunError
from rankleap.files import read_json, read_jsonl
from rankleap.records import Problem
from rankleap.tasks import get_task
from rankleap.tasks.grading import GraderPool
from rankleap.training import train
from rankleap.training.build import build, check
from rankleap.training.rewards import import_reward, reward_functions
from recipes import tiny

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
HERE = "test_rewards"


def recipe(rewards: dict[str, float] | None = None, algorithm: str = "grpo", **of_algorithm: Any) -> Recipe:
    return tiny(
        rewards=rewards,
        algorithm={"name": algorithm, **of_algorithm},
        train__steps=2,
        train__prompts_per_step=2,
        train__completions_per_prompt=2,
    )


def words(completions: list[str], **_: object) -> list[float | None]:
    return [float(len(text.split())) for text in completions]


def half(completions: list[str], **_: object) -> list[float | None]:
    return [None if i % 2 else 1.0 for i in range(len(completions))]


def nothing(completions: list[str], **_: object) -> list[float | None]:
    return [None for _ in completions]


def no_sevens(completions: list[str], **_: object) -> list[float | None]:
    if any("7" in text for text in completions):
        raise KeyError("seven")
    return [0.0 for _ in completions]


def together(completions: list[str], **_: object) -> list[float | None]:
    return [1 / (2 - len(completions)) for _ in completions]


def infinite(completions: list[str], **_: object) -> list[float | None]:
    return [math.inf for _ in completions]


def short(completions: list[str], **_: object) -> list[float | None]:
    return [1.0]


SEVEN = 7


def called(path: str, completions: list[str]) -> list[float | None]:
    problems = [Problem(str(i), "1 + 1 =", "2") for i in range(len(completions))]
    with GraderPool(get_task("sums")) as pool:
        functions, weights = reward_functions(recipe({"format": 0.5}), {"own": (path, 2.0)}, pool, problems)
        assert weights == [0.5, 2.0]
        assert [function.__name__ for function in functions] == ["format", "own"]
        return functions[1](prompts=[p.prompt for p in problems], completions=completions, trainer_state=None)


@pytest.mark.parametrize(
    "text, earned",
    [
        (" 1 Answer: 2", 1.0),
        (" Answer: 1 Answer: 2", 0.0),
        ("2", 0.0),
        ("", 0.0),
        (" Answer: ", 0.0),
        (" Answer: wrong", 1.0),
    ],
)
def test_format_asks_for_one_marked_answer_and_not_for_a_right_one(text: str, earned: float) -> None:
    problems = [Problem("0", "1 + 1 =", "2")]
    with GraderPool(get_task("sums")) as pool:
        function = reward_functions(recipe({"format": 1.0}), {}, pool, problems)[0][0]
        assert function(prompts=[""], completions=[text], problem_id=["0"]) == [earned]


def test_repetition_takes_off_the_share_of_token_trigrams_that_occurred_before() -> None:
    with GraderPool(get_task("sums")) as pool:
        (reward,), weights = reward_functions(recipe({"repetition": 0.5}), {}, pool, [])
    ids = [[1, 2, 3, 4, 5], [1, 2, 1, 2, 1], [7, 7, 7, 7, 7, 7], [1, 2]]
    found = reward(prompts=[""] * 4, completions=[""] * 4, completion_ids=ids)
    assert found == pytest.approx([0, 2 / 3 - 1, 1 / 4 - 1, 0]) and weights == [0.5]


def test_a_function_of_ones_own_is_called_with_the_batch() -> None:
    assert called(f"{HERE}:words", ["a b", "", "c"]) == [2.0, 0.0, 1.0]


def test_a_reward_that_raises_shows_the_sample_it_raised_on() -> None:
    with pytest.raises(RunError, match=r"'own' failed: KeyError: 'seven'; on prompts '1 \+ 1 =', completions '17'"):
        called(f"{HERE}:no_sevens", ["1", "17", "2"])


def test_a_reward_that_raises_on_no_sample_alone_says_so() -> None:
    with pytest.raises(RunError, match="on 2 completions, on none alone: ZeroDivisionError"):
        called(f"{HERE}:together", ["1", "2"])


@pytest.mark.parametrize(
    "name, said", [("infinite", "finite numbers or None, got"), ("short", "a number or None for each of 2")]
)
def test_what_is_no_list_of_finite_numbers_stops_the_run(name: str, said: str) -> None:
    with pytest.raises(RunError, match=said):
        called(f"{HERE}:{name}", ["1", "2"])


@pytest.mark.parametrize(
    "path, said",
    [
        ("nowhere", "package.module:function"),
        ("no_such_module:f", "cannot be imported: No module named 'no_such_module'"),
        (f"{HERE}:absent", "cannot be imported: module 'test_rewards' has no attribute"),
        (f"{HERE}:SEVEN", "is 7, which cannot be called"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(path: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        import_reward(path)


def test_rewards_that_do_not_exist_or_teach_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"'formt' does not exist; did you mean 'format'\?"):
        check(recipe({"task": 1.0, "formt": 1.0}))
    with pytest.raises(RecipeError, match="sft learns from none"):
        check(recipe({"format": 1.0}, "sft"))


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo", "reinforce_pp", "dapo"])
def test_weights_reach_the_trainer_beside_the_overlong_punishment(algorithm: str, tmp_path: Path) -> None:
    asked = recipe({"format": 0.25, "task": 2.0}, algorithm, overlong_buffer=4)
    built = build(asked, tmp_path, {"words": (f"{HERE}:words", -0.5)})
    built.pool.close()
    trainer: Any = built.trainer
    assert trainer.reward_weights.tolist() == [0.25, 2.0, -0.5, 1.0]
    assert trainer.reward_func_names[:3] == ["format", "task", "words"]


@pytest.mark.parametrize("name, share", [("half", 0.5), ("nothing", 1.0)])
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_completions_without_any_reward_are_counted(name: str, share: float, algorithm: str, tmp_path: Path) -> None:
    own = {name: (f"{HERE}:{name}", 1.0)}
    out = train(recipe({}, algorithm), tmp_path / "run", rewards=own)
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [share, share]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert read_json(out / "manifest.json")["own_rewards"] == {name: [f"{HERE}:{name}", 1.0]}


@pytest.mark.parametrize(
    "algorithm, own, said",
    [
        ("sft", {"words": (f"{HERE}:words", 1.0)}, "sft learns from none"),
        ("grpo", {"task": (f"{HERE}:words", 1.0)}, "names other than task, format"),
        ("grpo", {"words": (f"{HERE}:words", math.nan)}, "finite weights"),
    ],
)
def test_rewards_of_ones_own_are_never_dropped_in_silence(
    algorithm: str, own: dict[str, tuple[str, float]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        train(recipe(algorithm=algorithm), tmp_path / "run", rewards=own)
    assert not (tmp_path / "run").exists()


def test_no_reward_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="none is asked for"):
        build(recipe({}), tmp_path)


def test_another_reward_is_another_run(tmp_path: Path) -> None:
    out = train(recipe(), tmp_path / "run", rewards={"words": (f"{HERE}:words", 0.1)})
    with pytest.raises(InputError, match="differs in your own rewards"):
        train(recipe(), out)
    assert train(recipe(), out, rewards={"words": (f"{HERE}:words", 0.1)}) == out


def test_the_command_line_takes_a_reward_and_refuses_a_weight_that_is_no_number(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        'name="t"\n[model]\nbase="bundled:sums"\n[task]\nname="sums"\n[train]\nsteps=1\nlearning_rate=1e-4\n'
    )
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(file), "--reward", f"{HERE}:words=much"])


def test_a_dry_run_asks_for_the_very_rewards_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        'name="t"\n[model]\nbase="bundled:sums"\n[task]\nname="sums"\n[train]\nsteps=1\nlearning_rate=1e-4\n'
    )
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(file), "--dry-run", "--reward", f"{HERE}:absent"])
    assert "has no attribute 'absent'" in capsys.readouterr().err
