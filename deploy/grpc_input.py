"""A gRPC request to the plain input of the validation layer, and deltas back to messages."""

from collections.abc import Sequence

from google.protobuf.message import Message as ProtoMessage
from google.protobuf.unknown_fields import UnknownFieldSet

from deploy.chat import ChatMessage, ChatPrompt, Role, ToolCall
from deploy.generation import Delta, Generation, UsageCount
from deploy.openai_input import parse_json_object
from deploy.protos import moefleet_v1_pb2 as pb
from deploy.validation import GenerationInput, SamplingInput, TextPrompts, TokenPrompts
from router.errors import InvalidRequestError
from router.request import TokenLogprob

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def generation_input(request: pb.GenerateRequest, *, tenant: str, deadline_unix_s: float | None) -> GenerationInput:
    """The plain input of a Generate call.

    Raises:
        InvalidRequestError: there is no input, a field of it cannot be read, or there are fields that we do not know.
    """
    _refuse_unknown_fields(request)
    return GenerationInput(
        model=request.model,
        prompt=_prompt(request),
        sampling=_sampling(request.sampling),
        n=request.n if request.HasField("n") else 1,
        stop=tuple(request.stop),
        priority=request.priority,
        tenant=tenant,
        deadline_unix_s=deadline_unix_s,
    )


def delta_response(generation: Generation, delta: Delta) -> pb.GenerateResponse:
    """One message of the stream."""
    response = pb.GenerateResponse(
        request_id=generation.id, index=delta.choice, text=delta.text, token_ids=delta.token_ids
    )
    if delta.logprobs:
        response.logprobs.extend(_logprobs(delta.token_ids, delta.logprobs))
    if delta.prompt_logprobs:
        prompt_ids = generation.requests[delta.choice].prompt_ids
        response.prompt_logprobs.extend(_logprobs(prompt_ids, delta.prompt_logprobs))
    if delta.finish is not None:
        response.finish_reason = _FINISH[delta.finish]
    return response


def usage_response(generation: Generation, usage: UsageCount) -> pb.GenerateResponse:
    """The last message of the stream."""
    counts = pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
    return pb.GenerateResponse(request_id=generation.id, usage=counts)


def _prompt(request: pb.GenerateRequest) -> TextPrompts | TokenPrompts | ChatPrompt:
    match request.WhichOneof("input"):
        case "text":
            return TextPrompts(texts=(request.text,))
        case "token_ids":
            return TokenPrompts(token_ids=(tuple(request.token_ids.ids),))
        case "chat":
            return _chat(request.chat)
        case None:
            raise InvalidRequestError("input: is missing; send text, chat or token_ids", field="input")


def _chat(chat: pb.Chat) -> ChatPrompt:
    tools = [parse_json_object(f"chat.tools_json[{index}]", text) for index, text in enumerate(chat.tools_json)]
    return ChatPrompt(
        messages=tuple(_message(index, message) for index, message in enumerate(chat.messages)),
        tools=tuple(tools),
        enable_thinking=chat.enable_thinking if chat.HasField("enable_thinking") else None,
    )


def _message(index: int, message: pb.Message) -> ChatMessage:
    field = f"chat.messages[{index}]"
    role = _ROLES.get(message.role)
    if role is None:
        known = ", ".join(_ROLES)
        raise InvalidRequestError(
            f"{field}.role: must be one of {known}, got {message.role[:40]!r}", field=f"{field}.role"
        )
    calls = [
        ToolCall(
            name=call.name,
            arguments=parse_json_object(f"{field}.tool_calls[{at}].arguments_json", call.arguments_json),
        )
        for at, call in enumerate(message.tool_calls)
    ]
    return ChatMessage(role=role, content=message.content, reasoning=message.reasoning, tool_calls=tuple(calls))


def _sampling(given: pb.Sampling) -> SamplingInput:
    return SamplingInput(
        max_tokens=given.max_tokens if given.HasField("max_tokens") else None,
        min_tokens=given.min_tokens if given.HasField("min_tokens") else None,
        temperature=given.temperature if given.HasField("temperature") else None,
        top_p=given.top_p if given.HasField("top_p") else None,
        top_k=given.top_k if given.HasField("top_k") else None,
        min_p=given.min_p if given.HasField("min_p") else None,
        presence_penalty=given.presence_penalty if given.HasField("presence_penalty") else None,
        frequency_penalty=given.frequency_penalty if given.HasField("frequency_penalty") else None,
        repetition_penalty=given.repetition_penalty if given.HasField("repetition_penalty") else None,
        logit_bias=tuple(given.logit_bias.items()),
        seed=given.seed if given.HasField("seed") else None,
        stop_token_ids=tuple(given.stop_token_ids),
        ignore_eos=given.ignore_eos,
        logprobs=given.logprobs if given.HasField("logprobs") else None,
        prompt_logprobs=given.prompt_logprobs if given.HasField("prompt_logprobs") else None,
    )


def _logprobs(token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> list[pb.Logprob]:
    return [_logprob(token_id, each) for token_id, each in zip(token_ids, logprobs, strict=True)]


def _logprob(token_id: int, given: TokenLogprob | None) -> pb.Logprob:
    if given is None:
        return pb.Logprob(token_id=token_id)
    return pb.Logprob(
        known=True,
        token_id=token_id,
        logprob=given.logprob,
        rank=given.rank,
        top_ids=given.top_ids,
        top_logprobs=given.top_logprobs,
    )


def _refuse_unknown_fields(request: pb.GenerateRequest) -> None:
    """A field from a newer client would otherwise be ignored without a word."""
    parts: list[tuple[str, ProtoMessage]] = [("request", request), ("sampling", request.sampling)]
    parts += [("chat", request.chat), *((f"chat.messages[{i}]", m) for i, m in enumerate(request.chat.messages))]
    for name, part in parts:
        unknown = UnknownFieldSet(part)
        if len(unknown):
            number = unknown[0].field_number
            raise InvalidRequestError(f"{name}: field number {number} is not known here; remove it", field=name)
