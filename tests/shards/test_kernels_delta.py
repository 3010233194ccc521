"""The gated delta net of the native kernels: agrees with the reference, and its rows do not know how they were cut."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shards.kernels.interface import DeltaWeights, Kernels
from shards.kernels.native import NativeKernels
from shards.kernels.torch_delta import delta_gates
from tests.support.kernels import (
    NATIVE,
    REFERENCE,
    assert_close,
    cuts,
    every_dtype,
    every_path,
    one_sequence,
    random,
    threads,
)

Where = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """A delta net with states of some slots and rows to compute."""

    weights: DeltaWeights
    projected: Tensor
    conv_state: Tensor
    state: Tensor

    def run(
        self, kernels: Kernels, where: Where, advance: Tensor | None = None, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rows' results, and the states after them; our own are left alone."""
        conv_state, state = self.conv_state.clone(), self.state.clone()
        out = kernels.delta_net(self.projected[rows], self.weights, conv_state, state, *where, advance)
        return out, conv_state, state


def make_net(
    T: int,
    K: int,
    V: int,
    Dk: int,
    Dv: int,
    *,
    W: int = 4,
    slots: int = 6,
    dtype: torch.dtype,
    state_dtype: torch.dtype = torch.float32,
) -> Net:
    channels = 2 * K * Dk + V * Dv
    return Net(
        weights=DeltaWeights(
            conv1d_QW=random(channels, W, dtype=dtype),
            a_log_V=random(V),
            dt_bias_V=random(V, seed=1),
            norm_D=random(Dv, dtype=dtype),
            num_key_heads=K,
            key_dim=Dk,
            eps=1e-6,
        ),
        projected=random(T, channels + V * Dv + 2 * V, dtype=dtype),
        conv_state=random(slots, channels, W - 1, dtype=dtype),
        state=random(slots, V, Dk, Dv, dtype=state_dtype),
    )


def where_of(lengths: list[int], slots: list[int], fresh: list[bool]) -> Where:
    return torch.tensor(slots), torch.tensor([0, *lengths]).cumsum(0), torch.tensor(fresh)


@every_path
@every_dtype
@pytest.mark.parametrize(
    ("K", "V", "Dk", "Dv", "W"), [(2, 2, 16, 16, 4), (2, 6, 24, 40, 2), (1, 2, 128, 128, 4), (2, 4, 64, 80, 1)]
)
def test_the_net_agrees_with_recurrent_and_chunked_reference_and_advances_only_its_slots(
    kernels: NativeKernels, dtype: torch.dtype, K: int, V: int, Dk: int, Dv: int, W: int
) -> None:
    lengths = [1, 70, 0, 5]
    net = make_net(sum(lengths), K, V, Dk, Dv, W=W, dtype=dtype)
    where = where_of(lengths, [4, 1, 0, 3], [False, True, True, False])
    found, expected = net.run(kernels, where), net.run(REFERENCE, where)
    assert_close(found[0], expected[0], scale=20)
    assert torch.equal(found[1], expected[1])
    assert_close(found[2], expected[2], scale=4 if dtype == torch.float32 else 0.5)
    for slot in (0, 2, 5):
        assert torch.equal(found[2][slot], net.state[slot])


@every_dtype
def test_a_step_of_single_tokens_agrees_with_the_batched_reference_path(dtype: torch.dtype) -> None:
    net = make_net(3, 2, 4, 16, 16, dtype=dtype)
    where = where_of([1, 1, 1], [2, 0, 3], [False, True, False])
    found, expected = net.run(NATIVE[-1], where), net.run(REFERENCE, where)
    assert_close(found[0], expected[0], scale=4)
    assert_close(found[2], expected[2])


def test_gates_at_the_ends_of_the_float_range_are_finite() -> None:
    net = make_net(2, 1, 1, 16, 16, dtype=torch.float32)
    net.projected[:, -2:] = torch.tensor([[-200.0, -200.0], [200.0, 200.0]])
    found, expected = (net.run(kernels, where_of([2], [1], [False])) for kernels in (NATIVE[-1], REFERENCE))
    assert found[0].isfinite().all()
    assert_close(found[0], expected[0], scale=4)
    beta, g = delta_gates(net.projected[:, -2:-1], net.projected[:, -1:], torch.zeros(1), torch.zeros(1))
    assert beta.flatten().tolist() == [0.0, 1.0]
    assert g.flatten().tolist() == [0.0, -200.0]


