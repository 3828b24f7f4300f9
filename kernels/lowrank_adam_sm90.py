"""The low-rank step's update of W on sm_90, in Gluon: the product runs while bits are drawn.

`lowrank_adam._update_kernel` is the definition, and runs wherever this kernel does not: the same
tables, tiles, orders of rows and columns, and bits. Triton's compiler waits for a product as soon
as it is asked for; here it stays in flight. X and Y come in parts along the ranks, so that two
programs share a multiprocessor at rank 256 too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import Launch
from .lowrank_adam import (
    _COLUMNS,
    _FIRST_COL,
    _FIRST_ROW,
    _INDEX,
    _KEPT,
    _LEFT,
    _N,
    _P,
    _STREAM,
    _W,
    _W_STRIDE_M,
    _col_of,
    _in_pieces,
    _row_of,
    _walks,
)
from .rounding import eight_halves, philox, stochastic_round

# Triton 3.6 knows it under its second name, 3.9 under its first.
_load_into = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _address(row_ptr, COLUMN: gl.constexpr, DTYPE: gl.constexpr):
    return gl.multiple_of(gl.load(row_ptr + COLUMN).to(gl.pointer_type(DTYPE)), 16)


@gluon.jit
def _place(scratch_ptr, row_ptr, COLUMN: gl.constexpr, DTYPE: gl.constexpr):
    address = scratch_ptr.to(gl.int64) + gl.load(row_ptr + COLUMN)
    return gl.multiple_of(address.to(gl.pointer_type(DTYPE)), 16)


@gluon.jit
def _prefetch(ptr):
    """Asks for sectors of memory to be brought into L2."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [ptr.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _copy_part(
    x_ptr, ring, i, first_row, row_end, x_tile, ROWS: gl.constexpr, RANK: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Starts to copy part i of the rows of X from first_row on; past the end, the last again."""
    at = gl.minimum(first_row + i // PARTS * ROWS, row_end - ROWS) * RANK
    at += i % PARTS * (RANK // PARTS)
    _load_into(ring.index(i % STAGES), x_ptr + at + x_tile)
    async_copy.commit_group()


@gluon.jit
def _places(
    A: gl.constexpr, B: gl.constexpr, WARPS: gl.constexpr, BESIDE: gl.constexpr,
    WIDTH: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """`lowrank_adam._places` in a layout: rows, and columns in units of 32 / WIDTH."""
    ACROSS: gl.constexpr = B // 32
    BELOW: gl.constexpr = 8 * WARPS
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
    PIECES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))
    COLS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))
    x = gl.arange(0, A // BELOW * ACROSS, layout=PIECES)[None, :, None]
    row = x // ACROSS * BELOW + gl.arange(0, BELOW, layout=ROWS)[:, None, None]
    x = x % BESIDE * (ACROSS // BESIDE) + x % ACROSS // BESIDE
    col = x * WIDTH + gl.arange(0, WIDTH, layout=COLS)[None, None, :]
    return row, col


@gluon.jit(do_not_specialize=["seed_low", "seed_high"])
def _update_sm90_kernel(
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
    FIELDS: gl.constexpr,
    STOCHASTIC: gl.constexpr,
    RANK: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    BESIDE: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """W <- (1 - lr wd) W - lr scale X Y^T; X, Y are P and N (left) or N and P. All in bfloat16.

    Program i takes columns [tiles[i].1, + COLS) of matrix tiles[i].0 and walks down its rows
    [tiles[i].2, tiles[i].3), all of them whole tiles. The rows of Y stay in shared memory; a ring
    of STAGES takes what comes of X, PARTS of each tile's ranks in turn.
    """
    WIDE: gl.constexpr = RANK // PARTS
    ALL: gl.constexpr = WARPS * BESIDE
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS, BESIDE], [16, COLS // BESIDE, 16]
    )
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    # Threads over operands, pieces of W, groups of eight columns of them, sectors of a tile of W.
    OPERAND: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDE, WIDE // 8], [ALL, 1], [1, 0])
    PIECES: gl.constexpr = gl.BlockedLayout([1, 1, 8], [8, 1, 4], [WARPS, BESIDE, 1], [2, 0, 1])
    GROUPS: gl.constexpr = gl.BlockedLayout([1, 1, 1], [8, 1, 4], [WARPS, BESIDE, 1], [2, 0, 1])
    SECTORS: gl.constexpr = gl.BlockedLayout([1, 1], [512 // COLS, COLS // 16], [ALL, 1], [1, 0])

    tile_ptr = tiles_ptr + gl.program_id(0) * 4
    row_ptr = table_ptr + gl.load(tile_ptr) * FIELDS
    first_col = gl.multiple_of(gl.load(tile_ptr + 1), COLS)
    first_row = gl.multiple_of(gl.load(tile_ptr + 2), ROWS)
    row_end = gl.load(tile_ptr + 3)
    stride = gl.multiple_of(gl.load(row_ptr + _W_STRIDE_M), 8)
    by_row = gl.load(row_ptr + _LEFT) == 0
    p_ptr = _address(row_ptr, _P, gl.bfloat16)
    n_ptr = _place(scratch_ptr, row_ptr, _N, gl.bfloat16)
    x_ptr = gl.where(by_row, n_ptr, p_ptr)
    y_ptr = gl.where(by_row, p_ptr, n_ptr) + first_col.to(gl.int64) * RANK
    w_ptr = _address(row_ptr, _W, gl.bfloat16) + first_col
    kept_ptr = _place(scratch_ptr, row_ptr, _KEPT, gl.int8)
    lr = gl.load(lr_ptr).to(gl.float32)
    decay, step_size = 1.0 - lr * weight_decay, lr * scale
    row_offset = gl.load(row_ptr + _FIRST_ROW).to(gl.int32)
    col_offset = gl.load(row_ptr + _FIRST_COL).to(gl.int32)
    rng_step = gl.load(rng_step_ptr).to(gl.uint32)
    stream = gl.load(row_ptr + _STREAM).to(gl.uint32)

    sector_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SECTORS))[:, None]
    sector_col = gl.arange(0, COLS // 16, layout=gl.SliceLayout(0, SECTORS))[None, :] * 16
    sectors = sector_row * stride.to(gl.int32) + sector_col
    for j in gl.static_range(AHEAD):
        _prefetch(w_ptr + gl.minimum(first_row + j * ROWS, row_end - ROWS) * stride + sectors)
    # Lines are skipped in one matrix of thousands.
    skips = gl.load(nonfinite_ptr + gl.load(row_ptr + _INDEX)) != 0

    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, WIDE], SHARED)
    Y = gl.allocate_shared_memory(gl.bfloat16, [PARTS, COLS, WIDE], SHARED)
    ranks = gl.arange(0, WIDE, layout=gl.SliceLayout(0, OPERAND))[None, :]
    x_row = _row_of(gl.arange(0, ROWS, layout=gl.SliceLayout(1, OPERAND)), WARPS)[:, None]
    y_row = _col_of(gl.arange(0, COLS, layout=gl.SliceLayout(1, OPERAND)), WARPS)[:, None]
    x_tile = x_row * RANK + ranks
    for part in gl.static_range(PARTS):
        # Waited for with the first part of X.
        _load_into(Y.index(part), y_ptr + part * WIDE + (y_row * RANK + ranks))
    for i in gl.static_range(STAGES - 1):
        _copy_part(x_ptr, ring, i, first_row, row_end, x_tile, ROWS, RANK, PARTS, STAGES)

    row, col = _places(ROWS, COLS, WARPS, BESIDE, 32, PIECES)
    W_at = w_ptr + first_row * stride + (row * stride.to(gl.int32) + col)
    group_row, group = _places(ROWS, COLS, WARPS, BESIDE, 4, GROUPS)
    zeros = gl.zeros([8 * WARPS, ROWS * COLS // (256 * WARPS), 4], gl.uint32, GROUPS)
    group = (group + (first_col + col_offset) // 8).to(gl.uint32) + zeros
    nothing = gl.zeros([ROWS, COLS], gl.float32, PRODUCT)
    i = 0
    for k in range(first_row, row_end, ROWS):
        W = gl.load(W_at)
        U = nothing
        for part in gl.static_range(PARTS):
            async_copy.wait_group(STAGES - 2)
            U = warpgroup_mma(
                ring.index((i + part) % STAGES), Y.index(part).permute((1, 0)), U,
                use_acc=part > 0, is_async=True,
            )  # fmt: skip
            if part > 0:
                U = warpgroup_mma_wait(1, deps=[U])
            # The place of the part before, which its product has read by now.
            _copy_part(
                x_ptr, ring, i + part + STAGES - 1, first_row, row_end, x_tile, ROWS, RANK, PARTS,
                STAGES,
            )  # fmt: skip
        if AHEAD > 0:
            _prefetch(w_ptr + gl.minimum(k + AHEAD * ROWS, row_end - ROWS) * stride + sectors)
        if STOCHASTIC:
            # The counter of `rounding.counter_words` for weights.
            w0, w1, w2, w3 = philox(
                seed_low, seed_high, (k + row_offset + group_row).to(gl.uint32) + zeros, group,
                (rng_step & 0x3FFFFFFF) + zeros, stream + zeros,
            )  # fmt: skip
            bits = gl.reshape(eight_halves(w0, w1, w2, w3), W.shape)
            bits = gl.convert_layout(bits, PIECES, assert_trivial=True)
        U = _in_pieces(warpgroup_mma_wait(0, deps=[U]), WARPS, BESIDE)
        U = gl.convert_layout(U, PIECES, assert_trivial=True)
        new = W.to(gl.float32) * decay - step_size * U
        if STOCHASTIC:
            new = stochastic_round(new, bits)
        new = new.to(gl.bfloat16)
        if skips:
            # The lines of a strip are W's rows or columns.
            if by_row:
                gl.store(W_at, new, mask=gl.load(kept_ptr + k + row) != 0)
            else:
                gl.store(W_at, new, mask=gl.load(kept_ptr + first_col + col) != 0)
        else:
            gl.store(W_at, new)
        W_at += ROWS * stride
        i += PARTS
    async_copy.wait_group(0)


class Config(NamedTuple):
    """How matrices of one rank are updated.

    Attributes:
        cols: Columns of a program.
        rows: Rows of its tiles.
        walk: Rows it walks.
        parts: Parts of the ranks in which X and Y come.
        stages: Parts of X that shared memory holds.
        warps: Warps below each other, and beside each other.
        ahead: Tiles of W that are asked to be brought into L2 ahead of time.
        registers: Most registers of a thread; up to 128, so that two programs share a
            multiprocessor.
    """

    cols: int
    rows: int
    walk: int
    parts: int
    stages: int
    warps: tuple[int, int]
    ahead: int
    registers: int


# By rank. Measured on an H200, 512 on an H100 (benchmarks/notes/lowrank_adam.md), over the matrices
# of a LLaMA-2-7B block.
CONFIGS = {
    128: Config(128, 64, 512, 1, 3, (4, 2), 2, 128),
    256: Config(128, 64, 1024, 2, 3, (4, 2), 2, 128),
    512: Config(128, 128, 1024, 4, 3, (8, 1), 2, 255),
}


def update_launch(
    shapes: Sequence[tuple[int, int]],
    rank: int,
    stochastic: bool,
    tiles: Callable[[list[tuple[int, int, int, int]]], Tensor],
) -> Launch | None:
    """The update of aligned bfloat16 matrices [m, n] in rows, or None if it does not cover them.

    Args:
        shapes: m and n of each.
        rank: Rank r.
        stochastic: Round stochastically.
        tiles: Makes a tensor on the device of a row for each program.
    """
    config = CONFIGS.get(rank)
    if config is None or any(m % config.rows or n % config.cols for m, n in shapes):
        return None
    below, beside = config.warps
    return Launch(_update_sm90_kernel, tiles(_walks(shapes, config.cols, config.walk)), {
        "FIELDS": _COLUMNS, "STOCHASTIC": stochastic, "RANK": rank, "ROWS": config.rows,
        "COLS": config.cols, "PARTS": config.parts, "STAGES": config.stages, "WARPS": below,
        "BESIDE": beside, "AHEAD": config.ahead, "num_warps": below * beside,
        "maxnreg": config.registers,
    })  # fmt: skip
