"""Calls that are written down and made again, on small chains of native operators."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from threading import Thread
from typing import cast

import pytest
import torch
from torch import Tensor

from shards.kernels.library import load_library
from shards.kernels.native import NativeKernels
from shards.tape import PITCH, Recorder, UnrecordableError, Workspace
from tests.support.source_tree import ROOT

LIBRARY = load_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native library needs a C++ compiler")


def make_recorder() -> tuple[Recorder, NativeKernels]:
    assert LIBRARY is not None
    recorder = Recorder(LIBRARY, lambda: ("part",))
    return recorder, NativeKernels(LIBRARY).through(cast("ctypes.CDLL", recorder))


def chain(kernels: NativeKernels, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Norms with a float argument, a projection without bias (null), and views between them."""

    def run() -> Tensor:
        normed = kernels.rms_norm(x, weight[0], 1e-3, zero_centred=False)
        for _ in range(3):
            normed = kernels.add_rms_norm(normed, x, weight[1], 0.25, zero_centred=True)[1]
        return kernels.linear(normed.view(2, 2, -1).flatten(0, 1), weight)

    return run


def test_a_tape_makes_the_same_calls_again_on_what_its_inputs_hold_by_then() -> None:
    recorder, kernels = make_recorder()
    x, weight = torch.randn(4, 32), torch.randn(48, 32)
    run = chain(kernels, x, weight)
    with torch.inference_mode():
        result, tape = recorder.record(run, Workspace())
        assert tape.names == ("kernels_add_norm",) * 4 + ("kernels_linear",)
        assert tape.labels == (("part",),) * 5
        for seed in range(3):
            x.copy_(torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)))
            assert tape.play(timed=seed == 1) is None
            assert torch.equal(result, run())
    assert all(tape.ns > 0)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_a_workspace_has_tensors_of_any_shape(shape: tuple[int, ...]) -> None:
    assert Workspace().empty(shape, torch.bfloat16).shape == shape


def test_what_a_chain_computes_on_the_way_shares_memory_but_never_with_a_result() -> None:
    recorder, kernels = make_recorder()
    workspace, weight = Workspace(), torch.randn(48, 32)
    inputs = [torch.randn(4, 32) for _ in range(3)]
    kept = []
    with torch.inference_mode():
        for x in inputs:
            result, tape = recorder.record(chain(kernels, x, weight), workspace)
            kept.append((result, tape, x))
        for _, tape, _ in kept:
            tape.play(timed=False)
        for result, _, x in kept:
            assert torch.equal(result, chain(kernels, x, weight)())
    # Four norms and sums of 512 bytes at once at most, and three results of 768 bytes in pieces of 1024.
    assert workspace.num_bytes <= 4 * 512 + 3 * 1024


def test_a_borrowed_result_is_the_same_memory_and_lets_others_have_it() -> None:
    workspace = Workspace()
    first = workspace.empty((3, 5), torch.float32)
    lent = Workspace.borrowed(first.fill_(2.0))
    assert torch.equal(lent, first)
    address = first.data_ptr()
    del first
    second = workspace.empty((4, 4), torch.float32)
    assert second.data_ptr() == lent.data_ptr() == address
    assert workspace.empty((4, 4), torch.float32).data_ptr() != address


COMPUTING: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda x: x + x, "aten::add"),
    (lambda x: x.index_select(0, torch.arange(2)), "aten::"),
    (lambda x: x.t().contiguous(), "aten::"),
    (lambda x: x.mul_(2), "aten::mul_"),
    (lambda x: x.to(torch.float64), "aten::"),
]


@pytest.mark.parametrize(("compute", "named"), COMPUTING)
def test_what_torch_computes_cannot_be_recorded(compute: Callable[[Tensor], Tensor], named: str) -> None:
    recorder, kernels = make_recorder()
    x, weight = torch.randn(4, 32), torch.randn(48, 32)

    def run() -> Tensor:
        return kernels.rms_norm(compute(x).float().reshape(-1, 32).contiguous(), weight[0], 1e-3, zero_centred=False)

    before = x.clone()
    with torch.inference_mode(), pytest.raises(UnrecordableError, match=named):
        recorder.record(run, Workspace())
    assert torch.equal(x, before)
    # Calls are made again.
    assert torch.equal(kernels.beside(x, x), torch.cat((x, x), dim=1))


