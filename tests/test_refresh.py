"""Bases of many gradients at once: the batched subspace iteration that CUDA uses, run anywhere."""

from __future__ import annotations

import pytest
import tolerances
import torch

from owlore import projection

BATCHED = projection._refresh_in_batches


def spectrum(m, n, power, dtype=torch.float32, seed=0):
    """A matrix with singular values i^-power."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U, V = (
        torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]
        for d in (m, n)
    )
    return (U * torch.arange(1, k + 1, dtype=torch.float64) ** -power @ V.T).to(dtype)


def energy(G, P, side):
    """||P^T G||^2 or ||G P||^2, in float64."""
    G, P = G.double(), P.double()
    return float((P.T @ G if side == "left" else G @ P).square().sum())


def orthonormal(P):
    """Largest deviation of P^T P from the identity."""
    return float((P.double().T @ P.double() - torch.eye(P.shape[1])).abs().max())


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("power", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("scale", [1e-35, 1.0, 1e35])
def test_energy_is_nearly_the_svds(warm, side, power, scale):
    r, grads = 32, [spectrum(256, 400, power, seed=s) * scale for s in (0, 1)]
    rows = 256 if side == "left" else 400
    old = [torch.linalg.qr(torch.randn(rows, r))[0] if warm else None] * 2
    bases, energies, finite = BATCHED(grads, [r] * 2, [side] * 2, old, [1, 2], 2, 8)
    assert finite.tolist() == [True, True]
    for G, P, captured in zip(grads, bases, energies, strict=True):
        S = torch.linalg.svdvals(G.double()).square()
        assert energy(G, P, side) >= 0.985 * float(S[:r].sum())
        assert orthonormal(P) < tolerances.ORTHONORMAL_FLOAT32
        assert float(captured) == pytest.approx(energy(G, P, side) / float(S.sum()), rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "G",
    [
        torch.zeros(60, 80),
        torch.ones(60, 80),
        spectrum(60, 80, 0.0)[:, :3] @ spectrum(60, 80, 0.0)[:3],
        torch.eye(80)[:60],
    ],
    ids=["zero", "rank 1", "rank 3", "flat"],
)
def test_deficient_gradients_give_a_whole_basis(G, side):
    bases, energies, finite = BATCHED([G], [20], [side], [None], [3], 2, 8)
    assert orthonormal(bases[0]) < tolerances.ORTHONORMAL_FLOAT32
    assert finite.tolist() == [True]
    assert 0 <= float(energies[0]) <= 1.0001


def test_nonfinite_gradients_keep_the_old_basis():
    good, bad = spectrum(64, 96, 0.5), spectrum(64, 96, 0.5)
    bad[3, 4] = float("nan")
    old = torch.linalg.qr(torch.randn(64, 8))[0]
    bases, energies, finite = BATCHED([bad, good], [8] * 2, ["left"] * 2, [old, old], [1, 2], 2, 8)
    assert finite.tolist() == [False, True]
    assert torch.equal(bases[0], old)
    assert not torch.equal(bases[1], old)
    assert float(energies[0]) == 0
    alone, _, _ = BATCHED([good], [8], ["left"], [old], [2], 2, 8)
    assert torch.allclose(alone[0], bases[1], atol=1e-4)
    bases, _, _ = BATCHED([bad], [8], ["left"], [None], [1], 2, 8)
    assert bases[0].isnan().all()


def test_mixed_shapes_come_back_in_order():
    grads = [spectrum(9, 30, 1.0), spectrum(30, 9, 1.0), spectrum(9, 30, 1.0, seed=5)]
    grads.append(torch.randn(1, 1))
    sides, ranks = ["left", "right", "left", "left"], [4, 4, 4, 1]
    bases, energies, _ = BATCHED(grads, ranks, sides, [None] * 4, [1, 2, 3, 4], 2, 8)
    for G, P, side, captured in zip(grads, bases, sides, energies, strict=True):
        assert float(captured) == pytest.approx(
            energy(G, P, side) / float(G.double().square().sum()), rel=1e-4
        )


@pytest.mark.gpu
def test_no_wait_for_the_device():
    grads = [torch.randn(512, 384, device="cuda").bfloat16() for _ in range(3)]
    arguments = (grads, [64] * 3, ["left"] * 3, [None] * 3, [1, 2, 3])
    options = {"method": "subspace", "power_iterations": 2, "oversampling": 8}
    projection.refresh_bases(*arguments, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        projection.refresh_bases(*arguments, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
