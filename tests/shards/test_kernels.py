"""The native kernels compute what the plain torch kernels compute, on every instruction set of this machine."""

import ctypes
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shards.kernels.library import load_library
from shards.kernels.native import PATHS, NativeKernels
from shards.kernels.torch_kernels import TorchKernels

REFERENCE = TorchKernels()
DTYPES = [torch.float32, torch.bfloat16]


def library() -> ctypes.CDLL:
    found = load_library()
    assert found is not None, "build the native kernels first: python hatch_build.py"
    return found


def runnable_paths() -> list[NativeKernels]:
    loaded = library()
    best = NativeKernels(loaded)
    return [NativeKernels(loaded, path) for path in PATHS[: PATHS.index(best.path) + 1]]


NATIVE = runnable_paths()
every_path = pytest.mark.parametrize("kernels", NATIVE, ids=[kernels.path for kernels in NATIVE])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_close(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    tolerance = (2e-5 if expected.dtype == torch.float32 else 2e-2) * scale
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@every_path
@every_dtype
@pytest.mark.parametrize(
    ("T", "N", "K"), [(0, 5, 16), (1, 1, 1), (1, 100, 33), (3, 50, 64), (5, 7, 250), (9, 97, 31), (70, 49, 48)]
)
def test_linear_agrees_on_odd_shapes(kernels: NativeKernels, dtype: torch.dtype, T: int, N: int, K: int) -> None:
    x, weight, bias = random(T, K, dtype=dtype), random(N, K, dtype=dtype), random(N, dtype=dtype)
    assert_close(kernels.linear(x, weight, bias), REFERENCE.linear(x, weight, bias), scale=K**0.5)
    wide = kernels.linear(x, weight, wide=True)
    assert_close(wide, x.float() @ weight.float().T, scale=K**0.5)


@every_path
@every_dtype
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("K", [8, 72, 256])
def test_linear_in_groups_agrees(kernels: NativeKernels, dtype: torch.dtype, groups: int, K: int) -> None:
    x, weight, bias = random(6, K, dtype=dtype), random(35, K, dtype=dtype), random(35, dtype=dtype)
    found = kernels.linear(x, weight, bias, groups=groups, wide=True)
    assert_close(found, REFERENCE.linear(x, weight, bias, groups=groups, wide=True), scale=K**0.5)


@every_dtype
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 3, 40), (40, 129), (2, 3, 4, 128)])
def test_norms_agree(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, gate, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), random(shape[-1], dtype=dtype)
    kernels = NATIVE[-1]
    for zero_centred in (True, False):
        expected = REFERENCE.rms_norm(x, weight, 1e-6, zero_centred=zero_centred)
        assert_close(kernels.rms_norm(x, weight, 1e-6, zero_centred=zero_centred), expected)
    expected = REFERENCE.gated_rms_norm(x, gate, weight, 1e-6)
    assert_close(kernels.gated_rms_norm(x, gate, weight, 1e-6), expected)


@every_dtype
@pytest.mark.parametrize(("T", "width"), [(0, 6), (1, 1), (7, 33), (40, 256)])
def test_activations_agree(dtype: torch.dtype, T: int, width: int) -> None:
    x, gate_up = random(T, width, dtype=dtype), random(T, 2 * width, dtype=dtype) * 20
    kernels = NATIVE[-1]
    assert_close(kernels.silu_mul(gate_up), REFERENCE.silu_mul(gate_up))
    for gates in (width, 1):
        gate = random(T, gates, dtype=dtype) * 20
        assert_close(kernels.sigmoid_mul(x, gate), REFERENCE.sigmoid_mul(x, gate))


def test_activations_at_the_ends_of_the_float_range_are_not_nan() -> None:
    extremes = torch.tensor([[-3e38, -200.0, -90.0, -88.0, 0.0, 88.0, 90.0, 200.0, 3e38]])
    kernels = NATIVE[-1]
    found = kernels.silu_mul(torch.cat((extremes, torch.ones_like(extremes)), dim=1))
    torch.testing.assert_close(found, torch.nn.functional.silu(extremes), rtol=1e-5, atol=1e-30)
    found = kernels.sigmoid_mul(torch.ones_like(extremes), extremes)
    torch.testing.assert_close(found, torch.sigmoid(extremes), rtol=1e-5, atol=1e-30)


@every_dtype
@pytest.mark.parametrize(("T", "H", "D", "R"), [(0, 2, 16, 16), (3, 2, 16, 16), (5, 3, 40, 10), (2, 4, 256, 64)])
def test_rotary_agrees_on_part_of_the_head(dtype: torch.dtype, T: int, H: int, D: int, R: int) -> None:
    x, angles = random(T, H, D, dtype=dtype), random(T, R // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    assert_close(NATIVE[-1].rotary(x, cos, sin), REFERENCE.rotary(x, cos, sin))


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


def attend(kernels: NativeKernels | TorchKernels, b: PagedBatch) -> Tensor:
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


@every_dtype
def test_stored_keys_and_values_lie_in_their_slots_and_nowhere_else(dtype: torch.dtype) -> None:
    k, v = random(5, 3, 20, dtype=dtype), random(5, 3, 20, dtype=dtype, seed=1)
    slots = torch.tensor([7, 0, 31, 16, 8])
    pools = [torch.zeros(2, 3, 16, 20, dtype=dtype) for _ in range(4)]
    NATIVE[-1].store_kv(k, v, pools[0], pools[1], slots)
    REFERENCE.store_kv(k, v, pools[2], pools[3], slots)
    assert torch.equal(pools[0], pools[2])
    assert torch.equal(pools[1], pools[3])


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


def test_route_gives_equal_experts_in_order_of_their_ids() -> None:
    _, ids = NATIVE[-1].route(torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 1.0]]), 4, renormalize=True)
    assert ids.tolist() == [[1, 2, 4, 0]]


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
        found = kernels.experts(x, ids, gate_up, down, groups=groups, wide=wide)
        assert_close(found, REFERENCE.experts(x, ids, gate_up, down, groups=groups, wide=wide), scale=I**0.5)
        assert not found[ids < 0].any()


