"""Inverse Cholesky factors of many float64 matrices in one launch.

Letters: A [k, k] one matrix, L its Cholesky factor, X = L^-1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Launch, current_stream, on, remember

# Columns of a block, rows of what a program works on below it or columns of what it works on beside
# it, and warps.
_BLOCK = 16
_LINES = 32
_WARPS = 4
_MOST_LAUNCHES = 64
_launches: dict[tuple, Launch] = {}


@triton.jit
def _load(ptr, row, col, k, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile at (row, col) of a matrix [k, k]; beyond it, of the identity."""
    i = row + tl.arange(0, ROWS)[:, None]
    j = col + tl.arange(0, COLS)[None, :]
    x = tl.load(ptr + i * k + j, mask=(i < k) & (j < k), other=0.0)
    return tl.where((i == j) & (i >= k), 1.0, x)


@triton.jit
def _inverse_of_block(S, least, BLOCK: tl.constexpr):
    """The inverse Cholesky factor of S [BLOCK, BLOCK], by eliminating a column at a time.

    least: What each pivot comes to at least but for rounding. [1, BLOCK]
    """
    i = tl.arange(0, BLOCK)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    X = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    for c in range(BLOCK):
        row = tl.sum(tl.where(i == c, S, 0.0), axis=0, keep_dims=True)
        col = tl.sum(tl.where(j == c, S, 0.0), axis=1, keep_dims=True)
        x = tl.sum(tl.where(i == c, X, 0.0), axis=0, keep_dims=True)
        pivot = tl.sum(tl.where(j == c, row, 0.0), axis=1, keep_dims=True)
        pivot = tl.maximum(pivot, tl.sum(tl.where(j == c, least, 0.0), axis=1, keep_dims=True))
        below = tl.where(i > c, col / pivot, 0.0)
        S -= below * row
        X = tl.where(i == c, x / tl.sqrt(pivot), X - below * x)
    return X


@triton.jit
def _inverse_cholesky_kernel(
    a_ptr,
    x_ptr,
    k,
    SHIFT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
):
    """X = L^-1 with L L^T = A + diag(k SHIFT A_ii + LEAST); program i takes matrix i.

    Block row by block row: L grows in A's place, where it is read no more.
    """
    first = tl.program_id(0).to(tl.int64) * k * k
    a_ptr += first
    x_ptr += first
    block = tl.arange(0, BLOCK)
    lines = tl.arange(0, LINES)
    shift = (tl.zeros((1, BLOCK), tl.float64) + k) * SHIFT
    for j in range(0, k, BLOCK):
        on_diagonal = j + block
        diagonal = tl.load(a_ptr + on_diagonal * (k + 1), mask=on_diagonal < k, other=1.0)
        least = shift * diagonal[None, :] + LEAST
        S = _load(a_ptr, j, j, k, BLOCK, BLOCK)
        S += tl.where(block[:, None] == block[None, :], least, 0.0)
        for p in range(0, j, BLOCK):
            L = _load(a_ptr, j, p, k, BLOCK, BLOCK)
            S = tl.dot(-L, tl.trans(L), S, out_dtype=tl.float64)
        D = _inverse_of_block(S, least, BLOCK)
        # The columns of L below the block.
        for i in range(j + BLOCK, k, LINES):
            T = _load(a_ptr, i, j, k, LINES, BLOCK)
            for p in range(0, j, BLOCK):
                L = _load(a_ptr, j, p, k, BLOCK, BLOCK)
                T = tl.dot(
                    -_load(a_ptr, i, p, k, LINES, BLOCK), tl.trans(L), T, out_dtype=tl.float64
                )
            T = tl.dot(T, tl.trans(D), out_dtype=tl.float64)
            rows, cols = i + lines[:, None], j + block[None, :]
            tl.store(a_ptr + rows * k + cols, T, mask=(rows < k) & (cols < k))
        # The rows of X beside it, -D L_j X: zero on the right, as the rows above are.
        rows = j + block[:, None]
        for i in range(0, k, LINES):
            Y = tl.zeros((BLOCK, LINES), tl.float64)
            for p in range(0, j, BLOCK):
                L = _load(a_ptr, j, p, k, BLOCK, BLOCK)
                Y = tl.dot(L, _load(x_ptr, p, i, k, BLOCK, LINES), Y, out_dtype=tl.float64)
            Y = tl.dot(-D, Y, out_dtype=tl.float64)
            cols = i + lines[None, :]
            beside = (cols < j) | (cols >= j + BLOCK)
            tl.store(x_ptr + rows * k + cols, Y, mask=(rows < k) & (cols < k) & beside)
        cols = j + block[None, :]
        tl.store(x_ptr + rows * k + cols, D, mask=(rows < k) & (cols < k))
        # What one thread wrote, others read.
        tl.debug_barrier()


def launch_inverse_cholesky(gram: Tensor, inverse: Tensor, shift: float, least: float) -> bool:
    """`owlore.reference.inverse_cholesky_` in one launch.

    Returns:
        False if the tensors are of a kind the kernel does not cover; then nothing was done.
    """
    if gram.dtype != torch.float64 or not (gram.is_contiguous() and inverse.is_contiguous()):
        return False
    if gram.numel() == 0:
        return True
    device, (count, k, _) = gram.device, gram.shape
    key = (device, count, k, shift, least)
    launch = _launches.get(key)
    if launch is None:
        constants = {
            "SHIFT": shift, "LEAST": least, "BLOCK": _BLOCK, "LINES": _LINES, "num_warps": _WARPS,
        }  # fmt: skip
        launch = Launch(_inverse_cholesky_kernel, None, constants, count)
        remember(_launches, key, launch, _MOST_LAUNCHES)
    tensors = {"a_ptr": gram, "x_ptr": inverse}
    values = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    kind = tuple([address % 16 for address in values.values()])
    with on(device):
        launch(kind, {**values, "k": k}, tensors, current_stream(device))
    return True
