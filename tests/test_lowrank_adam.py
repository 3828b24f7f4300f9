"""The Triton kernels of low-rank AdamW against float64; in the interpreter without a GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tolerances
import torch

from owlore import ops, reference

lowrank_adam = pytest.importorskip("owlore.kernels.lowrank_adam")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "scale": 0.5}
HALF_ULP = 2**-24
SEED = 2**40 + 2**31 + 12345
# Small blocks, so that small matrices have several strips, walks and chunks.
SMALL = {
    "block": 32, "block_k": 16, "chunks": 2, "stages": 2, "warps": 4, "cols": 32, "rows": 16,
    "walk": 32, "update_stages": 2, "update_warps": 4, "adam": (1024, 4),
}  # fmt: skip
WHOLE = lowrank_adam.Config(staged=False, **SMALL)
STAGED = lowrank_adam.Config(staged=True, **SMALL)
CONFIGS = pytest.mark.parametrize("config", [WHOLE, STAGED], ids=["whole", "staged"])


def matrices(m, n, r, side, dtype, moments=torch.float32, layout="row", seed=0):
    """W, G, P, M, V; `layout` is that of W and G."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def laid_out(scale):
        if layout == "row":
            return (normal(m, n) * scale).to(DEVICE, dtype)
        if layout == "column":
            return (normal(n, m) * scale).to(DEVICE, dtype).T
        return (normal(2 * m, 3 * n) * scale).to(DEVICE, dtype)[::2, ::3]

    W, G = laid_out(0.05), laid_out(1.0)
    P = torch.linalg.qr(normal(m if side == "left" else n, r))[0].contiguous()
    shape = (r, n) if side == "left" else (m, r)
    M, V = normal(*shape) * 0.1, normal(*shape).square() * 0.1
    return W, G, P.to(DEVICE, dtype), M.to(DEVICE, moments), V.to(DEVICE, moments)


