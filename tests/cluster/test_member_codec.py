"""What goes over the member stream comes back as it was."""

from pathlib import Path

import pytest

from cluster.load_codec import cache_message, load_message, read_cache, read_load
from cluster.member_codec import (
    PROTOCOL,
    HandleColumns,
    MemberHello,
    hello_message,
    read_hello,
    read_rejection,
    read_step,
    read_submit,
    rejection_message,
    step_message,
    submit_message,
)
from cluster.plan import KvLayout, KvTicket, SourceRank
from cluster.protos import member_pb2 as pb
from cluster.protos.generate import PROTO, ROOT, compile_proto
from router.errors import (
    CorruptDataError,
    HandoffError,
    InvalidRequestError,
    MoefleetError,
    NoMemberError,
    OverloadedError,
)
from router.load import CacheEvents, MemberCounts, MemberLoad
from router.request import MemberId, Request, RequestId, SamplingParams, TokenEvent, TokenLogprob
from router.step_time import StepTime

LAYOUT = KvLayout(
    fingerprint="f00d",
    tp=2,
    block_size=16,
    num_blocks=64,
    num_slots=4,
    dtype="float32",
    state_dtype="bfloat16",
    expert_weights="int8",
)


def make_ticket() -> KvTicket:
    rank = SourceRank(tp_rank=1, host_key="h", pid=7, pool_fd=-1, address="127.0.0.1:9")
    return KvTicket(
        id="t1",
        member_id="p0",
        layout=LAYOUT,
        ranks=(rank,),
        blocks=(5, 3),
        state_slot=-1,
        num_tokens=20,
        expires_unix_s=1234.5,
    )


def make_request() -> Request:
    sampling = SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.01,
        presence_penalty=-1.5,
        frequency_penalty=0.25,
        repetition_penalty=1.1,
        logit_bias=((3, -100.0), (4, 2.5)),
        seed=2**64 - 1,
        stop_token_ids=(1, 2),
        logprobs=0,
        prompt_logprobs=3,
    )
    return Request(
        id=RequestId("r1"),
        prompt_ids=(1, 2, 151_935),
        sampling=sampling,
        output_ids=(8,),
        priority=-2,
        tenant="acme",
        cache_salt="s",
        deadline_unix_s=99.25,
    )


def over_the_wire(message: pb.GatewayMessage) -> pb.GatewayMessage:
    return pb.GatewayMessage.FromString(message.SerializeToString())


def from_member(message: pb.MemberMessage) -> pb.MemberMessage:
    return pb.MemberMessage.FromString(message.SerializeToString())


def test_a_request_with_every_field_comes_back_as_it_was() -> None:
    message = over_the_wire(submit_message(3, make_request(), "decode", make_ticket()))
    assert message.submit.handle == 3
    assert read_submit(message.submit) == (make_request(), "decode", make_ticket())


def test_a_plain_request_keeps_its_defaults() -> None:
    request = Request(id=RequestId("r"), prompt_ids=(1,), sampling=SamplingParams(max_tokens=1))
    assert read_submit(over_the_wire(submit_message(1, request, "full", None)).submit) == (request, "full", None)


def test_a_mode_and_ticket_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(CorruptDataError, match="ticket"):
        read_submit(submit_message(1, make_request(), "full", make_ticket()).submit)
    with pytest.raises(CorruptDataError, match="mode 0"):
        read_submit(pb.Submit(handle=1))


def test_one_step_carries_the_events_of_many_requests_and_the_rare_details() -> None:
    logprob = TokenLogprob(logprob=-0.5, rank=2, top_ids=(9, 8), top_logprobs=(-0.1, -0.5))
    first = TokenEvent(
        request_id=RequestId("a"),
        index=0,
        token_id=8,
        logprob=logprob,
        cached_tokens=16,
        prompt_logprobs=(None, logprob),
    )
    failed = TokenEvent(request_id=RequestId("b"), index=4, token_id=None, finish="error", error="broken")
    plain = TokenEvent(request_id=RequestId("c"), index=7, token_id=0, finish="stop")
    message = from_member(step_message([(1, first), (2, failed), (3, plain)], [(1, make_ticket())]))
    ids = {1: RequestId("a"), 2: RequestId("b"), 3: RequestId("c")}
    assert read_step(message.step, ids) == [(1, first), (2, failed), (3, plain)]
    assert [ready.handle for ready in message.step.tickets] == [1]


