"""Grades in processes that can be killed, so that no completion hangs or ends the caller.

Guarantee: ``grade`` returns one verdict per pair, in order. A pair over the limit is ``timeout``; a pair whose grader
raises, exits, crashes or runs out of memory is ``grader_error``; every other pair keeps its own verdict.

A worker is a plain interpreter started by ``subprocess`` on one socket, not a ``multiprocessing`` process: those import
``__main__`` again, which runs an unguarded script twice and fails in a notebook. Threads and signal alarms do not do
instead: neither ends a loop inside C code, and math-verify resets the alarm. Pairs travel in chunks and each verdict
comes back as it is found, so the parent knows which pair hangs, kills that worker alone, and sends what is left of the
chunk to a new one.
"""

import faulthandler
import json
import logging
import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Literal, Self, TypeVar

from rankleap.errors import Caught, InputError, RunError
from rankleap.records import Problem, Verdict
from rankleap.tasks.task import Task

logger = logging.getLogger(__name__)

Pair = tuple[str, Problem]
T = TypeVar("T")

_CHUNK = 16
# A first import of a task's libraries can take far longer than any one grade.
_START_S = 60.0
# A grader that is broken for good would flood the log; the counts still tell all of it.
_LOUD = 5
_MEMORY_BYTES = 4 << 30
# The parent's sys.path, so that a task importable there is importable here; one thread, for the memory limit is on
# address space and a thread pool of numpy reserves gigabytes on a machine with many cores.
_COMMAND = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rankleap.tasks.grading import serve; serve()"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class GraderPool:
    """Grades (completion, problem) pairs of one task in ``workers`` killable processes, started when first needed.

    ``limit_s`` is the wall-clock limit of one pair. ``counts`` says how often each kind of verdict was given so far.
    The task must be picklable and live in a module that can be imported, not in a script or notebook.
    Any thread may call ``grade``; close the pool, or use it in ``with``.
    """

    def __init__(self, task: Task, workers: int = 1, limit_s: float = 5.0) -> None:
        if workers < 1 or not limit_s > 0:
            raise InputError(f"a grader pool needs workers >= 1 and limit_s > 0, got {workers} and {limit_s}")
        self.task = task
        self.counts: dict[str, int] = Counter()
        self._closed = False
        self._lock = Lock()
        self._workers = [_Worker(task, limit_s) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grader")

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Return one verdict per pair, in the order given."""
        if self._closed:
            raise RunError(f"the grader pool of task {self.task.name!r} is closed; make a new one")
        chunks = [pairs[i : i + _CHUNK] for i in range(0, len(pairs), _CHUNK)]
        verdicts = [verdict for graded in self._threads.map(self._grade_chunk, chunks) for verdict in graded]
        # Updating a Counter from several threads at once loses counts.
        with self._lock:
            self.counts.update(Counter(verdict.how for verdict in verdicts))
        return verdicts

    def close(self) -> None:
        """Let running chunks end, then kill the workers."""
        self._closed = True
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _grade_chunk(self, pairs: Sequence[Pair]) -> list[Verdict]:
        worker = self._idle.get()
        try:
            return worker.grade(pairs)
        finally:
            self._idle.put(worker)


class _Worker:
    """One place in the pool: a process and the socket to it, replaced when the process is killed or dies."""

    def __init__(self, task: Task, limit_s: float) -> None:
        self._name = task.name
        self._limit_s = limit_s
        self._faults = 0
        self._process: subprocess.Popen[bytes] | None = None
        try:
            # In the parent, so that an unsuitable task is refused before any process starts.
            self._task = pickle.dumps(task)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(f"task {task.name!r} cannot be sent to a grader process: {error}") from None

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Grade a chunk; each round of the loop is one process, and costs at most the one pair that ends it."""
        verdicts: list[Verdict] = []
        while len(verdicts) < len(pairs):
            # It may also have died between two chunks, when nobody was waiting for it.
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                self._connection.send((list(pairs[len(verdicts) :]), self._limit_s))
                # The slice is taken once, before the loop makes ``verdicts`` longer.
                for _completion, problem in pairs[len(verdicts) :]:
                    if not self._connection.poll(self._limit_s):
                        self.kill()
                        verdicts.append(self._fault(problem, "timeout", f"no verdict in {self._limit_s:g} s"))
                        break
                    verdict, fault = self._connection.recv()
                    verdicts.append(verdict or self._fault(problem, "grader_error", fault))
            # The socket closes with the process: the pair it was at is the first without a verdict.
            except (EOFError, OSError):
                self.kill()
                fault = "the grader process died"
                verdicts.append(self._fault(pairs[len(verdicts)][1], "grader_error", fault))
        return verdicts

    def kill(self) -> None:
        """End the process if there is one."""
        if self._process is not None:
            self._process.kill()
            # Killed but not waited for, it would stay as a zombie until the caller ends.
            self._process.wait()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        """Start a process and wait until it holds the task."""
        self.kill()
        self._connection, theirs = Pipe()
        descriptor = str(theirs.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, json.dumps(sys.path), descriptor],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the caller; the workers end with it
            env={**os.environ, **_ONE_THREAD},
        )
        # This copy of the worker's end would keep the socket open after the worker has died.
        theirs.close()
        try:
            self._connection.send(self._task)
            if not self._connection.poll(_START_S):
                # An OSError too, so the handler below also ends a start that is silent.
                raise TimeoutError
            fault = self._connection.recv()
        except (EOFError, OSError):
            self.kill()
            raise RunError(
                f"the grader process of task {self._name!r} died at its start or was silent for {_START_S:g} s; "
                "see what it wrote to stderr"
            ) from None
        if fault is not None:
            self.kill()
            raise InputError(
                f"a grader process cannot load task {self._name!r}: {fault}; "
                "define the task in a module that can be imported, not in a script or notebook"
            )

    def _fault(self, problem: Problem, how: Literal["timeout", "grader_error"], fault: str) -> Verdict:
        self._faults += 1
        level = logging.WARNING if self._faults <= _LOUD else logging.DEBUG
        logger.log(level, "grading problem %s of task %s failed: %s", problem.id, self._name, fault)
        return Verdict(0.0, how)


