"""A value is made once for each key, whichever threads ask."""

import time
from concurrent.futures import ThreadPoolExecutor

from cluster.made_once import MadeOnce


def test_threads_that_ask_at_once_share_one_value() -> None:
    made: list[int] = []

    def make(key: int) -> int:
        time.sleep(0.05)
        made.append(key)
        return -key

    values = MadeOnce(make, most=2)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(values.get, [1, 1, 2, 2])) == [-1, -1, -2, -2]
    assert sorted(made) == [1, 2]


def test_the_oldest_is_dropped_where_there_are_too_many() -> None:
    made: list[int] = []

    def make(key: int) -> int:
        made.append(key)
        return key

    values = MadeOnce(make, most=2)
    for key in (1, 2, 3, 2, 3, 1):
        assert values.get(key) == key
    assert made == [1, 2, 3, 1]
