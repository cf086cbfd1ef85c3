"""Maps a function over items: here, in spawned processes of this machine, or on Ray.

The function, its items and its results must be picklable. At most ``workers`` items are in flight. The first error that
the function raises stops the map and is raised here. A worker that dies (SIGKILL, out of memory, a lost node) is no
error of the function: its item, and no other, is tried again, ``ATTEMPTS`` times in all.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, TypeVar

from rankleap.errors import InputError, MissingExtraError, RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_S = 0.5
ATTEMPTS = 3
# N workers with N threads each are far slower than one; PyTorch and the BLAS libraries read these as they load.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

log = logging.getLogger(__name__)


def map_over(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    on_poll: Callable[[], None] | None = None,
    *,
    address: str | None = None,
    on_result: Callable[[int, Result], None] | None = None,
) -> list[Result]:
    """``[function(item) for item in items]``, ``workers`` at once.

    ``address`` is what ``ray.init`` takes: ``"local"``, ``"auto"`` or ``"ray://host:port"``; a Ray that runs in this
    process already is used as it is, and left running. Each item takes one CPU there and no GPU, and rankleap must be
    installed on every node. Without an address one worker is this very process, and more are spawned ones. All but
    this very process compute on one thread each.

    ``on_poll`` is called at least twice a second while waiting (in this very process: after each item). ``on_result(index,
    result)`` takes each result as it comes, in any order; nothing is kept then, and the list is empty. Nothing new
    starts while it runs.

    Errors: what ``function`` raised, with the worker's traceback as a note; ``RunError`` for an item whose worker died
    each time; ``MissingExtraError`` without Ray; ``InputError`` for an address where no Ray is.
    """
    if workers < 1:
        raise InputError(f"at least 1 worker is needed to map over items, got {workers}")
    results: dict[int, Result] = {}
    keep = on_result or results.__setitem__
    if workers == 1 and address is None:
        for index, item in enumerate(items):
            keep(index, function(item))
            if on_poll:
                on_poll()
    elif items:
        crew = _Ray(address, workers) if address else _Spawned()
        try:
            for index, result in _outcomes(crew, function, items, workers, on_poll):
                keep(index, result)
        finally:
            crew.close()
    return [results[index] for index in sorted(results)]


@dataclass(frozen=True, slots=True)
class _Lost:
    """A worker that ended without an answer."""

    how: str


class _Crew(ABC):
    """Workers that hold one task each: a pickled function and item."""

    dumps: Callable[[Any], bytes]

    @abstractmethod
    def start(self, index: int, task: bytes) -> None:
        """Give the task to a worker that holds none, a new one if need be."""

    @abstractmethod
    def finished(self) -> Iterator[tuple[int, bytes | _Lost]]:
        """What has ended within ``POLL_S``, by index: an answer, or how its worker was lost."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers, by force those that still hold a task."""


def _outcomes(
    crew: _Crew,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    on_poll: Callable[[], None] | None,
) -> Iterator[tuple[int, Result]]:
    """Results by index as they come; an item is read when a worker is free for it, never before."""
    fresh = iter(range(len(items)))
    lost: Counter[int] = Counter()
    running = 0
    while True:
        for index in islice(fresh, workers - running):
            crew.start(index, crew.dumps((function, items[index])))
            running += 1
        if not running:
            return
        for index, answer in crew.finished():
            if isinstance(answer, _Lost):
                lost[index] += 1
                if lost[index] == ATTEMPTS:
                    raise RunError(
                        f"item {index} ({items[index]!r:.200}) lost its worker {ATTEMPTS} times; the last one "
                        f"{answer.how}. If memory is short, fewer workers leave more for each; "
                        "if the item itself is at fault, workers=1 without an address shows it in this process"
                    )
                log.warning("item %d: its worker %s; it is tried again", index, answer.how)
                crew.start(index, crew.dumps((function, items[index])))
                continue
            running -= 1
            result, error = pickle.loads(answer)
            if error is not None:
                raise error
            yield index, result
        if on_poll:
            on_poll()


class _Carried:
    """A block whose error is not handled here but carried to the process that asked, and raised there."""

    error: BaseException | None = None

    def __enter__(self) -> "_Carried":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return True


def _answer(task: bytes, dumps: Callable[[Any], bytes]) -> bytes:
    """The pickled pair of result and error of a task, in a worker."""
    with _Carried() as carried:
        function, item = pickle.loads(task)
        return dumps((function(item), None))
    error = carried.error
    assert error is not None
    note = "In the worker:\n" + "".join(traceback.format_exception(error))
    error.add_note(note)
    # An exception whose __init__ does not take its own args is written well, but cannot be read.
    with _Carried():
        answer = dumps((None, error))
        pickle.loads(answer)
        return answer
    told = RunError(f"{type(error).__name__}: {error}")
    told.add_note(note)
    return pickle.dumps((None, told))


