"""Limits of one engine's scheduler; counts are of one lane where they say so."""

from dataclasses import dataclass

from router.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How much room each lane has and how much one step may do. Raises ConfigError on values that cannot work."""

    lanes: int
    """Data-parallel ranks, each with blocks, rows and slots of its own."""
    num_blocks: int
    """KV blocks of a lane."""
    num_slots: int
    """Recurrent-state slots of a lane, for running sequences and states kept; 0 for a model without such state."""
    num_int8: int = 0
    """Places for states kept in int8; 0: kept states take slots."""
    block_size: int
    """Tokens a block."""
    max_rows: int
    """Sequences that run at once in a lane."""
    max_step_tokens: int
    """Tokens a lane computes in one step, at most."""
    chunk_tokens: int
    """Prompt tokens of one sequence in one step, at most."""
    max_model_len: int
    """Prompt and generated tokens of one request, at most."""
    vocab_size: int
    """Token ids of the model are below this."""
    prefix_cache: bool
    state_spacing: int = 256
    """Tokens between two states that are kept of a prompt for others, at least, unless there is ample room."""
    token_bytes: int = 0
    """KV of one token on all ranks of a lane, for load reports."""
    state_bytes: int = 0
    """Recurrent state of one sequence on all ranks of a lane, for load reports."""
    checkpoint_bytes: int = 0
    """A kept state on all ranks of a lane, for load reports."""
    expert_share: float = 0.0
    """Of a layer's experts, those that one token is sent to, for step times; 0: the model has none."""
    draft_tokens: int = 0
    """Tokens drafted behind a row in a step, at most."""
    draft_adaptive: bool = True
    """Draft as many as pay; else always `draft_tokens`."""
    lease_s: float = 30.0
    """A prefilled sequence waits this long to be fetched."""
    lease_grace_s: float = 2.0
    """Its room is freed this much later: clocks of two hosts differ, and a started read ends."""
    early_tokens: int = 256
    """What is computed of a prompt can be fetched before its end, whenever it has grown by this many tokens."""
    offers_layers: bool = False
    """The layers that a prompt's last step has written can be fetched while it runs."""
    first_step: int = 0
    """Number of the first step; where engines use the same ranks in turn, beyond all that came before."""
    max_waiting: int
    """Requests that wait for room in all lanes together; more are refused."""

    def __post_init__(self) -> None:
        for name in (
            "lanes",
            "num_blocks",
            "block_size",
            "max_rows",
            "max_step_tokens",
            "chunk_tokens",
            "max_model_len",
            "vocab_size",
            "max_waiting",
            "state_spacing",
            "early_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_slots < 0:
            raise ConfigError(f"num_slots must be 0 (no recurrent state) or more, got {self.num_slots}")
        if self.lease_s <= 0 or self.lease_grace_s < 0:
            raise ConfigError(
                f"lease_s must be positive and lease_grace_s not negative, got {self.lease_s} and {self.lease_grace_s}"
            )
        if self.max_step_tokens < self.max_rows:
            raise ConfigError(
                f"max_step_tokens={self.max_step_tokens} cannot give each of max_rows={self.max_rows} rows a token a "
                f"step; raise max_step_tokens to {self.max_rows} or lower max_rows"
            )
        if self.prefix_cache and self.num_slots == 1 and not self.num_int8:
            raise ConfigError(
                "prefix_cache with recurrent state needs a slot to keep a state in besides the running one, got "
                "num_slots=1; raise num_slots or turn prefix_cache off"
            )

    @property
    def num_checkpoints(self) -> int:
        """States that can be kept while every row runs."""
        return self.num_int8 or self.num_slots - self.max_rows

    def blocks_for(self, positions: int) -> int:
        """Blocks that hold this many positions."""
        return -(-positions // self.block_size)
