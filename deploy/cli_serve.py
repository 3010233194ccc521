"""The command `moefleet serve`: its flags, each of which sets a key of the config."""

from pathlib import Path
from typing import Annotated, Final

import typer
from typer.models import OptionInfo

from cluster.config import DeterministicChoice, Device, Dtype, ExpertWeights, KernelChoice, StateCheckpoints
from deploy.cli_flags import FLAG_KEYS, overlay
from deploy.config import config_keys, parse_config
from deploy.config_file import load_config_file
from deploy.render import render_document

_MODEL: Final = "Model"
_PREFILL: Final = "Prefill pool: computes prompts"
_DECODE: Final = "Decode pool: computes new tokens"
_MIXED: Final = "Mixed pool: both, instead of the other two"
_POOLS: Final = "All pools"
_ENGINE: Final = "Engine"
_ENDPOINTS: Final = "Endpoints"
_CLUSTER: Final = "Cluster"
_DEFAULTS: Final = config_keys()


def _flag(name: str, panel: str, text: str, *, unset: str | None = None, names: tuple[str, ...] = ()) -> OptionInfo:
    """An option with the default of its config key.

    Args:
        unset: what happens without the option, where the key has no default.
    """
    default = _DEFAULTS.get(FLAG_KEYS[name].replace("*", "mixed"))
    shown = unset or (str(default) if default is not None else None)
    if name == "kv_memory" and isinstance(default, int):
        shown = f"{default >> 20}MiB"
    option = typer.Option(*names, help=text, rich_help_panel=panel, show_default=shown or False)
    assert isinstance(option, OptionInfo)
    return option


_MEMBERS: Final = "Copies of the model, each over tp x dp ranks."
_MAX_MEMBERS: Final = "Grow to this many members under load."
_TP: Final = "Ranks that share a sequence's heads."
_DP: Final = "Lanes with sequences of their own."
_EP: Final = "1: each rank has a slice of every expert; tp x dp: whole experts."


