"""Member services with scripted engines on loopback, for tests of the gateway side."""

import asyncio
from collections.abc import Callable

from cluster.member_codec import MemberHello
from cluster.member_service import MemberService, ServiceLimits
from cluster.members import MemberInfo
from cluster.security import new_token
from router.request import MemberId, Request, RequestId, Role, SamplingParams
from tests.support.scripted_engine import LAYOUT, ScriptedEngine

TOKEN = new_token()


class ScriptedMember:
    """One member: a scripted engine behind a real service."""

    def __init__(
        self, name: str, role: Role = "mixed", *, step_s: float = 0.002, limits: ServiceLimits | None = None
    ) -> None:
        self.member_id = MemberId(name)
        self.role: Role = role
        self.engine = ScriptedEngine(self.member_id, role, step_s=step_s)
        hello = MemberHello(member_id=self.member_id, role=role, generation=1, layout=LAYOUT)
        self.service = MemberService(hello, TOKEN, limits=limits)
        self.address = ""

    async def start(self, port: int = 0) -> MemberInfo:
        self.address = await self.service.start(self.engine, "127.0.0.1", port)
        self.engine.start(self.service)
        return self.info

    @property
    def info(self) -> MemberInfo:
        return MemberInfo(member_id=self.member_id, role=self.role, address=self.address, generation=1)

    async def stop(self) -> None:
        await self.service.stop()
        await asyncio.to_thread(self.engine.stop)

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing is held for anybody."""
        return not (self.engine.num_running or self.engine.pinned or self.service.num_requests)


def make_request(name: str = "r", *, num_tokens: int = 8, prompt: tuple[int, ...] = (5, 6, 7)) -> Request:
    return Request(id=RequestId(name), prompt_ids=prompt, sampling=SamplingParams(max_tokens=num_tokens))


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for a condition; fails the test when it does not come true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)
