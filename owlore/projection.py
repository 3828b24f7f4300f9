"""The basis of the subspace in which a weight trains, and what a new basis does to the moments.

Letters: G [m, n] a gradient, P its basis with r orthonormal columns, A = G (left) or G^T (right),
so that P spans leading left singular vectors of A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


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
_LEAST_SCALE = 1e-30
# Raises the squared length of a column that is zero.
_LEAST_SQUARE = 1e-280
# Bytes of the columns of one batch, of a float64 copy of a part of them, and of a scaled gradient.
_BATCH_BYTES = 2**26
_CHUNK_BYTES = 2**24
_SCALED_BYTES = 2**26
# Rows of a slab: Gram matrices are sums over slabs, so that all of a GPU works on a few of them.
_SLAB = 1024
# What a Gram matrix of unit columns is raised by for each column, so that its Cholesky factor
# exists, and the norm of the noise that unit columns get: float32 rounding.
_SHIFT = 1e-14
_NOISE = 1e-7
# Steps of the iteration that finds the weakest of the columns carried.
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
        for k, i in enumerate(members):
            dtype = grads[i].dtype
            old = kept[k].to(dtype) if kept else P.new_full((), float("nan"), dtype=dtype)
            bases[i] = torch.where(ok[k], P[k].to(dtype), old)
            results[i] = (energies[k], ok[k])
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
    largest = torch.stack([torch.linalg.vector_norm(A, float("inf")) for A in matrices])
    ok = torch.isfinite(largest)
    # Scaling the thin factor keeps products of huge or tiny gradients inside the range. By powers
    # of two, so that it rounds nothing.
    exponents = largest.to(dtype).clamp_min(_LEAST_SCALE).log2().floor()
    factors = torch.exp2(-exponents).clamp_min(torch.finfo(dtype).tiny)
    factor = factors.unbind()
    energies = [_scaled_energy(A, f) for A, f in zip(matrices, factor, strict=True)]
    total = torch.stack(energies).clamp_min(torch.finfo(dtype).tiny)

    generator = torch.Generator(device)
    held = _empty_columns(len(matrices), m, k, dtype, device)
    columns = held.flatten(1, 2)[:, :m]  # [b, m, k]
    Z = torch.empty(n, k, dtype=dtype, device=device)
    for A, f, Y, old, seed in zip(matrices, factor, columns, previous, seeds, strict=True):
        Z.normal_(generator=generator.manual_seed(seed))
        if old is not None:
            # The previous basis is one power iteration ahead of random columns. Those stand in for
            # the directions that it lacks: a NaN basis (no finite gradient came yet) is zero here.
            warm = torch.empty(n, r, dtype=dtype, device=device)
            _multiply(A.mT, torch.nan_to_num(old.to(dtype)), f, warm)
            Z[:, :r].mul_(_NOISE / n**0.5).add_(warm)
        _multiply(A, Z, f, Y)
    for _ in range(power_iterations):
        _apply_(held, _whitening(_gram(held)))
        for A, f, Y in zip(matrices, factor, columns, strict=True):
            _multiply(A.mT, Y, f, Z)
            _multiply(A, Z, f, Y)
    del Z
    # Every Y is whole from here on: noise fills directions that the matrix does not have.
    noise = _gaussian(m, k, columns, generator.manual_seed(_NOISE_SEED))
    norms = torch.linalg.vector_norm(columns, dim=1, keepdim=True).clamp_min(1e-12)
    columns.addcmul_(noise, norms.mul_(_NOISE / m**0.5))
    del noise
    _apply_(held, _whitening(_gram(held)))
    C = _gram_of_products(matrices, columns, factor)
    N = _strongest(C, _gram(held), r)
    _apply_(held, N)
    captured = ((C @ N) * N).sum(dim=(1, 2))
    return columns[:, :, :r], (captured / total).float(), ok


def _scaled_energy(A: Tensor, factor: Tensor) -> Tensor:
    """||factor A||^2, [], float64, without a copy of all of A in a wider dtype."""
    rows = max(1, _SCALED_BYTES // (A.element_size() * A.shape[1]))
    norms = []
    for part in A.split(rows):
        part = part.float() if part.dtype == torch.float16 else part
        out = torch.float64 if part.dtype == torch.float64 else torch.float32
        norms.append(torch.linalg.vector_norm(part * factor, dtype=out))
    return torch.stack(norms).double().square().sum()


def _multiply(A: Tensor, X: Tensor, factor: Tensor, out: Tensor) -> None:
    """Writes A (factor X) with float32 sums; factor X is rounded to A's dtype."""
    if A.dtype == torch.float16:
        A = A.float()
    thin = torch.mul(X, factor, out=torch.empty(X.shape, dtype=A.dtype, device=A.device))
    if A.dtype != torch.bfloat16:
        torch.mm(A, thin, out=out)
    elif A.is_cuda:
        torch.mm(A, thin, out_dtype=torch.float32, out=out)
    else:
        torch.mm(A.float(), thin.float(), out=out)


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


