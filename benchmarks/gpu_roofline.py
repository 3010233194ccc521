"""Steps of large models against this GPU's own roofline: `python -m benchmarks.gpu_roofline [--json FILE]`.

A model shaped like one rank of Qwen3-235B-A22B over eight (16 of 128 experts, all else whole), the same without the
exchange of tokens, and one like Qwen3-Next-80B-A3B: as many layers as fit, weights made up on the device, steps through
`Rank` as in serving. What the GPU reads and multiplies at best is measured first; bytes and flops of a step are counted
from shapes and the experts it really hit. A step's time ends when its tokens are on the host; one that decodes is timed
as it is and as a CUDA graph. `--device cpu --scale tiny` tries the whole script on a machine without a GPU.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_models import (
    SHAPES,
    HitCounter,
    ModelShape,
    RandomWeights,
    count_weights,
    write_config,
)
from benchmarks.gpu_steps import (
    BLOCK,
    WARM_STEPS,
    Cell,
    Machine,
    Work,
    count_work,
    make_batches,
    measure_machine,
    seconds_of,
)
from shards.cache import CacheShape, unit_shape
from shards.comm import Comms
from shards.config import ModelConfig
from shards.families import load_model_config
from shards.host_memory import available_memory
from shards.mesh import Place
from shards.rank import Rank, RankConfig, torch_dtype
from shards.step_memory import working_bytes

WEIGHT_SHARE = 0.75
"""Of the free memory, for weights at most; the rest is for KV and steps."""
SPARE_SHARE = 0.9
"""Of what weights leave, for KV, states and steps; the rest is the allocator's and the graphs'."""
MOST_POSITIONS = 262144
"""Of the models."""
CPU_BYTES = 2 << 30
"""Of a machine without a GPU, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One line of the table."""

    shape: str
    layers: int
    cell: Cell
    work: Work
    roofline_ms: float
    eager_ms: float
    graph_ms: float | None
    """None: such steps are not captured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One model on the device."""

    name: str
    shape: ModelShape
    folder: Path
    """Holds config.json."""
    model: ModelConfig
    args: argparse.Namespace
    device: torch.device
    unit: CacheShape
    """A cache of one block and one slot."""
    weights: RandomWeights
    """Counts alone."""
    cells: list[Cell]
    """Those whose KV fits."""

    @property
    def place(self) -> Place:
        """Rank 0."""
        return Place(layout=self.shape.layout, rank=0)

    def make_rank(self, counter: HitCounter | None) -> Rank:
        """A loaded rank with room for every cell; steps are captured where there is no counter."""
        config = RankConfig(
            model=self.folder,
            place=self.place,
            dtype=self.args.dtype,
            device=str(self.device),
            kernels=self.args.kernels,
            deterministic="off",
            block_size=BLOCK,
            num_blocks=max(cell.rows * cell.blocks for cell in self.cells),
            num_slots=max(cell.rows for cell in self.cells),
            max_rows=max(cell.rows for cell in self.cells),
            max_model_len=max(cell.context for cell in self.cells),
        )
        rank = Rank(config, Comms.echo(self.shape.layout), counter)
        rank.load(weights=RandomWeights(self.device, zero_centred_norm=self.model.zero_centred_norm))
        return rank


def free_bytes(device: torch.device) -> int:
    """What weights, KV and steps may take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return min(CPU_BYTES, available_memory() or CPU_BYTES)


def choose_layers(shape: ModelShape, folder: Path, args: argparse.Namespace, free: int) -> int:
    """As many as were asked for, or as fit in weights' share of memory, in whole periods."""
    if args.layers is not None:
        return int(args.layers)
    sizes: list[int] = []
    for layers in (shape.period, 2 * shape.period):
        write_config(folder, shape.config_fields(args.scale, layers))
        place = Place(layout=shape.layout, rank=0)
        sizes.append(count_weights(load_model_config(folder), place, torch_dtype(args.dtype)).num_bytes)
    a_period = sizes[1] - sizes[0]
    fitting = int(free * WEIGHT_SHARE - (sizes[0] - a_period)) // a_period
    if fitting < 1:
        raise SystemExit(f"{a_period} bytes of weights a period of {shape.period} layers do not fit in {free} bytes")
    return min(shape.layers, fitting * shape.period)


