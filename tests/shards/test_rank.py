import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shards.batch import NO_TOKEN, LaneOutput, RowSampling, RowStart, StepBatch
from shards.comm import Comms
from shards.mesh import Layout, Place
from shards.rank import KernelsName, Rank, RankConfig, resolve_deterministic
from tests.support.rank_processes import run_in_processes
from tests.support.reference import make_reference
from tests.support.stepping import Work, make_rank, needs_native, run, tokens_of

LAYOUTS = [
    Layout(tp=2),
    Layout(dp=2),
    Layout(tp=2, dp=2),
    Layout(tp=2, ep=2),
    Layout(dp=2, ep=2),
    Layout(tp=2, dp=2, ep=4),
    Layout(tp=4),
]
ARCHITECTURES = ["qwen3_moe", "qwen3_next"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random checkpoint of an architecture, with a dense layer mixed in; made once."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            make_reference(made[architecture], architecture, {"mlp_only_layers": [1]})
        return made[architecture]

    return make


def make_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(0, 131, (n,), generator=generator).tolist() for n in lengths]


def alone(rank: Rank, batch: StepBatch) -> LaneOutput:
    """A step of a rank that is its lane's leader."""
    output = rank.step(batch)
    assert output is not None
    return output


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layout_gives_the_tokens_of_one_rank(
    architecture: str, layout: Layout, checkpoint: Callable[[str], Path]
) -> None:
    # Three prompts over two lanes: the lanes differ in length, and one has nothing left to do before the other.
    work = Work(prompts=make_prompts((5, 40, 17)), new_tokens=16, chunk=9)
    expected = tokens_of(run(checkpoint(architecture), work), 3)

    assert tokens_of(run(checkpoint(architecture), work, layout), 3) == expected


def everything_said(lanes: list[list[LaneOutput]], num_prompts: int) -> list[list[object]]:
    """All numbers of each prompt: tokens, log probabilities of prompt and output, alternatives."""
    said: list[list[object]] = [[] for _ in range(num_prompts)]
    for lane, outputs in enumerate(lanes):
        for output in outputs:
            for row, columns in output.prompt_logprobs.items():
                said[row * len(lanes) + lane] += zip(
                    columns.logprobs_N, columns.top_ids_NK, columns.top_logprobs_NK, strict=True
                )
            for i, (row, token) in enumerate(zip(output.rows_N, output.tokens_N, strict=True)):
                assert output.logprobs is not None
                said[row * len(lanes) + lane].append(
                    (token, output.logprobs.logprobs_N[i], output.logprobs.top_logprobs_NK[i])
                )
    return said


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [Layout(), *LAYOUTS], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_native_ranks_give_the_same_bits_in_every_layout_and_chunking(
    architecture: str, layout: Layout, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    check_bits(checkpoint(architecture), layout, dtype, shared_memory=False)


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_native_ranks_in_shared_memory_give_the_same_bits(
    architecture: str, layout: Layout, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    check_bits(checkpoint(architecture), layout, dtype, shared_memory=True)


def check_bits(folder: Path, layout: Layout, dtype: str, *, shared_memory: bool) -> None:
    """All numbers of three prompts in one batch are those of each prompt alone on one rank, whole."""
    sampling = RowSampling(temperature=0.8, seed=5, logprobs=4, prompt_logprobs=4)
    prompts = make_prompts((5, 40, 17))
    alone_said: list[list[object]] = []
    for prompt in prompts:
        work = Work(prompts=[prompt], new_tokens=8, samplings=[sampling])
        alone_said += everything_said(run(folder, work, kernels="native", dtype=dtype), 1)

    work = Work(prompts=prompts, new_tokens=8, chunk=9, samplings=[sampling] * 3)
    together_said = everything_said(
        run(folder, work, layout, kernels="native", dtype=dtype, shared_memory=shared_memory), 3
    )

    assert together_said == alone_said

    greedy = tokens_of(run(folder, Work(prompts=prompts, new_tokens=8), kernels="native", dtype=dtype), 3)
    work = Work(prompts=prompts, new_tokens=8, chunk=9)
    assert tokens_of(run(folder, work, layout, kernels="native", dtype=dtype, shared_memory=shared_memory), 3) == greedy


@pytest.mark.slow
@pytest.mark.parametrize("one_host", [False, True], ids=["gloo", "shared memory"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, dp=2), Layout(tp=2, dp=2, ep=4)], ids=str)
def test_ranks_that_are_processes_give_the_tokens_of_one_rank(
    layout: Layout, one_host: bool, checkpoint: Callable[[str], Path]
) -> None:
    work = Work(prompts=make_prompts((5, 40, 17)), new_tokens=8, chunk=9)
    expected = tokens_of(run(checkpoint("qwen3_next"), work), 3)

    assert tokens_of(run_in_processes(checkpoint("qwen3_next"), work, layout, one_host=one_host), 3) == expected


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(dp=2, ep=2), Layout(tp=2, dp=2, ep=4)], ids=str)
def test_a_lane_without_any_sequence_takes_part(layout: Layout, checkpoint: Callable[[str], Path]) -> None:
    work = Work(prompts=make_prompts((11,)), new_tokens=8)

    assert tokens_of(run(checkpoint("qwen3_next"), work, layout), 1) == tokens_of(
        run(checkpoint("qwen3_next"), work), 1
    )


