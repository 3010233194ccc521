"""Ranks as processes of this machine: they form a replica, and none outlives its leader."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.config import EngineConfig
from cluster.executor import RankGroup
from cluster.pair import open_store
from cluster.plan import StepPlan
from cluster.resolve import resolve_engine
from cluster.spawn import LocalReplica
from router.errors import CheckpointError, MemberLostError
from shards.batch import RowSampling, RowStart, StepBatch
from shards.mesh import Layout

LEADER = """
import sys
from pathlib import Path
from cluster.config import EngineConfig
from cluster.resolve import resolve_engine
from cluster.spawn import LocalReplica
from shards.mesh import Layout

if __name__ == "__main__":
    engine = resolve_engine(EngineConfig(model=Path(sys.argv[1]), layout=Layout(tp=2), kv_memory_bytes=8 << 20))
    with LocalReplica(engine) as replica:
        print(replica.children[0].pid, flush=True)
        sys.stdin.read()
"""


def make_config(model: Path, layout: Layout) -> EngineConfig:
    return EngineConfig(model=model, layout=layout, kv_memory_bytes=8 << 20, threads=1)


def first_plan(lanes: int) -> StepPlan:
    start = RowStart(row=0, token_ids=(1, 2, 3), prompt_len=3, blocks=(0,), sampling=RowSampling(temperature=0.0))
    batch = StepBatch(starts=(start,), rows_S=[0], first_S=[0], counts_S=[3], samples_S=[1])
    return StepPlan(step=0, lanes=(batch, *(StepBatch() for _ in range(lanes - 1))))


def step_for_ever(ranks: RankGroup) -> None:
    while True:
        ranks.launch(first_plan(lanes=1))
        ranks.result()


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_lane_without_rows_takes_part_and_closing_ends_the_children_well(moe_checkpoint: Path) -> None:
    with LocalReplica(resolve_engine(make_config(moe_checkpoint, Layout(dp=2)))) as replica:
        replica.ranks.launch(first_plan(lanes=2))
        output = replica.ranks.result()
        assert [len(lane.tokens_N) for lane in output.lanes] == [1, 0]
        children = replica.children
    assert [child.exitcode for child in children] == [0]


def test_killed_peer_surfaces_within_a_second_and_leaves_nothing_behind(moe_checkpoint: Path) -> None:
    with LocalReplica(resolve_engine(make_config(moe_checkpoint, Layout(tp=2)))) as replica:
        pid = replica.children[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(MemberLostError, match="rank 1 of 2 is lost"):
            step_for_ever(replica.ranks)
        assert time.monotonic() - began < 1.0


def test_stopped_peer_is_found_when_a_step_takes_too_long(moe_checkpoint: Path) -> None:
    config = replace(make_config(moe_checkpoint, Layout(tp=2)), step_timeout_s=1.0)
    with LocalReplica(resolve_engine(config)) as replica:
        pid = replica.children[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(MemberLostError, match=r"step 0 hangs: no answer from lane\(s\) \[0\] within 1 s"):
            step_for_ever(replica.ranks)
        assert time.monotonic() - began < 2.0
        os.kill(pid, signal.SIGKILL)


def test_peers_end_when_their_leader_is_killed(moe_checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "leader.py"
    script.write_text(LEADER)
    with subprocess.Popen(
        [sys.executable, str(script), str(moe_checkpoint)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as leader:
        assert leader.stdout is not None
        peer = int(leader.stdout.readline())
        assert is_alive(peer)
        leader.kill()
        assert gone_within(peer, 5)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)])
def test_checkpoint_that_cannot_be_loaded_is_told_with_its_reason(
    layout: Layout, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_checkpoint("qwen3_moe")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = next(tmp_path.glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content.replace(b"model.norm.weight", b"model.norm.weighx"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weigh"):
        LocalReplica(resolve_engine(make_config(tmp_path, layout)))


def test_gpu_that_is_not_there_is_refused(moe_checkpoint: Path) -> None:
    config = EngineConfig(model=moe_checkpoint, layout=Layout(tp=2), device="cuda", kv_memory_bytes=8 << 20)
    with pytest.raises(CheckpointError, match=r"device=cuda: rank \d needs GPU \d of this machine, torch sees \d"):
        LocalReplica(resolve_engine(config))


def test_the_rendezvous_store_listens_on_its_interface_alone() -> None:
    store = open_store("127.0.0.1")
    mine = psutil.Process().net_connections("tcp")
    hosts = {each.laddr.ip for each in mine if each.status == psutil.CONN_LISTEN and each.laddr.port == store.port}
    assert hosts == {"127.0.0.1"}
    del store
