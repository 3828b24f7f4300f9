"""Low-rank AdamW: project, Adam, back-project, decay and update of many matrices per launch.

Letters as in `owlore.reference`: W [m, n], G its gradient, P the basis, R the gradient in the
basis, M and V its moments, N the normalised update, r the rank. A *strip* is what one program owns
of R: columns of W on the left side (P [m, r], R = P^T G [r, n]), rows of W on the right side (P
[n, r], R = G P [m, r]). Along the other dimension of W a program *walks*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TL_DTYPES,
    Launch,
    Prepared,
    Tables,
    aligned,
    bias_correction,
    fixed_key,
    pointer,
    remember,
    upload,
)
from .rounding import rounding_bits, stochastic_round

# Columns of the matrix table: pointers, sizes, strides, and what keys the random bits.
_COLUMNS = 20
_W = tl.constexpr(0)
_G = tl.constexpr(1)
_P = tl.constexpr(2)
_M = tl.constexpr(3)
_V = tl.constexpr(4)
_T = tl.constexpr(5)
_N = tl.constexpr(6)
_R = tl.constexpr(7)
_ROWS = tl.constexpr(8)
_COLS = tl.constexpr(9)
_W_STRIDE_M = tl.constexpr(10)
_W_STRIDE_N = tl.constexpr(11)
_G_STRIDE_M = tl.constexpr(12)
_G_STRIDE_N = tl.constexpr(13)
_STREAM = tl.constexpr(14)
_INDEX = tl.constexpr(15)
_LEFT = tl.constexpr(16)
_KEPT = tl.constexpr(17)

# How W and G lie in memory.
ROW_MAJOR, COLUMN_MAJOR, STRIDED = 0, 1, 2


@triton.jit
def _field(row_ptr, COLUMN: tl.constexpr):
    return tl.load(row_ptr + COLUMN)


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
        offsets = rows[:, None] * stride_m + cols[None, :]
    elif LAYOUT == 1:
        offsets = rows[:, None] + cols[None, :] * stride_n
    else:
        offsets = rows[:, None] * stride_m + cols[None, :] * stride_n
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
        g_tile = _tile(steps, strip, stride_m, stride_n, LAYOUT)
        R = tl.zeros((RANK_BLOCK, BLOCK), dtype=tl.float32)
    else:
        g_tile = _tile(strip, steps, stride_m, stride_n, LAYOUT)
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
def _as_operand(N, DTYPE: tl.constexpr):
    """N as an operand of the tensor cores; float16 saturates instead of becoming infinite."""
    if DTYPE == tl.float16:
        N = tl.minimum(tl.maximum(N, -65504.0), 65504.0)
    return N.to(DTYPE)


@triton.jit
def _adam(
    R, keep, moments, row, col, rows, cols, adam, key, LEFT: tl.constexpr, MASKED: tl.constexpr
):
    """Updates the moments of one tile of R, which starts at (row, col), and returns N."""
    m_ptr, v_ptr = moments
    unbias1, unbias2, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = adam
    A: tl.constexpr = R.shape[0]
    B: tl.constexpr = R.shape[1]
    if LEFT:
        keep = tl.min(_finite(R), axis=0, keep_dims=True) != 0
    i = tl.arange(0, A) + row
    j = tl.arange(0, B) + col
    tile = i.to(tl.int64)[:, None] * cols + j[None, :]
    if MASKED:
        inside = (i[:, None] < rows) & (j[None, :] < cols)
        M_old = tl.load(m_ptr + tile, mask=inside, other=0.0)
        V_old = tl.load(v_ptr + tile, mask=inside, other=0.0)
    else:
        M_old = tl.load(m_ptr + tile)
        V_old = tl.load(v_ptr + tile)
    M = beta1 * M_old.to(tl.float32) + one_minus_beta1 * R
    V = beta2 * V_old.to(tl.float32) + one_minus_beta2 * R * R
    # NOTE: GaLore's AdamW adds eps before the bias correction; this is torch.optim.AdamW's place.
    N = tl.where(keep, (M * unbias1) / (tl.sqrt(V * unbias2) + eps), 0.0)
    # What is skipped is written back as it was: a mask along the contiguous dimension would split
    # every store into single elements.
    M = tl.where(keep, M, M_old.to(tl.float32))
    V = tl.where(keep, V, V_old.to(tl.float32))
    if M_old.dtype == tl.bfloat16:
        M = stochastic_round(M, rounding_bits(row, col, A, B, key, 1))
        V = stochastic_round(V, rounding_bits(row, col, A, B, key, 2))
    else:
        M = M.to(M_old.dtype)
        V = V.to(V_old.dtype)
    if MASKED:
        tl.store(m_ptr + tile, M, mask=inside)
        tl.store(v_ptr + tile, V, mask=inside)
    else:
        tl.store(m_ptr + tile, M)
        tl.store(v_ptr + tile, V)
    return N


@triton.jit
def _adam_in_chunks(
    R, keep, moments, row, col, rows, cols, adam, key,
    DTYPE: tl.constexpr, LEFT: tl.constexpr, MASKED: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """N of a tile as an operand of the tensor cores, in one, two or four chunks of its columns.

    R and both its moments at once would not fit in registers.
    """
    if CHUNKS == 1:
        N = _adam(R, keep, moments, row, col, rows, cols, adam, key, LEFT, MASKED)
        return _as_operand(N, DTYPE)
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


@triton.jit
def _updated(U, W, row, col, decay, step_size, key, STOCHASTIC: tl.constexpr):
    """New values of a tile of W at (row, col), in W's dtype."""
    A: tl.constexpr = U.shape[0]
    B: tl.constexpr = U.shape[1]
    # NOTE: GaLore's AdamW decays after the update; this is torch.optim.AdamW's order.
    new = W.to(tl.float32) * decay - step_size * U
    if STOCHASTIC:
        new = stochastic_round(new, rounding_bits(row, col, A, B, key, 0))
    return new.to(W.dtype)


