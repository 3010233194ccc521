"""Experts in integers: the same bits in every layout and chunking, and near what plain experts give."""

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.batch import RowSampling
from shards.int_experts import ExpertChoice
from shards.mesh import Layout
from tests.support.int_checkpoint import IntForm, write_ints_and_twin
from tests.support.stepping import Work, needs_native, run, tokens_of

PROMPTS = [[3, 4, 5], list(range(40, 77)), [9] * 20, [7, 300, 11, 2]]
LAYOUTS = [
    Layout(tp=2),
    Layout(tp=2, ep=2),
    Layout(dp=2, ep=2),
    Layout(tp=4),
    Layout(tp=2, dp=2, ep=4),
]
WIDE = {"moe_intermediate_size": 128, "num_key_value_heads": 4}

pytestmark = needs_native


def answers(
    folder: Path, choice: ExpertChoice, layout: Layout, dtype: str, chunk: int = 1 << 20
) -> tuple[list[list[int]], list[float]]:
    """Tokens of each prompt, and all their log probabilities in the order of the prompts."""
    work = Work(
        prompts=PROMPTS, new_tokens=6, chunk=chunk, samplings=[RowSampling(temperature=0.0, logprobs=2)] * len(PROMPTS)
    )
    lanes = run(folder, work, layout, kernels="native", dtype=dtype, expert_weights=choice)
    told: list[list[float]] = [[] for _ in PROMPTS]
    for lane, outputs in enumerate(lanes):
        for output in outputs:
            if output.rows_N:
                assert output.logprobs is not None
                for row, logprob in zip(output.rows_N, output.logprobs.logprobs_N, strict=True):
                    told[row * len(lanes) + lane].append(logprob)
    return tokens_of(lanes, len(PROMPTS)), [value for values in told for value in values]


@pytest.fixture(scope="module", params=["int4", "int8", "gptq"])
def served(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ExpertChoice]:
    plain = make_checkpoint("qwen3_moe", **WIDE)
    if request.param != "gptq":
        return plain, request.param
    form = IntForm(form="gptq", bits=4, group=128)
    return write_ints_and_twin(plain, tmp_path_factory.mktemp("gptq"), form)[0], "checkpoint"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tokens_and_log_probabilities_are_the_same_in_every_layout_and_chunking(
    served: tuple[Path, ExpertChoice], dtype: str
) -> None:
    alone = answers(*served, Layout(), dtype)
    assert len(set(alone[1])) > len(alone[1]) // 2
    assert answers(*served, Layout(), dtype, chunk=7) == alone
    for layout in LAYOUTS:
        assert answers(*served, layout, dtype, chunk=5 if layout.tp == 4 else 1 << 20) == alone


def test_log_probabilities_are_near_those_of_plain_experts_and_nearer_with_more_bits(
    make_checkpoint: Callable[..., Path],
) -> None:
    folder = make_checkpoint("qwen3_moe", **WIDE)
    work = Work(prompts=[PROMPTS[1]], samplings=[RowSampling(temperature=0.0, prompt_logprobs=0)])

    def of_prompt(choice: ExpertChoice) -> list[float]:
        ((output,),) = run(folder, work, kernels="native", expert_weights=choice)
        return output.prompt_logprobs[0].logprobs_N

    plain = of_prompt("checkpoint")
    assert len(plain) == len(PROMPTS[1]) - 1
    off = {
        choice: statistics.median(abs(a - b) for a, b in zip(of_prompt(choice), plain, strict=True))
        for choice in ("int8", "int4")
    }
    # The median: where another expert is chosen a position of a random model is far off.
    assert 0 < off["int8"] < 0.1
    assert 3 * off["int8"] < off["int4"] < 1.0