def test_seeded_sampling_and_log_probabilities_agree_over_layouts(checkpoint: Callable[[str], Path]) -> None:
    samplings = [
        RowSampling(temperature=0.9, top_k=20, seed=7, logprobs=3),
        RowSampling(temperature=1.1, top_p=0.8, seed=8, repetition_penalty=1.2, frequency_penalty=0.3),
    ]
    work = Work(prompts=make_prompts((6, 23)), new_tokens=16, samplings=samplings)

    one, two = run(checkpoint("qwen3_moe"), work), run(checkpoint("qwen3_moe"), work, Layout(tp=2))

    assert tokens_of(one, 2) == tokens_of(two, 2)
    for a, b in zip(one[0], two[0], strict=True):
        assert a.logprobs is not None
        assert b.logprobs is not None
        assert a.logprobs.top_ids_NK[0] == b.logprobs.top_ids_NK[0]
        assert a.logprobs.logprobs_N[0] == pytest.approx(b.logprobs.logprobs_N[0], abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_preempted_sequence_started_again_on_another_row_goes_on_as_if_nothing_had_happened(
    architecture: str, checkpoint: Callable[[str], Path]
) -> None:
    [prompt], sampling = make_prompts((20,)), RowSampling(temperature=0.7, seed=3)
    whole = tokens_of(run(checkpoint(architecture), Work(prompts=[prompt], new_tokens=9, samplings=[sampling])), 1)[0]
    place = Place(layout=Layout(), rank=0)
    rank = make_rank(checkpoint(architecture), place, Comms.local(), max_rows=2)
    start = RowStart(
        row=1,
        token_ids=(*prompt, *whole[:4]),
        prompt_len=20,
        blocks=(3,),
        state_slot=1 if architecture == "qwen3_next" else -1,
        sampling=sampling,
    )

    # The second block comes when the row has grown into it, as the scheduler does it.
    first = StepBatch(starts=(start,), rows_S=[1], first_S=[0], counts_S=[16], samples_S=[0])
    second = StepBatch(grown_rows=[1], grown_blocks=[7], rows_S=[1], first_S=[16], counts_S=[8], samples_S=[1])
    third = StepBatch(rows_S=[1], first_S=[24], counts_S=[1], samples_S=[1])
    outputs = [alone(rank, batch) for batch in (first, second, third)]

    assert [output.tokens_N for output in outputs] == [[], [whole[4]], [whole[5]]]


@pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=needs_native)])
def test_kv_that_is_there_is_not_written_again_where_a_state_is_computed_over_it(
    kernels: KernelsName, checkpoint: Callable[[str], Path]
) -> None:
    [prompt] = make_prompts((40,))
    place = Place(layout=Layout(), rank=0)
    rank = make_rank(checkpoint("qwen3_next"), place, Comms.local(), max_rows=2, kernels=kernels)

    def serve(row: int, blocks: tuple[int, ...], num_stored: int) -> list[int]:
        start = RowStart(
            row=row,
            token_ids=tuple(prompt),
            prompt_len=40,
            blocks=blocks,
            num_stored=num_stored,
            state_slot=row,
            sampling=RowSampling(temperature=0.0),
        )
        first = StepBatch(starts=(start,), rows_S=[row], first_S=[0], counts_S=[21], samples_S=[0])
        second = StepBatch(rows_S=[row], first_S=[21], counts_S=[19], samples_S=[1])
        return [token for batch in (first, second) for token in alone(rank, batch).tokens_N]

    pools = [*rank.cache.k_pools, *rank.cache.v_pools]
    expected = serve(0, (3, 4, 5), 0)
    before = [pool.clone() for pool in pools]
    assert serve(1, (3, 4, 6), 32) == expected
    for pool, was in zip(pools, before, strict=True):
        assert torch.equal(pool[[3, 4]], was[[3, 4]])
        assert not torch.equal(pool[6], was[6])
    # Other numbers in the shared blocks stay where they are: nothing is written there, not even the same.
    for pool in pools:
        pool[3].fill_(0.25)
    serve(1, (3, 4, 6), 32)
    assert all((pool[3] == 0.25).all() for pool in pools)


