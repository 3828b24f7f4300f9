"""The basis of the subspace in which a weight trains, and what a new basis does to the moments.

Letters: G [m, n] a gradient, P its basis with r orthonormal columns, A = G (left) or G^T (right),
so that P spans leading left singular vectors of A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from owlore import ops


def choose_side(m: int, n: int, side: str) -> str:
    """Which side of a weight [m, n] is projected.

    Args:
        m: Out features.
        n: In features.
        side: "std" projects the smaller dimension (the input side if they are equal), "reverse" the
            other one; "left" and "right" are taken as they are.

    Returns:
        "left" (output side, P [m, r]) or "right" (input side, P [n, r]).
    """
    if side in ("left", "right"):
        return side
    return "right" if (m >= n) == (side != "reverse") else "left"


def matrix_seed(seed: int, step: int, name: str) -> int:
    """Seed of the random test matrix of one parameter at one step, the same on every rank."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def refresh_bases(
    grads: Sequence[Tensor],
    ranks: Sequence[int],
    sides: Sequence[str],
    previous: Sequence[Tensor | None],
    seeds: Sequence[int],
    *,
    method: str,
    power_iterations: int,
    oversampling: int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """New bases from gradients; all tensors on one device, no host synchronisation of our own.

    A gradient with a non-finite entry gives back the previous basis unchanged, or NaN where there
    is none (a NaN basis makes `lowrank_adam_` skip the whole matrix).

    Args:
        grads: Gradients G. [m, n] each.
        ranks: Rank r of each basis, at most min(m, n).
        sides: "left" or "right" for each gradient.
        previous: Present basis of each, or None.
        seeds: Seed of each random test matrix.
        method: "svd" (exact), "subspace" (randomised subspace iteration, Halko et al.,
            arXiv 0909.4061, algorithm 4.4, started from the previous basis) or "random".
        power_iterations: Passes over A A^T, each re-orthonormalised; for "subspace".
        oversampling: Columns carried beside the r that are kept; for "subspace".

    Returns:
        Bases P ([m, r] left, [n, r] right, dtype of G); captured energy ||P^T A||^2 / ||A||^2 of
        each (0 for a zero gradient), [len(grads)], float32; whether each gradient was finite,
        [len(grads)], bool.
    """
    if method == "subspace" and grads and grads[0].is_cuda:
        return _refresh_in_batches(
            grads, ranks, sides, previous, seeds, power_iterations, oversampling
        )
    bases, energies, finite = [], [], []
    for G, r, side, old, seed in zip(grads, ranks, sides, previous, seeds, strict=True):
        dtype = torch.float64 if G.dtype == torch.float64 else torch.float32
        A = (G if side == "left" else G.mT).to(dtype)
        ok = torch.isfinite(A).all()
        # Scaling keeps squares and products of huge or tiny gradients inside the range.
        A = torch.where(ok, A / A.abs().amax().clamp_min(torch.finfo(dtype).tiny), 0.0)
        generator = torch.Generator(A.device).manual_seed(seed)
        if method == "svd":
            U, S, _ = torch.linalg.svd(A, full_matrices=False)
            P, captured = U[:, :r], S[:r].square().sum()
        elif method == "random":
            P = torch.linalg.qr(_gaussian(A.shape[0], r, A, generator))[0]
            captured = (P.mT @ A).square().sum()
        else:
            P, captured = _subspace(A, r, old, generator, power_iterations, oversampling)
        if old is None:
            kept = torch.full_like(P, float("nan"))
        else:
            kept = old.to(dtype)
            # A singular vector's sign is arbitrary. Moments that are kept over a refresh are
            # written in the old columns, so each new column points to the side of the old one.
            P = torch.where((P * kept).sum(dim=0) < 0, -P, P)
        bases.append(torch.where(ok, P, kept).to(G.dtype))
        total = A.square().sum().clamp_min(torch.finfo(dtype).tiny)
        energies.append((captured / total).float())
        finite.append(ok)
    return bases, torch.stack(energies), torch.stack(finite)


def _gaussian(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, dtype=like.dtype, device=like.device, generator=generator)