def clone(x):
    """A copy with the same strides, which torch.clone does not promise for views with gaps."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def step(function, sets, sides, t=3.0, lr=0.02, streams=None, **options):
    """One step on copies. Returns the copies [(W, M, V), ...] and the non-finite flags."""
    W, M, V = ([clone(s[k]) for s in sets] for k in (0, 3, 4))
    flags = torch.zeros(len(sets), dtype=torch.int32, device=DEVICE)
    done = function(
        W,
        [s[1] for s in sets],
        [s[2] for s in sets],
        M,
        V,
        [torch.tensor(t, device=DEVICE) for _ in sets],
        torch.tensor(lr, dtype=torch.float64, device=DEVICE),
        flags,
        torch.tensor(7, device=DEVICE),
        sides=sides,
        streams=streams or [3_000_000_000 + i for i in range(len(sets))],
        **{**ADAM, "stochastic": False, "seed": SEED, **options},
    )
    assert done in (None, True)
    return list(zip(W, M, V, strict=True)), flags


def assert_close_to_float64(ours, sets, sides, **options):
    """At most twice the error of the reference in the same dtype, for W, M and V."""
    exact, _ = step(
        reference.lowrank_adam_, [[x.double() for x in s] for s in sets], sides, **options
    )
    plain, _ = step(reference.lowrank_adam_, sets, sides, **options)
    for got, near, want, before in zip(ours, plain, exact, sets, strict=True):
        assert not torch.equal(got[0], before[0])
        slack = tolerances.LOWRANK_FLOAT32
        if before[2].dtype != torch.float32:
            slack = tolerances.LOWRANK_TENSOR_CORES
        for g, p, w, extra in zip(got, near, want, (HALF_ULP, slack, slack), strict=True):
            error = (g.double() - w).norm() / w.norm()
            assert error <= 2 * (p.double() - w).norm() / w.norm() + extra


DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CONFIGS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("m", "n", "r", "layout"),
    [
        (64, 96, 16, "row"),
        (37, 51, 24, "row"),
        (51, 37, 32, "column"),
        (40, 35, 8, "strided"),
        (1, 1, 1, "row"),
        (1, 33, 1, "row"),
        (33, 1, 1, "row"),
    ],
)
def test_step_against_float64(dtype, config, side, m, n, r, layout):
    sets = [matrices(m, n, r, side, dtype, layout=layout)]
    ours, flags = step(lowrank_adam.launch_lowrank_adam, sets, [side], config=config)
    assert_close_to_float64(ours, sets, [side])
    assert flags.tolist() == [0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("rows", "cols", "warps", "m", "n", "r"),
    [
        (64, 128, 8, 128, 128, 16),
        (64, 128, 8, 72, 136, 24),
        (64, 256, 16, 136, 264, 24),
        (128, 256, 16, 128, 256, 16),
        # Beyond the registers: by ranks, and the tile in parts.
        (128, 128, 8, 136, 136, 130),
    ],
)
def test_permuted_products(m, n, r, rows, cols, warps, side):
    """Rows and columns stand for others in the product and nowhere else: W, lines, random bits."""
    config = WHOLE._replace(rows=rows, cols=cols, walk=128, update_warps=warps, permuted=True)
    sets = [matrices(m, n, r, side, torch.float32, seed=s) for s in (1, 2)]
    sets[1][1][5, 9] = float("nan")
    ours, flags = step(lowrank_adam.launch_lowrank_adam, sets, [side] * 2, config=config)
    assert flags.tolist() == [0, 1]
    assert_close_to_float64(ours[:1], sets[:1], [side])
    strip = (slice(None), 9) if side == "left" else (5, slice(None))
    assert torch.equal(ours[1][0][strip], sets[1][0][strip])
    rest = torch.ones(m, n, dtype=torch.bool, device=DEVICE)
    rest[strip] = False
    assert (ours[1][0] != sets[1][0])[rest].float().mean() > 0.99

    rounded = [(W.bfloat16(), *others) for W, *others in sets[:1]]
    options = {"stochastic": True, "config": config}
    ours, _ = step(lowrank_adam.launch_lowrank_adam, rounded, [side], **options)
    want, _ = step(reference.lowrank_adam_, rounded, [side], stochastic=True)
    assert (ours[0][0] != want[0][0]).float().mean() < 2e-3


def cut(whole, side, row, col):
    """What a rank holds of W, R, P, M and V from a row and column on, and its parts of W, M, V."""
    W, R, P, M, V = whole
    place = (slice(row, None), slice(col, None))
    if side == "left":
        lines, P = (slice(None), slice(col, None)), P[row:].contiguous()
    else:
        lines, P = (slice(row, None), slice(None)), P[col:].contiguous()
    shard = (W[place], R[lines].contiguous(), P, M[lines].contiguous(), V[lines].contiguous())
    return shard, (place, lines, lines)


@pytest.mark.parametrize("layout", ["row", "column"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_shard_takes_the_bits_of_the_whole_matrix(side, layout):
    W, G, P, M, V = matrices(96, 72, 16, side, torch.float32, torch.bfloat16, layout)
    W = clone(W.bfloat16()) if layout == "row" else W.T.bfloat16().T
    R = (P.T @ G if side == "left" else G @ P).contiguous()
    options = {"stochastic": True, "projected": True, "config": WHOLE}
    whole, _ = step(lowrank_adam.launch_lowrank_adam, [(W, R, P, M, V)], [side], **options)
    row, col = 40, 24
    shard, parts = cut((W, R, P, M, V), side, row, col)
    begins = {"first_rows": [row], "first_columns": [col]}
    got, _ = step(lowrank_adam.launch_lowrank_adam, [shard], [side], **options, **begins)
    other, _ = step(lowrank_adam.launch_lowrank_adam, [shard], [side], **options)
    for k, part in enumerate(parts):
        want = whole[0][k][part]
        assert torch.equal(got[0][k], want)
        assert not torch.equal(other[0][k], want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_bits_of_column_major_weights(side):
    """The bits follow the matrix, not its place in memory."""
    W, *rest = matrices(44, 52, 24, side, torch.float32)
    outcomes = []
    for weights in (W.bfloat16(), W.bfloat16().T.contiguous().T):
        got, _ = step(
            lowrank_adam.launch_lowrank_adam, [(weights, *rest)], [side], stochastic=True,
            config=WHOLE,
        )  # fmt: skip
        outcomes.append(got[0][0])
    assert (outcomes[0] != outcomes[1]).float().mean() < 2e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_rank_beyond_the_registers(side):
    sets = [matrices(290, 300, 272, side, torch.float32)]
    ours, _ = step(lowrank_adam.launch_lowrank_adam, sets, [side], config=STAGED)
    assert_close_to_float64(ours, sets, [side])


@CONFIGS
@pytest.mark.parametrize("side", ["left", "right"])
def test_projected_gradient(config, side):
    W, G, P, M, V = matrices(70, 50, 24, side, torch.float32)
    R = P.T @ G if side == "left" else G @ P
    given = [(W, R.contiguous(), P, M, V)]
    ours, _ = step(lowrank_adam.launch_lowrank_adam, given, [side], config=config, projected=True)
    assert_close_to_float64(ours, given, [side], projected=True)


@pytest.mark.parametrize("t", [1.0, 2.0, 100.0, 5000.0])
def test_bias_correction(t):
    sets = [matrices(40, 48, 16, "left", torch.float32)]
    ours, _ = step(lowrank_adam.launch_lowrank_adam, sets, ["left"], t=t, config=WHOLE)
    assert_close_to_float64(ours, sets, ["left"], t=t)


@CONFIGS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_nonfinite_strips_stay_as_they_were(config, bad, side):
    sets = [matrices(48, 40, 16, side, torch.float32, seed=s) for s in (1, 2)]
    sets[1][1][5, 9] = bad
    got, flags = step(lowrank_adam.launch_lowrank_adam, sets, [side] * 2, config=config)
    want, _ = step(reference.lowrank_adam_, sets, [side] * 2)
    assert flags.tolist() == [0, 1]
    for x, y, before in zip(got[1], want[1], (sets[1][k] for k in (0, 3, 4)), strict=True):
        strip = (slice(None), 9) if side == "left" else (5, slice(None))
        assert torch.equal(x[strip], before[strip])
        torch.testing.assert_close(x, y, **tolerances.OP_FLOAT32)
        assert x.isfinite().all()


@CONFIGS
@pytest.mark.parametrize("side", ["left", "right"])
def test_random_bits_are_the_references(config, side):
    """bfloat16 moments: one wrong bit in 65,536 would show as a differing element here."""
    sets = [matrices(44, 52, 24, side, torch.float32, moments=torch.bfloat16)]
    got, _ = step(lowrank_adam.launch_lowrank_adam, sets, [side], config=config)
    want, _ = step(reference.lowrank_adam_, sets, [side])
    for k in (1, 2):
        # R differs in its last bit, which may carry one value over the edge.
        assert (got[0][k] != want[0][k]).float().mean() < 2e-3


# The interpreter has no bfloat16 products, and converts to bfloat16 by cutting off.
@pytest.mark.parametrize("stochastic", [False, True] if DEVICE == "cuda" else [True])
def test_bfloat16_weights(stochastic):
    """W alone in bfloat16, rounded with the reference's bits."""
    sets = []
    for side in ("left", "right"):
        W, *rest = matrices(44, 52, 24, side, torch.float32)
        sets.append((W.bfloat16(), *rest))
    sides, options = ["left", "right"], {"stochastic": stochastic}
    got, _ = step(lowrank_adam.launch_lowrank_adam, sets, sides, config=WHOLE, **options)
    want, _ = step(reference.lowrank_adam_, sets, sides, **options)
    for x, y in zip(got, want, strict=True):
        assert (x[0] != y[0]).float().mean() < 2e-3


