"""What the scheduler decides for one step, and the claim on KV that waits for another member: plain data."""

from dataclasses import dataclass, field

from router.request import RequestId
from shards.batch import LaneOutput, StepBatch

KV_FORMAT = 6
"""Version of what a ticket means and of the bytes between a KV server and its readers. Raise it with either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRank:
    """Where one rank of the prefill side can be read."""

    tp_rank: int
    host_key: str
    """Equal for processes that can map each other's memory (boot id and pid namespace)."""
    pid: int
    pool_fd: int
    """File descriptor of the shared-memory cache in that process; -1 when the cache is not shareable."""
    address: str
    """host:port of the rank's KV server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Geometry of one member's cache, enough to cut it anew for another layout."""

    fingerprint: str
    """Model identity (config digest) and dtype: members of different fingerprints do not pair."""
    tp: int
    block_size: int
    num_blocks: int
    num_slots: int
    dtype: str
    state_dtype: str = "float32"
    """Of recurrent states; without meaning for models that have none."""
    expert_weights: str = "checkpoint"
    """int8 or int4 where experts are integers: the KV behind them is not that of plain ones."""
    version: int = KV_FORMAT


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTicket:
    """A claim on the KV and state of one prefilled sequence. It names blocks and holds none.

    The source keeps blocks and slot until it is released or `expires_unix_s` (plus a grace) has passed.
    """

    id: str
    member_id: str
    layout: KvLayout
    ranks: tuple[SourceRank, ...]
    """The ranks of the lane that holds the sequence, by tp_rank."""
    blocks: tuple[int, ...]
    state_slot: int
    num_tokens: int
    """Positions whose KV is there."""
    expires_unix_s: float
    partial: bool = False
    """The rest of the prompt is still computed: the same ticket comes again with more, at last with the state."""
    step: int = -1
    """The source's step that writes the last of it, layer by layer, and may still run; -1: all of it is there."""

    def lasts(self, now: float) -> bool:
        """Whether it may still be read."""
        return now < self.expires_unix_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOrder:
    """Copy a ticket's KV and state into this member's cache; every rank of the lane pulls its own part.

    Positions `first` up to the ticket's num_tokens are pulled; what comes before is held here already.
    """

    pull_id: int
    ticket: KvTicket
    lane: int
    first: int
    """A multiple of this member's block size, which need not be the source's."""
    dst_blocks: tuple[int, ...]
    """Blocks of this member for those positions, in order."""
    dst_slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PullDone:
    """One pull, finished on all ranks of its lane or failed on one."""

    pull_id: int
    error: str = ""
    num_bytes: int = 0
    seconds: float = 0.0
    refetches: int = 0
    """Frames that came damaged and were asked for again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: a batch for each lane. A plan without rows in any lane only carries pulls and row starts."""

    step: int
    lanes: tuple[StepBatch, ...]
    pulls: tuple[PullOrder, ...] = ()
    offers: "tuple[HandoffReady, ...]" = ()
    """What others may read while it runs."""

    @property
    def has_rows(self) -> bool:
        """True when the ranks run the model for this plan."""
        return any(lane.rows_S for lane in self.lanes)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """The lanes' answers to one plan."""

    step: int
    lanes: tuple[LaneOutput, ...] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffReady:
    """A prefilled sequence waits for its decode member: emitted right after its first TokenEvent.

    Before that `partial` ones tell of long prompts what is computed so far.

    The engine makes the KvTicket of it (it knows addresses; the scheduler does not).
    """

    request_id: RequestId
    ticket_id: str
    lane: int
    blocks: tuple[int, ...]
    state_slot: int
    num_tokens: int
    expires_unix_s: float
    partial: bool = False
    step: int = -1
    """As the ticket's."""
