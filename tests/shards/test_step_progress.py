"""Who reads what a step writes waits for its layers, and for no step that is over."""

import threading
import time

from shards.step_progress import ALL_LAYERS, StepProgress


def test_layers_of_a_step_are_told_as_they_are_written_and_all_at_its_end() -> None:
    progress = StepProgress()
    assert progress.wait(7, 0, 0.0) == 0
    progress.begin(7)
    progress.wrote(2)
    assert progress.wait(7, 1, 0.0) == 2
    assert progress.wait(7, 2, 0.0) == 2
    assert progress.wait(8, 0, 0.0) == 0
    progress.end()
    assert progress.wait(7, 2, 0.0) == ALL_LAYERS


def test_of_a_step_before_the_one_that_runs_all_is_there() -> None:
    progress = StepProgress()
    progress.begin(8)
    assert progress.wait(7, 5, 0.0) == ALL_LAYERS


def test_a_wait_ends_with_the_next_layer() -> None:
    progress = StepProgress()
    progress.begin(7)
    timer = threading.Timer(0.05, progress.wrote, (1,))
    timer.start()
    began = time.monotonic()
    assert progress.wait(7, 0, 20.0) == 1
    assert time.monotonic() - began < 10
    timer.join()
