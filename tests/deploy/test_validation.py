"""What both APIs accept, and the router requests that it becomes."""

from dataclasses import replace

import pytest

from deploy.chat import ChatMessage, ChatPrompt, ToolCall
from deploy.served_model import SamplingDefaults
from deploy.validation import (
    GenerationInput,
    Limits,
    SamplingInput,
    TextPrompts,
    TokenPrompts,
    build_requests,
    check_text_length,
    choice_seed,
    validate,
)
from router.errors import InvalidRequestError, UnknownModelError
from tests.support.serving import make_model

HI = (1, 2, 3)


def make_input(
    sampling: SamplingInput | None = None,
    *,
    model: str = "tiny",
    prompt: TextPrompts | TokenPrompts | ChatPrompt | None = None,
    n: int = 1,
    stop: tuple[str, ...] = (),
    priority: int = 0,
    tenant: str = "",
) -> GenerationInput:
    return GenerationInput(
        model=model,
        prompt=prompt or TokenPrompts(token_ids=(HI,)),
        sampling=sampling or SamplingInput(),
        n=n,
        stop=stop,
        priority=priority,
        tenant=tenant,
    )


def refusal(given: GenerationInput, limits: Limits | None = None) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        validate(given, make_model(), limits or Limits())
    return caught.value


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (SamplingInput(temperature=-0.1), "temperature"),
        (SamplingInput(temperature=2.1), "temperature"),
        (SamplingInput(temperature=float("nan")), "temperature"),
        (SamplingInput(top_p=0.0), "top_p"),
        (SamplingInput(top_p=1.5), "top_p"),
        (SamplingInput(top_k=-2), "top_k"),
        (SamplingInput(min_p=1.1), "min_p"),
        (SamplingInput(presence_penalty=-2.1), "presence_penalty"),
        (SamplingInput(frequency_penalty=2.1), "frequency_penalty"),
        (SamplingInput(repetition_penalty=0.0), "repetition_penalty"),
        (SamplingInput(seed=2**64), "seed"),
        (SamplingInput(max_tokens=0), "max_tokens"),
        (SamplingInput(min_tokens=-1), "min_tokens"),
        (SamplingInput(min_tokens=9, max_tokens=8), "min_tokens"),
        (SamplingInput(min_tokens=1000), "min_tokens"),
        (SamplingInput(logprobs=21), "top_logprobs"),
        (SamplingInput(prompt_logprobs=21), "prompt_logprobs"),
        (SamplingInput(stop_token_ids=(512,)), "stop_token_ids"),
        (SamplingInput(stop_token_ids=tuple(range(200))), "stop_token_ids"),
        (SamplingInput(logit_bias=((1, 101.0),)), "logit_bias.1"),
        (SamplingInput(logit_bias=((-1, 1.0),)), "logit_bias"),
        (SamplingInput(logit_bias=((1, 1.0),) * 2000), "logit_bias"),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_by_name(sampling: SamplingInput, field: str) -> None:
    error = refusal(make_input(sampling))

    assert error.field == field
    assert str(error).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (make_input(n=0), "n"),
        (make_input(n=17), "n"),
        (make_input(priority=101), "priority"),
        (make_input(stop=("",)), "stop"),
        (make_input(stop=("x" * 257,)), "stop"),
        (make_input(stop=("x",) * 17), "stop"),
        (make_input(prompt=TokenPrompts(token_ids=())), "prompt"),
        (make_input(prompt=TokenPrompts(token_ids=((512,),))), "prompt"),
        (make_input(prompt=TokenPrompts(token_ids=((-1,),))), "prompt"),
        (make_input(prompt=TextPrompts(texts=("x",) * 129)), "prompt"),
        (make_input(prompt=TextPrompts(texts=("x",) * 20), n=10), "n"),
        (make_input(prompt=ChatPrompt(messages=())), "messages"),
        (make_input(prompt=ChatPrompt(messages=(ChatMessage(role="user"),) * 4097)), "messages"),
        (make_input(prompt=ChatPrompt(messages=(ChatMessage(role="user"),), tools=({},) * 129)), "tools"),
    ],
)
def test_lists_and_counts_over_their_caps_are_refused_by_name(given: GenerationInput, field: str) -> None:
    assert refusal(given).field == field


def test_tool_calls_outside_of_assistant_messages_are_refused() -> None:
    message = ChatMessage(role="user", tool_calls=(ToolCall(name="f", arguments={}),))

    assert refusal(make_input(prompt=ChatPrompt(messages=(message,)))).field == "messages[0].tool_calls"


