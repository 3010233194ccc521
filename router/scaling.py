"""How many members a pool should have: a pure function of load reports, the time and a small state."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from router.errors import ConfigError
from router.load import MemberLoad

_FULL: Final = 1.25
"""Members' worth of load of one that is kept busy: its gateways hold back what else there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """Load that one member should carry, and bounds of the pool. Shares are between 0 and 1."""

    min_members: int = 1
    max_members: int = 1
    target_waiting_tokens: float = 4096.0
    """Prompt tokens waiting at a member: about two seconds of prefill."""
    target_rows: float = 0.7
    """Share of rows taken, waiting requests counted as if they had one."""
    target_kv: float = 0.8
    """Share of KV blocks (or state slots) in use."""
    down_delay_s: float = 60.0
    """The pool shrinks only after needing fewer members for this long."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_members <= self.max_members or self.max_members < 1:
            raise ConfigError(
                f"scaling needs 0 <= min_members <= max_members and max_members >= 1, got {self.min_members} and "
                f"{self.max_members}"
            )
        for name in ("target_rows", "target_kv"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"scaling.{name} must be over 0 and at most 1, got {getattr(self, name)}")
        if self.target_waiting_tokens <= 0 or self.down_delay_s < 0:
            raise ConfigError(
                "scaling.target_waiting_tokens must be positive and down_delay_s not negative, got "
                f"{self.target_waiting_tokens} and {self.down_delay_s}"
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
        The size wanted, up at once and down after `down_delay_s` without need, and the state for the next call.
        Without any report the size stays.
    """
    staying = [load for load in loads if not load.draining]
    needed = math.ceil(sum(_share(load, config) for load in staying) - 1e-9) if staying else state.members
    needed = min(max(needed, config.min_members), config.max_members)
    if needed >= state.members:
        return needed, ScalingState(members=needed)
    if state.quiet_since_s is None:
        state = ScalingState(members=state.members, quiet_since_s=now)
    since, peak = state.quiet_since_s, max(state.quiet_peak, needed)
    if since is not None and now - since >= config.down_delay_s:
        return peak, ScalingState(members=peak)
    return state.members, ScalingState(members=state.members, quiet_since_s=since, quiet_peak=peak)


def _share(load: MemberLoad, config: ScalingConfig) -> float:
    """How many members' worth of load one member carries."""
    requests = load.running_requests + load.waiting_requests
    shares = [
        load.waiting_tokens / config.target_waiting_tokens,
        _FULL if load.waiting_tokens >= load.step_tokens / 2 else 0.0,
        requests / load.max_requests / config.target_rows,
        (1.0 - load.free_blocks / load.total_blocks) / config.target_kv,
    ]
    if load.total_state_slots:
        shares.append((1.0 - load.free_state_slots / load.total_state_slots) / config.target_kv)
    return max(shares)
