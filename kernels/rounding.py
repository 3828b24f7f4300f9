"""Stochastic rounding to bfloat16, with the random bits of `owlore.reference.rounding_bits`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(seed_low, seed_high, c0, c1, c2, c3):
    """Philox4x32-10 (Salmon et al., SC 2011): four uint32 words for a counter of four."""
    k0 = seed_low.to(tl.uint32)
    k1 = seed_high.to(tl.uint32)
    for _ in tl.static_range(10):
        # One wide multiply gives both halves; umulhi and * would be two instructions.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = (k0 + 0x9E3779B9).to(tl.uint32)
        k1 = (k1 + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def counter_words(rows, groups, key, WHICH: tl.constexpr):
    """The four words for eight neighbours each: counter (row, column // 8, step, stream).

    `key` is (seed_low, seed_high, rng_step, stream); rows and groups have the same shape.
    """
    seed_low, seed_high, rng_step, stream = key
    c0 = rows.to(tl.uint32)
    c1 = groups.to(tl.uint32)
    step = (rng_step.to(tl.uint32) & 0x3FFFFFFF) | (WHICH << 30)
    c2 = step.to(tl.uint32) + tl.zeros_like(c0)
    c3 = stream.to(tl.uint32) + tl.zeros_like(c0)
    return philox(seed_low, seed_high, c0, c1, c2, c3)


@triton.jit
def eight_halves(w0, w1, w2, w3):
    """Low and high halves of four words in order, as int16 [..., 2, 2, 2].

    16 bits each until they meet their element, and 64 bits in the first join: each join may change
    the layout through shared memory.
    """
    first = w0.to(tl.uint64) | (w1.to(tl.uint64) << 32)
    second = w2.to(tl.uint64) | (w3.to(tl.uint64) << 32)
    pairs = tl.join(first, second)
    words = tl.join(pairs.to(tl.uint32), (pairs >> 32).to(tl.uint32))
    return tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))


@triton.jit
def rounding_bits(row, col, ROWS: tl.constexpr, COLS: tl.constexpr, key, WHICH: tl.constexpr):
    """16 random bits for each element of the tile at (row, col), col % 8 == 0, as int16."""
    zeros = tl.zeros((ROWS, COLS // 8), dtype=tl.int32)
    rows = zeros + (tl.arange(0, ROWS) + row)[:, None]
    groups = zeros + (tl.arange(0, COLS // 8) + col // 8)[None, :]
    w0, w1, w2, w3 = counter_words(rows, groups, key, WHICH)
    return tl.reshape(eight_halves(w0, w1, w2, w3), (ROWS, COLS))


@triton.jit
def stochastic_round(x, bits):
    """float32 to bfloat16, up or down with probability equal to the distance.

    What bfloat16 can represent stays as it is, Inf and NaN too: a NaN comes from arithmetic here,
    so its high bits are set, and the maximum undoes its overflow into the sign.
    """
    raw = x.to(tl.int32, bitcast=True)
    raised = tl.maximum(raw + (bits.to(tl.int32) & 0xFFFF), raw)
    return (raised >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
