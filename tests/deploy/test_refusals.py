"""What a checkpoint, a layout or this machine's memory cannot give is refused by name before anything starts, from the
command line and from a config file alike."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from deploy.cli import main

CASES = {
    "no such head": ("moe", {"draft-tokens": 1}, "draft_tokens=1 needs a multi-token prediction head, which qwen3_moe"),
    "no weights": (
        "headless",
        {"draft-tokens": 2},
        "draft_tokens=2 needs a multi-token prediction head, and .* holds no",
    ),
    "too many": ("next", {"draft-tokens": 9}, "draft_tokens(=9: .* use 1 to 8|: must be .* 8, got 9)"),
    "no state": ("moe", {"state-checkpoints": "int8"}, "state_checkpoints=int8 needs a model with recurrent state"),
    "no cache": (
        "next",
        {"state-checkpoints": "int8", "prefix-cache": False},
        "state_checkpoints=int8 needs prefix_cache",
    ),
    "no room for one": (
        "next",
        {"state-checkpoints": "int8", "kv-memory": "8KiB"},
        "kv_memory_bytes=8192 holds no KV: a block of 16 tokens takes .* give at least",
    ),
    "beyond positions": ("next", {"max-model-len": 10**7}, "max_model_len=10000000 exceeds the model's max_position"),
    "beyond the cache": (
        "next",
        {"kv-memory": "512KiB", "max-model-len": 4000},
        "max_model_len=4000 does not fit in kv_memory_bytes=524288",
    ),
    "beyond memory": ("next", {"kv-memory": "900GiB"}, "kv_memory_bytes=966367641600 does not fit: .* lower kv_memory"),
}
every_case = pytest.mark.parametrize(("kind", "options", "message"), CASES.values(), ids=CASES.keys())


@pytest.fixture(scope="module")
def folders(make_checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """Checkpoints by kind; a headless one has no weights of a multi-token prediction head."""
    return {
        "moe": make_checkpoint("qwen3_moe"),
        "next": make_checkpoint("qwen3_next", max_position_embeddings=8192),
        "headless": make_checkpoint("qwen3_next", max_position_embeddings=8192, num_nextn_predict_layers=0),
    }


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error that a command ends with."""
    monkeypatch.setattr(sys, "argv", ["moefleet", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code
    return " ".join(capsys.readouterr().err.split())


@every_case
def test_a_command_refuses_it_by_name(
    kind: str,
    options: dict[str, object],
    message: str,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--no-prefix-cache" if value is False else f"--{name}={value}" for name, value in options.items()]
    error = refused(monkeypatch, capsys, "generate", "--model", str(folders[kind]), "--prompt", "Hello", *flags)
    assert re.search(message, error), error


@every_case
def test_a_config_file_that_says_so_is_refused_alike(
    kind: str,
    options: dict[str, object],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = {name.replace("-", "_"): value for name, value in options.items() if name != "kv-memory"}
    pool = {"kv_memory": options["kv-memory"]} if "kv-memory" in options else {}
    file = tmp_path / "fleet.yaml"
    file.write_text(yaml.safe_dump({"model": str(folders[kind]), "engine": engine, "pools": {"mixed": pool}}))
    error = refused(monkeypatch, capsys, "serve", "--config", str(file))
    assert re.search(message, error), error


def test_a_prompt_that_the_context_cannot_hold_is_refused_with_the_most_that_it_can(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ",".join(["5"] * 300)
    words = ("generate", "--model", str(folders["next"]), "--prompt-ids", ids, "--max-model-len", "256")
    error = refused(monkeypatch, capsys, *words)
    assert "300 tokens leave no room for output in the model's context of 256 tokens (max_model_len)" in error
