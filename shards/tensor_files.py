"""Reads parts of stored tensors from their files straight into the memory that they stay in.

Nothing is mapped: a mapped file's pages count as the process's memory, beside the weights that are copied from them.
A part of a tensor is given as one range, step 1, for each axis.
"""

import itertools
import math
import os
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from shards.safetensors_files import StoredTensor

_PAGE = 4096
"""Bytes, of most file systems. What lies between two runs is read with them where it is less: it comes along anyway."""
_PIECE = 4 << 20
"""Bytes that wait on the way where a part cannot be read into its place; little enough to stay in a cache."""

Part = tuple[range, ...]


class TensorFiles:
    """The open files of a checkpoint. Not thread-safe."""

    def __init__(self) -> None:
        self._opened: dict[Path, int] = {}
        self._stack = ExitStack()

    def close(self) -> None:
        """Close the files."""
        self._opened.clear()
        self._stack.close()

    def read(self, stored: StoredTensor, part: Part, out: Tensor) -> None:
        """Fill `out`, contiguous, on the CPU, in the stored dtype and of the part's shape.

        Raises:
            ValueError: the file cannot be read, or has become shorter; names it and the remedy.
        """
        room = out.view(-1).view(torch.uint8).numpy().data
        if not part:
            self._fill(stored, 0, room)
            return
        inner, size, _ = _run(stored, part)
        strides = [math.prod(stored.shape[axis + 1 :]) * stored.dtype.itemsize for axis in range(inner + 1)]
        for place, ids in enumerate(itertools.product(*part[:inner], part[inner][:1])):
            offset = sum(i * stride for i, stride in zip(ids, strides, strict=True))
            self._fill(stored, offset, room[place * size : (place + 1) * size])

    def values(self, stored: StoredTensor, part: Part) -> Tensor:
        """The part as a new CPU tensor in the stored dtype, not always contiguous."""
        wide = _widened(stored, part)
        out = torch.empty([len(axis) for axis in wide], dtype=stored.dtype)
        self.read(stored, wide, out)
        return out[tuple(slice(a.start - w.start, a.stop - w.start) for a, w in zip(part, wide, strict=True))]

    def _fill(self, stored: StoredTensor, offset: int, room: memoryview) -> None:
        try:
            fd, done = self._open(stored.file), 0
            while done < len(room):
                count = os.preadv(fd, [room[done:]], stored.offset + offset + done)
                if not count:
                    raise ValueError(
                        f"{stored.file}: ends at byte {stored.offset + offset + done}, it has become shorter since its "
                        "header was read; fetch the file again"
                    )
                done += count
        except OSError as error:
            raise ValueError(f"{stored.file}: cannot be read: {error.strerror}") from error

    def _open(self, file: Path) -> int:
        if file not in self._opened:
            fd = os.open(file, os.O_RDONLY)
            self._stack.callback(os.close, fd)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._opened[file] = fd
        return self._opened[file]


def whole_pages(stored: StoredTensor, part: Part) -> bool:
    """Whether reading the part run by run touches no page of the file twice."""
    return _widened(stored, part) == part


def waits_well(stored: StoredTensor, part: Part) -> bool:
    """Whether the part is small enough to be read with `values`."""
    return math.prod(len(axis) for axis in _widened(stored, part)) * stored.dtype.itemsize <= _PIECE


def halves(part: Part) -> tuple[tuple[Part, slice, int], ...]:
    """Both halves of the first axis that has two: each half, and where it lies on which axis of the part."""
    axis = next(i for i, ids in enumerate(part) if len(ids) > 1)
    size, middle = len(part[axis]), len(part[axis]) // 2
    return tuple(
        ((*part[:axis], part[axis][place], *part[axis + 1 :]), place, axis)
        for place in (slice(middle), slice(middle, size))
    )


def _run(stored: StoredTensor, part: Part) -> tuple[int, int, int]:
    """The first axis that a run of bytes goes over (all that follow are taken whole), its bytes, those to the next."""
    cut = (i for i in reversed(range(len(part))) if len(part[i]) < stored.shape[i])
    inner = next(cut, 0)
    row = math.prod(stored.shape[inner + 1 :]) * stored.dtype.itemsize
    return inner, len(part[inner]) * row, (stored.shape[inner] - len(part[inner])) * row


def _widened(stored: StoredTensor, part: Part) -> Part:
    """The part, with what lies between its runs where that is less than a page."""
    if not part:
        return part
    inner, _, between = _run(stored, part)
    if between >= _PAGE or all(len(axis) == 1 for axis in part[:inner]):
        return part
    return (*part[:inner], range(stored.shape[inner]), *part[inner + 1 :])
