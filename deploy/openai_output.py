"""Deltas of a generation to replies of the OpenAI API, streamed or whole."""

import uuid
from dataclasses import dataclass

from deploy.chat import JsonObject
from deploy.generation import Delta, Generation, UsageCount
from deploy.openai_logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from deploy.reasoning import ReasoningSplitter
from deploy.schema import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatReply,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    FinishReason,
    FunctionReply,
    PromptTokensDetails,
    ReplyMessage,
    ToolCallReply,
    Usage,
)
from deploy.tokenizer import TextTokenizer
from deploy.tools import ParsedCall, ToolCallParser


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyOptions:
    """What a client asked of the reply's form."""

    logprobs: bool = False
    tools: tuple[JsonObject, ...] = ()
    """Functions that the client described; where there are some, tool calls are looked for."""
    thinking: bool = False
    """Output begins with reasoning."""
    return_token_ids: bool = False
    include_usage: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatDelta:
    """What one delta adds to a chat message."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[ParsedCall, ...] = ()
    logprobs: ChatLogprobs | None = None
    token_ids: tuple[int, ...] = ()
    finish: FinishReason | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing that a client would miss."""
        return not (self.content or self.reasoning or self.calls or self.logprobs or self.token_ids or self.finish)


class ChatOutput:
    """One chat choice: text into reasoning, content and tool calls. Streamed and whole replies both come from here."""

    def __init__(self, options: ReplyOptions, tokenizer: TextTokenizer) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._reasoning = ReasoningSplitter(thinking=options.thinking)
        self._tools = ToolCallParser(options.tools) if options.tools else None

    def take(self, delta: Delta) -> ChatDelta:
        """Split one delta."""
        split = self._reasoning.push(delta.text)
        reasoning, content = split.reasoning, split.content
        if delta.finish is not None:
            rest = self._reasoning.finish()
            reasoning, content = reasoning + rest.reasoning, content + rest.content
        calls: tuple[ParsedCall, ...] = ()
        if self._tools is not None:
            found = self._tools.push(content)
            content, calls = found.content, found.calls
            if delta.finish is not None:
                last = self._tools.finish()
                content, calls = content + last.content, calls + last.calls
        return ChatDelta(
            content=content,
            reasoning=reasoning,
            calls=calls,
            logprobs=chat_logprobs(delta, self._tokenizer) if self._options.logprobs else None,
            token_ids=delta.token_ids if self._options.return_token_ids else (),
            finish=self._finish(delta),
        )

    def _finish(self, delta: Delta) -> FinishReason | None:
        if delta.finish == "stop" and self._tools is not None and self._tools.num_calls:
            return "tool_calls"
        return delta.finish


def chat_chunk(
    generation: Generation, index: int, delta: ChatDelta, *, options: ReplyOptions, first: bool
) -> ChatChunk:
    """One event of a chat stream. Fields that are not set are left out of the JSON."""
    message = ReplyMessage.model_validate(_message_fields(delta, first=first))
    choice = ChatChunkChoice(index=index, delta=message, logprobs=delta.logprobs, finish_reason=delta.finish)
    if options.return_token_ids:
        choice.token_ids = list(delta.token_ids)
    chunk = _chat_chunk(generation, [choice])
    if options.include_usage:
        chunk.usage = None
    return chunk


def chat_usage_chunk(generation: Generation, usage: UsageCount) -> ChatChunk:
    """The last event of a chat stream that asked for usage."""
    chunk = _chat_chunk(generation, [])
    chunk.usage = usage_reply(usage)
    return chunk


def _chat_chunk(generation: Generation, choices: list[ChatChunkChoice]) -> ChatChunk:
    return ChatChunk(
        id=generation.id,
        object="chat.completion.chunk",
        created=generation.created_unix_s,
        model=generation.given.model,
        choices=choices,
    )


def _message_fields(delta: ChatDelta, *, first: bool) -> dict[str, object]:
    fields: dict[str, object] = {"role": "assistant", "content": ""} if first else {}
    if delta.content:
        fields["content"] = delta.content
    if delta.reasoning:
        fields["reasoning"] = fields["reasoning_content"] = delta.reasoning
    if delta.calls:
        fields["tool_calls"] = [_call_reply(call, streamed=True) for call in delta.calls]
    return fields


def _call_reply(call: ParsedCall, *, streamed: bool) -> ToolCallReply:
    reply = ToolCallReply(
        id=f"call_{uuid.uuid4().hex[:24]}",
        type="function",
        function=FunctionReply(name=call.name, arguments=call.arguments),
    )
    if streamed:
        reply.index = call.index
    return reply