class _Spawned(_Crew):
    """Processes of this machine, each at the end of a pipe of its own, which tells whose item a death takes along."""

    def __init__(self) -> None:
        self.dumps = pickle.dumps
        self.idle: list[tuple[Connection, SpawnProcess]] = []
        self.busy: dict[Connection, tuple[SpawnProcess, int]] = {}

    def start(self, index: int, task: bytes) -> None:
        connection, worker = self.idle.pop() if self.idle else _spawn()
        self.busy[connection] = worker, index
        # A worker that has died since its last task is found as one that dies during this one.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send_bytes(task)

    def finished(self) -> Iterator[tuple[int, bytes | _Lost]]:
        ready = wait(list(self.busy), POLL_S)
        # The dead are looked for as well: a child that a worker forked keeps the worker's end of the pipe open.
        ended = [pipe for pipe, (worker, _) in self.busy.items() if pipe in ready or worker.exitcode is not None]
        for connection in ended:
            worker, index = self.busy.pop(connection)
            answer = None
            with suppress(EOFError, OSError):
                answer = connection.recv_bytes() if connection.poll() else None
            if answer is None:
                connection.close()
                worker.join()
                yield index, _Lost(_ending(worker.exitcode))
            else:
                self.idle.append((connection, worker))
                yield index, answer

    def close(self) -> None:
        for connection, (worker, _) in self.busy.items():
            worker.kill()
            self.idle.append((connection, worker))
        for connection, worker in self.idle:
            # The end of its pipe is what an idle worker leaves at.
            connection.close()
            worker.join()


def _spawn() -> tuple[Connection, SpawnProcess]:
    # Not fork: a child of a process that has used torch inherits thread pools that may hang.
    # Spawned processes import __main__ again, so a calling script needs its __name__ guard.
    context = multiprocessing.get_context("spawn")
    ours, theirs = Pipe()
    worker = context.Process(target=_serve, args=(theirs,))
    with _environment(ONE_THREAD):
        worker.start()
    # Or the pipe would not end with the worker.
    theirs.close()
    return ours, worker  # pyright: ignore[reportReturnType] - Windows has another class of the same use


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection) -> None:
    """The life of a worker: answer tasks until the pipe ends, or until the parent is killed."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            connection.send_bytes(_answer(connection.recv_bytes(), pickle.dumps))


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _ending(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}; what it wrote to stderr may say why"
    killer = f"was killed by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    return f"{killer}, which is what a machine short of memory does" if exit_code == -signal.SIGKILL else killer


class _Ray(_Crew):
    """Tasks of Ray, one CPU each."""

    def __init__(self, address: str, workers: int) -> None:
        try:
            import ray
            from ray.cloudpickle import dumps  # pyright: ignore[reportAttributeAccessIssue]
        except ModuleNotFoundError:
            raise MissingExtraError("running on Ray", "cluster") from None
        self.ray, self.dumps = ray, dumps
        self.ours = not ray.is_initialized()
        if self.ours:
            # Ray refuses these for a cluster that runs already.
            local = {"num_cpus": workers, "include_dashboard": False, "logging_level": logging.WARNING}
            try:
                ray.init(address=address, **(local if address == "local" else {}))
            except (ConnectionError, ValueError) as error:
                raise InputError(
                    f"no Ray at {address!r}: {error} (`ray start --head` starts a cluster that 'auto' finds, "
                    "'local' starts one for this run alone)"
                ) from error
        # Its own retries would not be counted.
        settings = {"num_cpus": 1, "max_retries": 0, "runtime_env": {"env_vars": ONE_THREAD}}
        self.answer = ray.remote(**settings)(_answer)
        self.busy: dict[Any, int] = {}

    def start(self, index: int, task: bytes) -> None:
        self.busy[self.answer.remote(task, self.dumps)] = index

    def finished(self) -> Iterator[tuple[int, bytes | _Lost]]:
        errors = self.ray.exceptions
        ready, _ = self.ray.wait(list(self.busy), timeout=POLL_S)
        for reference in ready:
            index = self.busy.pop(reference)
            try:
                answer = self.ray.get(reference)
            except (
                errors.WorkerCrashedError,
                errors.OutOfMemoryError,
                errors.NodeDiedError,
                errors.ObjectLostError,
            ) as lost:
                answer = _Lost(f"was lost ({type(lost).__name__}: {str(lost).splitlines()[0]})")
            yield index, answer

    def close(self) -> None:
        for reference in self.busy:
            self.ray.cancel(reference, force=True)
        if self.ours:
            self.ray.shutdown()
