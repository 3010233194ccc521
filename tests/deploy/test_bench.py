import io
import json
import re
from pathlib import Path

import pytest
import torch

from cluster.config import Device
from deploy.bench import BenchRun, run_bench
from deploy.bench_engine import BenchOptions
from deploy.bench_scenarios import parse_scenarios
from router.errors import CheckpointError, ConfigError
from shards.mesh import Layout


def make_run(
    model: Path,
    scenarios: str,
    *,
    json: bool = True,
    kv_memory_bytes: int = 8 << 20,
    profile: bool = False,
    device: Device = "cpu",
) -> BenchRun:
    options = BenchOptions(
        layout=Layout(), threads=1, kv_memory_bytes=kv_memory_bytes, max_step_tokens=256, device=device
    )
    return BenchRun(
        options=options,
        model=model,
        dtype="f32",
        scenarios=parse_scenarios(scenarios),
        repeat=1,
        json=json,
        profile=profile,
        worker_flags=("--threads=1", "--kv-memory=8MiB"),
    )


def test_every_scenario_gives_a_line_with_its_figures(moe_checkpoint: Path) -> None:
    out = io.StringIO()
    run_bench(make_run(moe_checkpoint, "batch2,prefill2x32,startup"), out)
    decode, prefill, startup = (json.loads(line) for line in out.getvalue().splitlines())
    for line, name in ((decode, "batch2"), (prefill, "prefill2x32"), (startup, "startup")):
        assert line["scenario"] == name
        assert (line["model"], line["peer"], line["dtype"]) == (moe_checkpoint.name, "moefleet", "f32")
        assert line["repeat"] == len(line["all"]) == 1
        assert line["peak_rss_mb"] > 50
        assert line["others_cpu"] >= 0
    assert decode["new_tokens"] == 256
    assert decode["out_tok_s"] > 0
    assert decode["decode_tok_s"] > decode["out_tok_s"] * 0.5
    assert prefill["prefill_tok_s"] > 0
    assert 0.5 < startup["startup_s"] < 60


def test_plain_output_has_a_line_a_scenario(moe_checkpoint: Path) -> None:
    out = io.StringIO()
    run_bench(make_run(moe_checkpoint, "prefill8", json=False), out)
    assert re.fullmatch(r"prefill8 .*prefill_tok_s \d+.*peak_rss_mb \d+.*\n", out.getvalue())


def test_a_profile_tells_where_a_step_s_time_goes(moe_checkpoint: Path) -> None:
    out = io.StringIO()
    run_bench(make_run(moe_checkpoint, "batch2,prefill8", profile=True), out)
    decode, prefill = (json.loads(line)["profile"] for line in out.getvalue().splitlines())
    assert decode["steps"] == 127
    assert prefill["steps"] == 1
    for profile in (decode, prefill):
        assert {"idle", "inputs", "attention", "gate", "experts", "head", "sampling", "other"} <= profile[
            "rank_us"
        ].keys()
        assert profile["engine_us"].keys() == {"scheduling", "plan", "commit", "waiting", "idle", "other"}
        assert profile["step_us"] == pytest.approx(sum(profile["rank_us"].values()), abs=2)


def test_a_profile_in_plain_text_has_a_line_a_part(moe_checkpoint: Path) -> None:
    out = io.StringIO()
    run_bench(make_run(moe_checkpoint, "prefill8", json=False, profile=True), out)
    assert re.search(r"\n    rank 0  head +\d+\.\d us +\d+\.\d %\n", out.getvalue())
    assert re.search(r"\n    engine  scheduling +\d+\.\d us", out.getvalue())


def test_sequences_that_do_not_fit_at_once_are_refused_before_anything_is_loaded(moe_checkpoint: Path) -> None:
    out = io.StringIO()
    with pytest.raises(ConfigError, match=r"4 sequences of up to 256 tokens need 64 KV blocks .*--kv-memory.* raise"):
        run_bench(make_run(moe_checkpoint, "single,batch4", kv_memory_bytes=3 << 19), out)
    assert out.getvalue() == ""


def test_a_folder_that_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        run_bench(make_run(tmp_path, "single"), io.StringIO())


def test_a_device_that_is_not_there_is_refused_by_name(moe_checkpoint: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(CheckpointError, match=r"device=cuda: rank 0 needs GPU 0 of this machine, torch sees 0 GPUs"):
        run_bench(make_run(moe_checkpoint, "prefill8", device="cuda"), io.StringIO())


def test_a_profile_of_a_gpu_is_refused_since_only_the_host_is_timed(moe_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="leave --profile out, or use --device=cpu"):
        make_run(moe_checkpoint, "prefill8", device="cuda", profile=True)


def test_the_engine_drafts_as_many_tokens_as_the_command_asks_for(moe_checkpoint: Path) -> None:
    options = BenchOptions(layout=Layout(), threads=1, kv_memory_bytes=8 << 20, max_step_tokens=64, draft_tokens=2)
    config = options.engine_config(moe_checkpoint, dtype="float32", max_len=64, max_seqs=1)
    assert config.draft_tokens == 2


def test_a_step_of_no_tokens_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--max-step-tokens must be at least 1, got 0"):
        BenchOptions(layout=Layout(), threads=1, kv_memory_bytes=8 << 20, max_step_tokens=0)
