"""Compiles the Triton kernels for a GPU that need not be there: `python -m benchmarks.gpu_compile [--arch 90]`.

Models of the real sizes on torch's meta device run what a rank runs when it loads (`shards.warm_up`), and then steps of
many sizes, for which nothing should be left to compile: a compiler in the middle of serving stalls every sequence.
Tells kernels (of a second model those that the first one had not), seconds and shared memory, and ends with status 1
where something was left.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from benchmarks.gpu_models import SHAPES, RandomWeights, write_config
from shards.cache import KvCache, cache_shape
from shards.comm import Comms
from shards.cuda_graphs import padding_step
from shards.cuts import make_cuts
from shards.families import load_model_config
from shards.kernels.triton_kernels import TritonKernels
from shards.linear import Runtime
from shards.loading import Loader
from shards.mesh import Place
from shards.model import load_model
from shards.rank import torch_dtype
from shards.warm_up import warm_up

SHARED_BYTES = {80: 166_912, 90: 232_448}
"""Shared memory that a program may take, by architecture."""
STEPS = ((1, 1, 16), (2, 1, 16), (17, 1, 65), (64, 1, 512), (65, 1, 512), (256, 1, 512))
STEPS += ((1, 2048, 128), (3, 700, 140), (1, 8192, 512), (7, 1000, 3000))
"""Rows, tokens of each, width of block tables."""


class Metadata(Protocol):
    """What Triton says of a compiled kernel."""

    name: str
    shared: int


class NoDevice:
    """A driver for Triton that loads and launches nothing, and keeps what it is given to launch."""

    def __init__(self, arch: int) -> None:
        self.utils = self
        self.compiled: list[Metadata] = []
        self._target = GPUTarget("cuda", arch, 32)
        self._shared = SHARED_BYTES[arch]

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """The one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The one."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Limits that Triton checks."""
        return {"max_shared_mem": self._shared}

    def launcher_cls(self, source: object, metadata: Metadata) -> "NoDevice":
        """A launcher, made when a kernel is compiled."""
        self.compiled.append(metadata)
        return self

    def load_binary(self, *args: object) -> tuple["NoDevice", None, int, int, int]:
        """Something for a module, no function; registers, spills, threads."""
        return self, None, 0, 0, 1024

    def __call__(self, *args: object) -> None:
        """Launch."""


def compile_shape(name: str, args: argparse.Namespace, device: NoDevice) -> int:
    """Compile what a rank of the shape needs, and print it -> kernels that were left to the steps."""
    shape, meta, dtype = SHAPES[name], torch.device("meta"), torch_dtype(args.dtype)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_config(Path(folder), shape.config_fields(args.scale, shape.period))
        config = load_model_config(Path(folder)).with_drafts(0)
        cuts = make_cuts(config, Place(layout=shape.layout, rank=0), deterministic=False)
        weights = RandomWeights(meta, zero_centred_norm=config.zero_centred_norm)
        kernels = TritonKernels()
        loader = Loader(reader=weights, config=config, cuts=cuts, dtype=dtype, device=meta, kernels=kernels)
        model = load_model(loader)
        cache = KvCache(cache_shape(config, 1, 0, num_blocks=1, block_size=16, num_slots=1, dtype=dtype), meta)
        runtime = Runtime(kernels=kernels, comms=Comms.local(), exact=False)
        rotary_dim, before, started = config.rope.rotary_dim, len(device.compiled), time.monotonic()
        warm_up(model, runtime, cache, layout=shape.layout, rotary_dim=rotary_dim)
        seconds, first = time.monotonic() - started, len(device.compiled)
        most = max(device.compiled, key=lambda kernel: kernel.shared)
        for rows, count, blocks in STEPS:
            step = padding_step(rows, blocks, rotary_dim=rotary_dim, device=meta, count=count)
            for each in (step, dataclasses.replace(step, advance_S=None)):
                model.lm_head.logits(runtime, model.forward(runtime, each, cache)[:rows])
    left = [kernel.name for kernel in device.compiled[first:]]
    print(
        f"{name} {args.dtype} sm_{args.arch}: {first - before} kernels in {seconds:.1f} s, shared memory up to "
        f"{most.shared} bytes ({most.name}); {len(left)} more in steps {' '.join(left)}",
        flush=True,
    )
    return len(left)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile for each shape; an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Which rows meet in an exchange of tokens is data, which the meta device has none of.
    alone = tuple(name for name, shape in SHAPES.items() if shape.layout.world == 1)
    parser.add_argument("--shape", nargs="+", choices=alone, default=list(alone))
    parser.add_argument("--arch", type=int, choices=tuple(SHARED_BYTES), default=90)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    args = parser.parse_args(argv)
    device, left = NoDevice(args.arch), 0
    driver.set_active(cast("DriverBase", device))
    for name in args.shape:
        with tempfile.TemporaryDirectory() as folder:
            # What was compiled before would take no time.
            triton.knobs.cache.dir = folder
            left += compile_shape(name, args, device)
    return min(left, 1)


if __name__ == "__main__":
    sys.exit(main())
