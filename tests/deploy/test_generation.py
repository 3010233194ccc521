"""Generations over a real engine: the same tokens through every way in, and nothing left behind."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest

from deploy.checkpoint import write_random_checkpoint
from deploy.generation import GenerationService
from deploy.grpc_service import GrpcConfig, bind_grpc_server, create_grpc_server
from deploy.metrics import GatewayMetrics
from deploy.openai_routes import HttpConfig, create_app
from deploy.protos import moefleet_v1_pb2 as pb
from deploy.protos import moefleet_v1_pb2_grpc as pb_grpc
from deploy.served_model import load_served_model
from deploy.tokenizer import load_tokenizer
from deploy.validation import GenerationInput, SamplingInput, TextPrompts
from tests.support.engine_backend import EngineBackend, engine_backend
from tests.support.http import Json

pytestmark = pytest.mark.anyio

PROMPT = "def add(a, b):"
SEEDED = SamplingInput(max_tokens=12, temperature=1.0, top_p=1.0, top_k=0, seed=5, ignore_eos=True)
SEEDED_JSON: Json = {
    "max_tokens": 12,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "seed": 5,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "tiny"
    write_random_checkpoint("qwen3_next", "tiny", 1, out)
    return out


@pytest.fixture(scope="module")
def backend(model: Path) -> Iterator[EngineBackend]:
    with engine_backend(model) as backend:
        yield backend


def make_service(model: Path, backend: EngineBackend) -> GenerationService:
    return GenerationService(
        backend=backend,
        tokenizer=load_tokenizer(model),
        model=replace(load_served_model(model, name="tiny"), max_model_len=256),
        metrics=GatewayMetrics("tiny"),
    )


def make_input(*, n: int = 1, sampling: SamplingInput = SEEDED) -> GenerationInput:
    return GenerationInput(model="tiny", prompt=TextPrompts(texts=(PROMPT,)), sampling=sampling, n=n)


async def token_ids(service: GenerationService, given: GenerationInput) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    async for delta in service.stream(await service.prepare(given)):
        found.setdefault(delta.choice, []).extend(delta.token_ids)
    return found


async def test_http_and_grpc_give_the_tokens_that_the_service_gives(model: Path, backend: EngineBackend) -> None:
    service = make_service(model, backend)
    expected = (await token_ids(service, make_input()))[0]
    body = {"model": "tiny", "prompt": PROMPT, "return_token_ids": True} | SEEDED_JSON
    transport = httpx.ASGITransport(app=create_app(service, HttpConfig()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        (choice,) = (await client.post("/v1/completions", json=body)).json()["choices"]

    config = GrpcConfig()
    server = create_grpc_server(service, config)
    port = bind_grpc_server(server, config)
    await server.start()
    sampling = pb.Sampling(max_tokens=12, temperature=1.0, top_p=1.0, top_k=0, seed=5, ignore_eos=True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = pb_grpc.GenerationStub(channel).Generate(
            pb.GenerateRequest(model="tiny", text=PROMPT, sampling=sampling)
        )
        responses = [response async for response in call]
    await server.stop(None)

    assert len(expected) == 12
    assert choice["token_ids"] == expected
    assert [token for response in responses for token in response.token_ids] == expected
    assert "".join(response.text for response in responses) == choice["text"] == service.tokenizer.decode(expected)


async def test_a_choice_is_the_same_alone_and_among_others(model: Path, backend: EngineBackend) -> None:
    service = make_service(model, backend)
    alone = await token_ids(service, make_input())
    many = await token_ids(service, make_input(n=3))

    assert many[0] == alone[0]
    assert len({tuple(ids) for ids in many.values()}) == 3


async def test_logprobs_of_every_token_come_with_it(model: Path, backend: EngineBackend) -> None:
    service = make_service(model, backend)
    given = make_input(sampling=replace(SEEDED, logprobs=2, prompt_logprobs=1))
    generation = await service.prepare(given)
    deltas = [delta async for delta in service.stream(generation)]

    assert all(len(delta.logprobs) == len(delta.token_ids) == 1 for delta in deltas)
    assert len(deltas[0].prompt_logprobs) == generation.num_prompt_tokens
    assert deltas[0].prompt_logprobs[0] is None


async def test_closing_a_stream_frees_its_blocks_within_a_second(model: Path, backend: EngineBackend) -> None:
    service = make_service(model, backend)
    generation = await service.prepare(make_input(n=2, sampling=replace(SEEDED, max_tokens=200)))
    async with aclosing(service.stream(generation)) as deltas:
        await anext(deltas)

    async with asyncio.timeout(1):
        while (load := backend.loads()[0]).running_requests or load.free_state_slots < load.total_state_slots:
            await asyncio.sleep(0.01)
    assert load.free_blocks == load.total_blocks
