"""What a request would cost on a member: predicted seconds, from its load report and its step times. Pure functions.

A cost is linear in what the request brings, so that a member's part is computed once a report and not once a request:
seconds = base + new tokens x token price + output tokens x output price.
"""

from dataclasses import dataclass
from typing import Final

from router.errors import ConfigError
from router.load import MemberLoad
from router.step_time import experts_read

_GUESS_BYTES: Final = 64e6
"""What the configured bandwidth weighs against measured pulls: a first small one, mostly latency, decides nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """What members cannot report of themselves."""

    transfer_bytes_per_s: float = 1e9
    """Bandwidth of a hand-off to a member, until it has pulled more than some tens of MB and so measured its own."""
    output_tokens: float = 256.0
    """Tokens that a request is expected to produce, if it may; limits that clients set are far above what they use."""
    others_weight: float = 2.0
    """How much a second that others wait for this request counts against a second that it waits itself. Over 1, because
    a delay is passed on for as long as there is a queue: 1 / (1 - utilisation) times in theory."""
    work_weight: float = 10.0
    """How much a second of computing counts beside that, wherever it is: who computes what is cached elsewhere takes it
    from all who will come, utilisation / (1 - utilisation) seconds of waiting in theory."""
    stall_weight: float = 0.2
    """How much a second counts by which the next token of a sequence that runs comes later."""
    tie_s: float = 0.0005
    """Costs this close count as equal."""

    def __post_init__(self) -> None:
        for name in ("transfer_bytes_per_s", "output_tokens"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"policy.{name} must be positive, got {getattr(self, name)}")
        for name in ("others_weight", "work_weight", "stall_weight", "tie_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"policy.{name} must not be negative, got {getattr(self, name)}")


# Not frozen: the router counts in it.
@dataclass(slots=True, kw_only=True)
class Extra:
    """What was routed to a member and is not in its report yet."""

    requests: int = 0
    tokens: int = 0
    """Prompt tokens to compute or to fetch."""
    held_tokens: int = 0
    """Whose KV the member will hold: of prompts, cached or not, and of expected output."""
    arrivals_per_s: float = 0.0
    """Requests that come to a member of its pool, on average."""


# Not frozen, as two are made for every decision; never changed once made.
@dataclass(slots=True, kw_only=True)
class Price:
    """What a member asks of any request, in seconds."""

    base_s: float
    """The wait before it."""
    token_s: float
    """A token that the member does not hold yet."""
    output_s: float
    """A token to produce, as far as this depends on the member."""


def prefill_price(load: MemberLoad, extra: Extra, config: PolicyConfig) -> Price:
    """Of computing the prompt behind all that the member has to do first."""
    base_s, token_s = _prefill(load, extra, config)
    return Price(base_s=base_s, token_s=token_s, output_s=0.0)


def _prefill(load: MemberLoad, extra: Extra, config: PolicyConfig) -> tuple[float, float]:
    """The wait before a prompt, and what one of its tokens costs."""
    token_s = load.step_time.prefill_s_per_token(
        step_tokens=load.step_tokens, decode_rows=load.running_requests, context_tokens=load.context_tokens
    )
    queue_s = (load.waiting_tokens + extra.tokens) * token_s
    # Whoever comes while the queue lasts waits for these tokens too: where it is long, computing anew what is cached
    # elsewhere costs many.
    behind = extra.arrivals_per_s * queue_s
    work_s = config.work_weight * load.step_time.prefill_token_s
    shared_s = token_s * (1.0 + config.others_weight * behind) + work_s
    return queue_s + _room_s(load, extra, config), shared_s


def decode_price(load: MemberLoad, extra: Extra, config: PolicyConfig) -> Price:
    """Of fetching KV and state, and of sharing each step with the member's sequences."""
    counts = load.counts
    guess_s = _GUESS_BYTES / config.transfer_bytes_per_s
    byte_s = (counts.pull_s + guess_s) / (counts.pulled_bytes + _GUESS_BYTES)
    state_s, token_s = load.state_bytes * byte_s, load.token_bytes * byte_s
    base_s = state_s + extra.tokens * token_s + _room_s(load, extra, config)
    return Price(base_s=base_s, token_s=token_s, output_s=_sharing_s(load, _rows(load, extra)))


def mixed_price(load: MemberLoad, extra: Extra, config: PolicyConfig) -> Price:
    """Of both phases on one member: nothing is moved."""
    base_s, token_s = _prefill(load, extra, config)
    rows = _rows(load, extra)
    stall_s = config.stall_weight * load.step_time.prefill_token_s * rows
    return Price(base_s=base_s, token_s=token_s + stall_s, output_s=_sharing_s(load, rows))


def _rows(load: MemberLoad, extra: Extra) -> int:
    """Sequences that a new one will share steps with."""
    return min(load.running_requests + load.waiting_requests + extra.requests, load.max_requests)


def _sharing_s(load: MemberLoad, rows: int) -> float:
    """Seconds a decode step takes longer for the others in it."""
    step = load.step_time
    shared_s = rows * step.decode_row_s + load.context_tokens * step.context_token_s
    if step.experts_s:
        shared_s += step.experts_s * (experts_read(step.expert_share, rows + 1) - step.expert_share)
    return shared_s


def _room_s(load: MemberLoad, extra: Extra, config: PolicyConfig) -> float:
    """Seconds until enough sequences have ended to make room: rows, blocks and state slots come back with them."""
    running = max(load.running_requests, 1)
    queued = load.waiting_requests + extra.requests + 1
    short = (load.running_requests + queued - load.max_requests) / running
    used = load.total_blocks - load.free_blocks
    if used:
        outputs = load.waiting_requests * config.output_tokens if load.role != "prefill" else 0.0
        needed = (load.waiting_tokens + outputs + extra.held_tokens) / load.block_size
        short = max(short, (needed - load.free_blocks) / used)
    if load.total_state_slots:
        held = max(load.total_state_slots - load.free_state_slots, 1)
        short = max(short, (queued - load.free_state_slots) / held)
    if short <= 0:
        return 0.0
    step_s = load.step_time.step_s(
        prefill_tokens=0, decode_rows=load.running_requests, context_tokens=load.context_tokens
    )
    return short * config.output_tokens * step_s