def _subspace(
    A: Tensor,
    r: int,
    old: Tensor | None,
    generator: torch.Generator,
    power_iterations: int,
    oversampling: int,
) -> tuple[Tensor, Tensor]:
    """Leading r left singular vectors of A, nearly, and the energy they capture."""
    rows, columns = A.shape
    k = min(r + oversampling, rows, columns)
    if old is None:
        start = _gaussian(columns, k, A, generator)
    else:
        # The previous basis is one power iteration ahead of random columns. A NaN basis (no finite
        # gradient came yet) becomes zero here, and QR completes zero columns to orthonormal ones.
        warm = A.mT @ torch.nan_to_num(old.to(A.dtype))
        start = torch.cat([warm, _gaussian(columns, k - r, A, generator)], dim=1)
        start = torch.linalg.qr(start)[0]
    Q = torch.linalg.qr(A @ start)[0]
    for _ in range(power_iterations):
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.mT @ Q)[0])[0]
    B = Q.mT @ A
    eigenvalues, U = torch.linalg.eigh(B @ B.mT)
    return Q @ U[:, -r:].flip(-1), eigenvalues[-r:].clamp_min(0).sum()


# Gradients below this count as zero: their reciprocal would overflow.
_LEAST_SCALE = 1e-37
# Raises the squared length of a column that is zero.
_LEAST_SQUARE = 1e-280
# Bytes of the columns of one batch, and of a float64 copy of a part of them.
_BATCH_BYTES = 3 * 2**24
_CHUNK_BYTES = 25 * 2**20
# Rows of a slab: Gram matrices are sums over slabs, so that all of a GPU works on a few of them.
_SLAB = 1024
# What a Gram matrix of unit columns is raised by for each column, so that its Cholesky factor
# exists, and the norm of the noise that unit columns get: float32 rounding.
_SHIFT = 1e-14
_NOISE = 1e-7
# What the energy of each column carried is raised by to find the weakest: the matrix' is about one.
_LEAST_ENERGY = 1e-12
# Steps of the iteration that finds them.
_INVERSE_STEPS = 8
# What their condition number may grow to in one of them.
_LARGEST_SPREAD = 1e10
# Any seed: the noise need not differ between matrices.
_NOISE_SEED = 5772156649