def serve(
    ctx: typer.Context,
    model: Annotated[
        str | None, _flag("model", _MODEL, "Checkpoint folder: config.json, safetensors, tokenizer; on every node.")
    ] = None,
    model_name: Annotated[
        str | None, _flag("model_name", _MODEL, "What clients call it.", unset="the folder's name")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of all options; flags go over it.", rich_help_panel=_MODEL)
    ] = None,
    prefill_members: Annotated[int | None, _flag("prefill_members", _PREFILL, _MEMBERS)] = None,
    prefill_max_members: Annotated[
        int | None, _flag("prefill_max_members", _PREFILL, _MAX_MEMBERS, unset="no scaling")
    ] = None,
    prefill_tp: Annotated[int | None, _flag("prefill_tp", _PREFILL, _TP)] = None,
    prefill_dp: Annotated[int | None, _flag("prefill_dp", _PREFILL, _DP)] = None,
    prefill_ep: Annotated[int | None, _flag("prefill_ep", _PREFILL, _EP)] = None,
    decode_members: Annotated[int | None, _flag("decode_members", _DECODE, _MEMBERS)] = None,
    decode_max_members: Annotated[
        int | None, _flag("decode_max_members", _DECODE, _MAX_MEMBERS, unset="no scaling")
    ] = None,
    decode_tp: Annotated[int | None, _flag("decode_tp", _DECODE, _TP)] = None,
    decode_dp: Annotated[int | None, _flag("decode_dp", _DECODE, _DP)] = None,
    decode_ep: Annotated[int | None, _flag("decode_ep", _DECODE, _EP)] = None,
    mixed_members: Annotated[int | None, _flag("mixed_members", _MIXED, _MEMBERS)] = None,
    mixed_max_members: Annotated[
        int | None, _flag("mixed_max_members", _MIXED, _MAX_MEMBERS, unset="no scaling")
    ] = None,
    mixed_tp: Annotated[int | None, _flag("mixed_tp", _MIXED, _TP)] = None,
    mixed_dp: Annotated[int | None, _flag("mixed_dp", _MIXED, _DP)] = None,
    mixed_ep: Annotated[int | None, _flag("mixed_ep", _MIXED, _EP)] = None,
    kv_memory: Annotated[
        str | None, _flag("kv_memory", _POOLS, "KV and recurrent state of a rank, in bytes, MiB or GiB.")
    ] = None,
    max_rows: Annotated[int | None, _flag("max_rows", _POOLS, "Sequences that run at once in a lane.")] = None,
    max_step_tokens: Annotated[
        int | None, _flag("max_step_tokens", _POOLS, "Tokens a lane computes in one step, at most.")
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        _flag(
            "chunk_tokens",
            _POOLS,
            "Prompt tokens of one sequence in one step, at most.",
            unset="--max-step-tokens",
        ),
    ] = None,
    dtype: Annotated[Dtype | None, _flag("dtype", _ENGINE, "Of weights, activations and KV.")] = None,
    state_dtype: Annotated[
        Dtype | None,
        _flag("state_dtype", _ENGINE, "Of recurrent states between tokens; bfloat16: half the memory, less exact."),
    ] = None,
    expert_weights: Annotated[
        ExpertWeights | None,
        _flag(
            "expert_weights",
            _ENGINE,
            "Of experts: as the checkpoint holds them, or rounded to int8 or int4 when loaded: faster, less exact.",
        ),
    ] = None,
    device: Annotated[Device | None, _flag("device", _ENGINE, "Where ranks compute.")] = None,
    kernels: Annotated[
        KernelChoice | None,
        _flag("kernels", _ENGINE, "native: C++ for CPUs; triton: GPUs; torch: plain; auto: the best."),
    ] = None,
    deterministic: Annotated[
        DeterministicChoice | None,
        _flag(
            "deterministic",
            _ENGINE,
            "Same bits in every batch, chunking and layout; auto: on where native kernels run.",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        _flag(
            "max_model_len",
            _ENGINE,
            "Prompt and output tokens of a request, at most.",
            unset="the model's limit, or what fits in the KV",
        ),
    ] = None,
    block_size: Annotated[int | None, _flag("block_size", _ENGINE, "Tokens a KV block.")] = None,
    prefix_cache: Annotated[
        bool | None,
        _flag(
            "prefix_cache",
            _ENGINE,
            "Reuse KV and recurrent state of equal prefixes.",
            unset="on",
            names=("--prefix-cache/--no-prefix-cache",),
        ),
    ] = None,
    state_checkpoints: Annotated[
        StateCheckpoints | None,
        _flag(
            "state_checkpoints",
            _ENGINE,
            "Recurrent states kept for equal prefixes; int8: 3 to 4 times as many, tokens behind a hit are not exact.",
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        _flag("draft_tokens", _ENGINE, "Tokens drafted a step by the multi-token prediction head, at most; 0: none."),
    ] = None,
    http_host: Annotated[
        str | None, _flag("http_host", _ENDPOINTS, "Address of the OpenAI API; beyond this machine only with keys.")
    ] = None,
    http_port: Annotated[int | None, _flag("http_port", _ENDPOINTS, "Port of the OpenAI API.")] = None,
    grpc_host: Annotated[str | None, _flag("grpc_host", _ENDPOINTS, "Address of the gRPC API; the same.")] = None,
    grpc_port: Annotated[int | None, _flag("grpc_port", _ENDPOINTS, "Port of the gRPC API.")] = None,
    api_keys_file: Annotated[
        str | None,
        _flag("api_keys_file", _ENDPOINTS, "Keys of clients: KEY or KEY TENANT a line.", unset="anyone may call"),
    ] = None,
    gateways: Annotated[int | None, _flag("gateways", _CLUSTER, "Processes that clients talk to.")] = None,
    ray_address: Annotated[
        str | None,
        _flag("ray_address", _CLUSTER, "local: a cluster of our own; HOST:PORT or auto: an existing one."),
    ] = None,
    num_cpus: Annotated[
        int | None, _flag("num_cpus", _CLUSTER, "Logical CPUs of a local cluster.", unset="what the pools need")
    ] = None,
    render: Annotated[
        bool,
        typer.Option(
            "--render",
            help="Print the same as a Ray Serve config document, and start nothing.",
            rich_help_panel=_CLUSTER,
        ),
    ] = False,
) -> None:
    """Serve a model from a Ray cluster, over the OpenAI API and gRPC, until Ctrl-C.

    Prompts are computed in one pool and new tokens in another, unless a mixed pool is asked for.
    """
    mapping = overlay({} if config is None else load_config_file(config), ctx.params)
    options = parse_config(mapping)
    if render:
        typer.echo(render_document(options), nl=False)
        return
    # Ray takes a second to import.
    from deploy.serve_command import run_serve

    raise typer.Exit(run_serve(options))
