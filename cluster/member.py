"""One member of a pool: its supervisor places and starts the ranks, watches them, forms them anew, and drains them.

Knows Ray actors and nothing of Serve: a Serve replica, a test or a script can hold one.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, TypeVar, cast

import ray
from ray import ObjectRef
from ray.actor import ActorHandle, ActorProxy
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import ProcessFacts, RankActor, RankHost, RankStart
from cluster.config import EngineConfig
from cluster.directory import MemberStatus, RankStatus, open_directory
from cluster.members import MemberInfo
from cluster.placement import place_ranks, rank_bundle, release_ranks
from router.errors import MemberLostError, MoefleetError
from router.load import MemberLoad
from router.request import MemberId, Role

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolMemberConfig:
    """What a member's supervisor is told."""

    role: Role
    engine: EngineConfig
    namespace: str = "moefleet"
    """Of the directory."""
    interface: Literal["loopback", "node"] = "loopback"
    """Where ranks and the member service listen: loopback for a cluster of one machine."""
    drain_s: float = 30.0
    """Longest wait for running requests when the member leaves."""
    look_period_s: float = 1.0
    """Between two looks at the ranks and reports to the directory."""
    look_timeout_s: float = 10.0
    """A rank 0 that does not answer a look for this long hangs, and its generation is over."""
    max_failed_starts: int = 3
    """After this many in a row the member is unhealthy, for its pool to replace."""


T = TypeVar("T")
Ending: TypeAlias = "asyncio.Future[int] | asyncio.Future[str]"


@dataclass(slots=True, kw_only=True)
class _Generation:
    """The ranks of one generation."""

    number: int
    actors: list["ActorProxy[RankHost]"]
    facts: list[ProcessFacts] = field(default_factory=list)
    address: str = ""
    max_model_len: int = 0
    since_unix_s: float = 0.0
    endings: list["Ending"] = field(default_factory=list)
    """Calls that return only when a rank has ended."""


