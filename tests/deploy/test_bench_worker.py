import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import EngineConfig
from deploy.bench_engine import BenchOptions
from deploy.bench_worker import run_worker
from deploy.generate import GenerateOptions, run_generate
from deploy.validation import SamplingInput
from shards.mesh import Layout
from tests.support.source_tree import ROOT

PROMPTS = [[1, 2, 3], [4, 5], [6]]


def load(model: Path, **other: object) -> dict[str, object]:
    return {"op": "load", "model": str(model), "dtype": "f32", "max_len": 64, "max_seqs": 4} | other


def ask(*orders: object) -> list[dict[str, object]]:
    """The worker's answers to these orders, without quit."""
    options = BenchOptions(layout=Layout(), threads=1, kv_memory_bytes=8 << 20, max_step_tokens=64)
    answers = io.StringIO()
    run_worker(options, [order if isinstance(order, str) else json.dumps(order) for order in orders], answers)
    return [json.loads(line.removeprefix("@@")) for line in answers.getvalue().splitlines()]


def test_a_worker_continues_prompts_as_generate_does(moe_checkpoint: Path) -> None:
    generate = {"op": "generate", "prompts": PROMPTS, "max_new": 8}
    loaded, first, again = ask(load(moe_checkpoint), generate, generate)
    config = EngineConfig(model=moe_checkpoint, dtype="float32", kv_memory_bytes=8 << 20, threads=1)
    sampling = SamplingInput(max_tokens=8, temperature=0.0, ignore_eos=True)
    prompt_ids = tuple(",".join(map(str, prompt)) for prompt in PROMPTS)
    out = io.StringIO()
    run_generate(GenerateOptions(engine=config, sampling=sampling, prompt_ids=prompt_ids, json=True), out)
    assert loaded == {"ok": True}
    assert first["tokens"] == again["tokens"] == [json.loads(line)["token_ids"] for line in out.getvalue().splitlines()]
    assert isinstance(first["ttft"], list)
    assert isinstance(first["wall"], float)
    assert all(0 < ttft < first["wall"] for ttft in first["ttft"])


def test_a_worker_ends_at_quit_and_answers_on_standard_output(moe_checkpoint: Path) -> None:
    orders = [load(moe_checkpoint), {"op": "generate", "prompts": [[1]], "max_new": 2}, {"op": "quit"}, {"op": "lost"}]
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "bench", "worker", "--threads", "1", "--kv-memory", "8MiB"],
        input="".join(json.dumps(order) + "\n" for order in orders),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    loaded, generated = done.stdout.splitlines()
    assert loaded == '@@{"ok": true}'
    assert generated.startswith('@@{"tokens": [[')


@pytest.mark.parametrize(
    ("order", "told"),
    [
        ("nonsense", "no JSON"),
        ("[1]", "no JSON object"),
        ({"op": "stop"}, "load, generate or quit, got 'stop'"),
        ({"op": "generate", "prompts": PROMPTS, "max_new": 1}, "before op load"),
        (load(Path("m"), dtype="int8"), "one of bf16, f32, got 'int8'"),
        (load(Path("m"), max_len="many"), "needs max_len, of type int, got 'many'"),
        (load(Path("m"), max_seqs=0), "max_seqs must be at least 1"),
        (load(Path("/no/such")), "/no/such: no such checkpoint"),
        ({"op": "generate", "prompts": [["a"]], "max_new": 1}, "lists of token ids"),
    ],
)
def test_what_cannot_work_is_answered_with_an_error(order: object, told: str) -> None:
    (answer,) = ask(order)
    assert told in str(answer["error"])


def test_prompts_that_do_not_fit_at_once_are_answered_with_an_error(moe_checkpoint: Path) -> None:
    _, many, long, fits = ask(
        load(moe_checkpoint),
        {"op": "generate", "prompts": [[1]] * 5, "max_new": 1},
        {"op": "generate", "prompts": [[1]], "max_new": 64},
        {"op": "generate", "prompts": [[1]], "max_new": 63},
    )
    assert "max_seqs=4" in str(many["error"])
    assert "at most 64" in str(long["error"])
    assert "tokens" in fits