@torch.no_grad()
def _refresh_in_batches(
    grads: Sequence[Tensor],
    ranks: Sequence[int],
    sides: Sequence[str],
    previous: Sequence[Tensor | None],
    seeds: Sequence[int],
    power_iterations: int,
    oversampling: int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`refresh_bases` by subspace iteration, equal shapes together, without waiting for the device.

    torch.linalg.eigh and svd wait for the device to read their error codes, Cholesky does not: see
    `_subspace_of_batch`.
    """
    batches: dict[tuple, list[int]] = {}
    for i, (G, r, side, old) in enumerate(zip(grads, ranks, sides, previous, strict=True)):
        # Both sides of one shape of A share a batch.
        rows, columns = G.shape if side == "left" else (G.shape[1], G.shape[0])
        key = (rows, columns, r, G.dtype, G.device, old is None)
        batches.setdefault(key, []).append(i)
    bases: list[Tensor] = [grads[0]] * len(grads)
    results: list[tuple[Tensor, Tensor]] = [(grads[0], grads[0])] * len(grads)
    for members, r in _pieces(batches, oversampling):
        P, energies, ok = _subspace_of_batch(
            [grads[i] if sides[i] == "left" else grads[i].mT for i in members],
            r,
            [previous[i] for i in members],
            [seeds[i] for i in members],
            power_iterations,
            oversampling,
        )
        kept = [old for old in (previous[i] for i in members) if old is not None]
        if kept:
            # As in `refresh_bases`: each new column points to the side of the old one.
            along = [(new * old).sum(dim=0) for new, old in zip(P, kept, strict=True)]
            P.mul_(torch.where(torch.stack(along) < 0, -1.0, 1.0)[:, None])
        energies = torch.where(ok, energies, 0.0)
        # A tensor of its own for each basis: they live and are saved apart.
        new = P.to(grads[members[0]].dtype)
        nan = new.new_full((), float("nan"))
        found = zip(members, new.unbind(), energies.unbind(), ok.unbind(), strict=True)
        for k, (i, basis, energy, finite) in enumerate(found):
            bases[i] = torch.where(finite, basis, kept[k].to(new.dtype) if kept else nan)
            results[i] = (energy, finite)
        # Not beside the next piece's.
        del P, new, found, basis
    return bases, torch.stack([e for e, _ in results]), torch.stack([f for _, f in results])


def _count_columns(rows: int, columns: int, r: int, oversampling: int) -> int:
    """Columns to iterate on, at least `oversampling` beside the r where the matrix has them."""
    # Products of a multiple of 16 columns take no longer than those of fewer.
    return min(-(-(r + oversampling) // 16) * 16, rows, columns)


def _pieces(batches: dict[tuple, list[int]], oversampling: int) -> Iterator[tuple[list[int], int]]:
    """Batches cut into even pieces whose columns take `_BATCH_BYTES` at most."""
    for (rows, columns, r, dtype, *_), members in batches.items():
        k = _count_columns(rows, columns, r, oversampling)
        room = max(1, _BATCH_BYTES // (max(4, dtype.itemsize) * rows * k))
        count = -(-len(members) // -(-len(members) // room))
        for start in range(0, len(members), count):
            yield members[start : start + count], r


def _subspace_of_batch(
    matrices: Sequence[Tensor],
    r: int,
    previous: Sequence[Tensor | None],
    seeds: Sequence[int],
    power_iterations: int,
    oversampling: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading r left singular vectors, nearly, of matrices A of one shape.

    As `_subspace`, with these differences. Orthonormal bases come from shifted Cholesky-QR (Fukaya
    et al., arXiv 1809.11085), once for each pass over A A^T, with Gram matrices in float64, which
    carry condition numbers up to 1e7. And the surplus columns are the k - r weakest directions
    found, by inverse iteration on Q^T A A^T Q; the r others keep the order of the iteration, which
    tends to the order of the singular values, and are not rotated to single singular vectors.

    A few k x k matrices at a time take a GPU as long as many. So these are factored for the whole
    batch at once, which holds its columns in float32; of long columns' float64 copies, and of
    columns in the space of the rows of A, only a few exist at a time.

    Args:
        matrices: A. [m, n] each.
        r: Rank.
        previous: Present basis of each, or None for all of them. [m, r] each.
        seeds: Seed of each random test matrix.
        power_iterations: Passes over A A^T.
        oversampling: Columns carried beside the r, at least.

    Returns:
        P, [b, m, r], float32 (float64 for float64 matrices); captured energy of each, [b],
        float32; whether each matrix is finite, [b], bool. P and energy mean nothing where it is
        not.
    """
    m, n = matrices[0].shape
    k = _count_columns(m, n, r, oversampling)
    device = matrices[0].device
    dtype = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
    # What multiplies a matrix is rounded to its dtype; half precision multiplies as float32.
    narrow = dtype if matrices[0].dtype == torch.float16 else matrices[0].dtype
    # Sums in float64, whose squares no gradient in another dtype can overflow.
    norms = torch.stack(torch._foreach_norm(list(matrices), 2, torch.float64))
    ok = torch.isfinite(norms)
    # Scaling the thin factor keeps products of huge or tiny gradients inside the range. By powers
    # of two, so that it rounds nothing.
    exponents = norms.clamp_min(_LEAST_SCALE).log2().floor()
    factors = torch.exp2(-exponents).clamp_min(torch.finfo(dtype).tiny)
    total = (norms * factors).square().clamp_min(torch.finfo(dtype).tiny)
    factors = factors.to(dtype)[:, None, None]
    factor = factors.unbind()

    generator = torch.Generator(device)
    held = _empty_columns(len(matrices), m, k, dtype, device)
    columns = held.flatten(1, 2)[:, :m]  # [b, m, k]
    each = columns.unbind()
    thin = columns if narrow == dtype else torch.empty(columns.shape, dtype=narrow, device=device)
    operands = thin.unbind()
    transposed = [A.mT for A in matrices]
    Z = torch.empty(n, k, dtype=narrow, device=device)
    for A, T, f, Y, old, seed in zip(
        matrices, transposed, factor, each, previous, seeds, strict=True
    ):
        Z.normal_(generator=generator.manual_seed(seed))
        if old is not None:
            # The previous basis is one power iteration ahead of random columns. Those stand in for
            # the directions that it lacks: a NaN basis (no finite gradient came yet) is zero here.
            warm = torch.empty(n, r, dtype=narrow, device=device)
            _multiply(T, torch.nan_to_num(old).to(narrow).mul_(f), warm)
            Z[:, :r].mul_(_NOISE / n**0.5).add_(warm)
        _multiply(A, Z.mul_(f), Y)
    for _ in range(power_iterations):
        _apply(columns, _whitening(_gram(held)).mul_(factors), thin)
        for A, T, f, X, Y in zip(matrices, transposed, factor, operands, each, strict=True):
            _multiply(T, X, Z)
            _multiply(A, Z.mul_(f), Y)
    del Z
    # Every Y is whole from here on: noise fills directions that the matrix does not have.
    noise = _gaussian(m, k, columns, generator.manual_seed(_NOISE_SEED))
    lengths = torch.linalg.vector_norm(columns, dim=1, keepdim=True).clamp_min(1e-12)
    columns.addcmul_(noise, lengths.mul_(_NOISE / m**0.5))
    del noise
    _apply(columns, _whitening(_gram(held)), columns)
    scaled = torch.mul(columns, factors, out=torch.empty_like(columns) if thin is columns else thin)
    C = _gram_of_products(transposed, scaled.unbind(), dtype)
    del scaled, thin, operands
    N = _strongest(C, _gram(held), r)
    _apply(columns, N, columns[:, :, :r])
    captured = torch.bmm(C, N).mul_(N).sum(dim=(1, 2))
    return columns[:, :, :r], (captured / total).float(), ok


def _multiply(A: Tensor, X: Tensor, out: Tensor) -> None:
    """Writes A X with float32 sums, rounded to the dtype of out."""
    if A.dtype == torch.float16:
        A = A.float()
    if A.dtype == out.dtype:
        torch.mm(A, X, out=out)
    elif A.is_cuda:
        torch.mm(A, X, out_dtype=out.dtype, out=out)
    else:
        torch.mm(A.to(out.dtype), X.to(out.dtype), out=out)


def _empty_columns(
    count: int, rows: int, k: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Columns to be written, cut into slabs; rows beyond the last are zero.

    Returns:
        [count, slabs, rows of a slab, k]
    """
    slabs = -(-rows // _SLAB)
    X = torch.empty(count, slabs, -(-rows // slabs), k, dtype=dtype, device=device)
    X.flatten(1, 2)[:, rows:].zero_()
    return X


def _gram(X: Tensor) -> Tensor:
    """Gram matrices X^T X of columns in slabs. [b, slabs, rows, k] to [b, k, k], float64."""
    slabs, rows, k = X.shape[1:]
    room = max(1, _CHUNK_BYTES // (8 * rows * k))
    grams = []
    if room >= slabs:
        for some in X.split(room // slabs):
            part = some.double().view(-1, rows, k)
            grams.append(torch.bmm(part.mT, part).view(-1, slabs, k, k).sum(1))
    else:
        for matrix in X:
            total = torch.zeros(1, k, k, dtype=torch.float64, device=X.device)
            for some in matrix.split(room):
                part = some.double()
                total += torch.bmm(part.mT, part).sum(0)
            grams.append(total)
    return torch.cat(grams)


def _gram_of_products(
    transposed: Sequence[Tensor], columns: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """Gram matrices of A^T X for the columns X, [m, k], of each A. [b, k, k], float64.

    Args:
        transposed: A^T. [n, m] each.
        columns: X. [m, k] each, in the dtype that multiplies.
        dtype: Of the products.
    """
    n, k = transposed[0].shape[0], columns[0].shape[1]
    count = min(len(transposed), max(1, _CHUNK_BYTES // (8 * n * k)))
    held = _empty_columns(count, n, k, dtype, columns[0].device)
    targets = held.flatten(1, 2)[:, :n].unbind()
    grams = []
    for start in range(0, len(transposed), count):
        end = min(start + count, len(transposed))
        for T, X, B in zip(transposed[start:end], columns[start:end], targets, strict=False):
            _multiply(T, X, B)
        grams.append(_gram(held if end - start == count else held[: end - start]))
    return torch.cat(grams)


def _apply(X: Tensor, W: Tensor, out: Tensor) -> None:
    """Writes X W to out, with float64 sums.

    Args:
        X: Columns. [b, m, k].
        W: [b, k, l], float64.
        out: Any dtype; may be columns of X. [b, m, l].
    """
    m, k = X.shape[1:]
    # A copy of X in float64 and the product.
    room = max(1, _CHUNK_BYTES // (16 * k))
    if room >= m:
        count = room // m
        for x, w, y in zip(X.split(count), W.split(count), out.split(count), strict=True):
            y.copy_(torch.bmm(x.double(), w))
        return
    for matrix, w, target in zip(X, W, out, strict=True):
        for x, y in zip(matrix.split(room), target.split(room), strict=True):
            y.copy_(x.double() @ w)


def _whitening(gram: Tensor) -> Tensor:
    """W, upper triangular, with which the columns Y W are orthonormal, from Y^T Y. [b, k, k].

    Columns of Y may be of very different lengths. Those that depend on others come out short.
    """
    # Relative to each column's length, as Cholesky factors do not depend on the lengths otherwise.
    return _inverse_factor(gram, _SHIFT, _LEAST_SQUARE).mT


def _inverse_factor(gram: Tensor, shift: float, least: float) -> Tensor:
    """Inverse Cholesky factors of Gram matrices, whose diagonals are raised so that there are any.

    What gram holds is lost. Inverses, to multiply with: a triangular solve is far slower on a GPU.
    """
    inverse = torch.empty_like(gram)
    ops.inverse_cholesky_(gram, inverse, shift, least)
    return inverse


def _strongest(C: Tensor, gram: Tensor, r: int) -> Tensor:
    """Combinations of nearly orthonormal columns Q that hold the most energy, made orthonormal.

    Args:
        C: Q^T A A^T Q. [b, k, k], float64.
        gram: Q^T Q. [b, k, k], float64.
        r: Number of combinations.

    Returns:
        N, with (Q N)^T Q N = 1. [b, k, r], float64.
    """
    k = C.shape[-1]
    if k == r:
        return _whitening(gram)
    # The columns hold a good part of a matrix whose norm is between one and two.
    inverse = _inverse_factor(C.clone(), 0.0, _LEAST_ENERGY)
    inverse = torch.bmm(inverse.mT, inverse)
    # Powers of the inverse save steps. High ones would turn all columns to the weakest direction:
    # the condition number of the columns after one step is at most this.
    length = torch.linalg.vector_norm(inverse, dim=(1, 2), keepdim=True)
    surplus = C.diagonal(dim1=1, dim2=2)[:, r:].sum(-1)
    spread = surplus[:, None, None] * length
    inverse /= length
    for power in (2, 4):
        small = spread < _LARGEST_SPREAD ** (1 / power)
        inverse = torch.where(small, torch.bmm(inverse, inverse), inverse)
    weak = inverse[:, :, r:]
    for i in range(_INVERSE_STEPS):
        if i > 0:
            weak = torch.bmm(inverse, weak)
        for _ in range(2 if i == _INVERSE_STEPS - 1 else 1):
            weak = torch.bmm(weak, _whitening(torch.bmm(weak.mT, weak)))
    # The block reflector that takes the last columns of the identity to -weak takes the others to
    # the complement of weak: H = 1 - V K^-1 V^T with V = weak + [0; 1] and K = V^T [0; 1].
    identity = torch.eye(k, dtype=C.dtype, device=C.device)
    V = weak + identity[:, r:]
    K = V[:, r:].mT  # [b, k - r, k - r]
    root = _whitening(torch.bmm(K.mT, K))
    above = torch.bmm(K.mT, weak[:, :r].mT)
    solved = torch.bmm(root, torch.bmm(root.mT, above))  # K^-1 V^T [1; 0]
    strong = identity[:, :r] - torch.bmm(V, solved)
    lengths = torch.bmm(strong.mT, torch.bmm(gram, strong))
    return torch.bmm(strong, _whitening(lengths))


def transport(exp_avg: Tensor, old: Tensor, new: Tensor, side: str) -> Tensor:
    """First moment in the coordinates of a new basis.

    Args:
        exp_avg: First moment M. [r, n] (left) or [m, r] (right).
        old: Basis in which M is written; NaN counts as zero. [m, r] or [n, r].
        new: Basis to write it in. Shape of old.
        side: "left" (P_new^T P_old M) or "right" (M P_old^T P_new).

    Returns:
        Shape and dtype of exp_avg.
    """
    dtype = torch.float64 if new.dtype == torch.float64 else torch.float32
    change = new.to(dtype).mT @ torch.nan_to_num(old.to(dtype))  # [r, r]
    M = exp_avg.to(dtype)
    return (change @ M if side == "left" else M @ change.mT).to(exp_avg.dtype)


class DeferredFlags:
    """Flags or counts of a device, read on the host later without stalling the present step.

    The copy to pinned memory is queued at once; reading waits for that copy alone. One optimizer
    step lies in between, so by then the copy is long done.
    """

    def __init__(self, flags: Tensor) -> None:
        self._event = None
        if flags.is_cuda:
            self._host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self._host.copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()
            # The copy runs on the stream of the flags' device, which need not be the current one.
            self._event.record(torch.cuda.current_stream(flags.device))
        else:
            self._host = flags

    def read(self) -> list[int]:
        """The flags or counts, once their copy has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
