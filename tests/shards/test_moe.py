import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shards.comm import Comms
from shards.cuts import even_range
from shards.kernels.torch_kernels import TorchKernels
from shards.linear import DenseMlp, RowLinear, Runtime
from shards.mesh import Layout, Place
from shards.moe import Moe, SharedExpert, gather_lanes
from tests.support.thread_comm import on_every_rank

C, E, INNER, TOP_K = 8, 8, 16, 3
Cut = Callable[[Moe, Place], Moe]


def make_moe(*, shared: bool) -> Moe:
    """A whole MoE block."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    mlp = DenseMlp(
        gate_up_2IC=random(2 * INNER, C), down_proj=RowLinear(weight_NC=random(C, INNER), bias_N=None, groups=4)
    )
    return Moe(
        gate_EC=random(E, C),
        gate_up_E2IC=random(E, 2 * INNER, C),
        down_ECI=random(E, C, INNER),
        shared=SharedExpert(mlp=mlp, gate_1C=random(1, C)) if shared else None,
        top_k=TOP_K,
        renormalize=True,
        groups=4,
        spread=False,
    )


def spread(whole: Moe, place: Place) -> Moe:
    """The whole experts that a rank holds."""
    assert isinstance(whole.gate_up_E2IC, Tensor)
    assert isinstance(whole.down_ECI, Tensor)
    held = even_range(E, place.layout.world, place.rank)
    return dataclasses.replace(
        whole,
        gate_up_E2IC=whole.gate_up_E2IC[held.start : held.stop],
        down_ECI=whole.down_ECI[held.start : held.stop],
        spread=True,
    )


def sliced(whole: Moe, place: Place) -> Moe:
    """The columns of every expert that a rank holds."""
    assert isinstance(whole.gate_up_E2IC, Tensor)
    assert isinstance(whole.down_ECI, Tensor)
    held = even_range(INNER, place.layout.world, place.rank)
    columns = slice(held.start, held.stop)
    groups = 4 // place.layout.world

    def gate_up(weight: Tensor) -> Tensor:
        gate, up = weight.chunk(2, dim=-2)
        return torch.cat((gate[..., columns, :], up[..., columns, :]), dim=-2)

    shared = whole.shared
    if shared is not None:
        down = RowLinear(weight_NC=shared.mlp.down_proj.weight_NC[:, columns], bias_N=None, groups=groups)
        mlp = DenseMlp(gate_up_2IC=gate_up(shared.mlp.gate_up_2IC), down_proj=down)
        shared = SharedExpert(mlp=mlp, gate_1C=shared.gate_1C)
    return dataclasses.replace(
        whole,
        gate_up_E2IC=gate_up(whole.gate_up_E2IC),
        down_ECI=whole.down_ECI[..., columns].contiguous(),
        shared=shared,
        groups=groups,
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("cut", [spread, sliced])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(dp=2), Layout(tp=2, dp=2)], ids=str)
def test_every_lane_gets_the_output_of_one_rank_with_all_experts(
    cut: Cut, layout: Layout, shared: bool, exact: bool
) -> None:
    whole = make_moe(shared=shared)
    lane_tokens = (5, 2)[: layout.dp]
    x_AC = torch.randn(sum(lane_tokens), C, generator=torch.Generator().manual_seed(1))
    alone = Runtime(kernels=TorchKernels(), comms=Comms.local(), exact=exact)
    expected = whole.forward(alone, x_AC, (len(x_AC),)).split(lane_tokens)

    def work(place: Place, comms: Comms) -> Tensor:
        runtime = Runtime(kernels=TorchKernels(), comms=comms, exact=exact)
        return cut(whole, place).forward(runtime, x_AC.split(lane_tokens)[place.dp_rank], lane_tokens)

    for rank, y_TC in enumerate(on_every_rank(layout, work)):
        torch.testing.assert_close(y_TC, expected[rank // layout.tp], rtol=0, atol=1e-6)


@pytest.mark.parametrize("cut", [spread, sliced])
def test_a_lane_without_tokens_lends_its_experts(cut: Cut) -> None:
    whole, layout = make_moe(shared=True), Layout(dp=2)
    x_TC = torch.randn(3, C)
    expected = whole.forward(Runtime(kernels=TorchKernels(), comms=Comms.local(), exact=True), x_TC, (3,))

    def work(place: Place, comms: Comms) -> Tensor:
        runtime = Runtime(kernels=TorchKernels(), comms=comms, exact=True)
        return cut(whole, place).forward(runtime, x_TC if place.dp_rank else x_TC[:0], (0, 3))

    empty, y_TC = on_every_rank(layout, work)
    assert empty.shape == (0, C)
    torch.testing.assert_close(y_TC, expected, rtol=0, atol=1e-6)


def test_lanes_of_unequal_length_are_gathered_without_padding() -> None:
    def work(place: Place, comms: Comms) -> list[float]:
        rows = torch.full((place.rank + 1, 1), float(place.rank))
        return gather_lanes(comms.dp, rows, (1, 2, 3)).flatten().tolist()

    assert on_every_rank(Layout(dp=3), work) == [[0.0, 1.0, 1.0, 2.0, 2.0, 2.0]] * 3
