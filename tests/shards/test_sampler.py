"""The sampler does what its text says, row by row, whatever shares the batch."""

import math

import pytest
import torch
from torch import Tensor

from shards.batch import NO_TOKEN, RowSampling
from shards.kernels.select import select_kernels
from shards.noise import uniform
from shards.sampler import Sampler

GREEDY = RowSampling(temperature=0.0)
CPU = torch.device("cpu")


def make_logits(rows: int, vocab: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def make_sampler(vocab_size: int) -> Sampler:
    return Sampler(vocab_size, CPU, select_kernels("auto", "cpu"))


def make_history(prompt: list[int], output: list[int], dtype: torch.dtype = torch.int32) -> tuple[Tensor, int]:
    return torch.tensor(prompt + output, dtype=dtype), len(prompt)


def pick(
    logits_NV: Tensor,
    samplings: list[RowSampling],
    histories: list[tuple[Tensor, int]] | None = None,
    positions: list[int] | None = None,
) -> list[int]:
    histories = histories or [make_history([0], [])] * len(samplings)
    positions = positions or [h[0].shape[0] for h in histories]
    tokens, _ = make_sampler(logits_NV.shape[1]).sample(logits_NV, samplings, positions, histories)
    assert tokens.dtype == torch.int64
    return tokens.tolist()


def plain_choice(logits_V: Tensor, s: RowSampling, position: int) -> int:
    """The drawing steps of the sampler's text in plain Python."""
    values = logits_V.tolist()
    best = max(values)
    weights = [math.exp((x - best) / s.temperature) for x in values]
    if 0 < s.top_k < len(weights):
        floor = sorted(weights, reverse=True)[s.top_k - 1]
        weights = [w if w >= floor else 0.0 for w in weights]
    if s.top_p < 1.0:
        goal, running, floor = s.top_p * sum(weights), 0.0, 0.0
        for floor in sorted(weights, reverse=True):
            running += floor
            if running >= goal:
                break
        weights = [w if w >= floor else 0.0 for w in weights]
    weights = [w if w >= s.min_p else 0.0 for w in weights]
    target, running = uniform(s.seed, position) * sum(weights), 0.0
    for token, weight in enumerate(weights):
        running += weight
        if running > target:
            return token
    raise AssertionError


def make_samplings() -> list[RowSampling]:
    return [
        GREEDY,
        RowSampling(seed=1),
        RowSampling(seed=2, temperature=0.3),
        RowSampling(seed=3, top_k=5),
        RowSampling(seed=4, top_k=300, temperature=2.0),
        RowSampling(seed=5, top_p=0.7),
        RowSampling(seed=6, top_p=0.99, temperature=5.0),
        RowSampling(seed=7, min_p=0.2),
        RowSampling(seed=8, top_k=40, top_p=0.9, min_p=0.01, temperature=1.3),
        RowSampling(seed=9, temperature=0.0, repetition_penalty=1.7, presence_penalty=0.5),
        RowSampling(seed=10, frequency_penalty=1.0, logit_bias=((3, 5.0),), min_tokens=9, stop_token_ids=(1, 2)),
        RowSampling(seed=11, top_k=20, top_p=0.95, logprobs=3),
    ]


def test_greedy_takes_the_largest_logit_and_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(2, 4000)
    logits[0, [7, 900, 3999]] = 2.0
    assert pick(logits, [GREEDY, GREEDY]) == [7, 0]


def test_drawing_agrees_with_a_plain_python_reading_of_the_text() -> None:
    samplings = [s for s in make_samplings() if s.temperature > 0 and not s.logit_bias]
    for vocab in (50, 3000):
        for position in range(5, 25):
            logits = make_logits(len(samplings), vocab, seed=position)
            expected = [plain_choice(x, s, position) for x, s in zip(logits, samplings, strict=True)]
            assert pick(logits, samplings, positions=[position] * len(samplings)) == expected


def test_a_rows_token_does_not_depend_on_the_rows_beside_it() -> None:
    samplings = make_samplings()
    logits = make_logits(len(samplings), 2000)
    histories = [make_history([5, 5, 9], [3, 3, 8 + i]) for i in range(len(samplings))]
    together = pick(logits, samplings, histories)
    order = [3, 1, 11, 0, 7, 5, 10, 2, 9, 4, 8, 6]
    turned = pick(logits[order], [samplings[i] for i in order], [histories[i] for i in order])
    assert turned == [together[i] for i in order]
    for i, s in enumerate(samplings):
        assert pick(logits[i : i + 1], [s], [histories[i]]) == [together[i]]


def test_the_window_for_small_top_k_gives_the_same_token_as_the_whole_vocabulary() -> None:
    logits = make_logits(40, 1200, scale=1.0)
    near = [RowSampling(seed=i, top_k=256, top_p=0.9) for i in range(40)]
    far = [RowSampling(seed=i, top_k=257, top_p=0.9) for i in range(40)]
    expected = [plain_choice(x, s, 1) for x, s in zip(logits, far, strict=True)]
    assert pick(logits, far) == expected
    assert pick(logits, near) == [plain_choice(x, s, 1) for x, s in zip(logits, near, strict=True)]


def test_equals_of_the_last_kept_token_are_kept_even_when_they_overflow_the_window() -> None:
    logits = torch.zeros(1, 1500)
    seen = {pick(logits, [RowSampling(seed=s, top_k=2)])[0] for s in range(60)}
    assert max(seen) > 1000
    assert len(seen) > 50


def test_top_k_one_and_a_tiny_top_p_are_greedy() -> None:
    logits = make_logits(3, 700)
    best = logits.argmax(-1).tolist()
    for seed in range(5):
        samplings = [
            RowSampling(seed=seed, top_k=1),
            RowSampling(seed=seed, top_p=1e-9),
            RowSampling(seed=seed, min_p=1.0),
        ]
        assert pick(logits, samplings) == best


def test_frequencies_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    logits = probabilities.log().expand(4000, 4).contiguous()
    tokens = pick(logits, [RowSampling(seed=3)] * 4000, positions=list(range(4000)))
    shares = [tokens.count(i) / 4000 for i in range(4)]
    assert shares[1] == 0.0
    assert shares == pytest.approx([0.5, 0.0, 0.3, 0.2], abs=0.025)


def test_a_tiny_temperature_neither_overflows_nor_leaves_the_best_token() -> None:
    logits = make_logits(4, 900, scale=50.0)
    assert pick(logits, [RowSampling(temperature=1e-6, seed=i) for i in range(4)]) == logits.argmax(-1).tolist()


def test_repetition_penalty_looks_at_prompt_and_output_and_pushes_both_signs_down() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.5, -9.0], [-1.0, -1.5, -3.0, -9.0]])
    sampling = RowSampling(temperature=0.0, repetition_penalty=2.0)
    assert pick(logits, [sampling] * 2, [make_history([0], [1]), make_history([0], [3])]) == [2, 1]


