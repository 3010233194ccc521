"""The simulation runs every policy on one trace, and the cost model is the best of them on sessions under load."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from router.admission import AdmissionConfig
from router.choosers import POLICIES
from router.errors import ConfigError
from router.simulate import SimulateOptions, as_json, compare, main, table
from router.simulated_fleet import Fleet
from router.simulated_member import MemberSpec
from router.simulation import Objective, simulate
from router.step_time import StepTime
from router.trace import TraceRequest


def write_sessions(folder: Path, *, sessions: int = 150, turns: int = 6) -> Path:
    """Sessions whose prompts grow turn by turn behind a common block."""
    rng = random.Random(1)
    lines = []
    fresh = iter(range(1, 1_000_000))
    for _ in range(sessions):
        at, blocks = rng.uniform(0, 600e3), [0]
        for _ in range(turns):
            blocks = [*blocks, *(next(fresh) for _ in range(rng.randrange(2, 12)))]
            output = rng.choice((1, 100, 300))
            lines.append(
                {"timestamp": at, "input_length": 512 * len(blocks), "output_length": output, "hash_ids": blocks}
            )
            at += rng.uniform(5e3, 60e3)
    path = folder / "trace.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in sorted(lines, key=lambda each: each["timestamp"])))
    return path


def test_the_cost_model_beats_the_simple_policies_on_sessions(tmp_path: Path) -> None:
    options = SimulateOptions(trace=write_sessions(tmp_path), members=(4,), requests=900, utilisation=0.85)
    (comparison,) = compare(options)
    results = {result.policy: result for result in comparison.results}
    ours = results.pop("cost")
    assert comparison.utilisation == pytest.approx(0.85, rel=0.05)
    assert ours.mean_ttft_s < min(result.mean_ttft_s for result in results.values())
    assert ours.good_share >= max(result.good_share for result in results.values())
    assert ours.hit_bound * 0.95 <= ours.hit_rate <= ours.hit_bound
    assert ours.p50_itl_s < ours.mean_itl_s < ours.p99_itl_s
    assert ours.hit_bound_in_room == ours.hit_bound
    assert 0.2 < ours.alone_ttft_s < ours.mean_ttft_s
    assert ours.good_share < ours.alone_good_share <= 1.0
    assert ours.alone_ttft_s < ours.one_queue_ttft_s
    assert ours.one_queue_good_share < ours.alone_good_share
    assert results["round-robin"].hit_rate < ours.hit_rate
    assert json.loads(as_json(comparison))["results"][0]["policy"] == "round-robin"
    assert len(table(comparison).splitlines()) == 3 + len(POLICIES)


def test_the_program_prints_tables_or_json_and_tells_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(write_sessions(tmp_path, sessions=3))
    flags = ["--trace", trace, "--members", "2", "--policies", "least-load", "--requests", "5"]
    assert main(flags) == 0
    assert "least-load" in capsys.readouterr().out
    assert main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["members"] == 2
    assert main(["--trace", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["--trace", trace, "--policies", "best"]) == 2
    assert "best is none of round-robin" in capsys.readouterr().err


def test_options_and_traces_that_cannot_work_are_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with pytest.raises(ConfigError, match=r"simulate\.utilisation must be positive"):
        SimulateOptions(trace=trace, utilisation=0.0)
    with pytest.raises(ConfigError, match="members"):
        SimulateOptions(trace=trace, members=(0,))
    with pytest.raises(ConfigError, match="policies"):
        SimulateOptions(trace=trace, policies=())
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [1]}')
    with pytest.raises(ConfigError, match="spans no time"):
        next(compare(SimulateOptions(trace=trace)))


def test_a_fleet_that_grows_tells_its_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(write_sessions(tmp_path, sessions=40))
    flags = ["--trace", trace, "--members", "1", "--policies", "cost", "--gateways", "2"]
    assert main([*flags, "--max-members", "3", "--start-s", "5"]) == 0
    table = capsys.readouterr().out
    assert "at most" in table
    assert main([*flags, "--max-members", "3", "--start-s", "5", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert 1 < result["mean_members"] < result["most_members"] <= 3
    assert main(flags) == 0
    assert "at most" not in capsys.readouterr().out
    assert main([*flags, "--members", "4", "--max-members", "3"]) == 2
    assert "max_members must be no less than members, got 3 and 4" in capsys.readouterr().err


def test_answers_of_one_token_have_no_gaps(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 1000 * number, "input_length": 5, "output_length": 1, "hash_ids": [number]} for number in range(9)
    ]
    trace.write_text("\n".join(json.dumps(each) for each in lines))
    (comparison,) = compare(SimulateOptions(trace=trace, policies=("cost",), requests=9))
    assert comparison.results[0].p99_itl_s == comparison.results[0].mean_itl_s == 0.0


def test_a_request_that_is_alone_does_as_well_as_can_be() -> None:
    burst = [replace(each, arrival_s=10.0 * number) for number, each in enumerate(make_burst(5))]
    found = simulate(burst, Fleet(members=1, spec=SPEC), "cost", Objective(ttft_s=0.31))
    assert found.alone_ttft_s == pytest.approx(found.mean_ttft_s)
    assert found.one_queue_ttft_s == pytest.approx(found.alone_ttft_s, rel=0.02)
    assert (found.good_share, found.alone_good_share) == (1.0, 1.0)
    assert simulate(burst, Fleet(members=1, spec=SPEC), "cost", Objective(ttft_s=0.3)).alone_good_share == 0.0


SPEC = MemberSpec(step_time=StepTime(), kv_tokens=10_000, step_tokens=2048)


def make_burst(count: int) -> list[TraceRequest]:
    return [
        TraceRequest(arrival_s=number / 1000, prompt_tokens=600, output_tokens=2, blocks=(number,))
        for number in range(count)
    ]


def test_refused_requests_are_not_good_and_count_in_no_other_figure() -> None:
    fleet = Fleet(members=1, spec=SPEC, admission=AdmissionConfig(max_queue=4))
    result = simulate(make_burst(40), fleet, "cost")
    assert result.refused > 20
    assert round(40 * result.good_share) <= 40 - result.refused
    assert 0 < result.ttft_percentiles_s[0] <= result.mean_ttft_s
    assert len(result.ttft_percentiles_s) == 100


def test_a_request_that_no_member_has_room_for_is_an_error() -> None:
    large = TraceRequest(arrival_s=1.0, prompt_tokens=20_000, output_tokens=2, blocks=tuple(range(40)), line=3)
    with pytest.raises(ConfigError, match="1 requests fit no member of kv_tokens=10000, the first in line 3"):
        simulate([*make_burst(2), large], Fleet(members=1, spec=SPEC), "cost")


def test_lines_that_no_member_has_room_for_are_told(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 1000 * number, "input_length": size, "output_length": 1, "hash_ids": [*range(size // 512)]}
        for number, size in enumerate([512, 5120] * 12 + [512])
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(json.dumps(each) for each in lines))
    (comparison,) = compare(SimulateOptions(trace=trace, policies=("cost",), kv_tokens=2048))
    assert comparison.left_out == tuple(range(2, 25, 2))
    told = "left out, as no member has room for them: 12 requests, lines 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, ... of"
    assert told in table(comparison)


def test_with_admission_an_overloaded_gateway_refuses_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trace", str(write_sessions(tmp_path, sessions=40)), "--members", "1", "--policies", "cost", "--json"]
    flags += ["--utilisation", "4"]

    def refused(*more: str) -> int:
        assert main([*flags, *more]) == 0
        return json.loads(capsys.readouterr().out)["results"][0]["refused"]

    assert refused() == 0
    assert refused("--admission") > 0
