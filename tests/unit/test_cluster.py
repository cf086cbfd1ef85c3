"""The map keeps its order and its errors."""

import math
import multiprocessing
import subprocess
from pathlib import Path

import pytest

from rankleap.cluster import map_over


def test_results_come_in_the_order_of_the_items() -> None:
    polled: list[int] = []
    assert map_over(math.sqrt, [9.0, 1.0, 4.0], 2, lambda: polled.append(1)) == [3.0, 1.0, 2.0]
    assert polled


def test_an_error_in_one_item_is_raised() -> None:
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        map_over(math.sqrt, [4.0, -1.0, 9.0], 1)


def test_the_first_error_cancels_what_has_not_started(tmp_path: Path) -> None:
    later = [["sh", "-c", f"sleep 0.2; touch {tmp_path / str(number)}"] for number in range(8)]
    with pytest.raises(subprocess.CalledProcessError):
        map_over(subprocess.check_call, [["false"], *later], 1)
    for worker in multiprocessing.active_children():
        worker.join()
    assert len(list(tmp_path.iterdir())) < len(later)


def test_nothing_to_do_is_done_at_once() -> None:
    assert map_over(math.sqrt, [], 2) == []