def serve() -> None:
    """Be a worker: load the task, then answer chunks of pairs until the parent closes the socket or is gone."""
    os.dup2(2, 1)  # what a grader prints must not mix with the caller's output
    _limit_memory()
    connection = Connection(int(sys.argv[2]))
    task, fault = _attempt(pickle.loads, connection.recv())
    connection.send(fault)
    with Path(os.devnull).open("w") as nowhere, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while task is not None:
            pairs, limit_s = connection.recv()
            # A parent that was killed cannot kill: this thread of faulthandler exits even while C code holds the GIL.
            # One limit more than the pairs can take: a parent that is alive always kills first.
            faulthandler.dump_traceback_later(limit_s * (len(pairs) + 1), exit=True, file=nowhere)
            for completion, problem in pairs:
                connection.send(_attempt(_grade_one, task, completion, problem))
            faulthandler.cancel_dump_traceback_later()


def _grade_one(task: Task, completion: str, problem: Problem) -> Verdict:
    verdict = task.grade(completion, problem)
    if type(verdict) is not Verdict or not math.isfinite(verdict.score):
        raise ValueError(f"a grader must return a Verdict with a finite score, got {verdict!r}")
    return verdict


def _attempt(function: Callable[..., T], *arguments: object) -> tuple[T | None, str | None]:
    """Return (result, None), or (None, what was raised); exits and interrupts pass."""
    result = None
    with Caught() as caught:
        result = function(*arguments)
    # Cut short, for a message may quote a completion of any length.
    return result, f"{type(caught.error).__name__}: {caught.error}"[:500] if caught.error else None


def _limit_memory() -> None:
    """Bound the address space, so that a completion which makes a grader allocate ends as a ``MemoryError``."""
    if sys.platform == "linux":
        import resource

        hard_bytes = resource.getrlimit(resource.RLIMIT_AS)[1]
        # A lower limit from outside stands; only a privileged process could raise it.
        if hard_bytes == resource.RLIM_INFINITY or hard_bytes > _MEMORY_BYTES:
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, hard_bytes))