def test_grouping_changes_no_bit_and_blocks_no_random_bit():
    sides = ["left", "right", "left", "right"]
    sets = [
        (W.bfloat16(), *rest)
        for W, *rest in (
            matrices(48, 64, 16, side, torch.float32, seed=i) for i, side in enumerate(sides)
        )
    ]
    launch, options = lowrank_adam.launch_lowrank_adam, {"stochastic": True, "config": WHOLE}
    together, _ = step(launch, sets, sides, **options)
    other = WHOLE._replace(block=16, block_k=16, rows=32, cols=16, chunks=1)
    for i, side in enumerate(sides):
        for config in (WHOLE, other):
            alone, _ = step(
                launch,
                [sets[i]],
                [side],
                streams=[3_000_000_000 + i],
                stochastic=True,
                config=config,
            )
            for x, y in zip(alone[0], together[i], strict=True):
                if config is WHOLE:
                    assert torch.equal(x, y)
                elif x.dtype == torch.float32:
                    # Other blocks, another order of the sums.
                    torch.testing.assert_close(x, y, **tolerances.OP_FLOAT32)
                else:
                    assert (x != y).float().mean() < 2e-3


def test_new_addresses_are_seen():
    """The pointer table is kept between calls and must follow tensors that move."""
    for seed in range(3):
        sets = [matrices(40, 48, 16, "left", torch.float32, seed=seed)]
        ours, _ = step(lowrank_adam.launch_lowrank_adam, sets, ["left"], config=WHOLE)
        assert_close_to_float64(ours, sets, ["left"])


def prepared_step(sets, sides, stochastic=True, projected=False, dtype=torch.float64, **begins):
    """A prepared step on copies of the sets: the step, the copies, its scalars and the flags."""
    W, M, V = ([clone(s[k]) for s in sets] for k in (0, 3, 4))
    steps = [torch.tensor(3.0, device=DEVICE) for _ in sets]
    lr = torch.tensor(0.02, dtype=dtype, device=DEVICE)
    rng_step = torch.tensor(7, device=DEVICE)
    flags = torch.zeros(len(sets), dtype=torch.int32, device=DEVICE)
    take = ops.prepare_lowrank_adam(
        W, [s[2] for s in sets], M, V, steps, lr, flags, rng_step, sides=sides, seed=SEED,
        stochastic=stochastic, streams=[3_000_000_000 + i for i in range(len(sets))],
        projected=projected, **begins,
    )  # fmt: skip
    return take, (W, M, V), (lr, rng_step, steps), flags


