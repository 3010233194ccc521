"""Room for one member's ranks: a Ray placement group with a bundle for each rank."""

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


def place_ranks(
    num_ranks: int, bundle: dict[str, float], *, strategy: Strategy = "PACK", timeout_s: float = 300.0
) -> PlacementGroup:
    """Reserve a bundle for each rank.

    Raises:
        ConfigError: no node, present or promised by an autoscaler, came up with this much in `timeout_s`.
    """
    group = placement_group([bundle] * num_ranks, strategy=strategy)
    deadline = time.monotonic() + timeout_s
    while not group.wait(timeout_seconds=2):
        state = placement_group_table(group).get("stats", {}).get("scheduling_state", "PENDING")
        if time.monotonic() > deadline:
            have = {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU")}
            remove_placement_group(group)
            raise ConfigError(
                f"no room for {num_ranks} ranks of {bundle} each after {timeout_s:g} s ({state}); the cluster has "
                f"{have} in all: add nodes, raise ray.num_cpus, or lower tp, dp or members"
            )
    return group


def release_ranks(group: PlacementGroup) -> None:
    """Give the room back; what still runs in it is killed."""
    remove_placement_group(group)
