"""How long one step of a member takes: a linear model of what is in it, and the rates that follow from it."""

from dataclasses import dataclass, fields

from router.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step = base + prompt + prompt tokens, decode rows and context, each times its price, + experts.

    Attention over the context is the only part of a decode row that grows; what a prompt token attends to is in its
    price on average. A step reads the weights of those experts that any of its tokens was sent to: of n tokens that
    choose evenly, 1 - (1 - share)^n of all (the occupancy problem), so that a step of 50 tokens may read as much as
    one of 500. The defaults suit a small model on CPU; members report what they measure of themselves.
    """

    base_s: float = 0.002
    prefill_token_s: float = 0.0005
    decode_row_s: float = 0.001
    context_token_s: float = 0.0
    """For each token that the step's decode rows attend to."""
    prompt_s: float = 0.0
    """Once in a step with prompt tokens: one without them may be cheaper to start than its tokens are fewer."""
    experts_s: float = 0.0
    """To read the weights of all experts."""
    expert_share: float = 0.0
    """Of a layer's experts, those that one token is sent to; 0: the model has none."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"step_time.{field.name} must be finite and not negative, got {value}")
        if self.expert_share > 1:
            raise ConfigError(f"step_time.expert_share must be at most 1, got {self.expert_share}")
        if self.prefill_token_s == 0:
            raise ConfigError("step_time.prefill_token_s must be positive, got 0; measure a step with a prompt in it")

    def step_s(self, *, prefill_tokens: float, decode_rows: float, context_tokens: float) -> float:
        """Seconds of one step."""
        decode_s = decode_rows * self.decode_row_s + context_tokens * self.context_token_s
        step_s = self.base_s + prefill_tokens * self.prefill_token_s + decode_s
        if prefill_tokens:
            step_s += self.prompt_s
        if self.experts_s:
            step_s += self.experts_s * experts_read(self.expert_share, prefill_tokens + decode_rows)
        return step_s

    def prefill_s_per_token(self, *, step_tokens: int, decode_rows: float, context_tokens: float) -> float:
        """Seconds a queued prompt token takes where full steps of `step_tokens` carry the decode rows along."""
        room = max(step_tokens - decode_rows, 1.0)
        full_s = self.step_s(prefill_tokens=room, decode_rows=decode_rows, context_tokens=context_tokens)
        return full_s / room


def experts_read(share: float, tokens: float) -> float:
    """The part of all experts that some token of a step is sent to, each to `share` of them."""
    return 1.0 - (1.0 - share) ** tokens
