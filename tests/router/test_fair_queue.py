"""Turns follow tokens and weights, whatever flows send, and whoever asks for little waits little."""

import time
from collections import Counter

import pytest

from router.fair_queue import LEAST_BURST_TOKENS, QUANTUM_TOKENS, FairQueue, Flow, Waiting
from router.request import RequestId

HOG: Flow = ("hog", 0)
OTHER: Flow = ("other", 0)


def make(name: str, flow: Flow, tokens: int = 100) -> Waiting:
    return Waiting(request_id=RequestId(name), flow=flow, tokens=tokens)


def served(queue: FairQueue, count: int) -> Counter[Flow]:
    tokens: Counter[Flow] = Counter()
    for _ in range(count):
        item = queue.pop()
        assert item is not None
        tokens[item.flow] += item.tokens
    return tokens


def fill(queue: FairQueue, flow: Flow, count: int, tokens: int, weight: float = 1.0) -> None:
    for number in range(count):
        queue.push(make(f"{flow[0]}{number}", flow, tokens), weight)


def test_a_flow_keeps_its_order_and_an_empty_queue_has_nobody() -> None:
    queue = FairQueue()
    fill(queue, HOG, 3, 100)
    assert [item.request_id for item in (queue.pop(), queue.pop(), queue.pop()) if item] == ["hog0", "hog1", "hog2"]
    assert queue.pop() is None
    assert len(queue) == 0


def test_flows_get_tokens_by_weight_and_not_by_requests() -> None:
    queue = FairQueue()
    fill(queue, HOG, 4000, 500)
    fill(queue, OTHER, 4000, 1000, weight=2.0)
    tokens = served(queue, 1500)
    assert 1.8 < tokens[OTHER] / tokens[HOG] < 2.3


def test_a_flow_that_comes_for_the_first_time_is_next_but_cannot_save_up_without_end() -> None:
    queue = FairQueue()
    fill(queue, HOG, 1000, QUANTUM_TOKENS // 2)
    served(queue, 100)
    fill(queue, OTHER, 1000, QUANTUM_TOKENS // 2)
    burst = 2 * LEAST_BURST_TOKENS // QUANTUM_TOKENS
    assert set(served(queue, burst)) == {OTHER}
    tokens = served(queue, 200)
    assert 0.8 < tokens[OTHER] / tokens[HOG] < 1.25


def test_leaving_and_coming_back_earns_no_more_than_the_rounds_between() -> None:
    queue = FairQueue()
    fill(queue, HOG, 1000, QUANTUM_TOKENS // 2)
    tokens: Counter[Flow] = Counter()
    for number in range(400):
        queue.push(make(f"again{number}", OTHER, 4096), 1.0)
        tokens += served(queue, 1)
        if not number % 2:
            tokens += served(queue, 1)
    assert tokens[HOG] > 0.6 * tokens[OTHER]


def test_a_removed_request_is_not_served_and_the_longest_flow_is_found() -> None:
    queue = FairQueue()
    assert queue.last_of_longest() is None
    fill(queue, HOG, 3, 100)
    item = make("x", OTHER, 200)
    queue.push(item, 1.0)
    assert queue.counts() == {HOG: 3, OTHER: 1}
    last = queue.last_of_longest()
    assert last is not None
    assert last.request_id == "hog2"
    assert (queue.burden(HOG), queue.burden(("nobody", 0))) == (300, 0)
    queue.remove(item)
    assert set(served(queue, 3)) == {HOG}


def test_what_is_served_before_a_request_is_its_own_queue_at_its_share() -> None:
    queue = FairQueue()
    assert queue.tokens_before(OTHER, 100, 1.0) == 100
    fill(queue, HOG, 50, 100)
    assert queue.tokens_before(OTHER, 100, 1.0) == 200
    assert queue.tokens_before(OTHER, 100, 0.01) == 5100
    assert queue.tokens_before(HOG, 100, 1.0) == 5100


def test_memory_of_flows_that_left_is_bounded() -> None:
    queue = FairQueue()
    fill(queue, HOG, 1, QUANTUM_TOKENS * 100)
    for number in range(5000):
        queue.push(make(f"r{number}", (f"t{number}", 0)), 1.0)
        assert set(served(queue, 1)) == {(f"t{number}", 0)}
    assert len(queue) == 1


def test_a_tiny_weight_costs_no_more_turns_than_a_large_one() -> None:
    queue, began = FairQueue(), time.perf_counter()
    fill(queue, HOG, 20, 32_000, weight=1e-9)
    fill(queue, OTHER, 20, 32_000, weight=2e-9)
    tokens = served(queue, 30)
    assert time.perf_counter() - began < 1.0
    assert tokens[OTHER] == pytest.approx(2 * tokens[HOG], rel=0.1)


def test_a_burst_grows_with_the_fleet_for_those_who_wait_already_too() -> None:
    queue = FairQueue()
    fill(queue, OTHER, 2, 10 * LEAST_BURST_TOKENS)
    queue.set_burst(20 * LEAST_BURST_TOKENS)
    fill(queue, HOG, 2, 10 * LEAST_BURST_TOKENS)
    assert [item.flow for _ in range(4) if (item := queue.pop())] == [HOG, HOG, OTHER, OTHER]
    queue.set_burst(1)
    new: Flow = ("new", 0)
    fill(queue, ("newer", 0), 1, 2 * LEAST_BURST_TOKENS)
    fill(queue, new, 1, LEAST_BURST_TOKENS)
    assert [item.flow for _ in range(2) if (item := queue.pop())] == [new, ("newer", 0)]