def _chunks(X: Tensor) -> Iterator[tuple[slice, slice]]:
    """Matrices and slabs of parts of columns whose float64 copies take `_CHUNK_BYTES` at most."""
    count, slabs, rows, k = X.shape
    room = max(1, _CHUNK_BYTES // (8 * rows * k))
    if room >= slabs:
        for i in range(0, count, room // slabs):
            yield slice(i, i + room // slabs), slice(None)
        return
    for i in range(count):
        for j in range(0, slabs, room):
            yield slice(i, i + 1), slice(j, j + room)


def _gram(X: Tensor) -> Tensor:
    """Gram matrices X^T X of columns in slabs. [b, slabs, rows, k] to [b, k, k], float64."""
    count, _, rows, k = X.shape
    gram = torch.zeros(count, k, k, dtype=torch.float64, device=X.device)
    for some, slabs in _chunks(X):
        part = X[some, slabs].double()
        of_slabs = part.view(-1, rows, k)
        gram[some] += torch.bmm(of_slabs.mT, of_slabs).view(*part.shape[:2], k, k).sum(1)
    return gram


def _gram_of_products(
    matrices: Sequence[Tensor], columns: Tensor, factor: Sequence[Tensor]
) -> Tensor:
    """Gram matrices of A^T Q for the columns Q, [b, m, k], of each A. [b, k, k], float64."""
    n, k = matrices[0].shape[1], columns.shape[2]
    count = min(len(matrices), max(1, _CHUNK_BYTES // (8 * n * k)))
    gram = torch.empty(len(matrices), k, k, dtype=torch.float64, device=columns.device)
    held = _empty_columns(count, n, k, columns.dtype, columns.device)
    for start in range(0, len(matrices), count):
        some = range(start, min(start + count, len(matrices)))
        for i, B in zip(some, held.flatten(1, 2)[:, :n], strict=False):
            _multiply(matrices[i].mT, columns[i], factor[i], B)
        gram[some.start : some.stop] = _gram(held[: len(some)])
    return gram


def _apply_(X: Tensor, W: Tensor) -> None:
    """Replaces the first columns by X W, with float64 sums. [b, slabs, rows, k], [b, k, l]."""
    for some, slabs in _chunks(X):
        part = X[some, slabs]
        product = torch.bmm(part.double().flatten(1, 2), W[some])
        part[..., : W.shape[2]] = product.view(*part.shape[:3], -1)


def _whitening(gram: Tensor) -> Tensor:
    """W, upper triangular, with which the columns Y W are orthonormal, from Y^T Y. [b, k, k].

    Columns of Y may be of very different lengths. Those that depend on others come out short.
    """
    L = _factor_(gram.clone())
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    # An inverse and a product: a triangular solve with many rows is far slower on a GPU.
    return torch.linalg.solve_triangular(L, identity, upper=False).mT


def _factor_(gram: Tensor) -> Tensor:
    """Cholesky factor of Gram matrices, whose diagonals are raised so that there is one."""
    # Relative to each column's length, as Cholesky factors do not depend on the lengths otherwise.
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.mul_(1.0 + gram.shape[-1] * _SHIFT).add_(_LEAST_SQUARE)
    return torch.linalg.cholesky_ex(gram)[0]


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
    identity = torch.eye(k, dtype=C.dtype, device=C.device)
    trace = C.diagonal(dim1=1, dim2=2).sum(-1).clamp_min(_LEAST_SQUARE)
    raised = C / trace[:, None, None]
    raised.diagonal(dim1=1, dim2=2).add_(1e-12)
    L = torch.linalg.cholesky_ex(raised)[0]
    inverse = torch.linalg.solve_triangular(L, identity, upper=False)
    inverse = inverse.mT @ inverse
    # Powers of the inverse save steps. High ones would turn all columns to the weakest direction:
    # the condition number of the columns after one step is at most this.
    length = inverse.norm(dim=(1, 2), keepdim=True)
    spread = length * raised.diagonal(dim1=1, dim2=2)[:, r:].sum(-1)[:, None, None]
    inverse = inverse / length
    for power in (2, 4):
        inverse = torch.where(spread**power < _LARGEST_SPREAD, inverse @ inverse, inverse)
    weak = identity[:, r:].expand(len(C), -1, -1)
    for i in range(_INVERSE_STEPS):
        weak = inverse @ weak
        for _ in range(2 if i == _INVERSE_STEPS - 1 else 1):
            L = _factor_(weak.mT @ weak)
            weak = torch.linalg.solve_triangular(L, weak.mT, upper=False).mT
    # The block reflector that takes the last columns of the identity to -weak takes the others to
    # the complement of weak: H = 1 - V K^-1 V^T with V = weak + [0; 1] and K = V^T [0; 1].
    V = weak + identity[:, r:]
    K = V[:, r:].mT  # [b, k - r, k - r]
    root = _whitening(K.mT @ K)
    solved = root @ (root.mT @ (K.mT @ weak[:, :r].mT))  # K^-1 V^T [1; 0]
    strong = identity[:, :r] - V @ solved
    return strong @ _whitening(strong.mT @ gram @ strong)


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
