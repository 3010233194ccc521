"""The native kernels compute what the plain torch kernels compute, on every instruction set of this machine."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shards.batch import NO_TOKEN
from shards.kernels.interface import Kernels
from shards.kernels.native import NativeKernels
from tests.support.kernels import NATIVE, REFERENCE, assert_close, every_dtype, every_path, experts, linear, random


@every_path
@every_dtype
@pytest.mark.parametrize(
    ("T", "N", "K"), [(0, 5, 16), (1, 1, 1), (1, 100, 33), (3, 50, 64), (5, 7, 250), (9, 97, 31), (70, 49, 48)]
)
def test_linear_agrees_on_odd_shapes(kernels: NativeKernels, dtype: torch.dtype, T: int, N: int, K: int) -> None:
    x, weight, bias = random(T, K, dtype=dtype), random(N, K, dtype=dtype), random(N, dtype=dtype)
    assert_close(linear(kernels, x, weight, bias), linear(REFERENCE, x, weight, bias), scale=K**0.5)
    wide = linear(kernels, x, weight, wide=True)
    assert_close(wide, x.float() @ weight.float().T, scale=K**0.5)


@every_path
@every_dtype
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("K", [8, 72, 256])
def test_linear_in_groups_agrees(kernels: NativeKernels, dtype: torch.dtype, groups: int, K: int) -> None:
    x, weight, bias = random(6, K, dtype=dtype), random(35, K, dtype=dtype), random(35, dtype=dtype)
    found = linear(kernels, x, weight, bias, groups=groups, wide=True)
    assert_close(found, linear(REFERENCE, x, weight, bias, groups=groups, wide=True), scale=K**0.5)


@every_path
@every_dtype
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 3, 40), (40, 129), (2, 3, 4, 128)])
def test_norms_agree(kernels: NativeKernels, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)
    for zero_centred in (True, False):
        expected = REFERENCE.rms_norm(x, weight, 1e-6, zero_centred=zero_centred)
        assert_close(kernels.rms_norm(x, weight, 1e-6, zero_centred=zero_centred), expected)


@every_path
@every_dtype
@pytest.mark.parametrize("zero_centred", [True, False])
def test_a_sum_and_its_norm_agree_and_the_sum_has_the_reference_bits(
    kernels: NativeKernels, dtype: torch.dtype, zero_centred: bool
) -> None:
    x, y, weight = random(5, 70, dtype=dtype), random(5, 70, dtype=dtype, seed=1), random(70, dtype=dtype)
    total, normed = kernels.add_rms_norm(x, y, weight, 1e-6, zero_centred=zero_centred)
    expected = REFERENCE.add_rms_norm(x, y, weight, 1e-6, zero_centred=zero_centred)
    assert torch.equal(total, expected[0])
    assert_close(normed, expected[1])


@every_path
@every_dtype
@pytest.mark.parametrize(("T", "width"), [(0, 6), (1, 1), (7, 33), (40, 256)])
def test_activations_agree(kernels: NativeKernels, dtype: torch.dtype, T: int, width: int) -> None:
    gate_up = random(T, 2 * width, dtype=dtype) * 20
    assert_close(kernels.silu_mul(gate_up), REFERENCE.silu_mul(gate_up))
    x, shared, wide = random(T, width, dtype=dtype), random(T, width, dtype=dtype, seed=1), gate_up[:, :3]
    found, expected = kernels.add_gated(x, shared, wide[:, 1:2]), REFERENCE.add_gated(x, shared, wide[:, 1:2])
    assert_close(found, expected)


@every_path
def test_activations_at_the_ends_of_the_float_range_are_not_nan(kernels: NativeKernels) -> None:
    extremes = torch.tensor([[-3e38, -200.0, -90.0, -88.0, 0.0, 88.0, 90.0, 200.0, 3e38]])
    found = kernels.silu_mul(torch.cat((extremes, torch.ones_like(extremes)), dim=1))
    torch.testing.assert_close(found, torch.nn.functional.silu(extremes), rtol=1e-5, atol=1e-30)
    ones = torch.ones(9, 1)
    found = kernels.add_gated(torch.zeros(9, 1), ones, extremes.T.contiguous())
    torch.testing.assert_close(found, torch.sigmoid(extremes).T, rtol=1e-5, atol=1e-30)


@every_path
@every_dtype
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("T", "H", "G", "D", "R", "normed"),
    [
        (0, 2, 1, 16, 16, True),
        (3, 4, 2, 16, 16, True),
        (5, 0, 3, 40, 10, True),
        (2, 4, 1, 256, 64, True),
        (3, 2, 2, 16, 16, False),
    ],
)
def test_attention_inputs_agree_and_write_their_slots_and_nowhere_else(
    kernels: NativeKernels, dtype: torch.dtype, gated: bool, T: int, H: int, G: int, D: int, R: int, normed: bool
) -> None:
    qkv, angles = random(T, (2 if gated else 1) * H * D + 2 * G * D, dtype=dtype), random(T, R // 2).repeat(1, 2)
    q_norm, k_norm = (random(D, dtype=dtype, seed=s) if normed else None for s in (1, 2))
    slots = torch.tensor([7, 0, 31, 16, 8])[:T]

    def run(which: Kernels) -> tuple[Tensor, Tensor, Tensor]:
        k_pool, v_pool = (torch.zeros(2, G, 16, D, dtype=dtype) for _ in range(2))
        inputs = (qkv, q_norm, k_norm, 1e-6, angles.cos(), angles.sin(), k_pool, v_pool, slots)
        return which.attention_inputs(*inputs, gated=gated, zero_centred=True), k_pool, v_pool

    found, expected = run(kernels), run(REFERENCE)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


@every_dtype
@pytest.mark.parametrize("kernels", [*NATIVE, REFERENCE], ids=[*(kernels.path for kernels in NATIVE), "torch"])
def test_rows_without_a_slot_store_nothing_and_give_their_queries(kernels: Kernels, dtype: torch.dtype) -> None:
    qkv, angles = random(3, 4 * 16, dtype=dtype), random(3, 8).repeat(1, 2)

    def run(slots: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        k_pool, v_pool = (torch.zeros(2, 1, 4, 16, dtype=dtype) for _ in range(2))
        where = (angles.cos(), angles.sin(), k_pool, v_pool, torch.tensor(slots))
        return kernels.attention_inputs(qkv, None, None, 1e-6, *where, gated=False, zero_centred=False), k_pool, v_pool

    found, everywhere = run([-1, 5, -1]), run([0, 5, 7])
    assert torch.equal(found[0], everywhere[0])
    for pool in found[1:]:
        assert pool.flatten(0, 2).any(-1).nonzero().flatten().tolist() == [5]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """Sequences with their keys and values in shuffled blocks."""

    q: Tensor
    k_pool: Tensor
    v_pool: Tensor
    tables: Tensor
    query_start: Tensor
    contexts: Tensor
    scale: float


def make_paged_batch(
    queries: list[int], contexts: list[int], *, H: int, Hkv: int, D: int, P: int, dtype: torch.dtype
) -> PagedBatch:
    blocks = -(-max(contexts) // P)
    count = blocks * len(contexts)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return PagedBatch(
        q=random(sum(queries), H, D, dtype=dtype),
        k_pool=random(count, Hkv, P, D, dtype=dtype, seed=1),
        v_pool=random(count, Hkv, P, D, dtype=dtype, seed=2),
        tables=order.view(len(contexts), blocks),
        query_start=torch.tensor([0, *queries]).cumsum(0),
        contexts=torch.tensor(contexts),
        scale=D**-0.5,
    )


def attend(kernels: Kernels, b: PagedBatch) -> Tensor:
    return kernels.attention(b.q, b.k_pool, b.v_pool, b.tables, b.query_start, b.contexts, b.scale)


@every_path
@every_dtype
@pytest.mark.parametrize(
    ("H", "Hkv", "D", "P"), [(2, 2, 16, 16), (6, 2, 24, 16), (8, 1, 64, 4), (16, 2, 256, 16), (40, 1, 32, 8)]
)
def test_attention_agrees_on_mixed_prefill_and_decode(
    kernels: NativeKernels, dtype: torch.dtype, H: int, Hkv: int, D: int, P: int
) -> None:
    batch = make_paged_batch([1, 37, 5, 0, 1], [1, 37, 90, 3, 65], H=H, Hkv=Hkv, D=D, P=P, dtype=dtype)
    assert_close(attend(kernels, batch), attend(REFERENCE, batch))
    batch = make_paged_batch([1, 1, 1], [100, 1, 33], H=H, Hkv=Hkv, D=D, P=P, dtype=dtype)
    assert_close(attend(kernels, batch), attend(REFERENCE, batch))


@every_path
@every_dtype
def test_attention_is_gated_where_a_gate_lies_beside_the_queries(kernels: NativeKernels, dtype: torch.dtype) -> None:
    batch = make_paged_batch([3, 1], [20, 9], H=4, Hkv=2, D=24, P=16, dtype=dtype)
    gate = random(4, 4, 48, dtype=dtype)[..., 24:]
    rest = (batch.k_pool, batch.v_pool, batch.tables, batch.query_start, batch.contexts, batch.scale, gate)
    assert_close(kernels.attention(batch.q, *rest), REFERENCE.attention(batch.q, *rest))


@every_dtype
@pytest.mark.parametrize(("T", "E", "K"), [(0, 8, 2), (3, 4, 4), (9, 60, 4), (50, 512, 10)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_route_agrees(dtype: torch.dtype, T: int, E: int, K: int, renormalize: bool) -> None:
    # E neighbouring numbers of bfloat16 from 1 up: distinct in either dtype, so that the order is defined.
    orders = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t)) for t in range(T + 1)])
    logits = (orders[:T] + 0x3F80).to(torch.int16).view(torch.bfloat16).to(dtype)
    weights, ids = NATIVE[-1].route(logits, K, renormalize=renormalize)
    expected_weights, expected_ids = REFERENCE.route(logits, K, renormalize=renormalize)
    assert torch.equal(ids, expected_ids)
    assert_close(weights, expected_weights)


def test_rows_of_logits_may_lie_apart() -> None:
    logits = random(6, 9)
    for found, expected in zip(
        NATIVE[-1].route(logits[:, 2:7], 2, renormalize=True),
        NATIVE[-1].route(logits[:, 2:7].contiguous(), 2, renormalize=True),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_route_gives_equal_experts_in_order_of_their_ids() -> None:
    _, ids = NATIVE[-1].route(torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 1.0]]), 4, renormalize=True)
    assert ids.tolist() == [[1, 2, 4, 0]]


@every_path
@pytest.mark.parametrize("V", [1, 16, 40, 1024, 2500])
def test_best_tokens_agree_and_of_equals_are_the_first(kernels: NativeKernels, V: int) -> None:
    # Whole numbers, so that many are equal; rows lie apart, and what is between is larger than all.
    logits = random(12, V + 3).mul(2).round()
    logits[:, V:] = torch.inf
    for row, value in enumerate([torch.nan, torch.inf, -torch.inf, 9.0]):
        logits[row, V // 2] = value
    logits[4] = -torch.inf
    logits[5, [0, V - 1]] = 9.0
    found = kernels.best_tokens(logits, V)
    assert torch.equal(found, REFERENCE.best_tokens(logits, V))
    assert found[[0, 1, 4]].tolist() == [NO_TOKEN] * 3
    assert found[[3, 5]].tolist() == [V // 2, 0]
    assert kernels.best_tokens(logits[:0], V).shape == (0,)


@every_path
@every_dtype
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("T", "E", "K", "C", "I"), [(0, 4, 2, 16, 16), (1, 4, 2, 33, 20), (30, 6, 3, 64, 48)])
def test_experts_agree_where_some_are_empty_and_some_not_here(
    kernels: NativeKernels,
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
    # Expert 0 gets nobody, -1 is held elsewhere.
    ids = torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(0))
    ids[ids == 0] = -1
    for groups in (1, 4):
        found = experts(kernels, x, ids, gate_up, down, groups=groups, wide=wide)
        assert_close(found, experts(REFERENCE, x, ids, gate_up, down, groups=groups, wide=wide), scale=I**0.5)
        assert not found[ids < 0].any()


@every_path
@every_dtype
def test_combine_gives_the_reference_bits(kernels: NativeKernels, dtype: torch.dtype) -> None:
    y, weights = random(9, 5, 70, dtype=dtype), random(9, 5)
    assert torch.equal(kernels.combine(y, weights), REFERENCE.combine(y, weights))


@every_path
def test_the_best_of_a_spread_vocabulary_is_that_of_the_whole(kernels: NativeKernels) -> None:
    logits = random(9, 61)
    logits[1, 5] = logits[1, 50] = 9.0
    logits[2] = -torch.inf
    logits[3, :30] = -torch.inf
    logits[4, 40], logits[5, 3], logits[6, 60] = torch.nan, torch.inf, -torch.inf
    logits[7, 31:] = -torch.inf
    whole = kernels.best_tokens(logits, 61)
    assert whole[2] == whole[4] == whole[5] == NO_TOKEN
    for size in (61, 31, 16, 20):
        for chosen in (kernels, REFERENCE):
            pairs = [
                chosen.best_of_part(logits[:, first : first + size].contiguous(), min(size, 61 - first), first)
                for first in range(0, 61, size)
            ]
            # A rank beyond the end of the vocabulary has none of it.
            pairs.append(chosen.best_of_part(torch.zeros(9, size), 0, 61))
            assert torch.equal(chosen.best_of_pairs(torch.stack(pairs)), whole)
    with pytest.raises(ValueError, match=r"size=62 must lie in 0..61"):
        kernels.best_of_part(logits, 62, 0)


@every_path
@every_dtype
def test_embeddings_of_ids_that_are_held_elsewhere_are_zeros(kernels: NativeKernels, dtype: torch.dtype) -> None:
    table, ids = random(5, 7, dtype=dtype), torch.tensor([0, 3, 7, 8, 4])
    found = kernels.embed(table, ids, 3)
    assert torch.equal(found, REFERENCE.embed(table, ids, 3))
    assert torch.equal(found[[1, 2, 4]], table[[0, 4, 1]])
    assert not found[[0, 3]].any()
    assert torch.equal(kernels.embed(table, ids[:0], 3), table[:0])


@every_path
def test_ids_of_experts_that_are_held_elsewhere_are_below_zero(kernels: NativeKernels) -> None:
    ids = torch.tensor([[0, 4], [5, 7], [8, 6]])
    expected = torch.tensor([[-1, 0], [1, 3], [-1, 2]])
    assert torch.equal(kernels.local_ids(ids, 4, 4), expected)
    assert torch.equal(REFERENCE.local_ids(ids, 4, 4), expected)


@every_path
@every_dtype
@pytest.mark.parametrize("T", [0, 1, 5])
def test_matrices_side_by_side_have_the_reference_bits(kernels: NativeKernels, dtype: torch.dtype, T: int) -> None:
    left, right = random(T, 7, dtype=dtype), random(T, 7, dtype=dtype, seed=1)
    assert torch.equal(kernels.beside(left, right), REFERENCE.beside(left, right))
