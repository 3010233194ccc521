"""Matmuls in Triton: dense, and grouped over hit experts; the choice of experts and the sum over them.

A row is summed over C in one order, in tiles that do not follow from the batch: its bits depend on the row only.

P = T * K pairs of token and expert, sorted by expert; E experts held here, C hidden size, I expert width.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from shards.kernels.triton_segments import dot, launch, precision

_BM = 64
"""Rows of a tile: as few as the widest tensor core instructions take. A tile of one row still reads its weights as fast
as memory gives them: 64 rows are 64 operations a byte, of 200 to 300 that GPUs can do."""
_COLUMNS = 128
_FEW_COLUMNS = 32
"""Columns of a tile, and for few rows, where wider ones would leave processors idle. No sum goes over columns."""


@triton.jit
def _first_not_below(
    sorted_ptr: tl.tensor, bound: tl.tensor, num_pairs: tl.tensor, num_halvings: tl.tensor
) -> tl.tensor:
    """For each bound, how many of the sorted numbers are below it."""
    low, high = bound * 0, bound * 0 + num_pairs
    for _ in tl.range(num_halvings):
        middle = (low + high) // 2
        open_ = low < high
        below = tl.load(sorted_ptr + middle, mask=open_, other=0) < bound
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["num_pairs", "num_halvings", "num_tiles"])
def _plan_tiles(
    sorted_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_pairs: tl.tensor,
    num_halvings: tl.tensor,
    num_tiles: tl.tensor,
    E: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
) -> None:
    """One program: [expert, first row, end of the expert's rows] of each tile; no rows (0, 0, 0) of those to spare."""
    expert = tl.arange(0, BE).to(tl.int64)
    first = _first_not_below(sorted_ptr, expert, num_pairs, num_halvings)
    end = _first_not_below(sorted_ptr, expert + 1, num_pairs, num_halvings)
    count = tl.where(expert < E, (end - first + BM - 1) // BM, 0)
    place = tl.cumsum(count, 0) - count
    for i in tl.range(tl.max(count, 0)):
        tile = tiles_ptr + (place + i) * 3
        tl.store(tile, expert, mask=i < count)
        tl.store(tile + 1, first + i * BM, mask=i < count)
        tl.store(tile + 2, end, mask=i < count)
    used = tl.sum(count, 0)
    for start in tl.range(0, num_tiles, BE):
        spare = start + expert
        for column in tl.static_range(3):
            tl.store(tiles_ptr + spare * 3 + column, expert * 0, mask=(spare >= used) & (spare < num_tiles))


@triton.jit
def _gate_up(
    x_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    inner_ptr: tl.tensor,
    top_k: tl.tensor,
    C: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """inner[row] = silu(gate) * up of the row's token by the row's expert."""
    tile = tiles_ptr + tl.program_id(0) * 3
    expert, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first < end:
        rows = first + tl.arange(0, BM)
        held = rows < end
        pairs = tl.load(pairs_ptr + rows, mask=held, other=0)
        columns = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
        x_rows = x_ptr + (pairs // top_k)[:, None] * C
        gate_columns = weight_ptr + expert * 2 * I * C + columns[None, :] * C
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for start in range(0, C, BK):
            c = start + tl.arange(0, BK)
            x = tl.load(x_rows + c[None, :], mask=held[:, None] & (c < C)[None, :], other=0.0)
            inside = (c < C)[:, None] & (columns < I)[None, :]
            w = tl.load(gate_columns + c[:, None], mask=inside, other=0.0)
            gate = dot(x, w, gate, PRECISION)
            w = tl.load(gate_columns + I * C + c[:, None], mask=inside, other=0.0)
            up = dot(x, w, up, PRECISION)
        inner = gate * tl.sigmoid(gate) * up
        tl.store(inner_ptr + rows[:, None] * I + columns[None, :], inner, mask=held[:, None] & (columns < I)[None, :])


@triton.jit
def _matmul(
    x_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    C: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """y[pairs[row]] = x[row] @ weight[the row's expert].T"""
    tile = tiles_ptr + tl.program_id(0) * 3
    expert, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first < end:
        rows = first + tl.arange(0, BM)
        held = rows < end
        columns = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
        weight_columns = weight_ptr + expert * N * C + columns[None, :] * C
        y = tl.zeros((BM, BN), tl.float32)
        for start in range(0, C, BK):
            c = start + tl.arange(0, BK)
            x = tl.load(x_ptr + rows[:, None] * C + c[None, :], mask=held[:, None] & (c < C)[None, :], other=0.0)
            inside = (c < C)[:, None] & (columns < N)[None, :]
            y = dot(x, tl.load(weight_columns + c[:, None], mask=inside, other=0.0), y, PRECISION)
        pairs = tl.load(pairs_ptr + rows, mask=held, other=0)
        places = y_ptr + pairs[:, None] * N + columns[None, :]
        tl.store(places, y, mask=held[:, None] & (columns < N)[None, :])


# A number of rows that were a constant of the kernel would have it compiled anew in the middle of serving.
@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_rows: tl.tensor,
    C: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """y = x @ weight.T (+ bias), rounded once."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    held = rows < num_rows
    columns = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    y = tl.zeros((BM, BN), tl.float32)
    for start in range(0, C, BK):
        c = start + tl.arange(0, BK)
        x = tl.load(x_ptr + rows[:, None] * C + c[None, :], mask=held[:, None] & (c < C)[None, :], other=0.0)
        inside = (c < C)[:, None] & (columns < N)[None, :]
        w = tl.load(weight_ptr + columns[None, :] * C + c[:, None], mask=inside, other=0.0)
        y = dot(x, w, y, PRECISION)
    if BIASED:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], y, mask=held[:, None] & (columns < N)[None, :])


@triton.jit
def _route(
    logits_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    stride: tl.tensor,
    E: tl.constexpr,
    BE: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    RENORMALIZE: tl.constexpr,
) -> None:
    """Softmax of one token's logits, its K largest in descending order, of equals the lower id first."""
    token = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, BE), tl.arange(0, BK)
    logits = tl.load(logits_ptr + token * stride + e, mask=e < E, other=float("-inf")).to(tl.float32)
    shares = tl.exp(logits - tl.max(logits, 0))
    shares = tl.where(e < E, shares / tl.sum(shares, 0), -1.0)
    weights = tl.zeros((BK,), tl.float32)
    ids = tl.zeros((BK,), tl.int64)
    for place in tl.static_range(K):
        best = tl.max(shares, 0)
        # NaN equals nothing, and the experts must be given an expert.
        expert = tl.minimum(tl.min(tl.where(shares == best, e, BE), 0), E - 1)
        weights = tl.where(k == place, best, weights)
        ids = tl.where(k == place, expert, ids)
        shares = tl.where(e == expert, -1.0, shares)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, 0)
    tl.store(weights_ptr + token * K + k, weights, mask=k < K)
    tl.store(ids_ptr + token * K + k, ids, mask=k < K)


@triton.jit
def _combine(
    y_ptr: tl.tensor, weights_ptr: tl.tensor, out_ptr: tl.tensor, K: tl.constexpr, C: tl.constexpr, BN: tl.constexpr
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for k in range(K):
        y = tl.load(y_ptr + (token * K + k) * C + columns, mask=columns < C, other=0.0)
        total += y.to(tl.float32) * tl.load(weights_ptr + token * K + k)
    tl.store(out_ptr + token * C + columns, total, mask=columns < C)


def experts(x_TC: Tensor, ids_TK: Tensor, gate_up_E2IC: Tensor, down_ECI: Tensor, *, wide: bool) -> Tensor:
    """`Kernels.experts` in one group; nothing of it waits for the device."""
    (T, K), (E, C, I) = ids_TK.shape, down_ECI.shape  # noqa: E741
    pairs = T * K
    y_PC = torch.zeros(pairs, C, dtype=torch.float32 if wide else x_TC.dtype, device=x_TC.device)
    if not pairs:
        return y_PC.view(T, K, C)
    sorted_P, pairs_P = torch.sort(ids_TK.flatten(), stable=True)
    # One more tile than full ones for each expert that is hit, whichever these are: the host need not know.
    tiles = pairs // _BM + min(pairs, E)
    tiles_T3 = torch.empty(tiles, 3, dtype=torch.int64, device=x_TC.device)
    # Pairs of experts held elsewhere (ids < 0) come before those of the first.
    sizes = (pairs, pairs.bit_length(), tiles, E, triton.next_power_of_2(E), _BM)
    launch(_plan_tiles, (1,), sorted_P, tiles_T3, *sizes)
    how = precision(x_TC)
    BK = _inner(x_TC)
    inner_PI = torch.empty(pairs, I, dtype=x_TC.dtype, device=x_TC.device)
    # Two accumulators a program: half the columns.
    half = _COLUMNS // 2
    grid = (tiles, triton.cdiv(I, half))
    launch(_gate_up, grid, x_TC, pairs_P, tiles_T3, gate_up_E2IC, inner_PI, K, C, I, _BM, half, BK, how)
    grid = (tiles, triton.cdiv(C, _COLUMNS))
    launch(_matmul, grid, inner_PI, pairs_P, tiles_T3, down_ECI, y_PC, I, C, _BM, _COLUMNS, BK, how)
    return y_PC.view(T, K, C)


def linear(x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None, *, wide: bool) -> Tensor:
    """`Kernels.linear` in one group."""
    (T, C), N = x_TC.shape, weight_NC.shape[0]
    y_TN = torch.empty(T, N, dtype=torch.float32 if wide else x_TC.dtype, device=x_TC.device)
    if T:
        BN = _FEW_COLUMNS if T <= _BM else _COLUMNS
        # A bias that is not there is not read.
        tensors = (x_TC, weight_NC, weight_NC if bias_N is None else bias_N, y_TN)
        sizes = (T, C, N, _BM, BN, _inner(x_TC), bias_N is not None, precision(x_TC))
        launch(_linear, (triton.cdiv(T, _BM), triton.cdiv(N, BN)), *tensors, *sizes)
    return y_TN


def route(logits_TE: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """`Kernels.route`."""
    (T, E), device = logits_TE.shape, logits_TE.device
    weights_TK = torch.empty(T, top_k, dtype=torch.float32, device=device)
    ids_TK = torch.empty(T, top_k, dtype=torch.int64, device=device)
    if T:
        sizes = (logits_TE.stride(0), E, triton.next_power_of_2(E), top_k, triton.next_power_of_2(top_k), renormalize)
        launch(_route, (T,), logits_TE, weights_TK, ids_TK, *sizes)
    return weights_TK, ids_TK


def combine(y_TKC: Tensor, weights_TK: Tensor) -> Tensor:
    """`Kernels.combine`."""
    T, K, C = y_TKC.shape
    out_TC = y_TKC.new_empty(T, C)
    if T:
        BN = min(1024, triton.next_power_of_2(C))
        launch(_combine, (T, triton.cdiv(C, BN)), y_TKC, weights_TK, out_TC, K, C, BN)
    return out_TC


def _inner(x: Tensor) -> int:
    """Inner length of a tile; float32 takes twice the shared memory."""
    return 32 if x.dtype == torch.float32 else 64
