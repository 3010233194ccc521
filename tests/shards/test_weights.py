import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shards.weights import CheckpointReader

EXPERTS = "model.layers.1.mlp.experts"
FORMS = ["per_expert", "fused"]


def small_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(5).bfloat16(), "mtp.fc.weight": torch.randn(2, 2)}


def write_small(folder: Path, *, index: bool = False) -> dict[str, torch.Tensor]:
    tensors = small_tensors()
    if not index:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    places: dict[str, str] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        places[name] = f"part-{number}.safetensors"
        save_file({name: tensor}, folder / places[name])
    write_index(folder, places)
    return tensors


def write_index(folder: Path, places: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def write_raw(folder: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: object, offsets: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def use_all(reader: CheckpointReader) -> None:
    for name in reader.names():
        reader.read(name)


@pytest.mark.parametrize("index", [False, True], ids=["single file", "index"])
def test_tensors_come_back_as_they_were_saved(tmp_path: Path, index: bool) -> None:
    tensors = write_small(tmp_path, index=index)
    reader = CheckpointReader(tmp_path)
    assert reader.names() == set(tensors)
    for name, tensor in tensors.items():
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(reader.read(name), tensor)
    reader.finish()


def test_one_safetensors_file_of_any_name_is_read(tmp_path: Path) -> None:
    save_file(small_tensors(), tmp_path / "weights.safetensors")
    assert CheckpointReader(tmp_path).names() == set(small_tensors())


@pytest.mark.parametrize(
    "slices",
    [
        (slice(1, 3),),
        (slice(None), slice(2, 4)),
        (slice(4, 6), slice(0, 1)),
        (slice(3, 3),),
        (slice(6, 6), slice(1, 2)),
    ],
)
def test_slices_equal_those_of_the_whole_tensor(tmp_path: Path, slices: tuple[slice, ...]) -> None:
    expected = write_small(tmp_path)["a.weight"][slices]
    read = CheckpointReader(tmp_path).read("a.weight", *slices)
    assert read.shape == expected.shape
    assert torch.equal(read, expected)
    assert read.is_contiguous()


def test_given_destination_is_filled_and_converted(tmp_path: Path) -> None:
    tensors = write_small(tmp_path)
    out = torch.empty(2, 4, dtype=torch.bfloat16)
    assert CheckpointReader(tmp_path).read("a.weight", slice(2, 4), out=out) is out
    assert torch.equal(out, tensors["a.weight"][2:4].bfloat16())


def test_weights_stay_when_the_file_is_overwritten(tmp_path: Path) -> None:
    tensors = write_small(tmp_path)
    reader = CheckpointReader(tmp_path)
    read = reader.read("a.weight")
    reader.close()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(bytes(file.seek(0, 2)))
    assert torch.equal(read, tensors["a.weight"])


@pytest.mark.parametrize("form", FORMS)
def test_experts_are_the_same_in_both_forms_and_for_any_part(make_checkpoint: Callable[..., Path], form: str) -> None:
    whole = CheckpointReader(make_checkpoint("qwen3_moe"))
    reader = CheckpointReader(make_checkpoint("qwen3_moe", form=form))
    gate_up, down = reader.read_experts(EXPERTS, range(4, 7), slice(16, 48), expect=(16, 64, 128))
    assert (gate_up.shape, down.shape) == ((3, 64, 128), (3, 128, 32))
    for place, expert in enumerate(range(4, 7)):
        gate = whole.read(f"{EXPERTS}.{expert}.gate_proj.weight")[16:48]
        up = whole.read(f"{EXPERTS}.{expert}.up_proj.weight")[16:48]
        assert torch.equal(gate_up[place], torch.cat([gate, up]))
        assert torch.equal(down[place], whole.read(f"{EXPERTS}.{expert}.down_proj.weight")[:, 16:48])


@pytest.mark.parametrize("form", FORMS)
def test_sizes_of_experts_are_taken_from_the_files_when_none_are_expected(
    make_checkpoint: Callable[..., Path], form: str
) -> None:
    reader = CheckpointReader(make_checkpoint("qwen3_moe", form=form))
    gate_up, down = reader.read_experts(EXPERTS, range(16), slice(0, 64))
    assert (gate_up.shape, down.shape) == ((16, 128, 128), (16, 128, 64))


@pytest.mark.parametrize("form", FORMS)
def test_experts_of_other_ranks_count_as_used(make_checkpoint: Callable[..., Path], form: str) -> None:
    reader = CheckpointReader(make_checkpoint("qwen3_moe", form=form))
    for layer in range(4):
        reader.read_experts(f"model.layers.{layer}.mlp.experts", range(2), slice(0, 64))
    for name in reader.names():
        if ".experts." not in name:
            reader.read(name)
    reader.finish()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("expect", [(17, 64, 128), (16, 32, 128), (16, 64, 64)])
def test_experts_of_another_size_than_expected_are_refused(
    make_checkpoint: Callable[..., Path], form: str, expect: tuple[int, int, int]
) -> None:
    reader = CheckpointReader(make_checkpoint("qwen3_moe", form=form))
    with pytest.raises(ValueError, match=r"tensor model\.layers\.1\.mlp\.experts.* (has shape|is missing)"):
        reader.read_experts(EXPERTS, range(2), slice(0, 16), expect=expect)


def test_more_experts_than_expected_are_surplus(make_checkpoint: Callable[..., Path]) -> None:
    reader = CheckpointReader(make_checkpoint("qwen3_moe"))
    for layer in range(4):
        reader.read_experts(f"model.layers.{layer}.mlp.experts", range(2), slice(0, 64), expect=(15, 64, 128))
    with pytest.raises(ValueError, match=r"experts\.15\.down_proj"):
        reader.finish()


def test_only_the_slices_bytes_are_read_and_the_total_ends_exact(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("qwen3_next")
    told: list[tuple[int, int]] = []
    reader = CheckpointReader(folder, lambda done, total: told.append((done, total)))
    stored_bytes = 0
    for name in sorted(reader.names()):
        if not name.startswith("mtp."):
            rows = reader.shape(name)[0]
            reader.read(name, slice(0, rows // 2))
            stored_bytes += torch.Size(reader.shape(name)).numel() * 2
    reader.finish()
    done, total = told[-1]
    assert done == total
    assert 0.49 * stored_bytes < done <= 0.5 * stored_bytes
    assert 50 < len(told) < 210
    assert all(0.45 * stored_bytes < total <= 0.51 * stored_bytes for _, total in told)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_unused_tensors_are_named_but_for_the_ignored_ones(tmp_path: Path) -> None:
    write_small(tmp_path)
    reader = CheckpointReader(tmp_path)
    reader.read("b.weight")
    with pytest.raises(ValueError, match=r"model\.safetensors: 1 tensors have no place in this model: a\.weight;"):
        reader.finish()
    reader.read("a.weight")
    reader.finish()
    with pytest.raises(ValueError, match=r"mtp\.fc\.weight"):
        reader.finish(("other.",))


def test_missing_tensor_and_wrong_shape_are_named(tmp_path: Path) -> None:
    write_small(tmp_path)
    reader = CheckpointReader(tmp_path)
    for ask in (reader.read, reader.shape, reader.dtype):
        with pytest.raises(ValueError, match=r"tensor c\.weight is missing"):
            ask("c.weight")
    reader.expect("a.weight", (6, 4))
    with pytest.raises(ValueError, match=r"a\.weight has shape \[6, 4\], expected \[4, 6\] by config\.json"):
        reader.expect("a.weight", (4, 6))


@pytest.mark.parametrize(
    ("stored", "tied", "name"),
    [(False, True, "model.embed_tokens.weight"), (True, True, "lm_head.weight"), (True, False, "lm_head.weight")],
)
def test_stored_head_wins_over_a_tied_embedding(tmp_path: Path, stored: bool, tied: bool, name: str) -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(2, 2)} | (
        {"lm_head.weight": torch.ones(2, 2)} if stored else {}
    )
    save_file(tensors, tmp_path / "model.safetensors")
    assert CheckpointReader(tmp_path).head_name(tied=tied) == name


def test_missing_folder_and_folder_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such checkpoint folder"):
        CheckpointReader(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no safetensors file"):
        CheckpointReader(tmp_path)
    save_file(small_tensors(), tmp_path / "x.safetensors")
    save_file(small_tensors(), tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 safetensors files but no model\.safetensors\.index\.json"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ({"a.weight": "gone.safetensors"}, "names gone.safetensors for 1 tensors, but there is no such file"),
        ({"a.weight": "../part-0.safetensors"}, "it must be a safetensors file within the folder"),
        ({"a.weight": "/etc/passwd"}, "it must be a safetensors file within the folder"),
        ({"a.weight": "sub\\part-0.safetensors"}, "it must be a safetensors file within the folder"),
        ({"a.weight": ".."}, "it must be a safetensors file within the folder"),
        ({"a.weight": 3}, "it must be a safetensors file within the folder"),
        ({}, "weight_map must be an object"),
        (None, "weight_map must be an object"),
        ({"a.weight": "part-1.safetensors", "b.weight": "part-1.safetensors"}, "puts a.weight in part-1.safetensors"),
        ({"b.weight": "part-0.safetensors"}, "holds a.weight, which model.safetensors.index.json does not name"),
        (
            {"a.weight": "part-0.safetensors", "b.weight": "part-0.safetensors", "mtp.fc.weight": "part-2.safetensors"},
            "puts b.weight in part-0.safetensors, found it in no file",
        ),
    ],
)
def test_index_that_does_not_fit_the_files_is_refused(tmp_path: Path, places: object, told: str) -> None:
    write_small(tmp_path, index=True)
    write_index(tmp_path, places)
    with pytest.raises(ValueError) as caught:
        CheckpointReader(tmp_path)
    assert told in str(caught.value)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_small(tmp_path, index=True)
    save_file({"a.weight": torch.zeros(6, 4), "b.weight": torch.zeros(5)}, tmp_path / "part-1.safetensors")
    with pytest.raises(ValueError, match=r"part-1\.safetensors: holds a\.weight, and so does part-0\.safetensors"):
        CheckpointReader(tmp_path)


def test_index_beside_a_single_file_is_refused(tmp_path: Path) -> None:
    write_small(tmp_path, index=True)
    write_small(tmp_path)
    with pytest.raises(ValueError, match="remove the one that is out of date"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 8, 60, -1])
def test_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    write_small(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors: is truncated"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("header", "data_bytes", "told"),
    [
        (b"{nonsense", 0, "header cannot be parsed"),
        (b"\xff\xfe", 0, "header cannot be parsed"),
        (b'{"a": 1, "a": 2}', 0, "a twice"),
        ([], 0, "no JSON object"),
        ({"a": 3}, 0, "the header's entry of a is no object"),
        ({"a": entry([2], [0, 8, 9])}, 8, "data_offsets of a make no sense"),
        ({"a": entry([2], [8, 0])}, 8, "data_offsets of a make no sense"),
        ({"a": entry([-2], [0, 8])}, 8, "make no sense"),
        ({"a": entry("2", [0, 8])}, 8, "make no sense"),
        ({"a": entry([2], [0, 16])}, 16, "a of shape [2] and torch.float32 takes 8 bytes, found 16"),
        ({"a": entry([2], [0, 8])}, 4, "its tensors take 8 bytes, found 4"),
        ({"a": entry([2], [0, 8])}, 12, "its tensors take 8 bytes, found 12"),
        ({"a": entry([2], [8, 16])}, 16, "a should begin at byte 0, found 8"),
        ({"a": entry([2], [0, 8]), "b": entry([1], [4, 8])}, 8, "b should begin at byte 8, found 4"),
        ({"a": entry([2], [0, 2], "F8_E5M2")}, 2, "a has dtype F8_E5M2, expected one of F32, BF16, F16"),
        ({"a": entry([2], [0, 4], "I16")}, 4, "a has dtype I16"),
    ],
)
def test_corrupt_header_is_refused(tmp_path: Path, header: object, data_bytes: int, told: str) -> None:
    write_raw(tmp_path, header, bytes(data_bytes))
    with pytest.raises(ValueError) as caught:
        CheckpointReader(tmp_path)
    assert "model.safetensors: " in str(caught.value)
    assert told in str(caught.value)


def test_files_behind_symbolic_links_are_read(tmp_path: Path, moe_checkpoint: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(moe_checkpoint, blobs)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    reader = CheckpointReader(snapshot)
    use_all(reader)
    reader.finish()
