"""What drafts bring or cost, in slices: `python -m benchmarks.draft_slices MODEL [--rows 1 4 16] [--drafts 1]`.

Two engines of this process, one without drafts and one that drafts up to --drafts tokens, go on with the same prompts
in turns, --slice tokens a row at a time: without drafts; with the policy in charge; and with the policy asleep, on the
very ranks on which it is in charge in the slices beside. Between slices all rest and the engines' clocks stand still,
so that the policy sees nothing of it. What else the machine does falls on all, and neighbouring slices are compared.
Where an engine's memory lies makes some percent and does not change in its life: `awake` (the policy over its sleep) is
free of that, `asleep` (its sleep over no drafts) is not, so engines are opened anew --openings times, in either order;
--drafts 0 shows what is left. The policy begins knowing nothing: what it learns and its tries are counted. In slices
asleep the draft layer's KV is not kept, so drafts are right less often here than in `benchmarks.speculation`.
Prints a JSON line an opening and number of rows, each ratio of speeds with the standard error of its slices' mean.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from typing_extensions import override

from benchmarks.speculation import make_prompts
from cluster.config import EngineConfig
from cluster.engine import Engine, EngineEvent, EngineOutlets, Rejected
from cluster.plan import HandoffReady, KvTicket
from cluster.resolve import resolve_engine
from cluster.spawn import LocalReplica
from cluster.speculation import DraftPolicy
from router.errors import MoefleetError
from router.request import Request, RequestId, SamplingParams, TokenColumns, TokenEvent

REST_S = 0.004
"""Between slices: the step in flight ends, and threads of the other engine fall asleep."""


@dataclass(kw_only=True)
class Tokens:
    """What an engine gave out."""

    count: int = 0
    waiting: set[str] = field(default_factory=set)
    """Requests without a first token."""
    error: MoefleetError | None = None

    def take(self, events: list[EngineEvent]) -> None:
        """Count a step's tokens."""
        for event in events:
            match event:
                case TokenColumns():
                    self.count += len(event.token_ids)
                case TokenEvent():
                    self.count += event.token_id is not None
                    self.waiting.discard(event.request_id)
                case Rejected():
                    self.error = event.error

    def fail(self, error: MoefleetError) -> None:
        """The ranks are gone."""
        self.error = error


class SwitchedPolicy(DraftPolicy):
    """A policy that can be put to sleep; it does not learn of what happens meanwhile."""

    off = False

    @property
    @override
    def asleep(self) -> bool:
        """As the policy's own."""
        return self.off or super().asleep

    @override
    def choose(self, rows: int) -> int:
        """As the policy's own, none while asleep."""
        if self.off:
            self.keeps = False
            return 0
        return super().choose(rows)


class SlicedEngine:
    """An engine that this thread drives, slice by slice, and whose clock stands still in between."""

    def __init__(self, config: EngineConfig) -> None:
        self._resolved = resolve_engine(config)
        self._replica = LocalReplica(self._resolved)
        self._lost_s = 0.0
        """Time when others had the machine."""
        self._stopped_at: float | None = None
        self.tokens = Tokens()
        self._engine: Engine | None = None
        self._policy = SwitchedPolicy(0, adaptive=True)

    def begin(self, prompts: list[list[int]], max_new: int) -> None:
        """Compute the prompts, and some tokens behind them, as steps come one at a time."""
        self.tokens = Tokens(waiting={str(index) for index in range(len(prompts))})
        outlets = EngineOutlets(on_events=self.tokens.take, make_ticket=_no_ticket, on_failure=self.tokens.fail)
        limits = self._resolved.scheduler_config()
        self._policy = SwitchedPolicy(limits.draft_tokens, adaptive=True)
        self._engine = Engine(limits, self._replica.ranks, outlets, draft_policy=self._policy, clock=self._clock)
        sampling = SamplingParams(max_tokens=max_new, temperature=0.0)
        for index, prompt in enumerate(prompts):
            self._engine.submit(Request(id=RequestId(str(index)), prompt_ids=tuple(prompt), sampling=sampling))
        while self.tokens.waiting:
            self._turn()
        self._stopped_at = time.monotonic()

    def run(self, tokens: int, *, asleep: bool = False) -> tuple[int, float]:
        """Give out at least so many tokens more -> tokens and seconds that it took."""
        self._policy.off = asleep
        if self._stopped_at is not None:
            self._lost_s += time.monotonic() - self._stopped_at
            self._stopped_at = None
        first, began = self.tokens.count, time.monotonic()
        while self.tokens.count - first < tokens:
            self._turn()
        self._stopped_at = time.monotonic()
        return self.tokens.count - first, self._stopped_at - began

    def drafts(self) -> tuple[int, int]:
        """Drafts verified so far, and those that were right."""
        assert self._engine is not None
        stats = self._engine.stats()
        return stats.drafted_tokens, stats.accepted_tokens

    def end(self, rows: int) -> None:
        """Give up what was begun."""
        assert self._engine is not None
        for index in range(rows):
            self._engine.abort(RequestId(str(index)))
        while self._engine.turn():
            pass

    def close(self) -> None:
        """End the ranks."""
        self._replica.close()

    def _turn(self) -> None:
        assert self._engine is not None
        self._engine.turn()
        if self.tokens.error is not None:
            raise self.tokens.error

    def _clock(self) -> float:
        return time.monotonic() - self._lost_s


