"""The Serve autoscaling policy of a pool: our members' loads through `router.scaling`, not Serve's request counts."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, TypeVar

from ray.serve.config import AutoscalingContext

from router.load import MemberLoad
from router.request import MemberId
from router.scaling import ScalingConfig, ScalingState, desired_members
from router.step_time import StepTime

POLICY_PATH: Final = "deploy.scaling_policy:PoolPolicy"
_REPORTED: Final = (
    "waiting_requests",
    "waiting_tokens",
    "step_tokens",
    "running_requests",
    "max_requests",
    "free_blocks",
    "total_blocks",
    "free_state_slots",
    "total_state_slots",
)
"""What `router.scaling` decides on, beside what a waiting token takes."""
_TOKEN_S: Final = "prefill_token_s"
Replica = TypeVar("Replica")


def load_numbers(load: MemberLoad | None) -> dict[str, float]:
    """A member's load as the numbers that Serve carries to its controller; none before the first look."""
    if load is None or load.draining:
        return {}
    token_s = load.step_time.prefill_s_per_token(
        step_tokens=load.step_tokens, decode_rows=load.running_requests, context_tokens=load.context_tokens
    )
    return {name: float(getattr(load, name)) for name in _REPORTED} | {_TOKEN_S: token_s}


def loads_of(metrics: Mapping[str, Mapping[Replica, float]]) -> list[MemberLoad]:
    """Serve's numbers (by name, then by replica) as loads again; a replica without all of them is left out."""
    replicas: dict[Replica, dict[str, int]] = {}
    for name in _REPORTED:
        for replica, value in metrics.get(name, {}).items():
            replicas.setdefault(replica, {})[name] = round(value)
    prices = metrics.get(_TOKEN_S, {})
    return [
        MemberLoad(
            member_id=MemberId(str(replica)),
            role="mixed",
            waiting_requests=numbers["waiting_requests"],
            waiting_tokens=numbers["waiting_tokens"],
            step_tokens=numbers["step_tokens"],
            running_requests=numbers["running_requests"],
            max_requests=numbers["max_requests"],
            free_blocks=numbers["free_blocks"],
            total_blocks=numbers["total_blocks"],
            free_state_slots=numbers["free_state_slots"],
            total_state_slots=numbers["total_state_slots"],
            step_time=StepTime(base_s=0.0, prefill_token_s=prices[replica], decode_row_s=0.0),
        )
        for replica, numbers in replicas.items()
        if len(numbers) == len(_REPORTED) and replica in prices
    ]


class PoolPolicy:
    """Made once by the Serve controller for each pool; the arguments are `policy_kwargs`."""

    def __init__(
        self,
        *,
        min_members: int,
        max_members: int,
        down_delay_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._config = ScalingConfig(min_members=min_members, max_members=max_members, down_delay_s=down_delay_s)
        self._state: ScalingState | None = None

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, object]]:
        """How many replicas the pool should have."""
        # Serve may not have followed the last answer yet: a need that is gone before it does must not be remembered.
        members = context.target_num_replicas
        state = replace(self._state or ScalingState(members=members), members=members)
        loads = loads_of(context.aggregated_metrics or {})
        wanted, self._state = desired_members(loads, self._config, self._clock(), state)
        return wanted, {}
