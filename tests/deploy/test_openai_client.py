"""The `openai` Python client against a real HTTP server on a loopback port."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
import uvicorn

from deploy.generation import Backend
from deploy.http_guard import ApiKey
from deploy.openai_routes import HttpConfig, create_app
from tests.support.scripted_backend import Script
from tests.support.serving import make_backend, make_service

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def client_of(backend: Backend) -> AsyncIterator[openai.AsyncOpenAI]:
    app = create_app(make_service(backend), HttpConfig(api_keys=(ApiKey(key="k"),)))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(api_key="k", base_url=url, max_retries=0) as client:
            yield client
    finally:
        server.should_exit = True
        await task


async def test_chat_is_whole_or_streamed_with_usage() -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 5}
    async with client_of(make_backend("hello there")) as client:
        whole = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], logprobs=True, extra_body=extra
        )
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        chunks = [chunk async for chunk in stream]

    assert whole.choices[0].message.content == "hello there"
    assert whole.choices[0].logprobs is not None
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "hello there"
    assert chunks[-1].usage == whole.usage


async def test_an_answer_can_be_sent_back_as_it_came_in_every_form_that_the_client_has() -> None:
    question: Any = {"role": "user", "content": "hi"}
    async with client_of(make_backend("hello there")) as client:
        first = await client.chat.completions.create(model="tiny", messages=[question])
        said = first.choices[0].message
        forms: list[Any] = [said, said.model_dump(), said.model_dump(exclude_unset=True)]
        for form in forms:
            reply = await client.chat.completions.create(model="tiny", messages=[question, form, question])
            assert reply.usage is not None
            assert first.usage is not None
            assert reply.usage.prompt_tokens > first.usage.prompt_tokens


async def test_completions_take_several_prompts() -> None:
    async with client_of(make_backend("hello there")) as client:
        completion = await client.completions.create(model="tiny", prompt=["a", "b"], logprobs=1)
        models = await client.models.list()

    assert [choice.text for choice in completion.choices] == ["hello there"] * 2
    assert [model.id for model in models.data] == ["tiny"]


async def test_errors_are_raised_as_the_client_knows_them() -> None:
    async with client_of(make_backend("x")) as client:
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.completions.create(model="tiny", prompt="a", temperature=5)
        with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
            await client.models.retrieve("gpt")
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()


async def test_a_stream_that_is_closed_aborts_its_request() -> None:
    backend = make_backend(Script(token_ids=(65,), endless=True, delay_s=0.01))
    async with client_of(backend) as client:
        stream = await client.completions.create(model="tiny", prompt="a", stream=True, max_tokens=200)
        await anext(aiter(stream))
        await stream.close()
        async with asyncio.timeout(1):
            while backend.running:
                await asyncio.sleep(0.005)

    assert len(backend.aborted) == 1
