"""The Triton kernels compute what the plain torch kernels compute: run by tests/shards/test_triton_kernels.py.

Triton must interpret its kernels (TRITON_INTERPRET=1 before it is imported), so that this runs in a process of its own.
"""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_models import RandomWeights
from shards.batch import RowSampling, RowStart, StepBatch
from shards.cache import KvCache, cache_shape
from shards.comm import Comms
from shards.config import ModelConfig
from shards.cuda_graphs import DecodeGraphs
from shards.cuts import make_cuts
from shards.kernels.interface import DeltaWeights, Kernels
from shards.kernels.select import select_kernels
from shards.kernels.triton_attention import should_split
from shards.linear import Runtime
from shards.loading import Loader
from shards.mesh import Layout, Place
from shards.model import Model, load_model
from shards.rope import rotary_tables
from shards.rows import Rows
from shards.warm_up import warm_up
from tests.support.graphs import Rerun
from tests.support.kernels import REFERENCE, assert_close, every_dtype, random
from tests.support.model_configs import make_moe_config, make_next_config

TRITON = select_kernels("triton", "cpu")
CPU = torch.device("cpu")


@every_dtype
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("T", "E", "K", "C", "I"),
    [(0, 4, 2, 16, 16), (1, 4, 2, 33, 20), (20, 3, 2, 48, 40), (3, 130, 2, 16, 16), (150, 2, 1, 16, 16)],
)
def test_experts_agree_where_some_are_empty_and_some_not_here(
    dtype: torch.dtype,
    wide: bool,
    T: int,
    E: int,
    K: int,
    C: int,
    I: int,  # noqa: E741
) -> None:
    x = random(T, C, dtype=dtype)
    gate_up, down = random(E, 2 * I, C, dtype=dtype) * C**-0.5, random(E, C, I, dtype=dtype)
    ids = torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(0))
    ids[ids == 0] = -1
    found, expected = (which.experts(x, ids, gate_up, down, wide=wide) for which in (TRITON, REFERENCE))
    assert found.dtype == expected.dtype
    # What lies between the two matmuls is rounded to x's dtype.
    assert_close(found.to(dtype), expected.to(dtype), scale=I**0.5)
    assert not found[ids < 0].any()


@every_dtype
def test_the_weighted_sum_over_experts_agrees(dtype: torch.dtype) -> None:
    x, ids, weights = random(7, 24, dtype=dtype), torch.tensor([[3, 1], [1, 0]] * 3 + [[2, 3]]), random(7, 2).abs()
    operands = (x, ids, weights, random(4, 32, 24, dtype=dtype) * 0.2, random(4, 24, 16, dtype=dtype))
    assert_close(TRITON.weighted_experts(*operands), REFERENCE.weighted_experts(*operands), scale=8)


def test_combine_gives_the_reference_bits() -> None:
    y, weights = random(5, 3, 70), random(5, 3)
    assert torch.equal(TRITON.combine(y, weights), REFERENCE.combine(y, weights))
    narrow = y.bfloat16()
    assert_close(TRITON.combine(narrow, weights), REFERENCE.combine(narrow, weights))


@every_dtype
@pytest.mark.parametrize(("T", "C", "N"), [(0, 16, 16), (1, 33, 20), (70, 48, 150), (65, 130, 31)])
def test_linear_agrees_with_and_without_a_bias(dtype: torch.dtype, T: int, C: int, N: int) -> None:
    x, weight, bias = random(T, C, dtype=dtype), random(N, C, dtype=dtype) * C**-0.5, random(N, dtype=dtype)
    assert_close(TRITON.linear(x, weight), REFERENCE.linear(x, weight))
    assert_close(TRITON.linear(x, weight, bias), REFERENCE.linear(x, weight, bias))


