"""The map keeps its order and its errors wherever it runs, and outlives its workers.

Spawned workers find the functions below by this module's name; those of Ray get them whole, as they get a script's own.
Each writes the number of its process into the item's file as it begins.
"""

import logging
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import pytest

from rankleap.cluster import ATTEMPTS, map_over
from rankleap.errors import InputError, MissingExtraError, RunError, UnknownNameError


def begin(path: Path) -> None:
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")


def begun(path: Path) -> list[int]:
    """The processes that have begun an item."""
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until_begun(path: Path, times: int = 1) -> None:
    while len(begun(path)) < times:
        time.sleep(0.01)


def is_gone(process: int) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(1000):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def stay(path: Path) -> None:
    begin(path)
    time.sleep(60)


def fail_beside_one_that_stays(path: Path) -> None:
    if path.name != "0":
        stay(path)
    wait_until_begun(path.with_name("1"))
    begin(path)
    raise ValueError("item 0 is wrong")


def always_die(path: Path) -> None:
    begin(path)
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(path: Path) -> str:
    begin(path)
    if len(begun(path)) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def die_once_beside_one_that_waits(path: Path) -> str:
    """Item 0 ends when each of the four others has been begun twice."""
    if path.name != "0":
        return die_once(path)
    begin(path)
    for number in range(1, 5):
        wait_until_begun(path.with_name(str(number)), times=2)
    return path.name


def die_once_and_leave_a_child(path: Path) -> None:
    if not begun(path) and os.fork() == 0:
        begin(path)
        time.sleep(30)
        begin(path)
        os._exit(0)
    wait_until_begun(path)
    die_once(path.with_name("parent"))


class TwoWordsError(Exception):
    """Pickled with its one argument, made with two: it can be written, but not read."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def raise_two_words(item: str) -> None:
    raise TwoWordsError(item, "unreadable")


class Numbers(Sequence[float]):
    """0, 1, 2 … and how many of them have been read."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, 0

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        assert isinstance(index, int), "the map takes items one by one"
        if index >= self.size:
            raise IndexError(index)
        self.read = max(self.read, index + 1)
        return float(index)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Ray sends nothing anywhere, and writes no token into the home directory.
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield


@pytest.fixture(scope="module", params=["processes", "ray"])
def address(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """None for processes; ``local`` beside a Ray that was started here before the map."""
    if request.param == "processes":
        yield None
        return
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield "local"
    assert ray.is_initialized(), "a Ray that the caller started is the caller's to stop"
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


# Before any Ray runs here: pytest starts the fixture's once, for all of the tests below that ask for it.


def test_a_ray_that_the_map_started_ends_with_it() -> None:
    import ray

    assert map_over(math.sqrt, [9.0, 1.0, 4.0], 2, address="local") == [3.0, 1.0, 2.0]
    assert not ray.is_initialized()


def test_an_address_of_no_ray_is_named() -> None:
    with pytest.raises(InputError, match=r"no Ray at 'nowhere'.*'local'"):
        map_over(math.sqrt, [1.0], 1, address="nowhere")


def test_ray_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"rankleap\[cluster\]"):
        map_over(math.sqrt, [1.0], 1, address="local")


def test_nothing_to_do_starts_nothing() -> None:
    assert map_over(math.sqrt, [], 2) == []
    assert map_over(math.sqrt, [], 2, address="nowhere") == []


def test_one_worker_is_this_very_process() -> None:
    polled: list[int] = []
    # No other process could be given a lambda.
    assert map_over(lambda item: (item, os.getpid()), ["a"], 1, lambda: polled.append(1)) == [("a", os.getpid())]
    assert polled


def test_no_worker_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1 worker is needed to map over items, got 0"):
        map_over(math.sqrt, [1.0], 0)


