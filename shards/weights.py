"""CheckpointReader: reads slices of a safetensors checkpoint, only the byte ranges asked for, and keeps account.

E experts, I expert width, C hidden size.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shards import fp8, packed
from shards.config import ModelConfig
from shards.int_weights import IntRows
from shards.packed import PackedTensor, gather_packed
from shards.safetensors_files import StoredTensor, find_tensors
from shards.tensor_files import Part, TensorFiles, halves, waits_well, whole_pages
from shards.weight_memory import empty_weights

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

MTP_PREFIX = "mtp."
"""Multi-token prediction: read only where drafts are asked for."""
_REPORTS = 200
_CPU = torch.device("cpu")
_UNPACKED = 1 << 20
"""Weights that wait in float32 between packed integers and the dtype they are held in."""
_NAMES_SHOWN = 8


class CheckpointReader:
    """One checkpoint, opened by one rank. Not thread-safe.

    Raises:
        ValueError: a file is missing, truncated or corrupt; names file, tensor, expected, found and remedy.
    """

    def __init__(self, path: Path, progress: Progress | None = None, *, config: ModelConfig | None = None) -> None:
        """Read index and headers.

        Args:
            path: the checkpoint's folder.
            progress: told (bytes read, bytes to read) now and then. A rank does not know its share beforehand: the
                second number is estimated from what it took of the tensors so far, and exact at the end.
            config: what config.json says of quantised weights; None: there are none.
        """
        self._path = path
        stored = find_tensors(path)
        packed_weights = gather_packed(stored, config.packed_weights if config else None)
        self._tensors: dict[str, StoredTensor | PackedTensor] = {**stored, **packed_weights}
        self._progress = progress
        self._weight_block = config.weight_block_size if config else None
        self._files = TensorFiles()
        self._used: set[str] = set()
        self._stored_bytes = sum(t.num_bytes for name, t in self._tensors.items() if not name.startswith(MTP_PREFIX))
        self._seen_bytes = 0
        self._done_bytes = 0
        self._told_bytes = 0

    def names(self) -> set[str]:
        """Every tensor's name; the parts of a quantised weight are its own."""
        return {name for name in self._tensors if not self._is_scale(name)}

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape; ValueError when it is missing."""
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype it is read in: as stored, or what quantised weights stand for; ValueError when it is missing."""
        stored = self._stored(name).dtype
        return fp8.READ_AS if stored == fp8.DTYPE else stored

    def head_name(self, *, tied: bool) -> str:
        """The tensor that makes logits: lm_head.weight where it is stored, even when tied (as in transformers)."""
        return (
            f"{self.root}.embed_tokens.weight" if tied and "lm_head.weight" not in self._tensors else "lm_head.weight"
        )

    @property
    def root(self) -> str:
        """What the text model's tensors are stored under: a multimodal checkpoint has them one level down."""
        nested = "model.language_model"
        return nested if f"{nested}.embed_tokens.weight" in self._tensors else "model"

    def expect(self, name: str, shape: Sequence[int]) -> None:
        """Raise ValueError unless tensor `name` is stored with this shape."""
        stored = self._stored(name)
        if stored.shape != tuple(shape):
            raise ValueError(
                f"{stored.file}: tensor {name} has shape {list(stored.shape)}, expected {list(shape)} by config.json; "
                "use the config and weights of one model"
            )

    def read(self, name: str, *slices: slice, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Read the given slices of the leading axes (all where none is given).

        Args:
            name: the tensor.
            slices: one per leading axis, step 1, within the tensor.
            out: filled and returned when given, converting to its dtype and device; of the slices' shape.
            dtype: of a new tensor; None takes what `dtype` tells.

        Returns:
            `out`, or a new contiguous CPU tensor.
        """
        stored = self._stored(name)
        part = _part_of(stored.shape, slices)
        shape = tuple(len(axis) for axis in part)
        if out is None:
            out = empty_weights(shape, dtype or self.dtype(name), _CPU)
        assert tuple(out.shape) == shape, f"{name}: out has shape {tuple(out.shape)}, the slices {shape}"
        if out.numel():
            self._read_part(name, part, out)
        self._count(name, stored.num_bytes * out.numel() // max(math.prod(stored.shape), 1))
        return out

    def read_experts(
        self,
        prefix: str,
        experts: range,
        columns: slice,
        *,
        expect: tuple[int, int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read some columns of some experts, stored one by one or fused.

        Args:
            prefix: such as "model.layers.0.mlp.experts".
            experts: ids to read, consecutive.
            columns: which of the I columns of each expert.
            expect: (E, I, C) that the whole layer must have; None takes the stored sizes.
            dtype: of the result; None takes what `dtype` tells.

        Returns:
            gate_up [E, 2I, C] (gate rows, then up rows) and down [E, C, I] of what was asked for.
        """
        if f"{prefix}.gate_up_proj" in self._tensors:
            return self._read_fused(prefix, experts, columns, expect, dtype)
        return self._read_one_by_one(prefix, experts, columns, expect, dtype)

    def packed_scales(self, name: str) -> torch.dtype | None:
        """The dtype of a tensor's scales where there is one that is stored in packed integers, else None."""
        stored = self._tensors.get(name)
        return stored.scales.dtype if isinstance(stored, PackedTensor) else None

    def read_ints(self, name: str, rows: slice, columns: slice, group: int) -> IntRows:
        """Rows and columns of a tensor stored in packed integers, as they are.

        Args:
            group: columns that share a scale in the result: divides the stored group and where `columns` begin and end.
        """
        stored = self._stored(name)
        assert isinstance(stored, PackedTensor)
        row_part, column_part = _part_of(stored.shape, (rows, columns))
        ints = packed.read_rows(self._files, name, stored, row_part, column_part, group)
        self._count(name, ints.values_NK.numel() * stored.config.bits // 8)
        return ints

    def skip(self, name: str) -> None:
        """Other ranks read this tensor."""
        self._count(name, 0)

    def finish(self, ignored_prefixes: tuple[str, ...] = (MTP_PREFIX,)) -> None:
        """Close the files; raise ValueError when a tensor was never used, but for the ignored prefixes."""
        self.close()
        unused = sorted(self.names() - self._used)
        surplus = [name for name in unused if not name.startswith(ignored_prefixes)]
        if surplus:
            shown = ", ".join(surplus[:_NAMES_SHOWN]) + (", ..." if len(surplus) > _NAMES_SHOWN else "")
            raise ValueError(
                f"{self._tensors[surplus[0]].file}: {len(surplus)} tensors have no place in this model: {shown}; "
                "use the config and weights of one model"
            )
        if unused:
            logger.info("%s: %d tensors of %s are not used", self._path, len(unused), ", ".join(ignored_prefixes))
        if self._progress is not None:
            self._progress(self._done_bytes, self._done_bytes)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _read_fused(
        self,
        prefix: str,
        experts: range,
        columns: slice,
        expect: tuple[int, int, int] | None,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        gate_up_name, down_name = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
        num_experts, width, hidden = expect or self._fused_sizes(gate_up_name)
        self.expect(gate_up_name, (num_experts, 2 * width, hidden))
        self.expect(down_name, (num_experts, hidden, width))
        ids = slice(experts.start, experts.stop)
        taken = columns.stop - columns.start
        gate_up = empty_weights((len(experts), 2 * taken, hidden), dtype or self.dtype(gate_up_name), _CPU)
        self.read(gate_up_name, ids, columns, out=gate_up[:, :taken])
        self.read(gate_up_name, ids, slice(width + columns.start, width + columns.stop), out=gate_up[:, taken:])
        return gate_up, self.read(down_name, ids, slice(None), columns, dtype=dtype)

    def _read_one_by_one(
        self,
        prefix: str,
        experts: range,
        columns: slice,
        expect: tuple[int, int, int] | None,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        num_experts, width, hidden = expect or self._single_sizes(prefix)
        for expert in range(num_experts):
            for name in (f"{prefix}.{expert}.gate_proj.weight", f"{prefix}.{expert}.up_proj.weight"):
                self.expect(name, (width, hidden))
            self.expect(f"{prefix}.{expert}.down_proj.weight", (hidden, width))
        taken = columns.stop - columns.start
        first = f"{prefix}.{experts.start}"
        gate_up_dtype = dtype or self.dtype(f"{first}.gate_proj.weight")
        gate_up = empty_weights((len(experts), 2 * taken, hidden), gate_up_dtype, _CPU)
        down_dtype = dtype or self.dtype(f"{first}.down_proj.weight")
        down = empty_weights((len(experts), hidden, taken), down_dtype, _CPU)
        for place, expert in enumerate(experts):
            self.read(f"{prefix}.{expert}.gate_proj.weight", columns, out=gate_up[place, :taken])
            self.read(f"{prefix}.{expert}.up_proj.weight", columns, out=gate_up[place, taken:])
            self.read(f"{prefix}.{expert}.down_proj.weight", slice(None), columns, out=down[place])
        for expert in set(range(num_experts)) - set(experts):  # other ranks read those
            for kind in ("gate_proj", "up_proj", "down_proj"):
                self.skip(f"{prefix}.{expert}.{kind}.weight")
        return gate_up, down

    def _fused_sizes(self, gate_up_name: str) -> tuple[int, int, int]:
        shape = self.shape(gate_up_name)
        if len(shape) != 3 or shape[1] % 2:
            raise ValueError(
                f"{self._stored(gate_up_name).file}: tensor {gate_up_name} has shape {list(shape)}, expected "
                "[experts, 2 * width, hidden]; fetch the file again"
            )
        return shape[0], shape[1] // 2, shape[2]

    def _single_sizes(self, prefix: str) -> tuple[int, int, int]:
        name = f"{prefix}.0.gate_proj.weight"
        shape = self.shape(name)
        if len(shape) != 2:
            raise ValueError(
                f"{self._stored(name).file}: tensor {name} has shape {list(shape)}, expected [width, hidden]; "
                "fetch the file again"
            )
        num_experts = 1
        while f"{prefix}.{num_experts}.gate_proj.weight" in self._tensors:
            num_experts += 1
        return num_experts, shape[0], shape[1]

    def _stored(self, name: str) -> StoredTensor | PackedTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise ValueError(
                f"{self._path}: tensor {name} is missing from the safetensors files; "
                "use the config and weights of one model, or fetch the weights again"
            ) from None

    def _read_part(self, name: str, part: Part, out: Tensor) -> None:
        """Into its place where it can be, else in pieces that are converted."""
        stored = self._tensors[name]
        if isinstance(stored, PackedTensor):
            self._read_packed(name, stored, part, out)
            return
        plain = out.dtype == stored.dtype and out.device.type == "cpu" and whole_pages(stored, part)
        if plain and out.is_contiguous():
            self._files.read(stored, part, out)
        elif not plain and waits_well(stored, part):
            values = self._files.values(stored, part)
            out.copy_(self._dequantise(name, values, part) if stored.dtype == fp8.DTYPE else values)
        else:
            for half, place, axis in halves(part):
                self._read_part(name, half, out.narrow(axis, place.start or 0, len(half[axis])))

    def _read_packed(self, name: str, stored: PackedTensor, part: Part, out: Tensor) -> None:
        """What packed integers stand for, some rows at a time."""
        rows, columns = part
        step = max(_UNPACKED // max(len(columns), 1), 1)
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            out[first : first + len(some)] = packed.dequantise(self._files, name, stored, some, columns)

    def _is_scale(self, name: str) -> bool:
        weight = self._tensors.get(name.removesuffix(fp8.SCALE_SUFFIX))
        return name.endswith(fp8.SCALE_SUFFIX) and weight is not None and weight.dtype == fp8.DTYPE

    def _dequantise(self, name: str, values: Tensor, part: Part) -> Tensor:
        """What the stored numbers of a block-FP8 tensor stand for."""
        stored, block = self._stored(name), self._weight_block
        if block is None or len(stored.shape) < 2:
            raise ValueError(
                f"{stored.file}: tensor {name} of shape {list(stored.shape)} is stored in {stored.dtype}, but "
                "config.json has no quantization_config.weight_block_size for it; use the config and weights of one "
                "release"
            )
        scale_name = f"{name}{fp8.SCALE_SUFFIX}"
        self.expect(scale_name, fp8.scale_shape(stored.shape, block))
        slices = tuple(slice(axis.start, axis.stop) for axis in part)
        scale_slices, offset = fp8.scale_slices(stored.shape, slices, block)
        scales = self.read(scale_name, *scale_slices)
        return fp8.dequantise(values, scales, offset, block)

    def _count(self, name: str, num_bytes: int) -> None:
        if name not in self._used:
            self._used.add(name)
            self._seen_bytes += self._tensors[name].num_bytes
        self._done_bytes += num_bytes
        if self._progress is None or self._seen_bytes - self._told_bytes < self._stored_bytes / _REPORTS:
            return
        self._told_bytes = self._seen_bytes
        total = max(self._done_bytes, round(self._done_bytes * self._stored_bytes / self._seen_bytes))
        self._progress(self._done_bytes, total)


def _part_of(shape: tuple[int, ...], slices: tuple[slice, ...]) -> Part:
    assert len(slices) <= len(shape)
    part = [range(size) for size in shape]
    for axis, taken in enumerate(slices):
        start, stop, step = taken.indices(shape[axis])
        assert step == 1
        assert taken.stop is None or taken.stop <= shape[axis], f"slice {taken} exceeds the axis of {shape[axis]}"
        part[axis] = range(start, max(stop, start))
    return tuple(part)
