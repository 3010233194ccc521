"""Choosing a kernel set, building its library, and refusing what it cannot take."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from shards.kernels import library as library_module
from shards.kernels.library import load_library
from shards.kernels.native import NativeKernels
from shards.kernels.select import select_kernels

ROOT = Path(__file__).parents[2]


def make_native() -> NativeKernels:
    kernels = select_kernels("native", "cpu")
    assert isinstance(kernels, NativeKernels)
    return kernels


def test_auto_is_native_on_cpu_and_triton_on_cuda() -> None:
    assert select_kernels("auto", "cpu").name == "native"
    assert select_kernels("auto", "cpu").deterministic
    assert select_kernels("auto", "cuda:1").name == ("triton" if find_spec("triton") else "torch")
    assert not select_kernels("torch", "cpu").deterministic


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is a gigabyte that not every CPU has: make install-dev")
def test_triton_is_refused_on_a_cpu_but_in_its_interpreter() -> None:
    with pytest.raises(ValueError, match=r"kernels=triton runs on device cuda .*got device=cpu; use kernels=auto"):
        select_kernels("triton", "cpu")


def test_without_a_library_auto_is_torch_and_native_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library_module, "LIBRARY", tmp_path / "_native.so")
    assert select_kernels("auto", "cpu").name == "torch"
    with pytest.raises(ValueError, match=r"kernels=native.*missing.*hatch_build.py"):
        select_kernels("native", "cpu")


def test_native_on_cuda_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"device cpu only, got device=cuda"):
        select_kernels("native", "cuda")
    with pytest.raises(ValueError, match="not one of auto, native, torch"):
        select_kernels("fast", "cpu")  # pyrefly: ignore [bad-argument-type]


def test_a_file_that_is_no_library_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library_module, "LIBRARY", broken)
    with pytest.raises(ValueError, match=r"cannot be used.*hatch_build.py"):
        load_library()


def test_a_library_of_another_version_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "ABI", 10_000)
    with pytest.raises(ValueError, match=r"version \d+, this package needs 10000.*hatch_build.py"):
        load_library()


def test_an_unknown_instruction_set_is_refused() -> None:
    loaded = load_library()
    assert loaded is not None
    with pytest.raises(ValueError, match="path='sse9' is not one of auto, plain"):
        NativeKernels(loaded, "sse9")  # pyrefly: ignore [bad-argument-type]


def test_a_wrong_tensor_is_refused_by_name() -> None:
    kernels, weight = make_native(), torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"x is torch.float16"):
        kernels.linear(torch.zeros(2, 8, dtype=torch.float16), weight.half())
    with pytest.raises(ValueError, match=r"weight is torch.bfloat16 .* need torch.float32"):
        kernels.linear(torch.zeros(2, 8), weight.bfloat16())
    with pytest.raises(ValueError, match=r"x is .* strides \[1, 2\] .* contiguous"):
        kernels.linear(torch.zeros(8, 2).T, weight)
    with pytest.raises(ValueError, match=r"weight is .* need torch.float32 \[4, 6\]"):
        kernels.linear(torch.zeros(2, 6), weight)
    with pytest.raises(ValueError, match=r"groups=3 must be a power of two that divides 8"):
        kernels.linear(torch.zeros(2, 8), weight, groups=3)
    with pytest.raises(ValueError, match=r"top_k=5 must lie in 1..4"):
        kernels.route(torch.zeros(2, 4), 5, renormalize=True)


def test_an_expert_id_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ids reach 2, but only 2 experts"):
        make_native().experts(torch.zeros(1, 4), torch.tensor([[0, 2]]), torch.zeros(2, 6, 4), torch.zeros(2, 4, 3))


def test_a_machine_without_a_compiler_is_told_and_keeps_its_library() -> None:
    before = library_module.LIBRARY.stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, str(ROOT / "hatch_build.py")],
        env={key: value for key, value in os.environ.items() if key != "CXX"} | {"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no C++ compiler found" in done.stderr
    assert library_module.LIBRARY.stat().st_mtime_ns == before
