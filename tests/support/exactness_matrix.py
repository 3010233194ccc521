"""The exactness matrix: models, layouts and ways to serve the same prompts, each held against the yardstick."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

from cluster.config import DeterministicChoice, EngineConfig, KernelChoice
from cluster.engine import Engine, EngineEvent, EngineOutlets, Rejected, TicketReady
from cluster.engine_stats import EngineStats
from cluster.executor import RankGroup
from cluster.resolve import ResolvedEngine, resolve_engine
from cluster.spawn import LocalReplica
from cluster.ticket import ticket_maker
from router.request import MemberId, Request, RequestId, TokenEvent
from shards.mesh import Layout
from tests.support.events import one_by_one
from tests.support.exactness import (
    LOGPROB_TOLERANCE,
    MOST_TIES,
    Difference,
    Reference,
    check_against,
    make_prompts,
    make_requests,
    same_bits,
)
from tests.support.fork_server import fork_server

ARCHITECTURES = ("qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to serve the prompts."""

    name: str
    chunk: int | None = None
    alone: bool = False
    """One request after the other, each with an engine (and prefix cache) of its own."""
    repeat: bool = False
    """All prompts twice on one engine; the second time's results count."""
    num_blocks: int | None = None
    """Blocks a lane: so few that sequences are preempted."""


CASES = (
    Case(name="together, whole prompts"),
    Case(name="chunk 1", chunk=1),
    Case(name="chunk 7", chunk=7),
    Case(name="chunk 64", chunk=64),
    Case(name="alone", alone=True),
    Case(name="prefix cache hit", repeat=True),
    Case(name="preempted", num_blocks=16),
)
FEW_CASES = tuple(case for case in CASES if case.name in ("together, whole prompts", "chunk 7", "preempted"))

LAYOUTS = (
    Layout(tp=2),
    Layout(dp=2),
    Layout(tp=2, ep=2),
    Layout(dp=2, ep=2),
    Layout(tp=2, dp=2),
    Layout(tp=2, dp=2, ep=4),
)

VARIETY: Mapping[str, Mapping[str, object]] = {
    "6 heads, 2 kv heads": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
    "tied embeddings": {"tie_word_embeddings": True},
    "YaRN": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}
"""Of every family."""

_DENSE_LAYERS: Mapping[str, Mapping[str, object]] = {
    "dense layers (mlp_only_layers)": {"mlp_only_layers": [1, 2]},
    "dense layers (decoder_sparse_step 2)": {"decoder_sparse_step": 2},
}
_OWN_VARIETY: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "qwen2_moe": {
        **_DENSE_LAYERS,
        "top-k renormalised, no bias": {"norm_topk_prob": True, "qkv_bias": False},
        "sliding_window without use": {"sliding_window": 8, "max_window_layers": 2},
    },
    "qwen3": {"attention bias": {"attention_bias": True}},
    "qwen3_moe": {**_DENSE_LAYERS, "top-k not renormalised": {"norm_topk_prob": False}},
    "qwen3_next": {
        **_DENSE_LAYERS,
        "top-k not renormalised": {"norm_topk_prob": False},
        "no shared expert": {"shared_expert_intermediate_size": 0},
        "dense layers, YaRN": {"mlp_only_layers": [1], **VARIETY["YaRN"]},
    },
    "qwen3_5_moe_text": {"attention bias": {"attention_bias": True}},
}


def varieties(architecture: str) -> dict[str, Mapping[str, object]]:
    """Config changes to try with a family, each by itself."""
    return {**VARIETY, **_OWN_VARIETY[architecture]}


def layouts(architecture: str) -> list[Layout]:
    """The layouts of several ranks that a family can have; without experts there are none to spread."""
    return [layout for layout in LAYOUTS if layout.ep == 1 or architecture != "qwen3"]


