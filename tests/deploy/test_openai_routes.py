"""Replies of the HTTP API, whole and streamed."""

import pytest

from deploy.openai_routes import HttpConfig
from router.errors import NoMemberError
from router.request import Request
from tests.support.http import CHAT, NO_THINKING, PROMPT, Json, chat_text, client_of, events_of
from tests.support.scripted_backend import Script
from tests.support.serving import make_backend, make_tokenizer, text_script

pytestmark = pytest.mark.anyio


async def test_a_chat_reply_has_every_field_that_openai_requires() -> None:
    async with client_of(make_backend("hello there")) as client:
        reply = (await client.post("/v1/chat/completions", json=CHAT | NO_THINKING)).json()

    assert reply["id"].startswith("chatcmpl-")
    assert (reply["object"], reply["model"]) == ("chat.completion", "tiny")
    assert isinstance(reply["created"], int)
    (choice,) = reply["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "hello there", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    num_tokens = len(make_tokenizer().encode("hello there")) + 1
    assert reply["usage"]["completion_tokens"] == num_tokens
    assert reply["usage"]["total_tokens"] == num_tokens + reply["usage"]["prompt_tokens"]


async def test_a_chat_stream_says_the_same_as_the_whole_reply() -> None:
    text = "caf\u00e9 \u4f60\u597d, that is all"
    async with client_of(make_backend(text)) as client:
        events = await events_of(client, "/v1/chat/completions", CHAT | NO_THINKING)

    assert chat_text(events) == text
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in each["choices"][0]["delta"] for each in events[1:])
    assert [each["choices"][0]["finish_reason"] for each in events] == [None] * (len(events) - 1) + ["stop"]
    assert {each["object"] for each in events} == {"chat.completion.chunk"}
    assert len({each["id"] for each in events}) == 1
    assert all("usage" not in each and "logprobs" in each["choices"][0] for each in events)


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", PROMPT)])
async def test_usage_comes_last_in_a_stream_that_asks_for_it(path: str, body: Json) -> None:
    script = Script(token_ids=text_script("hello").token_ids, cached_tokens=2)
    async with client_of(make_backend(script)) as client:
        events = await events_of(client, path, body | {"stream_options": {"include_usage": True}})

    assert all(each["usage"] is None for each in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == len(script.token_ids)
    assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_a_completion_and_its_stream_say_the_same() -> None:
    async with client_of(make_backend("hello there")) as client:
        whole = (await client.post("/v1/completions", json=PROMPT)).json()
        events = await events_of(client, "/v1/completions", PROMPT)

    assert whole["object"] == "text_completion"
    assert whole["choices"] == [{"index": 0, "text": "hello there", "logprobs": None, "finish_reason": "stop"}]
    assert "".join(each["choices"][0]["text"] for each in events) == "hello there"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(("prompt", "count"), [("a", 1), (["a", "b"], 2), ([5, 6], 1), ([[5, 6], [7]], 2)])
async def test_every_form_of_prompt_makes_one_choice_a_prompt(prompt: object, count: int) -> None:
    backend = make_backend("x")
    async with client_of(backend) as client:
        reply = (await client.post("/v1/completions", json=PROMPT | {"prompt": prompt})).json()

    assert [choice["index"] for choice in reply["choices"]] == list(range(count))
    assert reply["usage"]["prompt_tokens"] == sum(len(each.prompt_ids) for each in backend.requests)
    if prompt == [[5, 6], [7]]:
        assert sorted(each.prompt_ids for each in backend.requests) == [(5, 6), (7,)]


async def test_choices_of_one_prompt_have_seeds_of_their_own_and_come_apart_in_a_stream() -> None:
    texts = ["one", "two", "three"]
    seeds: list[int] = []

    def script(request: Request) -> Script:
        seeds.append(request.sampling.seed)
        return text_script(texts[int(request.id.rsplit("-", 1)[1])])

    async with client_of(make_backend(script)) as client:
        body = CHAT | NO_THINKING | {"n": 3, "seed": 4}
        whole = (await client.post("/v1/chat/completions", json=body)).json()
        events = await events_of(client, "/v1/chat/completions", body)

    assert [choice["message"]["content"] for choice in whole["choices"]] == texts
    assert [chat_text(events, index) for index in range(3)] == texts
    assert 4 in seeds
    assert sorted(seeds[:3]) == sorted(seeds[3:])
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_output_and_the_request(stream: bool) -> None:
    backend = make_backend(Script(token_ids=make_tokenizer().encode("a b STOP c "), endless=True))
    async with client_of(backend) as client:
        body = PROMPT | {"stop": ["STOP"], "max_tokens": 200}
        if stream:
            events = await events_of(client, "/v1/completions", body)
            text = "".join(each["choices"][0]["text"] for each in events)
            finish = events[-1]["choices"][0]["finish_reason"]
        else:
            (choice,) = (await client.post("/v1/completions", json=body)).json()["choices"]
            text, finish = choice["text"], choice["finish_reason"]

    assert (text, finish) == ("a b ", "stop")
    assert backend.aborted == [each.id for each in backend.requests]
    assert backend.running == 0


async def test_output_that_only_begins_like_a_stop_string_is_shown_in_the_end() -> None:
    async with client_of(make_backend("a STO")) as client:
        (choice,) = (await client.post("/v1/completions", json=PROMPT | {"stop": "STOP"})).json()["choices"]

    assert (choice["text"], choice["finish_reason"]) == ("a STO", "stop")


async def test_the_token_limit_is_told_as_length() -> None:
    async with client_of(make_backend(Script(token_ids=(65,), endless=True))) as client:
        reply = (await client.post("/v1/completions", json=PROMPT | {"max_tokens": 3})).json()

    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 3


async def test_a_stop_token_of_the_client_is_not_shown() -> None:
    ids = make_tokenizer().encode("ab.")
    backend = make_backend(Script(token_ids=ids))
    async with client_of(backend) as client:
        reply = (await client.post("/v1/completions", json=PROMPT | {"stop_token_ids": [ids[-1]]})).json()

    assert reply["choices"][0]["text"] == make_tokenizer().decode(ids[:-1])


async def test_chat_logprobs_have_tokens_bytes_and_alternatives() -> None:
    backend = make_backend("\u4f60")
    body = CHAT | NO_THINKING | {"logprobs": True, "top_logprobs": 2}
    async with client_of(backend) as client:
        whole = (await client.post("/v1/chat/completions", json=body)).json()
        events = await events_of(client, "/v1/chat/completions", body)

    entries = whole["choices"][0]["logprobs"]["content"]
    assert whole["choices"][0]["logprobs"]["refusal"] is None
    assert bytes(byte for entry in entries[:-1] for byte in entry["bytes"]).decode() == "\u4f60"
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in entries)
    streamed = [entry for each in events for entry in (each["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == entries


async def test_completion_logprobs_are_parallel_lists_with_places_in_the_text() -> None:
    async with client_of(make_backend("hello there")) as client:
        reply = (await client.post("/v1/completions", json=PROMPT | {"logprobs": 1})).json()

    logprobs = reply["choices"][0]["logprobs"]
    text = reply["choices"][0]["text"]
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[:-1]:
        assert text[offset : offset + len(token)] == token
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(logprobs["tokens"])


async def test_prompt_logprobs_name_each_prompt_token() -> None:
    backend = make_backend("x")
    async with client_of(backend) as client:
        completion = (await client.post("/v1/completions", json=PROMPT | {"prompt_logprobs": 0})).json()
        chat = (await client.post("/v1/chat/completions", json=CHAT | {"prompt_logprobs": 0})).json()

    for found, request in zip(
        (completion["choices"][0]["prompt_logprobs"], chat["prompt_logprobs"]), backend.requests, strict=True
    ):
        assert found[0] is None
        assert [list(each) for each in found[1:]] == [[str(token)] for token in request.prompt_ids[1:]]


async def test_token_ids_are_returned_where_asked_for() -> None:
    backend = make_backend("hello")
    async with client_of(backend) as client:
        body = {"return_token_ids": True}
        completion = (await client.post("/v1/completions", json=PROMPT | body)).json()["choices"][0]
        chat = (await client.post("/v1/chat/completions", json=CHAT | body)).json()

    expected = list(text_script("hello").token_ids)
    assert completion["token_ids"] == chat["choices"][0]["token_ids"] == expected
    assert completion["prompt_token_ids"] == list(backend.requests[0].prompt_ids)
    assert chat["prompt_token_ids"] == list(backend.requests[1].prompt_ids)


async def test_reasoning_is_split_from_content_the_same_way_streamed_and_whole() -> None:
    async with client_of(make_backend("<think>\nhm</think>\n\nyes")) as client:
        whole = (await client.post("/v1/chat/completions", json=CHAT)).json()["choices"][0]["message"]
        events = await events_of(client, "/v1/chat/completions", CHAT)

    assert (whole["reasoning"], whole["reasoning_content"], whole["content"]) == ("hm", "hm", "yes")
    assert (chat_text(events, field="reasoning"), chat_text(events)) == ("hm", "yes")


async def test_reasoning_stays_in_the_content_where_so_configured() -> None:
    async with client_of(make_backend("hm</think>yes"), HttpConfig(split_reasoning=False)) as client:
        message = (await client.post("/v1/chat/completions", json=CHAT)).json()["choices"][0]["message"]

    assert message["content"] == "hm</think>yes"


async def test_a_tool_call_is_read_the_same_way_streamed_and_whole() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    body = CHAT | NO_THINKING | {"tools": tools, "max_tokens": 100}
    text = 'sure <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    async with client_of(make_backend(text), max_model_len=1024) as client:
        whole = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        events = await events_of(client, "/v1/chat/completions", body)

    (call,) = whole["message"]["tool_calls"]
    assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", "sure ")
    assert (call["type"], call["function"]) == ("function", {"name": "add", "arguments": '{"a": 1}'})
    deltas = [each["choices"][0]["delta"] for each in events]
    (streamed,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert (streamed["index"], streamed["function"]) == (0, call["function"])
    assert chat_text(events) == "sure "
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_tool_call_in_xml_has_values_of_the_schemas_types() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
    body = CHAT | NO_THINKING | {"tools": tools, "max_tokens": 150}
    inner = "<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>"
    async with client_of(make_backend(f"<tool_call>\n{inner}\n</tool_call>"), max_model_len=1024) as client:
        reply = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]

    (call,) = reply["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1, "b": "2"}'}
    assert reply["finish_reason"] == "tool_calls"


async def test_models_are_listed_and_found_by_name() -> None:
    async with client_of(make_backend("x")) as client:
        (card,) = (await client.get("/v1/models")).json()["data"]
        same = (await client.get("/v1/models/tiny")).json()
        missing = await client.get("/v1/models/gpt")

    assert card == same
    assert (card["id"], card["object"], card["owned_by"], card["max_model_len"]) == ("tiny", "model", "moefleet", 256)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_health_follows_the_back_end() -> None:
    backend = make_backend("x")
    async with client_of(backend) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/-/healthz")).text == "success"
        backend.unhealthy = NoMemberError("no decode member is up")
        reply = await client.get("/health")
        assert (await client.get("/-/healthz")).status_code == 503

    assert (reply.status_code, reply.json()["reason"]) == (503, "no decode member is up")


async def test_a_scrape_shows_tokens_latencies_errors_and_loads() -> None:
    async with client_of(make_backend("hello there")) as client:
        await client.post("/v1/completions", json=PROMPT)
        await client.post("/v1/completions", json=PROMPT | {"temperature": 9})
        text = (await client.get("/metrics")).text

    num_tokens = len(text_script("hello there").token_ids)
    assert f'moefleet:generation_tokens_total{{model_name="tiny"}} {num_tokens}.0' in text
    assert 'moefleet:time_to_first_token_seconds_count{model_name="tiny"} 1.0' in text
    assert f'moefleet:inter_token_latency_seconds_count{{model_name="tiny"}} {num_tokens - 1}.0' in text
    assert 'moefleet:request_errors_total{api="http",code="invalid_value",model_name="tiny"} 1.0' in text
    assert 'moefleet:num_requests_in_flight{model_name="tiny"} 0.0' in text
    assert 'moefleet:kv_cache_usage_perc{member_id="member-0",model_name="tiny",role="mixed"} 0.25' in text
