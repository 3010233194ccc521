"""Integer weights of published checkpoints: 4 or 8 bits, symmetric, several to an int32, the lowest bits first.

gptq: X.qweight [K / n, N] (n to a number along K), X.scales [G, N], X.qzeros [G, N / n], X.g_idx [K].
pack-quantized, of compressed-tensors: X.weight_packed [N, K / n], X.weight_scale [N, G], X.weight_shape.
Both stand for tensor X.weight [N, K]: N rows, K columns, G groups of columns with a scale each row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from shards.config import PackedForm, PackedWeights
from shards.int_weights import IntRows
from shards.safetensors_files import StoredTensor
from shards.tensor_files import TensorFiles

READ_AS: Final = torch.bfloat16
"""What packed weights are read in where nobody asks for another dtype."""
_WORD_BITS: Final = 32
_SCALE_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
_PLAIN: Final = "use a symmetric checkpoint without reordered columns, or the bf16 or FP8 release"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """How a form names the parts of a weight."""

    values: str
    scales: str
    others: tuple[str, ...]
    refused: tuple[str, ...]


_FORMS: Final[Mapping[PackedForm, _Parts]] = {
    "gptq": _Parts(values="qweight", scales="scales", others=("qzeros", "g_idx"), refused=()),
    "pack-quantized": _Parts(
        values="weight_packed",
        scales="weight_scale",
        others=("weight_shape",),
        refused=("weight_zero_point", "weight_g_idx"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """Where the parts of one weight lie; looks like the stored tensor that it stands for."""

    config: PackedWeights
    values: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None
    order: StoredTensor | None
    num_bytes: int
    dtype: torch.dtype = READ_AS

    @property
    def file(self) -> Path:
        """Of the values."""
        return self.values.file

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        first, second = self.values.shape
        a_word = _WORD_BITS // self.config.bits
        return (second, first * a_word) if self.config.form == "gptq" else (first, second * a_word)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.config.group_size or self.shape[1]


def gather_packed(tensors: dict[str, StoredTensor], config: PackedWeights | None) -> dict[str, PackedTensor]:
    """Take the parts of every packed weight out of `tensors` -> the weights by name.

    Raises:
        ValueError: parts are missing, of other shapes or dtypes, or of a kind that is not supported; or there are such
            weights and the config knows nothing of them.
    """
    if config is None:
        for parts in _FORMS.values():
            for name in tensors:
                if name.endswith(f".{parts.values}"):
                    raise ValueError(
                        f"{tensors[name].file}: tensor {name} holds packed integers, but config.json has no "
                        "quantization_config for them; use the config and weights of one release"
                    )
        return {}
    parts = _FORMS[config.form]
    stems = [name.removesuffix(f".{parts.values}") for name in tensors if name.endswith(f".{parts.values}")]
    return {f"{stem}.weight": _gather(tensors, stem, config, parts) for stem in stems}


def _gather(tensors: dict[str, StoredTensor], stem: str, config: PackedWeights, parts: _Parts) -> PackedTensor:
    values = tensors.pop(f"{stem}.{parts.values}")
    for refused in parts.refused:
        if f"{stem}.{refused}" in tensors:
            raise ValueError(f"{values.file}: tensor {stem}.{refused} is not supported; {_PLAIN}")
    scales = tensors.pop(f"{stem}.{parts.scales}", None)
    if scales is None:
        raise ValueError(f"{values.file}: tensor {stem}.{parts.scales} is missing; fetch the weights again")
    others = [tensors.pop(f"{stem}.{name}", None) for name in parts.others]
    gptq = config.form == "gptq"
    packed = PackedTensor(
        config=config,
        values=values,
        scales=scales,
        zeros=others[0] if gptq else None,
        order=others[1] if gptq else None,
        num_bytes=sum(part.num_bytes for part in (values, scales, *others) if part is not None),
    )
    _check(stem, packed, parts)
    return packed


def _check(stem: str, packed: PackedTensor, parts: _Parts) -> None:
    values = packed.values
    if len(values.shape) != 2 or values.dtype != torch.int32:
        raise ValueError(
            f"{values.file}: tensor {stem}.{parts.values} is {values.dtype} {list(values.shape)}, expected a matrix of "
            "int32; fetch the file again"
        )
    (rows, columns), group = packed.shape, packed.group
    groups = -(-columns // group)
    expected = (groups, rows) if packed.config.form == "gptq" else (rows, groups)
    if packed.scales.shape != expected or columns % group:
        raise ValueError(
            f"{packed.scales.file}: tensor {stem}.{parts.scales} has shape {list(packed.scales.shape)}, expected "
            f"{list(expected)} for {rows} x {columns} weights in whole groups of {group}, as config.json's "
            "quantization_config says; use the config and weights of one release"
        )
    if packed.scales.dtype not in _SCALE_DTYPES:
        raise ValueError(f"{packed.scales.file}: tensor {stem}.{parts.scales} is {packed.scales.dtype}, not floats")


def read_rows(files: TensorFiles, name: str, packed: PackedTensor, rows: range, columns: range, group: int) -> IntRows:
    """Some rows and columns of a packed weight.

    Args:
        name: of the weight, for errors.
        group: columns that share a scale in the result: divides the stored group and the ends of `columns`.

    Raises:
        ValueError: zero points are not in the middle, or columns are not in order: neither is supported.
    """
    if packed.config.form == "gptq":
        _check_zeros(files, name, packed)
        _check_order(files, name, packed)
    of_group = torch.arange(columns.start, columns.stop, group) // packed.group
    groups = range(columns.start // packed.group, -(-columns.stop // packed.group))
    if packed.config.form == "gptq":
        scales = files.values(packed.scales, (groups, rows)).T
    else:
        scales = files.values(packed.scales, (rows, groups))
    return IntRows(
        values_NK=_unpack(files, packed, rows, columns),
        scales_NG=scales.index_select(1, of_group - groups.start),
    )


def dequantise(files: TensorFiles, name: str, packed: PackedTensor, rows: range, columns: range) -> Tensor:
    """Some rows and columns of a packed weight, in float32."""
    ints = read_rows(files, name, packed, rows, columns, 1)
    return ints.values_NK.float().mul_(ints.scales_NG.float())


def _unpack(files: TensorFiles, packed: PackedTensor, rows: range, columns: range) -> Tensor:
    """int8 [N, K] without the offset by which the stored numbers are not negative."""
    bits = packed.config.bits
    a_word = _WORD_BITS // bits
    words = range(columns.start // a_word, -(-columns.stop // a_word))
    if packed.config.form == "gptq":
        stored = files.values(packed.values, (words, rows)).T.contiguous()
    else:
        stored = files.values(packed.values, (rows, words)).contiguous()
    # The bytes of a number, the lowest first.
    values = stored.view(torch.uint8)
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=2).flatten(1)
    first = columns.start - words.start * a_word
    # Wraps to the negative numbers of int8.
    return (values[:, first : first + len(columns)] - (1 << (bits - 1))).view(torch.int8)


def _check_zeros(files: TensorFiles, name: str, packed: PackedTensor) -> None:
    """All zero points are the middle of the range: stored less one as of old, or as it is, whatever the config says."""
    if packed.zeros is None:
        return
    middle = 1 << (packed.config.bits - 1)
    found = files.values(packed.zeros, tuple(range(size) for size in packed.zeros.shape)).contiguous().view(torch.uint8)
    for zero in (middle - 1, middle):
        if bool((found == (zero | zero << 4 if packed.config.bits == 4 else zero)).all()):
            return
    raise ValueError(f"{packed.zeros.file}: {name} has zero points (qzeros) other than {middle}; {_PLAIN}")


def _check_order(files: TensorFiles, name: str, packed: PackedTensor) -> None:
    if packed.order is None:
        return
    columns = packed.shape[1]
    found = files.values(packed.order, tuple(range(size) for size in packed.order.shape))
    if not torch.equal(found.to(torch.int64), torch.arange(columns) // packed.group):
        raise ValueError(f"{packed.order.file}: the columns of {name} are reordered (g_idx); {_PLAIN}")
