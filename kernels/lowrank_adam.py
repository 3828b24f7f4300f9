"""Low-rank AdamW: project, Adam, back-project, decay and update of many matrices per launch.

Letters as in `owlore.reference`: W [m, n], G its gradient, P the basis, R the gradient in the
basis, M and V its moments, N the normalised update, r the rank. A *strip* is what one program owns
of R: columns of W on the left side (P [m, r], R = P^T G [r, n]), rows of W on the right side (P
[n, r], R = G P [m, r]). Along the other dimension of W a program *walks* while it projects. N waits
in scratch memory for the update, which walks down W's rows on either side.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TL_DTYPES,
    Launch,
    Prepared,
    aligned,
    bias_correction,
    fixed_key,
    pointer,
    remember,
    upload,
)
from .rounding import counter_words, eight_halves, rounding_bits, stochastic_round

# Columns of the matrix table: pointers, places in the scratch memory (of N, of R while it waits for
# its moments, and of the flags of lines that take part), sizes, strides, what keys the random bits.
# Of a shard, the row and column of the whole matrix with which it begins key its bits.
_COLUMNS = 19
_W = tl.constexpr(0)
_P = tl.constexpr(1)
_M = tl.constexpr(2)
_V = tl.constexpr(3)
_T = tl.constexpr(4)
_N = tl.constexpr(5)
_R = tl.constexpr(6)
_KEPT = tl.constexpr(7)
_ROWS = tl.constexpr(8)
_COLS = tl.constexpr(9)
_W_STRIDE_M = tl.constexpr(10)
_W_STRIDE_N = tl.constexpr(11)
_G_STRIDE_M = tl.constexpr(12)
_G_STRIDE_N = tl.constexpr(13)
_STREAM = tl.constexpr(14)
_INDEX = tl.constexpr(15)
_LEFT = tl.constexpr(16)
_FIRST_ROW = tl.constexpr(17)
_FIRST_COL = tl.constexpr(18)

# How W and G lie in memory.
ROW_MAJOR, COLUMN_MAJOR, STRIDED = 0, 1, 2


@triton.jit
def _field(row_ptr, COLUMN: tl.constexpr):
    return tl.load(row_ptr + COLUMN)


@triton.jit
def _place(scratch_ptr, row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """A pointer into the scratch memory; places in it are multiples of 256 bytes."""
    address = scratch_ptr.to(tl.int64) + tl.load(row_ptr + COLUMN)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _program(table_ptr, tiles_ptr, FIELDS: tl.constexpr):
    """What this program's tile is and the table row of its matrix."""
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    return tile_ptr, table_ptr + tl.load(tile_ptr) * FIELDS


@triton.jit
def _on_left(row_ptr, SIDES: tl.constexpr):
    """Whether the matrix is on the left side; known to the compiler if all are on one."""
    if SIDES == 2:
        left = tl.load(row_ptr + _LEFT) != 0
    else:
        left: tl.constexpr = SIDES == 1
    return left


@triton.jit
def _sizes(row_ptr, ALIGNED: tl.constexpr):
    m = tl.load(row_ptr + _ROWS).to(tl.int32)
    n = tl.load(row_ptr + _COLS).to(tl.int32)
    if ALIGNED:
        m = tl.multiple_of(m, 8)
        n = tl.multiple_of(n, 8)
    return m, n


@triton.jit
def _strides(row_ptr, FIRST: tl.constexpr, LAYOUT: tl.constexpr, ALIGNED: tl.constexpr):
    stride_m = tl.load(row_ptr + FIRST).to(tl.int32)
    stride_n = tl.load(row_ptr + FIRST + 1).to(tl.int32)
    if ALIGNED:
        stride_m = tl.multiple_of(stride_m, 8)
        stride_n = tl.multiple_of(stride_n, 8)
    return stride_m, stride_n


@triton.jit
def _tile(rows, cols, stride_m, stride_n, LAYOUT: tl.constexpr):
    """Offsets of a tile of W or G; a unit stride is left out, so that the compiler sees it."""
    if LAYOUT == 0:
        offsets = rows * stride_m + cols
    elif LAYOUT == 1:
        offsets = rows + cols * stride_n
    else:
        offsets = rows * stride_m + cols * stride_n
    return offsets


@triton.jit
def _step_along(ptr, count, stride, UNIT: tl.constexpr):
    if UNIT:
        ptr += count
    else:
        # int64: a walk over a large matrix passes 2^31 elements.
        ptr += stride.to(tl.int64) * count
    return ptr


@triton.jit
def _halves(x):
    """Left and right half of the columns; no data moves where a thread holds both."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (A, 2, B // 2)), (0, 2, 1)))


@triton.jit
def _beside(a, b):
    A: tl.constexpr = a.shape[0]
    B: tl.constexpr = a.shape[1]
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (A, 2 * B))


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _finite(R):
    # The square decides: a value whose square overflows would leave an infinite second moment.
    return (R * R < float("inf")).to(tl.int32)


@triton.jit
def _project(
    g_ptr,
    p_ptr,
    stride_m,
    stride_n,
    strip_left,
    walk,
    P_RANK: tl.constexpr,
    rank_left,
    RANK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LEFT: tl.constexpr,
    LAYOUT: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """R of one strip: P^T G [RANK_BLOCK, BLOCK] or G P [BLOCK, RANK_BLOCK], in float32."""
    strip = tl.arange(0, BLOCK)
    steps = tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, RANK_BLOCK)
    p_tile = steps[:, None] * P_RANK + ranks[None, :]
    EVEN_RANK: tl.constexpr = P_RANK % RANK_BLOCK == 0
    if LEFT:
        g_tile = _tile(steps[:, None], strip[None, :], stride_m, stride_n, LAYOUT)
        R = tl.zeros((RANK_BLOCK, BLOCK), dtype=tl.float32)
    else:
        g_tile = _tile(strip[:, None], steps[None, :], stride_m, stride_n, LAYOUT)
        R = tl.zeros((BLOCK, RANK_BLOCK), dtype=tl.float32)
    for k in tl.range(0, walk, BLOCK_K, num_stages=STAGES):
        P_at = p_ptr + k * P_RANK
        if EVEN and EVEN_RANK:
            P = tl.load(P_at + p_tile)
        elif EVEN:
            P = tl.load(P_at + p_tile, mask=ranks[None, :] < rank_left, other=0.0)
        else:
            inside = (steps[:, None] < walk - k) & (ranks[None, :] < rank_left)
            P = tl.load(P_at + p_tile, mask=inside, other=0.0)
        if LEFT:
            G_at = _step_along(g_ptr, k, stride_m, LAYOUT == 1)
            inside = (steps[:, None] < walk - k) & (strip[None, :] < strip_left)
        else:
            G_at = _step_along(g_ptr, k, stride_n, LAYOUT == 0)
            inside = (strip[:, None] < strip_left) & (steps[None, :] < walk - k)
        if EVEN:
            G = tl.load(G_at + g_tile)
        else:
            G = tl.load(G_at + g_tile, mask=inside, other=0.0)
        if G.dtype != P.dtype:
            G = G.to(tl.float32)
            P = P.to(tl.float32)
        if LEFT:
            R = _dot(tl.trans(P), G, R, PRECISION)
        else:
            R = _dot(G, P, R, PRECISION)
    return R


@triton.jit
def _load_tile(ptr, row, col, rows, cols, A: tl.constexpr, B: tl.constexpr, MASKED: tl.constexpr):
    """The tile at (row, col) of a contiguous matrix [rows, cols]."""
    i = tl.arange(0, A)[:, None]
    j = tl.arange(0, B)[None, :]
    ptr += row.to(tl.int64) * cols + col
    if MASKED:
        x = tl.load(ptr + (i * cols + j), mask=(i < rows - row) & (j < cols - col), other=0.0)
    else:
        x = tl.load(ptr + (i * cols + j))
    return x


@triton.jit
def _store_tile(ptr, x, row, col, rows, cols, MASKED: tl.constexpr):
    i = tl.arange(0, x.shape[0])[:, None]
    j = tl.arange(0, x.shape[1])[None, :]
    ptr += row.to(tl.int64) * cols + col
    if MASKED:
        tl.store(ptr + (i * cols + j), x, mask=(i < rows - row) & (j < cols - col))
    else:
        tl.store(ptr + (i * cols + j), x)


@triton.jit
def _adam(
    R, M_old, V_old, keep, moments, row, col, rows, cols, adam, key,
    DTYPE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Updates the moments of one tile of R, which starts at (row, col), and returns N.

    keep: where moments and weights take part; elsewhere they stay as they are.
    """
    m_ptr, v_ptr = moments
    unbias1, unbias2, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = adam
    A: tl.constexpr = R.shape[0]
    B: tl.constexpr = R.shape[1]
    M = beta1 * M_old.to(tl.float32) + one_minus_beta1 * R
    V = beta2 * V_old.to(tl.float32) + one_minus_beta2 * R * R
    # NOTE: GaLore's AdamW adds eps before the bias correction; this is torch.optim.AdamW's place.
    N = tl.where(keep, (M * unbias1) / (tl.sqrt(V * unbias2) + eps), 0.0)
    # What is skipped is written back as it was: a mask along the contiguous dimension would split
    # every store into single elements.
    M = tl.where(keep, M, M_old.to(tl.float32))
    V = tl.where(keep, V, V_old.to(tl.float32))
    if M_old.dtype == tl.bfloat16:
        low, high, rng_step, stream, first_row, first_col = key
        words = (low, high, rng_step, stream)
        M = stochastic_round(M, rounding_bits(first_row + row, first_col + col, A, B, words, 1))
        V = stochastic_round(V, rounding_bits(first_row + row, first_col + col, A, B, words, 2))
    else:
        M = M.to(M_old.dtype)
        V = V.to(V_old.dtype)
    _store_tile(m_ptr, M, row, col, rows, cols, MASKED)
    _store_tile(v_ptr, V, row, col, rows, cols, MASKED)
    # As an operand of the tensor cores; float16 saturates instead of becoming infinite.
    if DTYPE == tl.float16:
        N = tl.minimum(tl.maximum(N, -65504.0), 65504.0)
    return N.to(DTYPE)


