"""`moefleet call` against a real gRPC server."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.call import CallError, CallOptions, run_call
from deploy.grpc_service import GrpcConfig, bind_grpc_server, create_grpc_server
from deploy.http_guard import ApiKey
from router.errors import ConfigError
from tests.support.scripted_backend import ScriptedBackend
from tests.support.serving import make_backend, make_service

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def served(backend: ScriptedBackend, *, api_keys: tuple[ApiKey, ...] = ()) -> AsyncIterator[str]:
    """A server's host:port."""
    config = GrpcConfig(api_keys=api_keys)
    server = create_grpc_server(make_service(backend), config)
    port = bind_grpc_server(server, config)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def called(options: CallOptions) -> str:
    out = io.StringIO()
    await asyncio.to_thread(run_call, options, out)
    return out.getvalue()


async def test_a_message_is_answered_by_the_one_model_that_is_served() -> None:
    async with served(make_backend("Good day.")) as target:
        assert await called(CallOptions(target=target, message="Hello")) == "Good day.\n"


async def test_sampling_options_reach_the_server() -> None:
    backend = make_backend("one two three four")
    async with served(backend) as target:
        await called(
            CallOptions(target=target, text="x", model="tiny", max_tokens=3, temperature=0.5, seed=7, ignore_eos=True)
        )

    (request,) = backend.requests
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (3, 0.5, 7)
    assert sampling.stop_token_ids == ()


async def test_the_first_key_of_the_file_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# mine\nright acme\n")
    async with served(make_backend("yes"), api_keys=(ApiKey(key="right"),)) as target:
        assert await called(CallOptions(target=target, text="x", api_key_file=path)) == "yes\n"


async def test_a_refusal_tells_the_status_and_the_server_s_reason() -> None:
    async with served(make_backend("no"), api_keys=(ApiKey(key="right"),)) as target:
        with pytest.raises(CallError, match=rf"{target}: UNAUTHENTICATED: authorization: send the header"):
            await called(CallOptions(target=target, text="x"))


async def test_an_unknown_model_is_told() -> None:
    async with served(make_backend("no")) as target:
        with pytest.raises(CallError, match=r"NOT_FOUND: model 'other' is not served here"):
            await called(CallOptions(target=target, text="x", model="other"))


async def test_a_server_that_is_not_there_is_told() -> None:
    async with served(make_backend("no")) as target:
        pass

    with pytest.raises(CallError, match=rf"{target}: UNAVAILABLE"):
        await called(CallOptions(target=target, text="x"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CallOptions(target="127.0.0.1:1"), "--text, --message: give one"),
        (CallOptions(target="127.0.0.1:1", text="a", message="b"), "--text, --message: give one"),
        (CallOptions(target="127.0.0.1:1", text="a", tls_ca_file=Path("/none")), "--tls-ca-file: /none cannot be read"),
        (CallOptions(target="127.0.0.1:1", text="a", api_key_file=Path("/none")), "/none cannot be read"),
    ],
)
async def test_options_that_cannot_work_are_refused_before_a_call(options: CallOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await called(options)
