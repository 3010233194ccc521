from collections.abc import Callable
from pathlib import Path

import pytest

from shards.batch import RowSampling, StepBatch
from shards.comm import Comms
from shards.mesh import Layout, Place
from shards.rank import KernelsName
from tests.support.mtp import MtpReference, make_mtp_reference, speculate
from tests.support.reference import make_reference
from tests.support.stepping import Work, lane_batches, make_rank, needs_native, run, tokens_of

MIXED = 1.4
"""Disturbance that makes some drafts right and some wrong."""
LAYOUTS = [Layout(tp=2), Layout(dp=2), Layout(dp=2, ep=2), Layout(tp=2, dp=2, ep=4)]
SAMPLED = RowSampling(
    temperature=0.7,
    seed=3,
    top_p=0.95,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    repetition_penalty=1.1,
    logit_bias=((5, 2.0),),
    min_tokens=12,
    stop_token_ids=(7, 9),
    logprobs=2,
)
GREEDY = RowSampling(temperature=0.0, logprobs=2)
ALONE = Place(layout=Layout(), rank=0)
PROMPTS = [[3, 1, 4, 1, 5], list(range(40, 80)), [7] * 17]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float | None], Path]:
    """A checkpoint with a head by disturbance, made once."""
    made: dict[float | None, Path] = {}

    def make(disturbance: float | None) -> Path:
        if disturbance not in made:
            made[disturbance] = tmp_path_factory.mktemp("mtp")
            make_mtp_reference(made[disturbance], disturbance=disturbance)
        return made[disturbance]

    return make


@pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=needs_native)])
def test_drafts_are_those_of_the_plain_reference(tmp_path: Path, kernels: KernelsName) -> None:
    model = make_mtp_reference(tmp_path, disturbance=MIXED)
    reference = MtpReference(tmp_path, model)
    work = Work(prompts=PROMPTS, new_tokens=24, chunk=11)

    tokens, counts, _ = speculate(tmp_path, work, lambda row, step: 3, draft_tokens=3, kernels=kernels)

    kinds = set()
    for prompt, output, steps in zip(PROMPTS, tokens, counts, strict=True):
        done = steps[0]
        for count in steps[1:]:
            drafts = reference.drafts([*prompt, *output[:done]], 3)
            right = next((i for i in range(3) if drafts[i] != output[done + i]), 3)
            assert count == right + 1, f"prompt of {len(prompt)}, behind {done} tokens"
            kinds.add(count)
            done += count
            if done + 4 > len(output):
                break
    assert kinds == {1, 2, 3, 4}


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("disturbance", [None, MIXED], ids=["wrong drafts", "mixed drafts"])
@pytest.mark.parametrize("draft_tokens", [1, 2, 3])
def test_tokens_and_log_probabilities_are_those_without_drafts(
    draft_tokens: int,
    disturbance: float | None,
    sampling: RowSampling,
    dtype: str,
    checkpoint: Callable[[float | None], Path],
) -> None:
    work = Work(prompts=PROMPTS, new_tokens=20, chunk=9, samplings=[sampling] * 3)
    plain = run(checkpoint(disturbance), work, kernels="native", dtype=dtype)[0]

    # Rows differ in how much they draft, and so do steps.
    tokens, counts, outputs = speculate(
        checkpoint(disturbance),
        work,
        lambda row, step: (row + step) % (draft_tokens + 1),
        draft_tokens=draft_tokens,
        dtype=dtype,
    )

    assert [each[:20] for each in tokens] == tokens_of([plain], 3)
    if disturbance:
        assert max(max(each) for each in counts) == draft_tokens + 1
    said: dict[int, list[object]] = {0: [], 1: [], 2: []}
    expected: dict[int, list[object]] = {0: [], 1: [], 2: []}
    for found, steps in ((said, outputs), (expected, plain)):
        for output in steps:
            at = 0
            for i, row in enumerate(output.rows_N):
                count = output.counts_N[i] if output.counts_N else 1
                columns = output.logprobs
                assert columns is not None
                found[row] += zip(
                    columns.logprobs_N[at : at + count], columns.top_logprobs_NK[at : at + count], strict=True
                )
                at += count
            assert at == len(output.tokens_N)
    assert {row: each[:20] for row, each in said.items()} == expected


@needs_native
@pytest.mark.parametrize(
    ("layout", "shared_memory"),
    [*((layout, False) for layout in LAYOUTS), (Layout(tp=2), True), (Layout(tp=2, ep=2), True)],
    ids=str,
)
def test_every_layout_gives_the_tokens_without_drafts(
    layout: Layout, shared_memory: bool, checkpoint: Callable[[float | None], Path]
) -> None:
    work = Work(prompts=PROMPTS, new_tokens=16, chunk=9, samplings=[GREEDY, SAMPLED, GREEDY])
    expected = tokens_of(run(checkpoint(MIXED), work, kernels="native"), 3)
    _, alone, _ = speculate(checkpoint(MIXED), work, lambda row, step: 2, draft_tokens=2)

    tokens, counts, _ = speculate(
        checkpoint(MIXED), work, lambda row, step: 2, layout, draft_tokens=2, shared_memory=shared_memory
    )

    assert [each[:16] for each in tokens] == expected
    assert counts == alone, "layouts accept other drafts"


@needs_native
def test_rejected_drafts_leave_state_and_cache_of_the_accepted_tokens(
    checkpoint: Callable[[float | None], Path],
) -> None:
    work = Work(prompts=[PROMPTS[1]], new_tokens=6)
    plain = make_rank(checkpoint(None), ALONE, Comms.local(), max_rows=1, kernels="native")
    drafting = make_rank(checkpoint(None), ALONE, Comms.local(), max_rows=1, kernels="native", draft_tokens=3)
    computed = len(PROMPTS[1])
    for batch in lane_batches(work, 0, 1):
        expected = plain.step(batch)
        # Its last position holds drafts behind it from the second step on, all wrong here.
        verifies = 3 if batch.first_S[0] else 0
        counts = [batch.counts_S[0] + verifies]
        found = drafting.step(
            StepBatch(
                starts=batch.starts,
                rows_S=[0],
                first_S=batch.first_S,
                counts_S=counts,
                samples_S=[1],
                verifies_S=[verifies],
                drafts_S=[3],
            )
        )
        assert expected is not None
        assert found is not None
        assert found.tokens_N == expected.tokens_N
        assert drafting.cache.delta_states[1].equal(plain.cache.delta_states[1])
        assert drafting.cache.conv_states[0].equal(plain.cache.conv_states[0])
        block = plain.cache.shape.num_blocks - 1
        for ours, theirs in zip(drafting.cache.k_pools, plain.cache.k_pools, strict=False):
            assert ours[block, :, : min(computed, 16)].equal(theirs[block, :, : min(computed, 16)])
        computed += 1


def test_a_checkpoint_or_family_without_a_head_is_refused_by_name(tmp_path: Path) -> None:
    make_reference(tmp_path / "next", "qwen3_next")
    make_reference(tmp_path / "moe", "qwen3_moe")

    with pytest.raises(ValueError, match=r"mtp\..* is missing"):
        make_rank(tmp_path / "next", ALONE, Comms.local(), max_rows=1, draft_tokens=1)
    with pytest.raises(ValueError, match="draft_tokens=1 needs a multi-token prediction head, which qwen3_moe has not"):
        make_rank(tmp_path / "moe", ALONE, Comms.local(), max_rows=1, draft_tokens=1)
