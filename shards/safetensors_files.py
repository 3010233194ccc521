"""Finds a checkpoint's safetensors files and checks index and headers against what is really on disk."""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from shards import fp8
from shards.config_fields import Json, read_json_object

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts too
_FETCH = "fetch the file again"
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": fp8.DTYPE,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Integers are packed weights and what comes with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    offset: int
    """Where in the file its first byte lies; rows follow one another without gaps."""


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint, by name.

    Raises:
        ValueError: the folder, the index or a file is missing or broken, a tensor lies in two files or is missing
            from the index, or has a dtype that is not supported; names file, tensor, expected, found and remedy.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder; give a folder that holds config.json and safetensors")
    index, single = folder / _INDEX_NAME, folder / _SINGLE_NAME
    if not index.exists():
        return read_header(_only_file(folder, single))
    if single.exists():
        raise ValueError(f"{folder}: holds both {_SINGLE_NAME} and {_INDEX_NAME}; remove the one that is out of date")
    placed = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(placed.values())):
        file = folder / file_name
        if not file.exists():
            missing = sum(1 for value in placed.values() if value == file_name)
            raise ValueError(f"{index}: names {file_name} for {missing} tensors, but there is no such file; {_FETCH}")
        _add_file(tensors, file, placed, index)
    _check_all_found(placed, tensors, index)
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read and check one safetensors file's header.

    Raises:
        ValueError: the file is truncated or corrupt, or holds a dtype that is not supported.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length_bytes = opened.read(_LENGTH_BYTES)
            if len(length_bytes) < _LENGTH_BYTES:
                raise ValueError(f"{file}: is truncated, {size} bytes are no safetensors file; {_FETCH}")
            (length,) = struct.unpack("<Q", length_bytes)
            room = min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES)
            if length > room:
                raise ValueError(
                    f"{file}: is truncated or corrupt: its header should take {length} bytes, found room for {room}; "
                    f"{_FETCH}"
                )
            header = _parse_header(file, opened.read(length))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    return _place_tensors(file, header, size, _LENGTH_BYTES + length)


def _only_file(folder: Path, single: Path) -> Path:
    if single.exists():
        return single
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ValueError(f"{folder}: holds {len(files)} safetensors files but no {_INDEX_NAME}; fetch the index too")
    raise ValueError(f"{folder}: holds no safetensors file; other weight formats are not read, convert or fetch them")


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must be an object of tensor names and file names; {_FETCH}")
    placed: dict[str, str] = {}
    for name, file_name in weight_map.items():
        inside = isinstance(file_name, str) and Path(file_name).name == file_name and "\\" not in file_name
        if not isinstance(file_name, str) or not inside or not file_name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: weight_map puts {name} in {json.dumps(file_name)}; "
                "it must be a safetensors file within the folder"
            )
        placed[name] = file_name
    return placed


def _add_file(tensors: dict[str, StoredTensor], file: Path, placed: dict[str, str], index: Path) -> None:
    for name, stored in read_header(file).items():
        if name in tensors:
            raise ValueError(f"{file}: holds {name}, and so does {tensors[name].file.name}; remove one of them")
        if name not in placed:
            raise ValueError(f"{file}: holds {name}, which {index.name} does not name; fetch index and file again")
        tensors[name] = stored


def _check_all_found(placed: dict[str, str], tensors: dict[str, StoredTensor], index: Path) -> None:
    for name, file_name in placed.items():
        found = tensors[name].file.name if name in tensors else "no file"
        if found != file_name:
            raise ValueError(f"{index}: puts {name} in {file_name}, found it in {found}; fetch index and files again")


def _parse_header(file: Path, text: bytes) -> dict[str, Json]:
    try:
        header = json.loads(text, object_pairs_hook=_refuse_twins)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is corrupt, its header cannot be parsed ({error}); {_FETCH}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file}: is corrupt, its header is no JSON object; {_FETCH}")
    header.pop("__metadata__", None)
    return header


def _refuse_twins(pairs: Iterable[tuple[str, Json]]) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} twice")
        found[name] = value
    return found


def _place_tensors(file: Path, header: dict[str, Json], size: int, data_offset: int) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _parse_entry(file, name, entry)
        expected = math.prod(shape) * dtype.itemsize
        if end - begin != expected:
            raise ValueError(
                f"{file}: tensor {name} of shape {list(shape)} and {dtype} takes {expected} bytes, "
                f"found {end - begin}; {_FETCH}"
            )
        spans.append((begin, end, name))
        tensors[name] = StoredTensor(
            file=file, shape=shape, dtype=dtype, num_bytes=expected, offset=data_offset + begin
        )
    reached, data_bytes = 0, size - data_offset
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise ValueError(f"{file}: is corrupt, {name} should begin at byte {reached}, found {begin}; {_FETCH}")
        reached = end
    if reached != data_bytes:
        raise ValueError(
            f"{file}: is truncated or corrupt: its tensors take {reached} bytes, found {data_bytes}; {_FETCH}"
        )
    return tensors


def _parse_entry(file: Path, name: str, entry: Json) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict):
        raise ValueError(f"{file}: is corrupt, the header's entry of {name} is no object; {_FETCH}")
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{file}: is corrupt, shape or data_offsets of {name} make no sense; {_FETCH}")
    dtype_name = entry.get("dtype")
    dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise ValueError(
            f"{file}: tensor {name} has dtype {dtype_name}, expected one of {', '.join(_DTYPES)}; other "
            "quantised weights are not supported, use the bf16, the FP8 or a GPTQ release"
        )
    return dtype, shape, offsets[0], offsets[1]


def _sizes(value: Json) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    sizes = tuple(item for item in value if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
    return sizes if len(sizes) == len(value) else None
