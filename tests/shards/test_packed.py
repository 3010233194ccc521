"""Checkpoints of packed integers read as the weights that they stand for, and what is refused of them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.families import load_model_config
from shards.mesh import Layout
from shards.weights import CheckpointReader
from tests.support.int_checkpoint import IntForm, write_ints_and_twin
from tests.support.stepping import Work, run, tokens_of

NAME = "model.layers.0.mlp.experts.1.gate_proj.weight"
PROMPTS = [[3, 4, 5], list(range(40, 70))]
FORMS = [
    IntForm(form="gptq", bits=4, group=32),
    IntForm(form="gptq", bits=4, group=-1, old_zeros=False),
    IntForm(form="gptq", bits=8, group=64),
    IntForm(form="pack-quantized", bits=4, group=64),
    IntForm(form="pack-quantized", bits=8, group=-1),
]
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.form}-int{form.bits}-{form.group}")
GPTQ, COMPRESSED = FORMS[0], FORMS[3]


@pytest.fixture(scope="module")
def make_pair(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    made: dict[tuple[str, IntForm], tuple[Path, Path]] = {}

    def make(form: IntForm, arch: str = "qwen3_moe") -> tuple[Path, Path]:
        if (arch, form) not in made:
            plain = make_checkpoint(arch)
            made[arch, form] = write_ints_and_twin(plain, tmp_path_factory.mktemp("ints"), form)
        return made[arch, form]

    return make


def open_reader(folder: Path) -> CheckpointReader:
    return CheckpointReader(folder, config=load_model_config(folder))


@each_form
def test_every_tensor_and_every_slice_is_that_of_the_twin(
    make_pair: Callable[..., tuple[Path, Path]], form: IntForm
) -> None:
    folder, twin = make_pair(form)
    ints, plain = open_reader(folder), open_reader(twin)
    assert ints.names() == plain.names()
    assert ints.dtype(NAME) == torch.bfloat16
    rows, columns = ints.shape(NAME)
    for cut in (
        (),
        (slice(0, 5),),
        (slice(7, rows),),
        (slice(None), slice(3, columns - 1)),
        (slice(9, 10), slice(5, 6)),
    ):
        assert torch.equal(ints.read(NAME, *cut, dtype=torch.float32), plain.read(NAME, *cut))
    for each in ints.names():
        assert torch.equal(ints.read(each, dtype=torch.float32), plain.read(each, dtype=torch.float32))
    ints.finish()


@each_form
@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3_next"])
def test_tokens_are_those_of_the_twin_on_one_rank_and_on_two(
    make_pair: Callable[..., tuple[Path, Path]], form: IntForm, arch: str
) -> None:
    folder, twin = make_pair(form, arch)
    work = Work(prompts=PROMPTS, new_tokens=8)
    for layout in (Layout(), Layout(tp=2), Layout(dp=2, ep=2)):
        wanted = tokens_of(run(twin, work, layout), len(PROMPTS))
        assert tokens_of(run(folder, work, layout), len(PROMPTS)) == wanted


STEM = NAME.removesuffix(".weight")


def broken(source: Path, folder: Path, part: str, replacement: Tensor | None) -> CheckpointReader:
    """A reader of the checkpoint with another tensor, or none, for one part of a weight."""
    tensors = load_file(source / "model.safetensors")
    tensors.pop(f"{STEM}.{part}", None)
    if replacement is not None:
        tensors[f"{STEM}.{part}"] = replacement
    save_file(tensors, folder / "model.safetensors")
    return CheckpointReader(folder, config=load_model_config(source))


@pytest.mark.parametrize(
    ("form", "part", "replacement", "told"),
    [
        (GPTQ, "scales", None, r"gate_proj\.scales is missing"),
        (GPTQ, "scales", torch.ones(1, 64), r"shape \[1, 64\], expected \[4, 64\]"),
        (GPTQ, "scales", torch.ones(4, 64, dtype=torch.int32), r"scales is torch\.int32, not floats"),
        (GPTQ, "qweight", torch.ones(16, 64, dtype=torch.int64), r"qweight is torch\.int64 .* a matrix of int32"),
        (COMPRESSED, "weight_zero_point", torch.ones(2), "weight_zero_point is not supported; use a symmetric"),
        (COMPRESSED, "weight_g_idx", torch.ones(2), "weight_g_idx is not supported"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_by_name(
    make_pair: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    form: IntForm,
    part: str,
    replacement: Tensor | None,
    told: str,
) -> None:
    with pytest.raises(ValueError, match=told):
        broken(make_pair(form)[0], tmp_path, part, replacement)


@pytest.mark.parametrize(
    ("part", "replacement", "told"),
    [
        ("qzeros", torch.zeros(4, 8, dtype=torch.int32), "has zero points .* other than 8; use a symmetric"),
        ("g_idx", torch.zeros(128, dtype=torch.int32), r"reordered \(g_idx\); use a symmetric"),
    ],
)
def test_zero_points_and_reordered_columns_are_refused_by_name(
    make_pair: Callable[..., tuple[Path, Path]], tmp_path: Path, part: str, replacement: Tensor, told: str
) -> None:
    reader = broken(make_pair(GPTQ)[0], tmp_path, part, replacement)
    with pytest.raises(ValueError, match=told):
        reader.read(NAME)


@pytest.mark.parametrize("form", [GPTQ, COMPRESSED])
def test_integers_under_a_config_that_knows_nothing_of_them_are_refused(
    make_pair: Callable[..., tuple[Path, Path]], form: IntForm
) -> None:
    with pytest.raises(ValueError, match=r"holds packed integers, but config\.json has no quantization_config"):
        CheckpointReader(make_pair(form)[0])


def test_groups_other_than_the_config_says_are_refused(
    make_pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    folder = make_pair(GPTQ)[0]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = replace(GPTQ, group=64).method
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"in whole groups of 64, as config\.json's quantization_config says"):
        CheckpointReader(folder, config=load_model_config(tmp_path))
