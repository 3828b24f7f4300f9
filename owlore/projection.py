"""The basis of the subspace in which a weight trains, and what a new basis does to the moments.

Letters: G [m, n] a gradient, P its basis with r orthonormal columns, A = G (left) or G^T (right),
so that P spans leading left singular vectors of A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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
            # A singular vector's sign is arbitrary. Moments that are kept over a refresh are written
            # in the old columns, so each new column points to the side of the old one.
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
    """Booleans computed on a device, read on the host later without stalling the present step.

    The copy to pinned memory is queued at once; reading waits for that copy alone. One optimizer
    step lies in between, so by then the copy is long done.
    """

    def __init__(self, flags: Tensor) -> None:
        self._event = None
        if flags.is_cuda:
            self._host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self._host.copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = flags

    def read(self) -> list[bool]:
        """The flags, once their copy has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
