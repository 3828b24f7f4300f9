"""The Triton kernel of dense AdamW against the reference; in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import tolerances
import torch

from owlore import ops, reference

adamw = pytest.importorskip("owlore.kernels.adamw")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(16, 64), (5, 7), (3,), (), (0, 3), (2, 3, 8), (700, 24), (1, 4097)]


def parameters(shapes, dtype, moments, seed=0):
    """W, G, M, V of each shape; "T" is a transposed view."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, kind, scale=1.0):
        if shape == "T":
            return (torch.randn(24, 40, generator=generator) * scale).to(DEVICE, kind).T
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, kind)

    W = [normal(s, dtype) for s in shapes]
    G = [normal(s, dtype) for s in shapes]
    M = [normal(s, moments, 0.1) for s in shapes]
    V = [normal(s, moments, 0.1).abs() for s in shapes]
    return W, G, M, V


def step(function, W, G, M, V, **options):
    """One step on copies. Returns (W, M, V) and the non-finite flags."""
    copies = [
        [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
            for x in xs
        ]
        for xs in (W, M, V)
    ]
    flags = torch.zeros(len(W), dtype=torch.int32, device=DEVICE)
    done = function(
        copies[0],
        G,
        copies[1],
        copies[2],
        [torch.tensor(float(i + 1), device=DEVICE) for i in range(len(W))],
        torch.tensor(0.01, dtype=torch.float64, device=DEVICE),
        flags,
        torch.tensor(9, device=DEVICE),
        seed=2**45 + 2**31 + 3,
        streams=[4_000_000_000 + i for i in range(len(W))],
        **{**ADAM, "stochastic": True, **options},
    )
    assert done in (None, True)
    return copies, flags


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", [SHAPES, ["T"]], ids=["contiguous", "transposed"])
def test_step_is_the_references(shapes, dtype, moments):
    tensors = parameters(shapes, dtype, moments)
    got, flags = step(adamw.launch_adamw, *tensors)
    want, _ = step(reference.adamw_, *tensors)
    assert flags.sum() == 0
    for ours, theirs, before in zip(got, want, (tensors[0], *tensors[2:]), strict=True):
        for x, y, old in zip(ours, theirs, before, strict=True):
            # A few values may all round to where they were.
            assert x.numel() < 16 or not torch.equal(x, old)
            if x.dtype == torch.float32:
                torch.testing.assert_close(x, y, **tolerances.OP_FLOAT32)
            else:
                # The same random bits: only a value on the edge may fall on the other side.
                assert x.numel() == 0 or (x != y).float().mean() < 2e-3


def test_skipped_elements_stay_bit_identical():
    W, G, M, V = parameters([(16, 64), (8, 8)], torch.float32, torch.float32)
    for k, bad in enumerate((float("nan"), float("inf"), 1e30)):
        G[0][3, 5 + k] = bad
    got, flags = step(adamw.launch_adamw, W, G, M, V)
    want, _ = step(reference.adamw_, W, G, M, V)
    assert flags.tolist() == [1, 0]
    for ours, theirs, old in zip(got, want, (W, M, V), strict=True):
        assert torch.equal(ours[0][3, 5:8], old[0][3, 5:8])
        torch.testing.assert_close(ours, theirs, **tolerances.OP_FLOAT32)


def test_grouping_changes_no_bit():
    tensors = parameters([(64, 40), (128,), (33, 16)], torch.bfloat16, torch.bfloat16)
    together, _ = step(adamw.launch_adamw, *tensors)
    order = [2, 0, 1]
    W, G, M, V = ([xs[i] for i in order] for xs in tensors)
    flags = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    steps = [torch.tensor(float(i + 1), device=DEVICE) for i in order]
    copies = [[x.clone() for x in xs] for xs in (W, M, V)]
    adamw.launch_adamw(
        copies[0], G, copies[1], copies[2], steps,
        torch.tensor(0.01, dtype=torch.float64, device=DEVICE), flags,
        torch.tensor(9, device=DEVICE), seed=2**45 + 2**31 + 3, stochastic=True,
        streams=[4_000_000_000 + i for i in order], **ADAM,
    )  # fmt: skip
    for ours, theirs in zip(copies, together, strict=True):
        assert all(torch.equal(x, theirs[i]) for x, i in zip(ours, order, strict=True))


