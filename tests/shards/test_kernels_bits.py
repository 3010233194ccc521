"""A native result row has the same bits alone or in a batch, in chunks, in slices, over ranks and over threads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shards.comm import tree_sum
from shards.kernels.native import NativeKernels
from tests.support.kernels import (
    NATIVE,
    assert_close,
    cuts,
    every_dtype,
    every_path,
    experts,
    linear,
    random,
    threads,
)


@every_path
@every_dtype
@pytest.mark.parametrize("K", [1, 15, 33, 100, 512])
def test_a_linear_row_is_the_same_alone_and_in_any_batch(kernels: NativeKernels, dtype: torch.dtype, K: int) -> None:
    x, weight, bias = random(75, K, dtype=dtype), random(101, K, dtype=dtype), random(101, dtype=dtype)
    whole = linear(kernels, x, weight, bias)
    for sizes in ([1], [2], [3], [5, 4, 7], [64]):
        pieces = [linear(kernels, x[piece], weight, bias) for piece in cuts(75, sizes)]
        assert torch.equal(torch.cat(pieces), whole)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(kernels, x[order], weight, bias), whole[order])


@every_path
@every_dtype
def test_slices_of_columns_put_together_are_the_whole(kernels: NativeKernels, dtype: torch.dtype) -> None:
    x, weight = random(9, 90, dtype=dtype), random(128, 90, dtype=dtype)
    whole = linear(kernels, x, weight)
    for sizes in ([1], [5], [32], [48, 7]):
        pieces = [linear(kernels, x, weight[piece]) for piece in cuts(128, sizes)]
        assert torch.equal(torch.cat(pieces, dim=1), whole)


@every_path
@every_dtype
@pytest.mark.parametrize("K", [8, 72, 256])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_that_sum_their_share_of_groups_as_a_tree_agree_with_one_rank(
    kernels: NativeKernels, dtype: torch.dtype, K: int, ranks: int
) -> None:
    x, weight = random(7, K, dtype=dtype), random(50, K, dtype=dtype)
    alone = linear(kernels, x, weight, groups=8, wide=True)
    parts = [
        linear(kernels, a.contiguous(), b.contiguous(), groups=8 // ranks, wide=True)
        for a, b in zip(x.chunk(ranks, dim=1), weight.chunk(ranks, dim=1), strict=True)
    ]
    assert torch.equal(tree_sum(parts), alone)


@every_path
@every_dtype
def test_experts_give_a_token_the_same_rows_in_any_batch(kernels: NativeKernels, dtype: torch.dtype) -> None:
    T, E, K, C, width = 80, 5, 3, 70, 36
    x = random(T, C, dtype=dtype)
    gate_up, down = random(E, 2 * width, C, dtype=dtype), random(E, C, width, dtype=dtype)
    ids = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:K] for t in range(T)])
    whole = experts(kernels, x, ids, gate_up, down, groups=2)
    for sizes in ([1], [7, 30]):
        pieces = [experts(kernels, x[piece], ids[piece], gate_up, down, groups=2) for piece in cuts(T, sizes)]
        assert torch.equal(torch.cat(pieces), whole)
    # An expert is a dense layer. (AMX tiles are activated by a formula of their own.)
    gated = kernels.silu_mul(linear(kernels, x[:1], gate_up[ids[0, 1]]))
    assert_close(linear(kernels, gated, down[ids[0, 1]], groups=2)[0], whole[0, 1], scale=width**0.5)


@every_path
@every_dtype
@pytest.mark.parametrize("T", [0, 1, 40])
def test_weighted_experts_give_the_bits_of_experts_then_combine(
    kernels: NativeKernels, dtype: torch.dtype, T: int
) -> None:
    x, weights = random(T, 70, dtype=dtype), random(T, 3)
    gate_up, down = random(5, 72, 70, dtype=dtype), random(5, 70, 36, dtype=dtype)
    ids = torch.randint(-1, 5, (T, 3), generator=torch.Generator().manual_seed(0))
    fused = experts(kernels, x, ids, gate_up, down, weights=weights, groups=4)
    each = experts(kernels, x, ids, gate_up, down, groups=4)
    assert torch.equal(fused, kernels.combine(each, weights))


@every_path
@every_dtype
@pytest.mark.parametrize("T", [3, 17, 33, 70, 600])
def test_many_tokens_of_one_expert_give_the_rows_of_each_alone(
    kernels: NativeKernels, dtype: torch.dtype, T: int
) -> None:
    x, ids = random(T, 96, dtype=dtype), torch.ones(T, 1, dtype=torch.int64)
    gate_up, down = random(2, 2 * 37, 96, dtype=dtype), random(2, 96, 37, dtype=dtype)
    whole = experts(kernels, x, ids, gate_up, down)
    for t in (0, T // 2, T - 1):
        assert torch.equal(experts(kernels, x[t : t + 1], ids[:1], gate_up, down), whole[t : t + 1])


@every_path
@every_dtype
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_slices_of_every_expert_agree_with_one_rank(
    kernels: NativeKernels, dtype: torch.dtype, ranks: int
) -> None:
    T, E, K, C, width = 11, 4, 2, 40, 48
    x, ids = random(T, C, dtype=dtype), torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(0))
    gate_up, down = random(E, 2, width, C, dtype=dtype), random(E, C, width, dtype=dtype)
    alone = experts(kernels, x, ids, gate_up.flatten(1, 2), down, groups=4, wide=True)
    slices = zip(gate_up.chunk(ranks, dim=2), down.chunk(ranks, dim=2), strict=True)
    parts = [
        experts(kernels, x, ids, a.flatten(1, 2).contiguous(), b.contiguous(), groups=4 // ranks, wide=True)
        for a, b in slices
    ]
    assert torch.equal(tree_sum(parts), alone)


@every_path
@every_dtype
@pytest.mark.parametrize(("H", "Hkv", "D", "P"), [(4, 2, 16, 16), (8, 1, 72, 4), (40, 1, 32, 16), (16, 2, 256, 16)])
def test_attention_rows_do_not_depend_on_chunks_batch_or_blocks(
    kernels: NativeKernels, dtype: torch.dtype, H: int, Hkv: int, D: int, P: int
) -> None:
    length, blocks = 75, -(-75 // P)
    q = random(length, H, D, dtype=dtype)
    k_pool, v_pool = (random(blocks + 3, Hkv, P, D, dtype=dtype, seed=seed) for seed in (1, 2))
    # Unwritten blocks hold anything; nothing of it may show.
    k_pool[blocks:] = v_pool[blocks:] = float("nan")
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).to(torch.int32).unsqueeze(0)

    def attend(queries: slice) -> Tensor:
        starts, contexts = torch.tensor([0, queries.stop - queries.start]), torch.tensor([queries.stop])
        return kernels.attention(q[queries], k_pool, v_pool, table, starts, contexts, D**-0.5)

    whole = attend(slice(0, length))
    for sizes in ([1], [7], [33], [64, 3]):
        assert torch.equal(torch.cat([attend(piece) for piece in cuts(length, sizes)]), whole)
    # Two sequences at once, with a wider table whose tail names unwritten blocks, at other places of the pools.
    moved = torch.full((2, blocks + 2), blocks + 1, dtype=torch.int32)
    moved[0, :blocks] = moved[1, :blocks] = table
    starts, contexts = torch.tensor([0, 5, 5 + length]), torch.tensor([5, length])
    both = kernels.attention(torch.cat((q[:5], q)), k_pool, v_pool, moved, starts, contexts, D**-0.5)
    assert torch.equal(both, torch.cat((whole[:5], whole)))


@every_path
@every_dtype
def test_long_contexts_give_the_same_bits_decoded_or_prefilled_and_over_any_threads(
    kernels: NativeKernels, dtype: torch.dtype
) -> None:
    length, P, D = 2100, 16, 32
    blocks = -(-length // P)
    q, table = random(50, 4, D, dtype=dtype), torch.arange(blocks, dtype=torch.int32).unsqueeze(0)
    pools = [random(blocks, 2, P, D, dtype=dtype, seed=s) for s in (1, 2)]

    def attend(queries: slice) -> Tensor:
        starts, contexts = torch.tensor([0, queries.stop - queries.start]), torch.tensor([length - 50 + queries.stop])
        return kernels.attention(q[queries], pools[0], pools[1], table, starts, contexts, D**-0.5)

    with threads(1):
        whole = attend(slice(0, 50))
    with threads(3):
        assert torch.equal(torch.cat([attend(piece) for piece in cuts(50, [1])]), whole)
    with threads(1):
        assert torch.equal(attend(slice(49, 50)), whole[49:])
    one = make_reference_attention(q[49], pools[0][:, 0], pools[1][:, 0], length)
    torch.testing.assert_close(whole[49, 0].float(), one, rtol=2e-2, atol=2e-3)


@every_path
def test_rows_of_a_long_prompt_have_the_bits_of_each_alone_however_threads_share_it(kernels: NativeKernels) -> None:
    length, T, P, D = 1300, 601, 16, 64
    blocks = -(-length // P)
    q, table = random(T, 6, D, dtype=torch.bfloat16), torch.arange(blocks, dtype=torch.int32).unsqueeze(0)
    pools = [random(blocks, 2, P, D, dtype=torch.bfloat16, seed=s) for s in (1, 2)]

    def attend(queries: slice) -> Tensor:
        starts, contexts = torch.tensor([0, queries.stop - queries.start]), torch.tensor([length - T + queries.stop])
        return kernels.attention(q[queries], pools[0], pools[1], table, starts, contexts, D**-0.5)

    with threads(1):
        whole = attend(slice(0, T))
    with threads(5):
        assert torch.equal(attend(slice(0, T)), whole)
    for t in (0, 68, 69, 324, 325, 326, 600):
        assert torch.equal(attend(slice(t, t + 1)), whole[t : t + 1])
        one = make_reference_attention(q[t], pools[0][:, 0], pools[1][:, 0], length - T + t + 1)
        torch.testing.assert_close(whole[t, 0].float(), one, rtol=2e-2, atol=2e-3)


def make_reference_attention(q_HD: Tensor, k_NPD: Tensor, v_NPD: Tensor, length: int) -> Tensor:
    """The first head's result over the first `length` positions of blocks in order, in float64."""
    k, v = (x.flatten(0, 1)[:length].double() for x in (k_NPD, v_NPD))
    return (torch.softmax(k @ q_HD[0].double() * q_HD.shape[1] ** -0.5, dim=0) @ v).float()


