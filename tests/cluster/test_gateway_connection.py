from cluster.gateway_connection import StepColumns
from cluster.member_codec import read_step
from cluster.request_check import MAX_PROMPT_LOGPROBS
from router.errors import OverloadedError
from router.request import RequestId, TokenEvent, TokenLogprob
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
