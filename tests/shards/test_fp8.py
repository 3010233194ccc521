"""Block-FP8 checkpoints read as the bf16 weights that they stand for, whatever slice is asked for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.families import load_model_config
from shards.fp8 import scale_shape
from shards.mesh import Layout
from shards.weights import CheckpointReader
from tests.support.fp8_checkpoint import write_fp8_and_twin
from tests.support.stepping import Work, run, tokens_of

PROMPTS = [[3, 4, 5], list(range(40, 70))]


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_next"])
def pair(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    return write_fp8_and_twin(make_checkpoint(request.param), tmp_path_factory.mktemp("fp8"))


def open_reader(folder: Path) -> CheckpointReader:
    return CheckpointReader(folder, config=load_model_config(folder))


def test_every_tensor_and_every_slice_is_that_of_the_twin(pair: tuple[Path, Path]) -> None:
    fp8, plain = open_reader(pair[0]), CheckpointReader(pair[1])
    assert fp8.names() == plain.names()
    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    assert fp8.dtype(name) == torch.bfloat16
    rows, columns = fp8.shape(name)
    cuts = ((), (slice(0, 5),), (slice(7, rows),), (slice(None), slice(3, columns - 1)), (slice(47, 50), slice(31, 33)))
    for cut in cuts:
        assert torch.equal(fp8.read(name, *cut), plain.read(name, *cut))
    for each in fp8.names():
        assert torch.equal(fp8.read(each), plain.read(each))
    fp8.finish()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_those_of_the_twin_on_one_rank_and_on_two(pair: tuple[Path, Path], dtype: str) -> None:
    work = Work(prompts=PROMPTS, new_tokens=8)
    fp8, plain = pair
    for layout in (Layout(), Layout(tp=2)):
        wanted = tokens_of(run(plain, work, layout, dtype=dtype), len(PROMPTS))
        assert tokens_of(run(fp8, work, layout, dtype=dtype), len(PROMPTS)) == wanted


@pytest.mark.parametrize(
    ("scales", "told"),
    [(None, "_scale_inv is missing"), (torch.ones(1, 1), r"_scale_inv has shape \[1, 1\], expected")],
)
def test_a_weight_without_scales_or_with_too_few_is_named(
    pair: tuple[Path, Path], tmp_path: Path, scales: Tensor | None, told: str
) -> None:
    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    stored = load_file(pair[0] / "model.safetensors")
    del stored[f"{name}_scale_inv"]
    if scales is not None:
        stored[f"{name}_scale_inv"] = scales
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=told):
        CheckpointReader(tmp_path, config=load_model_config(pair[0])).read(name)


def test_fp8_weights_under_a_config_that_knows_nothing_of_it_are_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"no quantization_config\.weight_block_size"):
        CheckpointReader(pair[0]).read("model.layers.0.mlp.experts.1.gate_proj.weight")


def test_the_sizes_of_a_release_have_the_scales_that_it_holds() -> None:
    assert scale_shape((1536, 4096), (128, 128)) == (12, 32)
    assert scale_shape((8, 200, 129), (128, 128)) == (8, 2, 2)


def test_a_config_with_the_published_quantization_section_is_read(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = json.loads((make_checkpoint("qwen3_moe") / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model_config(tmp_path).weight_block_size == (128, 128)
