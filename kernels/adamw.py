"""Dense AdamW of many parameters in one launch, with stochastic rounding for bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

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
from .rounding import counter_words, eight_halves, stochastic_round

# Columns of the table.
_W = tl.constexpr(0)
_M = tl.constexpr(1)
_V = tl.constexpr(2)
_T = tl.constexpr(3)
_ROWS = tl.constexpr(4)
_COLS = tl.constexpr(5)
_STREAM = tl.constexpr(6)
_INDEX = tl.constexpr(7)
# Of a shard, the row and column of the whole parameter with which it begins: they key its bits.
_FIRST_ROW = tl.constexpr(8)
_FIRST_COL = tl.constexpr(9)
_STRIDES = tl.constexpr(10)
_FIELDS = 18

# Programs of 4096 elements: 16 for each thread of eight warps.
_BLOCK = 4096
_WARPS = 8
_MOST_KEPT = 16


@triton.jit
def _offsets(row_ptr, TENSOR: tl.constexpr, row, col):
    stride_m = tl.load(row_ptr + _STRIDES + 2 * TENSOR)
    stride_n = tl.load(row_ptr + _STRIDES + 2 * TENSOR + 1)
    return row.to(tl.int64) * stride_m + col.to(tl.int64) * stride_n


@triton.jit
def _bits(row, group, eighth, key, WHICH: tl.constexpr, DENSE: tl.constexpr):
    w0, w1, w2, w3 = counter_words(row, group, key, WHICH)
    if DENSE:
        EIGHTS: tl.constexpr = row.shape[0]
        bits = tl.reshape(eight_halves(w0, w1, w2, w3), (EIGHTS, 8))
    else:
        # One generator call for each element, of which one half in eight is used.
        word = tl.where(eighth < 4, tl.where(eighth < 2, w0, w1), tl.where(eighth < 6, w2, w3))
        bits = tl.where(eighth % 2 == 0, word, word >> 16).to(tl.int16)
    return bits


@triton.jit
def _rounded(x, old, row, group, eighth, key, WHICH: tl.constexpr, DENSE: tl.constexpr):
    if old.dtype == tl.bfloat16:
        return stochastic_round(x, _bits(row, group, eighth, key, WHICH, DENSE))
    else:
        return x.to(old.dtype)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _adamw_kernel(
    table_ptr,
    tiles_ptr,
    grads_ptr,
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
    seed_low,
    seed_high,
    FIELDS: tl.constexpr,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """AdamW on whole parameters, elementwise.

        M <- b1 M + (1 - b1) G,  V <- b2 V + (1 - b2) G*G
        W <- (1 - lr wd) W - lr (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)

    Program i takes elements [tiles[i].1, + BLOCK) of parameter tiles[i].0, seen as a matrix of its
    last dimension. DENSE: contiguous tensors whose last dimension is a multiple of eight, so that
    one generator call serves eight elements.
    """
    tile_ptr = tiles_ptr + tl.program_id(0) * 2
    row_ptr = table_ptr + tl.load(tile_ptr) * FIELDS
    block = tl.load(tile_ptr + 1)
    w_ptr = pointer(row_ptr, _W, W_DTYPE, ALIGNED)
    g_ptr = pointer(grads_ptr + tl.load(row_ptr + _INDEX), 0, G_DTYPE, ALIGNED)
    m_ptr = pointer(row_ptr, _M, M_DTYPE, ALIGNED)
    v_ptr = pointer(row_ptr, _V, M_DTYPE, ALIGNED)
    t = tl.load(pointer(row_ptr, _T, tl.float32, False))
    rows = tl.load(row_ptr + _ROWS)
    cols = tl.load(row_ptr + _COLS)
    key = (
        seed_low,
        seed_high,
        tl.load(rng_step_ptr).to(tl.uint32),
        tl.load(row_ptr + _STREAM).to(tl.uint32),
    )
    lr = tl.load(lr_ptr).to(tl.float32)
    first_row = tl.load(row_ptr + _FIRST_ROW)
    first_col = tl.load(row_ptr + _FIRST_COL)
    if DENSE:
        EIGHTS: tl.constexpr = BLOCK // 8
        # Eights fit in int32 where elements do not: an integer division in int64 is slow.
        i = block * EIGHTS + tl.arange(0, EIGHTS)
        eights = (cols // 8).to(tl.int32)
        row = i // eights
        group = i % eights
        eighth = tl.arange(0, 8)[None, :]
        w_at = i.to(tl.int64)[:, None] * 8 + eighth
        g_at, m_at, v_at = w_at, w_at, w_at
        mask = (i.to(tl.int64) < rows * eights)[:, None]
        group += (first_col // 8).to(tl.int32)
    else:
        i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        row = i // cols
        col = i % cols
        group = (first_col + col) // 8
        eighth = ((first_col + col) % 8).to(tl.int32)
        w_at = _offsets(row_ptr, 0, row, col)
        g_at = _offsets(row_ptr, 1, row, col)
        m_at = _offsets(row_ptr, 2, row, col)
        v_at = _offsets(row_ptr, 3, row, col)
        mask = i < rows * cols
    row += first_row.to(row.dtype)
    W_old = tl.load(w_ptr + w_at, mask=mask, other=0.0)
    G = tl.load(g_ptr + g_at, mask=mask, other=0.0).to(tl.float32)
    M_old = tl.load(m_ptr + m_at, mask=mask, other=0.0)
    V_old = tl.load(v_ptr + v_at, mask=mask, other=0.0)
    W = W_old.to(tl.float32)
    M = M_old.to(tl.float32)
    V = V_old.to(tl.float32)
    # The square decides: a value whose square overflows would leave an infinite second moment.
    keep = G * G < float("inf")
    skipped = tl.sum((keep == 0).to(tl.int32)) > 0
    tl.store(nonfinite_ptr + tl.load(row_ptr + _INDEX), 1, mask=skipped)
    M_new = beta1 * M + one_minus_beta1 * G
    V_new = beta2 * V + one_minus_beta2 * G * G
    M_hat = M_new / bias_correction(t, log_beta1)
    V_hat = V_new / bias_correction(t, log_beta2)
    W_new = W * (1.0 - lr * weight_decay) - lr * (M_hat / (tl.sqrt(V_hat) + eps))
    # What is skipped is written back as it was.
    W = tl.where(keep, W_new, W)
    M = tl.where(keep, M_new, M)
    V = tl.where(keep, V_new, V)
    if STOCHASTIC:
        W = _rounded(W, W_old, row, group, eighth, key, 0, DENSE)
    tl.store(w_ptr + w_at, W.to(W_old.dtype), mask=mask)
    tl.store(m_ptr + m_at, _rounded(M, M_old, row, group, eighth, key, 1, DENSE), mask=mask)
    tl.store(v_ptr + v_at, _rounded(V, V_old, row, group, eighth, key, 2, DENSE), mask=mask)


_prepared: dict[tuple, Prepared] = {}
_launches: dict[tuple, Launch] = {}


def prepare_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    stochastic: bool,
    seed: int,
    streams: Sequence[int],
    first_rows: Sequence[int] = (),
    first_columns: Sequence[int] = (),
) -> Prepared | None:
    """Prepares steps on these tensors; gradients may move from step to step.

    Returns:
        The step, one launch for each combination of dtypes, or None if the tensors are of a kind
        the kernel does not cover.
    """
    device = params[0].device
    groups: dict[tuple, tuple[list[list[int]], list[int]]] = {}
    for index, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        W, G, M, V = tensors
        if not all(x.dtype in TL_DTYPES for x in tensors) or M.dtype != V.dtype:
            return None
        if W.numel() == 0:
            continue
        cols = W.shape[-1] if W.dim() else 1
        rows = W.numel() // cols
        contiguous = all(x.is_contiguous() for x in tensors)
        if not contiguous and W.dim() != 2:
            return None
        first_row = first_rows[index] if first_rows else 0
        first_column = first_columns[index] if first_columns else 0
        dense = contiguous and cols % 8 == 0 and first_column % 8 == 0
        row = [x.data_ptr() for x in (W, M, V, steps[index])]
        row += [rows, cols, streams[index] & 0xFFFFFFFF, index, first_row, first_column]
        for x in tensors:
            row += [cols, 1] if contiguous else x.stride()
        common = (W.dtype, G.dtype, M.dtype, dense, dense and aligned(tensors))
        table, sizes = groups.setdefault(common, ([], []))
        table.append(row)
        sizes.append(W.numel())
    prepared = [
        (
            [_launch(common, sizes, stochastic, device)],
            upload(torch.tensor(table, dtype=torch.int64), device),
        )
        for common, (table, sizes) in groups.items()
    ]
    return Prepared(prepared, grads, seed)


def _launch(common: tuple, sizes: Sequence[int], stochastic: bool, device: torch.device) -> Launch:
    """The launch over parameters of these sizes; large ones have many tiles."""
    key = (common, tuple(sizes), stochastic, device)
    launch = _launches.get(key)
    if launch is None:
        counts = torch.tensor([triton.cdiv(size, _BLOCK) for size in sizes])
        which = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        block = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
        w_dtype, g_dtype, m_dtype, dense, is_aligned = common
        constants = {
            "FIELDS": _FIELDS, "W_DTYPE": TL_DTYPES[w_dtype], "G_DTYPE": TL_DTYPES[g_dtype],
            "M_DTYPE": TL_DTYPES[m_dtype], "STOCHASTIC": stochastic and w_dtype == torch.bfloat16,
            "DENSE": dense, "ALIGNED": is_aligned, "BLOCK": _BLOCK, "num_warps": _WARPS,
        }  # fmt: skip
        tiles = upload(torch.stack((which, block), dim=1).to(torch.int32), device)
        launch = Launch(_adamw_kernel, tiles, constants)
        remember(_launches, key, launch, _MOST_KEPT)
    return launch


def launch_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    nonfinite: Tensor,
    rng_step: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    stochastic: bool,
    seed: int,
    streams: Sequence[int],
    first_rows: Sequence[int] = (),
    first_columns: Sequence[int] = (),
) -> bool:
    """`owlore.reference.adamw_`, one launch for each combination of dtypes.

    Returns:
        False if the tensors are of a kind the kernel does not cover; then nothing was done.
    """
    if not params:
        return True
    key = fixed_key(
        (params, exp_avgs, exp_avg_sqs, steps),
        stochastic,
        seed,
        tuple(streams),
        tuple(first_rows),
        tuple(first_columns),
    )
    options = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    prepared = _prepared.get(key)
    if prepared is None or not prepared.launch(grads, lr, nonfinite, rng_step, **options):
        prepared = prepare_adamw(
            params, grads, exp_avgs, exp_avg_sqs, steps, stochastic=stochastic, seed=seed,
            streams=streams, first_rows=first_rows, first_columns=first_columns,
        )  # fmt: skip
        if prepared is None:
            return False
        remember(_prepared, key, prepared, _MOST_KEPT)
        prepared.launch(grads, lr, nonfinite, rng_step, **options)
    return True