@triton.jit
def _walk_update(
    N,
    w_ptr,
    p_ptr,
    stride_m,
    stride_n,
    strip_first,
    strip_left,
    walk_first,
    walk_end,
    decay,
    step_size,
    key,
    RANK: tl.constexpr,
    LEFT: tl.constexpr,
    LAYOUT: tl.constexpr,
    EVEN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """W <- decay W - step_size (P N or N P^T) over [walk_first, walk_end) of one strip.

    N stays where it is; P streams from L2 and W through the pipeline. `decay` is [1, BLOCK] or
    [BLOCK, 1]: one, with N zero, where the strip is skipped, which leaves W bit-identical. w_ptr
    stands at the strip's first element, p_ptr at the basis' first.
    """
    RANK_BLOCK: tl.constexpr = N.shape[0] if LEFT else N.shape[1]
    BLOCK: tl.constexpr = N.shape[1] if LEFT else N.shape[0]
    strip = tl.arange(0, BLOCK)
    steps = tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, RANK_BLOCK)
    p_tile = steps[:, None] * RANK + ranks[None, :]
    if LEFT:
        w_tile = _tile(steps, strip, stride_m, stride_n, LAYOUT)
    else:
        w_tile = _tile(strip, steps, stride_m, stride_n, LAYOUT)
    for k in tl.range(walk_first, walk_end, BLOCK_K, num_stages=STAGES):
        P_at = p_ptr + k * RANK
        if EVEN and RANK == RANK_BLOCK:
            P = tl.load(P_at + p_tile)
        elif EVEN:
            P = tl.load(P_at + p_tile, mask=ranks[None, :] < RANK, other=0.0)
        else:
            inside = (steps[:, None] < walk_end - k) & (ranks[None, :] < RANK)
            P = tl.load(P_at + p_tile, mask=inside, other=0.0)
        if LEFT:
            W_at = _step_along(w_ptr, k, stride_m, LAYOUT == 1)
            inside = (steps[:, None] < walk_end - k) & (strip[None, :] < strip_left)
        else:
            W_at = _step_along(w_ptr, k, stride_n, LAYOUT == 0)
            inside = (strip[:, None] < strip_left) & (steps[None, :] < walk_end - k)
        if EVEN:
            W = tl.load(W_at + w_tile)
        else:
            W = tl.load(W_at + w_tile, mask=inside, other=0.0)
        if LEFT:
            U = tl.dot(P, N, input_precision=PRECISION)
            row, col = k, strip_first
        else:
            U = tl.dot(N, tl.trans(P), input_precision=PRECISION)
            row, col = strip_first, k
        W = _updated(U, W, row, col, decay, step_size, key, STOCHASTIC)
        if EVEN:
            tl.store(W_at + w_tile, W)
        else:
            tl.store(W_at + w_tile, W, mask=inside)