def test_presence_and_frequency_penalties_count_output_only() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0]]).expand(4, 3).contiguous()
    presence = RowSampling(temperature=0.0, presence_penalty=1.5)
    frequency = RowSampling(temperature=0.0, frequency_penalty=0.6)
    histories = [
        make_history([0, 0, 0], []),
        make_history([1], [0, 0]),
        make_history([1], [0], torch.int64),
        make_history([1], [0, 0]),
    ]
    assert pick(logits, [presence, presence, frequency, frequency], histories) == [0, 1, 0, 1]


def test_logit_bias_and_min_tokens_act_before_the_choice() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0]]).expand(3, 3).contiguous()
    biased = RowSampling(temperature=0.0, logit_bias=((2, 5.0), (0, -100.0)))
    minimum = RowSampling(temperature=0.0, min_tokens=2, stop_token_ids=(0,))
    histories = [make_history([1], []), make_history([1], [1]), make_history([1], [1, 1])]
    assert pick(logits, [biased, minimum, minimum], histories) == [2, 1, 0]


def test_logits_are_left_as_they_were_and_padding_is_never_chosen() -> None:
    logits = make_logits(2, 60)
    logits[:, 50:] = 100.0
    before = logits.clone()
    sampler = make_sampler(50)
    samplings = [RowSampling(temperature=0.0, logit_bias=((1, 1.0),)), RowSampling(seed=1)]
    tokens, _ = sampler.sample(logits, samplings, [1, 1], [make_history([0], [])] * 2)
    assert int(tokens.max()) < 50
    assert torch.equal(logits, before)


