"""What a request would cost on a member: predicted seconds, from its load report. Pure functions."""

from dataclasses import dataclass

from router.errors import ConfigError
from router.load import MemberLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Rates that turn counts into seconds. The defaults suit a small model on CPU; measure them for your members.

    Only ratios decide: all rates off by one factor give the same routes.
    """

    prefill_tokens_per_s: float = 2000.0
    """Prompt tokens a member computes a second."""
    pull_tokens_per_s: float = 100_000.0
    """Tokens a second whose KV a decode member fetches from a prefill member."""
    decode_row_s: float = 0.001
    """Seconds that each further running sequence adds to a decode step."""
    decode_steps: float = 128.0
    """Decode steps of a typical request: how often it pays `decode_row_s`."""
    row_wait_s: float = 2.0
    """Seconds until one of a full member's rows is free, divided by the requests that wait for it first."""
    pressure_s: float = 0.05
    """Cost of KV (or state slots) half full; it grows as used / free, so 1.9 times that at 65 %, 19 times at 95 %."""
    pressure_limit: float = 0.99
    """Used share at which the pressure stops growing."""
    tie_s: float = 0.0005
    """Costs this close count as equal."""

    def __post_init__(self) -> None:
        for name in ("prefill_tokens_per_s", "pull_tokens_per_s", "decode_steps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"policy.{name} must be positive, got {getattr(self, name)}")
        for name in ("decode_row_s", "row_wait_s", "pressure_s", "tie_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"policy.{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.pressure_limit < 1:
            raise ConfigError(f"policy.pressure_limit must be between 0 and 1, got {self.pressure_limit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """What was routed to a member and is not in its report yet."""

    requests: int = 0
    tokens: int = 0
    """Prompt tokens to compute or to fetch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What the request to place needs on one member."""

    num_tokens: int
    """Tokens whose KV must be there before the next one can be sampled."""
    cached_tokens: int
    """Of these, those whose KV the member holds."""

    @property
    def new_tokens(self) -> int:
        """Tokens to compute or to fetch."""
        return self.num_tokens - self.cached_tokens


def prefill_cost_s(load: MemberLoad, extra: Extra, ask: Ask, config: PolicyConfig) -> float:
    """Seconds until a member has computed the prompt behind all it has to do first."""
    tokens = load.waiting_tokens + extra.tokens + ask.new_tokens
    return tokens / config.prefill_tokens_per_s + _room_cost_s(load, extra, ask, config)


def decode_cost_s(load: MemberLoad, extra: Extra, ask: Ask, config: PolicyConfig) -> float:
    """Seconds that fetching the KV and sharing each step with the member's sequences add to a request."""
    fetch = (extra.tokens + ask.new_tokens) / config.pull_tokens_per_s
    return fetch + _sharing_cost_s(load, extra, config) + _room_cost_s(load, extra, ask, config)


def mixed_cost_s(load: MemberLoad, extra: Extra, ask: Ask, config: PolicyConfig) -> float:
    """Seconds of both phases on one member."""
    return prefill_cost_s(load, extra, ask, config) + _sharing_cost_s(load, extra, config)


def _sharing_cost_s(load: MemberLoad, extra: Extra, config: PolicyConfig) -> float:
    others = min(load.running_requests + load.waiting_requests + extra.requests, load.max_requests)
    return others * config.decode_row_s * config.decode_steps


def _room_cost_s(load: MemberLoad, extra: Extra, ask: Ask, config: PolicyConfig) -> float:
    """Waiting for a row, and the risk of preemption where KV or state slots run short."""
    queued = load.running_requests + load.waiting_requests + extra.requests + 1 - load.max_requests
    wait_s = max(queued, 0) * config.row_wait_s
    used = 1.0 - load.free_blocks / load.total_blocks
    used += (extra.tokens + ask.new_tokens) / (load.block_size * load.total_blocks)
    if load.total_state_slots:
        free_slots = load.free_state_slots - extra.requests - 1
        used = max(used, 1.0 - free_slots / load.total_state_slots)
    used = min(used, config.pressure_limit)
    return wait_s + config.pressure_s * used / (1.0 - used)
