"""Requests, events and tickets to and from the messages of the member stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from google.protobuf.message import DecodeError

from cluster.load_codec import read_role
from cluster.plan import KvLayout, KvTicket, SourceRank
from cluster.protos import member_pb2 as pb
from router.errors import CorruptDataError, HandoffError, InvalidRequestError, MoefleetError, OverloadedError
from router.request import (
    FinishReason,
    MemberId,
    Request,
    RequestId,
    Role,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)

PROTOCOL: Final = 2
"""What the messages between gateways and members mean; both ends must mean the same."""

M = TypeVar("M", pb.GatewayMessage, pb.MemberMessage)
SubmitMode = Literal["full", "prefill", "decode"]

_MODES: dict[SubmitMode, "pb.Mode.ValueType"] = {
    "full": pb.MODE_FULL,
    "prefill": pb.MODE_PREFILL,
    "decode": pb.MODE_DECODE,
}
_FINISHES: tuple[FinishReason | None, ...] = (None, "stop", "length", "abort", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberHello:
    """Who answers on a member stream."""

    member_id: MemberId
    role: Role
    generation: int
    layout: KvLayout


def read_frame(kind: type[M], frame: bytes) -> M:
    """A message from its bytes.

    Raises:
        CorruptDataError: they are none.
    """
    try:
        return kind.FromString(frame)
    except DecodeError as error:
        raise CorruptDataError(f"a frame of {len(frame)} bytes is no {kind.__name__}: {error}") from error


def submit_message(handle: int, request: Request, mode: SubmitMode, ticket: KvTicket | None) -> pb.GatewayMessage:
    """A request as the member gets it."""
    message = pb.Submit(
        handle=handle,
        request_id=request.id,
        mode=_MODES[mode],
        prompt_ids=request.prompt_ids,
        output_ids=request.output_ids,
        sampling=_sampling_message(request.sampling),
        priority=request.priority,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        deadline_unix_s=request.deadline_unix_s,
        ticket=None if ticket is None else ticket_message(ticket),
    )
    return pb.GatewayMessage(submit=message)


def read_submit(message: pb.Submit) -> tuple[Request, SubmitMode, KvTicket | None]:
    """The request, its mode, and the ticket it may redeem.

    Raises:
        CorruptDataError: unknown mode, or a ticket where none belongs, or none where one does.
    """
    mode = next((name for name, code in _MODES.items() if code == message.mode), None)
    if mode is None:
        raise CorruptDataError(
            f"submit {message.request_id}: mode {message.mode} is unknown; run one release everywhere"
        )
    if message.HasField("ticket") != (mode == "decode"):
        raise CorruptDataError(f"submit {message.request_id}: mode {mode} and ticket do not go together")
    request = Request(
        id=RequestId(message.request_id),
        prompt_ids=tuple(message.prompt_ids),
        sampling=_read_sampling(message.sampling),
        output_ids=tuple(message.output_ids),
        priority=message.priority,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        deadline_unix_s=message.deadline_unix_s if message.HasField("deadline_unix_s") else None,
    )
    return request, mode, read_ticket(message.ticket) if mode == "decode" else None


def expect_message(handle: int, request_id: RequestId, hashes: Sequence[int], ticket: KvTicket) -> pb.GatewayMessage:
    """Word of what is computed of a request's prompt elsewhere."""
    message = pb.Expect(handle=handle, request_id=request_id, hashes=hashes, ticket=ticket_message(ticket))
    return pb.GatewayMessage(expect=message)