class PoolMember:
    """The supervisor of one member. All methods belong to one asyncio loop."""

    def __init__(self, config: PoolMemberConfig) -> None:
        self._config = config
        self._id = MemberId(f"{config.role}-{uuid.uuid4().hex[:8]}")
        self._directory = open_directory(config.namespace)
        self._group: PlacementGroup | None = None
        self._generation: _Generation | None = None
        self._load: MemberLoad | None = None
        self._failed_starts = 0
        self._last_error = ""
        self._next_number = 0
        self._role: Role = config.role
        """What it does now; the pool's role until somebody moves it."""
        self._keeper: asyncio.Task[None] | None = None

    @property
    def member_id(self) -> MemberId:
        """Stays over generations."""
        return self._id

    @property
    def load(self) -> MemberLoad | None:
        """The load at the last look."""
        return self._load

    async def start(self) -> None:
        """Place and start the ranks, enter the directory, and watch from now on.

        Raises:
            ConfigError: there is no room for the ranks, or the model cannot be served in this layout.
            CheckpointError: the checkpoint cannot be served.
            MemberLostError: a rank failed at its start.
        """
        engine = self._config.engine
        self._group = await place_ranks(engine.layout.world, rank_bundle(engine.device, engine.threads))
        try:
            self._generation = await self._form(0)
            await self._report()
        except BaseException:
            # With the room go the ranks in it.
            release_ranks(self._group)
            raise
        self._keeper = asyncio.create_task(self._keep())

    def check_health(self) -> None:
        """Raises MemberLostError when the ranks could not be formed anew several times in a row, or nobody watches."""
        if self._keeper is not None and self._keeper.done() and not self._keeper.cancelled():
            raise MemberLostError(f"{self._id} is watched no more: {self._keeper.exception()!r}")
        if self._failed_starts >= self._config.max_failed_starts:
            raise MemberLostError(f"{self._id} failed to start {self._failed_starts} times: {self._last_error}")

    async def stop(self) -> None:
        """Drain, leave the directory, end the ranks, give their room back."""
        if self._keeper is not None:
            self._keeper.cancel()
            # Whatever ended it, the ranks are to be ended.
            await asyncio.wait([self._keeper])
        try:
            if self._generation is not None:
                await self._drain(self._generation.actors[0])
        finally:
            await self._tell(self._directory.remove.remote(self._id))
            if self._generation is not None:
                _kill_actors(self._generation.actors)
                self._generation = None
            if self._group is not None:
                release_ranks(self._group)

    async def _drain(self, leader: "ActorProxy[RankHost]") -> None:
        """Let running requests end; goes on reporting, so that gateways keep their streams meanwhile."""
        draining = _watched(leader.drain.remote(self._config.drain_s))
        try:
            while not draining.done():
                await asyncio.wait([draining], timeout=self._config.look_period_s)
                await self._report()
            if not await draining:
                logger.warning("%s: requests still ran after drain_s=%s", self._id, self._config.drain_s)
            async with asyncio.timeout(self._config.look_timeout_s):
                await _answer(leader.stop.remote())
        except (MoefleetError, RayError, TimeoutError) as error:
            logger.warning("%s: rank 0 ended or hung while draining: %s", self._id, _last_line(error))

    async def _form(self, number: int) -> _Generation:
        """Start actors for all ranks and bring them up as generation `number`."""
        world = self._config.engine.layout.world
        generation = _Generation(number=number, actors=[self._new_actor(rank) for rank in range(world)])
        try:
            await self._bring_up(generation)
        except BaseException as error:
            # Also when cancelled: nobody else knows these actors.
            _kill_actors(generation.actors)
            if isinstance(error, RayActorError):
                raise MemberLostError(f"a process was lost before the member was up: {_last_line(error)}") from error
            raise
        return generation

    async def _bring_up(self, generation: _Generation) -> None:
        actors = generation.actors
        generation.facts = [await _answer(actor.facts.remote()) for actor in actors]
        hosts = ["127.0.0.1" if self._config.interface == "loopback" else each.node for each in generation.facts]
        ranks_here = max(Counter(each.node for each in generation.facts).values())
        engine = self._config.engine
        store_port, max_model_len = await _answer(actors[0].open.remote(engine, hosts[0], ranks_here))
        leader = RankStart(
            engine=engine,
            ranks_here=ranks_here,
            rank=0,
            member_id=self._id,
            role=self._role,
            token=await self._directory.token.remote(),
            generation=generation.number,
            host=hosts[0],
            store_host=hosts[0],
            store_port=store_port,
        )
        for rank in range(1, len(actors)):
            generation.endings.append(
                _watched(actors[rank].follow.remote(replace(leader, rank=rank, host=hosts[rank])))
            )
        generation.address = await _unless_ended(actors[0].lead.remote(leader), generation.endings)
        generation.endings.append(_watched(actors[0].wait_failed.remote()))
        generation.max_model_len = max_model_len
        generation.since_unix_s = time.time()

    def _new_actor(self, rank: int) -> "ActorProxy[RankHost]":
        engine = self._config.engine
        bundle = rank_bundle(engine.device, engine.threads)
        assert self._group is not None
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
        options = RankActor.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=strategy,
        )
        return options.remote()

    async def _keep(self) -> None:
        """Look at the ranks until cancelled; form them anew when one is lost."""
        while True:
            if self._generation is None:
                await self._heal()
                continue
            ended = await self._lost(self._generation)
            if not ended:
                self._failed_starts = 0
                continue
            logger.error("%s generation %s lost: %s", self._id, self._generation.number, ended)
            await self._forget(self._generation, ended)

    async def _lost(self, generation: _Generation) -> str:
        """Report and wait a look period; why the generation is over, or nothing while it is well."""
        try:
            await self._report()
        except (MoefleetError, RayError) as error:
            return _last_line(error)
        done, _ = await asyncio.wait(
            generation.endings, timeout=self._config.look_period_s, return_when=asyncio.FIRST_COMPLETED
        )
        return _reason(done.pop()) if done else ""

    async def _forget(self, generation: _Generation, reason: str) -> None:
        """Gateways must not see the lost generation; its healthy ranks end with it."""
        self._last_error = reason
        self._load = None
        self._generation = None
        _kill_actors(generation.actors)
        await self._tell(self._directory.remove.remote(self._id))
        self._next_number = generation.number + 1

    async def _heal(self) -> None:
        try:
            self._generation = await self._form(self._next_number)
        except (MoefleetError, RayError) as error:
            self._failed_starts += 1
            self._last_error = str(error)
            logger.error("%s could not form generation %s: %s", self._id, self._next_number, error)
            self._next_number += 1
            await asyncio.sleep(min(0.5 * 2**self._failed_starts, 10.0))

    async def _report(self) -> None:
        """Look at rank 0 and tell the directory.

        Raises:
            MemberLostError: rank 0 does not answer.
            RayActorError: rank 0's process is gone.
        """
        generation = self._generation
        if generation is None:
            return
        try:
            async with asyncio.timeout(self._config.look_timeout_s):
                self._load = await _answer(generation.actors[0].load.remote())
        except TimeoutError as error:
            raise MemberLostError(f"rank 0 did not answer for {self._config.look_timeout_s:g} s") from error
        layout = self._config.engine.layout
        ranks = tuple(
            RankStatus(rank=rank, pid=each.pid, node=each.node, state="up")
            for rank, each in enumerate(generation.facts)
        )
        status = MemberStatus(
            info=MemberInfo(
                member_id=self._id, role=self._role, address=generation.address, generation=generation.number
            ),
            ranks=ranks,
            tp=layout.tp,
            dp=layout.dp,
            ep=layout.ep,
            max_model_len=generation.max_model_len,
            since_unix_s=generation.since_unix_s,
            load=self._load,
        )
        wanted = await self._tell(self._directory.put.remote(status))
        if wanted is not None and wanted != self._role:
            logger.info("%s: role %s becomes %s", self._id, self._role, wanted)
            try:
                async with asyncio.timeout(self._config.look_timeout_s):
                    await _answer(generation.actors[0].set_role.remote(wanted))
            except TimeoutError as error:
                raise MemberLostError(f"rank 0 did not answer for {self._config.look_timeout_s:g} s") from error
            self._role = wanted

    async def _tell(self, told: "ObjectRef[T]") -> T | None:
        """The directory's answer; one that is away hears of us with the next report."""
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(self._config.look_timeout_s):
                return await told
        return None


