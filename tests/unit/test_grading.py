"""Laws of the grader pool: one verdict per pair, in order, whatever a grader does to its own process."""

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from rankleap.errors import InputError, RunError
from rankleap.records import Problem, Split, Verdict
from rankleap.tasks.grading import GraderPool
from rankleap.tasks.task import Task

LIMIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Faulty(Task):
    """A task whose grader does what the completion says."""

    def problems(self, split: Split, count: int) -> list[Problem]:
        return [Problem(f"{split}/{i}", "?", str(i)) for i in range(count)]

    def grade(self, completion: str, problem: Problem) -> Verdict:
        match completion:
            case "hang":
                while True:
                    pass
            case "hang in C":
                ctypes.PyDLL(None).sleep(3600)  # keeps the GIL
            case "raise":
                raise ValueError("no such answer")
            case "exit":
                os._exit(0)
            case "sys.exit":
                sys.exit("enough")
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "allocate":
                return Verdict(float(len(bytearray(6 << 30))), "exact")
            case "print":
                sys.stdout.write("noise" * 100_000)
                sys.stdout.flush()
            case "nan":
                return Verdict(float("nan"), "exact")
            case "none":
                return None  # type: ignore[return-value]
            case "pid":
                return Verdict(float(os.getpid()), "exact")
            case "torch":
                return Verdict(float("torch" in sys.modules), "exact")
        return Verdict(float(completion == problem.answer), "exact")


class Unpicklable(Faulty):
    def __reduce__(self) -> str:
        raise TypeError("holds an open file")


class Unloadable(Faulty):
    def __reduce__(self) -> tuple[type, tuple[str]]:
        return int, ("not a number",)


class DeadAtBirth(Faulty):
    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (3,)


TASK = Faulty("faulty")
RIGHT = Verdict(1.0, "exact")
WRONG = Verdict(0.0, "exact")
TIMEOUT = Verdict(0.0, "timeout")
FAILED = Verdict(0.0, "grader_error")


def pairs_of(*completions: str) -> list[tuple[str, Problem]]:
    return [(completion, Problem(f"p{i}", "?", "yes")) for i, completion in enumerate(completions)]


def pid_of(pool: GraderPool) -> int:
    return int(pool.grade(pairs_of("pid"))[0].score)