@pytest.mark.parametrize("projected", [False, True])
def test_prepared_steps_follow_gradients_that_move(projected):
    """Bit for bit what the op does, with gradients at other addresses and in other layouts."""
    sides = ["left", "right", "left"]
    sets = [
        (W.bfloat16(), *rest)
        for W, *rest in (
            matrices(44 + 4 * i, 52, 24, side, torch.float32, seed=i)
            for i, side in enumerate(sides)
        )
    ]
    shapes = [s[3 if projected else 0].shape for s in sets]
    take, ours, (lr, rng_step, steps), flags = prepared_step(sets, sides, projected=projected)
    theirs = [[clone(x) for x in xs] for xs in ours]
    generator = torch.Generator().manual_seed(5)
    held = []
    for k in range(6):
        grads = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
        if k == 4 and not projected:
            grads[1] = grads[1].T.contiguous().T
        held.append(grads)
        lr.fill_(0.01 * (k + 1))
        rng_step.add_(1)
        torch._foreach_add_(steps, 1)
        hyper = {**ADAM, "weight_decay": 0.1 * k}
        if k == 4 and not projected:
            assert not take._prepared.launch(grads, lr, flags, rng_step, **hyper, fitting=True)
        if k > 1:
            fewer = [G[:-1] for G in grads]
            assert not take._prepared.launch(fewer, lr, flags, rng_step, **hyper)
        # Off the GPU the kernels run in the interpreter, to which no first call leads by itself.
        if DEVICE == "cuda" or 0 < k < 4:
            take(grads, **hyper, fitting=k % 2 == 0)
        else:
            assert take._launch(grads, hyper)
        W, M, V = theirs
        lowrank_adam._prepared.clear()
        lowrank_adam.launch_lowrank_adam(
            W, grads, [s[2] for s in sets], M, V, steps, lr, torch.zeros_like(flags), rng_step,
            sides=sides, stochastic=True, seed=SEED, projected=projected,
            streams=[3_000_000_000 + i for i in range(len(sets))], **hyper,
        )  # fmt: skip
        for mine, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))
    assert not torch.equal(ours[0][0], sets[0][0])
    assert flags.tolist() == [0, 0, 0]


def test_prepared_step_on_the_cpu_is_the_op(monkeypatch):
    sides = ["left", "right"]
    sets = [matrices(20, 28, 8, side, torch.float32) for side in sides]
    sets = [tuple(x.cpu() for x in s) for s in sets]
    monkeypatch.setitem(globals(), "DEVICE", "cpu")
    take, (W, M, V), (lr, rng_step, steps), flags = prepared_step(sets, sides)
    grads = [s[1] for s in sets]
    take(grads, **ADAM)
    want = [[clone(s[k]) for s in sets] for k in (0, 3, 4)]
    ops.lowrank_adam_(
        want[0], grads, [s[2] for s in sets], want[1], want[2], steps, lr, flags, rng_step,
        sides=sides, stochastic=True, seed=SEED, streams=[3_000_000_000, 3_000_000_001], **ADAM,
    )  # fmt: skip
    for mine, other in zip((W, M, V), want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))


def test_prepared_step_refuses_what_does_not_fit():
    sets = [matrices(20, 28, 8, "left", torch.float32)]
    take, (W, *_), _, _ = prepared_step(sets, ["left"])
    before = W[0].clone()
    with pytest.raises(ValueError, match=r"grads: expected 1 entries, got 0"):
        take([], **ADAM)
    with pytest.raises(ValueError, match=r"grads\[0\]: expected shape \(20, 28\), got \(28, 20\)"):
        take([sets[0][1].T], **ADAM)
    with pytest.raises(ValueError, match=r"grads\[0\]: expected device"):
        take([sets[0][1].to("meta")], **ADAM)
    assert torch.equal(W[0], before)
    with pytest.raises(ValueError, match=r"sides\[0\]: expected 'left' or 'right', got 'up'"):
        prepared_step(sets, ["up"])
    with pytest.raises(ValueError, match=r"bases\[0\]"):
        prepared_step([(W[0], *sets[0][1:2], sets[0][2][1:], *sets[0][3:])], ["left"])


def test_prepared_step_leaves_to_the_op_what_the_kernels_do_not_cover():
    sets = [tuple(x.double() for x in matrices(20, 28, 8, "left", torch.float32))]
    take, (W, *_), _, _ = prepared_step(sets, ["left"])
    assert not take._launch([sets[0][1]], ADAM)
    ops._warn_slow.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        take([sets[0][1]], **ADAM)
    assert ["no CUDA kernel" in str(w.message) for w in caught] == [True] * (DEVICE == "cuda")
    assert not torch.equal(W[0], sets[0][0])


def test_a_launch_is_bound_once_for_each_kind_of_arguments(monkeypatch):
    """The second launch goes to the compiled kernel: addresses, in the kernel's order."""
    common = sys.modules["owlore.kernels.common"]
    calls = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments, stream: calls.append(("compiled", grid, arguments, stream))

    class Kernel:
        arg_names = ("table_ptr", "tiles_ptr", "lr_ptr", "eps", "RANK", "BLOCK")

        def __getitem__(self, grid):
            def bind(**arguments):
                calls.append(("bound", grid, arguments))
                return Compiled()

            return bind

    monkeypatch.setattr(common, "CompiledKernel", Compiled)
    tiles = torch.zeros(6, 4)
    launch = common.Launch(Kernel(), tiles, {"BLOCK": 32, "RANK": 8, "num_warps": 4})
    values = {"eps": 1e-8, "lr_ptr": 40, "table_ptr": 50, "unused": 1}
    tensors = {"lr_ptr": "lr", "table_ptr": "table"}
    for kind in ("a", "a", "b"):
        launch(kind, values, tensors, 7)
    named = {"table_ptr": "table", "tiles_ptr": tiles, "lr_ptr": "lr", "eps": 1e-8}
    bound = ("bound", (6, 1, 1), {**named, "BLOCK": 32, "RANK": 8, "num_warps": 4})
    assert calls == [
        bound,
        ("compiled", (6, 1, 1), (50, tiles.data_ptr(), 40, 1e-8, 8, 32), 7),
        bound,
    ]


