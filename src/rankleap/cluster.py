"""Maps a function over items in spawned processes of this machine, a few at a time, in order.

A function and its items must be picklable. The first error stops the map and is raised here.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_S = 0.5


def map_over(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, on_poll: Callable[[], None] | None = None
) -> list[Result]:
    """``[function(item) for item in items]``, ``workers`` at once; ``on_poll`` is called twice a second while waiting."""
    if not items:
        return []
    # Not fork: a child of a process that has used torch inherits thread pools that may hang.
    # Spawned processes import __main__ again, so a calling script needs its __name__ guard.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(items)), mp_context=context)
    try:
        pending = [pool.submit(function, item) for item in items]
        unfinished = set(pending)
        while unfinished:
            done, unfinished = wait(unfinished, timeout=POLL_S, return_when=FIRST_EXCEPTION)
            for future in done:
                # For what it raises alone; results are read in order below.
                future.result()
            if on_poll:
                on_poll()
        return [future.result() for future in pending]
    finally:
        # What has not begun is dropped. Not by ``with``: it shuts down a second time, which takes the cancelling back.
        pool.shutdown(wait=False, cancel_futures=True)