def test_a_parent_that_is_killed_takes_its_workers_along(tmp_path: Path) -> None:
    paths = [tmp_path / "1", tmp_path / "2"]
    code = f"from pathlib import *; from test_cluster import *; map_over(stay, {paths!r}, 2)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
        for path in paths:
            wait_until_begun(path)
        parent.kill()
    assert all(is_gone(process) for path in paths for process in begun(path))


def test_a_child_that_a_dead_worker_leaves_holds_nothing_up(tmp_path: Path) -> None:
    child = tmp_path / "child"
    map_over(die_once_and_leave_a_child, [child], 2)
    assert len(begun(tmp_path / "parent")) == 2
    assert len(begun(child)) == 1, "the worker was missed only when its child let go of the pipe"
    os.kill(begun(child)[0], signal.SIGKILL)


def test_results_come_in_the_order_of_the_items(address: str | None) -> None:
    polled: list[int] = []
    results = map_over(math.sqrt, [9.0, 1.0, 4.0], 2, lambda: polled.append(1), address=address)
    assert results == [3.0, 1.0, 2.0]
    assert polled


def test_a_worker_computes_on_one_thread(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert map_over(os.getenv, ["OMP_NUM_THREADS", "MKL_NUM_THREADS"], 2, address=address) == ["1", "1"]
    assert os.getenv("OMP_NUM_THREADS") == "7"
    assert os.getenv("MKL_NUM_THREADS") is None


def test_no_more_is_read_than_the_workers_can_hold(address: str | None) -> None:
    items, taken = Numbers(12), {}

    def take(index: int, result: float) -> None:
        taken[index] = result
        assert items.read <= len(taken) + 1, "one is held by the other worker, and none waits"

    assert map_over(math.sqrt, items, 2, address=address, on_result=take) == []
    assert taken == {index: math.sqrt(index) for index in range(12)}


def test_an_error_stops_the_map_and_is_not_tried_again(address: str | None, tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(8)]
    with pytest.raises(ValueError, match="item 0 is wrong") as caught:
        map_over(fail_beside_one_that_stays, paths, 2, address=address)
    assert "in fail_beside_one_that_stays" in caught.value.__notes__[0]
    assert [len(begun(path)) for path in paths] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert is_gone(begun(paths[1])[0])
    assert address or not multiprocessing.active_children()


def test_an_error_that_cannot_be_read_back_is_told(address: str | None) -> None:
    with pytest.raises(RunError, match="TwoWordsError: quite unreadable") as caught:
        map_over(raise_two_words, ["quite"], 2, address=address)
    assert "in raise_two_words" in caught.value.__notes__[0]


def test_an_error_in_taking_a_result_is_raised(address: str | None) -> None:
    taken: dict[float, int] = {}
    with pytest.raises(KeyError):
        map_over(math.sqrt, [1.0, 4.0, 9.0], 2, address=address, on_result=lambda index, root: taken.__delitem__(root))


def test_a_lost_worker_costs_its_own_item_one_attempt(address: str | None, tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(5)]
    assert map_over(die_once_beside_one_that_waits, paths, 2, address=address) == ["0", "1", "2", "3", "4"]
    # More workers died beside the first item than an item has attempts.
    assert [len(begun(path)) for path in paths] == [1, 2, 2, 2, 2]


def test_an_item_that_always_loses_its_worker_is_named(address: str | None, tmp_path: Path) -> None:
    cause = "killed by signal 9" if address is None else "WorkerCrashedError"
    with pytest.raises(RunError, match=rf"item 0 \(.*deadly.*\) lost its worker 3 times.*{cause}.*fewer workers"):
        map_over(always_die, [tmp_path / "deadly"], 2, address=address)
    assert len(begun(tmp_path / "deadly")) == ATTEMPTS


def test_our_own_errors_keep_their_kind_and_message_between_processes() -> None:
    for error in (
        UnknownNameError("task", "sms", ["sums"]),
        MissingExtraError("training", "train"),
        InputError("plain"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
