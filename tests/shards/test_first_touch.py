"""Pages of a buffer made ahead: until somebody stops that, and while there is memory to spare."""

import mmap
import os
import subprocess
import sys
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


@pytest.mark.parametrize("last", ["", "for touch in touches: touch.stop()"])
def test_a_process_ends_well_and_soon_while_pages_are_made(last: str) -> None:
    # As daemons, stopped and killed just when they let go of their buffers, the threads took the process down.
    program = f"""
import atexit, mmap, resource, threading, time, torch
from shards.first_touch import FirstTouch
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
touches = []
def begin():
    for _ in range(8):
        touches.append(FirstTouch(torch.frombuffer(mmap.mmap(-1, 1 << 30), dtype=torch.uint8)))
    time.sleep(0.002)
beginner = threading.Thread(target=begin, daemon=True)
beginner.start()
beginner.join()
{last}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) < 4 << 20