@every_path
@every_dtype
def test_attention_heads_do_not_depend_on_the_heads_beside_them(kernels: NativeKernels, dtype: torch.dtype) -> None:
    q, pools = random(20, 8, 32, dtype=dtype), [random(2, 4, 16, 32, dtype=dtype, seed=s) for s in (1, 2)]
    arguments = (torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([0, 20]), torch.tensor([20]), 0.2)
    whole = kernels.attention(q, pools[0], pools[1], *arguments)
    for ranks in (2, 4):
        parts = [
            kernels.attention(a.contiguous(), b.contiguous(), c.contiguous(), *arguments)
            for a, b, c in zip(*(x.chunk(ranks, dim=1) for x in (q, *pools)), strict=True)
        ]
        assert torch.equal(torch.cat(parts, dim=1), whole)


@every_dtype
def test_rows_of_norms_activations_and_routing_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    kernels, x, weight = NATIVE[-1], random(50, 66, dtype=dtype), random(66, dtype=dtype)
    gate = random(50, 66, dtype=dtype, seed=1)
    cos, sin, slots = random(50, 22), random(50, 22, seed=1), torch.arange(50)
    k_pool, v_pool = (torch.zeros(4, 1, 16, 22, dtype=dtype) for _ in range(2))
    q_norm, k_norm, shape = weight[:22], weight[22:44], {"gated": False, "zero_centred": True}
    operators: list[Callable[[slice], Tensor]] = [
        lambda r: kernels.rms_norm(x[r], weight, 1e-6, zero_centred=True),
        lambda r: kernels.rms_norm(x[r], weight, 1e-6, zero_centred=False),
        lambda r: kernels.add_rms_norm(x[r], gate[r], weight, 1e-6, zero_centred=True)[1],
        lambda r: kernels.silu_mul(x[r]),
        lambda r: kernels.add_gated(x[r], gate[r], gate[r, :1]),
        lambda r: kernels.attention_inputs(
            x[r], q_norm, k_norm, 1e-6, cos[r], sin[r], k_pool, v_pool, slots[r], **shape
        ),
        lambda r: kernels.route(x[r], 5, renormalize=True)[0],
        lambda r: kernels.route(x[r], 5, renormalize=True)[1],
        lambda r: kernels.combine(x[r].view(-1, 6, 11), cos[r, :6].contiguous()),
    ]
    for operator in operators:
        whole = operator(slice(0, 50))
        for sizes in ([1], [7, 2]):
            assert torch.equal(torch.cat([operator(piece) for piece in cuts(50, sizes)]), whole)


@every_path
@every_dtype
def test_one_and_two_and_three_threads_give_the_same_bits(kernels: NativeKernels, dtype: torch.dtype) -> None:
    x, weight = random(40, 300, dtype=dtype), random(500, 300, dtype=dtype)
    gate_up, down = random(6, 128, 300, dtype=dtype), random(6, 300, 64, dtype=dtype)
    ids = torch.randint(0, 6, (40, 2), generator=torch.Generator().manual_seed(0))
    pools = [random(8, 2, 16, 64, dtype=dtype, seed=s) for s in (1, 2)]
    q, table = random(120, 4, 64, dtype=dtype), torch.arange(8, dtype=torch.int32).unsqueeze(0)
    starts, contexts = torch.tensor([0, 120]), torch.tensor([128])
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(
                (
                    linear(kernels, x, weight, groups=4),
                    experts(kernels, x, ids, gate_up, down),
                    kernels.attention(q, pools[0], pools[1], table, starts, contexts, 0.1),
                    kernels.rms_norm(q, random(64, dtype=dtype), 1e-6, zero_centred=False),
                )
            )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
