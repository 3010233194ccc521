"""Threads of the native library: a team a calling thread, as large as calls ask, ended with it, anew after a fork."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import torch

from hatch_build import SOURCES, find_compiler
from shards.kernels.native import NativeKernels
from shards.kernels.select import select_kernels
from tests.support.kernels import linear, random, threads

ROOT = Path(__file__).parents[2]

# Sizes: work for several threads of the library, and too little of it for torch to wake its own.


def make_native() -> NativeKernels:
    kernels = select_kernels("native", "cpu")
    assert isinstance(kernels, NativeKernels)
    return kernels


def running_threads() -> set[str]:
    """Ids of this process's threads."""
    return {task.name for task in Path("/proc/self/task").iterdir()}


def test_threads_that_call_at_once_get_the_bits_of_one_that_calls_alone() -> None:
    kernels, x, weight = make_native(), random(70, 96), random(256, 96)
    alone = linear(kernels, x, weight)
    with threads(3), ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(linear, kernels, x, weight) for _ in range(200)]
    assert all(torch.equal(call.result(), alone) for call in calls)


def test_a_team_follows_the_number_of_threads_that_calls_ask_for() -> None:
    kernels, x, weight = make_native(), random(70, 96), random(256, 96)
    alone = linear(kernels, x, weight)
    for count in [2, 7, 1, 3, 12, 2] * 10:
        with threads(count):
            assert torch.equal(linear(kernels, x, weight), alone)


def test_a_team_is_made_for_the_thread_that_calls_and_ends_with_it() -> None:
    kernels, x, weight = make_native(), random(70, 96), random(256, 96)
    teams: list[set[str]] = []

    def call() -> None:
        with threads(5):
            for _ in range(2):
                linear(kernels, x, weight)
                teams.append(running_threads() - before)

    before = running_threads()
    caller = Thread(target=call)
    caller.start()
    caller.join()
    first, second = teams
    assert first == second
    assert len(first) == 5  # the caller among them
    deadline = time.monotonic() + 10
    while first & running_threads():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Torch's own threads do not survive a fork.
_FORK = """
import os
import sys
import torch
from shards.kernels.select import select_kernels
torch.set_num_threads(3)
kernels = select_kernels("native", "cpu")
x, weight = torch.ones(70, 96), torch.ones(256, 96)
weight = kernels.lay_out(weight)
before = kernels.linear(x, weight)
child = os.fork()
if child == 0:
    after = kernels.linear(x, weight)
    # Of the two that are not this one: helpers of its own.
    team = len(os.listdir("/proc/self/task"))
    os._exit(0 if torch.equal(after, before) and team == 3 else 1)
_, status = os.waitpid(child, 0)
same = torch.equal(kernels.linear(x, weight), before)
sys.exit(os.waitstatus_to_exitcode(status) + (0 if same else 2))
"""


def test_a_fork_makes_a_team_of_its_own_and_leaves_its_parent_that_of_before() -> None:
    done = subprocess.run([sys.executable, "-c", _FORK], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Threads of one core take turns: helpers come when the caller waits for them, or behind all that it did. A part that is
# entered behind the end of its loop would change a number that was already read.
_LATE = """
#include <sched.h>
#include <unistd.h>
#include <atomic>
#include "team.h"

constexpr int LOOPS = 1000, TASKS = 40;
std::atomic<int> came[LOOPS], done[LOOPS][TASKS];

int main() {
    cpu_set_t cores, one;
    sched_getaffinity(0, sizeof(cores), &cores);
    CPU_ZERO(&one);
    for (int core = 0; core < CPU_SETSIZE && CPU_COUNT(&one) == 0; core++)
        if (CPU_ISSET(core, &cores)) CPU_SET(core, &one);
    sched_setaffinity(0, sizeof(one), &one);
    int seen[LOOPS], late = 0, joined = 0;
    for (int loop = 0; loop < LOOPS; loop++) {
        kernels::Queue queue(TASKS);
        kernels::together({4, loop % 3 * 10 * kernels::USEFUL}, [&, loop](int thread) {
            if (thread > 0) came[loop]++;
            if (thread == 0 && loop % 2) usleep(500);
            queue.share([&](int64_t task) { done[loop][task]++; });
        });
        seen[loop] = came[loop];
        late += seen[loop] == 0;
        joined += seen[loop] > 0;
    }
    usleep(100000);
    for (int loop = 0; loop < LOOPS; loop++) {
        if (came[loop] != seen[loop]) return 3;
        for (const auto& times : done[loop])
            if (times != 1) return 4;
    }
    return late > 0 && joined > 0 ? 0 : 5;
}
"""


def test_a_helper_that_comes_when_all_is_done_does_nothing(tmp_path: Path) -> None:
    compiler = find_compiler()
    assert compiler is not None
    source, program = tmp_path / "late.cpp", tmp_path / "late"
    source.write_text(_LATE)
    parts = [f"-I{SOURCES}", str(source), str(SOURCES / "team.cpp"), "-o", str(program)]
    subprocess.run([*compiler, "-std=c++17", "-O2", "-pthread", *parts], check=True)
    assert subprocess.run([program], check=False).returncode == 0