def test_sets_of_matrices_share_their_scratch():
    """Every draw brings another set: scratch of its own for each would grow without end."""
    arenas = sys.modules["owlore.kernels.common"]._arenas
    arenas.clear()
    sizes = []
    for n in (96, 48, 64, 80):
        sets = [matrices(n, n, 16, side, torch.float32, seed=n) for side in ("left", "right")]
        ours, _ = step(lowrank_adam.launch_lowrank_adam, sets, ["left", "right"], config=STAGED)
        assert_close_to_float64(ours, sets, ["left", "right"])
        sizes.append(sum(arena.numel() for arena in arenas.values()))
    # N and R in float32 and a flag for each line, in pieces of 256 bytes, for both matrices.
    assert sizes == [2 * (2 * 96 * 16 * 4 + 256)] * 4


def test_what_is_not_covered_is_left_to_the_reference():
    W, G, P, M, V = matrices(24, 20, 8, "left", torch.float32)
    cases = [
        (0, (W.double(), G.double(), P.double(), M, V)),
        (0, (W, G, P.T.contiguous().T, M, V)),
        (0, (W, G, P, M.half().T.contiguous().T, V.half())),
        # A shard that begins within eight columns.
        (4, (W, G, P, M, V)),
    ]
    for first_column, case in cases:
        before = [x.clone() for x in case]
        done = lowrank_adam.launch_lowrank_adam(
            *([x] for x in case), [torch.tensor(1.0)], torch.tensor(0.1), torch.zeros(1).int(),
            torch.tensor(0), sides=["left"], streams=[1], stochastic=False, seed=1,
            first_columns=[first_column], **ADAM,
        )  # fmt: skip
        assert done is False
        assert all(torch.equal(x, y) for x, y in zip(case, before, strict=True))


@pytest.mark.parametrize("first_columns", [[4, 0, 8], [16, 4, 4]])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_shard_within_eight_columns_leaves_the_kernels_to_the_others(
    prepared, first_columns, monkeypatch
):
    """The reference steps with that one alone, the others take the bits that they take alone."""
    sides = ["left", "right", "left"]
    sets = [
        (W.bfloat16(), *rest)
        for W, *rest in (
            matrices(24, 20, 8, side, torch.float32, seed=i) for i, side in enumerate(sides)
        )
    ]
    sets[1][1][2, 3] = math.inf
    begins = {"first_rows": [0, 5, 2], "first_columns": first_columns}
    called = []
    definition = reference.lowrank_adam_

    def seen(params, *args, **options):
        called.append(len(params))
        return definition(params, *args, **options)

    monkeypatch.setattr(reference, "lowrank_adam_", seen)
    monkeypatch.setattr(ops, "_warn_slow", lambda name: None)
    if prepared:
        take, (W, M, V), _, flags = prepared_step(sets, sides, **begins)
        assert take._launch([s[1] for s in sets], ADAM)
        got = list(zip(W, M, V, strict=True))
    else:
        got, flags = step(
            ops._kernel_or_reference("lowrank_adam_"), sets, sides, stochastic=True, **begins
        )
    odd = [i for i, column in enumerate(first_columns) if column % 8]
    assert called == [1] * len(odd)
    assert flags.tolist() == [0, 1, 0]
    for i in range(3):
        function = definition if i in odd else lowrank_adam.launch_lowrank_adam
        alone = {key: [values[i]] for key, values in begins.items()}
        want, _ = step(
            function, [sets[i]], [sides[i]], streams=[3_000_000_000 + i], stochastic=True, **alone
        )
        for mine, other in zip(got[i], want[0], strict=True):
            assert torch.equal(mine, other)


@pytest.mark.gpu
def test_a_shard_within_eight_columns_on_the_gpu(monkeypatch):
    for prepared in (False, True):
        with monkeypatch.context() as context:
            test_a_shard_within_eight_columns_leaves_the_kernels_to_the_others(
                prepared, [4, 0, 8], context
            )


def test_empty_matrices_and_empty_lists():
    sets = [matrices(0, 20, 0, "left", torch.float32), matrices(24, 20, 8, "left", torch.float32)]
    ours, _ = step(lowrank_adam.launch_lowrank_adam, sets, ["left"] * 2, config=WHOLE)
    assert_close_to_float64(ours[1:], sets[1:], ["left"], streams=[3_000_000_001])
    assert step(lowrank_adam.launch_lowrank_adam, [], [])[0] == []


