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
# Bytes of the columns of one batch.
_BATCH_BYTES = 2**25
# Steps of the iteration that finds the weakest of the columns carried.
_INVERSE_STEPS = 16
# What a Gram matrix of unit columns is raised by, so that its Cholesky factor exists.
_SHIFT = 1e-14


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
        for k, i in enumerate(members):
            old = previous[i]
            if old is None:
                new, kept = P[k], P.new_full((), float("nan"))
            else:
                kept = old.to(P.dtype)
                # As in `refresh_bases`: each new column points to the side of the old one.
                new = torch.where((P[k] * kept).sum(dim=0) < 0, -P[k], P[k])
            bases[i] = torch.where(ok[k], new, kept).to(grads[i].dtype)
            results[i] = (torch.where(ok[k], energies[k], 0.0), ok[k])
    return bases, torch.stack([e for e, _ in results]), torch.stack([f for _, f in results])


def _pieces(batches: dict[tuple, list[int]], oversampling: int) -> Iterator[tuple[list[int], int]]:
    """Batches cut so that their float64 columns, of which some ten copies live, stay small."""
    for (rows, columns, r, *_), members in batches.items():
        k = min(r + oversampling, rows, columns)
        count = max(1, _BATCH_BYTES // (8 * max(rows, columns) * k))
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

    As `_subspace`, with two differences. Orthonormal bases come from Cholesky-QR with Gram matrices
    in float64. And the surplus columns are the k - r weakest directions found, by sixteen steps of
    inverse iteration on Q^T A A^T Q; the r others keep the order of the iteration, which tends to
    the order of the singular values, and are not rotated to single singular vectors.

    Args:
        matrices: A. [m, n] each.
        r: Rank.
        previous: Present basis of each, or None for all of them. [m, r] each.
        seeds: Seed of each random test matrix.
        power_iterations: Passes over A A^T.
        oversampling: Columns carried beside the r.

    Returns:
        P, [b, m, r], float32 (float64 for float64 matrices); captured energy of each, [b],
        float32; whether each matrix is finite, [b], bool. P and energy mean nothing where it is
        not.
    """
    m, n = matrices[0].shape
    k = min(r + oversampling, m, n)
    dtype = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
    matrices = [A.float() if A.dtype == torch.float16 else A for A in matrices]
    largest = torch.stack([torch.linalg.vector_norm(A, float("inf")) for A in matrices])
    ok = torch.isfinite(largest)
    # Scaling the thin factor keeps products of huge or tiny gradients inside the range.
    factor = (1 / largest.to(dtype).clamp_min(_LEAST_SCALE))[:, None, None]

    def times(X: Tensor, transposed: bool = False) -> Tensor:
        X = X.to(dtype) * factor
        return torch.stack(
            [_product(A.mT if transposed else A, x) for A, x in zip(matrices, X, strict=True)]
        )

    device = matrices[0].device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def gaussian(rows: int, columns: int) -> Tensor:
        like = torch.empty(0, dtype=dtype, device=device)
        return torch.stack([_gaussian(rows, columns, like, g) for g in generators])

    noise = gaussian(max(m, n), k)
    if previous[0] is None:
        start = gaussian(n, k)
    else:
        old = torch.stack([torch.nan_to_num(P.to(dtype)) for P in previous if P is not None])
        start = torch.cat([times(old, transposed=True), gaussian(n, k - r)], dim=2)
        start = _orthonormal(start, noise)
    Q = _orthonormal(times(start), noise)
    for _ in range(power_iterations):
        Q = _orthonormal(times(_orthonormal(times(Q, transposed=True), noise)), noise)
    Q = _orthonormal(Q, noise, rounds=2)
    B = times(Q, transposed=True).double()  # [b, n, k]
    C = B.mT @ B
    trace = C.diagonal(dim1=1, dim2=2).sum(-1).clamp_min(torch.finfo(dtype).tiny)
    identity = torch.eye(k, dtype=C.dtype, device=device)
    if k > r:
        L = torch.linalg.cholesky_ex(C / trace[:, None, None] + 1e-12 * identity)[0]
        inverse = torch.linalg.solve_triangular(L, identity, upper=False)
        inverse = inverse.mT @ inverse
        inverse = inverse / inverse.norm(dim=(1, 2), keepdim=True)
        weak = identity[:, r:].expand(len(matrices), -1, -1)
        for i in range(_INVERSE_STEPS):
            # A power of the inverse would turn all columns to the weakest direction.
            rounds = 2 if i == _INVERSE_STEPS - 1 else 1
            weak = _orthonormal(inverse @ weak, noise[:, :, r:], rounds)
        strong = identity[:, :r] - weak @ weak[:, :r].mT
        T = _orthonormal(strong, noise[:, :, :r], rounds=2)
    else:
        T = identity.expand(len(matrices), k, k)
    captured = ((C @ T) * T).sum(dim=(1, 2))
    norms = [torch.linalg.vector_norm(A, dtype=torch.float64) for A in matrices]
    total = (torch.stack(norms) * factor[:, 0, 0]).square().clamp_min(torch.finfo(dtype).tiny)
    return Q @ T.to(dtype), (captured / total).float(), ok


def _product(A: Tensor, X: Tensor) -> Tensor:
    """A @ X with float32 sums; X is rounded to A's dtype."""
    if A.dtype != torch.bfloat16:
        return A @ X.to(A.dtype)
    if A.is_cuda:
        return torch.mm(A, X.to(A.dtype), out_dtype=torch.float32)
    return A.float() @ X.to(A.dtype).float()


def _orthonormal(Y: Tensor, noise: Tensor, rounds: int = 1) -> Tensor:
    """Orthonormal columns that span those of Y, by shifted Cholesky-QR.

    (Fukaya et al., arXiv 1809.11085.) The Gram matrix in float64 carries condition numbers up to
    1e7. Noise of the size of float32 rounding, and the shift, stand in for directions that Y lacks.
    One round gives columns good enough to iterate with, two are orthonormal to rounding.

    Args:
        Y: Columns to span. [b, rows, k].
        noise: Gaussian, at least as many rows. [b, >= rows, k].
        rounds: How often to orthonormalise.

    Returns:
        Shape and dtype of Y.
    """
    X = Y.double()
    rows, k = X.shape[1:]
    identity = torch.eye(k, dtype=X.dtype, device=X.device)
    X = X / X.norm(dim=1, keepdim=True).clamp_min(1e-300) + noise[:, :rows] * (1e-7 / rows**0.5)
    for i in range(rounds):
        if i > 0:
            X = X / X.norm(dim=1, keepdim=True)
        L = torch.linalg.cholesky_ex(X.mT @ X + k * _SHIFT * identity)[0]
        # An inverse and a product: a triangular solve with this many rows is far slower on a GPU.
        X = X @ torch.linalg.solve_triangular(L, identity, upper=False).mT
    return X.to(Y.dtype)


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
