"""Calls of the compiled library written down while they are made, to be made again without Python between them.

A tape holds addresses. What is computed on the way lies in a `Workspace`, whose memory is used again within a
recording, and by the next one, as soon as no tensor refers to it. A torch operator that computes could not be made
again, so a recording in which one runs gives no tape.
"""

import ctypes
import math
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

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
_NEW: Final = frozenset({"aten::empty", "aten::empty_like", "aten::new_empty"})

Numbers = NDArray[np.int64]


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

    @property
    def num_bytes(self) -> int:
        """Of all pieces."""
        return sum(piece.nbytes for piece in self._pieces)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose memory is nobody else's until nothing refers to it."""
        num_bytes = math.prod(shape) * dtype.itemsize
        # A tensor's storage refers to the array that it was made from.
        unused = [i for i in range(len(self._pieces)) if sys.getrefcount(self._pieces[i]) == _UNUSED]
        fitting = [i for i in unused if self._pieces[i].nbytes >= num_bytes]
        if fitting:
            piece = self._pieces[min(fitting, key=lambda i: self._pieces[i].nbytes)]
        else:
            # Powers of two, so that steps of ever more rows do not leave a piece of each size behind.
            size = 1 << max(num_bytes - 1, _ALIGNED - 1).bit_length()
            room = np.empty(size + _ALIGNED, dtype=np.uint8)
            begin = -room.ctypes.data % _ALIGNED
            piece = room[begin : begin + size]
            self._pieces.append(piece)
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
    """Stands for the compiled library. Its functions are called as ever, and written down while a tape is recorded.

    Args:
        where: tells what a call is part of.
    """

    def __init__(self, library: ctypes.CDLL, where: Callable[[], Label] = tuple) -> None:
        declare(library, {"kernels_carry_out": [ctypes.c_void_p] + [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 2})
        library.kernels_carry_out.restype = ctypes.c_int64
        self._library = library
        self._where = where
        self._calls: list[list[int]] | None = None
        self._names: list[str] = []
        self._labels: list[Label] = []
        self._problem = ""

    def __getattr__(self, name: str) -> "_Function":
        function = _Function(getattr(self._library, name), name, self)
        # Found without this method from now on.
        setattr(self, name, function)
        return function

    def record(self, run: Callable[[], Tensor], workspace: Workspace) -> tuple[Tensor, Tape | None, str]:
        """Run something once -> its result; the tape that makes it again, in the same place, or why there is none."""
        calls: list[list[int]] = []
        self._calls, self._problem = calls, ""
        self._names.clear()
        self._labels.clear()
        try:
            with _Watch(workspace) as watch:
                result = run()
            problem = self._problem or watch.problem
        finally:
            self._calls = None
        if problem:
            return result, None, problem
        tape = Tape(
            library=self._library,
            calls=np.array(calls, dtype=np.int64).reshape(len(calls), PITCH),
            names=tuple(self._names),
            labels=tuple(self._labels),
            ns=np.zeros(len(calls), dtype=np.int64),
            code=ctypes.c_int64(0),
        )
        return result, tape, ""

    def write(self, name: str, function: Foreign, arguments: Sequence[object]) -> None:
        """Note a call, while a tape is recorded."""
        if self._calls is None:
            return
        replay = getattr(self._library, name + _REPLAY, None)
        try:
            if replay is None or len(arguments) >= PITCH:
                raise TypeError(f"{name} cannot be called from numbers")
            numbers = [_number(kind, value) for kind, value in zip(function.argtypes or (), arguments, strict=True)]
        except (TypeError, ValueError) as error:
            self._problem = self._problem or str(error)
            return
        address = ctypes.cast(replay, ctypes.c_void_p).value or 0
        self._calls.append([address, *numbers, *[0] * (PITCH - 1 - len(numbers))])
        self._names.append(name)
        self._labels.append(self._where())


class _Function:
    """One function of a recorder's library."""

    def __init__(self, function: Foreign, name: str, recorder: Recorder) -> None:
        self._function = function
        self._name = name
        self._recorder = recorder

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

    def __call__(self, *arguments: object) -> int:
        result = self._function(*arguments)
        self._recorder.write(self._name, self._function, arguments)
        return result


def _number(kind: type, value: object) -> int:
    """An argument as the number that native/replay.h makes it of.

    Raises:
        TypeError: it is none that lasts, such as an array made for the call.
    """
    if kind is ctypes.c_float and isinstance(value, (int, float)):
        return int(struct.unpack("<i", struct.pack("<f", value))[0])
    if value is None:
        return 0
    if isinstance(value, int):
        return int(value)
    raise TypeError(f"an argument {value!r} cannot be written down")


class _Watch(TorchDispatchMode):
    """Takes new tensors from a workspace, and notices operators that compute."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__()
        self.problem = ""
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
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _NEW and isinstance(result, Tensor) and result.is_contiguous():
            return self._workspace.empty(result.shape, result.dtype)
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        views = isinstance(result, Tensor) and result.untyped_storage().data_ptr() in given
        if not views or func._schema.is_mutable:
            self.problem = self.problem or f"{name} computes"
        return result