def test_the_rare_details_of_events_behind_columns_stay_theirs() -> None:
    failed = TokenEvent(request_id=RequestId("b"), index=4, token_id=None, finish="error", error="broken")
    columns = HandleColumns(handles=[1], indices=[3], token_ids=[9])
    message = from_member(step_message([(2, failed)], [], columns))
    plain = TokenEvent(request_id=RequestId("a"), index=3, token_id=9)
    assert read_step(message.step, {1: RequestId("a"), 2: RequestId("b")}) == [(1, plain), (2, failed)]


def test_events_of_forgotten_handles_are_left_out() -> None:
    event = TokenEvent(request_id=RequestId("a"), index=0, token_id=8)
    assert read_step(step_message([(1, event)], []).step, {}) == []


def test_damaged_step_columns_are_refused() -> None:
    with pytest.raises(CorruptDataError, match="columns"):
        read_step(pb.StepEvents(handles=[1]), {1: RequestId("a")})
    with pytest.raises(CorruptDataError, match="finish"):
        read_step(pb.StepEvents(handles=[1], indices=[0], token_ids=[1], finishes=[9]), {1: RequestId("a")})


def test_a_load_report_comes_back_whole() -> None:
    load = MemberLoad(
        member_id=MemberId("m"),
        role="decode",
        sequence=4,
        waiting_tokens=77,
        context_tokens=1234,
        step_tokens=512,
        step_time=StepTime(
            base_s=0.1,
            prefill_token_s=0.2,
            decode_row_s=0.3,
            context_token_s=0.4,
            prompt_s=0.7,
            experts_s=0.5,
            expert_share=0.6,
        ),
        token_bytes=9,
        state_bytes=8,
        prefix_cache=False,
        counts=MemberCounts(
            preemptions=1,
            drafted_tokens=20,
            accepted_tokens=15,
            pulls=6,
            failed_pulls=2,
            refetched_frames=3,
            pulled_bytes=1 << 40,
            pull_s=0.25,
        ),
        draining=True,
    )
    message = from_member(load_message(load)).load
    assert read_load(message, member_id=MemberId("m")) == load
    message.step_time.base_s = -1.0
    with pytest.raises(CorruptDataError, match="base_s"):
        read_load(message, member_id=MemberId("m"))


def test_cache_events_come_back_whole() -> None:
    events = CacheEvents(
        after=3,
        sequence=5,
        cleared=True,
        stored=(2**64 - 1, 2),
        removed=(3,),
        stored_states=(4,),
        removed_states=(5, 6),
    )
    assert read_cache(from_member(cache_message(events)).cache) == events


def test_hello_names_the_member_and_its_cache_layout() -> None:
    hello = MemberHello(member_id=MemberId("m"), role="prefill", generation=2, layout=LAYOUT)
    assert read_hello(from_member(hello_message(hello)).hello) == hello
    with pytest.raises(CorruptDataError, match="role"):
        read_hello(pb.Hello(role="boss", protocol=PROTOCOL))
    with pytest.raises(CorruptDataError, match=r"speaks protocol 0 .* run one release everywhere"):
        read_hello(pb.Hello(role="mixed"))


@pytest.mark.parametrize(
    ("error", "back"),
    [
        (InvalidRequestError("bad", field="top_p"), InvalidRequestError),
        (OverloadedError("full", retry_after_s=1.5), OverloadedError),
        (HandoffError("late"), HandoffError),
        (NoMemberError("none"), MoefleetError),
    ],
)
def test_a_refusal_arrives_as_the_exception_that_was_raised(error: MoefleetError, back: type[MoefleetError]) -> None:
    arrived = read_rejection(from_member(rejection_message(4, error)).rejected)
    assert type(arrived) is back
    assert str(arrived) == str(error)
    if isinstance(arrived, InvalidRequestError):
        assert arrived.field == "top_p"
    if isinstance(arrived, OverloadedError):
        assert arrived.retry_after_s == 1.5


def test_the_committed_generated_code_is_what_the_proto_file_gives(tmp_path: Path) -> None:
    for path in compile_proto(PROTO, tmp_path):
        assert path.read_text() == (ROOT / path.relative_to(tmp_path)).read_text(), f"run {compile_proto.__module__}"
