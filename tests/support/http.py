"""The HTTP API called in this process."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from deploy.generation import Backend
from deploy.openai_routes import HttpConfig, create_app
from tests.support.serving import make_model, make_service

Json = dict[str, Any]

CHAT: Json = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
NO_THINKING: Json = {"chat_template_kwargs": {"enable_thinking": False}}
PROMPT: Json = {"model": "tiny", "prompt": "hi"}


@asynccontextmanager
async def client_of(
    backend: Backend, config: HttpConfig | None = None, *, max_model_len: int = 256
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application over a back end."""
    service = make_service(backend, model=make_model(max_model_len=max_model_len))
    transport = httpx.ASGITransport(app=create_app(service, config or HttpConfig()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def events_of(client: httpx.AsyncClient, path: str, body: Json) -> list[Json]:
    """The events of a stream; the last must be [DONE]."""
    reply = await client.post(path, json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def chat_text(events: list[Json], index: int = 0, field: str = "content") -> str:
    """What a chat stream says in one choice."""
    choices = [choice for each in events for choice in each["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(field) or "" for choice in choices)
