"""Pages of a buffer made ahead: until somebody stops that, and while there is memory to spare."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from threading import enumerate as running_threads

import pytest
import torch
from torch import Tensor

from shards.first_touch import FirstTouch

SIZE = 8 << 20


@contextmanager
def memory_file() -> Iterator[tuple[int, Tensor]]:
    """A file of holes and a buffer over it."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, SIZE)
    yield fd, torch.frombuffer(mmap.mmap(fd, SIZE), dtype=torch.uint8)
    os.close(fd)


def made_bytes(fd: int) -> int:
    for thread in running_threads():
        if thread.name == "first-touch":
            thread.join(20)
            assert not thread.is_alive()
    return os.fstat(fd).st_blocks * 512


def test_pages_of_the_whole_buffer_are_made() -> None:
    with memory_file() as (fd, buffer):
        FirstTouch(buffer)
        assert made_bytes(fd) == SIZE


def test_who_is_stopped_makes_no_more() -> None:
    asked, stopped = Event(), Event()

    def available() -> int:
        asked.set()
        stopped.wait(20)
        return SIZE << 10

    with pytest.MonkeyPatch.context() as patch, memory_file() as (fd, buffer):
        patch.setattr("shards.first_touch.available_memory", available)
        touch = FirstTouch(buffer)
        asked.wait(20)
        touch.stop()
        stopped.set()
        assert made_bytes(fd) < SIZE // 2


def test_memory_that_others_may_count_on_is_left_to_them() -> None:
    with pytest.MonkeyPatch.context() as patch, memory_file() as (fd, buffer):
        patch.setattr("shards.first_touch.available_memory", lambda: 1 << 20)
        FirstTouch(buffer)
        assert made_bytes(fd) == 0
