"""Writes a made-up request trace for `moefleet simulate`: `python -m benchmarks.make_trace --kind agents > FILE`.

Kinds: `agents`, tools that call the model in quick turns behind one of a few long system prompts, each turn's prompt
the whole talk so far; `documents`, questions about long documents, few of which are asked about often, behind no common
beginning; `shared`, unrelated short questions behind one of a few very long system prompts.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from itertools import count
from typing import Final

_BLOCK: Final = 512


class _Blocks:
    """Ids of blocks that no other prompt has."""

    def __init__(self) -> None:
        self._next = count()

    def fresh(self, number: int) -> list[int]:
        """So many."""
        return [next(self._next) for _ in range(number)]


def _line(at_s: float, blocks: list[int], output: int, rng: random.Random) -> dict[str, object]:
    """A request whose last block is not full."""
    tokens = _BLOCK * (len(blocks) - 1) + rng.randrange(1, _BLOCK)
    return {"timestamp": round(1e3 * at_s), "input_length": tokens, "output_length": output, "hash_ids": blocks}


def agents(rng: random.Random, sessions: int, length_s: float) -> Iterator[dict[str, object]]:
    """Sessions of 5 to 40 turns, some seconds apart, behind one of 8 system prompts of 4 to 24 blocks."""
    blocks = _Blocks()
    systems = [blocks.fresh(rng.randrange(4, 25)) for _ in range(8)]
    for _ in range(sessions):
        at_s, talk = rng.uniform(0, length_s), list(rng.choice(systems))
        for _ in range(rng.randrange(5, 41)):
            talk += blocks.fresh(rng.choice((1, 1, 2, 6)))
            yield _line(at_s, [*talk, *blocks.fresh(1)], rng.choice((40, 80, 400)), rng)
            at_s += rng.expovariate(1 / 8) + 2.0


def documents(rng: random.Random, sessions: int, length_s: float) -> Iterator[dict[str, object]]:
    """One to three questions a session about one of 2000 documents of 8 to 120 blocks, by Zipf's law."""
    blocks = _Blocks()
    texts = [blocks.fresh(rng.randrange(8, 121)) for _ in range(2000)]
    weights = [1 / rank for rank in range(1, len(texts) + 1)]
    for text in rng.choices(texts, weights, k=sessions):
        at_s = rng.uniform(0, length_s)
        for _ in range(rng.randrange(1, 4)):
            yield _line(at_s, [*text, *blocks.fresh(1)], rng.randrange(50, 500), rng)
            at_s += rng.expovariate(1 / 30)


def shared(rng: random.Random, sessions: int, length_s: float) -> Iterator[dict[str, object]]:
    """Single questions of 1 to 4 blocks behind one of 20 system prompts of 20 to 60 blocks."""
    blocks = _Blocks()
    systems = [blocks.fresh(rng.randrange(20, 61)) for _ in range(20)]
    for _ in range(sessions):
        prompt = [*rng.choice(systems), *blocks.fresh(rng.randrange(1, 5))]
        yield _line(rng.uniform(0, length_s), prompt, rng.randrange(20, 300), rng)


_KINDS: Final[dict[str, Callable[[random.Random, int, float], Iterator[dict[str, object]]]]] = {
    "agents": agents,
    "documents": documents,
    "shared": shared,
}


def main() -> None:
    """Print the trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=_KINDS, required=True)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="in which sessions begin")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    lines = _KINDS[given.kind](random.Random(given.seed), given.sessions, given.seconds)
    for line in sorted(lines, key=lambda each: str(each["timestamp"]).zfill(12)):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