@pytest.mark.parametrize("out", DTYPES)
@every_dtype
def test_combine_gives_the_reference_bits(dtype: torch.dtype, out: torch.dtype) -> None:
    y, weights = random(9, 5, 70, dtype=dtype), random(9, 5)
    like = torch.empty(0, dtype=out)
    assert torch.equal(NATIVE[-1].combine(y, weights, like), REFERENCE.combine(y, weights, like))


@every_dtype
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("C", [1, 70, 128])
def test_convolution_agrees_and_advances_only_its_slots(dtype: torch.dtype, W: int, C: int) -> None:
    lengths = [1, 0, 2, 9]
    x, weight = random(sum(lengths), C, dtype=dtype), random(C, W, dtype=dtype)
    states = [random(6, C, W - 1, dtype=dtype) for _ in range(2)]
    slots, start = torch.tensor([4, 1, 0, 3]), torch.tensor([0, *lengths]).cumsum(0)
    fresh = torch.tensor([False, False, True, False])
    found = NATIVE[-1].causal_conv(x, weight, states[0], slots, start, fresh)
    assert_close(found, REFERENCE.causal_conv(x, weight, states[1], slots, start, fresh))
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 1, 4]])
def test_the_reference_too_leaves_slots_of_sequences_that_do_not_advance(lengths: list[int]) -> None:
    x, weight, state = random(sum(lengths), 8), random(8, 4), random(3, 8, 3)
    where = (torch.tensor([2, 0, 1]), torch.tensor([0, *lengths]).cumsum(0), torch.tensor([False] * 3))
    states = [state.clone() for _ in range(2)]
    out = [REFERENCE.causal_conv(x, weight, states[0], *where, torch.tensor([True, False, True]))]
    out.append(REFERENCE.causal_conv(x, weight, states[1], *where))
    assert torch.equal(*out)
    assert torch.equal(states[0][0], state[0])
    assert torch.equal(states[0][1:], states[1][1:])


@every_dtype
@pytest.mark.parametrize("T", [0, 1, 17])
def test_delta_gates_agree(dtype: torch.dtype, T: int) -> None:
    b, a = random(T, 6, dtype=dtype) * 5, random(T, 6, dtype=dtype, seed=1) * 15
    a_log, dt_bias = random(6), random(6, dtype=dtype, seed=2)
    found, expected = NATIVE[-1].delta_gates(b, a, a_log, dt_bias), REFERENCE.delta_gates(b, a, a_log, dt_bias)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert_close(found[1], expected[1])


@every_path
@every_dtype
@pytest.mark.parametrize(("K", "V", "Dk", "Dv"), [(2, 2, 16, 16), (2, 6, 24, 40), (1, 2, 128, 128), (2, 4, 64, 80)])
def test_delta_rule_agrees_with_recurrent_and_chunked_reference(
    kernels: NativeKernels, dtype: torch.dtype, K: int, V: int, Dk: int, Dv: int
) -> None:
    lengths = [1, 70, 0, 5]
    T = sum(lengths)
    q, k, v = random(T, K, Dk, dtype=dtype), random(T, K, Dk, dtype=dtype, seed=1), random(T, V, Dv, dtype=dtype)
    beta, g = REFERENCE.delta_gates(random(T, V), random(T, V, seed=1), random(V), random(V, seed=1))
    states = [random(6, V, Dk, Dv) for _ in range(2)]
    slots, start = torch.tensor([4, 1, 0, 3]), torch.tensor([0, *lengths]).cumsum(0)
    fresh = torch.tensor([False, True, True, False])
    found = kernels.delta_rule(q, k, v, beta, g, states[0], slots, start, fresh)
    assert_close(found, REFERENCE.delta_rule(q, k, v, beta, g, states[1], slots, start, fresh), scale=4)
    assert_close(states[0], states[1], scale=4)


def test_a_single_decode_token_runs_the_batched_reference_path_too() -> None:
    K, V, D = 2, 4, 16
    q, k, v = random(3, K, D), random(3, K, D, seed=1), random(3, V, D)
    beta, g = REFERENCE.delta_gates(random(3, V), random(3, V, seed=1), random(V), random(V, seed=1))
    states = [random(4, V, D, D) for _ in range(2)]
    slots, start, fresh = torch.tensor([2, 0, 3]), torch.arange(4), torch.tensor([False, True, False])
    found = NATIVE[-1].delta_rule(q, k, v, beta, g, states[0], slots, start, fresh)
    assert_close(found, REFERENCE.delta_rule(q, k, v, beta, g, states[1], slots, start, fresh))
    assert_close(states[0], states[1])