def _no_ticket(_: HandoffReady) -> KvTicket:
    raise AssertionError("no request asked for a hand-off")


Slices = list[tuple[int, float]]
"""Tokens and seconds of each."""
_PLAIN, _PLAIN_TOO, _ASLEEP, _AWAKE = range(4)
_ORDERS = (
    (_PLAIN, _ASLEEP, _PLAIN_TOO, _AWAKE),
    (_AWAKE, _PLAIN_TOO, _ASLEEP, _PLAIN),
    (_PLAIN_TOO, _AWAKE, _PLAIN, _ASLEEP),
    (_ASLEEP, _PLAIN, _AWAKE, _PLAIN_TOO),
)
"""Both engines give out as many tokens, side by side: what a step takes grows with the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Figures of two engines at one number of rows."""

    rows: int
    awake: tuple[float, float]
    """The policy in charge over the policy asleep on the same ranks: of all tokens over all time, standard error."""
    asleep: tuple[float, float]
    """The policy asleep over the engine without drafts."""
    together: tuple[float, float]
    """The policy in charge over the engine without drafts."""
    rounds: int
    drafted: int
    accepted: int
    rounds_before_drafts: int | None


def compare(plain: SlicedEngine, drafting: SlicedEngine, args: argparse.Namespace, rows: int) -> Found:
    """Slices in turns, in an order that changes."""
    prompts = make_prompts(args.model, None, rows, unseen=args.unseen)
    rounds = args.new // args.slice
    for engine in (plain, drafting):
        # No row is to end before the last slice, not even one whose drafts are all right.
        engine.begin(prompts, 2 * (args.new + rounds) * (1 + args.drafts) + 64)
    spent: list[Slices] = [[], [], [], []]
    before: int | None = None
    for round_ in range(rounds):
        for kind in _ORDERS[round_ % len(_ORDERS)]:
            engine = drafting if kind in (_ASLEEP, _AWAKE) else plain
            time.sleep(REST_S)
            spent[kind].append(engine.run(args.slice * rows, asleep=kind == _ASLEEP))
        before = round_ if before is None and drafting.drafts()[0] else before
    drafted, accepted = drafting.drafts()
    for engine in (plain, drafting):
        engine.end(rows)
    return Found(
        rows=rows,
        awake=_ratio(spent[_AWAKE], spent[_ASLEEP]),
        asleep=_ratio(spent[_ASLEEP], spent[_PLAIN]),
        together=_ratio(spent[_AWAKE], spent[_PLAIN_TOO]),
        rounds=rounds,
        drafted=drafted,
        accepted=accepted,
        rounds_before_drafts=before,
    )


def _ratio(ours: Slices, theirs: Slices) -> tuple[float, float]:
    """Of speeds, with the standard error that the slices' ratios have."""
    ratios = [(a / b) / (c / d) for (a, b), (c, d) in zip(ours, theirs, strict=True)]
    return round(_speed(ours) / _speed(theirs), 4), round(statistics.stdev(ratios) / len(ratios) ** 0.5, 4)


def _speed(slices: Slices) -> float:
    return sum(tokens for tokens, _ in slices) / sum(seconds for _, seconds in slices)


def opened(args: argparse.Namespace, opening: int) -> tuple[SlicedEngine, SlicedEngine]:
    """The engine without drafts and the other, loaded in either order."""

    def make(drafts: int) -> SlicedEngine:
        config = EngineConfig(
            model=args.model,
            dtype=args.dtype,
            threads=args.threads,
            max_rows=max(args.rows),
            prefix_cache=False,
            kv_memory_bytes=args.kv_memory << 20,
            draft_tokens=drafts,
        )
        return SlicedEngine(config)

    makers: list[Callable[[], SlicedEngine]] = [lambda: make(0), lambda: make(args.drafts)]
    if opening % 2:
        second, first = makers[1](), makers[0]()
        return first, second
    return makers[0](), makers[1]()


def main() -> None:
    """Print a line an opening and number of rows, and the median over openings."""
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--unseen", action="store_true", help="conversations that the demo's models have not seen")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--drafts", type=int, default=1)
    parser.add_argument("--new", type=int, default=2048, help="tokens a row")
    parser.add_argument("--slice", type=int, default=32, help="tokens a row in one go")
    parser.add_argument("--openings", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-memory", type=int, default=256, help="MiB of each engine")
    args = parser.parse_args()
    if args.new < 2 * args.slice:
        parser.error(f"--new {args.new}: give at least two slices, {2 * args.slice}")
    found: list[Found] = []
    for opening in range(args.openings):
        engines = opened(args, opening)
        for rows in args.rows:
            found.append(compare(*engines, args, rows))
            print(json.dumps({"opening": opening} | asdict(found[-1])), flush=True)
        for engine in engines:
            engine.close()
    for rows in args.rows:
        of_rows = [one for one in found if one.rows == rows]
        medians = {
            name: round(statistics.median(getattr(one, name)[0] for one in of_rows), 4)
            for name in ("awake", "asleep", "together")
        }
        print(json.dumps({"median of openings": args.openings, "rows": rows} | medians))


if __name__ == "__main__":
    main()
