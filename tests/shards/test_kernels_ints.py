"""Experts in integers: native kernels agree with the reference, and a row has the same bits however it is computed."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shards.comm import tree_sum
from shards.config import Bits
from shards.int_weights import IntRows, IntWeights, round_rows, strips_of
from shards.kernels.native import NativeKernels
from tests.support.kernels import REFERENCE, assert_close, cuts, every_dtype, every_path, random, threads

each_bits = pytest.mark.parametrize("bits", [4, 8])


@dataclass(frozen=True, kw_only=True)
class Made:
    """Experts as integers and as what they stand for."""

    gate_up: IntWeights
    down: IntWeights
    plain_gate_up_E2IC: Tensor
    plain_down_ECI: Tensor


def scaled(rows: int, columns: int, group: int, bits: Bits, seed: int, dtype: torch.dtype) -> IntRows:
    """Integers of the whole range with scales of several magnitudes and both signs."""
    values = (
        random(rows, columns, seed=seed)
        .mul(40 if bits == 8 else 3)
        .round()
        .clamp(-(1 << bits - 1), (1 << bits - 1) - 1)
    )
    scales = random(rows, columns // group, seed=seed + 1) * columns**-0.5 / (40 if bits == 8 else 3)
    return IntRows(values_NK=values.to(torch.int8), scales_NG=scales.to(dtype))


def meant(rows: IntRows) -> Tensor:
    group = rows.values_NK.shape[1] // rows.scales_NG.shape[1]
    return rows.values_NK.float() * rows.scales_NG.float().repeat_interleave(group, dim=1)


def make(
    E: int, C: int, width: int, bits: Bits, *, group: int = 32, part: int = 32, dtype: torch.dtype = torch.bfloat16
) -> Made:
    gate_up = IntWeights.empty(E, 2 * strips_of(width), C, group, bits, dtype)
    down = IntWeights.empty(E, strips_of(C), width, part, bits, dtype)
    plain_gate_up, plain_down = torch.empty(E, 2 * width, C), torch.empty(E, C, width)
    for e in range(E):
        halves = [scaled(width, C, group, bits, 10 * e + half, dtype) for half in range(2)]
        for half, rows in enumerate(halves):
            gate_up.put(e, rows, half * strips_of(width))
        plain_gate_up[e] = torch.cat([meant(rows) for rows in halves])
        rows = scaled(C, width, part, bits, 10 * e + 5, dtype)
        down.put(e, rows)
        plain_down[e] = meant(rows)
    return Made(gate_up=gate_up, down=down, plain_gate_up_E2IC=plain_gate_up, plain_down_ECI=plain_down)


def some_ids(T: int, E: int, K: int, lowest: int = 0) -> Tensor:
    return torch.randint(lowest, E, (T, K), generator=torch.Generator().manual_seed(T))


def test_the_reference_multiplies_with_what_the_integers_stand_for() -> None:
    made, x, ids = make(3, 64, 32, 4), random(5, 64), some_ids(5, 3, 2)
    found = REFERENCE.experts(x, ids, made.gate_up, made.down)
    assert torch.equal(found, REFERENCE.experts(x, ids, made.plain_gate_up_E2IC, made.plain_down_ECI))


@every_path
@every_dtype
@each_bits
@pytest.mark.parametrize(
    ("T", "C", "width", "group", "part", "scales"),
    [
        (0, 64, 32, 32, 8, torch.bfloat16),
        (1, 64, 32, 32, 8, torch.bfloat16),
        (40, 96, 40, 96, 8, torch.float16),
        (70, 256, 96, 128, 24, torch.float32),
        (33, 72, 160, 8, 40, torch.float16),
    ],
)
def test_native_experts_agree_with_the_reference(
    kernels: NativeKernels,
    dtype: torch.dtype,
    bits: Bits,
    T: int,
    C: int,
    width: int,
    group: int,
    part: int,
    scales: torch.dtype,
) -> None:
    made = make(4, C, width, bits, group=group, part=part, dtype=scales)
    x, ids = random(T, C, dtype=dtype), some_ids(T, 4, 3, lowest=-1)
    # Expert 2 gets nobody.
    ids[ids == 2] = 1
    for groups in (1, 4) if width // 4 % part == 0 else (1,):
        for wide in (False, True):
            found = kernels.experts(x, ids, made.gate_up, made.down, groups=groups, wide=wide)
            expected = REFERENCE.experts(x, ids, made.gate_up, made.down, groups=groups, wide=wide)
            assert found.dtype == expected.dtype
            # Of bfloat16 the activations between both products are rounded, wide or not.
            assert_close(found.to(dtype), expected.to(dtype))
            assert not found[ids < 0].any()


@every_path
@every_dtype
@each_bits
def test_a_token_has_the_same_bits_alone_in_any_batch_and_with_any_threads(
    kernels: NativeKernels, dtype: torch.dtype, bits: Bits
) -> None:
    T, K = 90, 3
    made, x, weights = make(4, 96, 64, bits, part=16), random(T, 96, dtype=dtype), random(T, K)
    ids = some_ids(T, 4, K, lowest=-1)
    whole = kernels.experts(x, ids, made.gate_up, made.down, groups=4)
    mixed = kernels.weighted_experts(x, ids, weights, made.gate_up, made.down, groups=4)
    assert torch.equal(mixed, kernels.combine(whole, weights))
    for sizes in ([1], [7, 30], [16]):
        pieces = [kernels.experts(x[piece], ids[piece], made.gate_up, made.down, groups=4) for piece in cuts(T, sizes)]
        assert torch.equal(torch.cat(pieces), whole)
    for count in (1, 3):
        with threads(count):
            assert torch.equal(kernels.experts(x, ids, made.gate_up, made.down, groups=4), whole)


@every_path
@every_dtype
@each_bits
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_slices_of_every_expert_agree_with_one_rank(
    kernels: NativeKernels, dtype: torch.dtype, bits: Bits, ranks: int
) -> None:
    E, C, width = 3, 64, 128
    x, ids = random(11, C, dtype=dtype), some_ids(11, E, 2)
    gate_up, down = random(E, 2, width, C), random(E, C, width)

    def part(first: int, last: int) -> tuple[IntWeights, IntWeights]:
        held = last - first
        some_gate_up = IntWeights.empty(E, 2 * strips_of(held), C, 32, bits, torch.bfloat16)
        some_down = IntWeights.empty(E, strips_of(C), held, 32, bits, torch.bfloat16)
        for e in range(E):
            for half in range(2):
                some_gate_up.put(e, round_rows(gate_up[e, half, first:last], bits), half * strips_of(held))
            some_down.put(e, round_rows(down[e, :, first:last], bits))
        return some_gate_up, some_down

    alone = kernels.experts(x, ids, *part(0, width), groups=4, wide=True)
    step = width // ranks
    parts = [
        kernels.experts(x, ids, *part(first, first + step), groups=4 // ranks, wide=True)
        for first in range(0, width, step)
    ]
    assert torch.equal(tree_sum(parts), alone)


@every_path
def test_weights_that_do_not_fit_are_refused_by_name(kernels: NativeKernels) -> None:
    made, x, ids = make(2, 64, 64, 4), random(1, 64), some_ids(1, 2, 1)
    with pytest.raises(ValueError, match="down has groups of 32 columns, which must divide 64 / 4"):
        kernels.experts(x, ids, made.gate_up, made.down, groups=4)
    with pytest.raises(ValueError, match="gate_up has 64 columns, x has 32"):
        kernels.experts(random(1, 32), ids, made.gate_up, make(2, 32, 64, 4).down)
    with pytest.raises(ValueError, match="gate_up's values"):
        kernels.experts(x, ids, make(2, 64, 64, 8).gate_up, made.down)
    with pytest.raises(ValueError, match="gate_up's scales"):
        kernels.experts(x, ids, make(2, 64, 32, 4).gate_up, made.down)
    with pytest.raises(ValueError, match="only 2 experts are held here"):
        kernels.experts(x, ids + 2, made.gate_up, made.down)
