"""The compiled outlier statistics against float64 computed here, not through owlore.reference."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from owlore import _extension, ops

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TAUS = [0.0, 0.5, 3.0, 5.0, 7.0, 13.0, 1e9]
# An entry this close to the bound may fall on either side, since a mean depends on the order of
# its sum.
NEAR = 1e-6

built = pytest.mark.skipif(
    not _extension.load(), reason=f"the extension is not in use: {_extension.status()['reason']}"
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def scores(weights: list[Tensor], norms: list[Tensor]) -> list[Tensor]:
    pairs = zip(weights, norms, strict=True)
    return [W.double().abs() * norm.double() for W, norm in pairs]


def check_counts(weights: list[Tensor], norms: list[Tensor], taus: list[float]) -> None:
    counts, mean = torch.ops.owlore.outlier_counts(weights, norms, taus)
    A = scores(weights, norms)
    entries = sum(a.numel() for a in A)
    expected_mean = sum(a.sum() for a in A) / entries if entries else torch.tensor(0.0)
    assert counts.shape == (len(weights), len(taus))
    assert counts.dtype == torch.int64
    assert mean.dtype == torch.float64
    assert counts.device == mean.device == weights[0].device
    torch.testing.assert_close(mean.cpu(), expected_mean.double().cpu(), rtol=1e-6, atol=0)
    for k, a in enumerate(A):
        for q, tau in enumerate(taus):
            bound = tau * expected_mean
            low, high = (a > bound * (1 + NEAR)).sum(), (a > bound * (1 - NEAR)).sum()
            assert low <= counts[k, q] <= high, (k, tau)


def check_sq_norm(acc: Tensor, x: Tensor, mask: Tensor | None, rtol: float) -> None:
    kept = x.double() if mask is None else x.double()[mask]
    rows = math.prod(kept.shape[:-1])
    expected = acc.double() + kept.reshape(rows, x.shape[-1]).square().sum(0)
    torch.ops.owlore.column_sq_norm_(acc, x, mask)
    torch.testing.assert_close(acc.double(), expected, rtol=rtol, atol=0, equal_nan=True)


def layouts(W: Tensor) -> dict[str, Tensor]:
    """The same values in memory orders that a weight can come in."""
    m, n = W.shape
    padded = W.new_zeros(m, n + 3)
    padded[:, 2 : n + 2] = W
    spread = W.new_zeros(2 * m, 3 * n)
    spread[::2, ::3] = W
    return {
        "row major": W,
        "column major": W.T.contiguous().T,
        "rows with a gap": padded[:, 2 : n + 2],
        "strided both ways": spread[::2, ::3],
        "strided column major": spread.T.contiguous().T[::2, ::3],
    }


@built
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (3, 5), (33, 257), (130, 64), (0, 4)])
def test_counts_in_every_layout(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    W = torch.randn(shape, device=device).to(dtype)
    norm = torch.rand(shape[1], device=device) * 10
    for name, laid_out in layouts(W).items():
        assert torch.equal(laid_out, W), name
        check_counts([laid_out], [norm], TAUS)
        check_counts([laid_out], [norm.double().repeat_interleave(2)[::2]], TAUS)


@built
@pytest.mark.parametrize("device", DEVICES)
def test_counts_of_a_real_model_share_one_mean_per_block(device: str, stories260k) -> None:
    torch.manual_seed(0)
    for block in stories260k.to(device).model.layers:
        linear = [m.weight for m in block.modules() if isinstance(m, torch.nn.Linear)]
        norms = [torch.rand(W.shape[1], device=device) * 30 for W in linear]
        for dtype in DTYPES:
            check_counts([W.to(dtype) for W in linear], norms, TAUS)
        mixed = [W.to(DTYPES[i % 4]) for i, W in enumerate(linear)]
        check_counts(mixed, norms, TAUS)


@built
@pytest.mark.parametrize("device", DEVICES)
def test_counts_edges(device: str) -> None:
    W, norm = torch.ones(4, 3, device=device), torch.ones(3, device=device)
    check_counts([W[:, :0], W], [norm[:0], norm], TAUS)
    check_counts([W[:0]], [norm], TAUS)
    check_counts([W.new_ones(1, 1).expand(5, 3)], [norm[:1].expand(3)], TAUS)
    assert torch.ops.owlore.outlier_counts([W], [norm], [])[0].shape == (1, 0)
    # An entry equal to the mean is not above it.
    assert torch.ops.owlore.outlier_counts([W], [norm], [1.0])[0].item() == 0
    # Nor is anything above a NaN or infinite mean.
    for bad in (float("nan"), float("inf")):
        broken = W.clone()
        broken[1, 2] = bad
        counts, mean = torch.ops.owlore.outlier_counts([broken], [norm], TAUS[1:])
        assert not torch.isfinite(mean)
        assert counts.sum() == 0
    # Products that leave float32's range are still right: compare with the exact ratio to the mean.
    for weight_scale, norm_scale in ((1e30, 1e30), (1e-30, 1e-30), (1e-42, 1.0), (1.0, 1e-42)):
        torch.manual_seed(0)
        tiny = torch.rand(40, 30, device=device) * weight_scale
        check_counts([tiny], [torch.rand(30, device=device) * norm_scale], [0.0, 0.5, 1.0, 2.0])
    # Subnormal halves.
    halves = (torch.rand(40, 30, device=device) * 6e-6).half()
    check_counts([halves], [norm.repeat(10)], [0.0, 0.5, 1.0, 2.0])


@built
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64])
def test_sq_norm(device: str, dtype: torch.dtype, acc_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rtol = 1e-6 if acc_dtype == torch.float32 or dtype != torch.float64 else 1e-12
    for lead in ((), (1,), (7,), (2, 300), (3, 1, 5), (0,), (2, 0), (1000,)):
        for n in (0, 1, 3, 64, 257):
            x = torch.randn(*lead, n, device=device).to(dtype)
            mask = torch.rand(lead, device=device) < 0.6
            acc = torch.rand(n, device=device, dtype=acc_dtype)
            check_sq_norm(acc.clone(), x, None, rtol)
            check_sq_norm(acc.clone(), x, mask, rtol)
            check_sq_norm(acc.repeat_interleave(2)[::2], x, mask, rtol)
            if x.dim() == 3:
                strided = x.transpose(0, 1).contiguous().transpose(0, 1)
                check_sq_norm(acc.clone(), strided, mask.T.contiguous().T, rtol)
                check_sq_norm(acc.clone(), x.mT.contiguous().mT, mask, rtol)
                check_sq_norm(acc.clone(), x[:1].expand_as(x), mask[:, :1].expand_as(mask), rtol)


@built
@pytest.mark.parametrize("device", DEVICES)
def test_sq_norm_edges(device: str) -> None:
    # 3,000 squares of fp16's largest number are far beyond fp16.
    largest = torch.full((3000, 5), 65504.0, dtype=torch.float16, device=device)
    check_sq_norm(torch.zeros(5, device=device), largest, None, 1e-6)
    # Squares beyond fp32 are finite in an fp64 sum.
    huge = torch.full((3, 5), 1e30, device=device)
    check_sq_norm(torch.zeros(5, device=device, dtype=torch.float64), huge, None, 1e-12)
    # Subnormal halves count with their value.
    small = torch.full((4, 5), 6e-8, dtype=torch.float16, device=device)
    check_sq_norm(torch.zeros(5, device=device), small, None, 1e-6)
    x = torch.ones(4, 3, device=device)
    x[1, 0], x[2, 1] = float("nan"), float("inf")
    check_sq_norm(torch.zeros(3, device=device), x, None, 0)
    keep = torch.tensor([True, False, False, True], device=device)
    acc = torch.zeros(3, device=device)
    torch.ops.owlore.column_sq_norm_(acc, x, keep)
    assert acc.tolist() == [2, 2, 2]
    # acc may be what is read.
    own = torch.tensor([2.0, 3.0], device=device)
    torch.ops.owlore.column_sq_norm_(own, own[None], None)
    assert own.tolist() == [6, 12]


@built
@pytest.mark.parametrize("device", DEVICES)
def test_counts_of_many_matrices_and_thresholds(device: str) -> None:
    # More than one launch holds of either, long runs of rows, and a width that ends inside a strip.
    torch.manual_seed(0)
    weights, norms = [], []
    for i in range(70):
        shape = (3000, 1048) if i == 40 else (10 + i, 16 * (i % 5))
        weights.append(torch.randn(shape, device=device).to(DTYPES[i % 3]))
        norms.append(torch.rand(shape[1], device=device))
    # A column without activations, and one that no token fired much.
    norms[40][3], norms[40][4] = 0.0, 1e-30
    check_counts(weights, norms, [0.0, *(0.25 * q for q in range(1, 20))])


@built
@pytest.mark.gpu
def test_cuda_ops_never_wait_and_repeat_their_bits() -> None:
    torch.manual_seed(0)
    W = [torch.randn(1000, n, device="cuda").bfloat16() for n in (512, 1024, 1032, 7)]
    norms = [torch.rand(w.shape[1], device="cuda") for w in W]
    x = torch.randn(4, 999, 1032, device="cuda").bfloat16()
    mask = torch.rand(4, 999, device="cuda") < 0.5
    found = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            acc = torch.zeros(1032, device="cuda", dtype=torch.float64)
            torch.ops.owlore.column_sq_norm_(acc, x, mask)
            found.append((*torch.ops.owlore.outlier_counts(W, norms, TAUS), acc))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@built
@pytest.mark.gpu
def test_cuda_ops_run_on_the_current_stream_and_in_graphs() -> None:
    W, norm = torch.randn(300, 512, device="cuda").half(), torch.rand(512, device="cuda")
    acc = torch.zeros(512, device="cuda")
    torch.ops.owlore.outlier_counts([W], [norm], TAUS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.owlore.column_sq_norm_(acc, W)
        counts, mean = torch.ops.owlore.outlier_counts([W], [norm], TAUS)
    acc.zero_()
    W.mul_(2)
    graph.replay()
    expected, expected_mean = torch.ops.owlore.outlier_counts([W], [norm], TAUS)
    assert torch.equal(counts, expected)
    assert torch.equal(mean, expected_mean)
    torch.testing.assert_close(acc.double(), W.double().square().sum(0), rtol=1e-6, atol=0)


@built
@pytest.mark.gpu
def test_no_score_matrix_in_device_memory() -> None:
    W = torch.randn(4096, 8192, device="cuda").bfloat16()
    norm = torch.rand(8192, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.ops.owlore.outlier_counts([W, W.T], [norm, norm[:4096]], TAUS)
    torch.ops.owlore.column_sq_norm_(norm, W)
    assert torch.cuda.max_memory_allocated() - before < 16 * 2**20


@built
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    W, norm, x = torch.randn(700, 300), torch.rand(300), torch.randn(5000, 300)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            counts, mean = torch.ops.owlore.outlier_counts([W, W.T], [norm, x[:700, 0].abs()], TAUS)
            acc = torch.zeros(300, dtype=torch.float64)
            torch.ops.owlore.column_sq_norm_(acc, x)
            found.append((counts, mean, acc))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@built
@pytest.mark.parametrize("device", DEVICES)
def test_random_arguments_give_the_right_answer(device: str) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(150):
        weights, norms = [], []
        for _ in range(rng.randint(1, 4)):
            shape = (rng.choice([0, 1, 2, 15, 16, 17, 90]), rng.choice([0, 1, 2, 15, 16, 17, 300]))
            W = torch.randn(shape, device=device).to(rng.choice(DTYPES))
            weights.append(rng.choice(list(layouts(W).values())))
            dtype = rng.choice([torch.float32, torch.float64])
            norms.append(torch.rand(shape[1], dtype=dtype, device=device))
        check_counts(weights, norms, [rng.uniform(0, 6) for _ in range(rng.randint(0, 9))])


@built
@pytest.mark.gpu
def test_devices_may_not_mix() -> None:
    W, norm = torch.ones(4, 3), torch.ones(3)
    with pytest.raises(RuntimeError, match="expected to be on the device"):
        torch.ops.owlore.outlier_counts([W.cuda()], [norm], [1.0])
    with pytest.raises(RuntimeError, match="expected to be on the device"):
        torch.ops.owlore.column_sq_norm_(norm.clone(), W.cuda())


W, N, X = torch.ones(4, 3), torch.ones(3), torch.ones(5, 3)


@built
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [N], [1.0]), "weights: expected at least one"),
        (([W], [], [1.0]), "norms: expected 1 entries"),
        (([W[0]], [N], [1.0]), r"weights\[0\]: expected 2 dimensions, got 1"),
        (([W, W.int()], [N, N], [1.0]), r"weights\[1\]: expected bfloat16"),
        (([W.cfloat()], [N], [1.0]), r"weights\[0\]: expected bfloat16"),
        (([W], [N[:2]], [1.0]), r"norms\[0\]: expected shape \[3\]"),
        (([W], [N[None]], [1.0]), r"norms\[0\]: expected shape \[3\]"),
        (([W], [N.half()], [1.0]), r"norms\[0\]: expected float32"),
    ],
)
def test_counts_refuse(arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.owlore.outlier_counts(*arguments)


@built
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((W.clone(), X), "acc: expected 1 dimension, got 2"),
        ((N.half(), X), "acc: expected float32"),
        ((N[:1].expand(3), X), "acc: expected distinct elements"),
        ((N.clone(), X.int()), "x: expected bfloat16"),
        ((N.clone(), X.cfloat()), "x: expected bfloat16"),
        ((N.clone(), torch.tensor(1.0)), "x: expected at least 1 dimension"),
        ((N.clone(), X[:, :2]), "x: expected a last dimension of 3 .* got 2"),
        ((N.clone(), X, torch.ones(5)), "mask: expected bool"),
        ((N.clone(), X, torch.ones(5, 1) > 0), "mask: expected 1 dimensions"),
        ((N.clone(), X, torch.ones(4) > 0), "mask: expected size 5 in dimension 0, got 4"),
    ],
)
def test_sq_norm_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.owlore.column_sq_norm_(*arguments)


@built
def test_no_score_matrix_in_memory() -> None:
    # The scores of this weight in float32 would take 128 MiB, a copy of it in float32 as much.
    script = """
import resource, torch
from owlore import ops
W, norm = torch.ones(4096, 8192, dtype=torch.bfloat16), torch.ones(8192)
ops.outlier_counts([W[:16]], [norm], [1.0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.outlier_counts([W, W.T[:, :64]], [norm, norm[:64]], [0.5, 1.0])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(ops.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) * 1024 < 64 * 2**20


def test_missing_extension_is_silent(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = _extension._load(tmp_path)
    assert state["available"] is False
    assert state["path"] is None
    assert "not built" in state["reason"]


def test_broken_extension_warns_once(tmp_path: Path) -> None:
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="does not load"):
        state = _extension._load(tmp_path)
    assert state["available"] is False
    assert str(tmp_path) in state["path"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _extension._load(tmp_path) == state


@built
def test_status_names_the_file() -> None:
    state = _extension.status()
    assert state["available"] is True
    assert Path(state["path"]).is_file()
    assert state["cuda"] == (torch.version.cuda is not None) or not state["cuda"]
