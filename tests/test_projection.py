"""Bases and the transport of moments."""

from __future__ import annotations

import pytest
import tolerances
import torch

from owlore import projection

OPTIONS = {"power_iterations": 2, "oversampling": 8}


def refresh(G, r, side, method="subspace", old=None, seed=0, **options):
    bases, energies, finite = projection.refresh_bases(
        [G], [r], [side], [old], [seed], method=method, **{**OPTIONS, **options}
    )
    return bases[0], float(energies[0]), bool(finite[0])


def decaying(m, n, seed=0, dtype=torch.float32):
    """A matrix with singular values i^-0.5."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U, V = (
        torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]
        for d in (m, n)
    )
    return (U * torch.arange(1, k + 1, dtype=torch.float64) ** -0.5 @ V.T).to(dtype)


def energy(G, P, side):
    """||P^T G||^2 / ||G||^2 (left) or ||G P||^2 / ||G||^2 (right), in float64."""
    G, P = G.double(), P.double()
    R = P.T @ G if side == "left" else G @ P
    return float(R.square().sum() / G.square().sum())


@pytest.mark.parametrize(
    ("m", "n", "side", "expected"),
    [
        (4, 4, "std", "right"),
        (8, 4, "std", "right"),
        (4, 8, "std", "left"),
        (4, 4, "reverse", "left"),
        (8, 4, "reverse", "left"),
        (4, 8, "reverse", "right"),
        (4, 8, "right", "right"),
        (8, 4, "left", "left"),
    ],
)
def test_choose_side(m, n, side, expected):
    assert projection.choose_side(m, n, side) == expected


@pytest.mark.parametrize("decay", [0.8, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("refresh", [projection.refresh_bases, projection._refresh_in_batches])
def test_steep_singular_values_are_captured(refresh, dtype, decay):
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, 40, generator=generator).double())[0] for d in (48, 40))
    S = decay ** torch.arange(40.0, dtype=torch.float64)
    G = (U * S @ V.mT).to(dtype)
    options = {"method": "subspace"} if refresh is projection.refresh_bases else {}
    for r in (4, 12):
        P = refresh([G], [r], ["left"], [None], [7], **OPTIONS, **options)[0][0]
        best = float(S[:r].square().sum() / S.square().sum())
        assert best - energy(G, P, "left") < 1e-4


@pytest.mark.parametrize("method", ["svd", "subspace", "random"])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30), (12, 200), (1, 9), (9, 1)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_basis_is_orthonormal_and_energy_is_what_it_says(method, shape, side):
    G = decaying(*shape)
    r = min(8, *shape)
    P, captured, finite = refresh(G, r, side, method)
    assert P.shape == (shape[0] if side == "left" else shape[1], r)
    assert finite
    assert (P.T @ P - torch.eye(r)).abs().max() < tolerances.ORTHONORMAL_FLOAT32
    assert captured == pytest.approx(energy(G, P, side), rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_svd_holds_the_leading_singular_values(side):
    G = decaying(50, 30)
    S = torch.linalg.svdvals(G.double())
    want = float(S[:8].square().sum() / S.square().sum())
    assert energy(G, refresh(G, 8, side, "svd")[0], side) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(256, 688), (688, 256)])
def test_subspace_iteration_is_nearly_the_svd(side, shape):
    G = decaying(*shape)
    best = refresh(G, 32, side, "svd")[1]
    # Two power iterations reach .991 of the exact energy on this spectrum.
    assert refresh(G, 32, side)[1] / best > 0.985
    assert refresh(G, 32, side, power_iterations=0)[1] < refresh(G, 32, side)[1]


def test_warm_start_is_worth_a_power_iteration():
    G = decaying(256, 256)
    old = refresh(G, 32, "left", power_iterations=1)[0]
    cold = refresh(G, 32, "left", power_iterations=0, seed=1)[1]
    warm = refresh(G, 32, "left", power_iterations=0, seed=1, old=old)[1]
    one = refresh(G, 32, "left", power_iterations=1, seed=1)[1]
    assert cold < one < warm


def test_random_basis_captures_its_share_and_depends_on_the_seed():
    G = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    P, captured, _ = refresh(G, 50, "left", "random", seed=1)
    assert captured == pytest.approx(0.25, abs=0.02)
    assert torch.equal(P, refresh(G, 50, "left", "random", seed=1)[0])
    assert not torch.equal(P, refresh(G, 50, "left", "random", seed=2)[0])


@pytest.mark.parametrize("method", ["svd", "subspace", "random"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_zero_gradient_gives_a_valid_basis(method, side):
    P, captured, finite = refresh(torch.zeros(20, 30), 6, side, method)
    assert finite
    assert captured == 0.0
    assert (P.T @ P - torch.eye(6)).abs().max() < tolerances.ORTHONORMAL_FLOAT32


@pytest.mark.parametrize("method", ["svd", "subspace", "random"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradient_keeps_the_old_basis(method, bad):
    G = decaying(20, 30)
    old = refresh(G, 6, "left")[0]
    broken = G.clone()
    broken[3, 4] = bad
    P, _, finite = refresh(broken, 6, "left", method, old=old)
    assert not finite
    assert torch.equal(P, old)
    assert refresh(broken, 6, "left", method)[0].isnan().all()
    # A NaN basis is no start for the next one.
    P, captured, finite = refresh(G, 6, "left", method, old=torch.full_like(old, float("nan")))
    assert finite
    assert (P.T @ P - torch.eye(6)).abs().max() < tolerances.ORTHONORMAL_FLOAT32
    assert captured > 0.1


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e37])
def test_basis_does_not_depend_on_the_gradients_scale(scale):
    G = decaying(30, 40)
    best = refresh(G, 6, "left")[1]
    P, captured, finite = refresh(G * scale, 6, "left")
    assert finite
    assert captured == pytest.approx(best, rel=1e-3)
    assert energy(G, P, "left") == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_basis_has_the_gradients_dtype(dtype):
    G = decaying(30, 40).to(dtype)
    P, captured, _ = refresh(G, 6, "right")
    assert P.dtype == dtype
    assert captured > 0.98 * refresh(G.float(), 6, "right", "svd")[1]


def test_seed_names_run_step_and_matrix():
    seeds = {
        projection.matrix_seed(*key)
        for key in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 10, "a")]
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Fixed for ever: a resumed run must find the same matrices.
    assert projection.matrix_seed(0, 0, "a") == 4408071414745896774


@pytest.mark.parametrize("side", ["left", "right"])
def test_transport_is_the_moment_in_new_coordinates(side):
    torch.manual_seed(0)
    m, n, r = 12, 10, 4
    rows = m if side == "left" else n
    old, new = (torch.linalg.qr(torch.randn(rows, r).double())[0] for _ in range(2))
    M = torch.randn((r, n) if side == "left" else (m, r)).double()
    moved = projection.transport(M, old, new, side)
    full = old @ M if side == "left" else M @ old.T
    want = new.T @ full if side == "left" else full @ new
    torch.testing.assert_close(moved, want, **tolerances.OP_FLOAT64)
    torch.testing.assert_close(projection.transport(M, old, old, side), M, **tolerances.OP_FLOAT64)
    nothing = projection.transport(M, torch.full_like(old, float("nan")), new, side)
    assert not nothing.any()


def test_deferred_flags():
    assert projection.DeferredFlags(torch.tensor([True, False])).read() == [True, False]


@pytest.mark.gpu
def test_deferred_flags_from_a_gpu():
    flags = projection.DeferredFlags(torch.tensor([True, False], device="cuda"))
    assert flags.read() == [True, False]
