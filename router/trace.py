"""Recorded request traces: reading them, and scaling them to a fleet of another size."""

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from router.errors import ConfigError

_MOST_MS: Final = 1e14
"""Of a clock that counts from 1970, some thousand years ahead."""
_MOST_TOKENS: Final = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One recorded request."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    """Ids of the prompt's blocks; an id stands for a block and all before it."""
    tenant: str = ""
    line: int = 0
    """Of the trace file, counted from 1; 0: not out of a file."""

    def full_blocks(self, block_size: int) -> tuple[int, ...]:
        """The blocks that can be reused: never the one with the last token."""
        return self.blocks[: (self.prompt_tokens - 1) // block_size]


def read_trace(lines: Iterable[str], block_size: int, *, name: str = "trace") -> list[TraceRequest]:
    """Requests out of JSON lines with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`.

    Args:
        lines: of the file; empty ones are left out.
        block_size: prompt tokens that a hash id stands for.
        name: of the file, for errors.

    Raises:
        ConfigError: a line makes no sense, or there is none; names the line and why.
    """
    found: list[TraceRequest] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = replace(_read_line(line, block_size), line=number)
        except ValueError as error:
            raise ConfigError(f"{name} line {number}: {error}; mend or remove the line") from error
        if found and request.arrival_s < found[-1].arrival_s:
            raise ConfigError(f"{name} line {number}: timestamp is before that of the line above; sort the trace")
        found.append(request)
    if not found:
        raise ConfigError(f"{name} holds no request; give one JSON object a line")
    return found


def _read_line(line: str, block_size: int) -> TraceRequest:
    try:
        values = json.loads(line)
    except RecursionError:
        raise ValueError("is nested too deeply to be a request") from None
    if not isinstance(values, dict):
        raise ValueError(f"is no JSON object but {line.strip():.40}")
    arrival = values.get("timestamp")
    if isinstance(arrival, bool) or not isinstance(arrival, int | float) or not 0 <= arrival <= _MOST_MS:
        raise ValueError(f"timestamp must be milliseconds from 0 to {_MOST_MS:.0e}, got {arrival!r:.40}")
    prompt, output = (_count(values, name) for name in ("input_length", "output_length"))
    ids = values.get("hash_ids")
    if not isinstance(ids, list) or not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise ValueError(f"hash_ids must be a list of whole numbers, got {ids!r:.40}")
    most = -(-prompt // block_size)
    if not prompt // block_size <= len(ids) <= most:
        raise ValueError(
            f"hash_ids has {len(ids)} ids where input_length={prompt} makes {most} blocks of {block_size} tokens"
        )
    if len(set(ids)) != len(ids):
        raise ValueError("hash_ids names a block twice, but an id stands for all before it too")
    return TraceRequest(arrival_s=arrival / 1e3, prompt_tokens=prompt, output_tokens=output, blocks=tuple(ids))


def _count(values: dict[str, object], name: str) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_TOKENS:
        raise ValueError(f"{name} must be a whole number from 1 to {_MOST_TOKENS:.0e}, got {value!r:.40}")
    return value


def reusable_tokens(trace: Sequence[TraceRequest], block_size: int, num_blocks: int | None = None) -> list[int]:
    """For each request in turn, the prompt tokens that one cache shared by all would hold already.

    Args:
        trace: in order of arrival.
        block_size: tokens of a block.
        num_blocks: room of the cache, which gives up what was used longest ago; None: without bounds.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    found = []
    for request in trace:
        blocks = request.full_blocks(block_size)
        depth = next((index for index, block in enumerate(blocks) if block not in cache), len(blocks))
        found.append(depth * block_size)
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        while num_blocks is not None and len(cache) > num_blocks:
            cache.popitem(last=False)
    return found


def scale_trace(trace: Sequence[TraceRequest], factor: float, *, requests: int) -> list[TraceRequest]:
    """The same users' behaviour at `factor` times the arrivals a second.

    Whole copies of the trace run side by side, each with blocks of its own as if from other users, so that the pauses
    within a session stay what they were; only the part of `factor` that is no whole number changes the clock. Each
    copy takes another window of the trace, so that they do not arrive in step.

    Args:
        trace: sorted by arrival.
        factor: over 0.
        requests: about how many to make; the windows are shortened for that.
    """
    copies = max(1, round(factor))
    length_s = trace[-1].arrival_s - trace[0].arrival_s
    window_s = length_s * min(1.0, requests / copies / len(trace))
    ids = {block for each in trace for block in each.blocks}
    distinct = 1 + max(ids, default=0) - min(ids, default=0)
    speed = factor / copies
    parts: list[TraceRequest] = []
    for copy in range(copies):
        start_s = trace[0].arrival_s + (length_s - window_s) * copy / max(copies - 1, 1)
        for each in _window(trace, start_s, window_s):
            blocks = tuple(block + copy * distinct for block in each.blocks)
            parts.append(replace(each, arrival_s=(each.arrival_s - start_s) / speed, blocks=blocks))
    return sorted(parts, key=lambda each: each.arrival_s)


def _window(trace: Sequence[TraceRequest], start_s: float, length_s: float) -> Iterator[TraceRequest]:
    return (each for each in trace if start_s <= each.arrival_s <= start_s + length_s)
