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
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context) as pool:
        pending = [pool.submit(function, item) for item in items]
        unfinished = set(pending)
        try:
            while unfinished:
                done, unfinished = wait(unfinished, timeout=POLL_S, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if on_poll:
                    on_poll()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in pending]
