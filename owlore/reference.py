"""The definition of every op of `owlore.ops` in plain PyTorch: same names, same signatures.

Letters: W [m, n] a weight (out, in features), G its gradient, P the basis, R the gradient in the
basis, M and V its Adam moments, N the normalised update, t the number of steps, r the rank.
`side="left"` projects the output side (P [m, r], R = P^T G [r, n]), `side="right"` the input side
(P [n, r], R = G P [m, r]).

Arithmetic runs in float32 (float64 for float64 weights); storage keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import EllipsisType

import torch
from torch import Tensor

# Which tensor of a parameter a random bit belongs to (top two bits of the counter's third word).
WEIGHT, EXP_AVG, EXP_AVG_SQ = 0, 1, 2

_MASK32 = 0xFFFFFFFF
# Elements of a piece in elementwise work.
_PIECE = 2**16


def philox(
    seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011).

    Args:
        seed: 64-bit key, low word first.
        c0: First word of the counter, values in [0, 2^32). Broadcastable, int64.
        c1: Second word.
        c2: Third word.
        c3: Fourth word.

    Returns:
        Four words of 32 random bits each, as int64 in [0, 2^32).
    """
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps all 64 bits of the 32 x 32 bit product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        hi0, lo0 = (p0 >> 32) & _MASK32, p0 & _MASK32
        hi1, lo1 = (p1 >> 32) & _MASK32, p1 & _MASK32
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def rounding_bits(
    rows: int,
    columns: int,
    seed: int,
    stream: int,
    rng_step: Tensor,
    which: int,
    first_row: int = 0,
    first_column: int = 0,
) -> Tensor:
    """16 random bits for each element of a [rows, columns] matrix.

    One generator call serves eight neighbours in a row: its counter is (row, column // 8, step,
    stream), the eight values are the low and high halves of its four words in order.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        seed: 64-bit key.
        stream: 32-bit hash of the parameter's name.
        rng_step: Optimizer step. [], an integer.
        which: WEIGHT, EXP_AVG or EXP_AVG_SQ.
        first_row: Row of the whole matrix with which these rows begin.
        first_column: Column of the whole matrix with which these columns begin.

    Returns:
        Values in [0, 2^16). [rows, columns], int32.
    """
    device = rng_step.device
    row = first_row + torch.arange(rows, device=device)[:, None]
    before = first_column % 8
    groups = (before + columns + 7) // 8
    group = first_column // 8 + torch.arange(groups, device=device)[None, :]
    step = (rng_step.to(torch.int64) & 0x3FFFFFFF) | (which << 30)
    words = philox(seed, row, group, step, torch.full_like(step, stream))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack([h.expand(rows, groups) for h in halves], dim=-1)  # [rows, n/8, 8]
    return bits.reshape(rows, 8 * groups)[:, before : before + columns].to(torch.int32)


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """Rounds float32 to bfloat16 up or down with probability equal to the distance (unbiased).

    Args:
        x: Values. Any shape, float32.
        bits: 16 random bits for each value. Shape of x, int32.

    Returns:
        Rounded values; Inf and NaN pass unchanged. Shape of x, bfloat16.
    """
    raised = x.view(torch.int32) + bits
    rounded = (raised & -65536).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)