def test_logprobs_are_raw_and_each_row_gets_the_number_it_asked_for() -> None:
    logits = make_logits(3, 500)
    samplings = [
        RowSampling(seed=1, temperature=3.0, logprobs=2, logit_bias=((4, 60.0),)),
        RowSampling(temperature=0.0),
        RowSampling(temperature=0.0, logprobs=0),
    ]
    tokens, columns = make_sampler(500).sample(logits, samplings, [1] * 3, [make_history([0], [])] * 3)
    assert columns is not None
    expected = logits.log_softmax(-1)
    assert tokens.tolist()[0] == 4
    assert columns.logprobs_N[0] == expected[0, 4].item()
    assert columns.ranks_N == [1 + int((expected[0] > expected[0, 4]).sum()), 0, 1]
    assert columns.top_ids_NK[0] == expected[0].topk(2).indices.tolist()
    assert columns.top_logprobs_NK[0] == expected[0].topk(2).values.tolist()
    assert columns.top_ids_NK[1:] == [[], []]
    assert columns.logprobs_N[1] == 0.0


def test_nobody_asking_gives_no_logprobs() -> None:
    _, columns = make_sampler(50).sample(make_logits(1, 50), [GREEDY], [1], [make_history([0], [])])
    assert columns is None


def test_prompt_logprobs_are_those_of_the_next_tokens_over_any_number_of_rows() -> None:
    logits = make_logits(150, 90)
    next_tokens = torch.arange(150) % 90
    columns = make_sampler(90).prompt_logprob_columns(logits, next_tokens.int(), 3)
    expected = logits.log_softmax(-1)
    assert columns.logprobs_N == expected.gather(1, next_tokens[:, None])[:, 0].tolist()
    assert columns.top_ids_NK == expected.topk(3).indices.tolist()
    assert len(columns.ranks_N) == 150


def test_equal_alternatives_are_listed_lower_id_first() -> None:
    columns = make_sampler(4).prompt_logprob_columns(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), torch.tensor([2]), 2)
    assert columns.top_ids_NK == [[1, 2]]
    assert columns.ranks_N == [1]


def test_columns_of_unequal_length_and_a_short_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="logits of 2 rows need as many"):
        make_sampler(5).sample(torch.zeros(2, 5), [GREEDY], [1], [make_history([0], [])])
    with pytest.raises(ValueError, match="logits have 4 columns, the vocabulary has 5"):
        make_sampler(5).sample(torch.zeros(1, 4), [GREEDY], [1], [make_history([0], [])])


def test_no_rows_give_no_tokens() -> None:
    assert pick(torch.zeros(0, 9), []) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, RowSampling(seed=1), RowSampling(seed=1, top_k=3, top_p=0.5)])
def test_rows_with_logits_that_are_not_finite_get_no_token_and_others_theirs(bad: float, sampling: RowSampling) -> None:
    logits = make_logits(3, 600)
    logits[1, 17] = bad
    sound = pick(logits[[0, 2]], [sampling, sampling], positions=[4, 4])
    assert pick(logits, [sampling] * 3, positions=[4] * 3) == [sound[0], NO_TOKEN, sound[1]]
    logits[1] = -math.inf
    assert pick(logits, [sampling] * 3, positions=[4] * 3) == [sound[0], NO_TOKEN, sound[1]]


def test_the_smallest_temperatures_are_greedy() -> None:
    logits = make_logits(2, 600)
    best = logits.argmax(-1).tolist()
    for temperature in (1e-6, 1e-300, 5e-324):
        assert pick(logits, [RowSampling(seed=3, temperature=temperature)] * 2) == best


def test_rows_of_plain_sampling_get_the_same_tokens_without_their_histories() -> None:
    logits = make_logits(4, 70).round()
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    assert make_sampler(60).best(logits).tolist() == pick(logits[:, :60], [GREEDY] * 4)


@pytest.mark.parametrize(
    "sampling",
    [
        RowSampling(temperature=0.5),
        RowSampling(temperature=0.0, presence_penalty=0.1),
        RowSampling(temperature=0.0, frequency_penalty=0.1),
        RowSampling(temperature=0.0, repetition_penalty=1.1),
        RowSampling(temperature=0.0, logit_bias=((1, 1.0),)),
        RowSampling(temperature=0.0, min_tokens=1, stop_token_ids=(2,)),
        RowSampling(temperature=0.0, logprobs=0),
    ],
)
def test_sampling_that_asks_for_more_than_the_largest_logit_is_not_plain(sampling: RowSampling) -> None:
    assert not sampling.is_plain
    assert RowSampling(temperature=0.0, top_k=3, min_tokens=1, prompt_logprobs=1).is_plain
