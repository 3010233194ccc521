"""What the engine's loop does a step, in calls of Python functions: a count that is the same on every machine."""

import sys
import threading
from itertools import pairwise
from statistics import median
from types import FrameType

from typing_extensions import override

from benchmarks.step_loop import InstantRanks, limits_for, make_outlets
from cluster.engine import Engine
from cluster.plan import StepPlan
from router.request import Request, RequestId, SamplingParams

_NEW = 96


class CallCounter:
    """Counts Python calls of threads that start while it is set."""

    def __init__(self) -> None:
        self.calls = 0

    def __enter__(self) -> "CallCounter":
        threading.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        threading.setprofile(None)

    def _count(self, _frame: FrameType, event: str, _arg: object) -> None:
        self.calls += event == "call"


class CountingRanks(InstantRanks):
    """Notes the calls made until each launch, too."""

    def __init__(self, counter: CallCounter) -> None:
        super().__init__()
        self.counter = counter
        self.counts: list[int] = []

    @override
    def launch(self, plan: StepPlan) -> None:
        """As `Ranks.launch`."""
        super().launch(plan)
        self.counts.append(self.counter.calls)


def calls_a_step(rows: int) -> float:
    """Python calls of the engine's thread in a step in which `rows` sequences decode."""
    ended = threading.Event()
    with CallCounter() as counter:
        ranks = CountingRanks(counter)
        engine = Engine(limits_for(rows), ranks, make_outlets(rows, ended))
        for index in range(rows):
            prompt = tuple(range(index * 128, (index + 1) * 128))
            sampling = SamplingParams(max_tokens=_NEW, temperature=0.0)
            engine.submit(Request(id=RequestId(str(index)), prompt_ids=prompt, sampling=sampling))
        engine.start()
        assert ended.wait(60)
        engine.stop()
    assert sys.getprofile() is None
    full = [calls for (count, _), calls in zip(ranks.launches, ranks.counts, strict=True) if count == rows]
    return median(after - before for before, after in pairwise(full[2:-2]))


def test_a_step_s_calls_stay_few_however_many_rows_there_are() -> None:
    # 103 and none a row were made when this was written.
    one, many = calls_a_step(1), calls_a_step(32)
    assert one <= 108
    assert many == one
