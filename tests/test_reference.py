"""The definition of the ops against torch.optim, known answers and float64."""

from __future__ import annotations

import pytest
import tolerances
import torch

from owlore import ops, reference

ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def run_lowrank(W, G, P, M, V, t=1.0, lr=0.01, side="left", step=0, **options):
    flags = torch.zeros(1, dtype=torch.int32)
    ops.lowrank_adam_(
        [W],
        [G],
        [P],
        [M],
        [V],
        [torch.tensor(t)],
        torch.tensor(lr, dtype=torch.float64),
        flags,
        torch.tensor(step),
        sides=[side],
        **{**ADAM, "scale": 1.0, "stochastic": False, "seed": 3, "streams": [9], **options},
    )
    return int(flags)


def run_adamw(W, G, M, V, t=1.0, lr=0.01, step=0, **options):
    flags = torch.zeros(1, dtype=torch.int32)
    ops.adamw_(
        [W],
        [G],
        [M],
        [V],
        [torch.tensor(t)],
        torch.tensor(lr, dtype=torch.float64),
        flags,
        torch.tensor(step),
        **{**ADAM, "stochastic": False, "seed": 3, "streams": [9], **options},
    )
    return int(flags)


@pytest.mark.parametrize(
    ("word", "key", "expected"),
    [
        # Known answers of Random123's kat_vectors for philox4x32 with ten rounds.
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(word, key, expected):
    got = reference.philox(key, *(torch.tensor(w) for w in word))
    assert [int(g) for g in got] == expected


def test_rounding_bits_depend_on_position_alone():
    step = torch.tensor(5)
    full = reference.rounding_bits(40, 37, 1, 2, step, reference.WEIGHT)
    part = reference.rounding_bits(7, 20, 1, 2, step, reference.WEIGHT)
    assert torch.equal(full[:7, :20], part)
    assert full.min() >= 0
    assert full.max() < 2**16
    others = [
        reference.rounding_bits(40, 37, 2, 2, step, reference.WEIGHT),
        reference.rounding_bits(40, 37, 1, 3, step, reference.WEIGHT),
        reference.rounding_bits(40, 37, 1, 2, step + 1, reference.WEIGHT),
        reference.rounding_bits(40, 37, 1, 2, step, reference.EXP_AVG),
    ]
    for other in others:
        # Two independent draws of 16 bits agree in 1 of 65,536 elements.
        assert (other == full).float().mean() < 0.01


def test_rounding_bits_of_eight_neighbours_are_the_halves_of_four_words():
    bits = reference.rounding_bits(3, 16, 77, 5, torch.tensor(4), reference.EXP_AVG_SQ)
    words = reference.philox(
        77, torch.tensor(2), torch.tensor(1), torch.tensor(4 | 2 << 30), torch.tensor(5)
    )
    halves = [half for word in words for half in (int(word) & 0xFFFF, int(word) >> 16)]
    assert bits[2, 8:].tolist() == halves


def test_stochastic_rounding_is_unbiased():
    # A value 0.3 of the way between two neighbours in bfloat16.
    low, high = 1.0, 1.0078125
    x = torch.full((1000, 1000), low + 0.3 * (high - low))
    bits = reference.rounding_bits(1000, 1000, 0, 0, torch.tensor(0), reference.WEIGHT)
    rounded = reference.stochastic_round(x, bits)
    assert set(rounded.unique().tolist()) == {low, high}
    share = (rounded == high).double().mean()
    sigma = (0.3 * 0.7 / x.numel()) ** 0.5
    assert abs(share - 0.3) < 4 * sigma


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stochastic_rounding_stays_between_neighbours(sign):
    x = sign * torch.randn(200, 64).abs() * 10.0 ** torch.randint(-30, 30, (200, 64))
    bits = reference.rounding_bits(200, 64, 0, 0, torch.tensor(0), reference.WEIGHT)
    got = reference.stochastic_round(x, bits).float()
    # bfloat16 has 8 significant bits: neighbours are less than 2^-7 of the value apart.
    assert ((got - x).abs() < x.abs() * 2.0**-7).all()
    exact = x.bfloat16().float()
    assert torch.equal(reference.stochastic_round(exact, bits).float(), exact)


def test_stochastic_rounding_passes_what_is_not_finite():
    x = torch.tensor([[float("inf"), float("-inf"), float("nan"), 0.0, -0.0]])
    got = reference.stochastic_round(x, torch.full((1, 5), 0xFFFF, dtype=torch.int32))
    assert got[0, 0] == float("inf")
    assert got[0, 1] == float("-inf")
    assert got[0, 2].isnan()
    # The bit pattern of zero plus 0xFFFF truncates to zero again.
    assert got[0, 3] == 0.0
    assert torch.signbit(got[0, 4])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, tolerances.OP_FLOAT64), (torch.float32, tolerances.OP_FLOAT32)],
)
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (9,), (0, 4), ()])
def test_adamw_equals_torch(dtype, tolerance, shape):
    torch.manual_seed(0)
    ours = torch.randn(shape, dtype=dtype)
    theirs = ours.clone().requires_grad_()
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    M, V = torch.zeros_like(ours), torch.zeros_like(ours)
    for t in range(1, 6):
        G = torch.randn(shape, dtype=dtype)
        theirs.grad = G.clone()
        adamw.step()
        assert run_adamw(ours, G, M, V, t=float(t)) == 0
    torch.testing.assert_close(ours, theirs.detach(), **tolerance)