def cells_bytes(cells: Sequence[Cell], model: ModelConfig, shape: ModelShape, unit: CacheShape) -> int:
    """KV, states and the largest step of cells that share one cache."""
    blocks, rows = max(cell.rows * cell.blocks for cell in cells), max(cell.rows for cell in cells)
    working = working_bytes(
        model,
        shape.layout,
        itemsize=unit.dtype.itemsize,
        max_rows=rows,
        max_model_len=max(cell.context for cell in cells),
        max_step_tokens=max(cell.tokens for cell in cells),
        block_size=BLOCK,
    )
    return blocks * unit.bytes_per_block + rows * unit.bytes_per_slot + working


def choose_cells(cells: Sequence[Cell], size: Callable[[Sequence[Cell]], int], room: int) -> list[Cell]:
    """Those that fit in memory together, smaller ones first; says which do not."""
    chosen: list[Cell] = []
    for cell in sorted(cells, key=lambda cell: cell.rows * cell.context):
        tried = [*chosen, cell]
        if size(tried) <= room:
            chosen = tried
        else:
            print(f"left out: {cell.kind} of {cell.rows} x {cell.context} does not fit in {room} bytes beside weights")
    return [cell for cell in cells if cell in chosen]


def make_bench(name: str, folder: Path, args: argparse.Namespace, device: torch.device) -> Bench:
    """The model by that name, with the layers and cells that fit."""
    shape, free = SHAPES[name], free_bytes(device)
    layers = choose_layers(shape, folder, args, free)
    write_config(folder, shape.config_fields(args.scale, layers))
    model, dtype = load_model_config(folder).with_drafts(0), torch_dtype(args.dtype)
    unit = unit_shape(model, shape.layout.tp, block_size=BLOCK, dtype=dtype, state_dtype=torch.float32)
    weights = count_weights(model, Place(layout=shape.layout, rank=0), dtype)
    cells = [Cell(kind="decode", rows=rows, context=context) for context in args.context for rows in args.batch]
    cells += [Cell(kind="prefill", rows=1, context=context) for context in args.prefill]
    room = int(SPARE_SHARE * (free - weights.num_bytes))
    cells = choose_cells(cells, lambda cells: cells_bytes(cells, model, shape, unit), room)
    if not cells:
        raise SystemExit(f"{name}: no step fits beside {weights.num_bytes} bytes of weights; ask for fewer --layers")
    return Bench(
        name=name,
        shape=shape,
        folder=folder,
        model=model,
        args=args,
        device=device,
        unit=unit,
        weights=weights,
        cells=cells,
    )


def time_cell(rank: Rank, bench: Bench, cell: Cell) -> float:
    """Median milliseconds of the step."""
    begin, step = make_batches(cell, bench.model.vocab_size)
    rank.step(begin)
    seconds_of(lambda: rank.step(step), WARM_STEPS, bench.device)
    return 1e3 * statistics.median(seconds_of(lambda: rank.step(step), bench.args.repeat, bench.device))


def run_eager(bench: Bench) -> dict[Cell, tuple[float, Work]]:
    """Every cell without graphs, and what it hit; a cell whose step does not fit in memory is left out."""
    counter = HitCounter()
    rank = bench.make_rank(counter)
    found: dict[Cell, tuple[float, Work]] = {}
    for cell in bench.cells:
        try:
            eager_ms = time_cell(rank, bench, cell)
        except torch.OutOfMemoryError:
            print(f"left out: {cell.kind} of {cell.rows} x {cell.context}: its step does not fit in memory")
            continue
        hits = counter.count(partial(rank.step, make_batches(cell, bench.model.vocab_size)[1]))
        found[cell] = eager_ms, count_work(bench.model, bench.weights, bench.unit, cell, hits)
    rank.close()
    return found


