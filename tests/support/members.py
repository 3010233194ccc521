"""Members with real engines and ranks behind real services, in one process and its rank children."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from cluster.config import Dtype, EngineConfig, KvTransport
from cluster.dispatcher import Dispatcher
from cluster.engine import Engine, EngineOutlets
from cluster.member_codec import MemberHello
from cluster.member_service import MemberService
from cluster.members import MemberInfo
from cluster.plan import KvTicket
from cluster.resolve import resolve_engine
from cluster.spawn import LocalReplica
from cluster.ticket import ticket_maker
from router.admission import Admission
from router.request import MemberId, Role
from router.router import Router
from shards.mesh import Layout
from tests.support.fleet import TOKEN, until
from tests.support.fork_server import fork_server


class EngineMember:
    """One member of a checkpoint in a layout."""

    def __init__(
        self,
        name: str,
        role: Role,
        checkpoint: Path,
        *,
        tp: int = 1,
        kv_memory_bytes: int = 8 << 20,
        chunk: int = 64,
        max_rows: int = 8,
        lease_s: float = 30.0,
        max_model_len: int = 220,
        step_tokens: int = 64,
        dtype: Dtype = "float32",
        kv_transport: KvTransport = "auto",
        early_tokens: int = 256,
        offers_layers: bool = True,
        through: Callable[[KvTicket], KvTicket] = lambda ticket: ticket,
    ) -> None:
        config = EngineConfig(
            model=checkpoint,
            layout=Layout(tp=tp),
            dtype=dtype,
            kv_memory_bytes=kv_memory_bytes,
            max_rows=max_rows,
            max_step_tokens=step_tokens,
            chunk_tokens=chunk,
            max_model_len=max_model_len,
            threads=1,
            lease_s=lease_s,
            kv_transport=kv_transport,
        )
        self.member_id = MemberId(name)
        self.role: Role = role
        self._address = ""
        resolved = resolve_engine(config)
        layout = resolved.kv_layout()
        self._replica = LocalReplica(resolved, handoff=True, token=TOKEN, context=fork_server())
        hello = MemberHello(member_id=self.member_id, role=role, generation=0, layout=layout)
        self.service = MemberService(hello, TOKEN)
        make_ticket = ticket_maker(self.member_id, layout, self._replica.ranks.sources)
        outlets = EngineOutlets(
            on_events=self.service.on_events,
            make_ticket=lambda ready: through(make_ticket(ready)),
            on_failure=self.service.on_failure,
        )
        limits = replace(resolved.scheduler_config(), early_tokens=early_tokens, offers_layers=offers_layers)
        self.engine = Engine(limits, self._replica.ranks, outlets, member_id=self.member_id, role=role)

    async def start(self) -> MemberInfo:
        self._address = await self.service.start(self.engine, "127.0.0.1")
        self.engine.start()
        return self.info

    @property
    def info(self) -> MemberInfo:
        return MemberInfo(member_id=self.member_id, role=self.role, address=self._address)

    async def stop(self) -> None:
        await self.service.stop()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        self.engine.stop()
        self._replica.close()

    def signal_peer(self, number: int) -> None:
        """Stop, continue or kill the process of rank 1."""
        pid = self._replica.children[0].pid
        assert pid is not None
        os.kill(pid, number)

    @property
    def is_idle(self) -> bool:
        """Every block and state slot is free, and nothing runs or waits."""
        load = self.engine.load()
        free = (load.free_blocks, load.free_state_slots) == (load.total_blocks, load.total_state_slots)
        return free and not (load.running_requests or load.waiting_requests or load.handoff_requests)


@asynccontextmanager
async def gateway(infos: Sequence[MemberInfo]) -> AsyncIterator[Dispatcher]:
    """A dispatcher connected to members that are up."""
    dispatcher = Dispatcher(Router(), Admission(), TOKEN)
    try:
        dispatcher.update_members(infos)
        await until(lambda: len(dispatcher.loads()) == len(infos))
        yield dispatcher
    finally:
        await dispatcher.close()


@asynccontextmanager
async def dispatching(members: Sequence[EngineMember]) -> AsyncIterator[Dispatcher]:
    """Members and a dispatcher connected to all of them; ends them."""
    try:
        async with gateway([await member.start() for member in members]) as dispatcher:
            yield dispatcher
    finally:
        for member in members:
            await member.stop()