@pytest.mark.parametrize("shape", [(70, 9), (5, 6, 9), (9, 70)])
def test_a_large_tensor_is_stepped_in_pieces_to_the_same_bits(shape, monkeypatch):
    def run(piece: int) -> list[torch.Tensor]:
        monkeypatch.setattr(reference, "_PIECE", piece)
        torch.manual_seed(5)
        tensors = [torch.randn(shape).bfloat16() for _ in range(2)]
        tensors += [torch.rand(shape).bfloat16() for _ in range(2)]
        tensors[1].view(-1)[11] = float("nan")
        assert run_adamw(*tensors, stochastic=True) == 1
        return tensors

    for piece in (1, 50, 100):
        for got, want in zip(run(piece), run(10**9), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (1, 5), (5, 1)])
def test_identity_basis_equals_adamw(side, shape):
    torch.manual_seed(1)
    m, n = shape
    low = torch.randn(shape, dtype=torch.float64)
    full = low.clone()
    P = torch.eye(m if side == "left" else n, dtype=torch.float64)
    moments = [torch.zeros(shape, dtype=torch.float64) for _ in range(4)]
    for t in range(1, 6):
        G = torch.randn(shape, dtype=torch.float64)
        run_lowrank(low, G, P, *moments[:2], t=float(t), side=side)
        run_adamw(full, G, *moments[2:], t=float(t))
    torch.testing.assert_close(low, full, **tolerances.OP_FLOAT64)


