"""The command `moefleet generate`."""

import sys
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from cluster.config import (
    DeterministicChoice,
    Device,
    Dtype,
    EngineConfig,
    ExpertWeights,
    KernelChoice,
    StateCheckpoints,
)
from deploy.cli_errors import told_errors
from deploy.sizes import parse_bytes
from shards.mesh import Layout

_PROMPTS: Final = "Prompts (each repeats, all are batched)"
_LAYOUT: Final = "Layout over ranks"
_ENGINE: Final = "Engine"
_SAMPLING: Final = "Sampling (greedy unless --temperature is given)"
_OUTPUT: Final = "Output"


def generate(
    model: Annotated[Path, typer.Option(help="Checkpoint folder: config.json, safetensors, tokenizer.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt as text.", rich_help_panel=_PROMPTS)] = None,
    prompt_ids: Annotated[
        list[str] | None, typer.Option(help="A prompt as token ids, such as 1,2,3.", rich_help_panel=_PROMPTS)
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines: {"prompt": TEXT} or {"prompt_ids": [1, 2]}, with own sampling fields if need be.',
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    tp: Annotated[int, typer.Option(help="Ranks that share a sequence's heads.", rich_help_panel=_LAYOUT)] = 1,
    dp: Annotated[int, typer.Option(help="Lanes with sequences of their own.", rich_help_panel=_LAYOUT)] = 1,
    ep: Annotated[
        int,
        typer.Option(help="1: each rank has a slice of every expert; tp x dp: whole experts.", rich_help_panel=_LAYOUT),
    ] = 1,
    ranks: Annotated[
        Literal["spawn", "torchrun"],
        typer.Option(
            help="Who starts the ranks: this command, or `torchrun --nproc-per-node N` that runs it N times.",
            rich_help_panel=_LAYOUT,
        ),
    ] = "spawn",
    state_dtype: Annotated[
        Dtype,
        typer.Option(
            help="Of recurrent states between tokens; bfloat16: half the memory, less exact.", rich_help_panel=_ENGINE
        ),
    ] = "float32",
    expert_weights: Annotated[
        ExpertWeights,
        typer.Option(
            help="Of experts: as the checkpoint holds them, or rounded to int8 or int4 when loaded.",
            rich_help_panel=_ENGINE,
        ),
    ] = "checkpoint",
    device: Annotated[Device, typer.Option(help="Where ranks compute.", rich_help_panel=_ENGINE)] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of weights, activations and KV.", rich_help_panel=_ENGINE)] = "bfloat16",
    kernels: Annotated[
        KernelChoice,
        typer.Option(help="native: C++ for CPUs; triton: GPUs; torch: plain; auto: the best.", rich_help_panel=_ENGINE),
    ] = "auto",
    deterministic: Annotated[
        DeterministicChoice,
        typer.Option(
            help="Same bits in every batch, chunking and layout; auto: on where native kernels run.",
            rich_help_panel=_ENGINE,
        ),
    ] = "auto",
    kv_memory: Annotated[
        str,
        typer.Option(help="KV and recurrent state of a rank, in bytes, MiB or GiB.", rich_help_panel=_ENGINE),
    ] = "256MiB",
    chunk: Annotated[
        int | None,
        typer.Option(help="Prompt tokens of a sequence in one step, at most; default: 2048.", rich_help_panel=_ENGINE),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Prompt and output tokens of a sequence, at most; default: the model's limit, or what fits in the KV.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    no_prefix_cache: Annotated[
        bool,
        typer.Option("--no-prefix-cache", help="Never reuse KV and state of equal prefixes.", rich_help_panel=_ENGINE),
    ] = False,
    state_checkpoints: Annotated[
        StateCheckpoints,
        typer.Option(
            help="Recurrent states kept for equal prefixes; int8: 3 to 4 times as many, tokens behind a hit not exact.",
            rich_help_panel=_ENGINE,
        ),
    ] = "exact",
    draft_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens drafted a step by the multi-token prediction head, at most.", rich_help_panel=_ENGINE
        ),
    ] = 0,
    max_tokens: Annotated[int, typer.Option(help="New tokens a prompt, at most.", rich_help_panel=_SAMPLING)] = 128,
    min_tokens: Annotated[
        int, typer.Option(help="New tokens before an end token may come.", rich_help_panel=_SAMPLING)
    ] = 0,
    temperature: Annotated[float, typer.Option(help="0 to 2; 0 is greedy.", rich_help_panel=_SAMPLING)] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Above 0, to 1.", rich_help_panel=_SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option(help="0: whole vocabulary.", rich_help_panel=_SAMPLING)] = None,
    min_p: Annotated[float | None, typer.Option(help="0 to 1.", rich_help_panel=_SAMPLING)] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="-2 to 2.", rich_help_panel=_SAMPLING)] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="-2 to 2.", rich_help_panel=_SAMPLING)] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 0; 1: none.", rich_help_panel=_SAMPLING)
    ] = None,
    logit_bias: Annotated[
        list[str] | None, typer.Option(help="TOKEN_ID:BIAS, -100 to 100; repeats.", rich_help_panel=_SAMPLING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise; default: drawn.", rich_help_panel=_SAMPLING)] = None,
    stop_token_ids: Annotated[
        str | None, typer.Option(help="Ids that end a sequence, such as 1,2,3.", rich_help_panel=_SAMPLING)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's end tokens.", rich_help_panel=_SAMPLING)
    ] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="Alternatives reported a token, 0 to 20.", rich_help_panel=_OUTPUT)
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option(help="The same for prompt tokens.", rich_help_panel=_OUTPUT)
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="One line a prompt: token_ids, text, finish_reason, usage.", rich_help_panel=_OUTPUT
        ),
    ] = False,
) -> None:
    """Continue prompts with a model, in this process and without Ray; further ranks are processes of this machine."""
    # Imports torch, which `moefleet --help` must not wait for.
    from deploy.generate import GenerateOptions, run_generate
    from deploy.prompts_file import parse_bias, parse_ids
    from deploy.validation import SamplingInput

    with told_errors():
        options = GenerateOptions(
            engine=EngineConfig(
                model=model,
                layout=Layout(tp=tp, dp=dp, ep=ep),
                dtype=dtype,
                state_dtype=state_dtype,
                expert_weights=expert_weights,
                device=device,
                kernels=kernels,
                deterministic=deterministic,
                kv_memory_bytes=parse_bytes(kv_memory, "--kv-memory"),
                chunk_tokens=chunk,
                max_model_len=max_model_len,
                prefix_cache=not no_prefix_cache,
                state_checkpoints=state_checkpoints,
                draft_tokens=draft_tokens,
            ),
            sampling=SamplingInput(
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                repetition_penalty=repetition_penalty,
                logit_bias=parse_bias(logit_bias or ()),
                seed=seed,
                stop_token_ids=parse_ids(stop_token_ids, "--stop-token-ids") if stop_token_ids else (),
                ignore_eos=ignore_eos,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            ),
            prompts=tuple(prompt or ()),
            prompt_ids=tuple(prompt_ids or ()),
            prompts_file=prompts_file,
            json=json,
            ranks=ranks,
        )
        raise typer.Exit(run_generate(options, sys.stdout))


if __name__ == "__main__":
    typer.run(generate)
