"""Plans and answers as plain lists for the wire, and back. Decoding refuses anything of another shape."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from cluster.plan import KvLayout, KvTicket, PullDone, PullOrder, SourceRank
from router.errors import CorruptDataError
from shards.batch import LaneOutput, LogprobColumns, RowSampling, RowStart, StepBatch

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWork:
    """One rank's part of a StepPlan."""

    step: int
    answers: bool
    """Whether lane leaders answer: some lane has rows, not necessarily this one. The ranks step in any case."""
    batch: StepBatch
    pulls: tuple[PullOrder, ...] = ()


def as_list(value: object, length: int | None = None) -> list[object]:
    """The value as a list of `length` fields (any if None), or CorruptDataError."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise CorruptDataError(f"expected a list of {length or 'any'} fields, got {type(value).__name__}")
    return value


def as_typed(value: object, kind: type[T]) -> T:
    """The value if it is exactly of this type, or CorruptDataError."""
    if type(value) is not kind:
        raise CorruptDataError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _ints(value: object) -> list[int]:
    items = as_list(value)
    if not all(type(item) is int for item in items):
        raise CorruptDataError("expected a list of whole numbers")
    return cast("list[int]", items)


def _floats(value: object) -> list[float]:
    items = as_list(value)
    if not all(type(item) is float for item in items):
        raise CorruptDataError("expected a list of numbers")
    return cast("list[float]", items)


def _optional_int(value: object) -> int | None:
    return None if value is None else as_typed(value, int)


def _many(value: object, decode: Callable[[object], T]) -> tuple[T, ...]:
    return tuple(decode(item) for item in as_list(value))


def encode_work(work: RankWork) -> list[object]:
    """RankWork as a message of kind "work"."""
    batch = work.batch
    columns = [
        batch.restore_from,
        batch.restore_to,
        batch.grown_rows,
        batch.grown_blocks,
        batch.rows_S,
        batch.first_S,
        batch.counts_S,
        batch.samples_S,
        batch.verifies_S,
        batch.drafts_S,
        batch.save_rows,
        batch.save_ends,
        batch.save_to,
    ]
    starts = [_encode_start(start) for start in batch.starts]
    pulls = [encode_pull_order(order) for order in work.pulls]
    return ["work", work.step, work.answers, batch.keeps_mtp, starts, columns, pulls]


def decode_work(message: object) -> RankWork:
    """The inverse of `encode_work`.

    Raises:
        CorruptDataError: the message is no RankWork.
    """
    _, step, answers, keeps_mtp, starts, columns, pulls = as_list(message, 7)
    batch = replace(_decode_batch(starts, columns), keeps_mtp=as_typed(keeps_mtp, bool))
    return RankWork(
        step=as_typed(step, int),
        answers=as_typed(answers, bool),
        batch=batch,
        pulls=_many(pulls, decode_pull_order),
    )


def _decode_batch(starts: object, columns: object) -> StepBatch:
    restore_from, restore_to, grown_rows, grown_blocks, *rest = (_ints(column) for column in as_list(columns, 13))
    rows, first, counts, samples, verifies, drafts, save_rows, save_ends, save_to = rest
    # These two are left out where no row has any.
    groups = (restore_from, restore_to), (grown_rows, grown_blocks), (rows, first, counts, samples, verifies or rows)
    more = (rows, drafts or rows), (save_rows, save_ends, save_to)
    if any(len({len(column) for column in group}) > 1 for group in (*groups, *more)):
        raise CorruptDataError("columns of a batch differ in length")
    return StepBatch(
        starts=_many(starts, _decode_start),
        restore_from=restore_from,
        restore_to=restore_to,
        grown_rows=grown_rows,
        grown_blocks=grown_blocks,
        rows_S=rows,
        first_S=first,
        counts_S=counts,
        samples_S=samples,
        verifies_S=verifies,
        drafts_S=drafts,
        save_rows=save_rows,
        save_ends=save_ends,
        save_to=save_to,
    )


def _encode_start(start: RowStart) -> list[object]:
    sampling = start.sampling
    return [
        start.row,
        start.token_ids,
        start.prompt_len,
        start.blocks,
        start.num_stored,
        start.state_slot,
        [
            float(sampling.temperature),
            float(sampling.top_p),
            sampling.top_k,
            float(sampling.min_p),
            float(sampling.presence_penalty),
            float(sampling.frequency_penalty),
            float(sampling.repetition_penalty),
            [[token, float(bias)] for token, bias in sampling.logit_bias],
            sampling.seed,
            sampling.min_tokens,
            sampling.stop_token_ids,
            sampling.logprobs,
            sampling.prompt_logprobs,
        ],
    ]


def _decode_start(value: object) -> RowStart:
    row, token_ids, prompt_len, blocks, num_stored, state_slot, sampling = as_list(value, 7)
    return RowStart(
        row=as_typed(row, int),
        token_ids=tuple(_ints(token_ids)),
        prompt_len=as_typed(prompt_len, int),
        blocks=tuple(_ints(blocks)),
        num_stored=as_typed(num_stored, int),
        state_slot=as_typed(state_slot, int),
        sampling=_decode_sampling(as_list(sampling, 13)),
    )


def _decode_sampling(fields: list[object]) -> RowSampling:
    pairs = [as_list(pair, 2) for pair in as_list(fields[7])]
    return RowSampling(
        temperature=as_typed(fields[0], float),
        top_p=as_typed(fields[1], float),
        top_k=as_typed(fields[2], int),
        min_p=as_typed(fields[3], float),
        presence_penalty=as_typed(fields[4], float),
        frequency_penalty=as_typed(fields[5], float),
        repetition_penalty=as_typed(fields[6], float),
        logit_bias=tuple((as_typed(token, int), as_typed(bias, float)) for token, bias in pairs),
        seed=as_typed(fields[8], int),
        min_tokens=as_typed(fields[9], int),
        stop_token_ids=tuple(_ints(fields[10])),
        logprobs=_optional_int(fields[11]),
        prompt_logprobs=_optional_int(fields[12]),
    )


def encode_source_rank(source: SourceRank) -> list[object]:
    """SourceRank as a list."""
    return [source.tp_rank, source.host_key, source.pid, source.pool_fd, source.address]


def decode_source_rank(value: object) -> SourceRank:
    """The inverse of `encode_source_rank`.

    Raises:
        CorruptDataError: the value is no SourceRank.
    """
    tp_rank, host_key, pid, pool_fd, address = as_list(value, 5)
    return SourceRank(
        tp_rank=as_typed(tp_rank, int),
        host_key=as_typed(host_key, str),
        pid=as_typed(pid, int),
        pool_fd=as_typed(pool_fd, int),
        address=as_typed(address, str),
    )


def encode_ticket(ticket: KvTicket) -> list[object]:
    """KvTicket as a list."""
    layout = ticket.layout
    return [
        ticket.id,
        ticket.member_id,
        [
            layout.fingerprint,
            layout.tp,
            layout.block_size,
            layout.num_blocks,
            layout.num_slots,
            layout.dtype,
            layout.state_dtype,
            layout.expert_weights,
            layout.version,
        ],
        [encode_source_rank(source) for source in ticket.ranks],
        ticket.blocks,
        ticket.state_slot,
        ticket.num_tokens,
        float(ticket.expires_unix_s),
        ticket.step,
    ]


def decode_ticket(value: object) -> KvTicket:
    """The inverse of `encode_ticket`.

    Raises:
        CorruptDataError: the value is no KvTicket.
    """
    ticket_id, member_id, layout, ranks, blocks, state_slot, num_tokens, expires, step = as_list(value, 9)
    fingerprint, tp, block_size, num_blocks, num_slots, dtype, state_dtype, experts, version = as_list(layout, 9)
    return KvTicket(
        id=as_typed(ticket_id, str),
        member_id=as_typed(member_id, str),
        layout=KvLayout(
            fingerprint=as_typed(fingerprint, str),
            tp=as_typed(tp, int),
            block_size=as_typed(block_size, int),
            num_blocks=as_typed(num_blocks, int),
            num_slots=as_typed(num_slots, int),
            dtype=as_typed(dtype, str),
            state_dtype=as_typed(state_dtype, str),
            expert_weights=as_typed(experts, str),
            version=as_typed(version, int),
        ),
        ranks=_many(ranks, decode_source_rank),
        blocks=tuple(_ints(blocks)),
        state_slot=as_typed(state_slot, int),
        num_tokens=as_typed(num_tokens, int),
        expires_unix_s=as_typed(expires, float),
        step=as_typed(step, int),
    )


def encode_pull_order(order: PullOrder) -> list[object]:
    """PullOrder as a list."""
    ticket = encode_ticket(order.ticket)
    return [order.pull_id, ticket, order.lane, order.first, order.dst_blocks, order.dst_slot]


def decode_pull_order(value: object) -> PullOrder:
    """The inverse of `encode_pull_order`.

    Raises:
        CorruptDataError: the value is no PullOrder.
    """
    pull_id, ticket, lane, first, dst_blocks, dst_slot = as_list(value, 6)
    return PullOrder(
        pull_id=as_typed(pull_id, int),
        ticket=decode_ticket(ticket),
        lane=as_typed(lane, int),
        first=as_typed(first, int),
        dst_blocks=tuple(_ints(dst_blocks)),
        dst_slot=as_typed(dst_slot, int),
    )


def encode_pull_done(done: PullDone) -> list[object]:
    """PullDone as a message of kind "pulled"."""
    return ["pulled", done.pull_id, done.error, done.num_bytes, float(done.seconds), done.refetches]


def decode_pull_done(message: object) -> PullDone:
    """The inverse of `encode_pull_done`.

    Raises:
        CorruptDataError: the message is no PullDone.
    """
    _, pull_id, error, num_bytes, seconds, refetches = as_list(message, 6)
    return PullDone(
        pull_id=as_typed(pull_id, int),
        error=as_typed(error, str),
        num_bytes=as_typed(num_bytes, int),
        seconds=as_typed(seconds, float),
        refetches=as_typed(refetches, int),
    )


def _encode_logprobs(columns: LogprobColumns) -> list[object]:
    return [columns.logprobs_N, columns.ranks_N, columns.top_ids_NK, columns.top_logprobs_NK]


def _decode_logprobs(value: object) -> LogprobColumns:
    logprobs, ranks, top_ids, top_logprobs = as_list(value, 4)
    return LogprobColumns(
        logprobs_N=_floats(logprobs),
        ranks_N=_ints(ranks),
        top_ids_NK=list(_many(top_ids, _ints)),
        top_logprobs_NK=list(_many(top_logprobs, _floats)),
    )


def encode_output(step: int, output: LaneOutput) -> list[object]:
    """A lane's output of one step as a message of kind "output"."""
    logprobs = None if output.logprobs is None else _encode_logprobs(output.logprobs)
    prompt = [[row, _encode_logprobs(columns)] for row, columns in output.prompt_logprobs.items()]
    columns = [output.rows_N, output.tokens_N, output.counts_N]
    return ["output", step, columns, logprobs, prompt, float(output.compute_s)]


def decode_output(message: object) -> tuple[int, LaneOutput]:
    """The inverse of `encode_output`: (step, output).

    Raises:
        CorruptDataError: the message is no output.
    """
    _, step, columns, logprobs, prompt, compute_s = as_list(message, 6)
    rows, tokens, counts = (_ints(column) for column in as_list(columns, 3))
    pairs = [as_list(pair, 2) for pair in as_list(prompt)]
    output = LaneOutput(
        rows_N=rows,
        tokens_N=tokens,
        counts_N=counts,
        logprobs=None if logprobs is None else _decode_logprobs(logprobs),
        prompt_logprobs={as_typed(row, int): _decode_logprobs(columns) for row, columns in pairs},
        compute_s=as_typed(compute_s, float),
    )
    return as_typed(step, int), output