@triton.jit
def _adam_in_chunks(
    R, keep, moments, row, col, rows, cols, adam, key,
    DTYPE: tl.constexpr, LEFT: tl.constexpr, MASKED: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """N of a tile as an operand of the tensor cores, in one, two or four chunks of its columns.

    R and both its moments at once would not fit in registers.
    """
    if CHUNKS == 1:
        M = _load_tile(moments[0], row, col, rows, cols, R.shape[0], R.shape[1], MASKED)
        V = _load_tile(moments[1], row, col, rows, cols, R.shape[0], R.shape[1], MASKED)
        if LEFT:
            keep = tl.min(_finite(R), axis=0, keep_dims=True) != 0
        return _adam(R, M, V, keep, moments, row, col, rows, cols, adam, key, DTYPE, MASKED)
    else:
        HALF: tl.constexpr = R.shape[1] // 2
        MORE: tl.constexpr = CHUNKS // 2
        R0, R1 = _halves(R)
        N0 = _adam_in_chunks(
            R0, keep, moments, row, col, rows, cols, adam, key, DTYPE, LEFT, MASKED, MORE
        )
        N1 = _adam_in_chunks(
            R1, keep, moments, row, col + HALF, rows, cols, adam, key, DTYPE, LEFT, MASKED, MORE
        )
        return _beside(N0, N1)


# How a tile of W meets the product that updates it. Rows and columns of the product stand for
# others, so that the eight neighbours which one thread loads, stores and rounds by one call of the
# generator are those that the tensor cores of sm_90 give it, and nothing passes through shared
# memory: WARPS warps below each other, BESIDE of them beside each other. WARPS = 0: as they are.


@triton.jit
def _row_of(i, WARPS: tl.constexpr):
    """Row of the tile that row i of the product stands for."""
    if WARPS > 0:
        inner = i // 8 % 2 * (8 * WARPS) + i // 16 % WARPS * 8 + i % 8
        i = i // (16 * WARPS) * (16 * WARPS) + inner
    return i


@triton.jit
def _col_of(j, WARPS: tl.constexpr):
    """Column of the tile that column j of the product stands for."""
    if WARPS > 0:
        j = j // 32 * 32 + j // 2 % 4 * 8 + j // 8 % 4 * 2 + j % 2
    return j


@triton.jit
def _in_pieces(U, WARPS: tl.constexpr, BESIDE: tl.constexpr):
    """The product as pieces of the tile [a, X, b], 32 columns wide if WARPS > 0."""
    A: tl.constexpr = U.shape[0]
    B: tl.constexpr = U.shape[1]
    if WARPS > 0:
        HIGH: tl.constexpr = A // (16 * WARPS)
        EACH: tl.constexpr = B // (32 * BESIDE)
        U = tl.reshape(U, (HIGH, WARPS, 2, 8, BESIDE, EACH, 4, 4, 2))
        U = tl.permute(U, (1, 3, 0, 2, 5, 4, 7, 6, 8))
        U = tl.reshape(U, (8 * WARPS, A // (8 * WARPS) * (B // 32), 32))
    else:
        U = tl.reshape(U, (A, 1, B))
    return U


@triton.jit
def _places(
    A: tl.constexpr, B: tl.constexpr, WARPS: tl.constexpr, BESIDE: tl.constexpr,
    PART: tl.constexpr = 0, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """Of the pieces of a tile [A, B]: rows [a, X, 1], columns [1, X, b] and columns // 8.

    PARTS: Only those of one part of the X.
    """
    if WARPS > 0:
        ACROSS: tl.constexpr = B // 32
        SOME: tl.constexpr = A // (8 * WARPS) * ACROSS // PARTS
        x = PART * SOME + tl.arange(0, SOME)[None, :, None]
        row = x // ACROSS * (8 * WARPS) + tl.arange(0, 8 * WARPS)[:, None, None]
        x = x % BESIDE * (ACROSS // BESIDE) + x % ACROSS // BESIDE
        col = x * 32 + tl.arange(0, 32)[None, None, :]
        group = x * 4 + tl.arange(0, 4)[None, None, :]
    else:
        row = tl.arange(0, A)[:, None, None]
        col = tl.arange(0, B)[None, None, :]
        group = tl.arange(0, B // 8)[None, None, :]
    return row, col, group


@triton.jit
def _two_parts(pieces):
    """First and second half of the pieces of a tile; no data moves."""
    A: tl.constexpr = pieces.shape[0]
    X: tl.constexpr = pieces.shape[1]
    B: tl.constexpr = pieces.shape[2]
    return tl.split(tl.permute(tl.reshape(pieces, (A, 2, X // 2, B)), (0, 2, 3, 1)))


@triton.jit
def _moments_of(
    row_ptr, rng_step_ptr, hyper, M_DTYPE: tl.constexpr, LEFT: tl.constexpr, ALIGNED: tl.constexpr
):
    """Pointers to a matrix' moments, Adam's scalars at its step, and the key of its random bits."""
    beta1, one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps, low, high = hyper
    m_ptr = pointer(row_ptr, _M, M_DTYPE, ALIGNED)
    v_ptr = pointer(row_ptr, _V, M_DTYPE, ALIGNED)
    t = tl.load(pointer(row_ptr, _T, tl.float32, False))
    unbias1 = 1.0 / bias_correction(t, log_beta1)
    unbias2 = 1.0 / bias_correction(t, log_beta2)
    adam = (unbias1, unbias2, beta1, one_minus_beta1, beta2, one_minus_beta2, eps)
    rng_step = tl.load(rng_step_ptr).to(tl.uint32)
    # The moments begin where the strip does; along the ranks they are whole.
    first_row = _field(row_ptr, _FIRST_ROW).to(tl.int32)
    first_col = _field(row_ptr, _FIRST_COL).to(tl.int32)
    if LEFT:
        first_row = first_row * 0
    else:
        first_col = first_col * 0
    stream = _field(row_ptr, _STREAM).to(tl.uint32)
    key = (low, high, rng_step, stream, first_row, first_col)
    return (m_ptr, v_ptr), adam, key


@triton.jit
def _note_lines(
    keep, row_ptr, scratch_ptr, nonfinite_ptr, strip_first, strip_left, LEFT: tl.constexpr
):
    """Writes which lines of a strip take part, and whether any does not."""
    skipped = tl.min(tl.min(keep.to(tl.int32), axis=0), axis=0) == 0
    tl.store(nonfinite_ptr + _field(row_ptr, _INDEX), 1, mask=skipped)
    if LEFT:
        line = tl.arange(0, keep.shape[1])[None, :]
    else:
        line = tl.arange(0, keep.shape[0])[:, None]
    kept_ptr = _place(scratch_ptr, row_ptr, _KEPT, tl.int8) + strip_first
    tl.store(kept_ptr + line, keep.to(tl.int8), mask=line < strip_left)


@triton.jit
def _store_n(
    N, row_ptr, scratch_ptr, strip_first, strip_left, rank_first, RANK: tl.constexpr,
    LEFT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Writes N, or N^T on the left side: a line of the strip, then its ranks."""
    i = tl.arange(0, N.shape[0])[:, None]
    j = tl.arange(0, N.shape[1])[None, :]
    n_ptr = _place(scratch_ptr, row_ptr, _N, N.dtype) + strip_first.to(tl.int64) * RANK + rank_first
    if LEFT:
        line, rank = j, i
    else:
        line, rank = i, j
    if MASKED:
        inside = (line < strip_left) & (rank < RANK - rank_first)
        tl.store(n_ptr + line * RANK + rank, N, mask=inside)
    else:
        tl.store(n_ptr + line * RANK + rank, N)


@triton.jit
def _project_and_step(
    row_ptr, strip_first, grads_ptr, scratch_ptr, nonfinite_ptr, rng_step_ptr, hyper,
    G_DTYPE: tl.constexpr, P_DTYPE: tl.constexpr, M_DTYPE: tl.constexpr, LEFT: tl.constexpr,
    LAYOUT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m, n = _sizes(row_ptr, ALIGNED)
    MASKED: tl.constexpr = (not EVEN) or RANK != RANK_BLOCK
    moments, adam, key = _moments_of(row_ptr, rng_step_ptr, hyper, M_DTYPE, LEFT, ALIGNED)
    p_ptr = pointer(row_ptr, _P, P_DTYPE, ALIGNED)
    g_ptr = pointer(grads_ptr + _field(row_ptr, _INDEX), 0, G_DTYPE, ALIGNED)
    stride_m, stride_n = _strides(row_ptr, _G_STRIDE_M, LAYOUT, ALIGNED)
    first = strip_first.to(tl.int64)
    zero = strip_first * 0
    if LEFT:
        rows, cols, row, col = RANK, n, zero, strip_first
        walk, strip_left = m, n - strip_first
        g_ptr = _step_along(g_ptr, first, stride_n, LAYOUT == 0)
    else:
        rows, cols, row, col = m, RANK, strip_first, zero
        walk, strip_left = n, m - strip_first
        g_ptr = _step_along(g_ptr, first, stride_m, LAYOUT == 1)
    R = _project(
        g_ptr, p_ptr, stride_m, stride_n, strip_left, walk, RANK, RANK,
        RANK_BLOCK, BLOCK, BLOCK_K, LEFT, LAYOUT, EVEN, PRECISION, STAGES,
    )  # fmt: skip
    keep = tl.min(_finite(R), axis=0 if LEFT else 1, keep_dims=True) != 0
    N = _adam_in_chunks(
        R, keep, moments, row, col, rows, cols, adam, key, P_DTYPE, LEFT, MASKED, CHUNKS
    )
    _note_lines(keep, row_ptr, scratch_ptr, nonfinite_ptr, strip_first, strip_left, LEFT)
    _store_n(N, row_ptr, scratch_ptr, strip_first, strip_left, 0, RANK, LEFT, MASKED)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _project_and_step_kernel(
    table_ptr,
    tiles_ptr,
    grads_ptr,
    scratch_ptr,
    nonfinite_ptr,
    rng_step_ptr,
    beta1,
    one_minus_beta1,
    log_beta1,
    beta2,
    one_minus_beta2,
    log_beta2,
    eps,
    seed_low,
    seed_high,
    FIELDS: tl.constexpr,
    G_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    SIDES: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """M, V and N of one strip from its gradient; R stays in registers, the basis streams from L2.

        R = P^T G (left) or G P (right)
        M <- b1 M + (1 - b1) R,  V <- b2 V + (1 - b2) R*R
        N = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)

    Program i takes the strip tiles[i] = (matrix, first strip element, ., .).
    """
    tile_ptr, row_ptr = _program(table_ptr, tiles_ptr, FIELDS)
    strip_first = tl.multiple_of(tl.load(tile_ptr + 1), BLOCK)
    hyper = (
        beta1, one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps, seed_low,
        seed_high,
    )  # fmt: skip
    if _on_left(row_ptr, SIDES):
        _project_and_step(
            row_ptr, strip_first, grads_ptr, scratch_ptr, nonfinite_ptr, rng_step_ptr, hyper,
            G_DTYPE, P_DTYPE, M_DTYPE, True, LAYOUT, ALIGNED, EVEN, PRECISION, RANK, RANK_BLOCK,
            BLOCK, BLOCK_K, CHUNKS, STAGES,
        )  # fmt: skip
    else:
        _project_and_step(
            row_ptr, strip_first, grads_ptr, scratch_ptr, nonfinite_ptr, rng_step_ptr, hyper,
            G_DTYPE, P_DTYPE, M_DTYPE, False, LAYOUT, ALIGNED, EVEN, PRECISION, RANK, RANK_BLOCK,
            BLOCK, BLOCK_K, CHUNKS, STAGES,
        )  # fmt: skip


@triton.jit
def _step_given(
    row_ptr, strip_first, grads_ptr, scratch_ptr, nonfinite_ptr, rng_step_ptr, hyper,
    R_DTYPE: tl.constexpr, P_DTYPE: tl.constexpr, M_DTYPE: tl.constexpr, LEFT: tl.constexpr,
    GIVEN: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    m, n = _sizes(row_ptr, ALIGNED)
    MASKED: tl.constexpr = (not EVEN) or RANK != RANK_BLOCK
    moments, adam, key = _moments_of(row_ptr, rng_step_ptr, hyper, M_DTYPE, LEFT, ALIGNED)
    if GIVEN:
        r_ptr = pointer(grads_ptr + _field(row_ptr, _INDEX), 0, R_DTYPE, ALIGNED)
    else:
        r_ptr = _place(scratch_ptr, row_ptr, _R, R_DTYPE)
    zero = strip_first * 0
    if LEFT:
        # In two passes: a strip is wide for the memory's sake, and R of all ranks would not fit.
        keep = tl.full((1, BLOCK), 1, dtype=tl.int1)
        for rank in tl.range(0, RANK_BLOCK, RANKS):
            R = _load_tile(r_ptr, zero + rank, strip_first, RANK, n, RANKS, BLOCK, MASKED)
            keep = keep & (tl.min(_finite(R.to(tl.float32)), axis=0, keep_dims=True) != 0)
        _note_lines(keep, row_ptr, scratch_ptr, nonfinite_ptr, strip_first, n - strip_first, LEFT)
        for rank in tl.range(0, RANK_BLOCK, RANKS):
            row = zero + rank
            R = _load_tile(r_ptr, row, strip_first, RANK, n, RANKS, BLOCK, MASKED)
            M = _load_tile(moments[0], row, strip_first, RANK, n, RANKS, BLOCK, MASKED)
            V = _load_tile(moments[1], row, strip_first, RANK, n, RANKS, BLOCK, MASKED)
            N = _adam(
                R.to(tl.float32), M, V, keep, moments, row, strip_first, RANK, n, adam, key,
                P_DTYPE, MASKED,
            )  # fmt: skip
            _store_n(
                N, row_ptr, scratch_ptr, strip_first, n - strip_first, rank, RANK, LEFT, MASKED
            )
    else:
        # All three before the first is looked at: they wait for the memory together.
        R = _load_tile(r_ptr, strip_first, zero, m, RANK, BLOCK, RANK_BLOCK, MASKED)
        M = _load_tile(moments[0], strip_first, zero, m, RANK, BLOCK, RANK_BLOCK, MASKED)
        V = _load_tile(moments[1], strip_first, zero, m, RANK, BLOCK, RANK_BLOCK, MASKED)
        R = R.to(tl.float32)
        keep = tl.min(_finite(R), axis=1, keep_dims=True) != 0
        N = _adam(R, M, V, keep, moments, strip_first, zero, m, RANK, adam, key, P_DTYPE, MASKED)
        _note_lines(keep, row_ptr, scratch_ptr, nonfinite_ptr, strip_first, m - strip_first, LEFT)
        _store_n(N, row_ptr, scratch_ptr, strip_first, m - strip_first, 0, RANK, LEFT, MASKED)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _step_given_kernel(
    table_ptr,
    tiles_ptr,
    grads_ptr,
    scratch_ptr,
    nonfinite_ptr,
    rng_step_ptr,
    beta1,
    one_minus_beta1,
    log_beta1,
    beta2,
    one_minus_beta2,
    log_beta2,
    eps,
    seed_low,
    seed_high,
    FIELDS: tl.constexpr,
    R_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    SIDES: tl.constexpr,
    GIVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    LEFT_BLOCK: tl.constexpr,
    LEFT_RANKS: tl.constexpr,
):
    """M, V and N of one strip, R in scratch memory or given (GIVEN); tiles as when projecting."""
    tile_ptr, row_ptr = _program(table_ptr, tiles_ptr, FIELDS)
    strip_first = tl.load(tile_ptr + 1)
    hyper = (
        beta1, one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps, seed_low,
        seed_high,
    )  # fmt: skip
    if _on_left(row_ptr, SIDES):
        strip_first = tl.multiple_of(strip_first, LEFT_BLOCK)
        _step_given(
            row_ptr, strip_first, grads_ptr, scratch_ptr, nonfinite_ptr, rng_step_ptr, hyper,
            R_DTYPE, P_DTYPE, M_DTYPE, True, GIVEN, ALIGNED, EVEN, RANK, RANK_BLOCK, LEFT_BLOCK,
            LEFT_RANKS,
        )  # fmt: skip
    else:
        strip_first = tl.multiple_of(strip_first, BLOCK)
        _step_given(
            row_ptr, strip_first, grads_ptr, scratch_ptr, nonfinite_ptr, rng_step_ptr, hyper,
            R_DTYPE, P_DTYPE, M_DTYPE, False, GIVEN, ALIGNED, EVEN, RANK, RANK_BLOCK, BLOCK,
            RANK_BLOCK,
        )  # fmt: skip


@triton.jit
def _project_program(
    row_ptr,
    strip_first,
    rank_first,
    grads_ptr,
    scratch_ptr,
    G_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    LEFT: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    m, n = _sizes(row_ptr, ALIGNED)
    g_ptr = pointer(grads_ptr + _field(row_ptr, _INDEX), 0, G_DTYPE, ALIGNED)
    p_ptr = pointer(row_ptr, _P, P_DTYPE, ALIGNED) + rank_first
    r_ptr = _place(scratch_ptr, row_ptr, _R, tl.float32)
    stride_m, stride_n = _strides(row_ptr, _G_STRIDE_M, LAYOUT, ALIGNED)
    first = strip_first.to(tl.int64)
    if LEFT:
        g_ptr = _step_along(g_ptr, first, stride_n, LAYOUT == 0)
        strip_left, walk = n - strip_first, m
    else:
        g_ptr = _step_along(g_ptr, first, stride_m, LAYOUT == 1)
        strip_left, walk = m - strip_first, n
    R = _project(
        g_ptr, p_ptr, stride_m, stride_n, strip_left, walk, RANK,
        RANK - rank_first, RANK_BLOCK, BLOCK, BLOCK_K, LEFT, LAYOUT, EVEN, PRECISION, STAGES,
    )  # fmt: skip
    if LEFT:
        i, j = rank_first + tl.arange(0, RANK_BLOCK), strip_first + tl.arange(0, BLOCK)
        tile = i.to(tl.int64)[:, None] * n + j[None, :]
        tl.store(r_ptr + tile, R, mask=(i[:, None] < RANK) & (j[None, :] < n))
    else:
        i, j = strip_first + tl.arange(0, BLOCK), rank_first + tl.arange(0, RANK_BLOCK)
        tile = i.to(tl.int64)[:, None] * RANK + j[None, :]
        tl.store(r_ptr + tile, R, mask=(i[:, None] < m) & (j[None, :] < RANK))


@triton.jit
def _project_kernel(
    table_ptr,
    tiles_ptr,
    grads_ptr,
    scratch_ptr,
    FIELDS: tl.constexpr,
    G_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    SIDES: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """R = P^T G or G P into scratch, for ranks whose R does not fit in one program's registers.

    Program i takes tiles[i] = (matrix, first strip element, first rank, .).
    """
    tile_ptr, row_ptr = _program(table_ptr, tiles_ptr, FIELDS)
    strip_first = tl.multiple_of(tl.load(tile_ptr + 1), BLOCK)
    rank_first = tl.multiple_of(tl.load(tile_ptr + 2), RANK_BLOCK)
    if _on_left(row_ptr, SIDES):
        _project_program(
            row_ptr, strip_first, rank_first, grads_ptr, scratch_ptr, G_DTYPE, P_DTYPE, True,
            LAYOUT, ALIGNED, EVEN, PRECISION, RANK, RANK_BLOCK, BLOCK, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        _project_program(
            row_ptr, strip_first, rank_first, grads_ptr, scratch_ptr, G_DTYPE, P_DTYPE, False,
            LAYOUT, ALIGNED, EVEN, PRECISION, RANK, RANK_BLOCK, BLOCK, BLOCK_K, STAGES,
        )  # fmt: skip


@triton.jit
def _update_tile(
    U, W, row, col, group, first_row, first_col, rows_left, cols_left, kept_ptr, by_row, decay,
    step_size, key, W_DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, FLIPPED: tl.constexpr,
    SKIPS: tl.constexpr,
):  # fmt: skip
    """New values of a tile of W, in its dtype."""
    old = W.to(tl.float32)
    # NOTE: GaLore's AdamW decays after the update; this is torch.optim.AdamW's order.
    new = old * decay - step_size * U
    if SKIPS:
        # The lines of a strip are W's rows or columns.
        some_row = row < tl.where(by_row, rows_left, 0)
        some_col = col < tl.where(by_row, 0, cols_left)
        of_row = tl.load(kept_ptr + first_row + row, mask=some_row, other=1)
        of_col = tl.load(kept_ptr + first_col + col, mask=some_col, other=1)
        new = tl.where((of_row != 0) & (of_col != 0), new, old)
    if STOCHASTIC:
        low, high, rng_step, stream, row_offset, col_offset = key
        key = (low, high, rng_step, stream)
        first_row += row_offset
        first_col += col_offset
        if FLIPPED:
            A: tl.constexpr = U.shape[0]
            B: tl.constexpr = U.shape[2]
            bits = tl.trans(rounding_bits(first_col, first_row, B, A, key, 0))
            bits = tl.reshape(bits, (A, 1, B))
        else:
            zeros = tl.zeros((row.shape[0], col.shape[1], group.shape[2]), dtype=tl.int32)
            w0, w1, w2, w3 = counter_words(
                zeros + (first_row + row), zeros + (first_col // 8 + group), key, 0
            )
            bits = tl.reshape(eight_halves(w0, w1, w2, w3), U.shape)
        new = stochastic_round(new, bits)
    return new.to(W_DTYPE)


@triton.jit
def _prefetch(ptr):
    """Asks for lines of memory to be brought into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [ptr.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _walk_down(
    w_ptr, x_ptr, y_ptr, kept_ptr, stride, stride_n, first_col, first_row, row_end, cols_left,
    by_row, decay, step_size, key, W_DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr,
    FLIPPED: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr, RESIDENT: tl.constexpr, WARPS: tl.constexpr, BESIDE: tl.constexpr,
    AHEAD: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    row, col, group = _places(ROWS, COLS, WARPS, BESIDE)
    w_tile = _tile(row, col, stride, stride_n, UNIT)
    w_group = _tile(row, group * 8, stride, stride_n, UNIT)
    ranks = tl.arange(0, RANK_BLOCK)[None, :]
    x_row = _row_of(tl.arange(0, ROWS), WARPS)[:, None]
    y_row = _col_of(tl.arange(0, COLS), WARPS)[:, None]
    x_tile = x_row * RANK + ranks
    y_tile = y_row * RANK + ranks
    WHOLE: tl.constexpr = EVEN and RANK % RANK_BLOCK == 0
    stride_m = stride
    stride = stride.to(tl.int64)
    if RESIDENT:
        if WHOLE:
            Y = tl.load(y_ptr + y_tile)
        else:
            Y = tl.load(y_ptr + y_tile, mask=(y_row < cols_left) & (ranks < RANK), other=0.0)
        for k in tl.range(first_row, row_end, ROWS, num_stages=STAGES):
            W_at = w_ptr + stride * k
            left = row_end - k
            if EVEN:
                W = tl.load(W_at + w_tile)
                if AHEAD > 0:
                    _prefetch(
                        w_ptr + stride * tl.minimum(k + AHEAD * ROWS, row_end - ROWS) + w_group
                    )
            else:
                W = tl.load(W_at + w_tile, mask=(row < left) & (col < cols_left), other=0.0)
            X_at = x_ptr + k * RANK
            if WHOLE:
                X = tl.load(X_at + x_tile)
            else:
                X = tl.load(X_at + x_tile, mask=(x_row < left) & (ranks < RANK), other=0.0)
            U = tl.dot(X, tl.trans(Y), input_precision=PRECISION)
            U = _in_pieces(U, WARPS, BESIDE)
            # In parts where a thread would not have registers for all its random bits at once.
            PARTS: tl.constexpr = 2 if STOCHASTIC and WARPS > 0 and U.shape[1] > 1 else 1
            if PARTS == 2:
                U0, U1 = _two_parts(U)
                W0, W1 = _two_parts(W)
            else:
                U0, U1, W0, W1 = U, U, W, W
            for part in tl.static_range(PARTS):
                some_row, some_col, some_group = _places(ROWS, COLS, WARPS, BESIDE, part, PARTS)
                new = _update_tile(
                    U0 if part == 0 else U1, W0 if part == 0 else W1, some_row, some_col,
                    some_group, k, first_col, left, cols_left, kept_ptr, by_row, decay, step_size,
                    key, W_DTYPE, STOCHASTIC, FLIPPED, SKIPS,
                )  # fmt: skip
                part_at = W_at + _tile(some_row, some_col, stride_m, stride_n, UNIT)
                if EVEN:
                    tl.store(part_at, new)
                else:
                    tl.store(part_at, new, mask=(some_row < left) & (some_col < cols_left))
    else:
        W_at = w_ptr + stride * first_row
        x_ptr += first_row.to(tl.int64) * RANK
        left = row_end - first_row
        U = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for rank in tl.range(0, RANK, RANK_BLOCK, num_stages=STAGES):
            if WHOLE:
                X = tl.load(x_ptr + rank + x_tile)
                Y = tl.load(y_ptr + rank + y_tile)
            else:
                some = ranks < RANK - rank
                X = tl.load(x_ptr + rank + x_tile, mask=some & (x_row < left), other=0.0)
                Y = tl.load(y_ptr + rank + y_tile, mask=some & (y_row < cols_left), other=0.0)
            U = tl.dot(X, tl.trans(Y), U, input_precision=PRECISION)
        U = _in_pieces(U, WARPS, BESIDE)
        # As above; the product leaves fewer registers here.
        PARTS: tl.constexpr = 4 if WARPS > 0 and U.shape[1] > 3 else 1
        if PARTS == 4:
            above, below = _two_parts(U)
            U0, U1 = _two_parts(above)
            U2, U3 = _two_parts(below)
        else:
            U0, U1, U2, U3 = U, U, U, U
        for part in tl.static_range(PARTS):
            some_row, some_col, some_group = _places(ROWS, COLS, WARPS, BESIDE, part, PARTS)
            part_at = W_at + _tile(some_row, some_col, stride_m, stride_n, UNIT)
            inside = (some_row < left) & (some_col < cols_left)
            if EVEN:
                W = tl.load(part_at)
            else:
                W = tl.load(part_at, mask=inside, other=0.0)
            new = _update_tile(
                (U0 if part == 0 else U1) if part < 2 else (U2 if part == 2 else U3), W, some_row,
                some_col, some_group, first_row, first_col, left, cols_left, kept_ptr, by_row,
                decay, step_size, key, W_DTYPE, STOCHASTIC, FLIPPED, SKIPS,
            )  # fmt: skip
            if EVEN:
                tl.store(part_at, new)
            else:
                tl.store(part_at, new, mask=inside)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _update_kernel(
    table_ptr,
    tiles_ptr,
    scratch_ptr,
    lr_ptr,
    nonfinite_ptr,
    rng_step_ptr,
    weight_decay,
    scale,
    seed_low,
    seed_high,
    FIELDS: tl.constexpr,
    W_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDENT: tl.constexpr,
    WARPS: tl.constexpr,
    BESIDE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """W <- (1 - lr wd) W - lr scale X Y^T; X, Y are P and N (left) or N and P.

    Program i takes columns [tiles[i].1, + COLS) of matrix tiles[i].0 and walks down its rows
    [tiles[i].2, tiles[i].3): programs that run at a time share rows, which memory likes. RESIDENT:
    the rows of Y stay in shared memory and those of X stream; otherwise each tile loops over ranks.
    Column-major matrices are taken as the row-major ones that they are in memory.
    """
    tile_ptr, row_ptr = _program(table_ptr, tiles_ptr, FIELDS)
    first_col = tl.multiple_of(tl.load(tile_ptr + 1), COLS)
    first_row = tl.multiple_of(tl.load(tile_ptr + 2), ROWS)
    row_end = tl.load(tile_ptr + 3)
    FLIPPED: tl.constexpr = LAYOUT == 1
    UNIT: tl.constexpr = 0 if LAYOUT == 1 else LAYOUT
    m, n = _sizes(row_ptr, ALIGNED)
    cols_left = (m if FLIPPED else n) - first_col
    stride_m, stride_n = _strides(row_ptr, _W_STRIDE_M, LAYOUT, ALIGNED)
    if FLIPPED:
        stride_m = stride_n
    left = _field(row_ptr, _LEFT)
    by_row = left != 0 if FLIPPED else left == 0
    n_address = scratch_ptr.to(tl.int64) + _field(row_ptr, _N)
    p_address = _field(row_ptr, _P)
    x_ptr = tl.where(by_row, n_address, p_address).to(tl.pointer_type(P_DTYPE))
    y_ptr = tl.where(by_row, p_address, n_address).to(tl.pointer_type(P_DTYPE))
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
        y_ptr = tl.multiple_of(y_ptr, 16)
    y_ptr += first_col.to(tl.int64) * RANK
    w_ptr = pointer(row_ptr, _W, W_DTYPE, ALIGNED)
    w_ptr = _step_along(w_ptr, first_col.to(tl.int64), stride_n, UNIT == 0)
    kept_ptr = _place(scratch_ptr, row_ptr, _KEPT, tl.int8)
    lr = tl.load(lr_ptr).to(tl.float32)
    decay, step_size = 1.0 - lr * weight_decay, lr * scale
    stream = _field(row_ptr, _STREAM).to(tl.uint32)
    row_offset = _field(row_ptr, _FIRST_COL if FLIPPED else _FIRST_ROW).to(tl.int32)
    col_offset = _field(row_ptr, _FIRST_ROW if FLIPPED else _FIRST_COL).to(tl.int32)
    rng_step = tl.load(rng_step_ptr).to(tl.uint32)
    key = (seed_low, seed_high, rng_step, stream, row_offset, col_offset)
    # Lines are skipped in one matrix of thousands: the others need not look for them.
    if tl.load(nonfinite_ptr + _field(row_ptr, _INDEX)) != 0:
        _walk_down(
            w_ptr, x_ptr, y_ptr, kept_ptr, stride_m, stride_n, first_col, first_row, row_end,
            cols_left, by_row, decay, step_size, key, W_DTYPE, STOCHASTIC, FLIPPED, UNIT, EVEN,
            PRECISION, RANK, RANK_BLOCK, ROWS, COLS, 2, RESIDENT, WARPS, BESIDE, 0, True,
        )  # fmt: skip
    else:
        _walk_down(
            w_ptr, x_ptr, y_ptr, kept_ptr, stride_m, stride_n, first_col, first_row, row_end,
            cols_left, by_row, decay, step_size, key, W_DTYPE, STOCHASTIC, FLIPPED, UNIT, EVEN,
            PRECISION, RANK, RANK_BLOCK, ROWS, COLS, STAGES, RESIDENT, WARPS, BESIDE, AHEAD, False,
        )  # fmt: skip


class Config(NamedTuple):
    """How one group of matrices is launched.

    Attributes:
        staged: Project into scratch and step the moments in a kernel of their own, as with ranks
            whose R does not fit in registers.
        block: Strip elements of a projecting program.
        block_k: Its walk step.
        chunks: Parts in which it steps the moments (1, 2 or 4).
        stages: Depth of its pipeline.
        warps: Its warps.
        cols: Columns of an updating program.
        rows: Rows of its tiles.
        walk: Rows it walks.
        update_stages: Depth of its pipeline.
        update_warps: Its warps.
        permuted: The order of its products is that of the tensor cores of sm_90.
        adam: Elements and warps of a program that only steps moments.
        registers: Most registers of an updating thread, so that more programs share a
            multiprocessor; 0 for as many as it takes.
        ahead: Tiles of W that it asks to be brought into L2 ahead of time, where it rounds to
            nearest (rounding stochastically it has no registers left for it); 0 for none.
    """

    staged: bool
    block: int
    block_k: int
    chunks: int
    stages: int
    warps: int
    cols: int
    rows: int
    walk: int
    update_stages: int
    update_warps: int
    permuted: bool = False
    adam: tuple[int, int] = (4096, 8)
    registers: int = 0
    ahead: int = 0


# Largest rank whose R one program holds in registers, and the chunk of a larger one, by itemsize.
_RANK_IN_REGISTERS = {2: 256, 4: 128}
_RANK_CHUNK = {2: 64, 4: 32}
# Columns of a program that steps moments of the left side: 256 bytes of float32.
_LEFT_LINES = 64


def _power_of_two(x: int, least: int = 16) -> int:
    return max(least, 1 << (x - 1).bit_length())


# Launch configurations by architecture family: (largest rank, configuration), the first that fits
# counts. 90: measured on an H100 (benchmarks/results/h100), over the matrices of a LLaMA-2-7B
# block; where `gluon` updates W, by its own table. The others, and what updates W at rank 128 and
# from 257 on where `gluon` does not, by reasoning: shared memory (163 KiB on 80, 99 KiB on 86, 89
# and 120, 227 KiB on 100), and registers as the compiler reports them.
_H100 = (
    (64, Config(False, 128, 128, 2, 4, 8, 128, 64, 512, 4, 8, True, registers=128)),
    (128, Config(False, 128, 128, 4, 3, 8, 64, 64, 512, 3, 8, True, registers=128, ahead=2)),
    (256, Config(True, 128, 64, 1, 4, 8, 128, 64, 1024, 3, 8, True, ahead=2)),
    (1024, Config(True, 128, 64, 1, 4, 8, 128, 128, 128, 3, 8, True, registers=128)),
)
_B200 = (
    (64, Config(True, 64, 64, 1, 3, 8, 128, 64, 512, 3, 8)),
    (128, Config(True, 128, 64, 1, 3, 8, 128, 64, 512, 3, 8)),
    (256, Config(True, 64, 64, 1, 3, 8, 128, 64, 1024, 3, 8)),
    (1024, Config(True, 64, 64, 1, 3, 8, 128, 128, 128, 3, 16)),
)
_A100 = (
    (128, Config(False, 64, 64, 4, 3, 4, 128, 64, 512, 3, 8)),
    (256, Config(True, 64, 32, 1, 3, 8, 64, 64, 512, 2, 8)),
    (1024, Config(True, 64, 32, 1, 3, 8, 64, 64, 64, 3, 4)),
)
_SMALL = (
    (128, Config(False, 64, 32, 2, 3, 8, 64, 64, 512, 2, 4)),
    (256, Config(True, 64, 32, 1, 3, 8, 64, 32, 512, 2, 4)),
    (1024, Config(True, 64, 32, 1, 3, 8, 64, 64, 64, 2, 4)),
)
_TABLES = {80: _A100, 90: _H100, 100: _B200, 103: _B200}
# float32 operands: three tf32 products each, twice the shared memory.
_FLOAT32 = Config(False, 64, 32, 1, 2, 8, 64, 32, 512, 2, 8)


def config_for(architecture: int, rank: int, itemsize: int) -> Config:
    """Launch configuration for matrices of one rank and dtype.

    Args:
        architecture: Compute capability, ten times major plus minor; 0 for none.
        rank: Rank r.
        itemsize: Bytes of an operand of the tensor cores: 2, or 4 where float32 takes part.
    """
    if itemsize == 4:
        return _FLOAT32
    for largest, config in _TABLES.get(architecture, _SMALL):
        if rank <= largest:
            return config
    return _SMALL[-1][1]


# Triton's versions that compile the Gluon kernel without spills: its language is an experiment yet
# and changes with each.
_GLUON_VERSIONS = ("3.6", "3.7", "3.8", "3.9")


@functools.cache
def gluon() -> ModuleType | None:
    """The module that updates W on sm_90, if this Triton can compile it."""
    interpreted = not isinstance(_update_kernel, triton.JITFunction)
    if interpreted or ".".join(triton.__version__.split(".")[:2]) not in _GLUON_VERSIONS:
        return None
    try:
        from . import lowrank_adam_sm90
    except (ImportError, AttributeError):
        return None
    return lowrank_adam_sm90


def _walks(
    shapes: Sequence[tuple[int, int]], cols: int, walk: int
) -> list[tuple[int, int, int, int]]:
    """Matrix, first column, first row and end of the rows of each updating program."""
    return [
        (k, s, w, min(w + walk, m))
        for k, (m, n) in enumerate(shapes)
        for w in range(0, m, walk)
        for s in range(0, n, cols)
    ]


class _Group(NamedTuple):
    """Matrices that share their launches."""

    members: list[int]
    launches: list[Launch]
    # Places of N, R and the kept flags of each matrix in the scratch memory, and its size.
    scratch: list[tuple[int, int, int]]
    scratch_size: int


def _layout(W: Tensor, G: Tensor | None) -> int:
    tensors = (W,) if G is None else (W, G)
    if all(x.stride(1) == 1 or x.shape[1] == 1 for x in tensors):
        return ROW_MAJOR
    if all(x.stride(0) == 1 or x.shape[0] == 1 for x in tensors):
        return COLUMN_MAJOR
    return STRIDED


_plans: dict[tuple, list[_Group]] = {}
_prepared: dict[tuple, Prepared] = {}
_MOST_PLANS = 16


def left_out(first_columns: Sequence[int]) -> list[int]:
    """Indices of the matrices that launches leave to the reference.

    Shards that begin within eight columns: one generator call serves eight neighbours.
    """
    return [i for i, column in enumerate(first_columns) if column % 8]


def prepare_lowrank_adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    sides: Sequence[str],
    stochastic: bool,
    seed: int,
    streams: Sequence[int],
    projected: bool = False,
    first_rows: Sequence[int] = (),
    first_columns: Sequence[int] = (),
    config: Config | None = None,
) -> Prepared | None:
    """Prepares steps on these tensors; gradients may move from step to step.

    Args beyond the op's:
        config: Launch configuration instead of the table's; W is then updated in Triton.

    Returns:
        The step of all matrices but those `left_out`, or None if there is none or the tensors are
        of a kind the kernels do not cover.
    """
    apart = tuple(left_out(first_columns))
    if len(apart) == len(params):
        return None
    device = params[0].device
    shapes = tuple(
        [
            (W.shape, W.stride(), W.dtype, G.stride(), G.dtype, P.shape, P.stride(), P.dtype,
             M.stride(), M.dtype, V.stride(), V.dtype, s, aligned((W, G, P, M, V)))
            for W, G, P, M, V, s in zip(
                params, grads, bases, exp_avgs, exp_avg_sqs, sides, strict=True
            )
        ]
    )  # fmt: skip
    key = (shapes, apart, projected, stochastic, device, config)
    groups = _plans.get(key)
    if groups is None:
        groups = _plan(
            params, grads, bases, exp_avgs, exp_avg_sqs, sides, projected, stochastic, config,
            apart=apart,
        )  # fmt: skip
        if groups is None:
            return None
        remember(_plans, key, groups, _MOST_PLANS)
    prepared = []
    for group in groups:
        rows = []
        for i, places in zip(group.members, group.scratch, strict=True):
            row = [
                x.data_ptr() for x in (params[i], bases[i], exp_avgs[i], exp_avg_sqs[i], steps[i])
            ]
            row += [*places, *params[i].shape, *params[i].stride()]
            row += (0, 0) if projected else grads[i].stride()
            row += [streams[i] & 0xFFFFFFFF, i, int(sides[i] == "left")]
            row.append(first_rows[i] if first_rows else 0)
            row.append(first_columns[i] if first_columns else 0)
            rows.append(row)
        table = upload(torch.tensor(rows, dtype=torch.int64), device)
        prepared.append((group.launches, table))
    size = max((group.scratch_size for group in groups), default=0)
    return Prepared(prepared, grads, seed, size)


def launch_lowrank_adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    nonfinite: Tensor,
    rng_step: Tensor,
    *,
    sides: Sequence[str],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    stochastic: bool,
    seed: int,
    streams: Sequence[int],
    projected: bool = False,
    first_rows: Sequence[int] = (),
    first_columns: Sequence[int] = (),
    config: Config | None = None,
) -> bool:
    """`owlore.reference.lowrank_adam_` in as few launches as the matrices allow.

    It covers all matrices but those `left_out`.

    Args beyond the op's:
        config: Launch configuration instead of the table's; W is then updated in Triton.

    Returns:
        False if the tensors are of a kind the kernels do not cover; then nothing was done.
    """
    if not params:
        return True
    key = fixed_key(
        (params, bases, exp_avgs, exp_avg_sqs, steps), projected, stochastic, seed, tuple(streams),
        tuple(sides), tuple(first_rows), tuple(first_columns), config,
    )  # fmt: skip
    prepared = _prepared.get(key)
    options = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    options["scale"] = scale
    if prepared is None or not prepared.launch(grads, lr, nonfinite, rng_step, **options):
        prepared = prepare_lowrank_adam(
            params, grads, bases, exp_avgs, exp_avg_sqs, steps, sides=sides,
            stochastic=stochastic, seed=seed, streams=streams, projected=projected,
            first_rows=first_rows, first_columns=first_columns, config=config,
        )  # fmt: skip
        if prepared is None:
            return False
        remember(_prepared, key, prepared, _MOST_PLANS)
        prepared.launch(grads, lr, nonfinite, rng_step, **options)
    return True


def scratch_bytes(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    sides: Sequence[str],
    projected: bool,
    architecture: int,
) -> int:
    """Bytes of scratch memory that a step on such tensors takes on a GPU of an architecture.

    The tensors may be on any device, "meta" too.
    """
    groups = _plan(
        params, grads, bases, exp_avgs, exp_avg_sqs, sides, projected, True, None, architecture
    )
    return max((group.scratch_size for group in groups or ()), default=0)


def _plan(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    sides: Sequence[str],
    projected: bool,
    stochastic: bool,
    config: Config | None,
    architecture: int | None = None,
    apart: Sequence[int] = (),
) -> list[_Group] | None:
    """Groups the matrices by what their launches have in common; None = not covered."""
    members: dict[tuple, list[int]] = {}
    for i, (W, G, P, M, V) in enumerate(
        zip(params, grads, bases, exp_avgs, exp_avg_sqs, strict=True)
    ):
        if i in apart:
            continue
        tensors = (W, G, P, M, V)
        if not all(x.dtype in TL_DTYPES for x in tensors) or M.dtype != V.dtype:
            return None
        if not (P.is_contiguous() and M.is_contiguous() and V.is_contiguous()):
            return None
        if projected and not G.is_contiguous():
            return None
        if W.numel() == 0 or P.shape[1] == 0:
            continue
        strides = [*W.stride(), *(() if projected else G.stride())]
        if any(not 0 <= stride < 1 << 31 for stride in strides):
            return None
        layout = _layout(W, None if projected else G)
        rank = P.shape[1]
        # The unit stride is known to the kernel; the other and the sizes must be multiples of 8.
        even = all(stride % 8 == 0 for stride in strides if stride != 1)
        even &= all(size % 8 == 0 for size in (*W.shape, rank)) and layout != STRIDED
        common = (W.dtype, G.dtype, P.dtype, M.dtype, rank, layout, even and aligned(tensors))
        members.setdefault(common, []).append(i)
    return [
        _group(indices, common, params, sides, projected, stochastic, config, architecture)
        for common, indices in members.items()
    ]


def _group(
    members: list[int],
    common: tuple,
    params: Sequence[Tensor],
    sides: Sequence[str],
    projected: bool,
    stochastic: bool,
    config: Config | None,
    architecture: int | None = None,
) -> _Group:
    w_dtype, g_dtype, p_dtype, m_dtype, rank, layout, is_aligned = common
    device = params[0].device
    if architecture is None:
        architecture = 0
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            architecture = 10 * major + minor
    narrow = p_dtype != torch.float32 and (projected or g_dtype == p_dtype)
    from_table = config is None
    if config is None:
        config = config_for(architecture, rank, 2 if narrow else 4)
    rank_block = _power_of_two(rank)
    left = [sides[i] == "left" for i in members]
    strips = [
        params[i].shape[1 if on_left else 0] for i, on_left in zip(members, left, strict=True)
    ]
    walks = [params[i].shape[0 if on_left else 1] for i, on_left in zip(members, left, strict=True)]

    def even(block: int, step: int) -> bool:
        return all(n % block == 0 for n in strips) and all(m % step == 0 for m in walks)

    def tiles(rows: list[tuple[int, int, int, int]]) -> Tensor:
        return upload(torch.tensor(rows, dtype=torch.int32), device)

    shared = {
        "FIELDS": _COLUMNS, "P_DTYPE": TL_DTYPES[p_dtype], "ALIGNED": is_aligned, "RANK": rank,
    }  # fmt: skip
    sides_present = {"SIDES": 2 if len(set(left)) == 2 else int(left[0])}
    precision = {"PRECISION": "tf32" if narrow else "tf32x3"}
    update_precision = {"PRECISION": "tf32x3" if p_dtype == torch.float32 else "tf32"}
    in_registers = rank_block <= _RANK_IN_REGISTERS[2 if narrow else 4]
    in_program = in_registers and not config.staged and not projected
    launches: list[Launch] = []
    if not projected and not in_program:
        chunk = min(rank_block, 256 if narrow else 64)
        rows = [
            (k, s, r, 0)
            for k, n in enumerate(strips)
            for s in range(0, n, config.block)
            for r in range(0, rank, chunk)
        ]
        launches.append(
            Launch(_project_kernel, tiles(rows), {
                **shared, **sides_present, **precision, "G_DTYPE": TL_DTYPES[g_dtype],
                "LAYOUT": layout, "EVEN": even(config.block, config.block_k), "RANK_BLOCK": chunk,
                "BLOCK": config.block, "BLOCK_K": config.block_k, "STAGES": config.stages,
                "num_warps": config.warps,
            })
        )  # fmt: skip
    if in_program:
        rows = [(k, s, 0, 0) for k, n in enumerate(strips) for s in range(0, n, config.block)]
        launches.append(
            Launch(_project_and_step_kernel, tiles(rows), {
                **shared, **sides_present, **precision, "G_DTYPE": TL_DTYPES[g_dtype],
                "M_DTYPE": TL_DTYPES[m_dtype], "LAYOUT": layout,
                "EVEN": even(config.block, config.block_k), "RANK_BLOCK": rank_block,
                "BLOCK": config.block, "BLOCK_K": config.block_k, "CHUNKS": config.chunks,
                "STAGES": config.stages, "num_warps": config.warps,
            })
        )  # fmt: skip
    else:
        elements, warps = config.adam
        blocks = [_LEFT_LINES if on_left else max(4, elements // rank_block) for on_left in left]
        # The left side's programs take longer: they come first.
        order = sorted(range(len(members)), key=lambda k: not left[k])
        rows = [(k, s, 0, 0) for k in order for s in range(0, strips[k], blocks[k])]
        launches.append(
            Launch(_step_given_kernel, tiles(rows), {
                **shared, **sides_present, "M_DTYPE": TL_DTYPES[m_dtype], "GIVEN": projected,
                "R_DTYPE": TL_DTYPES[g_dtype] if projected else tl.float32,
                "EVEN": all(n % block == 0 for n, block in zip(strips, blocks, strict=True)),
                "RANK_BLOCK": rank_block, "BLOCK": max(4, elements // rank_block),
                "LEFT_BLOCK": _LEFT_LINES, "LEFT_RANKS": min(rank_block, elements // _LEFT_LINES),
                "num_warps": warps,
            })
        )  # fmt: skip
    # W as it lies in memory: rows, then columns.
    shapes = [tuple(params[i].shape) for i in members]
    if layout == COLUMN_MAJOR:
        shapes = [(n, m) for m, n in shapes]
    rounds = stochastic and w_dtype == torch.bfloat16
    update = None
    plain = layout == ROW_MAJOR and is_aligned and w_dtype == p_dtype == torch.bfloat16
    if from_table and architecture == 90 and plain and (module := gluon()) is not None:
        update = module.update_launch(shapes, rank, rounds, tiles)
    walk = config.walk if in_registers else config.rows
    below = min(config.rows // 16, 8) if config.permuted and layout == ROW_MAJOR else 0
    launches.append(
        update
        or Launch(_update_kernel, tiles(_walks(shapes, config.cols, walk)), {
            **shared, **update_precision, "W_DTYPE": TL_DTYPES[w_dtype], "LAYOUT": layout,
            "STOCHASTIC": rounds,
            "EVEN": all(m % config.rows == 0 and n % config.cols == 0 for m, n in shapes),
            "RANK_BLOCK": rank_block if in_registers else _RANK_CHUNK[p_dtype.itemsize],
            "ROWS": config.rows, "COLS": config.cols, "STAGES": config.update_stages,
            "RESIDENT": in_registers, "WARPS": below,
            "BESIDE": config.update_warps // below if below else 0,
            "AHEAD": 0 if rounds else config.ahead, "num_warps": config.update_warps,
            **({"maxnreg": config.registers} if config.registers else {}),
        })
    )  # fmt: skip

    scratch: list[tuple[int, int, int]] = []
    size = 0
    for n in strips:
        places = []
        for count in (
            n * rank * p_dtype.itemsize,
            0 if projected or in_program else n * rank * 4,
            n,
        ):
            places.append(size)
            size += -(-count // 256) * 256
        scratch.append((places[0], places[1], places[2]))
    return _Group(members, launches, scratch, size)
