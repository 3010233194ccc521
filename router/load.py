"""One member's reports: its load, and what its prefix cache took in and let go. What the router decides on."""

from dataclasses import dataclass, field

from router.request import MemberId, Role
from router.step_time import StepTime


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberCounts:
    """What a member has counted since its engine started."""

    preemptions: int = 0
    """Times a running request gave up its room for another, and was computed again."""
    drafted_tokens: int = 0
    """Drafts verified."""
    accepted_tokens: int = 0
    """Drafts that were right."""
    pulls: int = 0
    """Hand-offs pulled from other members."""
    failed_pulls: int = 0
    """Those that did not succeed; their tokens were computed here."""
    refetched_frames: int = 0
    """Frames of a pull that came damaged and were asked for again."""
    pulled_bytes: int = 0
    pull_s: float = 0.0
    """Seconds that pulls which succeeded took, on the slowest rank of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberLoad:
    """A member's state at one moment, all counts over its lanes together."""

    member_id: MemberId
    role: Role
    sequence: int = 0
    """Grows by one a report; a gap means a lost report."""
    waiting_requests: int = 0
    waiting_tokens: int = 0
    """Prompt tokens not yet computed, of waiting and running requests."""
    running_requests: int = 0
    context_tokens: int = 0
    """Tokens whose KV running requests hold."""
    max_requests: int = 1
    """Rows: sequences that can run at once."""
    step_tokens: int = 2048
    """Tokens that one step computes at most."""
    step_time: StepTime = field(default_factory=StepTime)
    """What its steps take, as measured by itself."""
    free_blocks: int = 0
    total_blocks: int = 1
    block_size: int = 16
    token_bytes: int = 0
    """KV of one token, that a hand-off moves."""
    state_bytes: int = 0
    """Recurrent state of one sequence, that a hand-off moves; 0: the model has none."""
    checkpoint_bytes: int = 0
    """Recurrent state that is kept for later sequences: `state_bytes`, or less where it is kept in int8."""
    free_state_slots: int = 0
    total_state_slots: int = 0
    state_checkpoints: int = 0
    """Recurrent states kept for later sequences; slots that they take count as free."""
    evicted_checkpoints: int = 0
    """Given up for room, since the start."""
    prefix_cache: bool = True
    """Whether KV of equal prefixes is reused."""
    handoff_requests: int = 0
    """Prefilled sequences whose KV waits to be fetched."""
    counts: MemberCounts = field(default_factory=MemberCounts)
    draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEvents:
    """How a member's prefix cache changed: 64-bit hashes (router.prefix) of blocks, in no order.

    They take whoever knows the cache as of `after` to `sequence`. A snapshot (`cleared`) begins anew at any time.
    """

    after: int
    """The sequence number that the receiver must be at; without meaning where `cleared`."""
    sequence: int
    cleared: bool = False
    """Nothing else than what is stored here is in the cache."""
    stored: tuple[int, ...] = ()
    """Blocks whose KV can be found now."""
    removed: tuple[int, ...] = ()
    stored_states: tuple[int, ...] = ()
    """Blocks behind whose last token a recurrent state can be found now."""
    removed_states: tuple[int, ...] = ()
