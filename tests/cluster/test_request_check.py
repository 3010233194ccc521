from dataclasses import replace

import pytest

from cluster.request_check import MAX_PROMPT_LOGPROBS, check_request
from router.errors import InvalidRequestError
from router.request import Request, SamplingParams
from tests.support.scheduler_bench import CONFIG, make_request

SMALL = replace(CONFIG, vocab_size=100)


def with_sampling(**changes: object) -> Request:
    request = make_request("a", (1, 2, 99))
    return replace(request, sampling=replace(request.sampling, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "field", "told"),
    [
        (make_request("a", ()), "prompt_ids", "prompt_ids: is empty; send at least one token"),
        (make_request("a", (5, 100)), "prompt_ids", "prompt_ids: has token id 100, the model's ids are 0 to 99"),
        (make_request("a", (-1,)), "prompt_ids", "token id -1"),
        (make_request("a", (1,), output=(777,)), "output_ids", "output_ids: has token id 777"),
        (with_sampling(stop_token_ids=(3, 151_645)), "stop_token_ids", "stop_token_ids: has token id 151645"),
        (with_sampling(logit_bias=((100, 1.0),)), "logit_bias", "logit_bias: has token id 100"),
        (with_sampling(max_tokens=0), "max_tokens", "max_tokens: must exceed the 0 tokens generated so far, got 0"),
        (with_sampling(max_tokens=62), "max_tokens", "max_tokens: 62 and a prompt of 3 tokens are 65, over the limit"),
        (with_sampling(seed=-1), "seed", "seed: must be 64 bits without a sign, got -1"),
        (with_sampling(seed=1 << 64), "seed", "seed: must be 64 bits"),
        (with_sampling(logprobs=-1), "logprobs", "logprobs: must be at least 0, got -1"),
        (with_sampling(prompt_logprobs=-2), "prompt_logprobs", "prompt_logprobs: must be at least 0, got -2"),
        (
            with_sampling(prompt_logprobs=MAX_PROMPT_LOGPROBS),
            "prompt_logprobs",
            f"for a prompt of 3 tokens are 1500003 numbers, the limit is {MAX_PROMPT_LOGPROBS}; ask for fewer",
        ),
    ],
)
def test_request_that_would_break_a_step_is_refused_by_field(request_: Request, field: str, told: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_request(request_, SMALL, prefill_only=False)
    assert caught.value.field == field
    assert told in str(caught.value)


def test_strange_floats_are_let_through_as_they_give_some_token() -> None:
    nan = float("nan")
    check_request(with_sampling(temperature=nan, top_p=nan, min_p=nan, presence_penalty=nan), SMALL, prefill_only=False)
    check_request(with_sampling(top_k=1 << 40, logprobs=5, prompt_logprobs=5), SMALL, prefill_only=False)


def test_prefill_needs_no_room_for_the_output() -> None:
    config = replace(CONFIG, num_blocks=2)
    request = replace(make_request("a", 8), sampling=SamplingParams(max_tokens=20))
    check_request(request, config, prefill_only=True)
    with pytest.raises(InvalidRequestError, match="need 7 KV blocks of 4 tokens, the cache has 2"):
        check_request(request, config, prefill_only=False)