def test_another_model_name_is_unknown_and_the_error_names_the_right_one() -> None:
    with pytest.raises(UnknownModelError, match="use 'tiny'"):
        validate(make_input(model="gpt"), make_model(), Limits())


@pytest.mark.parametrize("length", [256, 1000])
def test_a_prompt_that_leaves_no_room_names_both_lengths(length: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"{length} tokens .* 256 tokens \(max_model_len\)") as caught:
        build_requests(make_input(), [(1,) * length], make_model(), request_id="r")
    assert caught.value.field == "prompt"


def test_a_chat_that_leaves_no_room_names_its_messages() -> None:
    given = make_input(prompt=ChatPrompt(messages=(ChatMessage(role="user", content="hi"),)))
    with pytest.raises(InvalidRequestError, match=r"^messages: 300 tokens leave no room") as caught:
        build_requests(given, [(1,) * 300], make_model(), request_id="r")
    assert caught.value.field == "messages"


def test_a_limit_is_told_in_full() -> None:
    assert str(2**64 - 1) in str(refusal(make_input(SamplingInput(seed=2**64))))


def test_more_new_tokens_than_the_context_has_room_for_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="ask for at most 253") as caught:
        build_requests(make_input(SamplingInput(max_tokens=254)), [HI], make_model(), request_id="r")
    assert caught.value.field == "max_tokens"


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        build_requests(make_input(), [()], make_model(), request_id="r")


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    check_text_length("x" * 10, max_chars=10)
    with pytest.raises(InvalidRequestError, match="11 characters"):
        check_text_length("x" * 11, max_chars=10)


def test_what_a_client_does_not_say_comes_from_the_generation_config() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.05, max_tokens=7)
    model = replace(make_model(), defaults=defaults)
    (request,) = build_requests(make_input(), [HI], model, request_id="r")
    sampling = request.sampling

    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.6, 0.95, 20, 0.1)
    assert (sampling.repetition_penalty, sampling.max_tokens) == (1.05, 7)


def test_what_a_client_says_goes_before_the_generation_config() -> None:
    model = replace(make_model(), defaults=SamplingDefaults(temperature=0.6, top_k=20, max_tokens=7))
    given = make_input(SamplingInput(temperature=0.0, top_k=-1, max_tokens=9))
    (request,) = build_requests(given, [HI], model, request_id="r")

    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.max_tokens) == (0.0, 0, 9)


def test_without_a_limit_output_may_fill_the_context() -> None:
    (request,) = build_requests(make_input(), [HI], make_model(), request_id="r")

    assert request.sampling.max_tokens == 253


def test_end_tokens_stop_a_sequence_unless_ignored() -> None:
    model = make_model()
    (request,) = build_requests(make_input(SamplingInput(stop_token_ids=(5,))), [HI], model, request_id="r")
    assert request.sampling.stop_token_ids == (5, *model.eos_token_ids)

    given = make_input(SamplingInput(stop_token_ids=(5,), ignore_eos=True))
    (request,) = build_requests(given, [HI], model, request_id="r")
    assert request.sampling.stop_token_ids == (5,)


def test_a_choice_has_the_same_seed_however_many_choices_and_prompts_there_are() -> None:
    sampling = SamplingInput(seed=7)
    alone = build_requests(make_input(sampling), [HI], make_model(), request_id="r")
    many = build_requests(make_input(sampling, n=3), [HI, (4,)], make_model(), request_id="r")

    assert [each.prompt_ids for each in many] == [HI] * 3 + [(4,)] * 3
    assert many[0].sampling.seed == alone[0].sampling.seed == 7
    assert [each.sampling.seed for each in many[:3]] == [each.sampling.seed for each in many[3:]]
    assert len({each.sampling.seed for each in many[:3]}) == 3
    assert len({each.id for each in many}) == 6


def test_seeds_are_64_bits_and_negative_ones_count() -> None:
    assert choice_seed(-1, 0) == 2**64 - 1
    assert 0 <= choice_seed(-1, 1) < 2**64


def test_requests_without_seed_differ() -> None:
    seeds = {build_requests(make_input(), [HI], make_model(), request_id="r")[0].sampling.seed for _ in range(3)}

    assert len(seeds) == 3


def test_a_tenant_salts_the_prefix_cache() -> None:
    (request,) = build_requests(make_input(tenant="a"), [HI], make_model(), request_id="r")

    assert (request.tenant, request.cache_salt) == ("a", "a")