def test_linear_in_groups_and_wide_gives_float32_sums() -> None:
    x, weight = random(18, 70, dtype=torch.bfloat16), random(90, 70, dtype=torch.bfloat16)
    expected = x.float() @ weight.float().T
    assert_close(TRITON.linear(x, weight, wide=True), expected, scale=8)
    assert_close(TRITON.linear(x, weight, groups=2, wide=True), expected, scale=8)


@every_dtype
def test_a_row_of_linear_and_of_experts_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    x, weight = random(64, 130, dtype=dtype), random(40, 130, dtype=dtype)
    gate_up, down = random(3, 40, 130, dtype=dtype), random(3, 130, 20, dtype=dtype)
    ids = torch.randint(0, 3, (64, 2), generator=torch.Generator().manual_seed(0))
    linear, experts = TRITON.linear(x, weight), TRITON.experts(x, ids, gate_up, down)
    for i in (0, 17, 63):
        row = slice(i, i + 1)
        assert torch.equal(TRITON.linear(x[row], weight)[0], linear[i])
        assert torch.equal(TRITON.experts(x[row], ids[row], gate_up, down)[0], experts[i])


@every_dtype
@pytest.mark.parametrize(("E", "K"), [(8, 2), (60, 4), (130, 10)])
@pytest.mark.parametrize("renormalize", [False, True])
def test_route_agrees_also_on_rows_that_lie_apart(dtype: torch.dtype, E: int, K: int, renormalize: bool) -> None:
    # All distinct, in bfloat16 too.
    logits = (random(5, E).argsort(-1).float() / 16).to(dtype).repeat(1, 2)[:, :E]
    weights, ids = TRITON.route(logits, K, renormalize=renormalize)
    expected, expected_ids = REFERENCE.route(logits, K, renormalize=renormalize)
    assert torch.equal(ids, expected_ids)
    assert_close(weights, expected)


# numpy tells of it, a GPU does not.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_route_takes_the_lower_of_equal_experts_and_names_experts_where_logits_are_broken() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [float("nan")] * 5])
    _, ids = TRITON.route(logits, 2, renormalize=True)
    assert ids[0].tolist() == [1, 2]
    assert bool(((ids >= 0) & (ids < 5)).all())


