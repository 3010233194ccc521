"""Times linear and experts of both kernel sets: `python benchmarks/kernels.py [--dtype bfloat16] [--path avx2]`.

Shapes of Qwen3-Next-80B-A3B (hidden 2048, experts 512 wide, top-10), with fewer experts so that they fit anywhere.
GB/s counts the weights that have to be read once.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.kernels.interface import Kernels
from shards.kernels.library import load_library
from shards.kernels.native import PATHS, NativeKernels
from shards.kernels.select import select_kernels
from shards.weight_memory import empty_weights

HIDDEN, OUT, EXPERTS, TOP_K, WIDTH = 2048, 12288, 64, 10, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call to time, with the work that it does."""

    name: str
    tokens: int
    prepare: Callable[[Kernels], Callable[[], object]]
    """Lays out a copy of the weights for a set -> what to time."""
    weight_bytes: int
    flops: int


def copy_of(weight: Tensor) -> Tensor:
    """In huge pages, as the engine's weights are."""
    return empty_weights(tuple(weight.shape), weight.dtype, weight.device).copy_(weight)


def linear_case(tokens: int, dtype: torch.dtype) -> Case:
    """A wide projection."""
    x, weight = torch.randn(tokens, HIDDEN).to(dtype), torch.randn(OUT, HIDDEN).to(dtype)

    def prepare(kernels: Kernels) -> Callable[[], object]:
        laid_out = kernels.lay_out(copy_of(weight))
        return lambda: kernels.linear(x, laid_out)

    return Case(
        name="linear",
        tokens=tokens,
        prepare=prepare,
        weight_bytes=weight.numel() * weight.element_size(),
        flops=2 * tokens * weight.numel(),
    )


def experts_case(tokens: int, dtype: torch.dtype) -> Case:
    """Every token through TOP_K of EXPERTS experts."""
    x = torch.randn(tokens, HIDDEN).to(dtype)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN).to(dtype)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH).to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
    weights = (gate_up.numel() + down.numel()) // EXPERTS

    def prepare(kernels: Kernels) -> Callable[[], object]:
        laid_out = kernels.lay_out_experts(copy_of(gate_up), copy_of(down))
        return lambda: kernels.experts(x, ids, *laid_out)

    return Case(
        name="experts",
        tokens=tokens,
        prepare=prepare,
        weight_bytes=len(ids.unique()) * weights * x.element_size(),
        flops=2 * tokens * TOP_K * weights,
    )


def median_seconds(run: Callable[[], object], *, least: int = 5, budget_s: float = 1.0) -> float:
    """Median of at least `least` runs after one to warm up."""
    run()
    times: list[float] = []
    while len(times) < least or sum(times) < budget_s:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def select_native(path: str) -> Kernels:
    """The native kernels by one instruction set."""
    library = load_library()
    if library is None:
        raise SystemExit("the native kernels are not built: run `python hatch_build.py`")
    return NativeKernels(library, path)  # pyrefly: ignore [bad-argument-type]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--path", choices=("auto", *PATHS), default="auto", help="instruction set of native")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    print(f"{options.dtype}, {options.threads} threads")
    print(f"{'case':8} {'T':>4} {'kernels':8} {'us':>9} {'GB/s':>7} {'GFLOP/s':>8}")
    sets = [select_native(options.path), select_kernels("torch", "cpu")]
    for make in (linear_case, experts_case):
        for tokens in (1, 8, 32, 512):
            case = make(tokens, dtype)
            for kernels in sets:
                seconds = median_seconds(case.prepare(kernels))
                rates = f"{case.weight_bytes / seconds / 1e9:7.1f} {case.flops / seconds / 1e9:8.1f}"
                print(f"{case.name:8} {tokens:4} {kernels.name:8} {seconds * 1e6:9.0f} {rates}")


if __name__ == "__main__":
    main()