def _kill_actors(actors: Sequence["ActorProxy[RankHost]"]) -> None:
    for actor in actors:
        # ray.kill is typed for handles alone, .remote() for handle or class.
        ray.kill(cast("ActorHandle[RankHost]", actor))


async def _answer(ref: "ObjectRef[T]") -> T:
    """An actor's answer; our own exceptions come as they were raised there."""
    try:
        return await ref
    except RayTaskError as error:
        if isinstance(error.cause, MoefleetError):
            raise error.cause from error
        raise


def _watched(ref: "ObjectRef[T]") -> "asyncio.Future[T]":
    """A call's end as a future that nobody need ask for its exception."""
    future = asyncio.ensure_future(_answer(ref))
    future.add_done_callback(_look_away)
    return future


async def _unless_ended(ref: "ObjectRef[str]", endings: Sequence["Ending"]) -> str:
    """Rank 0's answer; MemberLostError when another rank ends before it."""
    answer = asyncio.ensure_future(_answer(ref))
    waiting: list[Ending] = [answer, *endings]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    ended = next((each for each in endings if each.done()), None)
    if ended is not None:
        # Rank 0 mostly knows better why: it heard the rank's last words.
        await asyncio.wait([answer], timeout=2.0)
        if not answer.done():
            answer.add_done_callback(_look_away)
            raise MemberLostError(f"a rank ended before the member was up: {_reason(ended)}")
    return await answer


def _look_away(ended: "asyncio.Future[T]") -> None:
    """Take an exception that nobody else will ask for."""
    if not ended.cancelled():
        ended.exception()


def _reason(ended: "Ending") -> str:
    error = ended.exception()
    return f"a rank ended by itself ({ended.result()})" if error is None else _last_line(error)


def _last_line(error: BaseException) -> str:
    """Of Ray's long accounts the line that tells why."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