def make_paged(
    queries: list[int], contexts: list[int], *, H: int, G: int, D: int, P: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """Operands of `attention`: sequences whose keys lie in shuffled blocks."""
    blocks = -(-max(contexts) // P)
    order = torch.randperm(blocks * len(contexts), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    pools = [random(len(order), G, P, D, dtype=dtype, seed=seed) for seed in (1, 2)]
    starts = torch.tensor([0, *queries]).cumsum(0)
    tables = order.view(len(contexts), blocks)
    return random(sum(queries), H, D, dtype=dtype), pools[0], pools[1], tables, starts, torch.tensor(contexts), D**-0.5


@every_dtype
@pytest.mark.parametrize(("H", "G", "D", "P"), [(2, 2, 16, 16), (6, 2, 24, 8), (8, 1, 64, 4)])
def test_attention_agrees_on_mixed_prefill_and_decode(dtype: torch.dtype, H: int, G: int, D: int, P: int) -> None:
    operands = make_paged([1, 37, 5, 0, 1], [1, 37, 90, 3, 65], H=H, G=G, D=D, P=P, dtype=dtype)
    assert_close(TRITON.attention(*operands), REFERENCE.attention(*operands))


@every_dtype
def test_attention_of_single_tokens_agrees_where_keys_are_cut_into_ranges(dtype: torch.dtype) -> None:
    operands = make_paged([1, 1, 1], [1100, 1, 300], H=4, G=2, D=16, P=16, dtype=dtype)
    assert should_split(programs=6 * 2, ranges=5, query_elements=3 * 4 * 16)
    gate = random(3, 4, 32, dtype=dtype)[..., 16:]
    assert_close(TRITON.attention(*operands, gate), REFERENCE.attention(*operands, gate))


@pytest.mark.parametrize(("dtype", "gated"), [(torch.float32, False), (torch.bfloat16, True)])
def test_attention_gives_a_query_the_same_bits_alone_in_a_chunk_and_in_a_large_batch(
    dtype: torch.dtype, gated: bool
) -> None:
    H, D, count, context, others = 7, 16, 2, 300, 40
    operands = make_paged([count], [context], H=H, G=H, D=D, P=16, dtype=dtype)
    q, k_pool, v_pool, tables, starts, contexts, scale = operands
    gate = random(count, H, D, dtype=dtype, seed=5) if gated else None
    whole = TRITON.attention(q, k_pool, v_pool, tables, starts, contexts, scale, gate)
    assert should_split(programs=count * H, ranges=2, query_elements=q.numel())
    assert not should_split(programs=2 * others * H, ranges=2, query_elements=q.numel())
    for i in range(count):
        seen = torch.tensor([context - count + 1 + i])
        row, own_gate = q[i : i + 1], None if gate is None else gate[i : i + 1]
        alone = TRITON.attention(row, k_pool, v_pool, tables, torch.tensor([0, 1]), seen, scale, own_gate)
        assert torch.equal(alone[0], whole[i])
        if i == count - 1:
            # Among so many others each query is one program's.
            batch = (torch.arange(others + 1), torch.cat((seen, torch.zeros(others - 1, dtype=torch.int64))), scale)
            padded, table = row.expand(others, -1, -1).contiguous(), tables.expand(others, -1).contiguous()
            gates = None if own_gate is None else own_gate.expand(others, -1, -1)
            assert torch.equal(TRITON.attention(padded, k_pool, v_pool, table, *batch, gates)[0], whole[i])


@every_dtype
def test_a_padding_row_of_context_one_reads_its_first_block_only(dtype: torch.dtype) -> None:
    q, k_pool, v_pool, tables, starts, contexts, scale = make_paged([1, 1], [1, 20], H=2, G=1, D=16, P=16, dtype=dtype)
    tables[0, 1:] = 1 << 30
    operands = (q, k_pool, v_pool, tables, starts, contexts, scale)
    assert_close(TRITON.attention(*operands), REFERENCE.attention(*operands))


@every_dtype
@pytest.mark.parametrize("zero_centred", [False, True])
def test_norms_agree_and_a_float32_sum_has_the_reference_bits(dtype: torch.dtype, zero_centred: bool) -> None:
    x, y, weight = random(3, 70, dtype=dtype), random(3, 70, dtype=dtype, seed=1), random(70, dtype=dtype)
    heads = random(2, 3, 70, dtype=dtype)
    expected = REFERENCE.rms_norm(heads, weight, 1e-6, zero_centred=zero_centred)
    assert_close(TRITON.rms_norm(heads, weight, 1e-6, zero_centred=zero_centred), expected)
    total, normed = TRITON.add_rms_norm(x, y, weight, 1e-6, zero_centred=zero_centred)
    expected_total, expected = REFERENCE.add_rms_norm(x, y, weight, 1e-6, zero_centred=zero_centred)
    # The interpreter truncates to bfloat16 where a GPU rounds.
    assert torch.equal(total, expected_total) or dtype == torch.bfloat16
    assert_close(total, expected_total)
    assert_close(normed, expected)


@every_dtype
@pytest.mark.parametrize(
    ("H", "G", "D", "R", "normed", "gated"),
    [(4, 2, 16, 16, True, False), (0, 3, 40, 10, True, False), (2, 1, 24, 8, False, True), (2, 2, 32, 16, True, True)],
)
def test_attention_inputs_agree_and_write_their_slots_and_nowhere_else(
    dtype: torch.dtype, H: int, G: int, D: int, R: int, normed: bool, gated: bool
) -> None:
    qkv, angles = random(3, (2 if gated else 1) * H * D + 2 * G * D, dtype=dtype), random(3, R // 2).repeat(1, 2)
    q_norm, k_norm = (random(D, dtype=dtype, seed=s) if normed else None for s in (1, 2))

    def run(which: Kernels) -> tuple[Tensor, Tensor, Tensor]:
        k_pool, v_pool = (torch.zeros(2, G, 16, D, dtype=dtype) for _ in range(2))
        inputs = (qkv, q_norm, k_norm, 1e-6, angles.cos(), angles.sin(), k_pool, v_pool, torch.tensor([7, 31, 16]))
        return which.attention_inputs(*inputs, gated=gated, zero_centred=gated), k_pool, v_pool

    found, expected = run(TRITON), run(REFERENCE)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


def test_rows_without_a_slot_store_nothing() -> None:
    qkv, angles, pools = random(2, 4 * 16), random(2, 8), [torch.zeros(2, 1, 4, 16) for _ in range(2)]
    where = (angles.cos(), angles.sin(), *pools, torch.tensor([-1, 5]))
    TRITON.attention_inputs(qkv, None, None, 1e-6, *where, gated=False, zero_centred=False)
    for pool in pools:
        assert pool.flatten(0, 2).any(-1).nonzero().flatten().tolist() == [5]


@every_dtype
def test_activations_agree(dtype: torch.dtype) -> None:
    gate_up = random(3, 66, dtype=dtype) * 20
    assert_close(TRITON.silu_mul(gate_up), REFERENCE.silu_mul(gate_up))
    x, shared, gate = random(3, 33, dtype=dtype), random(3, 33, dtype=dtype, seed=1), gate_up[:, 1:2]
    assert_close(TRITON.add_gated(x, shared, gate), REFERENCE.add_gated(x, shared, gate))


@every_dtype
@pytest.mark.parametrize(("K", "V", "Dk", "Dv", "W"), [(2, 2, 16, 16, 4), (1, 3, 24, 40, 2), (2, 4, 16, 16, 1)])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 0, 6], [1, 11, 2]])
def test_the_delta_net_agrees_and_advances_only_its_slots(
    dtype: torch.dtype, K: int, V: int, Dk: int, Dv: int, W: int, lengths: list[int]
) -> None:
    Q = 2 * K * Dk + V * Dv
    weights = DeltaWeights(
        conv1d_QW=random(Q, W, dtype=dtype),
        a_log_V=random(V),
        dt_bias_V=random(V, seed=1),
        norm_D=random(Dv, dtype=dtype),
        num_key_heads=K,
        key_dim=Dk,
        eps=1e-6,
    )
    projected = random(sum(lengths), Q + V * Dv + 2 * V, dtype=dtype)
    where = (torch.tensor([4, 1, 3]), torch.tensor([0, *lengths]).cumsum(0), torch.tensor([False, True, False]))
    for advance in (None, torch.tensor([True, True, False])):
        found: list[Tensor] = []
        expected: list[Tensor] = []
        for which, results in ((TRITON, found), (REFERENCE, expected)):
            conv_state, state = random(6, Q, W - 1, dtype=dtype), random(6, V, Dk, Dv)
            results += [which.delta_net(projected, weights, conv_state, state, *where, advance), conv_state, state]
        assert_close(found[0], expected[0], scale=20)
        assert torch.equal(found[1], expected[1])
        assert_close(found[2].to(dtype), expected[2].to(dtype), scale=8)
        for slot in (0, 2, 5) if advance is None else (0, 2, 3, 5):
            assert torch.equal(found[2][slot], random(6, V, Dk, Dv)[slot])
        # In bfloat16 it is rounded behind every token, and by the reference at the end only.
        narrow = random(6, V, Dk, Dv).bfloat16()
        TRITON.delta_net(projected, weights, random(6, Q, W - 1, dtype=dtype), narrow, *where, advance)
        assert_close(narrow, expected[2].bfloat16(), scale=40)


def load_random(config: ModelConfig) -> tuple[Model, KvCache, Runtime]:
    """A model of made-up weights and a cache, on the Triton kernels."""
    weights = RandomWeights(CPU, zero_centred_norm=config.zero_centred_norm)
    cuts = make_cuts(config, Place(layout=Layout(), rank=0), deterministic=False)
    loader = Loader(reader=weights, config=config, cuts=cuts, dtype=torch.float32, device=CPU, kernels=TRITON)
    model = load_model(loader)
    shape = cache_shape(config, 1, 0, num_blocks=12, block_size=4, num_slots=4, dtype=torch.float32)
    return model, KvCache(shape, CPU), Runtime(kernels=TRITON, comms=Comms.local(), exact=False)


NEXT = make_next_config(num_hidden_layers=2, layer_types=("linear_attention", "full_attention"))
MOE = make_moe_config(num_hidden_layers=1, layer_types=("full_attention",), mlp_only_layers=())


@pytest.mark.parametrize("config", [MOE, NEXT], ids=["moe", "next"])
def test_padded_decode_steps_give_the_bits_of_steps_as_they_are_and_touch_nothing_else(
    config: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    lengths, decoded = (5, 9, 2), 2
    batches = [StepBatch(rows_S=[0, 1, 2], first_S=[0] * 3, counts_S=list(lengths), samples_S=[0] * 3)]
    for done in range(decoded):
        live = [0, 1, 2][: 3 - done]
        first = [lengths[row] + done for row in live]
        batches.append(StepBatch(rows_S=live, first_S=first, counts_S=[1] * len(live), samples_S=[0] * len(live)))
    rows = Rows(max_rows=3, max_model_len=16, block_size=4, device=CPU)
    starts = tuple(
        RowStart(
            row=row,
            token_ids=tuple(range(7 * row, 7 * row + length + decoded)),
            prompt_len=length,
            blocks=tuple(range(11 - 4 * row, 7 - 4 * row, -1)),
            state_slot=3 - row,
            sampling=RowSampling(),
        )
        for row, length in enumerate(lengths)
    )
    rows.update(StepBatch(starts=starts))
    cos_LR, sin_LR = rotary_tables(config.rope, 16)
    found: list[list[Tensor]] = []
    for captured in (False, True):
        model, cache, runtime = load_random(config)
        run = partial(model.forward, runtime, cache=cache)
        graphs = DecodeGraphs(run, Rerun())
        results: list[Tensor] = []
        for batch in batches:
            step = rows.tensors(batch, cos_LR, sin_LR, (sum(batch.counts_S),))
            results.append((graphs.forward if captured else run)(step).clone())
        found.append([*results, cache.buffer.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert caplog.messages == [], "every capture was good"


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2, ep=2)], ids=str)
def test_warming_up_changes_no_memory_but_the_first_state_slot(layout: Layout) -> None:
    # The interpreter takes a millisecond for a program, of which a token has one for each head.
    few_heads = {"num_attention_heads": 2, "linear_num_key_heads": 1, "linear_num_value_heads": 1}
    config = dataclasses.replace(NEXT, **few_heads, may_have_mtp=True).with_drafts(1)
    weights = RandomWeights(CPU, zero_centred_norm=True)
    cuts = make_cuts(config, Place(layout=layout, rank=0), deterministic=False)
    loader = Loader(reader=weights, config=config, cuts=cuts, dtype=torch.float32, device=CPU, kernels=TRITON)
    model = load_model(loader)
    shape = cache_shape(config, layout.tp, 0, num_blocks=12, block_size=512, num_slots=2, dtype=torch.float32)
    cache = KvCache(shape, CPU)
    cache.buffer.fill_(7)
    runtime = Runtime(kernels=TRITON, comms=Comms.local(), exact=False)
    warm_up(model, runtime, cache, layout=layout, rotary_dim=config.rope.rotary_dim)
    for pool in [*cache.k_pools, *cache.v_pools, *(s[1:] for s in (*cache.conv_states, *cache.delta_states))]:
        assert bool((pool.contiguous().view(torch.uint8) == 7).all())