def is_alive(pid: int) -> bool:
    """A zombie, which waits for a parent that may never ask, is not alive."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(pid)


def test_verdicts_come_in_the_order_of_the_pairs() -> None:
    pairs = pairs_of(*("yes" if i % 3 else "no" for i in range(100)))
    with GraderPool(TASK, workers=2) as pool:
        assert pool.grade(pairs) == [RIGHT if i % 3 else WRONG for i in range(100)]
        assert pool.counts == {"exact": 100}


def test_no_pairs_give_no_verdicts_and_start_no_process() -> None:
    with GraderPool(DeadAtBirth("faulty")) as pool:
        assert pool.grade([]) == []


@pytest.mark.parametrize("hang", ["hang", "hang in C"])
def test_a_hang_costs_one_verdict(hang: str) -> None:
    with GraderPool(TASK, limit_s=LIMIT_S) as pool:
        verdicts = pool.grade(pairs_of("yes", "no", hang, *["yes"] * 30))
        assert verdicts == [RIGHT, WRONG, TIMEOUT, *[RIGHT] * 30]
        assert pool.counts == {"exact": 32, "timeout": 1}


@pytest.mark.parametrize("fault", ["raise", "exit", "sys.exit", "segfault", "allocate", "nan", "none"])
def test_a_failing_grader_costs_one_verdict(fault: str) -> None:
    with GraderPool(TASK) as pool:
        verdicts = pool.grade(pairs_of("yes", fault, "no", "yes"))
        assert verdicts == [RIGHT, FAILED, WRONG, RIGHT]
        assert pool.counts == {"exact": 3, "grader_error": 1}


def test_faults_in_a_row_each_cost_one_verdict() -> None:
    with GraderPool(TASK) as pool:
        assert pool.grade(pairs_of("exit", "exit", "yes", "exit")) == [FAILED, FAILED, RIGHT, FAILED]


def test_a_raising_grader_keeps_its_process() -> None:
    with GraderPool(TASK) as pool:
        before = pid_of(pool)
        pool.grade(pairs_of("raise"))
        assert pid_of(pool) == before


def test_a_process_killed_while_idle_costs_nothing() -> None:
    with GraderPool(TASK) as pool:
        pid = pid_of(pool)
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
        assert pool.grade(pairs_of("yes")) == [RIGHT]


def test_what_a_grader_prints_stays_off_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    with GraderPool(TASK) as pool:
        assert pool.grade(pairs_of("print", "yes")) == [WRONG, RIGHT]
    assert capfd.readouterr().out == ""


def test_many_threads_may_grade_at_once() -> None:
    with GraderPool(TASK, workers=2) as pool, ThreadPoolExecutor(6) as threads:
        asked = [pairs_of(*["yes", "no"][: 1 + i % 2] * 20) for i in range(12)]
        for pairs, verdicts in zip(asked, threads.map(pool.grade, asked), strict=True):
            assert verdicts == [RIGHT if completion == "yes" else WRONG for completion, _ in pairs]
        assert pool.counts == {"exact": 360}


def test_a_grader_process_does_not_import_torch() -> None:
    with GraderPool(TASK) as pool:
        assert pool.grade(pairs_of("torch"))[0].score == 0.0


def test_closing_kills_the_processes_and_refuses_more_work() -> None:
    with GraderPool(TASK) as pool:
        pid = pid_of(pool)
    assert not is_alive(pid)
    with pytest.raises(RunError, match="closed"):
        pool.grade(pairs_of("yes"))


def test_a_task_that_cannot_be_pickled_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"'faulty' cannot be sent .* holds an open file"):
        GraderPool(Unpicklable("faulty"))


def test_a_task_that_cannot_be_loaded_says_why() -> None:
    with GraderPool(Unloadable("faulty")) as pool, pytest.raises(InputError, match="invalid literal"):
        pool.grade(pairs_of("yes"))


def test_a_process_that_dies_at_its_start_ends_the_call() -> None:
    with GraderPool(DeadAtBirth("faulty")) as pool, pytest.raises(RunError, match="died at its start"):
        pool.grade(pairs_of("yes"))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(InputError, match="workers >= 1"):
        GraderPool(TASK, workers=0)
    with pytest.raises(InputError, match="limit_s > 0"):
        GraderPool(TASK, limit_s=float("nan"))


def run_script(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run a script that can import this module, as a user's script would be."""
    path.write_text(textwrap.dedent(code))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=60)


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    done = run_script(
        tmp_path / "unguarded.py",
        """
        from test_grading import TASK, GraderPool, pairs_of
        print("top of script")
        with GraderPool(TASK) as pool:
            print(pool.grade(pairs_of("yes"))[0].score)
        """,
    )
    assert done.stdout == "top of script\n1.0\n", done.stderr


def test_a_task_defined_in_a_script_is_told_to_move_to_a_module(tmp_path: Path) -> None:
    done = run_script(
        tmp_path / "script_task.py",
        """
        from test_grading import Faulty, GraderPool, pairs_of
        class Mine(Faulty):
            pass
        with GraderPool(Mine("mine")) as pool:
            pool.grade(pairs_of("yes"))
        """,
    )
    assert "define the task in a module that can be imported" in done.stderr


@pytest.mark.parametrize("last", ["yes", "hang in C"])
def test_a_killed_parent_leaves_no_process_behind(tmp_path: Path, last: str) -> None:
    done = run_script(
        tmp_path / "killed.py",
        f"""
        import os, signal, threading
        from test_grading import TASK, GraderPool, pairs_of, pid_of
        pool = GraderPool(TASK, limit_s=1.0)
        print(pid_of(pool), flush=True)
        threading.Thread(target=pool.grade, args=[pairs_of({last!r})]).start()
        threading.Event().wait(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    wait_until_gone(int(done.stdout))
