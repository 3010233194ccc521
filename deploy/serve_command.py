"""`moefleet serve`: a fleet from its config to Ctrl-C, with what to call printed when it is up."""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import typer

from deploy.config import ServeConfig
from deploy.config_check import check_config
from router.errors import MoefleetError

if TYPE_CHECKING:
    from cluster.directory import MemberStatus

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Stopped(BaseException):
    """The user wants it to end."""


class StopSignals:
    """Turns the first Ctrl-C or SIGTERM into an exception in the main thread; later ones do nothing."""

    def __init__(self) -> None:
        self._armed = True

    def install(self) -> None:
        """Take the signals over from whoever has them."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def disarm(self) -> None:
        """Do nothing from now on."""
        self._armed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise _Stopped


def run_serve(config: ServeConfig) -> int:
    """Serve until a signal; returns the exit status.

    Raises:
        ConfigError, CheckpointError: the config cannot run here; told before anything starts.
    """
    typer.echo("checking model, layouts, memory and ports")
    check_config(config)
    existing = config.ray.address != "local"
    variables = ray_environment(config) | (connect_environment(default_token()) if existing else {})
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    # Ray takes a second to import, and reads its environment then.
    from deploy.cli_fleet import start_fleet, stop_fleet

    signals = StopSignals()
    started = time.monotonic()

    def tell(line: str) -> None:
        # ray.init puts a handler of its own in place of ours.
        signals.install()
        typer.echo(f"{line}, after {time.monotonic() - started:.1f} s")

    status, was_up = 0, False
    try:
        signals.install()
        statuses = start_fleet(config, tell=tell)
        was_up = True
        typer.echo(welcome(config, statuses, program=program(sys.argv[0])))
        threading.Event().wait()
    except (_Stopped, SystemExit):
        typer.echo("stopping")
    except MoefleetError as error:
        typer.echo(f"error: {error}", err=True)
        status = 1
    finally:
        signals.disarm()
        signals.install()
        stop_fleet(config, was_up=was_up)
    typer.echo("stopped; no process is left" if config.ray.address == "local" else "stopped")
    return status


def ray_environment(config: ServeConfig) -> dict[str, str]:
    """Variables that Ray and Serve read when they are imported, here and in every process they start."""
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Without it Ray warns at each start that it will stop hiding GPUs from actors that ask for none.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # A replica that is leaving has drained when Serve is told to end.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }
    if any(pool.most_members > pool.members for _, pool in config.pools.roles):
        # Serve's own 10 s would make a pool grow too late.
        variables["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "1"
    return variables


def connect_environment(token: Path) -> dict[str, str]:
    """Variables for joining an existing cluster.

    Args:
        token: where Ray keeps the token of clusters that it started for this user (default_token()). Of itself it
            shows the token to clusters of its own choice alone, not to one named by address.
    """
    return {"RAY_USAGE_STATS_ENABLED": "0"} | ({"RAY_AUTH_MODE": "token"} if token.is_file() else {})


def default_token() -> Path:
    """Ray's own place for its token."""
    return Path.home() / ".ray" / "auth_token"


def welcome(config: ServeConfig, statuses: Sequence["MemberStatus"], *, program: str) -> str:
    """What is up, and lines that call it as they are."""
    lines = ["", f"{config.served_name} is served:"]
    for status in statuses:
        pids = ", ".join(str(rank.pid) for rank in status.ranks)
        layout = f"tp {status.tp} dp {status.dp} ep {status.ep}"
        lines.append(f"  {status.info.role:8} {status.info.member_id}  {layout}  rank pids {pids}")
    lines += [
        "",
        f"  HTTP (OpenAI)       http://{http_address(config)}/v1",
        f"  health, metrics     http://{http_address(config)}/health, /metrics",
        f"  gRPC (moefleet.v1)  {grpc_address(config)}",
        "",
        "Try:",
        f"  {curl_line(config)}",
        f"  {call_line(config, program)}",
        "",
        "Ctrl-C ends it.",
    ]
    return "\n".join(lines)


def curl_line(config: ServeConfig) -> str:
    """A curl command for a POSIX shell."""
    body = (
        f'{{"model": "{config.served_name}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'
    )
    words = ["curl", "-sS", f"http://{http_address(config)}/v1/chat/completions"]
    words += ["-H", "Content-Type: application/json", "-d", body]
    line = shlex.join(words)
    if config.http.api_keys_file is None:
        return line
    # The key is read where the line runs, so that none is printed.
    first_key = f"awk '!/^#/ && NF {{print $1; exit}}' {shlex.quote(str(Path(config.http.api_keys_file).resolve()))}"
    return f'{line} -H "Authorization: Bearer $({first_key})"'


def call_line(config: ServeConfig, program: str) -> str:
    """A `moefleet call` command for a POSIX shell."""
    words = ["call", "--target", grpc_address(config), "--message", "Hello", "--max-tokens", "32"]
    if config.http.api_keys_file is not None:
        words += ["--api-key-file", str(Path(config.http.api_keys_file).resolve())]
    if config.grpc.tls_certificate is not None:
        words += ["--tls-ca-file", str(Path(config.grpc.tls_certificate).resolve())]
    return f"{program} {shlex.join(words)}"


def program(argument: str) -> str:
    """The command that runs this program, for a shell in any folder."""
    path = Path(argument)
    if path.suffix == ".py":
        return f"{shlex.quote(sys.executable)} -m deploy.cli"
    return shlex.quote(str(path.absolute()))


def http_address(config: ServeConfig) -> str:
    """host:port where this machine reaches the HTTP API."""
    return f"{reachable(config.http.host)}:{config.http.port}"


def grpc_address(config: ServeConfig) -> str:
    """host:port where this machine reaches the gRPC API."""
    return f"{reachable(config.grpc.host)}:{config.grpc.port}"


def reachable(host: str) -> str:
    """An address of this machine for a server that listens on all of them."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
