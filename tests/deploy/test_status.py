import io
import json

import pytest
from rich.console import Console

from cluster.directory import MemberStatus, RankStatus
from cluster.members import MemberInfo
from deploy.status import fetch_statuses, member_table, rank_table, status_values
from router.errors import ConfigError
from router.load import MemberLoad
from router.request import MemberId


def make_status(*, load: MemberLoad | None = None) -> MemberStatus:
    return MemberStatus(
        info=MemberInfo(member_id=MemberId("decode-1"), role="decode", address="127.0.0.1:4000"),
        ranks=(
            RankStatus(rank=0, pid=11, node="10.0.0.1", state="up"),
            RankStatus(rank=1, pid=12, node="10.0.0.2", state="lost"),
        ),
        tp=2,
        dp=1,
        ep=1,
        max_model_len=100,
        since_unix_s=1000.0,
        load=load,
    )


def make_load(*, draining: bool = False) -> MemberLoad:
    return MemberLoad(
        member_id=MemberId("decode-1"),
        role="decode",
        running_requests=3,
        max_requests=8,
        waiting_requests=2,
        free_blocks=90,
        total_blocks=100,
        draining=draining,
    )


def shown(*statuses: MemberStatus, now: float = 1000.0) -> str:
    out = io.StringIO()
    # As narrow as a terminal comes.
    console = Console(file=out, width=80)
    console.print(member_table(statuses, now=now))
    console.print(rank_table(statuses))
    return out.getvalue()


def test_a_member_is_a_line_with_its_load_and_a_rank_another() -> None:
    lines = [line.split() for line in shown(make_status(load=make_load()), now=1000.0 + 61).splitlines()]

    assert " ".join(lines[1]) == "decode decode-1 tp 2 dp 1 ep 1 1m 01s 3/8 2 10/100"
    assert lines[3:] == [["decode-1", "0", "11", "10.0.0.1", "up"], ["decode-1", "1", "12", "10.0.0.2", "lost"]]


def test_a_member_without_a_report_has_an_unknown_load() -> None:
    assert "?" in shown(make_status())


def test_a_member_that_leaves_is_draining() -> None:
    assert "draining" in shown(make_status(load=make_load(draining=True)))


def test_hours_are_told_without_seconds() -> None:
    assert "2h 03m" in shown(make_status(), now=1000.0 + 2 * 3600 + 3 * 60 + 5)


def test_a_fleet_without_members_says_so() -> None:
    assert "no member is up" in shown()


def test_values_are_json() -> None:
    values = json.loads(json.dumps(status_values(make_status(load=make_load()))))

    assert values["load"]["running_requests"] == 3
    assert values["ranks"][1] == {"rank": 1, "pid": 12, "node": "10.0.0.2", "state": "lost"}


def test_a_member_without_a_report_has_null_for_its_load() -> None:
    assert status_values(make_status())["load"] is None


def test_a_cluster_that_does_not_answer_is_told() -> None:
    with pytest.raises(ConfigError, match=r"ray\.address: no Ray cluster answers at 127\.0\.0\.1:1 .*; start one"):
        fetch_statuses(address="127.0.0.1:1", namespace="moefleet")
