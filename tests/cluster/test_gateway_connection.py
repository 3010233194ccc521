import pytest

from cluster.gateway_connection import Routes, StepColumns
from cluster.member_codec import HandleColumns, read_step
from cluster.request_check import MAX_PROMPT_LOGPROBS
from router.errors import OverloadedError
from router.request import RequestId, TokenColumns, TokenEvent, TokenLogprob
from tests.support.member_call import ConnectionList
from tests.support.scheduler_bench import make_request, make_ticket

MESSAGE_LIMIT = 16 << 20


def make_event(name: str, *, prompt_logprobs: tuple[TokenLogprob | None, ...] = ()) -> TokenEvent:
    return TokenEvent(request_id=RequestId(name), index=0, token_id=5, prompt_logprobs=prompt_logprobs)


def test_tokens_and_tickets_of_a_step_are_one_message_and_refusals_one_each() -> None:
    columns = StepColumns()
    columns.tokens.extend([(1, make_event("a")), (2, make_event("b"))])
    columns.rejected.append((3, OverloadedError("full", retry_after_s=1.0)))
    step, refusal = columns.messages()
    assert list(step.step.handles) == [1, 2]
    assert refusal.rejected.handle == 3


def test_columns_of_a_step_go_with_its_other_tokens_and_those_of_another_lane_in_a_message_of_their_own() -> None:
    columns = StepColumns()
    columns.tokens.append((3, make_event("c")))
    columns.columns.append(HandleColumns(handles=[1, 2], indices=[4, 7], token_ids=[8, 9]))
    columns.columns.append(HandleColumns(handles=[5], indices=[6], token_ids=[7]))
    other, first = columns.messages()
    ids = {handle: RequestId(name) for handle, name in ((1, "a"), (2, "b"), (3, "c"), (5, "e"))}
    assert [(handle, event.index, event.token_id) for handle, event in read_step(other.step, ids)] == [(5, 6, 7)]
    assert read_step(first.step, ids) == [
        (1, TokenEvent(request_id=RequestId("a"), index=4, token_id=8)),
        (2, TokenEvent(request_id=RequestId("b"), index=7, token_id=9)),
        (3, make_event("c")),
    ]


@pytest.mark.anyio
async def test_each_gateway_gets_its_part_of_the_columns_and_what_nobody_waits_for_goes_nowhere() -> None:
    one, other = ConnectionList().unlinked(), ConnectionList().unlinked()
    names = [RequestId(name) for name in "abcd"]
    routes = Routes(names, [(0, one, 11), (1, other, 5), (3, one, 12)])
    parts = dict(routes.parts(TokenColumns(request_ids=names, indices=[1, 2, 3, 4], token_ids=[10, 20, 30, 40])))
    assert parts == {
        one: HandleColumns(handles=[11, 12], indices=[1, 4], token_ids=[10, 40]),
        other: HandleColumns(handles=[5], indices=[2], token_ids=[20]),
    }


@pytest.mark.anyio
async def test_a_gateway_that_asked_for_all_of_the_columns_gets_them_as_they_are() -> None:
    one, names = ConnectionList().unlinked(), [RequestId("a"), RequestId("b")]
    columns = TokenColumns(request_ids=names, indices=[1, 2], token_ids=[3, 4])
    ((connection, part),) = Routes(names, [(0, one, 7), (1, one, 8)]).parts(columns)
    assert connection is one
    assert (part.handles, part.indices, part.token_ids) == ([7, 8], columns.indices, columns.token_ids)


def test_the_most_prompt_log_probabilities_stay_below_the_message_limit_in_messages_of_their_own() -> None:
    top = 20
    one = TokenLogprob(
        logprob=-1.25, rank=150_000, top_ids=tuple(range(150_000, 150_000 + top)), top_logprobs=(-1.0,) * top
    )
    entries = (None, *[one] * (MAX_PROMPT_LOGPROBS // (1 + top)))
    columns = StepColumns()
    columns.tokens.extend([(1, make_event("a")), *((i, make_event("b", prompt_logprobs=entries)) for i in (2, 3))])
    messages = columns.messages()
    assert [list(message.step.handles) for message in messages] == [[2], [3], [1]]
    assert all(message.ByteSize() < MESSAGE_LIMIT for message in messages)
    ((_, event),) = read_step(messages[0].step, {2: RequestId("b")})
    assert event.prompt_logprobs == entries


def test_a_ticket_comes_behind_its_long_first_token() -> None:
    columns = StepColumns()
    columns.tokens.append((1, make_event("a", prompt_logprobs=(None,))))
    columns.tickets.append((1, make_ticket(make_request())))
    token, ticket = columns.messages()
    assert list(token.step.handles) == [1]
    assert [ready.handle for ready in ticket.step.tickets] == [1]
