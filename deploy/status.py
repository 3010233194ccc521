"""`moefleet status` and `moefleet role`: what the fleet on a Ray cluster does, and what a member is to do."""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TextIO

from rich.console import Console
from rich.table import Table

from deploy.config_check import check_ray_address
from deploy.serve_command import connect_environment, default_token
from router.errors import ConfigError
from router.load import MemberLoad
from router.request import MemberId, Role

if TYPE_CHECKING:
    from ray.actor import ActorProxy

    from cluster.directory import Directory, MemberStatus

_FILE_WIDTH: Final = 200


def run_status(*, address: str, namespace: str, as_json: bool, out: TextIO) -> None:
    """Write the state of a fleet.

    Args:
        address: of the Ray cluster; "auto" finds the one of this machine.
        namespace: Ray namespace that the fleet was started in.

    Raises:
        ConfigError: there is no cluster, or no fleet on it.
    """
    statuses = fetch_statuses(address=address, namespace=namespace)
    if as_json:
        out.write(json.dumps([status_values(each) for each in statuses], indent=2) + "\n")
    else:
        # A file has no width: nothing is cut there.
        console = Console(file=out, width=None if out.isatty() else _FILE_WIDTH)
        console.print(member_table(statuses, now=time.time()))
        console.print()
        console.print(rank_table(statuses))


def fetch_statuses(*, address: str, namespace: str) -> "tuple[MemberStatus, ...]":
    """What the fleet's directory knows of its members.

    Raises:
        ConfigError: there is no cluster, or no fleet on it.
    """
    with _connected(address, namespace) as directory:
        # Imported by _connected, which sets its environment first.
        import ray

        return ray.get(directory.statuses.remote(), timeout=30)


def run_role(member: str, role: Role, *, address: str, namespace: str, out: TextIO) -> None:
    """Let a member take another role at run time.

    Raises:
        ConfigError: there is no fleet, no such member, or nobody would prefill or decode any more.
    """
    with _connected(address, namespace) as directory:
        # Imported by _connected, which sets its environment first.
        import ray
        from ray.exceptions import RayTaskError

        try:
            ray.get(directory.set_role.remote(MemberId(member), role), timeout=30)
        except RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise error.cause from error
            raise
    out.write(f"{member} takes the role {role} within a second; its streams go on\n")


@contextmanager
def _connected(address: str, namespace: str) -> "Iterator[ActorProxy[Directory]]":
    """The directory of a fleet, while connected to its cluster.

    Raises:
        ConfigError: there is no cluster, or no fleet on it.
    """
    check_ray_address(address)
    for name, value in connect_environment(default_token()).items():
        os.environ.setdefault(name, value)
    # Ray reads these when it is imported.
    import ray

    from cluster.directory import find_directory

    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"ray.address: no Ray cluster answers at {address}; start `moefleet serve`, or name it (--ray-address)"
        ) from error
    try:
        directory = find_directory(namespace)
        if directory is None:
            raise ConfigError(f"no fleet runs in namespace {namespace!r} of this cluster; start `moefleet serve`")
        yield directory
    finally:
        ray.shutdown()


def status_values(status: "MemberStatus") -> dict[str, object]:
    """A member as JSON values."""
    return dict(dataclasses.asdict(status))


def member_table(statuses: Sequence["MemberStatus"], *, now: float) -> Table:
    """A table with a line a member."""
    table = Table("pool", "member", "layout", "up", "running", "waiting", "KV blocks", "", box=None)
    for status in statuses:
        layout = f"tp {status.tp} dp {status.dp} ep {status.ep}"
        first = (status.info.role, str(status.info.member_id), layout, _duration(now - status.since_unix_s))
        table.add_row(*first, *_load(status.load))
    if not statuses:
        table.add_row("no member is up")
    return table


def rank_table(statuses: Sequence["MemberStatus"]) -> Table:
    """A table with a line a rank."""
    table = Table("member", "rank", "pid", "node", "state", box=None)
    for status in statuses:
        for rank in status.ranks:
            table.add_row(str(status.info.member_id), str(rank.rank), str(rank.pid), rank.node, rank.state)
    return table


def _load(load: MemberLoad | None) -> tuple[str, str, str, str]:
    if load is None:
        return ("?", "?", "?", "")
    blocks = f"{load.total_blocks - load.free_blocks}/{load.total_blocks}"
    draining = "draining" if load.draining else ""
    return (f"{load.running_requests}/{load.max_requests}", str(load.waiting_requests), blocks, draining)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"
