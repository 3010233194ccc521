"""A pool that grows under load and shrinks after it, fed by the members' own loads, without a failed request."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.ray_fleet import Completion, RayFleet, until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CLIENTS = 12


def test_a_pool_goes_from_one_member_to_two_and_back_without_a_failed_request(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Serve reads it in the processes of the cluster, which inherit this one's environment.
    monkeypatch.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
    checkpoint = make_checkpoint("qwen3_moe", dtype="float32")
    pool = {
        "members": 1,
        "max_members": 2,
        "kv_memory": "32MiB",
        "max_rows": 8,
        "upscale_delay_s": 0.1,
        "downscale_delay_s": 3.0,
    }
    with RayFleet(checkpoint, {"mixed": pool}) as fleet, ThreadPoolExecutor(CLIENTS) as clients:
        expected = fleet.complete([3, 2, 1], max_tokens=100, ignore_eos=True)
        assert len(fleet.members()) == 1
        busy = True

        def client(_: int) -> list[Completion]:
            replies = []
            while busy:
                replies.append(fleet.complete([3, 2, 1], max_tokens=100, ignore_eos=True))
            return replies

        running = [clients.submit(client, number) for number in range(CLIENTS)]
        try:
            until(lambda: len(fleet.members()) == 2, 60.0)
        finally:
            busy = False
        for replies in [each.result() for each in running]:
            assert all(reply.token_ids == expected.token_ids for reply in replies)
        leaving = [clients.submit(fleet.complete, [3, 2, 1], max_tokens=100, ignore_eos=True) for _ in range(CLIENTS)]
        until(lambda: len(fleet.members()) == 1, 60.0)
        assert all(each.result().token_ids == expected.token_ids for each in leaving)
        assert fleet.complete([3, 2, 1], max_tokens=100, ignore_eos=True).token_ids == expected.token_ids
