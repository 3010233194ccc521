"""One member's report of its load: what the router decides on."""

from dataclasses import dataclass

from router.request import MemberId, Role


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
    max_requests: int = 1
    """Rows: sequences that can run at once."""
    free_blocks: int = 0
    total_blocks: int = 1
    block_size: int = 16
    free_state_slots: int = 0
    total_state_slots: int = 0
    prefix_cache: bool = True
    """Whether KV of equal prefixes is reused."""
    handoff_requests: int = 0
    """Prefilled sequences whose KV waits to be fetched."""
    prefix_digest: frozenset[int] = frozenset()
    """64-bit hashes (router.prefix) of cached blocks, most recent first kept, bounded."""
    draining: bool = False