def run_graphs(bench: Bench, cells: Sequence[Cell]) -> dict[Cell, float]:
    """Those that are captured; nothing on a CPU and for ranks in groups."""
    if bench.device.type != "cuda" or bench.shape.layout.world > 1:
        return {}
    rank = bench.make_rank(None)
    found = {cell: time_cell(rank, bench, cell) for cell in cells if cell.kind == "decode"}
    rank.close()
    return found


def run_bench(bench: Bench, machine: Machine) -> list[Measured]:
    """A line for every cell."""
    eager = run_eager(bench)
    graphs = run_graphs(bench, list(eager))
    lines: list[Measured] = []
    for cell, (eager_ms, work) in eager.items():
        limits = (work.read_bytes / machine.read_gb_s / 1e9, work.flops / machine.bf16_tflop_s / 1e12)
        lines.append(
            Measured(
                shape=bench.name,
                layers=bench.model.num_hidden_layers,
                cell=cell,
                work=work,
                roofline_ms=1e3 * max(limits),
                eager_ms=eager_ms,
                graph_ms=graphs.get(cell),
            )
        )
    return lines


def print_table(lines: Sequence[Measured]) -> None:
    """For people, and for Markdown."""
    print("| step | rows x context | experts hit | GB | TFLOP | roofline ms | eager ms, share | graph ms, share |")
    print("|---|---|---|---|---|---|---|---|")
    for line in lines:

        def share(ms: float | None, best_ms: float = line.roofline_ms) -> str:
            return "-" if ms is None else f"{ms:.3f}, {best_ms / ms:.0%}"

        cell, work = line.cell, line.work
        print(
            f"| {cell.kind} | {cell.rows} x {cell.context} | {work.hit:.1f} | {work.read_bytes / 1e9:.3f} | "
            f"{work.flops / 1e12:.4f} | {line.roofline_ms:.3f} | {share(line.eager_ms)} | {share(line.graph_ms)} |",
            flush=True,
        )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; a wrong one ends the program and is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scales, kernels = ("full", "tiny"), ("triton", "torch")
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:<index> or cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    # The native kernels' decode steps are played from tapes, where nobody sees which experts are hit.
    parser.add_argument("--kernels", choices=kernels, help="default: triton on cuda, torch on cpu")
    parser.add_argument("--layers", type=int, help="instead of as many as fit")
    parser.add_argument("--scale", choices=scales, default="full", help="tiny: a fraction of every size")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--prefill", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write everything here too")
    args = parser.parse_args(argv)
    args.kernels = args.kernels or ("torch" if args.device.startswith("cpu") else "triton")
    numbers = [*args.batch, *args.context, *args.prefill, args.repeat, 1 if args.layers is None else args.layers]
    if min(numbers) < 1:
        parser.error("--batch, --context, --prefill, --repeat and --layers must be at least 1")
    if max(*args.context, *args.prefill) > MOST_POSITIONS:
        parser.error(f"--context and --prefill must be at most {MOST_POSITIONS}, the models' limit")
    if not args.device.startswith("cpu") and not torch.cuda.is_available():
        parser.error(f"--device={args.device}: torch sees no GPU; use --device cpu --scale tiny to try the script")
    return args


def main(argv: Sequence[str] | None = None) -> list[Measured]:
    """Measure, print, write."""
    args = parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    machine = measure_machine(device, args.repeat)
    print(f"{machine.name}: reads {machine.read_gb_s:.0f} GB/s, {machine.bf16_tflop_s:.1f} TFLOP/s in bfloat16")
    lines: list[Measured] = []
    for name in args.shape:
        with tempfile.TemporaryDirectory() as folder:
            bench = make_bench(name, Path(folder), args, device)
            layers = f"{bench.model.num_hidden_layers} of {bench.shape.layers} layers"
            print(f"\n{name}: {layers}, {bench.weights.num_bytes} bytes of weights", flush=True)
            measured = run_bench(bench, machine)
        print_table(measured)
        lines += measured
    if args.json is not None:
        written = {"machine": asdict(machine), "lines": [asdict(line) for line in lines]}
        args.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return lines


if __name__ == "__main__":
    main()
