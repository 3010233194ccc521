"""What a step begins and ends with, of the compiled library: embeddings, and the best token of a spread vocabulary.

T tokens of the step, N rows whose token is wanted, V vocabulary, P parts of it, K experts a token, C hidden size.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.kernels.check import check_tensor

_int, _long, _address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
STEP_SIGNATURES: dict[str, list[type]] = {
    "kernels_embed": [_address] * 3 + [_long] * 4,
    "kernels_local_ids": [_address] * 2 + [_long] * 3,
    "kernels_best_of_part": [_int] + [_address] * 2 + [_long] * 4,
    "kernels_best_of_pairs": [_address] * 2 + [_long] * 2,
    "kernels_decode_inputs": [_address] * 19 + [_long] * 5,
    "kernels_accept": [_address] * 9 + [_long] * 2,
    "kernels_take_spans": [_address] * 4 + [_long] * 2,
    "kernels_beside": [_address] * 3 + [_long] * 3,
    "kernels_draft_inputs": [_address] * 15 + [_long] * 6,
    "kernels_store_drafts": [_address] * 6 + [_long] * 3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeSteps:
    """Calls of one instruction set. Every method raises ValueError for tensors that the library does not take."""

    library: ctypes.CDLL
    path: int

    def embed(self, table_VC: Tensor, ids_T: Tensor, first: int) -> Tensor:
        """Rows of a table -> [T, C]."""
        (V, C), (T,) = table_VC.shape, ids_T.shape
        check_tensor("table", table_VC, table_VC.dtype, (V, C))
        check_tensor("ids", ids_T, torch.int64, (T,))
        out_TC = table_VC.new_empty((T, C))
        row_bytes = C * table_VC.dtype.itemsize
        self.library.kernels_embed(
            table_VC.data_ptr(), ids_T.data_ptr(), out_TC.data_ptr(), T, row_bytes, first, V
        )  # fmt: skip
        return out_TC

    def beside(self, a_TC: Tensor, b_TC: Tensor) -> Tensor:
        """[a | b]."""
        T, C = a_TC.shape
        check_tensor("a", a_TC, a_TC.dtype, (T, C))
        check_tensor("b", b_TC, a_TC.dtype, (T, C))
        out_TC = a_TC.new_empty((T, 2 * C))
        row_bytes = C * a_TC.dtype.itemsize
        self.library.kernels_beside(a_TC.data_ptr(), b_TC.data_ptr(), out_TC.data_ptr(), T, row_bytes, row_bytes)
        return out_TC

    def local_ids(self, ids_TK: Tensor, first: int, held: int) -> Tensor:
        """ids counted from `first`, or -1 -> [T, K]."""
        check_tensor("ids", ids_TK, torch.int64, tuple(ids_TK.shape))
        local_TK = torch.empty_like(ids_TK)
        self.library.kernels_local_ids(ids_TK.data_ptr(), local_TK.data_ptr(), ids_TK.numel(), first, held)
        return local_TK

    def best_of_part(self, logits_NV: Tensor, size: int, first: int) -> Tensor:
        """Each row's largest logit and its place -> float64 [N, 2]; the logits' rows lie in one piece each."""
        N, columns = logits_NV.shape
        if not 0 <= size <= columns:
            raise ValueError(f"best_of_part: size={size} must lie in 0..{columns}, the logits' columns")
        pairs_N2 = logits_NV.new_empty((N, 2), dtype=torch.float64)
        self.library.kernels_best_of_part(
            self.path, logits_NV.data_ptr(), pairs_N2.data_ptr(), N, size, logits_NV.stride(0), first
        )  # fmt: skip
        return pairs_N2

    def best_of_pairs(self, pairs_PN2: Tensor) -> Tensor:
        """The best of several parts -> int64 [N]."""
        P, N, _ = pairs_PN2.shape
        check_tensor("pairs", pairs_PN2, torch.float64, (P, N, 2))
        tokens_N = pairs_PN2.new_empty(N, dtype=torch.int64)
        self.library.kernels_best_of_pairs(pairs_PN2.data_ptr(), tokens_N.data_ptr(), P, N)
        return tokens_N
