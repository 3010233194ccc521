"""A whole MoEFleet on a local Ray cluster of its own, for tests: pools, gateway, HTTP and gRPC on free ports."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import grpc
import httpx
import ray
from ray import serve

from cluster.directory import MemberStatus, find_directory
from cluster.local_ray import start_local_ray
from deploy.app import build
from deploy.config import config_mapping, parse_config
from deploy.protos import moefleet_v1_pb2 as pb
from deploy.protos import moefleet_v1_pb2_grpc as pb_grpc
from deploy.render import APP_NAME
from router.request import MemberId, Role


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One non-streaming or fully read reply."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    cached_tokens: int = 0


class RayFleet:
    """Starts Ray and the application; everything is gone when the context ends."""

    def __init__(
        self,
        checkpoint: Path,
        pools: Mapping[str, object],
        *,
        http: Mapping[str, object] | None = None,
        **engine: object,
    ) -> None:
        self.http_port, self.grpc_port = free_port(), free_port()
        mapping = {
            "model": str(checkpoint),
            "model_name": "m",
            "engine": {"dtype": "float32", **engine},
            "pools": dict(pools),
            "http": {"port": self.http_port, "split_reasoning": False, **(http or {})},
            "grpc": {"port": self.grpc_port},
        }
        self.config = parse_config(mapping)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.http_port}", timeout=60.0)

    def __enter__(self) -> "RayFleet":
        start_local_ray(num_cpus=16, object_store_bytes=128 << 20)
        serve.start(proxy_location="Disabled")
        serve.run(build(config_mapping(self.config)), name=APP_NAME, route_prefix="/")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        serve.shutdown()
        ray.shutdown()

    def members(self) -> tuple[MemberStatus, ...]:
        directory = find_directory(self.config.ray.namespace)
        assert directory is not None
        return ray.get(directory.statuses.remote())

    def member(self, role: str) -> MemberStatus:
        return next(each for each in self.members() if each.info.role == role)

    def role_of(self, member_id: MemberId) -> Role | None:
        """What the directory lists a member as."""
        return next((each.info.role for each in self.members() if each.info.member_id == member_id), None)

    def set_role(self, member_id: MemberId, role: Role) -> None:
        """Let a member take another role."""
        directory = find_directory(self.config.ray.namespace)
        assert directory is not None
        ray.get(directory.set_role.remote(member_id, role))

    def kill_rank(self, role: str, rank: int) -> None:
        """kill -9 of one rank's process."""
        os.kill(self.member(role).ranks[rank].pid, signal.SIGKILL)

    def complete(self, prompt: object, **fields: object) -> Completion:
        body = {"model": "m", "prompt": prompt, "temperature": 0, "return_token_ids": True, **fields}
        reply = self.http.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        data = reply.json()
        choice = data["choices"][0]
        cached = data["usage"]["prompt_tokens_details"]["cached_tokens"]
        return Completion(
            token_ids=tuple(choice["token_ids"]),
            text=choice["text"],
            finish_reason=choice["finish_reason"],
            cached_tokens=cached,
        )

    def stream_lines(self, prompt: object, **fields: object) -> Iterator[dict[str, object]]:
        """SSE events of a streamed completion as objects, [DONE] left out."""
        body = {"model": "m", "prompt": prompt, "temperature": 0, "stream": True, **fields}
        with self.http.stream("POST", "/v1/completions", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line[6:])

    def grpc_tokens(self, prompt: tuple[int, ...], max_tokens: int, seed: int | None = None) -> tuple[int, ...]:
        """Token ids of one request through gRPC; greedy without a seed."""

        async def run() -> tuple[int, ...]:
            sampling = pb.Sampling(
                max_tokens=max_tokens, ignore_eos=True, top_p=1.0, top_k=0, temperature=0.0 if seed is None else 1.0
            )
            if seed is not None:
                sampling.seed = seed
            request = pb.GenerateRequest(model="m", token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
                stub = pb_grpc.GenerationStub(channel)
                return tuple([token async for reply in stub.Generate(request) for token in reply.token_ids])

        return asyncio.run(run())

    def is_idle(self) -> bool:
        """No block, slot or row is taken anywhere."""

        async def loads() -> pb.GetLoadResponse:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
                return await pb_grpc.GenerationStub(channel).GetLoad(pb.GetLoadRequest())

        members = asyncio.run(loads()).members
        return bool(members) and all(
            each.free_blocks == each.total_blocks and not each.running_requests and not each.waiting_requests
            for each in members
        )


def until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until the condition came true; fails the test when it did not."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.05)
    return time.monotonic() - begin
