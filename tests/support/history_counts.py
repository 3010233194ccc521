"""What random histories came to."""

from dataclasses import dataclass, fields


@dataclass(slots=True, kw_only=True)
class Counts:
    """What happened, over all histories."""

    histories: int = 0
    actions: int = 0
    steps: int = 0
    requests: int = 0
    tokens: int = 0
    hits: int = 0
    """Requests that found a part of their prompt cached."""
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    evicted_states: int = 0
    aborts: int = 0
    early_pulls: int = 0
    """Of what was computed of a prompt, while the rest of it was."""
    handoffs: int = 0
    """Sequences that went on from another member's KV and state."""
    failed_pulls: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{getattr(self, field.name)} {field.name}" for field in fields(self))
