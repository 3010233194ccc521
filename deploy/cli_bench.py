"""The commands `moefleet bench engine` and `moefleet bench worker`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from cluster.config import ExpertWeights
from deploy.bench_scenarios import DEFAULT_SCENARIOS, parse_scenarios
from deploy.cli_errors import told_errors
from deploy.sizes import parse_bytes
from shards.mesh import Layout

if TYPE_CHECKING:
    from deploy.bench_engine import BenchOptions

_LAYOUT: Final = "Layout over ranks"
_ENGINE: Final = "Engine"

bench = typer.Typer(help="Measure the engine, without Ray.", no_args_is_help=True)

Tp = Annotated[int, typer.Option(help="Ranks that share a sequence's heads.", rich_help_panel=_LAYOUT)]
Dp = Annotated[int, typer.Option(help="Lanes with sequences of their own.", rich_help_panel=_LAYOUT)]
Ep = Annotated[
    int, typer.Option(help="1: each rank has a slice of every expert; tp x dp: whole experts.", rich_help_panel=_LAYOUT)
]
Threads = Annotated[
    int | None,
    typer.Option(help="Compute threads a rank.", show_default="cores shared by the ranks", rich_help_panel=_ENGINE),
]
KvMemory = Annotated[
    str, typer.Option(help="KV and recurrent state of a rank, in bytes, MiB or GiB.", rich_help_panel=_ENGINE)
]
MaxStepTokens = Annotated[
    int, typer.Option(help="Tokens a lane computes in one step, at most.", rich_help_panel=_ENGINE)
]
DraftTokens = Annotated[
    int,
    typer.Option(
        help="Tokens drafted a step by the multi-token prediction head, at most; 0: none.", rich_help_panel=_ENGINE
    ),
]
DeviceName = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where ranks compute.", rich_help_panel=_ENGINE)]

ExpertsAs = Annotated[
    ExpertWeights,
    typer.Option(
        help="Of experts: as the checkpoint holds them, or rounded to int8 or int4 when loaded.",
        rich_help_panel=_ENGINE,
    ),
]


@bench.callback()
def bench_group() -> None:
    """Measure the engine, without Ray."""


@bench.command(epilog="Example: moefleet bench engine --model DIR --scenario single,batch8,prefill2048 --json")
def engine(
    model: Annotated[Path, typer.Option(help="Checkpoint folder: config.json, safetensors.")],
    scenario: Annotated[
        str,
        typer.Option(
            help="With commas between: single or batchN (128 tokens in, 128 out), prefillL, prefillNxL, startup."
        ),
    ] = DEFAULT_SCENARIOS,
    dtype: Annotated[Literal["bf16", "f32"], typer.Option(help="Of weights, activations and KV.")] = "bf16",
    repeat: Annotated[int, typer.Option(help="Runs a figure is the median of.")] = 3,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also where a step's time goes; slows all runs a little.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a scenario.")] = False,
    tp: Tp = 1,
    dp: Dp = 1,
    ep: Ep = 1,
    threads: Threads = None,
    kv_memory: KvMemory = "256MiB",
    max_step_tokens: MaxStepTokens = 2048,
    draft_tokens: DraftTokens = 0,
    device: DeviceName = "cpu",
    expert_weights: ExpertsAs = "checkpoint",
) -> None:
    """Time prompts of random tokens: decode and prefill rates, peak memory, start to first token.

    Greedy, past end tokens, without prefix cache. `others_cpu` is what everybody else used of the machine meanwhile:
    above 0.15 or so, measure again.
    """
    # Imports torch, which `moefleet --help` must not wait for.
    from deploy.bench import BenchRun, run_bench

    flags = [
        f"--tp={tp}",
        f"--dp={dp}",
        f"--ep={ep}",
        f"--kv-memory={kv_memory}",
        f"--max-step-tokens={max_step_tokens}",
        f"--draft-tokens={draft_tokens}",
        f"--device={device}",
        f"--expert-weights={expert_weights}",
    ]
    with told_errors():
        run = BenchRun(
            options=_options(
                Layout(tp=tp, dp=dp, ep=ep), threads, kv_memory, max_step_tokens, draft_tokens, device, expert_weights
            ),
            model=model,
            dtype=dtype,
            scenarios=parse_scenarios(scenario),
            repeat=repeat,
            json=json,
            profile=profile,
            worker_flags=(*flags, *([] if threads is None else [f"--threads={threads}"])),
        )
        run_bench(run, sys.stdout)


@bench.command(epilog="Example: moefleet bench worker --threads 2 < orders.jsonl")
def worker(
    tp: Tp = 1,
    dp: Dp = 1,
    ep: Ep = 1,
    threads: Threads = None,
    kv_memory: KvMemory = "256MiB",
    max_step_tokens: MaxStepTokens = 2048,
    draft_tokens: DraftTokens = 0,
    device: DeviceName = "cpu",
    expert_weights: ExpertsAs = "checkpoint",
) -> None:
    """Carry out JSON lines from standard input: load, generate, quit. Answers begin with "@@".

    \b
    {"op": "load", "model": DIR, "dtype": "bf16", "max_len": N, "max_seqs": N}
    {"op": "generate", "prompts": [[1, 2, 3]], "max_new": N}
    {"op": "quit"}
    """
    # Imports torch, which `moefleet --help` must not wait for.
    from deploy.bench_worker import run_worker

    with told_errors():
        options = _options(
            Layout(tp=tp, dp=dp, ep=ep), threads, kv_memory, max_step_tokens, draft_tokens, device, expert_weights
        )
        # What a library prints must not come between the answers.
        with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            run_worker(options, sys.stdin, answers)


def _options(
    layout: Layout,
    threads: int | None,
    kv_memory: str,
    max_step_tokens: int,
    draft_tokens: int,
    device: Literal["cpu", "cuda"],
    expert_weights: ExpertWeights,
) -> "BenchOptions":
    # Imports torch, as above.
    from deploy.bench_engine import BenchOptions

    return BenchOptions(
        layout=layout,
        threads=threads,
        kv_memory_bytes=parse_bytes(kv_memory, "--kv-memory"),
        max_step_tokens=max_step_tokens,
        draft_tokens=draft_tokens,
        device=device,
        expert_weights=expert_weights,
    )
