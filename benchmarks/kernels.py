"""Times linear and experts of both kernel sets: `python benchmarks/kernels.py [--dtype bfloat16] [--path avx2]`.

Shapes of Qwen3-Next-80B-A3B (hidden 2048, experts 512 wide, top-10) unless said, with fewer experts so that they fit
anywhere; with `--layers` a call goes through as many layers, so that weights come from memory. GB/s counts the weights
that have to be read once.
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

GROUPS = 4
"""Parts of a sum over ranks, as the engine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Sizes of a layer, and how many layers a call goes through."""

    hidden: int
    out: int
    experts: int
    top_k: int
    width: int
    layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call to time, with the work that it does."""

    name: str
    tokens: int
    prepare: Callable[[Kernels], Callable[[], object]]
    """Lays out a copy of the weights for a set -> what to time."""
    weight_bytes: int
    flops: int


def random_weights(*shape: int, dtype: torch.dtype) -> Tensor:
    """In huge pages, as the engine's weights are."""
    return empty_weights(shape, dtype, torch.device("cpu")).copy_(torch.randn(shape[1:]))


def linear_case(shapes: Shapes, tokens: int, dtype: torch.dtype) -> Case:
    """A wide projection."""
    x = torch.randn(tokens, shapes.hidden).to(dtype)

    def prepare(kernels: Kernels) -> Callable[[], object]:
        made = (random_weights(1, shapes.out, shapes.hidden, dtype=dtype)[0] for _ in range(shapes.layers))
        weights = [kernels.lay_out(weight) for weight in made]
        return lambda: [kernels.linear(x, weight) for weight in weights]

    size = shapes.layers * shapes.out * shapes.hidden
    return Case(
        name="linear",
        tokens=tokens,
        prepare=prepare,
        weight_bytes=size * dtype.itemsize,
        flops=2 * tokens * size,
    )


def experts_case(shapes: Shapes, tokens: int, dtype: torch.dtype) -> Case:
    """Every token through some of the experts, and the weighted sum of what they give."""
    x, mix = torch.randn(tokens, shapes.hidden).to(dtype), torch.rand(tokens, shapes.top_k)
    count, hidden, width = shapes.experts, shapes.hidden, shapes.width
    ids = [torch.stack([torch.randperm(count)[: shapes.top_k] for _ in range(tokens)]) for _ in range(shapes.layers)]

    def prepare(kernels: Kernels) -> Callable[[], object]:
        layers = []
        for _ in ids:
            gate_up = random_weights(count, 2 * width, hidden, dtype=dtype)
            down = random_weights(count, hidden, width, dtype=dtype)
            layers.append(kernels.lay_out_experts(gate_up, down, groups=GROUPS))
        return lambda: [
            kernels.weighted_experts(x, chosen, mix, *layer, groups=GROUPS)
            for chosen, layer in zip(ids, layers, strict=True)
        ]

    size = 3 * hidden * width
    return Case(
        name="experts",
        tokens=tokens,
        prepare=prepare,
        weight_bytes=sum(len(chosen.unique()) for chosen in ids) * size * dtype.itemsize,
        flops=2 * shapes.layers * tokens * shapes.top_k * size,
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


def parse_options() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--path", choices=("auto", *PATHS), default="auto", help="instruction set of native")
    parser.add_argument("--sets", choices=("native", "torch"), nargs="+", default=["native", "torch"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 512])
    sizes = {"hidden": 2048, "out": 12288, "experts": 64, "top-k": 10, "width": 512, "layers": 1}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    return parser.parse_args()


def main() -> None:
    """Print a table."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    shapes = Shapes(**{name: getattr(options, name) for name in Shapes.__slots__})
    print(f"{options.dtype}, {options.threads} threads")
    print(f"{'case':8} {'T':>4} {'kernels':10} {'us':>9} {'GB/s':>7} {'GFLOP/s':>8}")
    sets = [
        select_native(options.path) if name == "native" else select_kernels("torch", "cpu") for name in options.sets
    ]
    for make in (linear_case, experts_case):
        for tokens in options.tokens:
            case = make(shapes, tokens, dtype)
            for kernels in sets:
                seconds = median_seconds(case.prepare(kernels))
                name = kernels.path if isinstance(kernels, NativeKernels) else kernels.name
                rates = f"{case.weight_bytes / seconds / 1e9:7.1f} {case.flops / seconds / 1e9:8.1f}"
                print(f"{case.name:8} {tokens:4} {name:10} {seconds * 1e6:9.0f} {rates}", flush=True)


if __name__ == "__main__":
    main()