def test_prompt_log_probabilities_come_for_computed_prompt_positions_only(checkpoint: Callable[[str], Path]) -> None:
    work = Work(
        prompts=make_prompts((10, 3)),
        new_tokens=3,
        chunk=6,
        samplings=[RowSampling(temperature=0.0, prompt_logprobs=2), RowSampling(temperature=0.0)],
    )

    [steps] = run(checkpoint("qwen3_moe"), work)

    counts = [{row: len(columns.logprobs_N) for row, columns in step.prompt_logprobs.items()} for step in steps]
    assert counts == [{0: 6}, {0: 3}, {}, {}]
    assert all(step.compute_s > 0 for step in steps)
    assert all(step.logprobs is None for step in steps)


def test_a_step_without_rows_answers_nothing(checkpoint: Callable[[str], Path]) -> None:
    rank = make_rank(checkpoint("qwen3_moe"), Place(layout=Layout(), rank=0), Comms.local(), max_rows=1)

    assert alone(rank, StepBatch()).tokens_N == []
    rank.close()
    assert rank.cache.fd == -1


def test_a_layout_the_model_does_not_allow_is_refused_before_anything_is_loaded(
    checkpoint: Callable[[str], Path],
) -> None:
    config = RankConfig(
        model=checkpoint("qwen3_moe"),
        place=Place(layout=Layout(tp=3), rank=0),
        num_blocks=1,
        num_slots=0,
        max_rows=1,
        max_model_len=16,
    )

    with pytest.raises(ValueError, match=r"num_attention_heads=8|num_key_value_heads=2"):
        Rank(config, Comms.local())


def test_deterministic_results_are_refused_of_kernels_that_cannot_give_them() -> None:
    with pytest.raises(ValueError, match="deterministic=on needs kernels=native; kernels=torch"):
        resolve_deterministic("on", "torch", "cpu")
    assert resolve_deterministic("auto", "torch", "cpu") is False


def test_an_unfilled_parameter_is_named(tmp_path: Path) -> None:
    make_reference(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.k_norm\.weight"):
        make_rank(tmp_path, Place(layout=Layout(), rank=0), Comms.local(), max_rows=1)


@pytest.mark.parametrize(
    ("field", "value"), [("moe_intermediate_size", 16), ("moe_intermediate_size", 64), ("num_experts", 16)]
)
def test_experts_that_disagree_with_the_config_are_named(
    field: str, value: int, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    model = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    names = [name for name in config if name in (field, "num_local_experts" if field == "num_experts" else field)]
    (model / "config.json").write_text(json.dumps(config | dict.fromkeys(names, value)))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\..*(shape|missing)"):
        make_rank(model, Place(layout=Layout(), rank=0), Comms.local(), max_rows=1)


def test_fewer_experts_in_the_config_than_in_the_files_are_refused(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    model = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    names = [name for name in config if name in ("num_experts", "num_local_experts")]
    (model / "config.json").write_text(json.dumps(config | dict.fromkeys(names, 4)))
    with pytest.raises(ValueError, match=r"mlp\.gate\.weight has shape \[8, 48\], expected \[4, 48\]"):
        make_rank(model, Place(layout=Layout(), rank=0), Comms.local(), max_rows=1)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=str)
def test_logits_that_are_not_finite_give_no_token_and_the_rank_goes_on(
    layout: Layout, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    model = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors")
    work = Work(prompts=make_prompts((5, 9)), new_tokens=4)
    assert tokens_of(run(model, work, layout), 2) == [[NO_TOKEN] * 4] * 2
