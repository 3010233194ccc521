"""Traces are read strictly and scaled without changing what sessions look like."""

import json

import pytest

from router.errors import ConfigError
from router.trace import TraceRequest, read_trace, reusable_tokens, scale_trace


def line(**values: object) -> str:
    given = {"timestamp": 0, "input_length": 20, "output_length": 5, "hash_ids": [1, 2]}
    return json.dumps(given | values)


def make(arrival_s: float, *blocks: int, tokens: int | None = None) -> TraceRequest:
    prompt = tokens or len(blocks) * 16
    return TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=3, blocks=blocks)


def test_good_lines_become_requests_and_empty_ones_nothing() -> None:
    first, second = read_trace([line(), "", line(timestamp=1500.0, input_length=32)], 16)
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens, first.blocks) == (0.0, 20, 5, (1, 2))
    assert second.arrival_s == 1.5
    assert (first.full_blocks(16), second.full_blocks(16)) == ((1,), (1,))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "line 2: Expecting"),
        ("[1]", "line 2: is no JSON object"),
        (line(timestamp=-1), "timestamp must be milliseconds"),
        (line(timestamp="now"), "timestamp must be milliseconds"),
        (line(timestamp=True), "timestamp must be milliseconds"),
        (line(timestamp=float("inf")), "timestamp must be milliseconds"),
        (line(timestamp=float("nan")), "timestamp must be milliseconds"),
        (line(timestamp=10**400), "timestamp must be milliseconds from 0 to 1e+14"),
        ("[" * 100_000, "is nested too deeply"),
        (line(output_length=10**30), "output_length must be a whole number from 1 to 1e+09"),
        (line(input_length=0), "input_length must be a whole number"),
        (line(output_length=2.5), "output_length must be a whole number"),
        (line(output_length=True), "output_length must be a whole number"),
        (line(hash_ids="1 2"), "hash_ids must be a list"),
        (line(hash_ids=[1, None]), "hash_ids must be a list"),
        (line(hash_ids=[1, 2, 3]), "3 ids where input_length=20 makes 2 blocks of 16"),
        (line(hash_ids=[]), "0 ids"),
        (line(hash_ids=[1, 1]), "names a block twice"),
    ],
)
def test_a_line_that_makes_no_sense_is_refused_with_its_number(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=r"line 2: ") as caught:
        read_trace([line(), text], 16)
    assert why in str(caught.value)


def test_an_unsorted_or_empty_trace_is_refused() -> None:
    with pytest.raises(ConfigError, match="line 2: timestamp is before"):
        read_trace([line(timestamp=5), line(timestamp=4)], 16)
    with pytest.raises(ConfigError, match="holds no request"):
        read_trace([" "], 16)


def test_what_can_be_reused_is_the_known_prefix_of_full_blocks() -> None:
    trace = [make(0, 1, 2, 3), make(1, 1, 2, 4), make(2, 1, 2, 3, tokens=49)]
    assert reusable_tokens(trace, 16) == [0, 32, 32]
    assert reusable_tokens([make(0, 1, 2, tokens=33), make(1, 5, 6, tokens=33), make(2, 1, 2, tokens=33)], 16, 3) == [
        0,
        0,
        16,
    ]


def test_copies_have_blocks_of_their_own_and_keep_the_pauses() -> None:
    trace = [make(float(second), second, 100) for second in range(100)]
    scaled = scale_trace(trace, 3.0, requests=150)
    assert 150 <= len(scaled) <= 160
    assert [each.arrival_s for each in scaled] == sorted(each.arrival_s for each in scaled)
    owners = {each.blocks[1] for each in scaled}
    assert len(owners) == 3
    one = [each.arrival_s for each in scaled if each.blocks[1] == 100]
    assert one == [float(second) for second in range(len(one))]


def test_copies_share_no_block_of_any_sign() -> None:
    trace = [make(0.0, -3, 4), make(10.0, 2, -1)]
    blocks = [each.blocks for each in scale_trace(trace, 2.0, requests=4)]
    assert len({block for each in blocks for block in each}) == 8


def test_a_small_change_of_rate_changes_the_clock_of_one_copy() -> None:
    scaled = scale_trace([make(0.0, 1), make(10.0, 2)], 0.5, requests=100)
    assert [each.arrival_s for each in scaled] == [0.0, 20.0]
