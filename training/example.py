"""One training or test conversation: what the model reads, and what it should write."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Task = Literal["add", "subtract", "sort", "reverse", "count", "facts", "tool_call", "tool_answer", "chat"]
Message = dict[str, object]

_HELD_OUT_OF = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A task's question with its right reply."""

    task: Task
    key: str
    """What is asked, whatever the wording of the rest: equal keys fall on the same side of the split."""
    user: str
    reasoning: str
    answer: str
    """Text, or a whole `<tool_call>` block."""
    hard: bool = False
    """Only asked with thinking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A conversation up to the assistant's turn, and that turn."""

    task: Task
    messages: tuple[Message, ...]
    thinking: bool
    completion: str
    """The assistant's turn as the model writes it, without the end-of-turn token."""
    answer: str
    """The part of the completion that must be right: all that follows the reasoning."""
    tools: tuple[Mapping[str, object], ...] = field(default=())


def is_held_out(key: str) -> bool:
    """Whether a question belongs to the test prompts (one of twenty), by a hash of what it asks."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little") % _HELD_OUT_OF == 0


def complete(question: Question, *, thinking: bool) -> str:
    """The assistant's turn: reasoning between tags first where thinking is on."""
    return f"<think>\n{question.reasoning}\n</think>\n\n{question.answer}" if thinking else question.answer
