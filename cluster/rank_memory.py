"""A rank's flat cache buffer as pulls see it: spans read and written by rows, on the CPU or a device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.recut import Span

ByteArray = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class RankMemory:
    """Spans of a flat uint8 buffer, on the CPU or a device, read and written by rows."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        # numpy copies byte rows with memmove on the calling thread; torch would start a thread pool for each caller.
        self._bytes: ByteArray | None = buffer.numpy() if buffer.device.type == "cpu" else None

    def holds(self, span: Span) -> bool:
        """Whether the span lies inside of the buffer, row by row."""
        fits = span.num_bytes > 0 and span.rows > 0 and span.end <= self._buffer.numel()
        return fits and (span.rows == 1 or span.stride >= span.num_bytes)

    @property
    def device(self) -> torch.device:
        """Where the buffer lies."""
        return self._buffer.device

    def gather_there(self, spans: Sequence[Span]) -> Tensor:
        """As `gather`, on the buffer's device; complete when it returns."""
        if self._bytes is not None:
            return torch.from_numpy(self.gather(spans))
        packed = torch.cat([_window(self._buffer, span).reshape(-1) for span in spans])
        torch.cuda.current_stream(self.device).synchronize()
        return packed

    def gather(self, spans: Sequence[Span]) -> ByteArray:
        """The bytes of the spans, one after the other."""
        if self._bytes is None:
            gathered: ByteArray = self.gather_there(spans).cpu().numpy()
            return gathered
        out = np.empty(sum(span.total_bytes for span in spans), dtype=np.uint8)
        at = 0
        for span in spans:
            np.copyto(rows_at(out, at, span), rows_of(self._bytes, span))
            at += span.total_bytes
        return out

    def scatter(self, payload: ByteArray | Tensor, spans: Sequence[Span]) -> None:
        """Write what `gather` or `gather_there` of equally long spans gave."""
        source: ByteArray | Tensor
        if self._bytes is None:
            source = (torch.from_numpy(payload) if isinstance(payload, np.ndarray) else payload).to(self.device)
        else:
            source = payload if isinstance(payload, np.ndarray) else payload.numpy()
        at = 0
        for span in spans:
            self._write(source, at, span)
            at += span.total_bytes
        if self._bytes is None:
            # A rank's next step may run on another stream.
            torch.cuda.synchronize(self._buffer.device)

    def _write(self, source: "ByteArray | Tensor", at: int, span: Span) -> None:
        if isinstance(source, Tensor):
            part = source[at : at + span.total_bytes].view(span.rows, span.num_bytes)
            _window(self._buffer, span).copy_(part)
        else:
            assert self._bytes is not None
            np.copyto(rows_of(self._bytes, span), rows_at(source, at, span))

    def copy_from(self, source: ByteArray, src: Span, dst: Span) -> None:
        """Copy a span of another process's mapped cache into this one."""
        if self._bytes is None:
            packed = np.ascontiguousarray(rows_of(source, src)).reshape(-1)
            self.scatter(packed, [dst])
        else:
            np.copyto(rows_of(self._bytes, dst), rows_of(source, src))


def rows_of(array: ByteArray, span: Span) -> ByteArray:
    """A view [rows, num_bytes] of a flat array; the caller has checked the bounds."""
    shape, strides = (span.rows, span.num_bytes), (span.stride, 1)
    return np.ndarray(shape, np.uint8, buffer=array.data, offset=span.offset, strides=strides)


def rows_at(array: ByteArray, at: int, span: Span) -> ByteArray:
    """The packed bytes of a span that begin at `at`, as [rows, num_bytes]."""
    return array[at : at + span.total_bytes].reshape(span.rows, span.num_bytes)


def _window(buffer: Tensor, span: Span) -> Tensor:
    return buffer.as_strided((span.rows, span.num_bytes), (span.stride, 1), span.offset)
