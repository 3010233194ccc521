"""A rank's flat cache buffer as pulls see it: rows read and written, on the CPU or a device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.recut import Rows
from shards.row_copy import ByteArray, IntArray, RowCopier


class RankMemory:
    """Rows of a flat uint8 buffer, on the CPU or a device."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        # Copied on the calling thread; torch would start a thread pool for each caller.
        self._bytes: ByteArray | None = buffer.numpy() if buffer.device.type == "cpu" else None
        self._copier = RowCopier()

    def holds(self, rows: Rows) -> bool:
        """Whether all rows lie inside of the buffer."""
        if rows.num_bytes <= 0 or not len(rows.offsets):
            return False
        return bool(rows.offsets.min() >= 0 and rows.offsets.max() <= self._buffer.numel() - rows.num_bytes)

    @property
    def device(self) -> torch.device:
        """Where the buffer lies."""
        return self._buffer.device

    def views(self, parts: Sequence[Rows]) -> list[memoryview] | None:
        """The rows in place, writable, in order; None on a device."""
        if self._bytes is None:
            return None
        whole = self._bytes.data
        return [whole[at : at + part.num_bytes] for part in parts for at in part.offsets.tolist()]

    def gather(self, parts: Sequence[Rows], out: Tensor | None = None) -> Tensor:
        """The rows' bytes one after the other, on the buffer's device; complete when it returns.

        Args:
            out: where to put them, from its beginning on; a row that is all of it need not be copied.
        """
        total = sum(part.total_bytes for part in parts)
        if self._bytes is None:
            packed = torch.cat([piece for part in parts for piece in self._pieces(part)])
            torch.cuda.current_stream(self.device).synchronize()
            return packed
        if len(parts) == 1 and _is_one(parts[0].offsets, parts[0].num_bytes):
            begin = int(parts[0].offsets[0])
            return self._buffer[begin : begin + total]
        packed = torch.empty(total, dtype=torch.uint8) if out is None else out[:total]
        at, target = 0, packed.numpy()
        for part in parts:
            self._copier.copy(target, _packed(part, at), self._bytes, part.offsets, part.num_bytes, used_next=True)
            at += part.total_bytes
        return packed

    def scatter(self, payload: Tensor, parts: Sequence[Rows]) -> None:
        """Write what `gather` of equally long rows gave."""
        at = 0
        if self._bytes is not None:
            source = payload.numpy()
            for part in parts:
                self._copier.copy(self._bytes, part.offsets, source, _packed(part, at), part.num_bytes)
                at += part.total_bytes
            return
        payload = payload.to(self.device)
        for part in parts:
            pieces = self._pieces(part)
            width = part.total_bytes // len(pieces)
            for piece in pieces:
                piece.copy_(payload[at : at + width])
                at += width
        # A rank's next step may run on another stream; waiting for the whole device would spoil a graph's capture.
        torch.cuda.current_stream(self.device).synchronize()

    def copy_from(self, source: ByteArray, src: Rows, dst: Rows) -> None:
        """Copy rows of another process's mapped cache into this one."""
        if self._bytes is not None:
            self._copier.copy(self._bytes, dst.offsets, source, src.offsets, src.num_bytes)
            return
        packed = np.empty(src.total_bytes, dtype=np.uint8)
        self._copier.copy(packed, _packed(src, 0), source, src.offsets, src.num_bytes)
        self.scatter(torch.from_numpy(packed), [dst])

    def _pieces(self, rows: Rows) -> list[Tensor]:
        """Rows on a device as flat views; one where they follow each other."""
        if _is_one(rows.offsets, rows.num_bytes):
            begin = int(rows.offsets[0])
            return [self._buffer[begin : begin + rows.total_bytes]]
        return [self._buffer[at : at + rows.num_bytes] for at in rows.offsets.tolist()]


def _is_one(offsets: IntArray, num_bytes: int) -> bool:
    """Whether rows follow each other without a gap."""
    return bool((np.diff(offsets) == num_bytes).all())


def _packed(rows: Rows, at: int) -> IntArray:
    """Where rows lie that are packed from `at` on."""
    return at + np.arange(len(rows.offsets), dtype=np.int64) * rows.num_bytes
