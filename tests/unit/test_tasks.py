import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankleap.errors import InputError, UnknownNameError
from rankleap.records import Verdict
from rankleap.tasks import TASKS, ReasoningGym, get_task, split_of
from rankleap.tasks.task import final_answer, judge


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_an_unknown_task_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"task 'sum' does not exist; did you mean 'sums'\?"):
        get_task("sum")


def test_too_many_problems_says_how_many_there_are() -> None:
    with pytest.raises(InputError, match=r"'sums' has \d{4} test problems, 50000 were asked"):
        get_task("sums").problems("test", 50_000)


def test_importing_and_grading_load_neither_torch_nor_reasoning_gym() -> None:
    code = (
        "import sys; from rankleap.records import Problem; from rankleap.tasks import get_task;"
        "get_task('sums').grade('Answer: 3', Problem('a', 'b', '3'));"
        "sys.exit(bool({'torch', 'reasoning_gym', 'transformers'} & set(sys.modules)))"
    )
    assert run_python(code).returncode == 0


def test_without_reasoning_gym_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['reasoning_gym'] = None;"
        "from rankleap.tasks import get_task; get_task('sums').problems('test', 1)"
    )
    assert (
        "MissingExtraError: task 'sums' needs packages that are not installed; run: pip install 'rankleap[train]'"
        in (run_python(code).stderr)
    )


def test_a_question_without_the_part_to_keep_is_an_error() -> None:
    sums = TASKS["sums"]
    assert isinstance(sums, ReasoningGym)
    with pytest.raises(InputError, match=r"'Q: \(\.\+\)' is not in the chain_sum question 'State the final answer"):
        replace(sums, keep="Q: (.+)").problems("train", 1)


def test_prompts_are_short_and_plain() -> None:
    assert [p.prompt for p in get_task("sums").problems("train", 2)] == ["42 - 25 =", "98 + 93 ="]
    assert all(p.prompt == f"Backward: {p.answer[::-1]} =" for p in get_task("backward").problems("test", 20))


def test_splits_are_three_to_one_to_one() -> None:
    counts = Counter(split_of(f"problem {n}") for n in range(5000))
    assert counts["train"] == pytest.approx(3000, abs=150)
    assert counts["validation"] == pytest.approx(1000, abs=120)


@given(st.text(), st.text())
def test_any_text_gets_a_verdict(completion: str, reference: str) -> None:
    verdict = judge(completion, reference)
    assert verdict.score in (0.0, 1.0)
    assert (verdict.how == "unparsable") == (final_answer(completion) is None)


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_a_number_equals_its_other_spellings_and_no_other_number(value: int, other: int) -> None:
    for spelling in (f"{value:+,}.00", f"{value}.0", f"{value:012d}"):
        assert judge(f"Answer: {spelling}", str(value)).score == 1.0
    assert judge(f"Answer: {other}", str(value)).score == float(other == value)


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("Answer: 9", Verdict(1.0, "exact")),
        ("Answer: 9.0", Verdict(1.0, "numeric")),
        ("Answer: 8", Verdict(0.0, "numeric")),
        ("Answer: 8 Answer: 9", Verdict(1.0, "exact")),
        ("Answer: 9 Answer: 8", Verdict(0.0, "numeric")),
        ("Answer:\n  9  \nthank you", Verdict(1.0, "exact")),
        ("Answer: 9 or 8", Verdict(0.0, "exact")),
        ("Answer: 3 * 3", Verdict(0.0, "exact")),
        ("Answer: 0.9e1", Verdict(0.0, "exact")),
        ("Answer: 1,0", Verdict(0.0, "exact")),
        ("Answer: ٩", Verdict(0.0, "exact")),
        ("Answer: " + "9" * 100_000, Verdict(0.0, "exact")),
        ("Answer: ", Verdict(0.0, "unparsable")),
        ("9", Verdict(0.0, "unparsable")),
    ],
)
def test_the_last_final_answer_counts(completion: str, verdict: Verdict) -> None:
    assert judge(completion, "9") == verdict


def test_spaces_within_an_answer_are_collapsed() -> None:
    assert judge("Answer:  a   b", "a b ").how == "exact"
    assert judge("Answer:  a   b", "a b ").score == 1.0
