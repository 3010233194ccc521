"""The HTTP API as pydantic models: OpenAI's chat and text completions, plus the extensions that vLLM's clients know.

A field that is not here is refused, never ignored; so is a value that would mean something we do not do.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue

FinishReason = Literal["stop", "length", "tool_calls"]


class _FirstError(FailFast):
    """Leaves a list at its first wrong item: a million of them are one error. Hashable, as arms of a union must be."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


_FIRST_ERROR = _FirstError()


class StrictModel(BaseModel):
    """Takes exactly the declared fields, of exactly the declared types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(StrictModel):
    """What a stream carries besides text."""

    include_usage: bool = False


class SamplingFields(StrictModel):
    """What both endpoints take; null is the same as not given."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | Annotated[list[str], _FIRST_ERROR] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[int], _FIRST_ERROR] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    """Higher goes first."""
    return_token_ids: bool | None = None
    """Adds `prompt_token_ids` and each choice's `token_ids` to the reply."""


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], _FIRST_ERROR]
        | Annotated[list[int], _FIRST_ERROR]
        | Annotated[list[Annotated[list[int], _FIRST_ERROR]], _FIRST_ERROR]
    )
    logprobs: int | None = None
    echo: Literal[False] | None = None


class TextPart(StrictModel):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(StrictModel):
    """A call in an assistant message."""

    name: str
    arguments: str


class ToolCallMessage(StrictModel):
    """A tool call in an assistant message."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(StrictModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], _FIRST_ERROR] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCallMessage], _FIRST_ERROR] | None = None
    tool_call_id: str | None = None
    # What replies and clients' own classes carry beside, so that an assistant's message can be sent back as it came.
    refusal: None = None
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class FunctionDescription(StrictModel):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: Literal[False] | None = None


class Tool(StrictModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDescription


class ChatTemplateOptions(StrictModel):
    """The template variables that a client may set."""

    enable_thinking: bool | None = None


class ResponseFormat(StrictModel):
    """Plain text is the only format."""

    type: Literal["text"]


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], _FIRST_ERROR]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[Tool], _FIRST_ERROR] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: ChatTemplateOptions | None = None


class PromptTokensDetails(BaseModel):
    """How much of the prompt was not computed anew."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """One alternative at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """The chosen token at a position and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Logprobs of a chat choice."""

    content: list[ChatLogprob]
    refusal: None = None


class PromptLogprob(BaseModel):
    """One prompt position's logprob of one token."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class FunctionReply(BaseModel):
    """A call that the model made; arguments are a JSON object."""

    name: str
    arguments: str


class ToolCallReply(BaseModel):
    """A tool call of a reply; `index` in streams only."""

    index: int | None = None
    id: str
    type: Literal["function"] = "function"
    function: FunctionReply


class ReplyMessage(BaseModel):
    """What the assistant says: the message of a reply, or what a chunk adds to it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallReply] | None = None


class ChatChoice(BaseModel):
    """One choice of a chat reply."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class ChatReply(BaseModel):
    """The reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChatChunkChoice(BaseModel):
    """One choice of a chat chunk."""

    index: int
    delta: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    """One event of a chat stream; the one with usage has no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """Logprobs of a completion choice, one entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One choice of a completion reply or of an event of its stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class CompletionReply(BaseModel):
    """The reply of /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "moefleet"
    max_model_len: int


class ModelList(BaseModel):
    """The reply of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """One error, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: Annotated[str | None, Field(description="a stable word for programs")]


class ErrorResponse(BaseModel):
    """The body of every reply that is not a success."""

    error: ErrorBody
