"""Requests that wait, one queue a flow, served by deficit round robin over their tokens.

Shreedhar and Varghese, "Efficient Fair Queueing Using Deficit Round Robin" (SIGCOMM 1995): each flow in turn gets a
quantum of tokens by its weight and is served while they last, so that a flow gets its share whatever others send. As
in FQ-CoDel (RFC 8290) a flow that comes back is served first, here from what it has earned meanwhile, up to a burst:
who asks for less than a share waits little, also where requests come in bursts.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from router.request import RequestId

QUANTUM_TOKENS: Final = 512
"""Small, for small members too: a quantum and a burst are work that others wait for."""
LEAST_BURST_TOKENS: Final = 4096
"""What a flow that asks for nothing can save up, at least."""
_MAX_AWAY: Final = 4096
Flow = tuple[str, int]
"""A tenant and a priority class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One request in the queue."""

    request_id: RequestId
    flow: Flow
    tokens: int
    """What it will cost: prompt and expected output."""
    deadline_s: float | None = None


class _Line:
    """One flow's requests in order of arrival."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.deficit = 0.0
        self.saved = 0.0
        """What of the deficit was earned while nothing waited."""
        self.tokens = 0
        self.items: deque[Waiting] = deque()


class FairQueue:
    """Used by one thread."""

    def __init__(self) -> None:
        self._burst_tokens = LEAST_BURST_TOKENS
        self._lines: dict[Flow, _Line] = {}
        self._turns: deque[Flow] = deque()
        self._away: dict[Flow, tuple[float, int]] = {}
        """What flows with nothing waiting had left over, and the number of turns by then."""
        self._num_turns = 0
        self._tokens = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def counts(self) -> dict[Flow, int]:
        """Requests that wait, by flow."""
        return {flow: len(line.items) for flow, line in self._lines.items()}

    def set_burst(self, tokens: int) -> None:
        """What a flow can save up, at least LEAST_BURST_TOKENS: for a large fleet as long to do as for a small one."""
        more = max(tokens, LEAST_BURST_TOKENS) - self._burst_tokens
        self._burst_tokens += more
        for line in self._lines.values() if more > 0 else ():
            # Or who waits already would go behind all who come now.
            line.deficit += more * line.weight
            line.saved += more * line.weight

    def push(self, item: Waiting, weight: float) -> None:
        """Let a request wait."""
        line = self._lines.get(item.flow)
        if line is None:
            line = self._lines[item.flow] = _Line(weight)
            line.deficit = line.saved = self._saved(item.flow, weight)
            self._turns.appendleft(item.flow)
        line.items.append(item)
        self._add(line, item.tokens, 1)

    def _saved(self, flow: Flow, weight: float) -> float:
        """Tokens that a flow may use at once when it comes back: a quantum for each round that it was away."""
        most = self._burst_tokens * weight
        left = self._away.pop(flow, None)
        if left is None:
            return most
        rounds = (self._num_turns - left[1]) / max(len(self._turns), 1)
        return min(left[0] + rounds * QUANTUM_TOKENS * weight, most)

    @property
    def next_saver(self) -> Flow | None:
        """Whose turn it is, if it is paid for by what the flow did not use while nothing of it waited."""
        if not self._turns:
            return None
        flow = self._turns[0]
        line = self._lines[flow]
        return flow if line.items[0].tokens <= line.saved else None

    def pop(self) -> Waiting | None:
        """The request whose turn it is; None: nobody waits."""
        passed = 0
        while self._turns:
            if passed == len(self._turns):
                self._skip_rounds()
                passed = 0
            flow = self._turns[0]
            line = self._lines[flow]
            if line.items[0].tokens <= line.deficit:
                item = line.items.popleft()
                line.deficit -= item.tokens
                line.saved -= item.tokens
                self._taken(item)
                return item
            line.deficit += QUANTUM_TOKENS * line.weight
            self._turns.rotate(-1)
            self._num_turns += 1
            passed += 1
        self._away.clear()
        return None

    def _skip_rounds(self) -> None:
        """Go through the rounds that serve nobody in one step: with small weights there are many."""
        lacking = min((line.items[0].tokens - line.deficit) / line.weight for line in self._lines.values())
        rounds = math.ceil(lacking / QUANTUM_TOKENS) - 1
        if rounds > 0:
            for line in self._lines.values():
                line.deficit += rounds * QUANTUM_TOKENS * line.weight
            self._num_turns += rounds * len(self._turns)

    def remove(self, item: Waiting) -> None:
        """A request waits no more; it must be in the queue."""
        self._lines[item.flow].items.remove(item)
        self._taken(item)

    def _taken(self, item: Waiting) -> None:
        line = self._lines[item.flow]
        self._add(line, -item.tokens, -1)
        if not line.items:
            del self._lines[item.flow]
            self._turns.remove(item.flow)
            if len(self._away) >= _MAX_AWAY:
                self._away.clear()
            self._away[item.flow] = (line.deficit, self._num_turns)

    def _add(self, line: _Line, tokens: int, count: int) -> None:
        line.tokens += tokens
        self._tokens += tokens
        self._count += count

    def tokens_before(self, flow: Flow, tokens: int, weight: float) -> float:
        """Tokens that are served before a new request of a flow is done: its flow's own at its share of all."""
        line = self._lines.get(flow)
        own = tokens + (line.tokens if line is not None else 0)
        others = sum(each.weight for name, each in self._lines.items() if name != flow)
        return min(own * (1.0 + others / weight), self._tokens + tokens)

    def last_of_longest(self) -> Waiting | None:
        """The newest request of the flow that waits for most tokens for its weight."""
        if not self._lines:
            return None
        return max(self._lines.values(), key=lambda line: line.tokens / line.weight).items[-1]

    def burden(self, flow: Flow) -> float:
        """Tokens that a flow waits for, by its weight."""
        line = self._lines.get(flow)
        return 0.0 if line is None else line.tokens / line.weight
