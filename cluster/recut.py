"""Which bytes of which source rank go where: from one cache layout to another, whatever tp and block size of either.

Heads are contiguous inside a block or slot, so that what a destination rank needs of a source rank is one run of
bytes in every row of a pool; between blocks of different sizes it is one run a head. Pure: geometry in, fragments out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.plan import KvLayout
from router.errors import HandoffError
from shards.cache import CacheShape, Pool

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

MAX_ROWS = 1024
"""Of a fragment: as many pieces as the system sends or receives in one call."""
_MUST_AGREE = {
    "version": "run one release of the software on both pools",
    "fingerprint": "serve both pools from one checkpoint",
    "dtype": "serve both pools with one dtype",
    "state_dtype": "serve both pools with one state_dtype",
    "expert_weights": "serve both pools with one expert_weights",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Runs of num_bytes bytes, one at each of `offsets`, in a rank's flat cache buffer."""

    offsets: IntArray
    """[rows]"""
    num_bytes: int
    """Of each."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows together."""
        return self.num_bytes * len(self.offsets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """One copy: as many rows of the same length on both sides."""

    source: int
    """tp rank of the source."""
    src: Rows
    dst: Rows
    layer: int = 0
    """Attention layer whose KV it is; 0 of states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvMove:
    """Positions `first` up to `end` of a sequence: from all its blocks at the source to their own blocks here."""

    first: int
    """A multiple of the destination's block size."""
    end: int
    src_blocks: Sequence[int]
    """Source blocks from position 0 on."""
    dst_blocks: Sequence[int]
    """Destination blocks from position `first` on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """The bytes of each row of a source pool that a row of a destination pool takes."""

    source: int
    src_pool: Pool
    src_start: int
    """Bytes into the row."""
    dst_pool: Pool
    dst_start: int
    num_bytes: int
    heads: int
    """Runs of equal length that num_bytes is made of."""
    layer: int = 0
    """As the fragment's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """Part of a row that holds heads in order, head_bytes each, on both sides."""

    heads: range
    """Those to copy; the other two are those held."""
    src_heads: range
    dst_heads: range
    head_bytes: int
    """At the source."""
    dst_head_bytes: int

    def cut(
        self, source: int, src_pool: Pool, dst_pool: Pool, *, src_at: int = 0, dst_at: int = 0, layer: int = 0
    ) -> _Cut:
        """The copy of `heads` where the section begins src_at and dst_at bytes into the rows."""
        return _Cut(
            source=source,
            src_pool=src_pool,
            src_start=src_at + (self.heads.start - self.src_heads.start) * self.head_bytes,
            dst_pool=dst_pool,
            dst_start=dst_at + (self.heads.start - self.dst_heads.start) * self.dst_head_bytes,
            num_bytes=len(self.heads) * self.head_bytes,
            heads=len(self.heads),
            layer=layer,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recut:
    """How one destination rank's cache is filled from the ranks of a source lane."""

    per_block: tuple[_Cut, ...]
    per_slot: tuple[_Cut, ...]


def check_pair(source: KvLayout, dest: KvLayout) -> None:
    """Whether KV can move from one layout to the other at all.

    Raises:
        HandoffError: format version, model or a dtype differ; names both sides.
    """
    for name, remedy in _MUST_AGREE.items():
        theirs, ours = getattr(source, name), getattr(dest, name)
        if theirs != ours:
            raise HandoffError(f"hand-off: the source has {name}={theirs}, this member {name}={ours}; {remedy}")


def recut(sources: Sequence[CacheShape], dest: CacheShape, dest_tp_rank: int) -> Recut:
    """Cut the caches of a source lane (by tp rank) for one destination rank.

    Where KV heads are replicated over source ranks, destination ranks spread over the replicas.

    Raises:
        HandoffError: the source ranks together do not hold what the destination needs.
    """
    per_block: list[_Cut] = []
    per_slot: list[_Cut] = []
    for source, heads in _cover([shape.kv_heads for shape in sources], dest.kv_heads, dest_tp_rank):
        shape = sources[source]
        layers = [*range(len(dest.k_pools)), *range(len(dest.v_pools))]
        pools = zip(shape.k_pools + shape.v_pools, dest.k_pools + dest.v_pools, layers, strict=True)
        for src_pool, dst_pool, layer in pools:
            section = _Section(
                heads=heads,
                src_heads=shape.kv_heads,
                dst_heads=dest.kv_heads,
                head_bytes=src_pool.row_bytes // src_pool.shape[1],
                dst_head_bytes=dst_pool.row_bytes // dst_pool.shape[1],
            )
            per_block.append(section.cut(source, src_pool, dst_pool, layer=layer))
    for source, heads in _cover([shape.key_heads for shape in sources], dest.key_heads, dest_tp_rank):
        per_slot += _state_cuts(source, sources[source], dest, heads)
    return Recut(per_block=tuple(per_block), per_slot=tuple(per_slot))


def _cover(held: Sequence[range], wanted: range, spread: int) -> Iterator[tuple[int, range]]:
    """Pieces of `wanted` with the source that gives each; of several that hold a piece, number `spread` modulo them."""
    at = wanted.start
    while at < wanted.stop:
        holders = [source for source, heads in enumerate(held) if at in heads]
        if not holders:
            raise HandoffError(f"hand-off: head {at} is held by none of the {len(held)} source ranks; check the ticket")
        source = holders[spread % len(holders)]
        stop = min(held[source].stop, wanted.stop)
        yield source, range(at, stop)
        at = stop


def _state_cuts(source: int, src: CacheShape, dst: CacheShape, heads: range) -> Iterator[_Cut]:
    """Conv and delta states of the key heads `heads`, each with its value heads, of every delta layer."""
    for src_conv, dst_conv, src_delta, dst_delta in zip(
        src.conv_states, dst.conv_states, src.delta_states, dst.delta_states, strict=True
    ):
        _, value_heads, key_dim, value_dim = dst_delta.shape
        ratio = value_heads // len(dst.key_heads)
        head_bytes = dst_delta.row_bytes // value_heads * ratio
        yield _state_section(heads, src, dst, head_bytes).cut(source, src_delta, dst_delta)
        channel_bytes = dst_conv.row_bytes // dst_conv.shape[1]
        src_at = dst_at = 0
        for width in (key_dim, key_dim, ratio * value_dim):
            unit = width * channel_bytes
            section = _state_section(heads, src, dst, unit)
            yield section.cut(source, src_conv, dst_conv, src_at=src_at, dst_at=dst_at)
            src_at += unit * len(src.key_heads)
            dst_at += unit * len(dst.key_heads)


def _state_section(heads: range, src: CacheShape, dst: CacheShape, head_bytes: int) -> _Section:
    return _Section(
        heads=heads,
        src_heads=src.key_heads,
        dst_heads=dst.key_heads,
        head_bytes=head_bytes,
        dst_head_bytes=head_bytes,
    )


def fragments(cuts: Recut, move: KvMove, slots: tuple[int, int] | None, *, max_bytes: int) -> list[Fragment]:
    """The copies that move the KV of some positions and a state slot.

    Args:
        cuts: from `recut`.
        move: which positions; of blocks of one size whole blocks are copied.
        slots: source and destination state slot; None for models without states.
        max_bytes: largest fragment; larger ones are split.

    Raises:
        HandoffError: a block or slot lies outside of its pool.
    """
    out: list[Fragment] = []
    runs = _block_runs(cuts, move)
    for cut in cuts.per_block:
        for run in runs:
            out += _split(_fragment(cut, run), max_bytes)
    if slots is not None:
        run = _Run(src=np.array(slots[:1], np.int64), dst=np.array(slots[1:], np.int64))
        for cut in cuts.per_slot:
            out += _split(_fragment(cut, run), max_bytes)
    return out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """Rows of both pools: whole ones, or where `tokens` is set as many positions of each."""

    src: IntArray
    dst: IntArray
    src_token: IntArray = field(default_factory=lambda: np.zeros(1, np.int64))
    """First position inside of each source block."""
    dst_token: IntArray = field(default_factory=lambda: np.zeros(1, np.int64))
    tokens: int = 0


def _block_runs(cuts: Recut, move: KvMove) -> list[_Run]:
    if not cuts.per_block or move.first >= move.end:
        return []
    src_size, dst_size = (pool.shape[2] for pool in (cuts.per_block[0].src_pool, cuts.per_block[0].dst_pool))
    held = min(len(move.src_blocks) * src_size, move.first + len(move.dst_blocks) * dst_size)
    if move.first % dst_size or move.end > held:
        raise HandoffError(
            f"hand-off: positions {move.first}..{move.end - 1} do not lie in {len(move.src_blocks)} source blocks of "
            f"{src_size} and {len(move.dst_blocks)} blocks of {dst_size}; the ticket does not belong to this layout"
        )
    src_blocks, dst_blocks = np.array(move.src_blocks, np.int64), np.array(move.dst_blocks, np.int64)
    if src_size == dst_size:
        wanted = src_blocks[move.first // src_size : -(-move.end // src_size)]
        return [_Run(src=wanted, dst=dst_blocks[: len(wanted)])]
    # Cut where a block of either side begins; pieces of one length go together.
    starts = {move.first, *range(move.first, move.end, dst_size)}
    starts.update(range(-(-move.first // src_size) * src_size, move.end, src_size))
    at = np.array(sorted(starts), np.int64)
    lengths = np.diff(at, append=move.end)
    runs = []
    for tokens in sorted(set(lengths.tolist())):
        part = at[lengths == tokens]
        runs.append(
            _Run(
                src=src_blocks[part // src_size],
                dst=dst_blocks[(part - move.first) // dst_size],
                src_token=part % src_size,
                dst_token=part % dst_size,
                tokens=tokens,
            )
        )
    return runs


def _fragment(cut: _Cut, run: _Run) -> Fragment:
    for what, rows, pool in (("source", run.src, cut.src_pool), ("destination", run.dst, cut.dst_pool)):
        outside = rows[(rows < 0) | (rows >= pool.shape[0])]
        if len(outside):
            raise HandoffError(
                f"hand-off: {what} row {outside[0]} lies outside of a pool of {pool.shape[0]}; "
                "the ticket does not belong to this layout"
            )
    src = _rows(cut, cut.src_pool, cut.src_start, run.src, run.src_token, run.tokens)
    dst = _rows(cut, cut.dst_pool, cut.dst_start, run.dst, run.dst_token, run.tokens)
    return Fragment(source=cut.source, src=src, dst=dst, layer=cut.layer)


def _rows(cut: _Cut, pool: Pool, start: int, blocks: IntArray, first: IntArray, tokens: int) -> Rows:
    """A cut of whole blocks, or of `tokens` positions of each: then a row a head."""
    offsets = pool.offset_bytes + blocks * pool.row_bytes + start
    if not tokens:
        return Rows(offsets=offsets, num_bytes=cut.num_bytes)
    head_bytes = pool.row_bytes // pool.shape[1]
    token_bytes = head_bytes // pool.shape[2]
    heads = np.arange(cut.heads, dtype=np.int64) * head_bytes
    offsets = (offsets + first * token_bytes)[:, None] + heads
    return Rows(offsets=offsets.ravel(), num_bytes=tokens * token_bytes)


def _split(fragment: Fragment, max_bytes: int) -> Iterator[Fragment]:
    """Pieces of at most max_bytes and MAX_ROWS: fewer rows, or parts of rows where one row is larger."""
    size, count = fragment.src.num_bytes, len(fragment.src.offsets)
    width = min(size, max_bytes)
    rows = min(max(1, max_bytes // size), MAX_ROWS)
    for start in range(0, size, width):
        for row in range(0, count, rows):
            yield replace(
                fragment,
                src=_part(fragment.src, slice(row, row + rows), start, min(width, size - start)),
                dst=_part(fragment.dst, slice(row, row + rows), start, min(width, size - start)),
            )


def _part(rows: Rows, which: slice, start: int, num_bytes: int) -> Rows:
    return Rows(offsets=rows.offsets[which] + start, num_bytes=num_bytes)