@pytest.mark.gpu
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("r", [16, 48, 64, 128, 200, 256, 512])
@pytest.mark.parametrize("side", ["left", "right"])
def test_table_configurations_on_the_gpu(side, r, projected):
    """The configurations that users get, on shapes with ragged edges."""
    sets = []
    for m, n in ((768, 640), (555, 777)):
        W, G, P, M, V = matrices(m, n, r, side, torch.bfloat16)
        if projected:
            G = P.float().T @ G.float() if side == "left" else G.float() @ P.float()
        sets.append((W, G, P, M, V))
    options = {"stochastic": True, "projected": projected}
    ours, flags = step(lowrank_adam.launch_lowrank_adam, sets, [side] * 2, **options)
    assert_close_to_float64(ours, sets, [side] * 2, **options)
    assert flags.tolist() == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["row", "column"])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("r", [64, 128, 256])
@pytest.mark.parametrize("side", ["left", "right"])
def test_table_configurations_on_shards_on_the_gpu(side, r, stochastic, layout):
    """The bits are those of the whole matrix, whose strides the view keeps.

    All tiles are whole and a program walks down several, so that memory is asked for ahead of time.
    """
    W, G, P, M, V = matrices(1536, 1024, r, side, torch.bfloat16, layout=layout)
    R = (P.float().T @ G.float() if side == "left" else G.float() @ P.float()).contiguous()
    options = {"stochastic": stochastic, "projected": True}
    whole, _ = step(lowrank_adam.launch_lowrank_adam, [(W, R, P, M, V)], [side], **options)
    row, col = 512, 256
    shard, parts = cut((W, R, P, M, V), side, row, col)
    begins = {"first_rows": [row], "first_columns": [col]}
    got, flags = step(lowrank_adam.launch_lowrank_adam, [shard], [side], **options, **begins)
    assert_close_to_float64(got, [shard], [side], **options)
    assert flags.tolist() == [0]
    for k, part in enumerate(parts):
        assert torch.equal(got[0][k], whole[0][k][part])
    if stochastic:
        other, _ = step(lowrank_adam.launch_lowrank_adam, [shard], [side], **options)
        assert not torch.equal(other[0][0], got[0][0])


def on_sm90_with_gluon():
    return torch.cuda.get_device_capability() == (9, 0) and lowrank_adam.gluon() is not None


def launched(sets, sides, config=None, **options):
    """The updates of a step, by the kernels' names."""
    names = []
    lowrank_adam._plans.clear()
    lowrank_adam._prepared.clear()
    result = step(lowrank_adam.launch_lowrank_adam, sets, sides, config=config, **options)
    for groups in lowrank_adam._plans.values():
        names += [group.launches[-1]._kernel.__name__ for group in groups]
    return result, names


