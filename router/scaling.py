"""How many members a pool should have: a pure function of load reports, the time and a small state."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from router.errors import ConfigError
from router.load import MemberLoad

_FULL: Final = 1.25
"""Members' worth of load of one that is kept busy: its gateways hold back what else there is."""

_SLACK: Final = 0.05
"""Of a member's worth of load, for which none is added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """Load that one member should carry, and bounds of the pool. Shares are between 0 and 1."""

    min_members: int = 1
    max_members: int = 1
    target_wait_s: float = 2.0
    """Seconds of computing in the prompts that wait at a member, by its own measure of its steps."""
    target_rows: float = 0.7
    """Share of rows taken, waiting requests counted as if they had one."""
    target_kv: float = 0.8
    """Share of KV blocks (or state slots) in use."""
    down_delay_s: float = 60.0
    """The pool shrinks only after needing fewer members for this long."""
    average_s: float = 10.0
    """Load is averaged over this long, exponentially: a long prompt that waits for a moment is no need of members."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_members <= self.max_members or self.max_members < 1:
            raise ConfigError(
                f"scaling needs 0 <= min_members <= max_members and max_members >= 1, got {self.min_members} and "
                f"{self.max_members}"
            )
        for name in ("target_rows", "target_kv"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"scaling.{name} must be over 0 and at most 1, got {getattr(self, name)}")
        if self.target_wait_s <= 0 or self.average_s <= 0 or self.down_delay_s < 0:
            raise ConfigError(
                "scaling.target_wait_s and average_s must be positive and down_delay_s not negative, got "
                f"{self.target_wait_s}, {self.average_s} and {self.down_delay_s}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingState:
    """What must be remembered between two decisions."""

    members: int
    """The last answer."""
    quiet_since_s: float | None = None
    """Since when fewer would have done."""
    quiet_peak: int = 0
    """The most that were needed since then."""
    load: float | None = None
    """Members' worth of it on average; None: nothing was reported yet."""
    seen_s: float = 0.0
    """When that was."""


def desired_members(
    loads: Iterable[MemberLoad], config: ScalingConfig, now: float, state: ScalingState
) -> tuple[int, ScalingState]:
    """Decide a pool's size from its members' reports.

    Args:
        loads: latest reports of the pool; draining members are leaving and do not count.
        config: targets and bounds.
        now: seconds, on any steady clock.
        state: what the last call returned; at first `ScalingState(members=...)` with the present size.

    Returns:
        The size wanted, up when the average load asks for it and down after `down_delay_s` without need, and the state
        for the next call. Without any report the size stays.
    """
    staying = [load for load in loads if not load.draining]
    if not staying:
        return min(max(state.members, config.min_members), config.max_members), state
    average = _average(sum(_share(load, config) for load in staying), config, now, state)
    needed = min(max(math.ceil(average - _SLACK), config.min_members), config.max_members)
    state = replace(state, load=average, seen_s=now)
    if needed >= state.members:
        return needed, replace(state, members=needed, quiet_since_s=None, quiet_peak=0)
    since = now if state.quiet_since_s is None else state.quiet_since_s
    peak = max(state.quiet_peak, needed)
    if now - since >= config.down_delay_s:
        return peak, replace(state, members=peak, quiet_since_s=None, quiet_peak=0)
    return state.members, replace(state, quiet_since_s=since, quiet_peak=peak)


def _average(load: float, config: ScalingConfig, now: float, state: ScalingState) -> float:
    """The load with what it was before."""
    if state.load is None:
        return load
    return load + (state.load - load) * math.exp(min(state.seen_s - now, 0.0) / config.average_s)


def _share(load: MemberLoad, config: ScalingConfig) -> float:
    """How many members' worth of load one member carries."""
    requests = load.running_requests + load.waiting_requests
    token_s = load.step_time.prefill_s_per_token(
        step_tokens=load.step_tokens, decode_rows=load.running_requests, context_tokens=load.context_tokens
    )
    shares = [
        load.waiting_tokens * token_s / config.target_wait_s,
        _FULL if load.waiting_tokens >= load.step_tokens / 2 else 0.0,
        requests / load.max_requests / config.target_rows,
        (1.0 - load.free_blocks / load.total_blocks) / config.target_kv,
    ]
    if load.total_state_slots:
        shares.append((1.0 - load.free_state_slots / load.total_state_slots) / config.target_kv)
    return max(shares)
