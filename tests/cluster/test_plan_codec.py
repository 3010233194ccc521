from dataclasses import replace

import pytest

from cluster.plan_codec import RankWork, decode_output, decode_work, encode_output, encode_work
from router.errors import CorruptDataError
from shards.batch import LaneOutput, LogprobColumns, StepBatch


def make_output_message() -> list[object]:
    columns = LogprobColumns(logprobs_N=[-0.5], ranks_N=[1], top_ids_NK=[[4]], top_logprobs_NK=[[-0.5]])
    return encode_output(3, LaneOutput(rows_N=[0], tokens_N=[4], logprobs=columns))


def test_work_without_rows_arrives_as_such() -> None:
    work = decode_work(encode_work(RankWork(step=4, answers=False, batch=StepBatch())))
    assert (work.step, work.answers, work.pulls, list(work.batch.rows_S)) == (4, False, (), [])


def test_an_output_arrives_with_its_log_probabilities() -> None:
    step, output = decode_output(make_output_message())
    assert (step, output.tokens_N) == (3, [4])
    assert output.logprobs is not None
    assert output.logprobs.top_logprobs_NK == [[-0.5]]


def test_an_output_arrives_with_the_tokens_of_accepted_drafts() -> None:
    _, output = decode_output(encode_output(3, LaneOutput(rows_N=[0, 2], tokens_N=[4, 5, 6], counts_N=[2, 1])))
    assert (output.rows_N, output.tokens_N, output.counts_N) == ([0, 2], [4, 5, 6], [2, 1])


def test_work_arrives_with_drafts_and_columns_of_another_length_are_refused() -> None:
    batch = StepBatch(
        rows_S=[1, 4], first_S=[6, 9], counts_S=[3, 1], samples_S=[1, 1], verifies_S=[2, 0], keeps_mtp=False
    )
    work = RankWork(step=1, answers=True, batch=batch)
    assert decode_work(encode_work(work)) == work
    for broken in (replace(batch, verifies_S=[2]), replace(batch, drafts_S=[1])):
        with pytest.raises(CorruptDataError, match="differ in length"):
            decode_work(encode_work(replace(work, batch=broken)))


def test_log_probabilities_that_are_no_numbers_are_refused() -> None:
    message = make_output_message()
    message[3] = [["-0.5"], [1], [[4]], [[-0.5]]]
    with pytest.raises(CorruptDataError, match="list of numbers"):
        decode_output(message)


def test_tokens_that_are_no_whole_numbers_are_refused() -> None:
    message = encode_output(3, LaneOutput(rows_N=[0], tokens_N=[4]))
    message[2] = [[0], ["4"], [1]]
    with pytest.raises(CorruptDataError, match="list of whole numbers"):
        decode_output(message)
