"""What every task promises: same problems at every call, three disjoint splits, a judge that gives the reference its due."""

import pickle

import pytest

from rankleap.records import SPLITS, Verdict
from rankleap.tasks import TASKS, Task, get_task

COUNT = 500


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return get_task(request.param)


def test_the_name_in_the_dict_is_the_name_of_the_task(task: Task) -> None:
    assert TASKS[task.name] is task


def test_the_same_call_gives_the_same_problems(task: Task) -> None:
    assert task.problems("test", 50) == task.problems("test", 50)


def test_a_longer_list_continues_a_shorter_one(task: Task) -> None:
    assert task.problems("validation", 60)[:25] == task.problems("validation", 25)


def test_no_problems_are_an_empty_list(task: Task) -> None:
    assert task.problems("train", 0) == []


def test_splits_share_no_prompt_and_ids_are_unique(task: Task) -> None:
    problems = [problem for split in SPLITS for problem in task.problems(split, COUNT)]
    assert len({problem.prompt for problem in problems}) == len(problems) == len({problem.id for problem in problems})
    assert problems[0].id == f"{task.name}/train/0"


def test_the_reference_earns_1(task: Task) -> None:
    for problem in task.problems("train", 50):
        assert task.grade(f" so it is Answer: {problem.answer}", problem) == Verdict(1.0, "exact")


def test_an_empty_completion_earns_0_and_is_unparsable(task: Task) -> None:
    problem = task.problems("train", 1)[0]
    assert task.grade("", problem) == Verdict(0.0, "unparsable")
    assert task.grade(problem.answer, problem) == Verdict(0.0, "unparsable")


def test_another_answer_earns_0(task: Task) -> None:
    problem = task.problems("train", 1)[0]
    assert task.grade(f"Answer: {problem.answer}1", problem).score == 0.0


def test_a_task_survives_a_trip_to_a_worker_process(task: Task) -> None:
    twin = pickle.loads(pickle.dumps(task))
    assert twin.problems("test", 3) == task.problems("test", 3)
