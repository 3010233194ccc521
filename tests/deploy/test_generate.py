import dataclasses
import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.config import EngineConfig, ExpertWeights
from deploy.generate import GenerateOptions, run_generate
from deploy.prompts_file import parse_bias, parse_ids, read_prompts_file
from deploy.sizes import parse_bytes
from deploy.tokenizer import load_tokenizer
from deploy.validation import SamplingInput
from router.errors import ConfigError, InvalidRequestError
from shards.mesh import Layout

GREEDY = SamplingInput(max_tokens=8, temperature=0.0)


def make_config(model: Path, layout: Layout | None = None) -> EngineConfig:
    return EngineConfig(model=model, layout=layout or Layout(), dtype="float32", kv_memory_bytes=8 << 20, threads=1)


def generate(options: GenerateOptions) -> list[dict[str, object]]:
    out = io.StringIO()
    assert run_generate(options, out) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


def make_file(folder: Path, *lines: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_every_prompt_gets_a_json_line_in_order(moe_checkpoint: Path, tmp_path: Path) -> None:
    file = make_file(tmp_path, {"prompt": "third"}, "", {"prompt_ids": [4, 5], "max_tokens": 3})
    first, second, third, fourth = generate(
        GenerateOptions(
            engine=make_config(moe_checkpoint),
            sampling=GREEDY,
            prompts=("first one",),
            prompt_ids=("1,2,3",),
            prompts_file=file,
            json=True,
        )
    )
    tokenizer = load_tokenizer(moe_checkpoint)
    for row, count in ((first, 8), (second, 8), (third, 8), (fourth, 3)):
        assert set(row) == {"token_ids", "text", "finish_reason", "usage"}
        assert row["finish_reason"] == "length"
        token_ids = row["token_ids"]
        assert isinstance(token_ids, list)
        assert len(token_ids) == count
        assert row["text"] == tokenizer.decode(token_ids)
    assert second["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11, "cached_tokens": 0}


def test_two_ranks_say_what_one_says(moe_checkpoint: Path) -> None:
    def rows(layout: Layout) -> list[dict[str, object]]:
        config = make_config(moe_checkpoint, layout)
        return generate(GenerateOptions(engine=config, sampling=GREEDY, prompts=("Hello there",), json=True))

    assert rows(Layout(tp=2)) == rows(Layout())


@pytest.mark.parametrize("choice", ["int8", "int4"])
def test_experts_in_integers_say_the_same_on_one_rank_and_on_two(moe_checkpoint: Path, choice: ExpertWeights) -> None:
    def rows(layout: Layout, weights: ExpertWeights) -> list[dict[str, object]]:
        engine = dataclasses.replace(make_config(moe_checkpoint, layout), expert_weights=weights)
        return generate(GenerateOptions(engine=engine, sampling=GREEDY, prompt_ids=("1,2,3", "7"), json=True))

    assert rows(Layout(), choice) == rows(Layout(tp=2), choice)
    assert len(rows(Layout(), choice)) == len(rows(Layout(), "checkpoint"))


def test_end_token_stops_unless_ignored_and_is_not_in_the_text(moe_checkpoint: Path) -> None:
    def row(stop: tuple[int, ...]) -> dict[str, object]:
        sampling = SamplingInput(max_tokens=8, temperature=0.0, stop_token_ids=stop)
        options = GenerateOptions(
            engine=make_config(moe_checkpoint), sampling=sampling, prompt_ids=("1,2,3",), json=True
        )
        return generate(options)[0]

    whole = row(())["token_ids"]
    assert isinstance(whole, list)
    stopped = row((whole[2],))
    assert stopped["token_ids"] == whole[:3]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == load_tokenizer(moe_checkpoint).decode(whole[:2])


def test_log_probabilities_come_where_asked_for(moe_checkpoint: Path) -> None:
    sampling = SamplingInput(max_tokens=3, temperature=0.0, logprobs=2, prompt_logprobs=1)
    options = GenerateOptions(engine=make_config(moe_checkpoint), sampling=sampling, prompt_ids=("1,2,3",), json=True)
    (row,) = generate(options)
    logprobs, prompt_logprobs = row["logprobs"], row["prompt_logprobs"]
    assert isinstance(logprobs, list)
    assert isinstance(prompt_logprobs, list)
    assert [entry["rank"] for entry in logprobs] == [1, 1, 1]
    assert [len(entry["top"]) for entry in logprobs] == [2, 2, 2]
    assert prompt_logprobs[0] is None
    assert len(prompt_logprobs) == 3


def test_loading_is_logged_with_its_rate(moe_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = GenerateOptions(engine=make_config(moe_checkpoint), sampling=GREEDY, prompt_ids=("1",), json=True)
    with caplog.at_level(logging.INFO, logger="deploy.checkpoint_progress"):
        generate(options)
    (line,) = caplog.messages
    assert re.fullmatch(r"loading weights: read 0\.\d+ GB in \d+\.\d s, \d+\.\d\d GB/s", line)


def test_plain_output_is_the_text(moe_checkpoint: Path) -> None:
    options = GenerateOptions(engine=make_config(moe_checkpoint), sampling=GREEDY, prompts=("Hello",))
    out = io.StringIO()
    run_generate(options, out)
    (row,) = generate(GenerateOptions(engine=options.engine, sampling=GREEDY, prompts=("Hello",), json=True))
    assert out.getvalue() == f"{row['text']}\n"


def test_checkpoint_without_tokenizer_serves_token_ids(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for file in make_checkpoint("qwen3_moe").iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (row,) = generate(GenerateOptions(engine=make_config(tmp_path), sampling=GREEDY, prompt_ids=("1,2,3",), json=True))
    assert row["text"] is None


def test_no_prompt_is_refused(moe_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no prompt: give --prompt TEXT"):
        generate(GenerateOptions(engine=make_config(moe_checkpoint), sampling=GREEDY))


@pytest.mark.parametrize(
    ("prompt_ids", "sampling", "message"),
    [
        ("1,99999999", GREEDY, "--prompt-ids number 1: prompt: token id 99999999 is not in the model's vocabulary"),
        ("1", SamplingInput(max_tokens=8, temperature=3.0), "temperature: must be at least 0 and at most 2, got 3.0"),
        ("1", SamplingInput(max_tokens=10**6, temperature=0.0), "max_tokens: 1000000 new tokens and 1 prompt tokens"),
    ],
)
def test_prompt_or_sampling_out_of_range_is_refused_by_name(
    prompt_ids: str, sampling: SamplingInput, message: str, moe_checkpoint: Path
) -> None:
    options = GenerateOptions(engine=make_config(moe_checkpoint), sampling=sampling, prompt_ids=(prompt_ids,))
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        generate(options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl line 2: is not JSON"),
        ("[1]", 'line 2: expected a JSON object such as {"prompt": "Hello"}, got list'),
        ({"prompt": "a", "temprature": 1}, "line 2: unknown field 'temprature'"),
        ({"max_tokens": 3}, "line 2: give exactly one of prompt and prompt_ids"),
        ({"prompt": "a", "prompt_ids": [1]}, "line 2: give exactly one of prompt and prompt_ids"),
        ({"prompt": 3}, "line 2: prompt must be a string, got int"),
        ({"prompt_ids": [1, "a"]}, "line 2: prompt_ids must be a list of token ids, got [1, 'a']"),
        ({"prompt": "a", "max_tokens": 1.5}, "line 2: max_tokens must be a whole number, got 1.5"),
        ({"prompt": "a", "top_p": True}, "line 2: top_p must be a number, got True"),
        ({"prompt": "a", "ignore_eos": 1}, "line 2: ignore_eos must be true or false, got 1"),
        ({"prompt": "a", "logit_bias": [1]}, "line 2: logit_bias must be an object"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "line 2: logit_bias must be an object"),
    ],
)
def test_bad_line_of_a_prompts_file_is_refused_with_its_number(line: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_prompts_file(make_file(tmp_path, {"prompt": "fine"}, line), GREEDY)


def test_line_of_a_prompts_file_overrides_sampling(tmp_path: Path) -> None:
    line = {"prompt": "a", "seed": 4, "logit_bias": {"7": 1}, "stop_token_ids": [3], "temperature": 1}
    (prompt,) = read_prompts_file(make_file(tmp_path, line), GREEDY)
    assert prompt.sampling == SamplingInput(
        max_tokens=8, temperature=1, seed=4, logit_bias=((7, 1.0),), stop_token_ids=(3,)
    )


def test_empty_or_missing_prompts_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts_file(make_file(tmp_path, ""), GREEDY)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts_file(tmp_path / "none", GREEDY)


def test_sizes_ids_and_biases_are_read_as_people_write_them() -> None:
    assert [parse_bytes(text, "--x") for text in ("7", "2KiB", "1.5 GiB", "3MB")] == [7, 2048, 3 << 29, 3_000_000]
    assert parse_ids("1, 2", "--x") == (1, 2)
    assert parse_bias(["17:-5", "3:0.5"]) == ((17, -5.0), (3, 0.5))


@pytest.mark.parametrize("text", ["", "lots", "1XB", "-3"])
def test_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-memory: expected a size such as 256MiB"):
        parse_bytes(text, "--kv-memory")


def test_bad_id_or_bias_is_refused() -> None:
    with pytest.raises(ConfigError, match="--prompt-ids: expected token ids"):
        parse_ids("1;2", "--prompt-ids")
    with pytest.raises(ConfigError, match="--logit-bias: expected TOKEN_ID:BIAS"):
        parse_bias(["17"])


@pytest.mark.slow
def test_ranks_of_torchrun_say_what_spawned_ranks_say(moe_checkpoint: Path) -> None:
    options = ["--model", str(moe_checkpoint), "--prompt-ids", "1,2,3", "--max-tokens", "8", "--dtype", "float32"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "deploy.cli_generate"]
    done = subprocess.run(
        [*command, "--ranks", "torchrun", "--tp", "2", "--kv-memory", "8MiB", "--json", *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    engine = make_config(moe_checkpoint)
    assert [json.loads(done.stdout)] == generate(
        GenerateOptions(engine=engine, sampling=GREEDY, prompt_ids=("1,2,3",), json=True)
    )
