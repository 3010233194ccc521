"""A sequence knows what is left to do, how it ends, and what its first event carries."""

from cluster.sequence import Mode, Sequence
from router.prefix import block_hashes
from router.request import Request, RequestId, SamplingParams
from shards.batch import LogprobColumns


def make_sequence(
    *,
    mode: Mode = "full",
    prompt: tuple[int, ...] = (1, 2, 3),
    output: tuple[int, ...] = (),
    max_tokens: int = 3,
    min_tokens: int = 0,
    stops: tuple[int, ...] = (),
    prompt_logprobs: int | None = None,
) -> Sequence:
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=stops,
        prompt_logprobs=prompt_logprobs,
        temperature=0.5,
        seed=11,
        logit_bias=((4, 1.0),),
    )
    request = Request(id=RequestId("r"), prompt_ids=prompt, output_ids=output, sampling=sampling, cache_salt="salt")
    return Sequence(request, mode=mode, lane=0, order=(0, 0))


def make_columns(*tokens: int) -> LogprobColumns:
    return LogprobColumns(
        logprobs_N=[-float(token) for token in tokens],
        ranks_N=[1] * len(tokens),
        top_ids_NK=[[token, 0] for token in tokens],
        top_logprobs_NK=[[-float(token), -9.0] for token in tokens],
    )


def test_the_last_allowed_token_ends_a_sequence_by_length() -> None:
    seq = make_sequence(max_tokens=2)
    assert seq.take(7, None).finish is None
    assert seq.take(8, None).finish == "length"


def test_a_stop_token_ends_a_sequence_after_min_tokens_and_wins_over_length() -> None:
    seq = make_sequence(max_tokens=2, min_tokens=1, stops=(9,))
    assert seq.take(9, None).finish is None
    assert seq.take(9, None).finish == "stop"


def test_a_moved_sequence_counts_what_others_generated() -> None:
    seq = make_sequence(output=(5, 6), max_tokens=3)
    assert seq.remaining == 5
    event = seq.take(7, None)
    assert (event.index, event.finish) == (2, "length")


def test_tokens_in_flight_count_against_the_length() -> None:
    seq = make_sequence(max_tokens=2)
    seq.length += 1
    assert not seq.all_sampled
    seq.length += 1
    assert seq.all_sampled


def test_a_prefill_sequence_samples_one_token_only() -> None:
    seq = make_sequence(mode="prefill", output=(5,), max_tokens=9)
    seq.length += 1
    assert seq.all_sampled


def test_cached_tokens_are_told_once_and_not_over_the_prompt() -> None:
    seq = make_sequence(prompt=(1, 2), output=(3, 4, 5), max_tokens=9)
    seq.admit([0, 1], registered=0, cached=4, row=0, slot=-1)
    assert seq.take(6, None).cached_tokens == 2
    seq.admit([0, 1], registered=0, cached=4, row=0, slot=-1)
    assert seq.take(7, None).cached_tokens == 0


def test_prompt_log_probabilities_of_chunks_come_together_on_the_first_event() -> None:
    seq = make_sequence(prompt=(1, 2, 3), prompt_logprobs=1)
    seq.admit([0], registered=0, cached=0, row=0, slot=-1)
    assert seq.start(4).sampling.prompt_logprobs == 1
    seq.collect(make_columns(2))
    seq.collect(make_columns(3, 99))
    first = seq.take(7, None)
    told = [entry and (entry.logprob, entry.top_ids) for entry in first.prompt_logprobs]
    assert told == [None, (-2.0, (2,)), (-3.0, (3,))]
    assert seq.take(8, None).prompt_logprobs == ()
    assert seq.start(4).sampling.prompt_logprobs is None


def test_a_prefill_begun_anew_collects_prompt_log_probabilities_anew() -> None:
    seq = make_sequence(prompt=(1, 2), prompt_logprobs=0)
    seq.admit([0], registered=0, cached=0, row=0, slot=-1)
    seq.collect(make_columns(2))
    seq.admit([0], registered=0, cached=0, row=0, slot=-1)
    seq.collect(make_columns(2))
    assert len(seq.take(7, None).prompt_logprobs) == 2


def test_the_ranks_get_tokens_table_and_sampling() -> None:
    seq = make_sequence(output=(8,), stops=(9,), min_tokens=1)
    seq.admit([4, 5], registered=1, cached=0, row=3, slot=2)
    start = seq.start(4)
    assert (start.row, start.token_ids, start.prompt_len) == (3, (1, 2, 3, 8), 3)
    assert (start.blocks, start.num_stored, start.state_slot) == ((4, 5), 4, 2)
    sampling = start.sampling
    assert (sampling.temperature, sampling.seed, sampling.logit_bias) == (0.5, 11, ((4, 1.0),))
    assert (sampling.min_tokens, sampling.stop_token_ids) == (1, (9,))


def test_hashes_are_the_salted_hashes_of_all_tokens_known() -> None:
    seq = make_sequence(prompt=(1, 2, 3), max_tokens=9)
    assert seq.hashes(1, 2) == block_hashes([1, 2], 2, "salt")
    for token in (4, 5):
        seq.take(token, None)
    assert seq.hashes(2, 2) == block_hashes([1, 2, 3, 4], 2, "salt")
    assert seq.hashes(1, 2) == block_hashes([1, 2], 2, "salt")


def test_an_end_without_a_token_carries_the_next_index_and_the_reason() -> None:
    seq = make_sequence()
    seq.take(7, None)
    event = seq.end("error", "because")
    assert (event.index, event.token_id, event.finish, event.error) == (1, None, "error", "because")
