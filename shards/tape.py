"""Calls of the compiled library written down instead of made, to be made later without Python between them.

While a tape is recorded nothing is computed: no call is made, tensors have their shapes and no contents that mean
anything. So one can be recorded at any time. It holds addresses. What is computed on the way lies in a `Workspace`,
whose memory is used again within a recording, and by the next one, as soon as no tensor refers to it. The library
could not call a torch operator that computes, so a recording ends where one is about to run.
"""

import ctypes
import math
import struct
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Final, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from shards.kernels.library import declare
from shards.step_profile import Label

PITCH: Final = 32
"""Numbers of a call: the function, and its arguments, of which none has as many."""
_REPLAY: Final = "_replay"
"""What KERNELS_REPLAY of native/replay.h adds to a function's name."""
_ALIGNED: Final = 64
"""Bytes: a line of the processor's cache."""
_UNUSED: Final = 2
"""References to a piece of memory that no tensor has: the workspace's, and that of the call that counts them."""
_NEW: Final = frozenset(
    {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default}
)
_WHOLE: Final = frozenset({int, bool})

Numbers = NDArray[np.int64]


class UnrecordableError(Exception):
    """What runs cannot be written down; says why."""


class Foreign(Protocol):
    """A function of the library as ctypes has it."""

    restype: type | None
    argtypes: Sequence[type] | None

    def __call__(self, *arguments: object) -> int:
        """Call it."""
        ...


