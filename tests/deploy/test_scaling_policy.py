"""A pool's policy on what Serve hands it, without Serve."""

from dataclasses import replace

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingContext

from deploy.scaling_policy import PoolPolicy, load_numbers, loads_of
from router.load import MemberLoad
from router.request import MemberId
from router.step_time import StepTime


def make_load(*, running: int = 0, draining: bool = False) -> MemberLoad:
    return MemberLoad(
        member_id=MemberId("m"),
        role="mixed",
        waiting_requests=0,
        waiting_tokens=0,
        running_requests=running,
        max_requests=10,
        free_blocks=100,
        total_blocks=100,
        draining=draining,
    )


def make_context(loads: dict[str, MemberLoad | None], *, target: int = 1) -> AutoscalingContext:
    """Serve's context with each replica's numbers as its controller has them."""
    metrics: dict[str, dict[ReplicaID, float]] = {}
    deployment = DeploymentID(name="MixedPool", app_name="moefleet")
    for replica, load in loads.items():
        for name, value in load_numbers(load).items():
            metrics.setdefault(name, {})[ReplicaID(replica, deployment)] = value
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name="MixedPool",
        app_name="moefleet",
        current_num_replicas=len(loads),
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=0,
        total_queued_requests=None,
        aggregated_metrics=metrics,
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=3,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=None,
    )


def make_policy(*, down_delay_s: float = 60.0) -> PoolPolicy:
    return PoolPolicy(min_members=1, max_members=3, down_delay_s=down_delay_s)


BUSY = make_load(running=14)


def test_a_load_survives_the_way_through_serve() -> None:
    load = replace(make_load(running=7), step_time=StepTime(base_s=0.0, prefill_token_s=1e-4, decode_row_s=0.0))
    (back,) = loads_of({name: {"m": value} for name, value in load_numbers(load).items()})
    price = back.step_time.prefill_token_s
    assert price == pytest.approx(1e-4, rel=0.01)
    assert replace(back, step_time=load.step_time) == load


def test_a_replica_that_told_only_part_is_left_out() -> None:
    assert loads_of({"running_requests": {"m": 1.0}}) == []


@pytest.mark.parametrize("load", [None, make_load(running=9, draining=True)])
def test_a_member_that_was_not_looked_at_yet_or_leaves_counts_for_nothing(load: MemberLoad | None) -> None:
    assert load_numbers(load) == {}


def test_without_any_numbers_the_pool_stays_as_it_is() -> None:
    assert make_policy(down_delay_s=0.0)(make_context({"a": None, "b": None}, target=2)) == (2, {})


def test_a_busy_pool_grows_within_its_bounds() -> None:
    assert make_policy()(make_context({"a": BUSY}))[0] == 2
    assert make_policy()(make_context({"a": BUSY, "b": BUSY, "c": BUSY}, target=3))[0] == 3


def test_a_need_that_is_gone_before_serve_followed_it_is_forgotten() -> None:
    now = [0.0]
    policy = PoolPolicy(min_members=1, max_members=3, down_delay_s=60.0, clock=lambda: now[0])
    assert policy(make_context({"a": BUSY}, target=1))[0] == 2
    now[0] = 10.0
    assert policy(make_context({"a": make_load()}, target=1))[0] == 1


def test_a_quiet_pool_shrinks_after_its_delay_also_under_a_new_controller() -> None:
    quiet: dict[str, MemberLoad | None] = {"a": make_load(), "b": make_load()}
    assert make_policy(down_delay_s=60.0)(make_context(quiet, target=2))[0] == 2
    assert make_policy(down_delay_s=0.0)(make_context(quiet, target=2))[0] == 1
