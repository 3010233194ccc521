"""What every rank's process runs, however it was started: join the group, load, then carry out work until the end."""

import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final, TypeVar

import torch
from torch.distributed import PrefixStore, Store, TCPStore

from cluster.executor import RankGroup
from cluster.handoff import Puller, source_rank
from cluster.kv_server import KvServer
from cluster.plan_codec import RankWork, decode_work
from cluster.rank_memory import RankMemory
from cluster.reports import LoadProgress, RankEnded, RankReady, Report, StepAnswer, encode_report
from cluster.resolve import ResolvedEngine, check_device_memory
from cluster.transports import host_key, make_transports
from cluster.wire import Channel, accept, connect, listen
from router.errors import ConfigError, CorruptDataError, MemberLostError
from shards.collectives import TIMEOUT_S, make_comms
from shards.comm import Comms
from shards.mesh import Place
from shards.rank import Rank
from shards.step_profile import StepProfile, part

logger = logging.getLogger(__name__)

_PROGRESS_S: Final = 0.2
_HANG_S: Final = 10.0
"""A rank that is still busy this long after rank 0 is gone and its groups are closed ends itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProcessConfig:
    """What one rank's process is told. Holds the cluster token: never in argv or logs."""

    engine: ResolvedEngine
    rank: int
    store_host: str
    """Rendezvous store of the replica, from `open_store`."""
    store_port: int
    token: str
    generation: int = 0
    """Grows each time the replica's ranks are formed anew."""
    host: str = "127.0.0.1"
    """Address of this rank's interface; other ranks and members reach it there."""
    gpu: int = 0
    """Which of the GPUs that this process sees is the rank's, on device cuda."""
    handoff: bool = False
    """Serve this rank's cache to other members and pull from theirs."""
    start_timeout_s: float = 120.0
    """Longest time until all ranks have joined; loading weights comes after that."""

    def __repr__(self) -> str:
        return f"RankProcessConfig(rank={self.rank}, generation={self.generation})"

    @property
    def place(self) -> Place:
        """This rank's place."""
        return Place(layout=self.engine.config.layout, rank=self.rank)


class _RefusedError(Exception):
    """The rank found at its start that the model cannot be served."""


T = TypeVar("T")
R = TypeVar("R")


def _checked(begin: Callable[[T], R], argument: T) -> R:
    """Begin something; its ValueError is for whoever chose model and layout."""
    try:
        return begin(argument)
    except ValueError as error:
        raise _RefusedError(str(error)) from error


