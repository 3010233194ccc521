"""Parts of stored tensors, read from their files into place."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shards.safetensors_files import read_header
from shards.tensor_files import TensorFiles, halves
from shards.weights import CheckpointReader

SHAPE = (3, 40, 5000)
"""Rows of more than a page of bytes, so that columns are read by runs or with what is between them."""


def write(folder: Path) -> torch.Tensor:
    torch.manual_seed(0)
    values = torch.randn(SHAPE)
    save_file({"first": torch.zeros(7), "x": values, "scalar": torch.tensor(3.5)}, folder / "model.safetensors")
    return values


@pytest.mark.parametrize("columns", [(0, 5000), (10, 20), (1000, 4900), (2500, 5000)])
@pytest.mark.parametrize("rows", [(0, 40), (5, 9), (39, 40)])
@pytest.mark.parametrize("planes", [(0, 3), (1, 3), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_is_that_part_of_the_tensor(
    tmp_path: Path, planes: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype
) -> None:
    slices = (slice(*planes), slice(*rows), slice(*columns))
    expected = write(tmp_path)[slices].to(dtype)
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.read("x", *slices, dtype=dtype), expected)
    spread = torch.zeros(*expected.shape[:1], expected.shape[1] + 3, *expected.shape[2:], dtype=dtype)
    reader.read("x", *slices, out=spread[:, 2:-1])
    assert torch.equal(spread[:, 2:-1], expected)
    assert not spread[:, :2].any()
    assert not spread[:, -1].any()


def test_a_scalar_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    assert CheckpointReader(tmp_path).read("scalar").item() == 3.5


def test_halves_are_the_parts_both_sides() -> None:
    part = (range(1, 2), range(10, 15), range(3))
    found = [half for half, _, _ in halves(part)]
    assert found == [(range(1, 2), range(10, 12), range(3)), (range(1, 2), range(12, 15), range(3))]
    cells = [set(itertools.product(*half)) for half in found]
    assert cells[0] | cells[1] == set(itertools.product(*part))


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = read_header(file)["x"]
    file.write_bytes(file.read_bytes()[: stored.offset + 1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: ends at byte \d+, it has become shorter"):
        TensorFiles().values(stored, tuple(range(size) for size in SHAPE))


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    reader = CheckpointReader(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read: No such file"):
        reader.read("x")
