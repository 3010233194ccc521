"""Rounding weights to integers, and how they are laid out."""

import pytest
import torch
from torch import Tensor

from shards.config import Bits
from shards.int_weights import GROUP, IntRows, IntWeights, int_bytes, round_rows, strips_of
from tests.support.kernels import random

each_bits = pytest.mark.parametrize("bits", [4, 8])


def meant(rows: IntRows) -> Tensor:
    """Values times scales, written another way than the layout's."""
    group = rows.values_NK.shape[1] // rows.scales_NG.shape[1]
    return rows.values_NK.float() * rows.scales_NG.float().repeat_interleave(group, dim=1)


def laid_out(rows: IntRows, bits: Bits) -> IntWeights:
    count, columns = rows.values_NK.shape
    group = columns // rows.scales_NG.shape[1]
    weights = IntWeights.empty(2, strips_of(count) + 1, columns, group, bits, rows.scales_NG.dtype)
    weights.put(1, rows, 1)
    return weights


@each_bits
@pytest.mark.parametrize("count", [1, 16, 40])
def test_what_was_laid_out_reads_back_and_rows_behind_it_are_zero(bits: Bits, count: int) -> None:
    rows = round_rows(random(count, 96), bits)
    weights = laid_out(rows, bits)
    assert (weights.bits, weights.columns, weights.group) == (bits, 96, GROUP)
    assert torch.equal(weights.widened(1, count, 1), meant(rows))
    assert not weights.widened(1, strips_of(count) * 16, 1)[count:].any()


@pytest.mark.parametrize(("bits", "least", "most"), [(4, 0.06, 0.1), (8, 0.003, 0.006)])
def test_rounding_normal_weights_costs_what_so_many_bits_cost(bits: Bits, least: float, most: float) -> None:
    weight = random(256, 256)
    error = (meant(round_rows(weight, bits)) - weight).norm() / weight.norm()
    assert least < error < most


@each_bits
def test_no_weight_is_off_by_more_than_a_step_of_its_group_and_most_by_half_of_one(bits: Bits) -> None:
    weight = random(64, 128)
    rows = round_rows(weight, bits)
    steps = rows.scales_NG.float().abs().repeat_interleave(GROUP, dim=1)
    off = (meant(rows) - weight).abs() / steps
    # One step only at the end of the range that the largest magnitude is not at.
    assert off.max() < 1.01
    assert (off <= 0.501).double().mean() > 0.98


@each_bits
def test_a_group_becomes_the_same_integers_whatever_lies_beside_it(bits: Bits) -> None:
    weight = random(20, 128)
    whole = round_rows(weight, bits)
    part = round_rows(weight[3:11, 32:96], bits)
    assert torch.equal(part.values_NK, whole.values_NK[3:11, 32:96])
    assert torch.equal(part.scales_NG, whole.scales_NG[3:11, 1:3])


@each_bits
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_group_that_is_not_finite_stays_so_and_others_are_not_touched(bits: Bits, poison: float) -> None:
    weight = random(2, 64)
    weight[1, 40] = poison
    found = meant(round_rows(weight, bits))
    assert found[0].isfinite().all()
    assert found[1, :32].isfinite().all()
    assert not found[1, 32:].isfinite().any()


@each_bits
def test_groups_of_zeros_and_of_one_number_are_exact(bits: Bits) -> None:
    weight = torch.zeros(2, 32)
    weight[1, 5] = -0.375
    assert torch.equal(meant(round_rows(weight, bits)), weight)


def test_half_and_a_quarter_of_the_bytes() -> None:
    plain = 2 * 1024 * 384
    assert (int_bytes(1024 * 384, 8) / plain, int_bytes(1024 * 384, 4) / plain) == (0.53125, 0.28125)
    weights = laid_out(round_rows(random(16, 96), 4), 4)
    stored = weights.values[1, 1:].nbytes + weights.scales[1, 1:].nbytes
    assert stored == int_bytes(16 * 96, 4)