def engine_config(
    model: Path,
    layout: Layout,
    *,
    kernels: KernelChoice = "auto",
    deterministic: DeterministicChoice = "auto",
) -> EngineConfig:
    """A small float32 engine with room for all prompts."""
    return EngineConfig(
        model=model,
        layout=layout,
        dtype="float32",
        kernels=kernels,
        deterministic=deterministic,
        kv_memory_bytes=8 << 20,
        max_rows=16,
        max_step_tokens=512,
        threads=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What came of serving requests: events by request, in order, and the engine's counters."""

    events: list[list[TokenEvent]]
    stats: EngineStats


class Serving:
    """One engine over loaded ranks. A context manager; the ranks stay up behind it."""

    def __init__(
        self,
        engine: ResolvedEngine,
        ranks: RankGroup,
        *,
        member: str = "test",
        chunk: int | None = None,
        num_blocks: int | None = None,
    ) -> None:
        limits = engine.scheduler_config()
        limits = replace(limits, chunk_tokens=chunk or limits.chunk_tokens, num_blocks=num_blocks or limits.num_blocks)
        self.arrived: SimpleQueue[list[EngineEvent]] = SimpleQueue()
        make_ticket = ticket_maker(MemberId(member), engine.kv_layout(), ranks.sources)
        outlets = EngineOutlets(on_events=self.arrived.put, make_ticket=make_ticket, on_failure=lambda _: None)
        self.engine = Engine(limits, ranks, outlets, member_id=MemberId(member))

    def __enter__(self) -> "Serving":
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.halt()

    def serve(self, requests: Sequence[Request]) -> list[list[TokenEvent]]:
        """Serve requests together -> each one's events, in order."""
        for request in requests:
            self.engine.submit(request)
        found, _ = self.collect([request.id for request in requests])
        return [found[request.id] for request in requests]

    def collect(
        self, ids: Sequence[RequestId]
    ) -> tuple[dict[RequestId, list[TokenEvent]], dict[RequestId, TicketReady]]:
        """Wait until each of these requests has ended or is prefilled."""
        found: dict[RequestId, list[TokenEvent]] = {request_id: [] for request_id in ids}
        tickets: dict[RequestId, TicketReady] = {}
        waiting = set(ids)
        while waiting:
            for event in one_by_one(self.arrived.get(timeout=120)):
                if isinstance(event, Rejected):
                    raise event.error
                if isinstance(event, TicketReady):
                    tickets[event.request_id] = event
                    waiting.discard(event.request_id)
                    continue
                assert event.finish != "error", event.error
                found[event.request_id].append(event)
                if event.finish is not None:
                    waiting.discard(event.request_id)
        return found, tickets


def run_case(engine: ResolvedEngine, ranks: RankGroup, case: Case, requests: Sequence[Request]) -> Served:
    """Serve the requests as the case says."""
    if case.alone:
        parts = [run_case(engine, ranks, Case(name=case.name), [request]) for request in requests]
        return Served(events=[part.events[0] for part in parts], stats=parts[0].stats)
    with Serving(engine, ranks, chunk=case.chunk, num_blocks=case.num_blocks) as serving:
        if case.repeat:
            serving.serve([replace(request, id=RequestId(f"{request.id}-before")) for request in requests])
        events = serving.serve(requests)
        return Served(events=events, stats=serving.engine.stats())


@contextmanager
def replica(config: EngineConfig, *, handoff: bool = False) -> Iterator[tuple[ResolvedEngine, RankGroup]]:
    """Loaded ranks of one layout."""
    engine = resolve_engine(config)
    with LocalReplica(engine, handoff=handoff, context=fork_server()) as opened:
        yield engine, opened.ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the matrix."""

    model: str
    layout: Layout
    case: str
    prompts: int
    exact: int
    """Prompts whose tokens are all the reference's."""
    ties: tuple[Difference, ...]
    wrong: tuple[Difference, ...]
    logprob_error: float
    deterministic: bool
    bitwise: bool | None
    """Whether tokens and log probabilities equal those of the first row bit for bit; None where not asked."""
    note: str = ""


def run_matrix(
    name: str,
    model: Path,
    reference: Reference,
    layout: Layout,
    cases: Sequence[Case],
    *,
    baseline: list[list[TokenEvent]] | None = None,
    kernels: KernelChoice = "auto",
) -> tuple[list[Row], list[list[TokenEvent]]]:
    """All cases of one layout -> rows, and the first case's events; bits are compared with `baseline`'s."""
    prompts = make_prompts(int(reference.model.config.vocab_size))
    requests = make_requests(prompts)
    rows: list[Row] = []
    first: list[list[TokenEvent]] = []
    with replica(engine_config(model, layout, kernels=kernels)) as (engine, ranks):
        for case in cases:
            served = run_case(engine, ranks, case, requests)
            first = first or served.events
            ties, wrong, error = check_against(reference, requests, served.events)
            compared = baseline or first
            rows.append(
                Row(
                    model=name,
                    layout=layout,
                    case=case.name,
                    prompts=len(prompts),
                    exact=len(prompts) - len(ties) - len(wrong),
                    ties=tuple(ties),
                    wrong=tuple(wrong),
                    logprob_error=error,
                    deterministic=engine.deterministic,
                    bitwise=same_bits(compared, served.events),
                    note=_note(case, served, engine),
                )
            )
    return rows, first


def _note(case: Case, served: Served, engine: ResolvedEngine) -> str:
    if case.num_blocks is not None:
        return f"{served.stats.preemptions} preemptions"
    if case.repeat:
        return f"{served.stats.cached_tokens} cached tokens" if engine.config.prefix_cache else "no prefix cache"
    return ""


def describe(layout: Layout) -> str:
    """A layout in a few letters."""
    return f"tp {layout.tp} dp {layout.dp} ep {layout.ep}"


def as_markdown(rows: Sequence[Row]) -> str:
    """The matrix as a Markdown table."""
    lines = [
        "| model | layout | case | exact | ties | wrong | logprob error | bits as first | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bits = {True: "same", False: "differ", None: ""}[row.bitwise]
        lines.append(
            f"| {row.model} | {describe(row.layout)} | {row.case} | {row.exact}/{row.prompts} | {len(row.ties)} | "
            f"{len(row.wrong)} | {row.logprob_error:.1e} | {bits} | {row.note} |"
        )
    ties = [f"- {row.model}, {describe(row.layout)}, {row.case}: {tie}" for row in rows for tie in row.ties]
    return "\n".join([*lines, "", *(["Accepted ties:", *ties] if ties else ["No ties."]), ""])


def check_rows(rows: Sequence[Row], *, bitwise: bool = True) -> None:
    """Print the rows, and fail unless each is exact but for rare ties.

    Args:
        bitwise: demand the baseline's bits of rows in deterministic mode.
    """
    sys.stdout.write(as_markdown(rows))
    for row in rows:
        assert not row.wrong, f"{row.case}: {'; '.join(map(str, row.wrong))}"
        assert len(row.ties) <= MOST_TIES, f"{row.case}: {'; '.join(map(str, row.ties))}"
        assert row.logprob_error < LOGPROB_TOLERANCE
        if bitwise and row.deterministic:
            assert row.bitwise, f"{row.case}: tokens or log probabilities differ from those of one rank"
        if row.case == "preempted":
            assert row.note != "0 preemptions"
        if row.case == "prefix cache hit":
            assert row.note != "0 cached tokens"