@every_path
@every_dtype
@pytest.mark.parametrize(("Dk", "Dv"), [(16, 16), (24, 40), (128, 128)])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_chunks_batches_and_threads_leave_no_mark(
    kernels: NativeKernels, dtype: torch.dtype, Dk: int, Dv: int, state_dtype: torch.dtype
) -> None:
    T = 70
    net = make_net(T, 2, 4, Dk, Dv, slots=2, dtype=dtype, state_dtype=state_dtype)

    def run(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        conv_state, state = torch.full_like(net.conv_state, torch.nan), torch.full_like(net.state, torch.nan)
        pieces = [
            kernels.delta_net(net.projected[at], net.weights, conv_state, state, *one_sequence(at))
            for at in cuts(T, sizes)
        ]
        return torch.cat(pieces), conv_state[1], state[1]

    whole = run([T])
    for sizes in ([1], [2], [7, 1, 33]):
        assert all(torch.equal(a, b) for a, b in zip(run(sizes), whole, strict=True))
    both = kernels.delta_net(
        torch.cat((net.projected[:5], net.projected)),
        net.weights,
        net.conv_state.clone(),
        net.state.clone(),
        *where_of([5, T], [0, 1], [True, True]),
    )
    assert torch.equal(both, torch.cat((whole[0][:5], whole[0])))
    with threads(3):
        assert torch.equal(run([T])[0], whole[0])


@every_path
@every_dtype
def test_heads_do_not_depend_on_the_heads_beside_them(kernels: NativeKernels, dtype: torch.dtype) -> None:
    K, V, D, T = 2, 4, 24, 9
    net = make_net(T, K, V, D, D, dtype=dtype)
    where = where_of([T], [1], [False])
    whole = net.run(kernels, where)[0].unflatten(1, (V, D))
    kinds = net.projected.split((K * D, K * D, V * D, V * D, V, V), dim=1)
    for rank in range(2):
        rows = torch.cat([kind.chunk(2, dim=1)[rank] for kind in kinds], dim=1)
        conv = [
            torch.cat([kind.chunk(2, dim=axis)[rank] for kind in x.split((K * D, K * D, V * D), dim=axis)], dim=axis)
            for x, axis in ((net.weights.conv1d_QW, 0), (net.conv_state, 1))
        ]
        weights = DeltaWeights(
            conv1d_QW=conv[0],
            a_log_V=net.weights.a_log_V.chunk(2)[rank],
            dt_bias_V=net.weights.dt_bias_V.chunk(2)[rank],
            norm_D=net.weights.norm_D,
            num_key_heads=1,
            key_dim=D,
            eps=1e-6,
        )
        state = net.state.chunk(2, dim=1)[rank].contiguous()
        part = kernels.delta_net(rows, weights, conv[1], state, *where).unflatten(1, (2, D))
        assert torch.equal(part, whole.chunk(2, dim=1)[rank])


@every_path
@every_dtype
def test_a_sequence_that_does_not_advance_leaves_its_slot_and_gives_the_same_rows(
    kernels: NativeKernels, dtype: torch.dtype
) -> None:
    net = make_net(4, 2, 4, 24, 24, slots=2, dtype=dtype)
    where, still = where_of([3, 1], [1, 0], [False, False]), torch.tensor([False, True])
    kept, advanced = net.run(kernels, where, still), net.run(kernels, where)
    assert torch.equal(kept[0], advanced[0])
    for before, after, moved in zip((net.conv_state, net.state), kept[1:], advanced[1:], strict=True):
        assert torch.equal(after[1], before[1])
        assert torch.equal(after[0], moved[0])


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 1, 4]])
def test_the_reference_too_leaves_slots_of_sequences_that_do_not_advance(lengths: list[int]) -> None:
    net = make_net(sum(lengths), 2, 4, 16, 16, slots=3, dtype=torch.float32)
    where = where_of(lengths, [2, 0, 1], [False] * 3)
    kept, advanced = net.run(REFERENCE, where, torch.tensor([True, False, True])), net.run(REFERENCE, where)
    assert torch.equal(kept[0], advanced[0])
    for before, after, moved in zip((net.conv_state, net.state), kept[1:], advanced[1:], strict=True):
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[1:], moved[1:])


@every_path
@pytest.mark.parametrize("Dv", [16, 40, 128])
def test_a_state_in_bfloat16_is_the_float32_state_rounded_behind_every_token(kernels: NativeKernels, Dv: int) -> None:
    T = 6
    net = make_net(T, 2, 4, 24, Dv, slots=2, dtype=torch.float32, state_dtype=torch.bfloat16)
    narrow, wide = net.state.clone(), net.state.float()
    narrow_conv, wide_conv = net.conv_state.clone(), net.conv_state.clone()
    for token in range(T):
        row, where = net.projected[token : token + 1], where_of([1], [1], [False])
        kernels.delta_net(row, net.weights, wide_conv, wide, *where)
        wide = wide.bfloat16().float()
    kernels.delta_net(net.projected, net.weights, narrow_conv, narrow, *where_of([T], [1], [False]))
    assert torch.equal(narrow.float(), wide)
    assert torch.equal(narrow[0], net.state[0])


@every_path
def test_a_state_in_bfloat16_that_is_not_finite_stays_so(kernels: NativeKernels) -> None:
    net = make_net(1, 1, 1, 16, 24, slots=1, dtype=torch.float32, state_dtype=torch.bfloat16)
    net.state[0, 0, 0, 20] = torch.nan
    _, _, after = net.run(kernels, where_of([1], [0], [False]))
    assert after[0, 0, :, 20].isnan().all()
    assert after[0, 0, :, :20].isfinite().all()


def test_the_reference_rounds_a_state_when_it_stores_it() -> None:
    net = make_net(70, 2, 4, 16, 16, slots=1, dtype=torch.float32, state_dtype=torch.bfloat16)
    wide = Net(weights=net.weights, projected=net.projected, conv_state=net.conv_state, state=net.state.float())
    where = where_of([70], [0], [False])
    narrow, plain = net.run(REFERENCE, where), wide.run(REFERENCE, where)
    assert torch.equal(narrow[0], plain[0])
    assert torch.equal(narrow[2], plain[2].bfloat16())


def test_a_state_of_another_dtype_is_refused_by_name() -> None:
    net = make_net(1, 1, 1, 16, 16, slots=1, dtype=torch.float32, state_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"state is torch\.float16; native kernels take float32 and bfloat16"):
        net.run(NATIVE[0], where_of([1], [0], [False]))