@pytest.mark.parametrize(("row", "col"), [(0, 24), (5, 0), (7, 13)])
def test_a_shard_takes_the_bits_of_the_whole_parameter(row, col):
    tensors = parameters([(20, 64), (40,)], torch.bfloat16, torch.bfloat16)
    whole, _ = step(adamw.launch_adamw, *tensors)
    shards = [[xs[0][row:, col:].contiguous(), xs[1][col:].contiguous()] for xs in tensors]
    begins = {"first_rows": [row, 0], "first_columns": [col, col]}
    got, _ = step(adamw.launch_adamw, *shards, **begins)
    other, _ = step(adamw.launch_adamw, *shards)
    for ours, plain, all_of in zip(got, other, whole, strict=True):
        assert torch.equal(ours[0], all_of[0][row:, col:])
        assert torch.equal(ours[1], all_of[1][col:])
        assert not torch.equal(plain[0], ours[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("row", "col"), [(0, 24), (5, 0), (7, 13)])
def test_shards_on_the_gpu(row, col):
    test_a_shard_takes_the_bits_of_the_whole_parameter(row, col)


def test_prepared_steps_follow_gradients_that_move():
    """Bit for bit what the op does; 700 x 24 has several tiles."""
    W, G, M, V = parameters([(700, 24), (5, 7), "T", (0, 3)], torch.bfloat16, torch.bfloat16)
    theirs = [[x.clone() for x in xs] for xs in (W, M, V)]
    before = W[0].clone()
    steps = [torch.tensor(2.0, device=DEVICE) for _ in W]
    lr = torch.tensor(0.01, dtype=torch.float64, device=DEVICE)
    rng_step = torch.tensor(9, device=DEVICE)
    flags = torch.zeros(len(W), dtype=torch.int32, device=DEVICE)
    options = {"stochastic": True, "seed": 5, "streams": list(range(len(W)))}
    take = ops.prepare_adamw(W, M, V, steps, lr, flags, rng_step, **options)
    held = []
    for k in range(6):
        grads = [(x * (k + 1)).to(x.dtype) for x in G]
        held.append(grads)
        rng_step.add_(1)
        if DEVICE == "cuda" or k > 0:
            take(grads, **ADAM)
        else:
            assert take._launch(grads, ADAM)
        adamw._prepared.clear()
        adamw.launch_adamw(
            theirs[0], grads, *theirs[1:], steps, lr, flags, rng_step, **options, **ADAM
        )
        for mine, other in zip((W, M, V), theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))
    assert not torch.equal(W[0], before)


def test_prepared_step_on_the_cpu_is_the_op():
    W, G, M, V = (
        [x.cpu() for x in xs] for xs in parameters([(5, 7), (3,)], torch.bfloat16, torch.float32)
    )
    want = [[x.clone() for x in xs] for xs in (W, M, V)]
    fixed = (
        [torch.tensor(2.0)] * 2, torch.tensor(0.01), torch.zeros(2, dtype=torch.int32),
        torch.tensor(3),
    )  # fmt: skip
    options = {"stochastic": True, "seed": 5, "streams": [1, 2]}
    ops.prepare_adamw(W, M, V, *fixed, **options)(G, **ADAM)
    ops.adamw_(want[0], G, *want[1:], *fixed, **options, **ADAM)
    for mine, other in zip((W, M, V), want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))


def test_what_is_not_covered_is_left_to_the_reference():
    W, G, M, V = parameters([(4, 8)], torch.float32, torch.float32)
    for case in (
        ([W[0].double()], [G[0].double()], M, V),
        ([W[0][None].transpose(0, 2)], [G[0][None].transpose(0, 2)], [M[0][None].transpose(0, 2)],
         [V[0][None].transpose(0, 2)]),
        (W, G, M, [V[0].half()]),
    ):  # fmt: skip
        before = [x[0].clone() for x in case]
        done = adamw.launch_adamw(
            *case, [torch.tensor(1.0)], torch.tensor(0.1), torch.zeros(1).int(), torch.tensor(0),
            seed=1, streams=[1], stochastic=False, **ADAM,
        )  # fmt: skip
        assert done is False
        assert all(torch.equal(x[0], y) for x, y in zip(case, before, strict=True))