def _sampling_message(sampling: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias_ids=[token for token, _ in sampling.logit_bias],
        logit_bias_values=[bias for _, bias in sampling.logit_bias],
        seed=sampling.seed & (2**64 - 1),
        stop_token_ids=sampling.stop_token_ids,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def _read_sampling(message: pb.Sampling) -> SamplingParams:
    if len(message.logit_bias_ids) != len(message.logit_bias_values):
        raise CorruptDataError("submit: logit_bias has ids and values of different number; run one release everywhere")
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=tuple(zip(message.logit_bias_ids, message.logit_bias_values, strict=True)),
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def layout_message(layout: KvLayout) -> pb.KvLayout:
    """A cache geometry as a message."""
    return pb.KvLayout(
        fingerprint=layout.fingerprint,
        tp=layout.tp,
        block_size=layout.block_size,
        num_blocks=layout.num_blocks,
        num_slots=layout.num_slots,
        dtype=layout.dtype,
        state_dtype=layout.state_dtype,
        expert_weights=layout.expert_weights,
        version=layout.version,
    )


def read_layout(message: pb.KvLayout) -> KvLayout:
    """A cache geometry from its message."""
    return KvLayout(
        fingerprint=message.fingerprint,
        tp=message.tp,
        block_size=message.block_size,
        num_blocks=message.num_blocks,
        num_slots=message.num_slots,
        dtype=message.dtype,
        state_dtype=message.state_dtype,
        expert_weights=message.expert_weights,
        version=message.version,
    )


def ticket_message(ticket: KvTicket) -> pb.Ticket:
    """A ticket as a message."""
    ranks = [
        pb.SourceRank(
            tp_rank=rank.tp_rank, host_key=rank.host_key, pid=rank.pid, pool_fd=rank.pool_fd, address=rank.address
        )
        for rank in ticket.ranks
    ]
    return pb.Ticket(
        id=ticket.id,
        member_id=ticket.member_id,
        layout=layout_message(ticket.layout),
        ranks=ranks,
        blocks=ticket.blocks,
        state_slot=ticket.state_slot,
        num_tokens=ticket.num_tokens,
        expires_unix_s=ticket.expires_unix_s,
        partial=ticket.partial,
        step=ticket.step,
    )


def read_ticket(message: pb.Ticket) -> KvTicket:
    """A ticket from its message."""
    ranks = tuple(
        SourceRank(
            tp_rank=rank.tp_rank, host_key=rank.host_key, pid=rank.pid, pool_fd=rank.pool_fd, address=rank.address
        )
        for rank in message.ranks
    )
    return KvTicket(
        id=message.id,
        member_id=message.member_id,
        layout=read_layout(message.layout),
        ranks=ranks,
        blocks=tuple(message.blocks),
        state_slot=message.state_slot,
        num_tokens=message.num_tokens,
        expires_unix_s=message.expires_unix_s,
        partial=message.partial,
        step=message.step,
    )


def hello_message(hello: MemberHello) -> pb.MemberMessage:
    """A member's first message."""
    return pb.MemberMessage(
        hello=pb.Hello(
            member_id=hello.member_id,
            role=hello.role,
            generation=hello.generation,
            layout=layout_message(hello.layout),
            protocol=PROTOCOL,
        )
    )


def ended_message(reason: str) -> pb.MemberMessage:
    """A member's last message."""
    return pb.MemberMessage(ended=pb.Ended(reason=reason))


def read_hello(message: pb.Hello) -> MemberHello:
    """Who answers.

    Raises:
        CorruptDataError: it speaks another protocol, or its role is none of ours.
    """
    if message.protocol != PROTOCOL:
        raise CorruptDataError(
            f"member {message.member_id} speaks protocol {message.protocol} of the member stream and this gateway "
            f"{PROTOCOL}; run one release everywhere"
        )
    return MemberHello(
        member_id=MemberId(message.member_id),
        role=read_role(message.role),
        generation=message.generation,
        layout=read_layout(message.layout),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HandleColumns:
    """`TokenColumns` as one gateway gets them: its requests by their handles."""

    handles: list[int]
    indices: list[int]
    token_ids: list[int]


_NO_COLUMNS = HandleColumns(handles=[], indices=[], token_ids=[])


def step_message(
    events: Sequence[tuple[int, TokenEvent]],
    tickets: Sequence[tuple[int, KvTicket]],
    columns: HandleColumns = _NO_COLUMNS,
) -> pb.MemberMessage:
    """One step's events of one gateway, each with its request's handle, as columns behind those that are columns."""
    plain = len(columns.handles)
    details = [
        _detail_message(plain + entry, event)
        for entry, (_, event) in enumerate(events)
        if event.cached_tokens or event.logprob or event.prompt_logprobs or event.error
    ]
    return pb.MemberMessage(
        step=pb.StepEvents(
            handles=columns.handles + [handle for handle, _ in events],
            indices=columns.indices + [event.index for _, event in events],
            token_ids=columns.token_ids + [-1 if event.token_id is None else event.token_id for _, event in events],
            finishes=[0] * plain + [_FINISHES.index(event.finish) for _, event in events],
            details=details,
            tickets=[pb.TicketReady(handle=handle, ticket=ticket_message(ticket)) for handle, ticket in tickets],
        )
    )


def _detail_message(entry: int, event: TokenEvent) -> pb.EventDetail:
    return pb.EventDetail(
        entry=entry,
        cached_tokens=event.cached_tokens,
        logprob=None if event.logprob is None else _logprob_message(event.logprob),
        prompt_logprobs=[_logprob_message(one) for one in event.prompt_logprobs],
        error=event.error,
    )


def _logprob_message(logprob: TokenLogprob | None) -> pb.TokenLogprob:
    if logprob is None:
        return pb.TokenLogprob()
    return pb.TokenLogprob(
        present=True,
        logprob=logprob.logprob,
        rank=logprob.rank,
        top_ids=logprob.top_ids,
        top_logprobs=logprob.top_logprobs,
    )


def _read_logprob(message: pb.TokenLogprob) -> TokenLogprob | None:
    if not message.present:
        return None
    return TokenLogprob(
        logprob=message.logprob,
        rank=message.rank,
        top_ids=tuple(message.top_ids),
        top_logprobs=tuple(message.top_logprobs),
    )


def read_step(message: pb.StepEvents, request_ids: dict[int, RequestId]) -> list[tuple[int, TokenEvent]]:
    """The events of one step message with their handles; those of handles not in `request_ids` are left out.

    Raises:
        CorruptDataError: columns of unequal length or an unknown finish code.
    """
    num = len(message.handles)
    if not num == len(message.indices) == len(message.token_ids) == len(message.finishes):
        raise CorruptDataError("member stream: step columns differ in length; run one release everywhere")
    if any(finish >= len(_FINISHES) for finish in message.finishes):
        raise CorruptDataError("member stream: unknown finish code; run one release everywhere")
    details = {detail.entry: detail for detail in message.details}
    columns = zip(message.handles, message.indices, message.token_ids, message.finishes, strict=True)
    return [
        (handle, _read_event(request_ids[handle], index, token, finish, details.get(entry)))
        for entry, (handle, index, token, finish) in enumerate(columns)
        if handle in request_ids
    ]


def _read_event(
    request_id: RequestId, index: int, token: int, finish: int, detail: pb.EventDetail | None
) -> TokenEvent:
    token_id = None if token < 0 else token
    if detail is None:
        return TokenEvent(request_id=request_id, index=index, token_id=token_id, finish=_FINISHES[finish])
    return TokenEvent(
        request_id=request_id,
        index=index,
        token_id=token_id,
        finish=_FINISHES[finish],
        logprob=_read_logprob(detail.logprob),
        cached_tokens=detail.cached_tokens,
        prompt_logprobs=tuple(_read_logprob(one) for one in detail.prompt_logprobs),
        error=detail.error,
    )


def rejection_message(handle: int, error: MoefleetError) -> pb.MemberMessage:
    """A member's refusal of one request, with what its caller needs to act on it."""
    rejected = pb.Rejected(handle=handle, message=str(error))
    match error:
        case InvalidRequestError():
            rejected.code, rejected.field = pb.Rejected.INVALID, error.field
        case OverloadedError():
            rejected.code, rejected.retry_after_s = pb.Rejected.OVERLOADED, error.retry_after_s
        case HandoffError():
            rejected.code = pb.Rejected.HANDOFF
        case _:
            pass
    return pb.MemberMessage(rejected=rejected)


def read_rejection(message: pb.Rejected) -> MoefleetError:
    """The refusal as the exception that the member raised."""
    match message.code:
        case pb.Rejected.INVALID:
            return InvalidRequestError(message.message, field=message.field)
        case pb.Rejected.OVERLOADED:
            return OverloadedError(message.message, retry_after_s=message.retry_after_s)
        case pb.Rejected.HANDOFF:
            return HandoffError(message.message)
        case _:
            return MoefleetError(message.message)
