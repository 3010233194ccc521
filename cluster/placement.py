"""Room for one member's ranks: a Ray placement group with a bundle for each rank."""

import asyncio
import time
from typing import Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from router.errors import ConfigError

Strategy = Literal["PACK", "STRICT_PACK"]


def rank_bundle(device: Literal["cpu", "cuda"], threads: int | None) -> dict[str, float]:
    """Resources of one rank: a GPU and a core, or as many cores as it has threads."""
    if device == "cuda":
        return {"GPU": 1.0, "CPU": 1.0}
    return {"CPU": float(threads or 1)}


async def place_ranks(
    num_ranks: int, bundle: dict[str, float], *, strategy: Strategy = "PACK", timeout_s: float = 300.0
) -> PlacementGroup:
    """Reserve a bundle for each rank; nothing stays reserved when it fails or is cancelled.

    Raises:
        ConfigError: no node, present or promised by an autoscaler, came up with this much in `timeout_s`.
    """
    group = placement_group([bundle] * num_ranks, strategy=strategy)
    deadline = time.monotonic() + timeout_s
    try:
        while not await asyncio.to_thread(group.wait, 1):
            if time.monotonic() > deadline:
                raise ConfigError(_no_room(group, num_ranks, bundle, timeout_s))
    except BaseException:
        # Also when cancelled: the cluster would keep the room for nobody.
        remove_placement_group(group)
        raise
    return group


def _no_room(group: PlacementGroup, num_ranks: int, bundle: dict[str, float], timeout_s: float) -> str:
    state = placement_group_table(group).get("stats", {}).get("scheduling_state", "PENDING")
    have = {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU")}
    return (
        f"no room for {num_ranks} ranks of {bundle} each after {timeout_s:g} s ({state}); the cluster has "
        f"{have} in all: add nodes, raise ray.num_cpus, or lower tp, dp or members"
    )


def release_ranks(group: PlacementGroup) -> None:
    """Give the room back; what still runs in it is killed."""
    remove_placement_group(group)