@pytest.mark.gpu
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("r", [128, 256, 512])
@pytest.mark.parametrize("layout", ["rows", "view"])
@pytest.mark.parametrize(
    "shapes",
    [
        [(64, 128)],
        [(128, 128), (64, 384), (1088, 512)],
        [(4096, 4096), (11008, 4096), (4096, 11008)],
    ],
    ids=["tile", "small", "7b"],
)
def test_gluon_gives_the_bits_of_triton_on_the_gpu(shapes, layout, r, stochastic, projected):
    """W, M, V and the flags, on both sides and beside lines that are not finite."""
    if not on_sm90_with_gluon():
        pytest.skip("the Gluon kernel is for sm_90 and some versions of Triton")
    generator = torch.Generator(DEVICE).manual_seed(r)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE)

    sets, sides = [], []
    # Whole tiles of 64 rows, of 128 at rank 512.
    tile = 128 if r == 512 else 64
    for m, n in [(-(-m // tile) * tile, n) for m, n in shapes]:
        for side in ("left", "right"):
            W, G = normal(m, n).bfloat16() * 0.05, normal(m, n).bfloat16()
            P = normal(m if side == "left" else n, r) / (m if side == "left" else n) ** 0.5
            P = P.bfloat16()
            M = normal(*((r, n) if side == "left" else (m, r))) * 0.1
            if len(sets) % 3 == 0:
                G[5, 9] = float("nan")
            if layout == "view":
                W = torch.nn.functional.pad(W, (32, 32))[:, 32 : 32 + n]
            if projected:
                G = P.float().T @ G.float() if side == "left" else G.float() @ P.float()
            sets.append((W, G.contiguous(), P, M, M.square()))
            sides.append(side)
    options = {"stochastic": stochastic, "projected": projected}
    (ours, flags), names = launched(sets, sides, **options)
    assert names == ["_update_sm90_kernel"]
    table = lowrank_adam.config_for(90, r, 2)
    (triton, theirs), names = launched(sets, sides, config=table, **options)
    assert names == ["_update_kernel"]
    assert flags.tolist() == theirs.tolist() == [int(k % 3 == 0) for k in range(len(sets))]
    for mine, other, before in zip(ours, triton, sets, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))
        assert not torch.equal(mine[0], before[0])
        assert mine[0].isfinite().all()
    if shapes[0][0] < 4096:
        clean = [k for k in range(len(sets)) if not flags[k]]
        options["streams"] = [3_000_000_000 + k for k in clean]
        alone, of = [sets[k] for k in clean], [sides[k] for k in clean]
        again, _ = step(lowrank_adam.launch_lowrank_adam, alone, of, **options)
        for k, mine in zip(clean, again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(mine, ours[k], strict=True))
        assert_close_to_float64(again, alone, of, **options)


@pytest.mark.gpu
def test_rounding_is_unbiased():
    """The mean error over 10^6 roundings lies within four standard errors of zero."""
    W, G, P, M, V = matrices(1024, 1024, 16, "left", torch.bfloat16)
    sets = [(W, G, P, M, V)]
    ours, _ = step(lowrank_adam.launch_lowrank_adam, sets, ["left"], stochastic=True)
    exact, _ = step(reference.lowrank_adam_, [(W.float(), G.float(), P.float(), M, V)], ["left"])
    error = (ours[0][0].double() - exact[0][0].double()) / exact[0][0].double().abs()
    assert abs(error.mean()) < 4 * error.std() / error.numel() ** 0.5


@pytest.mark.gpu
def test_step_in_a_cuda_graph_follows_lr_and_step():
    W, G, P, M, V = matrices(256, 384, 64, "left", torch.bfloat16)
    lr = torch.tensor(0.02, dtype=torch.float64, device=DEVICE)
    t = torch.tensor(3.0, device=DEVICE)
    flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    rng_step = torch.tensor(7, device=DEVICE)
    options = {**ADAM, "sides": ["left"], "streams": [5], "stochastic": True, "seed": SEED}

    def run(function, tensors):
        function(
            [tensors[0]], [G], [P], [tensors[1]], [tensors[2]], [t], lr, flags, rng_step, **options
        )

    ours = [W.clone(), M.clone(), V.clone()]
    run(lowrank_adam.launch_lowrank_adam, ours)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(lowrank_adam.launch_lowrank_adam, ours)
    plain = [W.clone(), M.clone(), V.clone()]
    run(lowrank_adam.launch_lowrank_adam, plain)
    for k in range(3):
        lr.fill_(0.01 * (k + 1))
        t.add_(1)
        rng_step.add_(1)
        graph.replay()
        run(lowrank_adam.launch_lowrank_adam, plain)
        assert all(torch.equal(x, y) for x, y in zip(ours, plain, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("r", [64, 128, 256])
def test_prepared_step_in_a_cuda_graph(r):
    """The gradients lie at addresses that no step saw before the capture, nor the scratch."""
    sides = ["left", "right"]
    sets = [matrices(256, 384, r, side, torch.bfloat16, seed=i) for i, side in enumerate(sides)]
    given = [[s[3].clone().normal_() for s in sets] for _ in range(2)]
    take, ours, (lr, rng_step, _), _ = prepared_step(sets, sides, projected=True)
    plain, theirs, others, _ = prepared_step(sets, sides, projected=True)
    for step_ in (take, plain):
        step_(given[0], **ADAM)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take(given[1], **ADAM)
    for k in range(3):
        for scalars in ((lr, rng_step), others[:2]):
            scalars[0].fill_(0.01 * (k + 1))
            scalars[1].add_(1)
        graph.replay()
        plain(given[1], **ADAM)
        if k == 1:
            # Steps beside the graph, with gradients that come and go.
            for _ in range(6):
                for step_ in (take, plain):
                    step_([G.clone() for G in given[0]], **ADAM)
        for mine, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))


@pytest.mark.gpu
def test_prepared_step_waits_for_nothing():
    sets = [matrices(256, 384, 128, "left", torch.bfloat16)]
    take, *_ = prepared_step(sets, ["left"])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            take([sets[0][1].clone()], **ADAM)
    finally:
        torch.cuda.set_sync_debug_mode("default")


COMPILE = """
import functools, json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from owlore.kernels import lowrank_adam as module

architecture = int(sys.argv[1])
FLOATS = ("beta1 one_minus_beta1 log_beta1 beta2 one_minus_beta2 log_beta2 eps weight_decay scale")
TYPES = {
    "table_ptr": "*i64", "tiles_ptr": "*i32", "lr_ptr": "*fp32", "nonfinite_ptr": "*i32",
    "grads_ptr": "*i64", "scratch_ptr": "*u8",
    "rng_step_ptr": "*i64", "seed_low": "i32", "seed_high": "i32",
    **{name: "fp32" for name in FLOATS.split()},
}
cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")


@functools.cache
def resources(kernel, items):
    constants = dict(items)
    names = kernel.arg_names
    options = {n: v for n, v in constants.items() if n.islower()}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        fn=kernel,
        signature={n: TYPES.get(n, "constexpr") for n in names},
        constexprs={(i,): constants[n] for i, n in enumerate(names) if n not in TYPES},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")},
    )
    built = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\\d+) STACK:(\\d+)", text.stdout)
    return {
        "kernel": kernel.__name__, "registers": int(found[1]), "stack": int(found[2]),
        "shared": built.metadata.shared, "rank": constants["RANK"],
    }


import torch
from owlore.kernels import common

rows = []
common.Launch.__init__ = lambda self, kernel, tiles, constants: rows.append(
    resources(kernel, tuple(constants.items()))
)
torch.cuda.get_device_capability = lambda device: divmod(architecture, 10)
module.upload = lambda table, device: table


class Device:
    type = "cuda"


# What a plan asks of a weight, on a device that need not exist.
class Matrix:
    device = Device()

    def __init__(self, *shape):
        self.shape = shape


for rank in (64, 128, 256, 512):
    for projected in (False, True):
        kinds = (torch.bfloat16, torch.float32 if projected else torch.bfloat16, torch.bfloat16)
        shared = (*kinds, torch.float32, rank, module.ROW_MAJOR, True)
        params = [Matrix(4096, 4096), Matrix(4096, 11008)]
        sides = ["right", "left"]
        for stochastic in (False, True) if architecture == 90 else (True,):
            # From the table, and what serves on sm_90 where Gluon does not.
            for config in (None, module.config_for(90, rank, 2))[: 2 if architecture == 90 else 1]:
                module._group([0, 1], shared, params, sides, projected, stochastic, config)
        if architecture == 90 and rank > 64:
            # Edges that are cut.
            cut = [Matrix(200, 328), Matrix(328, 264)]
            module._group([0, 1], shared, cut, sides, projected, True, None)
print(json.dumps(rows))
"""
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
def test_table_compiles_without_spills(architecture, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(architecture)],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    gluon = []
    for row in json.loads(done.stdout.splitlines()[-1]):
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED_LIMIT[architecture], row
        if row["kernel"] == "_update_sm90_kernel":
            if row["rank"] <= 256:
                # Two programs to a multiprocessor: of its registers and its shared memory.
                assert row["registers"] <= 128, row
                assert 2 * (row["shared"] + 1024) <= 228 * 1024, row
            gluon.append(row)
    assert len(gluon) == (12 if architecture == 90 else 0)


CHOOSE = """
import json, sys
import torch
import triton
from owlore.kernels import common, lowrank_adam as module

launches = []
common.Launch.__init__ = lambda self, kernel, tiles, constants: launches.append((kernel, tiles))
module.upload = lambda table, device: table
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Matrix:
    device = torch.device("cpu")

    def __init__(self, *shape):
        self.shape = shape


def update(shapes=((512, 1024), (576, 256)), rank=128, kinds=(BF16, BF16, BF16), layout=0,
           is_aligned=True, config=None, architecture=90, stochastic=True):
    launches.clear()
    common_ = (*kinds, FP32, rank, layout, is_aligned)
    params = [Matrix(*s) for s in shapes]
    module._group(list(range(len(params))), common_, params, ["right", "left"][: len(params)],
                  False, stochastic, config, architecture)
    kernel, tiles = launches[-1]
    return kernel.__name__, tiles.tolist()


names = {}
for name, options in {
    "128": {}, "256": {"rank": 256}, "nearest": {"stochastic": False},
    "float32 gradients": {"kinds": (BF16, FP32, BF16)},
    "64": {"rank": 64}, "192": {"rank": 192},
    "512": {"rank": 512, "shapes": ((512, 1024), (640, 256))}, "512, rows": {"rank": 512},
    "rows": {"shapes": ((512, 1024), (544, 256))}, "columns": {"shapes": ((512, 1024), (576, 320))},
    "column-major": {"layout": module.COLUMN_MAJOR}, "strided": {"layout": module.STRIDED},
    "unaligned": {"is_aligned": False},
    "float16": {"kinds": (FP16, FP16, FP16)}, "float32 weights": {"kinds": (FP32, BF16, BF16)},
    "float32 basis": {"kinds": (BF16, BF16, FP32)},
    "configuration": {"config": module.config_for(90, 128, 2)},
    "sm_80": {"architecture": 80}, "sm_100": {"architecture": 100},
}.items():
    names[name], tiles = update(**options)
    if name in ("128", "256"):
        seen = [torch.zeros(512, 1024), torch.zeros(576, 256)]
        for k, col, row, end in tiles:
            seen[k][row:end, col : col + 128] += 1
        assert all((x == 1).all() for x in seen)
for name in ("3.5.1", "3.10.0", "4.0.0+git1"):
    triton.__version__ = name
    module.gluon.cache_clear()
    names[name] = update()[0]
triton.__version__ = "3.6.0+git1"
module.gluon.cache_clear()
names["a build of 3.6"] = update()[0]
sys.modules["owlore.kernels.lowrank_adam_sm90"] = None
del sys.modules["owlore.kernels"].lowrank_adam_sm90
module.gluon.cache_clear()
names["without Gluon"] = update()[0]
print(json.dumps(names))
"""


def test_gluon_takes_what_it_covers_and_no_more():
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = json.loads(done.stdout.splitlines()[-1])
    covered = {"128", "256", "512", "nearest", "float32 gradients", "a build of 3.6"}
    for name, kernel in names.items():
        assert kernel == ("_update_sm90_kernel" if name in covered else "_update_kernel"), name


def test_the_interpreter_has_no_gluon():
    if isinstance(lowrank_adam._update_kernel, lowrank_adam.triton.JITFunction):
        pytest.skip("the kernels are not interpreted here")
    assert lowrank_adam.gluon() is None
