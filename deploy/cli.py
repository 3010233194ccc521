"""The program `moefleet`."""

import logging
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from deploy.cli_bench import bench
from deploy.cli_generate import generate
from deploy.cli_serve import serve
from deploy.cli_simulate import simulate
from router.errors import MoefleetError

_INPUT: Final = "Input"
_SAMPLING: Final = "Sampling"
_CONNECTION: Final = "Connection"

app = typer.Typer(
    name="moefleet",
    help="Serve large mixture-of-experts language models from a Ray cluster.",
    epilog="Begin with: moefleet demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
checkpoint = typer.Typer(help="Make checkpoints.", no_args_is_help=True)
app.command(
    epilog="Example: moefleet serve --model DIR --prefill-tp 2 --decode-members 2 --kv-memory 1GiB",
)(serve)
app.command(epilog='Example: moefleet generate --model DIR --prompt "Hello" --max-tokens 16 --tp 2 --json')(generate)
app.command(epilog="Example: moefleet simulate --trace FILE --members 16 --members 256")(simulate)
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(bench, name="bench")


@app.command(epilog="Example: moefleet demo --arch qwen3_moe --http-port 8100")
def demo(
    arch: Annotated[Literal["qwen3_next", "qwen3_moe"], typer.Option(help="Model family.")] = "qwen3_next",
    http_port: Annotated[int | None, typer.Option(help="Port of the OpenAI API.", show_default="8000")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC API.", show_default="9000")] = None,
) -> None:
    """Serve a tiny trained model on this machine: a prefill and a decode pool of two ranks each.

    It can add, subtract, sort, reverse, count, look up a fact in the prompt and call tools, with and without thinking.
    Ctrl-C ends it and leaves no process.
    """
    from deploy.demo import demo_config
    from deploy.serve_command import run_serve

    raise typer.Exit(run_serve(demo_config(arch, http_port=http_port, grpc_port=grpc_port)))


@app.command(epilog='Example: moefleet call --message "Who are you?" --max-tokens 64')
def call(
    text: Annotated[str | None, typer.Option(help="Text to continue.", rich_help_panel=_INPUT)] = None,
    message: Annotated[
        str | None, typer.Option(help="A user's turn, put through the chat template.", rich_help_panel=_INPUT)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Served name.", show_default="the one that is served", rich_help_panel=_INPUT)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens, at most.", rich_help_panel=_SAMPLING)] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 to 2; 0 is greedy.", show_default="the model's own", rich_help_panel=_SAMPLING),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the noise.", show_default="drawn", rich_help_panel=_SAMPLING)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's end tokens.", rich_help_panel=_SAMPLING)
    ] = False,
    target: Annotated[
        str, typer.Option(help="HOST:PORT of the gRPC API.", rich_help_panel=_CONNECTION)
    ] = "127.0.0.1:9000",
    api_key_file: Annotated[
        Path | None, typer.Option(help="File whose first line is the key.", rich_help_panel=_CONNECTION)
    ] = None,
    tls_ca_file: Annotated[
        Path | None,
        typer.Option(help="Use TLS and trust these authorities (PEM).", rich_help_panel=_CONNECTION),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds.", rich_help_panel=_CONNECTION)] = 600.0,
) -> None:
    """Send one request to a running fleet over gRPC and write the text as it comes."""
    # gRPC is wanted here alone.
    from deploy.call import CallError, CallOptions, run_call

    options = CallOptions(
        target=target,
        text=text,
        message=message,
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        ignore_eos=ignore_eos,
        api_key_file=api_key_file,
        tls_ca_file=tls_ca_file,
        timeout_s=timeout,
    )
    try:
        run_call(options, sys.stdout)
    except CallError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command(epilog="Example: moefleet status --json")
def status(
    ray_address: Annotated[str, typer.Option(help="Of the Ray cluster; auto: the one of this machine.")] = "auto",
    namespace: Annotated[str, typer.Option(help="The fleet's `ray.namespace`.")] = "moefleet",
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show pools, members, ranks and load of the fleet on a Ray cluster."""
    # Ray takes a second to import.
    from deploy.status import run_status

    run_status(address=ray_address, namespace=namespace, as_json=json, out=sys.stdout)


@app.command(epilog="Example: moefleet role prefill-1a2b3c4d mixed")
def role(
    member: Annotated[str, typer.Argument(help="Its id, as `moefleet status` shows it.")],
    role: Annotated[Literal["prefill", "decode", "mixed"], typer.Argument(help="What it is to do from now on.")],
    ray_address: Annotated[str, typer.Option(help="Of the Ray cluster; auto: the one of this machine.")] = "auto",
    namespace: Annotated[str, typer.Option(help="The fleet's `ray.namespace`.")] = "moefleet",
) -> None:
    """Let a member prefill, decode or do both from now on, without restarting it or ending a stream."""
    # Ray takes a second to import.
    from deploy.status import run_role

    run_role(member, role, address=ray_address, namespace=namespace, out=sys.stdout)


@app.command()
def version() -> None:
    """Print the version."""
    try:
        number = installed_version("moefleet")
    except PackageNotFoundError:  # a source tree on the path
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
        number = str(project["project"]["version"])
    typer.echo(f"moefleet {number}")


@checkpoint.callback()
def checkpoint_group() -> None:
    """Make checkpoints."""


@checkpoint.command(
    "random", epilog="Example: moefleet checkpoint random --arch qwen3_next --size tiny --seed 0 --out DIR"
)
def checkpoint_random(
    arch: Annotated[str, typer.Option(help="Model family, as `model_type` in config.json, such as qwen3_next.")],
    out: Annotated[Path, typer.Option(help="New or empty folder.")],
    size: Annotated[
        Literal["tiny", "small"], typer.Option(help="tiny: 2.5 million parameters; small: 0.1 billion.")
    ] = "tiny",
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    form: Annotated[
        Literal["per_expert", "fused"], typer.Option(help="A tensor an expert, or one for all of a layer.")
    ] = "per_expert",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the weights.")] = "bfloat16",
) -> None:
    """Write a complete checkpoint of random weights: config, weights, tokenizer, chat template."""
    # Imports torch.
    from deploy.checkpoint import write_random_checkpoint

    write_random_checkpoint(arch, size, seed, out, form=form, dtype=dtype)
    typer.echo(f"wrote a {size} {arch} checkpoint to {out}")


def main() -> None:
    """Run the program; what the user can mend is told in one line, with exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        app()
    except MoefleetError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
