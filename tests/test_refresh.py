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


def pieces_of(monkeypatch, batch, chunk, slab=1024):
    """Sets what a refresh holds at once."""
    for name, value in (("BATCH", batch), ("CHUNK", chunk)):
        monkeypatch.setattr(projection, f"_{name}_BYTES", value)
    monkeypatch.setattr(projection, "_SLAB", slab)


# Columns of one 100 x 70 matrix at rank 12 take 100 * 32 numbers, a slab of 34 rows 34 * 32.
@pytest.mark.parametrize(
    ("batch", "chunk", "slab"),
    [
        (4 * 3200, 2**24, 1024),
        (4 * 3200 * 2, 8 * 1088, 40),
        (2**26, 8 * 1088 * 2, 40),
        (2**26, 8 * 1088 * 7, 40),
        (2**26, 1, 1),
    ],
    ids=["one by one", "pairs by slabs", "all by slabs", "two and one", "rows"],
)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_give_the_same_bases(batch, chunk, slab, warm, dtype, monkeypatch):
    grads = [spectrum(100, 70, 0.5, dtype, seed=s) for s in range(5)]
    old = [torch.linalg.qr(torch.randn(100, 12, dtype=dtype))[0] if warm else None] * 5
    arguments = grads, [12] * 5, ["left"] * 5, old, list(range(5)), 2, 8
    whole, energies, _ = BATCHED(*arguments)
    pieces_of(monkeypatch, batch, chunk, slab)
    bases, found, finite = BATCHED(*arguments)
    assert finite.all()
    torch.testing.assert_close(found, energies, rtol=1e-5, atol=0)
    for G, P, want in zip(grads, bases, whole, strict=True):
        assert orthonormal(P) < tolerances.ORTHONORMAL_FLOAT32
        assert energy(G, P, "left") == pytest.approx(energy(G, want, "left"), rel=1e-5)
        # Each column is its own, not another one's of the same space.
        assert ((P * want).sum(dim=0) > 1 - 1e-3).all()


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (5, [5]), (7, [4, 3]), (13, [5, 5, 3])])
def test_batches_are_cut_evenly(count, sizes, monkeypatch):
    monkeypatch.setattr(projection, "_BATCH_BYTES", 4 * 100 * 32 * 6)
    batches = {(100, 70, 12, torch.bfloat16, "cpu", True): list(range(count))}
    found = list(projection._pieces(batches, 8))
    assert [len(members) for members, _ in found] == sizes
    assert [i for members, _ in found for i in members] == list(range(count))


@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 3000])
def test_gram_does_not_see_rows_beyond_the_last(rows, monkeypatch):
    pieces_of(monkeypatch, 2**26, 8 * 1024 * 6)
    X = projection._empty_columns(3, rows, 6, torch.float32, torch.device("cpu"))
    # Of one sign, so that no sum is near zero.
    Y = torch.rand(3, rows, 6)
    X.flatten(1, 2)[:, :rows] = Y
    assert X.shape[2] <= 1024
    gram = Y.double().mT @ Y.double()
    torch.testing.assert_close(projection._gram(X), gram, **tolerances.OP_FLOAT64)
    assert not X.flatten(1, 2)[:, rows:].any()