def _store_(
    target: Tensor,
    value: Tensor,
    keep: Tensor,
    stochastic: bool,
    seed: int,
    stream: int,
    rng_step: Tensor,
    which: int,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """Writes value where keep is true, converted to the target's dtype."""
    if stochastic and target.dtype == torch.bfloat16:
        columns = target.shape[-1] if target.dim() else 1
        rows = target.numel() // columns if columns else 0
        place = (first_row, first_column)
        bits = rounding_bits(rows, columns, seed, stream, rng_step, which, *place)
        value = stochastic_round(value.float(), bits.view(target.shape))
    target.copy_(torch.where(keep, value.to(target.dtype), target))


def _adam(
    R: Tensor, M: Tensor, V: Tensor, t: Tensor, beta1: float, beta2: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """New moments and the normalised update N = M_hat / (sqrt(V_hat) + eps)."""
    M = beta1 * M + (1 - beta1) * R
    V = beta2 * V + (1 - beta2) * R * R
    t = t.double()
    bias1, bias2 = 1 - beta1**t, 1 - beta2**t
    # NOTE: GaLore's AdamW adds eps before the bias correction; this is torch.optim.AdamW's place.
    N = (M / bias1) / ((V / bias2).sqrt() + eps)
    return M, V, N


def _compute_dtype(W: Tensor) -> torch.dtype:
    return torch.float64 if W.dtype == torch.float64 else torch.float32


def lowrank_adam_(
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
) -> None:
    """AdamW inside a low-rank subspace of each gradient (GaLore, arXiv 2403.03507, algorithm 2).

    For each matrix, with bias corrections at step t:
        R = P^T G (left) or G P (right)
        M <- b1 M + (1 - b1) R,  V <- b2 V + (1 - b2) R*R
        N = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)
        W <- (1 - lr wd) W - lr scale (P N  or  N P^T)
    A column of R (left; a row on the right side) that holds a value whose square is not finite is
    skipped: its moments and its column (row) of W stay bit-identical.

    Args:
        params: Weights W, updated in place. [m, n] each, any strides.
        grads: Gradients G, or R where `projected`. [m, n] each, any strides; or the shape of M.
        bases: Orthonormal columns P. [m, r] (left) or [n, r] (right), dtype of W.
        exp_avgs: First moments M, updated in place. [r, n] (left) or [m, r] (right).
        exp_avg_sqs: Second moments V, updated in place. Shape of M.
        steps: Steps t including this one, since the moments were last zero. [] each, float32.
        lr: Learning rate. [], float32 or float64, on the weights' device.
        nonfinite: Set to 1 for each matrix in which something was skipped. [len(params)], int32.
        rng_step: Optimizer step, keys the random bits. [], an integer.
        sides: "left" or "right" for each matrix.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator after bias correction.
        weight_decay: Decoupled decay, times lr.
        scale: Factor on the low-rank update (GaLore's alpha).
        stochastic: Round bfloat16 weights stochastically (moments in bfloat16 always are).
        seed: 64-bit key of the random bits.
        streams: 32-bit hash of each parameter's name.
        projected: The gradient comes in the basis already.
        first_rows: Row of the whole matrix with which each weight begins, if weights are shards;
            none for all zeros. Only the random bits depend on it.
        first_columns: The same for columns.
    """
    for i, W in enumerate(params):
        left = sides[i] == "left"
        dtype = _compute_dtype(W)
        P, G = bases[i].to(dtype), grads[i].to(dtype)
        R = G if projected else P.mT @ G if left else G @ P
        keep = torch.isfinite(R * R).all(dim=0 if left else 1, keepdim=True)
        M, V, N = _adam(
            R, exp_avgs[i].to(dtype), exp_avg_sqs[i].to(dtype), steps[i], beta1, beta2, eps
        )
        update = P @ N if left else N @ P.mT
        # NOTE: GaLore's AdamW decays after the update; this is torch.optim.AdamW's order.
        new = W.to(dtype) * (1 - lr * weight_decay) - (lr * scale) * update
        key = (seed, streams[i], rng_step)
        row, column = _place(first_rows, i), _place(first_columns, i)
        # Along the projected side the moments have r lines of their own, on every rank the same.
        moments_row, moments_column = (0, column) if left else (row, 0)
        _store_(W, new, keep, stochastic, *key, WEIGHT, row, column)
        _store_(exp_avgs[i], M, keep, True, *key, EXP_AVG, moments_row, moments_column)
        _store_(exp_avg_sqs[i], V, keep, True, *key, EXP_AVG_SQ, moments_row, moments_column)
        nonfinite[i].copy_(torch.maximum(nonfinite[i], (~keep.all()).to(nonfinite.dtype)))


def _place(firsts: Sequence[int], i: int) -> int:
    return firsts[i] if firsts else 0


def count_(
    steps: Sequence[Tensor],
    skipped: Sequence[Tensor],
    flags: Sequence[Tensor],
    clocks: Sequence[Tensor],
) -> None:
    """Begins a step: counts it, and what was skipped in the one before.

    Args:
        steps: Vectors of step counts, increased by one. float32.
        skipped: Vectors to which the flags are added. int32, shapes of `steps`.
        flags: Vectors with 1 where something was skipped, set to zero. int32, shapes of `steps`.
        clocks: Numbers that are increased by one. [] each, int32.
    """
    if steps or clocks:
        torch._foreach_add_([*steps, *clocks], 1)
    if steps:
        torch._foreach_add_(list(skipped), list(flags))
        torch._foreach_zero_(list(flags))


def adamw_(
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
) -> None:
    """AdamW (arXiv 1711.05101) on whole parameters, in `torch.optim.AdamW`'s order.

    Elements whose gradient's square is not finite are skipped; weight and moments stay
    bit-identical there.

    Args:
        params: Weights, updated in place. Any shape.
        grads: Gradients. Shape of the weight.
        exp_avgs: First moments, updated in place. Shape of the weight.
        exp_avg_sqs: Second moments, updated in place. Shape of the weight.
        steps: Steps t including this one. [] each, float32.
        lr: Learning rate. [], float32 or float64, on the weights' device.
        nonfinite: Set to 1 for each parameter in which something was skipped. [len(params)], int32.
        rng_step: Optimizer step, keys the random bits. [], an integer.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator after bias correction.
        weight_decay: Decoupled decay, times lr.
        stochastic: Round bfloat16 weights stochastically (moments in bfloat16 always are).
        seed: 64-bit key of the random bits.
        streams: 32-bit hash of each parameter's name.
        first_rows: Row of the whole parameter with which each weight begins, as in `lowrank_adam_`;
            rows are lines along the last dimension.
        first_columns: The same for columns.
    """
    for i, whole in enumerate(params):
        dtype = _compute_dtype(whole)
        skipped = nonfinite[i]
        row, column = _place(first_rows, i), _place(first_columns, i)
        for first, piece in _pieces(whole):
            W, G = whole[piece], grads[i][piece].to(dtype)
            exp_avg, exp_avg_sq = exp_avgs[i][piece], exp_avg_sqs[i][piece]
            keep = torch.isfinite(G * G)
            moments = (exp_avg.to(dtype), exp_avg_sq.to(dtype))
            M, V, N = _adam(G, *moments, steps[i], beta1, beta2, eps)
            new = W.to(dtype) * (1 - lr * weight_decay) - lr * N
            key = (seed, streams[i], rng_step)
            _store_(W, new, keep, stochastic, *key, WEIGHT, row + first, column)
            _store_(exp_avg, M, keep, True, *key, EXP_AVG, row + first, column)
            _store_(exp_avg_sq, V, keep, True, *key, EXP_AVG_SQ, row + first, column)
            skipped.copy_(torch.maximum(skipped, (~keep.all()).to(skipped.dtype)))


def _pieces(whole: Tensor) -> Iterator[tuple[int, slice | EllipsisType]]:
    """Index of each of the pieces into which a large tensor is cut, and the row it begins with.

    On a CPU elementwise work on pieces that fit the cache is several times faster.
    """
    if whole.device.type != "cpu" or whole.dim() < 2 or whole.numel() <= _PIECE:
        yield 0, ...
        return
    # A row is a line along the last dimension; one index of the first dimension holds several.
    rows = whole[0].numel() // whole.shape[-1]
    length = max(1, _PIECE // whole[0].numel())
    for start in range(0, whole.shape[0], length):
        yield start * rows, slice(start, start + length)


def column_sq_norm_(acc: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
    """Adds the squared column norms of activations: acc[j] += sum_t x[t, j]^2.

    Args:
        acc: Running sums, updated in place. [n], float32 or float64.
        x: Activations. [..., n], any float dtype.
        mask: True for the tokens that count. [...], bool.
    """
    # A sum in float32 over 10^5 tokens loses digits that the definition should have.
    squares = x.double().square()
    if mask is not None:
        squares = torch.where(mask[..., None], squares, 0.0)
    acc += squares.reshape(-1, x.shape[-1]).sum(dim=0).to(acc.dtype)


def inverse_cholesky_(gram: Tensor, inverse: Tensor, shift: float, least: float) -> None:
    """Inverse Cholesky factors: X = L^-1 with L L^T = A + diag(k shift A_ii + least).

    Args:
        gram: Symmetric matrices A, of which the lower triangles are read; what they hold is lost.
            [b, k, k].
        inverse: X is written here, lower triangular. Shape and dtype of gram.
        shift: Raises the diagonal in its own proportion.
        least: Raises it by a number.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.mul_(1.0 + gram.shape[-1] * shift).add_(least)
    L = torch.linalg.cholesky_ex(gram)[0]
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    inverse.copy_(torch.linalg.solve_triangular(L, identity, upper=False))


def outlier_counts(
    weights: Sequence[Tensor], norms: Sequence[Tensor], thresholds: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Counts outliers of a block (OWL, arXiv 2310.05175, section 3.1).

    With A_ij = |W_ij| * norm_j for each weight and one mean over the entries of all of them:
    counts[k, q] = #{A_k > thresholds[q] * mean}.

    Args:
        weights: Linear weights of one block. [m_k, n_k] each, any strides, any float dtype.
        norms: Norm of each input feature over the calibration tokens. [n_k], float32 or float64.
        thresholds: Multiples tau of the mean above which an entry is an outlier.

    Returns:
        Counts per weight and threshold, [len(weights), len(thresholds)], int64, and the mean
        (0 if there are no entries), [], float64.
    """
    device = weights[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for W, norm in zip(weights, norms, strict=True):
        total += W.double().abs().mul_(norm.double()).sum()
    mean = total / max(1, sum(W.numel() for W in weights))
    counts = torch.zeros(len(weights), len(thresholds), dtype=torch.int64, device=device)
    for k, (W, norm) in enumerate(zip(weights, norms, strict=True)):
        A = W.double().abs().mul_(norm.double())
        for q, tau in enumerate(thresholds):
            counts[k, q] = A.gt(tau * mean).sum()
    return counts, mean
