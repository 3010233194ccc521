"""The ranks of members in random histories: one rank in this process, or a process for each."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import FileStore

from shards.batch import LaneOutput, StepBatch
from shards.collectives import make_comms
from shards.comm import Comms
from shards.mesh import Layout, Place
from shards.rank import Rank
from tests.support.fork_server import fork_server
from tests.support.history_ranks import MOST_BLOCKS, MOST_DRAFTS, fill, open_rank, read_room, write_room

_END_S = 20.0


class MemberRanks(Protocol):
    """All ranks of one member. Room is a lane's: its blocks and a state slot, on each of its ranks."""

    def step(self, lanes: tuple[StepBatch, ...]) -> tuple[LaneOutput, ...]:
        """Carry out one plan."""
        ...

    def fill(self, lane: int, blocks: tuple[int, ...], slot: int | None) -> None:
        """Leave numbers that nothing good can come of; slot None: in all slots."""
        ...

    def read(self, lane: int, blocks: list[int], slot: int) -> list[list[Tensor]]:
        """What is there, by tp rank."""
        ...

    def write(self, lane: int, blocks: list[int], slot: int, content: list[list[Tensor]]) -> None:
        """Put there what `read` gave."""
        ...


class OneRank:
    """A member of a single rank, in this process."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def step(self, lanes: tuple[StepBatch, ...]) -> tuple[LaneOutput, ...]:
        output = self._rank.step(lanes[0])
        assert output is not None
        return (output,)

    def fill(self, lane: int, blocks: tuple[int, ...], slot: int | None) -> None:
        del lane
        fill(self._rank, blocks, slot)

    def read(self, lane: int, blocks: list[int], slot: int) -> list[list[Tensor]]:
        del lane
        return [read_room(self._rank, blocks, slot)]

    def write(self, lane: int, blocks: list[int], slot: int, content: list[list[Tensor]]) -> None:
        del lane
        write_room(self._rank, blocks, slot, content[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    member: int
    batch: StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fill:
    member: int
    blocks: tuple[int, ...]
    slot: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    member: int
    blocks: list[int]
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Write:
    member: int
    blocks: list[int]
    slot: int
    content: list[Tensor]


_Order = _Step | _Fill | _Read | _Write


class ProcessRanks:
    """One of the two members whose ranks share processes, a process for each place in the layout."""

    def __init__(self, member: int, layout: Layout, pipes: list["Connection[_Order | None, object]"]) -> None:
        self._member = member
        self._layout = layout
        self._pipes = pipes

    def step(self, lanes: tuple[StepBatch, ...]) -> tuple[LaneOutput, ...]:
        for rank, pipe in enumerate(self._pipes):
            pipe.send(_Step(member=self._member, batch=lanes[rank // self._layout.tp]))
        return tuple(answer for pipe in self._pipes if isinstance(answer := pipe.recv(), LaneOutput))

    def fill(self, lane: int, blocks: tuple[int, ...], slot: int | None) -> None:
        for pipe in self._lane(lane):
            pipe.send(_Fill(member=self._member, blocks=blocks, slot=slot))
            pipe.recv()

    def read(self, lane: int, blocks: list[int], slot: int) -> list[list[Tensor]]:
        content: list[list[Tensor]] = []
        for pipe in self._lane(lane):
            pipe.send(_Read(member=self._member, blocks=blocks, slot=slot))
            answer = pipe.recv()
            assert isinstance(answer, list)
            content.append([piece for piece in answer if isinstance(piece, Tensor)])
        return content

    def write(self, lane: int, blocks: list[int], slot: int, content: list[list[Tensor]]) -> None:
        for pipe, pieces in zip(self._lane(lane), content, strict=True):
            pipe.send(_Write(member=self._member, blocks=blocks, slot=slot, content=pieces))
            pipe.recv()

    def _lane(self, lane: int) -> list["Connection[_Order | None, object]"]:
        return self._pipes[lane * self._layout.tp : (lane + 1) * self._layout.tp]


@contextmanager
def open_members(model: Path, layout: Layout, *, one_host: bool) -> Iterator[tuple[MemberRanks, MemberRanks]]:
    """Two members whose ranks draft up to MOST_DRAFTS tokens, nothing good in their caches.

    Args:
        one_host: ranks meet in shared memory; or else over gloo.
    """
    if layout.world == 1:
        ranks = [open_rank(model, drafts=MOST_DRAFTS) for _ in range(2)]
        yield OneRank(ranks[0]), OneRank(ranks[1])
        for rank in ranks:
            rank.close()
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        pipes = [
            stack.enter_context(_rank_process(model, layout, rank, folder, one_host)) for rank in range(layout.world)
        ]
        yield ProcessRanks(0, layout, pipes), ProcessRanks(1, layout, pipes)
        for pipe in pipes:
            pipe.send(None)


@contextmanager
def _rank_process(
    model: Path, layout: Layout, rank: int, folder: str, one_host: bool
) -> Iterator["Connection[_Order | None, object]"]:
    context = fork_server()
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(model, layout, rank, folder, one_host, theirs), daemon=True)
    process.start()
    theirs.close()
    yield ours
    process.join(_END_S)
    process.kill()


def _serve(
    model: Path, layout: Layout, index: int, folder: str, one_host: bool, pipe: "Connection[object, _Order | None]"
) -> None:
    """A rank's process: its ranks in both members, which take turns and so can share gloo's groups."""
    torch.set_num_threads(1)
    place = Place(layout=layout, rank=index)
    store = FileStore(f"{folder}/store", layout.world)

    def meet(generation: int) -> Comms:
        return make_comms(store, place, generation=generation, device="cpu", deterministic=True, one_host=one_host)

    # Operations in shared memory go onto the tapes of one rank.
    groups = [meet(0), meet(1)] if one_host else [meet(0)]
    ranks = [open_rank(model, drafts=MOST_DRAFTS, place=place, comms=groups[member * one_host]) for member in range(2)]
    while (order := pipe.recv()) is not None:
        pipe.send(_carry_out(ranks[order.member], order))
    groups[0].world.barrier()
    for rank in ranks:
        rank.close()
    for comms in groups:
        comms.close()


def _carry_out(rank: Rank, order: _Order) -> object:
    match order:
        case _Step(batch=batch):
            return rank.step(batch)
        case _Fill(blocks=blocks, slot=slot):
            return fill(rank, blocks, slot)
        case _Read(blocks=blocks, slot=slot):
            return [piece.clone() for piece in read_room(rank, blocks, slot)]
        case _Write(blocks=blocks, slot=slot, content=content):
            return write_room(rank, blocks, slot, content)


def spoil(ranks: MemberRanks, lanes: int) -> None:
    """Fill all room: what lies in the cache before is never to be seen."""
    for lane in range(lanes):
        ranks.fill(lane, tuple(range(MOST_BLOCKS)), None)