@pytest.mark.parametrize("room", [1, 7, 30, 31, 60, 2**20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_product_by_parts(room, dtype, monkeypatch):
    """Of some rows of a matrix, one matrix, several; into columns that it is made of too."""
    monkeypatch.setattr(projection, "_CHUNK_BYTES", 16 * 6 * room)
    Y, W = torch.randn(3, 30, 6), torch.randn(3, 6, 4, dtype=torch.float64)
    want, rest = (Y.double() @ W).to(dtype), Y[:, :, 4:].clone()
    out = Y if dtype == torch.float32 else torch.zeros(3, 30, 6, dtype=dtype)
    projection._apply(Y, W, out[:, :, :4])
    assert torch.equal(out[:, :, :4], want)
    assert torch.equal(Y[:, :, 4:], rest)


def test_bases_do_not_depend_on_their_company():
    grads = [spectrum(60, 90, 0.5, torch.float64, seed=s) for s in range(6)]
    together, energies, _ = BATCHED(grads, [8] * 6, ["left"] * 6, [None] * 6, list(range(6)), 2, 8)
    for i in (0, 5):
        alone, found, _ = BATCHED([grads[i]], [8], ["left"], [None], [i], 2, 8)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)
        torch.testing.assert_close(found[0], energies[i], rtol=1e-6, atol=0)
    other, _, _ = BATCHED([grads[0]], [8], ["left"], [None], [1], 2, 8)
    assert (other[0] - together[0]).abs().max() > 1e-3


def test_columns_point_to_the_side_of_the_old_ones():
    grads = [spectrum(60, 90, 1.0, seed=s) for s in range(3)]
    arguments = grads, [8] * 3, ["left"] * 3
    old, _, _ = BATCHED(*arguments, [None] * 3, [0, 1, 2], 2, 8)
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    turned = [P * signs for P in old]
    bases, _, _ = BATCHED(*arguments, turned, [3, 4, 5], 2, 8)
    for P, before in zip(bases, turned, strict=True):
        assert ((P * before).sum(dim=0) > 0).all()


@pytest.mark.parametrize("decay", [0.98, 0.8, 0.3])
def test_strongest_combinations_are_the_leading_eigenvectors(decay):
    generator = torch.Generator().manual_seed(0)
    k, r = 48, 32
    # Sorted but for a little, as the iteration leaves them; in columns that are not quite unit.
    mix = 0.1 * torch.randn(2, k, k, generator=generator, dtype=torch.float64)
    V = torch.linalg.qr(torch.eye(k) + mix.tril())[0]
    values = decay ** torch.arange(k, dtype=torch.float64)
    scale = torch.diag(torch.linspace(1, 1.1, k, dtype=torch.float64))
    C = scale @ (V * values) @ V.mT @ scale
    gram = (scale @ scale).expand(2, k, k)
    N = projection._strongest(C, gram, r)
    unit = torch.eye(r, dtype=torch.float64).expand(2, r, r)
    torch.testing.assert_close(N.mT @ gram @ N, unit, rtol=0, atol=1e-10)
    missed = torch.linalg.eigvalsh(C)[:, -r:].sum(-1) - torch.linalg.eigvalsh(
        torch.linalg.qr(N)[0].mT @ C @ torch.linalg.qr(N)[0]
    ).sum(-1)
    assert (missed < 2e-3 * values[r:].sum() + 1e-12).all()


@pytest.mark.parametrize("blocks", [1, 5])
def test_workspace_is_bounded(blocks):
    """Of the matrices of one shape in LLaMA-2-7B's blocks, and of all of them at once."""
    # Modules that look at torch.Generator must not see the planner's.
    import torch.distributed.tensor

    from owlore import planner

    large, square = [(4096, 11008)] * 3 * blocks, [(4096, 4096)] * 4 * blocks
    for shapes in (large, large + square):
        with planner._like_a_gpu():
            tracker = planner._Tracker(lambda *_, **__: 0)
            grads = [torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in shapes]
            given, count = sum(G.nbytes for G in grads), len(grads)
            nothing = [None] * count
            with tracker:
                bases, *_ = BATCHED(
                    grads, [128] * count, ["left"] * count, nothing, range(count), 2, 8
                )
            (peak,) = tracker.peaks([0])
        held = given + sum(P.nbytes for P in bases)
        assert max(sum(parts.values()) for parts in peak.values()) - held < 100 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 5])
def test_energy_on_a_gpu_is_nearly_the_svds(warm, dtype, count, monkeypatch):
    pieces_of(monkeypatch, 2**26, 2**20)
    grads = [spectrum(1100, 700, 0.5, dtype, seed=s).cuda() for s in range(count)]
    first = torch.full((700, 100), float("nan"), dtype=dtype, device="cuda")
    old = [first if warm else None] * count
    seeds = list(range(count))
    bases, energies, finite = BATCHED(grads, [100] * count, ["right"] * count, old, seeds, 2, 8)
    assert finite.all()
    for G, P, captured in zip(grads, bases, energies, strict=True):
        S = torch.linalg.svdvals(G.double()).square()
        Q = torch.linalg.qr(P.double())[0]
        assert energy(G, Q, "right") >= 0.985 * float(S[:100].sum())
        assert float(captured) == pytest.approx(energy(G, Q, "right") / float(S.sum()), rel=1e-2)
        error = (P.double().T @ P.double() - torch.eye(100, device="cuda")).abs().max()
        assert error < (1e-2 if dtype.itemsize == 2 else tolerances.ORTHONORMAL_FLOAT32)


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