class RankRunner:
    """One rank: `run` in one thread, `inbox` and `free` for others."""

    def __init__(
        self,
        config: RankProcessConfig,
        store: Store,
        report: Callable[[Report], None],
        profile: StepProfile | None = None,
    ) -> None:
        self.inbox: SimpleQueue[RankWork | None] = SimpleQueue()
        """Work in order; None ends the rank."""
        self.done = threading.Event()
        self._config = config
        self._store = store
        self._report = report
        self._profile = profile
        self._comms: Comms | None = None
        self._last_progress = 0.0

    def run(self) -> bool:
        """Join, load, serve; True when it ended as asked. A failure is reported, not raised."""
        try:
            self._run()
        except _RefusedError as error:
            self._report(RankEnded(error=str(error), refused=True))
            return False
        except Exception as error:
            # It ends the rank, and whoever started it is to say why.
            logger.exception("rank %s failed", self._config.rank)
            self._report(RankEnded(error=f"{type(error).__name__}: {error}"))
            return False
        finally:
            self.done.set()
        return True

    def free(self) -> None:
        """Close the rank's groups, so that an operation whose partners are gone ends."""
        if self._comms is not None:
            self._comms.close()

    def _run(self) -> None:
        config = self._config
        device = _checked(_rank_device, config)
        self._comms = make_comms(
            self._store,
            config.place,
            generation=config.generation,
            device=device,
            deterministic=config.engine.deterministic,
            one_host=_one_host(self._store, config),
            # Rank 0's watchdog names the step; operations wait no shorter than it does.
            timeout_s=max(TIMEOUT_S, config.engine.config.step_timeout_s),
        )
        rank_config = config.engine.rank_config(config.rank, device)
        rank = _checked(lambda comms: Rank(rank_config, comms, self._profile), self._comms)
        try:
            _checked(rank.load, self._tell_progress)
            self._serve(rank)
        finally:
            rank.close()
            self._comms.close()

    def _serve(self, rank: Rank) -> None:
        config = self._config
        if not config.handoff:
            self._report(RankReady())
            self._loop(rank, None)
            return
        choice, memory = config.engine.config.kv_transport, RankMemory(rank.cache.buffer)
        transports = _checked(lambda choice: make_transports(choice, memory, config.token), choice)
        server = KvServer(rank.cache.buffer, config.token, rank.cache.progress, host=config.host)
        tp_rank = config.place.tp_rank
        layout = config.engine.kv_layout()
        # The end of a pull is told past the steps: whoever waits for it does not wait for the step that runs.
        puller = Puller(
            rank.cache, rank.model_config, layout, tp_rank=tp_rank, transports=transports, on_done=self._report
        )
        try:
            self._report(RankReady(source=source_rank(rank.cache, tp_rank, server)))
            self._loop(rank, puller)
        finally:
            puller.close()
            server.close()

    def _loop(self, rank: Rank, puller: Puller | None) -> None:
        while True:
            with part(self._profile, "idle"):
                work = self.inbox.get()
            if work is None:
                return
            if puller is not None:
                for order in work.pulls:
                    puller.start(order)
            rank.cache.progress.begin(work.step)
            output = rank.step(work.batch)
            rank.cache.progress.end()
            if output is not None and work.answers:
                self._report(StepAnswer(step=work.step, output=output))

    def _tell_progress(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if done_bytes >= total_bytes or now - self._last_progress >= _PROGRESS_S:
            self._last_progress = now
            self._report(LoadProgress(done_bytes=done_bytes, total_bytes=total_bytes))


class OwnRankThread:
    """Rank 0's own rank in a thread of its process."""

    def __init__(self, runner: RankRunner) -> None:
        self.inbox = runner.inbox
        self._runner = runner
        self._thread = threading.Thread(target=runner.run, name="rank0", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """End it after its queue; free it when that takes too long."""
        self.inbox.put(None)
        self._thread.join(1.0)
        if self._thread.is_alive():
            self._runner.free()
            self._thread.join(_HANG_S)


def _rank_device(config: RankProcessConfig) -> str:
    """Make the rank's device the current one -> "cpu" or "cuda:<index>"."""
    if config.engine.config.device == "cpu":
        return "cpu"
    if config.gpu >= torch.cuda.device_count():
        raise ValueError(
            f"device=cuda: rank {config.rank} needs GPU {config.gpu} of this machine, torch sees "
            f"{torch.cuda.device_count()} GPUs; use fewer ranks a machine, or device=cpu"
        )
    torch.cuda.set_device(config.gpu)
    check_device_memory(config.engine, torch.cuda.mem_get_info(config.gpu)[0], where=f"GPU {config.gpu}")
    return f"cuda:{config.gpu}"


def _one_host(store: Store, config: RankProcessConfig) -> bool:
    """Whether all ranks run on one host and see each other's processes."""
    prefix = PrefixStore(f"host/{config.generation}", store)
    prefix.set(str(config.rank), host_key())
    return len({prefix.get(str(rank)) for rank in range(config.place.layout.world)}) == 1


def _settings_digest(engine: ResolvedEngine) -> str:
    room = (engine.num_blocks, engine.num_slots, engine.num_int8)
    settings = (engine.config, engine.model, engine.kernels, engine.deterministic, room)
    return hashlib.sha256(repr(settings).encode()).hexdigest()


def start_leader(
    config: RankProcessConfig,
    store: Store,
    *,
    on_progress: Callable[[LoadProgress], None] | None = None,
    check: Callable[[], None] | None = None,
    profile: StepProfile | None = None,
) -> RankGroup:
    """Start rank 0 in a thread of this process and wait until every rank has loaded.

    Args:
        store: from `open_store`; the other ranks connect to it.
        on_progress: told of the weights read so far, by all ranks together.
        check: called a few times a second while waiting; raises when the other ranks' processes are known to be gone.
        profile: gets the time of each part of rank 0's steps.

    Raises:
        CheckpointError: a rank cannot serve this model; the message says what would do.
        MemberLostError: a rank failed or did not come; the message names it and says why.
    """
    group = RankGroup(config.place.layout, step_timeout_s=config.engine.config.step_timeout_s)
    runner = RankRunner(config, store, lambda report: group.report(0, report), profile)
    with listen(config.host) as listener:
        address = f"{config.host} {listener.getsockname()[1]} {_settings_digest(config.engine)}"
        PrefixStore("plan", store).set(str(config.generation), address)
        group.set_own(OwnRankThread(runner))
        try:
            _gather(group, listener, config, check)
            _wait_ready(group, on_progress, check)
        except BaseException:
            # Also when interrupted: threads and shared memory would stay.
            runner.free()
            group.close()
            raise
    return group


def _gather(
    group: RankGroup, listener: socket.socket, config: RankProcessConfig, check: Callable[[], None] | None
) -> None:
    """Take in the connections of all other ranks."""
    deadline = time.monotonic() + config.start_timeout_s
    missing = set(range(1, config.place.layout.world))
    listener.settimeout(0.2)
    while missing:
        try:
            channel = accept(listener, config.token)
        except TimeoutError:
            channel = None
        rank = _introduced(channel) if channel is not None else None
        if channel is not None and rank in missing:
            missing.discard(rank)
            group.add_peer(rank, channel)
        elif channel is not None:
            channel.close()
        group.take_reports(0.0)
        if check is not None:
            check()
        if missing and time.monotonic() > deadline:
            raise MemberLostError(f"rank(s) {sorted(missing)} did not join within {config.start_timeout_s:g} s")


def _introduced(channel: Channel) -> int | None:
    """The rank that a new connection says it is."""
    channel.set_timeout(5.0)
    try:
        message = channel.recv()
    except (OSError, CorruptDataError):
        return None
    channel.set_timeout(None)
    if message is None or len(message) != 2 or message[0] != "rank" or type(message[1]) is not int:
        return None
    return message[1]


def _wait_ready(
    group: RankGroup, on_progress: Callable[[LoadProgress], None] | None, check: Callable[[], None] | None
) -> None:
    while not group.is_ready:
        group.take_reports(0.2)
        if check is not None:
            check()
        if on_progress is not None:
            on_progress(group.progress)


def run_peer(config: RankProcessConfig) -> int:
    """Run a rank other than 0 until rank 0 ends it or is gone; returns a process exit status.

    Raises:
        ConfigError: this process was told other settings than rank 0.
        CorruptDataError: rank 0 holds another cluster token.
        OSError: rank 0 cannot be reached.
    """
    store = TCPStore(config.store_host, config.store_port, is_master=False, wait_for_workers=False)
    address = PrefixStore("plan", store).get(str(config.generation)).decode()
    host, port, digest = address.split(" ")
    if digest != _settings_digest(config.engine):
        raise ConfigError(
            f"rank {config.rank} was started with other settings than rank 0; give every rank the same options and "
            "the same checkpoint, on machines of one kind"
        )
    channel = connect(host, int(port), config.token)
    channel.send(["rank", config.rank])

    def report(message: Report) -> None:
        try:
            channel.send(encode_report(message))
        except OSError:
            # Rank 0 is gone; the reader ends this rank.
            logger.debug("rank %s: report dropped, rank 0 is gone", config.rank)

    runner = RankRunner(config, store, report)
    threading.Thread(target=_read_work, args=(channel, runner), name="plans", daemon=True).start()
    ended_well = runner.run()
    channel.close()
    return 0 if ended_well else 1


def _read_work(channel: Channel, runner: RankRunner) -> None:
    """Queue what rank 0 sends; when it is gone, make sure that this rank ends."""
    try:
        while (message := channel.recv()) is not None and message[0] != "close":
            runner.inbox.put(decode_work(message))
        closed = message is not None
    except (OSError, CorruptDataError) as error:
        logger.error("connection to rank 0 lost: %s", error)
        closed = False
    runner.inbox.put(None)
    if closed and runner.done.wait(_HANG_S):
        return
    runner.free()
    if not runner.done.wait(_HANG_S):
        logger.error("still busy after rank 0 is gone: ending this process")
        os._exit(1)