class ChatCollector:
    """Builds a whole chat reply."""

    def __init__(self, generation: Generation, options: ReplyOptions, tokenizer: TextTokenizer) -> None:
        self._generation = generation
        self._options = options
        self._tokenizer = tokenizer
        self._outputs = [ChatOutput(options, tokenizer) for _ in generation.requests]
        self._parts: list[list[ChatDelta]] = [[] for _ in generation.requests]
        self._prompt: Delta | None = None

    def take(self, delta: Delta) -> None:
        """Add one delta."""
        if delta.prompt_logprobs and delta.choice == 0:
            self._prompt = delta
        self._parts[delta.choice].append(self._outputs[delta.choice].take(delta))

    def reply(self, usage: UsageCount) -> ChatReply:
        """The reply; every choice has ended."""
        reply = ChatReply(
            id=self._generation.id,
            object="chat.completion",
            created=self._generation.created_unix_s,
            model=self._generation.given.model,
            choices=[self._choice(index, parts) for index, parts in enumerate(self._parts)],
            usage=usage_reply(usage),
        )
        if self._prompt is not None:
            reply.prompt_logprobs = prompt_logprobs(self._prompt, self._generation.prompts[0], self._tokenizer)
        if self._options.return_token_ids:
            reply.prompt_token_ids = list(self._generation.prompts[0])
        return reply

    def _choice(self, index: int, parts: list[ChatDelta]) -> ChatChoice:
        finish = parts[-1].finish
        assert finish is not None
        calls = [_call_reply(call, streamed=False) for part in parts for call in part.calls]
        content = "".join(part.content for part in parts)
        message = ReplyMessage(role="assistant", content=None if calls and not content else content, refusal=None)
        reasoning = "".join(part.reasoning for part in parts)
        if reasoning:
            message.reasoning = message.reasoning_content = reasoning
        if calls:
            message.tool_calls = calls
        entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        logprobs = ChatLogprobs(content=entries, refusal=None) if self._options.logprobs else None
        choice = ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=finish)
        if self._options.return_token_ids:
            choice.token_ids = [token_id for part in parts for token_id in part.token_ids]
        return choice


class CompletionOutput:
    """One choice of a text completion."""

    def __init__(self, generation: Generation, index: int, options: ReplyOptions, tokenizer: TextTokenizer) -> None:
        self._generation = generation
        self._index = index
        self._options = options
        self._tokenizer = tokenizer
        self._offset = 0
        self._first = True

    def take(self, delta: Delta) -> CompletionChoice:
        """What one delta adds. Fields that are not set are left out of the JSON."""
        logprobs: CompletionLogprobs | None = None
        if self._options.logprobs:
            logprobs = completion_logprobs(delta, self._tokenizer, offset=self._offset)
            self._offset += sum(map(len, logprobs.tokens))
        choice = CompletionChoice(index=self._index, text=delta.text, logprobs=logprobs, finish_reason=delta.finish)
        prompt_ids = self._generation.requests[self._index].prompt_ids
        if delta.prompt_logprobs:
            choice.prompt_logprobs = prompt_logprobs(delta, prompt_ids, self._tokenizer)
        if self._options.return_token_ids:
            choice.token_ids = list(delta.token_ids)
            if self._first:
                choice.prompt_token_ids = list(prompt_ids)
        self._first = False
        return choice


def completion_reply(generation: Generation, choices: list[CompletionChoice], usage: Usage | None) -> CompletionReply:
    """A whole reply, or one event of a stream; without usage the field is left out."""
    reply = CompletionReply(
        id=generation.id,
        object="text_completion",
        created=generation.created_unix_s,
        model=generation.given.model,
        choices=choices,
    )
    if usage is not None:
        reply.usage = usage
    return reply


def join_choices(parts: list[CompletionChoice]) -> CompletionChoice:
    """One choice from all that was added to it, in order."""
    whole = parts[-1].model_copy()
    whole.text = "".join(part.text for part in parts)
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    if logprobs:
        whole.logprobs = CompletionLogprobs(
            tokens=[each for part in logprobs for each in part.tokens],
            token_logprobs=[each for part in logprobs for each in part.token_logprobs],
            top_logprobs=[each for part in logprobs for each in part.top_logprobs],
            text_offset=[each for part in logprobs for each in part.text_offset],
        )
    if parts[0].prompt_logprobs is not None:
        whole.prompt_logprobs = parts[0].prompt_logprobs
    if parts[0].prompt_token_ids is not None:
        whole.prompt_token_ids = parts[0].prompt_token_ids
        whole.token_ids = [token_id for part in parts for token_id in part.token_ids or []]
    return whole


def usage_reply(usage: UsageCount) -> Usage:
    """Token counts as the API has them."""
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )
