"""A prompt is hashed once for each block size, and knows what may still be produced."""

from router.prefix import block_hashes
from router.prompt import Prompt, prompt_of
from router.request import Request, RequestId, SamplingParams


def make_request(output: tuple[int, ...] = ()) -> Request:
    return Request(
        id=RequestId("r"),
        prompt_ids=tuple(range(32)),
        output_ids=output,
        sampling=SamplingParams(max_tokens=8),
        cache_salt="s",
    )


def test_emitted_tokens_are_part_of_what_must_be_computed() -> None:
    prompt = prompt_of(make_request((7, 8)))
    assert (prompt.key, prompt.num_tokens, prompt.max_output) == ("r", 34, 6)
    assert list(prompt.hashes(16)) == block_hashes(range(32), 16, "s")


def test_the_block_with_the_last_token_is_left_out_and_hashes_are_made_once() -> None:
    prompt = prompt_of(make_request())
    assert len(prompt.hashes(16)) == 1
    assert prompt.hashes(16) is prompt.hashes(16)


def test_known_hashes_are_taken_and_other_block_sizes_have_none() -> None:
    prompt = Prompt("k", num_tokens=1000, max_output=5, hashes={512: (4,)})
    assert list(prompt.hashes(512)) == [4]
    assert list(prompt.hashes(16)) == []


def test_hashing_in_steps_gives_what_hashing_at_once_gives() -> None:
    prompt = prompt_of(make_request(tuple(range(9))))
    assert [prompt.hash_some(4, 4) for _ in range(4)] == [False, False, True, True]
    assert list(prompt.hashes(4)) == block_hashes((*range(32), *range(8)), 4, "s")