@pytest.mark.parametrize("side", ["left", "right"])
def test_lowrank_step_by_hand(side):
    torch.manual_seed(2)
    m, n, r, t, lr, scale = 7, 5, 3, 4.0, 0.02, 0.5
    W, G = (torch.randn(m, n, dtype=torch.float64) for _ in range(2))
    P = torch.linalg.qr(torch.randn(m if side == "left" else n, r, dtype=torch.float64))[0]
    R = P.T @ G if side == "left" else G @ P
    M, V = torch.randn_like(R), torch.rand_like(R)
    new_m, new_v = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
    N = new_m / (1 - 0.9**t) / ((new_v / (1 - 0.999**t)).sqrt() + 1e-8)
    update = P @ N if side == "left" else N @ P.T
    want = W * (1 - lr * 0.1) - lr * scale * update
    run_lowrank(W, G, P, M, V, t=t, lr=lr, side=side, scale=scale)
    torch.testing.assert_close(W, want, **tolerances.OP_FLOAT64)
    torch.testing.assert_close(M, new_m, **tolerances.OP_FLOAT64)
    torch.testing.assert_close(V, new_v, **tolerances.OP_FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_strided_weight_gives_what_a_contiguous_one_gives(dtype, side):
    torch.manual_seed(3)
    W, G = torch.randn(6, 10).to(dtype), torch.randn(6, 10).to(dtype)
    P = torch.linalg.qr(torch.randn(6 if side == "left" else 10, 4))[0].to(dtype)
    shape = (4, 10) if side == "left" else (6, 4)
    transposed = W.T.contiguous().T
    run_lowrank(W, G, P, torch.zeros(shape), torch.zeros(shape), side=side, stochastic=True)
    args = (G.T.contiguous().T, P, torch.zeros(shape), torch.zeros(shape))
    run_lowrank(transposed, *args, side=side, stochastic=True)
    if dtype == torch.float32:
        torch.testing.assert_close(W, transposed, **tolerances.OP_FLOAT32)
    else:
        # Other random bits would round about a third of the elements the other way; a matrix
        # product summed in another order moves next to none across a rounding boundary.
        assert (W == transposed).float().mean() > 0.95


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_nonfinite_lines_are_skipped_bit_for_bit(bad, side):
    torch.manual_seed(4)
    W, G = torch.randn(6, 8), torch.randn(6, 8)
    P = torch.linalg.qr(torch.randn(6 if side == "left" else 8, 3))[0]
    shape = (3, 8) if side == "left" else (6, 3)
    M, V = torch.randn(shape), torch.rand(shape)
    clean = [W.clone(), M.clone(), V.clone()]
    before = [W.clone(), M.clone(), V.clone()]
    assert run_lowrank(clean[0], G, P, clean[1], clean[2], side=side) == 0
    G[2, 5] = bad
    assert run_lowrank(W, G, P, M, V, side=side) == 1
    line = (slice(None), 5) if side == "left" else (2, slice(None))
    for got, old, new in zip((W, M, V), before, clean, strict=True):
        assert torch.equal(got[line], old[line])
        rest = torch.ones_like(got, dtype=torch.bool)
        rest[line] = False
        assert torch.equal(got[rest], new[rest])
        assert not torch.equal(got[rest], old[rest])


def test_nan_basis_skips_the_whole_matrix():
    W, G = torch.randn(6, 8), torch.randn(6, 8)
    M, V = torch.zeros(3, 8), torch.zeros(3, 8)
    before = W.clone()
    assert run_lowrank(W, G, torch.full((6, 3), float("nan")), M, V) == 1
    assert torch.equal(W, before)
    assert not M.any()
    assert not V.any()


def test_adamw_skips_single_elements():
    W, G = torch.randn(10), torch.randn(10)
    M, V = torch.zeros(10), torch.zeros(10)
    before = W.clone()
    G[3], G[7] = float("nan"), float("inf")
    assert run_adamw(W, G, M, V) == 1
    changed = before != W
    assert changed.tolist() == [i not in (3, 7) for i in range(10)]
    assert torch.isfinite(W).all()
    assert torch.isfinite(M).all()


def test_small_steps_move_bf16_weights_on_average():
    # An update of 1e-4 is a fortieth of the spacing of bfloat16 at 1: to nearest, nothing moves.
    shape = (100, 1000)
    moments = [torch.zeros(shape) for _ in range(4)]
    nearest = torch.ones(shape, dtype=torch.bfloat16)
    stochastic = nearest.clone()
    G = torch.ones(shape, dtype=torch.bfloat16)
    for t in range(1, 11):
        common = {"t": float(t), "lr": 1e-4, "step": t, "weight_decay": 0.0}
        run_adamw(nearest, G, *moments[:2], **common)
        run_adamw(stochastic, G, *moments[2:], stochastic=True, **common)
    assert (nearest == 1).all()
    moved = 1 - stochastic.double().mean()
    # Ten steps of 1e-4; spacing below 1 is 2^-8, so one weight's sum has sigma < sqrt(10) * 2^-9.
    assert abs(moved - 1e-3) < 4 * 10**0.5 * 2.0**-9 / (shape[0] * shape[1]) ** 0.5


def test_bf16_moments_do_not_stall():
    # b2 = 0.999 changes v by a thousandth, less than half of bfloat16's spacing of 2^-8.
    shape = (100, 100)
    W, G = torch.zeros(shape), torch.full(shape, 2.0)
    M, V = (torch.ones(shape, dtype=torch.bfloat16) for _ in range(2))
    exact = 1.0
    for t in range(1, 51):
        run_adamw(W, G, M, V, t=float(t), step=t)
        exact = 0.999 * exact + 0.001 * 4.0
    assert V.double().mean() == pytest.approx(exact, rel=0.005)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": "top"}, "expected 'left' or 'right', got 'top'"),
        ({"P": torch.eye(5)}, r"bases\[0\]: expected 6 rows"),
        ({"M": torch.zeros(2, 2)}, r"exp_avgs\[0\]: expected shape \(6, 8\)"),
        ({"G": torch.zeros(6, 7)}, r"grads\[0\]: expected shape \(6, 8\)"),
        ({"streams": [1, 2]}, "streams: expected 1 entries, got 2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    tensors = {
        "W": torch.randn(6, 8),
        "G": torch.randn(6, 8),
        "P": torch.eye(6),
        "M": torch.zeros(6, 8),
        "V": torch.zeros(6, 8),
    }
    before = tensors["W"].clone()
    with pytest.raises(ValueError, match=message):
        run_lowrank(**{**tensors, **change})
    assert torch.equal(tensors["W"], before)