class Workspace:
    """Memory of what tapes compute on the way."""

    def __init__(self) -> None:
        self._pieces: list[NDArray[np.uint8]] = []
        """Smaller ones first."""

    @property
    def num_bytes(self) -> int:
        """Of all pieces."""
        return sum(piece.nbytes for piece in self._pieces)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose memory is nobody else's until nothing refers to it."""
        pieces, num_bytes = self._pieces, math.prod(shape) * dtype.itemsize
        for i in range(bisect_left(pieces, num_bytes, key=len), len(pieces)):
            # A tensor's storage refers to the array that it was made from.
            if sys.getrefcount(pieces[i]) == _UNUSED:
                piece = pieces[i]
                break
        else:
            # Powers of two, so that steps of ever more rows do not leave a piece of each size behind.
            size = 1 << max(num_bytes - 1, _ALIGNED - 1).bit_length()
            room = np.empty(size + _ALIGNED, dtype=np.uint8)
            begin = -room.ctypes.data % _ALIGNED
            piece = room[begin : begin + size]
            pieces.insert(bisect_left(pieces, size, key=len), piece)
        return torch.from_numpy(piece)[:num_bytes].view(dtype).view(tuple(shape))

    @staticmethod
    def borrowed(x: Tensor) -> Tensor:
        """A contiguous tensor of `empty` once more, which does not keep its memory from being used again."""
        if not x.numel():
            return x
        room = (ctypes.c_uint8 * x.nbytes).from_address(x.data_ptr())
        return torch.frombuffer(room, dtype=x.dtype).view(x.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tape:
    """Calls that were written down. What they read and write has to live as long."""

    library: ctypes.CDLL
    calls: Numbers
    """[calls, PITCH]"""
    names: tuple[str, ...]
    """Of the functions."""
    labels: tuple[Label, ...]
    """What each call is part of."""
    ns: Numbers
    """Nanoseconds that each call took when they were last timed."""
    code: ctypes.c_int64

    def play(self, *, timed: bool) -> tuple[str, int] | None:
        """Make all calls again -> None; or the function that failed, behind which none was called, and its code."""
        ns = self.ns.ctypes.data if timed else None
        calls, code = self.calls.ctypes.data, ctypes.addressof(self.code)
        failed = self.library.kernels_carry_out(calls, len(self.names), PITCH, ns, code)
        return None if failed < 0 else (self.names[failed], self.code.value)


class Recorder:
    """Stands for the compiled library. Its functions are called as ever, or written down while a tape is recorded.

    Args:
        where: tells what a call is part of.
    """

    def __init__(self, library: ctypes.CDLL, where: Callable[[], Label] = tuple) -> None:
        declare(library, {"kernels_carry_out": [ctypes.c_void_p] + [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 2})
        library.kernels_carry_out.restype = ctypes.c_int64
        self._library = library
        self._where = where
        self.calls: list[list[int]] | None = None
        """Those written down so far; None: they are made."""
        self._thread = 0
        """Which one writes: others, such as one that closes a group, call meanwhile as ever."""
        self._names: list[str] = []
        self._labels: list[Label] = []

    def __getattr__(self, name: str) -> "_Function":
        replay = getattr(self._library, name + _REPLAY, None)
        address = None if replay is None else ctypes.cast(replay, ctypes.c_void_p).value
        function = _Function(getattr(self._library, name), name, address, self)
        # Found without this method from now on.
        setattr(self, name, function)
        return function

    def record(self, run: Callable[[], Tensor], workspace: Workspace) -> tuple[Tensor, Tape]:
        """Write down what something would compute -> where its result will be, and the tape that computes it.

        Raises:
            UnrecordableError: it computes with more than the library.
        """
        calls: list[list[int]] = []
        self._thread = get_ident()
        self.calls = calls
        self._names.clear()
        self._labels.clear()
        try:
            with _Watch(workspace):
                result = run()
        finally:
            self.calls = None
        numbers: Numbers = np.zeros((len(calls), PITCH), dtype=np.int64)
        for row, call in zip(numbers, calls, strict=True):
            row[: len(call)] = call
        tape = Tape(
            library=self._library,
            calls=numbers,
            names=tuple(self._names),
            labels=tuple(self._labels),
            ns=np.zeros(len(calls), dtype=np.int64),
            code=ctypes.c_int64(0),
        )
        return result, tape

    @property
    def writes(self) -> bool:
        """Whether a call of this thread is written down, and not made."""
        return self.calls is not None and self._thread == get_ident()

    def note(self, name: str, call: list[int]) -> None:
        """Write a call down, while a tape is recorded."""
        assert self.calls is not None
        self.calls.append(call)
        self._names.append(name)
        self._labels.append(self._where())


class _Function:
    """One function of a recorder's library.

    Args:
        address: of what makes the call from numbers; None: nothing does.
    """

    def __init__(self, function: Foreign, name: str, address: int | None, recorder: Recorder) -> None:
        self._function = function
        self._name = name
        self._address = address
        self._recorder = recorder
        self._floats: list[int] = []
        """Places of the arguments that are no whole numbers."""

    @property
    def restype(self) -> type | None:
        """The C type of its result, as ctypes has it."""
        return self._function.restype

    @restype.setter
    def restype(self, kind: type | None) -> None:
        self._function.restype = kind

    @property
    def argtypes(self) -> Sequence[type] | None:
        """Those of its arguments."""
        return self._function.argtypes

    @argtypes.setter
    def argtypes(self, kinds: Sequence[type]) -> None:
        self._function.argtypes = kinds
        self._floats = [place for place, kind in enumerate(kinds) if kind is ctypes.c_float]

    def __call__(self, *arguments: object) -> int:
        if not self._recorder.writes:
            return self._function(*arguments)
        if self._address is None or len(arguments) >= PITCH:
            raise UnrecordableError(f"{self._name} cannot be called from numbers")
        numbers = [0 if argument is None else argument for argument in arguments]
        for place in self._floats:
            numbers[place] = _bits(numbers[place])
        if not _WHOLE.issuperset(map(type, numbers)):
            # Such as an array made for the call.
            raise UnrecordableError(f"{self._name} has an argument that does not last")
        self._recorder.note(self._name, [self._address, *cast("list[int]", numbers)])
        return 0


def _bits(value: object) -> int:
    """A float argument as the number that native/replay.h makes it of."""
    assert isinstance(value, (int, float))
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


class _Watch(TorchDispatchMode):
    """Takes new tensors from a workspace, and refuses operators that compute."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__()
        self._workspace = workspace

    @override
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Or torch imports its compiler in the first step of each rank: 1.7 s in which nobody gets a token.
        return False

    @override
    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        new = func in _NEW
        if new or func.is_view:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                if new and result.is_contiguous():
                    return self._workspace.empty(result.shape, result.dtype)
                storage = result.untyped_storage().data_ptr()
                if any(isinstance(arg, Tensor) and arg.untyped_storage().data_ptr() == storage for arg in args):
                    return result
        raise UnrecordableError(f"{func._schema.name} computes")