def test_a_call_that_cannot_be_made_from_numbers_is_not_recorded() -> None:
    assert LIBRARY is not None
    recorder, _ = make_recorder()

    def run() -> Tensor:
        recorder.kernels_best_path()
        return torch.empty(1)

    with pytest.raises(UnrecordableError, match="kernels_best_path cannot be called from numbers"):
        recorder.record(run, Workspace())


def test_a_call_with_an_array_made_for_it_is_not_recorded() -> None:
    recorder, kernels = make_recorder()
    x = torch.randn(2, 32)
    kernels.beside(x, x)
    room = (ctypes.c_int64 * 8)()
    with pytest.raises(UnrecordableError, match="kernels_beside has an argument that does not last"):
        recorder.record(lambda: torch.empty(recorder.kernels_beside(room, room, room, 1, 8, 8)), Workspace())


def test_nothing_is_computed_while_a_tape_is_recorded() -> None:
    recorder, kernels = make_recorder()
    x, weight = torch.randn(4, 32), torch.randn(48, 32)
    with torch.inference_mode():
        out, tape = recorder.record(chain(kernels, x, weight), Workspace())
        out.fill_(7.0)
        _, other = recorder.record(chain(kernels, x, weight), Workspace())
        assert torch.equal(out, torch.full((4, 48), 7.0))
        assert tape.play(timed=False) is other.play(timed=False) is None
        assert torch.equal(out, chain(kernels, x, weight)())


def test_another_thread_s_calls_are_made_while_a_tape_is_recorded() -> None:
    # Such as that of one that closes a group of which this rank is a member.
    recorder, kernels = make_recorder()
    x, weight = torch.randn(4, 32), torch.randn(48, 32)
    run = chain(kernels, x, weight)
    computed: list[Tensor] = []

    def compute() -> None:
        with torch.inference_mode():
            computed.append(run())

    def record() -> Tensor:
        other = Thread(target=compute)
        other.start()
        other.join()
        return run()

    with torch.inference_mode():
        _, tape = recorder.record(record, Workspace())
        assert tape.names == ("kernels_add_norm",) * 4 + ("kernels_linear",)
        assert torch.equal(computed[0], run())


def test_the_first_call_that_fails_is_told_and_ends_the_tape() -> None:
    recorder, kernels = make_recorder()
    ids, x = torch.zeros(2, 1, dtype=torch.int64), torch.randn(2, 32)
    gate_up, down = torch.randn(2, 32, 32), torch.randn(2, 32, 16)
    with torch.inference_mode():
        result, tape = recorder.record(
            lambda: kernels.silu_mul(kernels.experts(x, ids, gate_up, down).flatten(1)), Workspace()
        )
        assert tape.play(timed=False) is None
        before = result.clone()
        ids.fill_(2)
        x.zero_()
        assert tape.play(timed=False) == ("kernels_experts", 1)
        assert torch.equal(result, before)


def test_every_operator_of_the_library_has_a_form_that_takes_numbers() -> None:
    from shards.kernels.native import _SIGNATURES

    assert LIBRARY is not None
    computing = {name: kinds for name, kinds in _SIGNATURES.items() if not name.endswith("_path")}
    assert computing
    for name, kinds in computing.items():
        assert hasattr(LIBRARY, f"{name}_replay")
        assert len(kinds) < PITCH


_RECORD = """
import sys, torch
from shards.kernels.library import load_library
from shards.tape import Recorder, Workspace

with torch.inference_mode():
    result, _ = Recorder(load_library()).record(lambda: torch.empty(3), Workspace())
print([len(result), *(name for name in sys.modules if name.startswith(("torch._dynamo", "sympy")))])
"""


def test_the_first_recording_does_not_wait_for_torchs_compiler_to_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", _RECORD], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[3]"