@triton.jit
def _strip_program(
    row_ptr,
    strip_first,
    lr_ptr,
    nonfinite_ptr,
    rng_step_ptr,
    beta1,
    one_minus_beta1,
    log_beta1,
    beta2,
    one_minus_beta2,
    log_beta2,
    eps,
    weight_decay,
    scale,
    seed_low,
    seed_high,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    LEFT: tl.constexpr,
    PROJECT: tl.constexpr,
    UPDATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPDATE_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    UPDATE_STAGES: tl.constexpr,
):
    m = _field(row_ptr, _ROWS).to(tl.int32)
    n = _field(row_ptr, _COLS).to(tl.int32)
    if ALIGNED:
        m = tl.multiple_of(m, 8)
        n = tl.multiple_of(n, 8)
    p_ptr = pointer(row_ptr, _P, P_DTYPE, ALIGNED)
    m_ptr = pointer(row_ptr, _M, M_DTYPE, ALIGNED)
    v_ptr = pointer(row_ptr, _V, M_DTYPE, ALIGNED)
    t = tl.load(pointer(row_ptr, _T, tl.float32, False))
    stream = _field(row_ptr, _STREAM).to(tl.uint32)
    rng_step = tl.load(rng_step_ptr).to(tl.uint32)
    unbias1 = 1.0 / bias_correction(t, log_beta1)
    unbias2 = 1.0 / bias_correction(t, log_beta2)
    first = strip_first.to(tl.int64)

    # R of the strip, and its shape [rows, cols] as a whole.
    if LEFT:
        rows, cols, row, col = RANK, n, 0, strip_first
        walk, strip_left = m, n - strip_first
    else:
        rows, cols, row, col = m, RANK, strip_first, 0
        walk, strip_left = n, m - strip_first
    MASKED: tl.constexpr = (not EVEN) or RANK != RANK_BLOCK
    if PROJECT:
        g_ptr = pointer(row_ptr, _G, G_DTYPE, ALIGNED)
        stride_m, stride_n = _strides(row_ptr, _G_STRIDE_M, LAYOUT, ALIGNED)
        if LEFT:
            g_ptr = _step_along(g_ptr, first, stride_n, LAYOUT == 0)
        else:
            g_ptr = _step_along(g_ptr, first, stride_m, LAYOUT == 1)
        R = _project(
            g_ptr, p_ptr, stride_m, stride_n, strip_left, walk, RANK, RANK,
            RANK_BLOCK, BLOCK, BLOCK_K, LEFT, LAYOUT, EVEN, PRECISION, STAGES,
        )  # fmt: skip
    else:
        if LEFT:
            i, j = tl.arange(0, RANK_BLOCK), strip_first + tl.arange(0, BLOCK)
        else:
            i, j = strip_first + tl.arange(0, BLOCK), tl.arange(0, RANK_BLOCK)
        tile = i.to(tl.int64)[:, None] * cols + j[None, :]
        r_ptr = pointer(row_ptr, _R, G_DTYPE, ALIGNED)
        if MASKED:
            inside = (i[:, None] < rows) & (j[None, :] < cols)
            R = tl.load(r_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        else:
            R = tl.load(r_ptr + tile).to(tl.float32)

    keep = tl.min(_finite(R), axis=0 if LEFT else 1, keep_dims=True) != 0
    skipped = tl.min(tl.min(keep.to(tl.int32), axis=0), axis=0) == 0
    tl.store(nonfinite_ptr + _field(row_ptr, _INDEX), 1, mask=skipped)

    adam = (unbias1, unbias2, beta1, one_minus_beta1, beta2, one_minus_beta2, eps)
    key = (seed_low, seed_high, rng_step, stream)
    N = _adam_in_chunks(
        R, keep, (m_ptr, v_ptr), row, col, rows, cols, adam, key, P_DTYPE, LEFT, MASKED, CHUNKS
    )

    if UPDATE:
        w_ptr = pointer(row_ptr, _W, W_DTYPE, ALIGNED)
        stride_m, stride_n = _strides(row_ptr, _W_STRIDE_M, LAYOUT, ALIGNED)
        if LEFT:
            w_ptr = _step_along(w_ptr, first, stride_n, LAYOUT == 0)
        else:
            w_ptr = _step_along(w_ptr, first, stride_m, LAYOUT == 1)
        lr = tl.load(lr_ptr).to(tl.float32)
        decay = tl.where(keep, 1.0 - lr * weight_decay, 1.0)
        _walk_update(
            N, w_ptr, p_ptr, stride_m, stride_n, strip_first, strip_left, 0, walk,
            decay, lr * scale, key, RANK, LEFT, LAYOUT, EVEN,
            STOCHASTIC, PRECISION, UPDATE_K, UPDATE_STAGES,
        )  # fmt: skip
    else:
        n_ptr = pointer(row_ptr, _N, P_DTYPE, ALIGNED)
        kept_ptr = pointer(row_ptr, _KEPT, tl.int8, ALIGNED)
        if LEFT:
            kept = strip_first + tl.arange(0, BLOCK)[None, :]
        else:
            kept = strip_first + tl.arange(0, BLOCK)[:, None]
        tl.store(kept_ptr + kept, keep.to(tl.int8), mask=kept < strip_first + strip_left)
        i, j = tl.arange(0, R.shape[0]) + row, tl.arange(0, R.shape[1]) + col
        tile = i.to(tl.int64)[:, None] * cols + j[None, :]
        if MASKED:
            tl.store(n_ptr + tile, N, mask=(i[:, None] < rows) & (j[None, :] < cols))
        else:
            tl.store(n_ptr + tile, N)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _lowrank_adam_kernel(
    table_ptr,
    tiles_ptr,
    lr_ptr,
    nonfinite_ptr,
    rng_step_ptr,
    beta1,
    one_minus_beta1,
    log_beta1,
    beta2,
    one_minus_beta2,
    log_beta2,
    eps,
    weight_decay,
    scale,
    seed_low,
    seed_high,
    FIELDS: tl.constexpr,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    SIDES: tl.constexpr,
    PROJECT: tl.constexpr,
    UPDATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPDATE_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    UPDATE_STAGES: tl.constexpr,
):
    """M, V, and W (UPDATE) or N of one strip; R comes from G (PROJECT) or is given.

        R = P^T G (left) or G P (right)
        M <- b1 M + (1 - b1) R,  V <- b2 V + (1 - b2) R*R
        N = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)
        W <- (1 - lr wd) W - lr scale (P N  or  N P^T)

    Program i takes the strip tiles[i] = (matrix, first strip element, ., .). G is read once, W read
    and written once, R stays in registers, the basis streams from L2.
    """
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    row_ptr = table_ptr + tl.load(tile_ptr) * FIELDS
    strip_first = tl.multiple_of(tl.load(tile_ptr + 1), BLOCK)
    left = SIDES == 1
    if SIDES == 2:
        left = _field(row_ptr, _LEFT) != 0
    if left:
        _strip_program(
            row_ptr, strip_first, lr_ptr, nonfinite_ptr, rng_step_ptr, beta1, one_minus_beta1,
            log_beta1, beta2, one_minus_beta2, log_beta2, eps, weight_decay, scale, seed_low,
            seed_high, W_DTYPE, G_DTYPE, P_DTYPE, M_DTYPE, True, PROJECT, UPDATE, STOCHASTIC,
            LAYOUT, ALIGNED, EVEN, PRECISION, RANK, RANK_BLOCK, BLOCK, BLOCK_K, UPDATE_K, CHUNKS,
            STAGES, UPDATE_STAGES,
        )  # fmt: skip
    else:
        _strip_program(
            row_ptr, strip_first, lr_ptr, nonfinite_ptr, rng_step_ptr, beta1, one_minus_beta1,
            log_beta1, beta2, one_minus_beta2, log_beta2, eps, weight_decay, scale, seed_low,
            seed_high, W_DTYPE, G_DTYPE, P_DTYPE, M_DTYPE, False, PROJECT, UPDATE, STOCHASTIC,
            LAYOUT, ALIGNED, EVEN, PRECISION, RANK, RANK_BLOCK, BLOCK, BLOCK_K, UPDATE_K, CHUNKS,
            STAGES, UPDATE_STAGES,
        )  # fmt: skip


@triton.jit
def _project_program(
    row_ptr,
    strip_first,
    rank_first,
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
    m = _field(row_ptr, _ROWS).to(tl.int32)
    n = _field(row_ptr, _COLS).to(tl.int32)
    if ALIGNED:
        m = tl.multiple_of(m, 8)
        n = tl.multiple_of(n, 8)
    g_ptr = pointer(row_ptr, _G, G_DTYPE, ALIGNED)
    p_ptr = pointer(row_ptr, _P, P_DTYPE, ALIGNED) + rank_first
    r_ptr = pointer(row_ptr, _R, tl.float32, ALIGNED)
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
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    row_ptr = table_ptr + tl.load(tile_ptr) * FIELDS
    strip_first = tl.multiple_of(tl.load(tile_ptr + 1), BLOCK)
    rank_first = tl.multiple_of(tl.load(tile_ptr + 2), RANK_BLOCK)
    left = SIDES == 1
    if SIDES == 2:
        left = _field(row_ptr, _LEFT) != 0
    if left:
        _project_program(
            row_ptr, strip_first, rank_first, G_DTYPE, P_DTYPE, True, LAYOUT, ALIGNED, EVEN,
            PRECISION, RANK, RANK_BLOCK, BLOCK, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        _project_program(
            row_ptr, strip_first, rank_first, G_DTYPE, P_DTYPE, False, LAYOUT, ALIGNED, EVEN,
            PRECISION, RANK, RANK_BLOCK, BLOCK, BLOCK_K, STAGES,
        )  # fmt: skip


@triton.jit
def _update_program(
    row_ptr,
    strip_first,
    walk_first,
    walk_end,
    lr_ptr,
    rng_step_ptr,
    weight_decay,
    scale,
    seed_low,
    seed_high,
    W_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    LEFT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
):
    m = _field(row_ptr, _ROWS).to(tl.int32)
    n = _field(row_ptr, _COLS).to(tl.int32)
    if ALIGNED:
        m = tl.multiple_of(m, 8)
        n = tl.multiple_of(n, 8)
    w_ptr = pointer(row_ptr, _W, W_DTYPE, ALIGNED)
    p_ptr = pointer(row_ptr, _P, P_DTYPE, ALIGNED)
    n_ptr = pointer(row_ptr, _N, P_DTYPE, ALIGNED)
    stride_m, stride_n = _strides(row_ptr, _W_STRIDE_M, LAYOUT, ALIGNED)
    stream = _field(row_ptr, _STREAM).to(tl.uint32)
    rng_step = tl.load(rng_step_ptr).to(tl.uint32)
    lr = tl.load(lr_ptr).to(tl.float32)
    decay, step_size = 1.0 - lr * weight_decay, lr * scale
    key = (seed_low, seed_high, rng_step, stream)
    first = strip_first.to(tl.int64)
    strip = tl.arange(0, BLOCK)
    steps = tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, RANK_BLOCK)
    if LEFT:
        w_ptr = _step_along(w_ptr, first, stride_n, LAYOUT == 0)
        strip_left = n - strip_first
        n_ptr += strip_first
        n_tile = ranks[:, None] * n + strip[None, :]
    else:
        w_ptr = _step_along(w_ptr, first, stride_m, LAYOUT == 1)
        strip_left = m - strip_first
        n_ptr += first * RANK
        n_tile = strip[:, None] * RANK + ranks[None, :]
    kept_ptr = pointer(row_ptr, _KEPT, tl.int8, ALIGNED) + strip_first
    if LEFT:
        kept = tl.load(kept_ptr + strip[None, :], mask=strip[None, :] < strip_left, other=1)
    else:
        kept = tl.load(kept_ptr + strip[:, None], mask=strip[:, None] < strip_left, other=1)
    decay = tl.where(kept != 0, decay, 1.0)
    if RESIDENT:
        if EVEN and RANK == RANK_BLOCK:
            N = tl.load(n_ptr + n_tile)
        elif LEFT:
            inside = (ranks[:, None] < RANK) & (strip[None, :] < strip_left)
            N = tl.load(n_ptr + n_tile, mask=inside, other=0.0)
        else:
            inside = (strip[:, None] < strip_left) & (ranks[None, :] < RANK)
            N = tl.load(n_ptr + n_tile, mask=inside, other=0.0)
        _walk_update(
            N, w_ptr, p_ptr, stride_m, stride_n, strip_first, strip_left, walk_first,
            walk_end, decay, step_size, key, RANK, LEFT, LAYOUT, EVEN,
            STOCHASTIC, PRECISION, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        walk_left = walk_end - walk_first
        p_ptr += walk_first.to(tl.int64) * RANK
        p_tile = steps[:, None] * RANK + ranks[None, :]
        if LEFT:
            w_ptr = _step_along(w_ptr, walk_first, stride_m, LAYOUT == 1)
            w_tile = _tile(steps, strip, stride_m, stride_n, LAYOUT)
            inside = (steps[:, None] < walk_left) & (strip[None, :] < strip_left)
            U = tl.zeros((BLOCK_K, BLOCK), dtype=tl.float32)
            row, col = walk_first, strip_first
        else:
            w_ptr = _step_along(w_ptr, walk_first, stride_n, LAYOUT == 0)
            w_tile = _tile(strip, steps, stride_m, stride_n, LAYOUT)
            inside = (strip[:, None] < strip_left) & (steps[None, :] < walk_left)
            U = tl.zeros((BLOCK, BLOCK_K), dtype=tl.float32)
            row, col = strip_first, walk_first
        W = tl.load(w_ptr + w_tile, mask=inside, other=0.0)
        for rank in tl.range(0, RANK, RANK_BLOCK, num_stages=STAGES):
            some = (steps[:, None] < walk_left) & (ranks[None, :] < RANK - rank)
            P = tl.load(p_ptr + p_tile, mask=some, other=0.0)
            if LEFT:
                some = (ranks[:, None] < RANK - rank) & (strip[None, :] < strip_left)
                N = tl.load(n_ptr + n_tile, mask=some, other=0.0)
                U = tl.dot(P, N, U, input_precision=PRECISION)
                n_ptr += RANK_BLOCK * n.to(tl.int64)
            else:
                some = (strip[:, None] < strip_left) & (ranks[None, :] < RANK - rank)
                N = tl.load(n_ptr + n_tile, mask=some, other=0.0)
                U = tl.dot(N, tl.trans(P), U, input_precision=PRECISION)
                n_ptr += RANK_BLOCK
            p_ptr += RANK_BLOCK
        W = _updated(U, W, row, col, decay, step_size, key, STOCHASTIC)
        tl.store(w_ptr + w_tile, W, mask=inside)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _update_kernel(
    table_ptr,
    tiles_ptr,
    lr_ptr,
    rng_step_ptr,
    weight_decay,
    scale,
    seed_low,
    seed_high,
    FIELDS: tl.constexpr,
    W_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    SIDES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """W <- (1 - lr wd) W - lr scale (P N  or  N P^T), N from scratch.

    Program i takes tiles[i] = (matrix, first strip element, walk begin, walk end). RESIDENT: the
    strip's N is loaded once and the program walks; otherwise it owns one tile and loops over ranks.
    """
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    row_ptr = table_ptr + tl.load(tile_ptr) * FIELDS
    strip_first = tl.multiple_of(tl.load(tile_ptr + 1), BLOCK)
    walk_first = tl.multiple_of(tl.load(tile_ptr + 2), BLOCK_K)
    walk_end = tl.load(tile_ptr + 3)
    left = SIDES == 1
    if SIDES == 2:
        left = _field(row_ptr, _LEFT) != 0
    if left:
        _update_program(
            row_ptr, strip_first, walk_first, walk_end, lr_ptr, rng_step_ptr, weight_decay, scale,
            seed_low, seed_high, W_DTYPE, P_DTYPE, True, STOCHASTIC, LAYOUT, ALIGNED, EVEN,
            PRECISION, RANK, RANK_BLOCK, BLOCK, BLOCK_K, RESIDENT, STAGES,
        )  # fmt: skip
    else:
        _update_program(
            row_ptr, strip_first, walk_first, walk_end, lr_ptr, rng_step_ptr, weight_decay, scale,
            seed_low, seed_high, W_DTYPE, P_DTYPE, False, STOCHASTIC, LAYOUT, ALIGNED, EVEN,
            PRECISION, RANK, RANK_BLOCK, BLOCK, BLOCK_K, RESIDENT, STAGES,
        )  # fmt: skip


class Config(NamedTuple):
    """How one group of matrices is launched.

    Attributes:
        fused: One program projects, steps and updates its strip; otherwise N goes through scratch.
        block: Strip elements of a projecting program.
        block_k: Its walk step while projecting.
        chunks: Parts in which it steps the moments (1, 2 or 4).
        stages: Depth of its projecting pipeline.
        warps: Its warps.
        update_block: Strip elements of an updating program (block if fused).
        update_k: Walk step while updating.
        update_stages: Depth of the updating pipeline.
        update_warps: Warps of an updating program (warps if fused).
        update_walk: Elements an updating program walks.
        staged: Project into scratch and step the moments in a kernel of their own, as with ranks
            whose R does not fit in registers; not together with fused.
    """

    fused: bool
    block: int
    block_k: int
    chunks: int
    stages: int
    warps: int
    update_block: int
    update_k: int
    update_stages: int
    update_warps: int
    update_walk: int
    staged: bool = False


# Largest rank whose R one program holds in registers, and the chunk of a larger one, by itemsize.
_RANK_IN_REGISTERS = {2: 256, 4: 128}
_RANK_CHUNK = {2: 64, 4: 32}
_ADAM_ELEMENTS = 8192


def _power_of_two(x: int, least: int = 16) -> int:
    return max(least, 1 << (x - 1).bit_length())


_WHOLE = 1 << 30  # A walk from end to end.
# Launch configurations by architecture family: (largest rank, R given, configuration), the first
# that fits counts. 90: measured on an H100 (benchmarks/results/h100), over the matrices of a
# LLaMA-2-7B block. The others by reasoning: shared memory (163 KiB on 80, 99 KiB on 86, 89 and 120,
# 227 KiB on 100), and registers as the compiler reports them.
_H100 = (
    (64, False, Config(True, 128, 128, 2, 4, 8, 128, 64, 5, 8, _WHOLE)),
    (128, False, Config(True, 128, 128, 4, 3, 8, 128, 64, 4, 8, _WHOLE)),
    (128, True, Config(False, 128, 64, 4, 4, 8, 128, 64, 5, 8, 4096)),
    (256, False, Config(False, 128, 64, 1, 4, 8, 128, 64, 3, 8, 4096, staged=True)),
    (256, True, Config(False, 128, 64, 1, 4, 8, 128, 64, 3, 8, 2048)),
    (1024, None, Config(False, 128, 64, 1, 4, 8, 128, 128, 4, 8, 128)),
)
_B200 = (
    (128, None, Config(False, 128, 64, 1, 3, 8, 128, 64, 3, 8, 4096, staged=True)),
    (256, None, Config(False, 64, 64, 1, 3, 8, 128, 64, 3, 8, 4096, staged=True)),
    (1024, None, Config(False, 128, 64, 1, 3, 8, 128, 128, 3, 8, 128)),
)
_A100 = (
    (128, None, Config(True, 64, 64, 4, 3, 4, 64, 64, 3, 4, _WHOLE)),
    (256, None, Config(False, 64, 32, 1, 3, 8, 64, 32, 3, 8, 2048, staged=True)),
    (1024, None, Config(False, 64, 32, 1, 3, 8, 64, 64, 3, 4, 64)),
)
_SMALL = (
    (128, None, Config(True, 64, 32, 2, 3, 8, 64, 32, 2, 8, _WHOLE)),
    (256, None, Config(False, 64, 32, 1, 3, 8, 32, 32, 2, 4, 2048, staged=True)),
    (1024, None, Config(False, 64, 32, 1, 3, 8, 64, 64, 2, 4, 64)),
)
_TABLES = {80: _A100, 90: _H100, 100: _B200, 103: _B200}
# float32 operands: three tf32 products each, twice the shared memory.
_FLOAT32 = Config(False, 64, 32, 1, 2, 8, 64, 32, 2, 8, 1024)


def config_for(architecture: int, rank: int, itemsize: int, projected: bool) -> Config:
    """Launch configuration for matrices of one rank and dtype.

    Args:
        architecture: Compute capability, ten times major plus minor; 0 for none.
        rank: Rank r.
        itemsize: Bytes of an operand of the tensor cores: 2, or 4 where float32 takes part.
        projected: R is given.
    """
    if itemsize == 4:
        return _FLOAT32
    for largest, given, config in _TABLES.get(architecture, _SMALL):
        if rank <= largest and given in (None, projected):
            return config
    return _SMALL[-1][2]


class _Group(NamedTuple):
    """Matrices that share their launches."""

    members: list[int]
    launches: list[Launch]
    # Places of N, R and the kept flags of each matrix in the arena, or None; and the arena's size.
    scratch: list[tuple[int | None, int | None, int | None]]
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
    config: Config | None = None,
) -> Prepared | None:
    """Prepares steps on these tensors; gradients may move from step to step.

    Args beyond the op's:
        config: Launch configuration instead of the table's.

    Returns:
        The step, or None if the tensors are of a kind the kernels do not cover.
    """
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
    key = (shapes, projected, stochastic, device, config)
    groups = _plans.get(key)
    if groups is None:
        groups = _plan(
            params, grads, bases, exp_avgs, exp_avg_sqs, sides, projected, stochastic, config
        )
        if groups is None:
            return None
        remember(_plans, key, groups, _MOST_PLANS)
    prepared = []
    for group in groups:
        rows = []
        for i, places in zip(group.members, group.scratch, strict=True):
            n_place, r_place, kept_place = (place or 0 for place in places)
            W, G = params[i], grads[i]
            row = [x.data_ptr() for x in (W, bases[i], exp_avgs[i], exp_avg_sqs[i], steps[i])]
            row = [row[0], 0, *row[1:], n_place, r_place, *W.shape]
            row += [*W.stride(), *((0, 0) if projected else G.stride())]
            row += [streams[i] & 0xFFFFFFFF, i, int(sides[i] == "left"), kept_place]
            rows.append(row + [0] * (_COLUMNS - len(row)))
        prepared.append((group.members, group.launches, Tables(rows, device)))
    scratch_columns = (_N, _KEPT) if projected else (_N, _R, _KEPT)
    return Prepared(
        prepared,
        grads,
        seed,
        grad_columns=[_G.value, _R.value] if projected else [_G.value],
        scratch_columns=[column.value for column in scratch_columns],
        scratch_size=max((group.scratch_size for group in groups), default=0),
    )


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
    config: Config | None = None,
) -> bool:
    """`owlore.reference.lowrank_adam_` for all matrices in as few launches as they allow.

    Args beyond the op's:
        config: Launch configuration instead of the table's.

    Returns:
        False if the tensors are of a kind the kernels do not cover; then nothing was done.
    """
    if not params:
        return True
    key = fixed_key(
        (params, bases, exp_avgs, exp_avg_sqs, steps), projected, stochastic, seed, tuple(streams),
        tuple(sides), config,
    )  # fmt: skip
    prepared = _prepared.get(key)
    options = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    options["scale"] = scale
    if prepared is None or not prepared.launch(grads, lr, nonfinite, rng_step, **options):
        prepared = prepare_lowrank_adam(
            params, grads, bases, exp_avgs, exp_avg_sqs, steps, sides=sides,
            stochastic=stochastic, seed=seed, streams=streams, projected=projected, config=config,
        )  # fmt: skip
        if prepared is None:
            return False
        remember(_prepared, key, prepared, _MOST_PLANS)
        prepared.launch(grads, lr, nonfinite, rng_step, **options)
    return True


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
) -> list[_Group] | None:
    """Groups the matrices by what their launches have in common; None = not covered."""
    members: dict[tuple, list[int]] = {}
    for i, (W, G, P, M, V) in enumerate(
        zip(params, grads, bases, exp_avgs, exp_avg_sqs, strict=True)
    ):
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
        _group(indices, common, params, sides, projected, stochastic, config)
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
) -> _Group:
    w_dtype, g_dtype, p_dtype, m_dtype, rank, layout, is_aligned = common
    device = params[0].device
    architecture = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        architecture = 10 * major + minor
    narrow = p_dtype != torch.float32 and (projected or g_dtype == p_dtype)
    if config is None:
        config = config_for(architecture, rank, 2 if narrow else 4, projected)
    rank_block = _power_of_two(rank)
    left = [sides[i] == "left" for i in members]
    strips = [params[i].shape[1 if on_left else 0] for i, on_left in zip(members, left)]
    walks = [params[i].shape[0 if on_left else 1] for i, on_left in zip(members, left)]

    def even(block: int, step: int) -> bool:
        return all(n % block == 0 for n in strips) and all(m % step == 0 for m in walks)

    def tiles(rows: list[tuple[int, int, int, int]]) -> Tensor:
        return upload(torch.tensor(rows, dtype=torch.int32), device)

    def strip_tiles(block: int) -> Tensor:
        return tiles([(k, s, 0, 0) for k, n in enumerate(strips) for s in range(0, n, block)])

    shared = {
        "FIELDS": _COLUMNS, "P_DTYPE": TL_DTYPES[p_dtype], "LAYOUT": layout, "ALIGNED": is_aligned,
        "SIDES": 2 if len(set(left)) == 2 else int(left[0]), "RANK": rank,
    }  # fmt: skip
    precision = {"PRECISION": "tf32" if narrow else "tf32x3"}
    update_precision = {"PRECISION": "tf32x3" if p_dtype == torch.float32 else "tf32"}
    rounding = {"STOCHASTIC": stochastic and w_dtype == torch.bfloat16}
    in_registers = rank_block <= _RANK_IN_REGISTERS[2 if narrow else 4]
    in_program = in_registers and not config.staged
    fused = config.fused and in_program
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
                **shared, **precision, "G_DTYPE": TL_DTYPES[g_dtype],
                "EVEN": even(config.block, config.block_k), "RANK_BLOCK": chunk,
                "BLOCK": config.block, "BLOCK_K": config.block_k, "STAGES": config.stages,
                "num_warps": config.warps,
            })
        )  # fmt: skip
    project = not projected and in_program
    block, chunks, warps = config.block, config.chunks, config.warps
    if not project and not fused:
        block, chunks, warps = max(16, _ADAM_ELEMENTS // rank_block), 1, 8
    given = g_dtype if projected else torch.float32
    constants = {
        **shared, **(precision if project else update_precision), **rounding,
        "W_DTYPE": TL_DTYPES[w_dtype], "M_DTYPE": TL_DTYPES[m_dtype],
        "G_DTYPE": TL_DTYPES[g_dtype if project else given], "PROJECT": project, "UPDATE": fused,
        "EVEN": even(block, max(config.block_k if project else 1, config.update_k if fused else 1)),
        "RANK_BLOCK": rank_block, "BLOCK": block, "BLOCK_K": config.block_k,
        "UPDATE_K": config.update_k, "CHUNKS": chunks, "STAGES": config.stages,
        "UPDATE_STAGES": config.update_stages, "num_warps": warps,
    }  # fmt: skip
    launches.append(Launch(_lowrank_adam_kernel, strip_tiles(block), constants))
    if not fused:
        walk = config.update_walk if in_registers else config.update_k
        rows = [
            (k, s, w, min(w + walk, m))
            for k, (n, m) in enumerate(zip(strips, walks, strict=True))
            for w in range(0, m, walk)
            for s in range(0, n, config.update_block)
        ]
        launches.append(
            Launch(_update_kernel, tiles(rows), {
                **shared, **update_precision, **rounding, "W_DTYPE": TL_DTYPES[w_dtype],
                "EVEN": even(config.update_block, config.update_k),
                "RANK_BLOCK": rank_block if in_registers else _RANK_CHUNK[p_dtype.itemsize],
                "BLOCK": config.update_block, "BLOCK_K": config.update_k, "RESIDENT": in_registers,
                "STAGES": config.update_stages, "num_warps": config.update_warps,
            })
        )  # fmt: skip

    scratch: list[tuple[int | None, int | None, int | None]] = []
    size = 0
    for n in strips:
        wanted = (
            n * rank * p_dtype.itemsize if not fused else 0,
            n * rank * 4 if not projected and not in_program else 0,
            n if not fused else 0,
        )
        places: list[int | None] = []
        for count in wanted:
            places.append(size if count else None)
            size += -(-count // 256) * 256
        scratch.append(tuple(places))
    return _Group(members, launches, scratch, size)
