"""The demo models that ship with the package."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from deploy.checkpoint_tensors import checkpoint_tensors
from deploy.demo import MODELS, DemoArch
from deploy.tokenizer import load_tokenizer
from shards.families import load_model_config
from training.configs import config_fields
from training.data import examples
from training.encoding import encode

MAX_BYTES = 12_000_000
ARCHITECTURES: tuple[DemoArch, ...] = ("qwen3_next", "qwen3_moe")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_demo_model_is_small_and_of_the_shape_that_training_gives(arch: DemoArch) -> None:
    folder = MODELS / arch

    assert folder_bytes(folder) < MAX_BYTES
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert written == config_fields(arch) | {key: written[key] for key in ("bos_token_id", "eos_token_id")}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_demo_model_holds_the_published_tensors_and_no_others(arch: DemoArch) -> None:
    expected = {spec.name: spec.shape for spec in checkpoint_tensors(load_model_config(MODELS / arch), "per_expert")}

    with safe_open(MODELS / arch / "model.safetensors", framework="pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()} == expected


def test_a_demo_tokenizer_gives_words_and_digits_one_token_each() -> None:
    tokenizer = load_tokenizer(MODELS / "qwen3_next")
    example = next(each for each in examples("0", held_out=False) if each.task == "facts")

    assert len(encode(tokenizer, example)[0]) < 120
    assert len(tokenizer.encode_plain("What is 347 + 289?")) == 12
