"""Linear layers and experts of the compiled library: check, allocate, pass addresses.

T tokens of the step, C inputs, N outputs, E experts held here, K experts per token, I expert width.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.int_weights import STRIP, ExpertWeights, IntWeights, strips_of
from shards.kernels.check import check_tensor, check_tensors

MAX_GROUPS = 1 << 15

_int, _long, _address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
MATMUL_SIGNATURES: dict[str, list[type]] = {
    "kernels_linear": [_int] * 3 + [_address] * 4 + [_int] + [_long] * 3 + [_int],
    "kernels_experts": [_int] * 3 + [_address] * 6 + [_int] + [_long] * 5 + [_int],
    "kernels_int_experts": [_int] * 3 + [_address] * 8 + [_int] + [_long] * 5 + [_int] * 3 + [_long] * 2,
    "kernels_lay_out": [_int] * 3 + [_address] + [_long] * 3 + [_int],
    "kernels_take_rows": [_int] * 3 + [_address] * 2 + [_long] * 3 + [_address],
}
# The library's numbers of the dtypes that scales have.
_SCALE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeMatmul:
    """Calls of one instruction set. Every method raises ValueError for tensors that the library does not take."""

    library: ctypes.CDLL
    path: int

    def lay_out(self, weight: Tensor, *, groups: int) -> None:
        """Lay out [.., N, C] in place."""
        code = check_tensors(weight, weight=(weight, tuple(weight.shape)))
        N, C = weight.shape[-2:]
        _check_groups(groups, C)
        self.library.kernels_lay_out(
            self.path, torch.get_num_threads(), code, weight.data_ptr(), weight.numel() // max(N * C, 1), N, C, groups
        )

    def take_rows(self, weight_NC: Tensor, ids_T: Tensor) -> Tensor:
        """Rows of a weight that was laid out -> [T, C]."""
        (N, C), T = weight_NC.shape, ids_T.shape[0]
        code = check_tensors(weight_NC, weight=(weight_NC, (N, C)))
        check_tensor("ids", ids_T, torch.int64, (T,))
        out_TC = weight_NC.new_empty((T, C))
        failed = self.library.kernels_take_rows(
            self.path, torch.get_num_threads(), code, weight_NC.data_ptr(), ids_T.data_ptr(), T, N, C, out_TC.data_ptr()
        )
        if failed:
            raise ValueError(f"take_rows: ids span {int(ids_T.min())}..{int(ids_T.max())}, but there are {N} rows")
        return out_TC

    def linear(self, x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None, *, groups: int, wide: bool) -> Tensor:
        """x @ weight.T (+ bias) -> [T, N]."""
        (T, C), N = x_TC.shape, weight_NC.shape[0]
        code = check_tensors(x_TC, x=(x_TC, (T, C)), weight=(weight_NC, (N, C)))
        if bias_N is not None:
            check_tensors(x_TC, bias=(bias_N, (N,)))
        _check_groups(groups, C)
        y_TN = x_TC.new_empty((T, N), dtype=torch.float32 if wide else x_TC.dtype)
        bias = None if bias_N is None else bias_N.data_ptr()
        self.library.kernels_linear(
            self.path, torch.get_num_threads(), code, x_TC.data_ptr(), weight_NC.data_ptr(), bias, y_TN.data_ptr(),
            wide, T, N, C, groups,
        )  # fmt: skip
        return y_TN

    def experts(
        self,
        x_TC: Tensor,
        ids_TK: Tensor,
        gate_up_E2IC: ExpertWeights,
        down_ECI: ExpertWeights,
        *,
        groups: int,
        wide: bool,
    ) -> Tensor:
        """Each token through each of its experts -> [T, K, C]."""
        y_TKC = x_TC.new_empty((*ids_TK.shape, x_TC.shape[1]), dtype=torch.float32 if wide else x_TC.dtype)
        self._experts(x_TC, ids_TK, None, gate_up_E2IC, down_ECI, y_TKC, groups=groups, wide=wide)
        return y_TKC

    def weighted_experts(
        self,
        x_TC: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        gate_up_E2IC: ExpertWeights,
        down_ECI: ExpertWeights,
        *,
        groups: int,
    ) -> Tensor:
        """The weighted sum over K of what `experts` gives -> [T, C]."""
        check_tensor("weights", weights_TK, torch.float32, tuple(ids_TK.shape))
        y_TC = torch.empty_like(x_TC)
        self._experts(x_TC, ids_TK, weights_TK, gate_up_E2IC, down_ECI, y_TC, groups=groups, wide=False)
        return y_TC

    def _experts(
        self,
        x_TC: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor | None,
        gate_up_E2IC: ExpertWeights,
        down_ECI: ExpertWeights,
        out: Tensor,
        *,
        groups: int,
        wide: bool,
    ) -> None:
        (T, C), K = x_TC.shape, ids_TK.shape[1]
        code = check_tensors(x_TC, x=(x_TC, (T, C)))
        check_tensor("ids", ids_TK, torch.int64, (T, K))
        weights = None if weights_TK is None else weights_TK.data_ptr()
        call = (self.path, torch.get_num_threads(), code, x_TC.data_ptr(), ids_TK.data_ptr(), weights)
        if isinstance(gate_up_E2IC, IntWeights) and isinstance(down_ECI, IntWeights):
            E, width = gate_up_E2IC.values.shape[0], down_ECI.columns
            _check_ints(gate_up_E2IC, down_ECI, C)
            _check_groups(groups, width)
            if width // groups % down_ECI.group:
                raise ValueError(f"down has groups of {down_ECI.group} columns, which must divide {width} / {groups}")
            failed = self.library.kernels_int_experts(
                *call, gate_up_E2IC.values.data_ptr(), gate_up_E2IC.scales.data_ptr(), down_ECI.values.data_ptr(),
                down_ECI.scales.data_ptr(), out.data_ptr(), wide, T, K, E, C, width, groups, down_ECI.bits,
                _SCALE_CODES[down_ECI.scales.dtype], gate_up_E2IC.group, down_ECI.group,
            )  # fmt: skip
        else:
            assert isinstance(gate_up_E2IC, Tensor)
            assert isinstance(down_ECI, Tensor)
            E, _, width = down_ECI.shape
            gate_up, down = (gate_up_E2IC, (E, 2 * width, C)), (down_ECI, (E, C, width))
            check_tensors(x_TC, gate_up=gate_up, down=down)
            _check_groups(groups, width)
            failed = self.library.kernels_experts(
                *call, gate_up_E2IC.data_ptr(), down_ECI.data_ptr(), out.data_ptr(), wide, T, K, E, C, width, groups
            )
        if failed:
            raise ValueError(f"experts: ids reach {int(ids_TK.max())}, but only {E} experts are held here")


def _check_ints(gate_up: IntWeights, down: IntWeights, hidden: int) -> None:
    """Refuse what the library would misread."""
    if gate_up.columns != hidden:
        raise ValueError(f"gate_up has {gate_up.columns} columns, x has {hidden}")
    E, strips = gate_up.values.shape[0], 2 * strips_of(down.columns)
    for name, ints, shape in (
        ("gate_up", gate_up, (E, strips, hidden // gate_up.group, STRIP)),
        ("down", down, (E, strips_of(hidden), down.columns // down.group, STRIP)),
    ):
        check_tensor(f"{name}'s scales", ints.scales, down.scales.dtype, shape)
        check_tensor(f"{name}'s values", ints.values, down.values.dtype, (*shape[:2], *ints.values.shape[2:]))


def _check_groups(groups: int, width: int) -> None:
    if not 1 <= groups <= MAX_GROUPS or groups & (groups - 1) or width % groups:
        raise ValueError(f"groups={groups} must be a power of two that divides {width}")
