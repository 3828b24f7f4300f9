"""Inverse Cholesky factors: the kernel and the reference against each other and the definition."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from owlore import ops, reference
from owlore.kernels import inverse_cholesky

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [1, 5, 16, 17, 40, 100]


def grams(count, k, spread=5.0, seed=0):
    """Gram matrices of columns whose lengths fall by 10^-spread."""
    generator = torch.Generator().manual_seed(seed)
    Y = torch.randn(count, 3 * k + 2, k, generator=generator, dtype=torch.float64)
    Y *= torch.logspace(0, -spread, k, dtype=torch.float64)
    return (Y.mT @ Y).to(DEVICE)


def by_kernel(gram, shift, least):
    inverse = torch.full_like(gram, float("nan"))
    assert inverse_cholesky.launch_inverse_cholesky(gram.clone(), inverse, shift, least)
    return inverse


def by_reference(gram, shift, least):
    inverse = torch.full_like(gram, float("nan"))
    reference.inverse_cholesky_(gram.clone(), inverse, shift, least)
    return inverse


@pytest.mark.parametrize("factor", [by_kernel, by_reference])
@pytest.mark.parametrize("k", SIZES)
def test_inverse_whitens(factor, k):
    gram = grams(3, k)
    X = factor(gram, 1e-14, 1e-280)
    assert torch.equal(X, X.tril())
    unit = torch.eye(k, dtype=torch.float64, device=DEVICE).expand(3, -1, -1)
    # Rounding of the matrix itself, which the inverse lifts, and the raised diagonal.
    torch.testing.assert_close(X @ gram @ X.mT, unit, rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", SIZES)
def test_kernel_gives_the_references_factors(k):
    gram = grams(2, k, seed=k)
    for shift, least in ((1e-14, 1e-280), (0.0, 1e-3)):
        got, want = by_kernel(gram, shift, least), by_reference(gram, shift, least)
        assert (got - want).norm() < 1e-9 * want.norm()


def test_only_the_lower_triangles_are_read():
    gram = grams(2, 40)
    above = torch.triu(torch.ones_like(gram[0], dtype=torch.bool), 1)
    poisoned = gram.masked_fill(above, float("nan"))
    for block in (slice(0, 16), slice(16, 32), slice(32, 40)):
        # Within the blocks on the diagonal both triangles are.
        poisoned[:, block, block] = gram[:, block, block]
    assert torch.equal(by_kernel(poisoned, 1e-14, 0.0), by_kernel(gram, 1e-14, 0.0))


@pytest.mark.parametrize("factor", [by_kernel, by_reference])
def test_dependent_columns_have_a_factor(factor):
    """What is left of a column that depends on others is its raised part."""
    Y = torch.randn(60, 20, dtype=torch.float64, device=DEVICE)
    Y[:, 18] = Y[:, :18].sum(dim=1)
    Y[:, 19] = 0.0
    X = factor((Y.mT @ Y)[None], 1e-12, 1e-280)
    assert X.isfinite().all()
    whitened = Y @ X[0].mT
    near = whitened[:, :18].mT @ whitened[:, :18]
    unit = torch.eye(18, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(near, unit, rtol=0, atol=1e-6)
    assert whitened[:, 18].norm() < 1.0
    assert not whitened[:, 19].any()


def test_pivots_that_rounding_makes_negative():
    """They are as large as the diagonal was raised by at least."""
    gram = torch.eye(20, dtype=torch.float64, device=DEVICE)[None].clone()
    gram[0, 18, 5] = gram[0, 5, 18] = 1.0 + 1e-15
    X = by_kernel(gram, 0.0, 1e-20)
    assert X.isfinite().all()
    assert float(X[0, 18, 18]) == pytest.approx(1e10)


def test_matrices_do_not_meet():
    gram = grams(3, 40)
    gram[1] = float("nan")
    X = by_kernel(gram, 1e-14, 0.0)
    assert X[1].isnan().any()
    assert torch.equal(X[::2], by_kernel(gram[::2].contiguous(), 1e-14, 0.0))


def test_what_is_not_covered_is_left_to_the_reference():
    gram = grams(2, 12)
    launch = inverse_cholesky.launch_inverse_cholesky
    assert not launch(gram.float(), torch.empty_like(gram.float()), 1e-14, 0.0)
    assert not launch(gram.mT, torch.empty_like(gram), 1e-14, 0.0)
    assert launch(gram[:0], gram[:0].clone(), 1e-14, 0.0)
    inverse = torch.empty_like(gram.float())
    ops.inverse_cholesky_(gram.float(), inverse, 1e-7, 0.0)
    torch.testing.assert_close(inverse.double(), by_reference(gram, 1e-7, 0.0), rtol=1e-2, atol=1.0)


def test_large_matrices_go_to_torch(monkeypatch):
    gram = grams(2, 6)
    want = by_reference(gram, 1e-14, 0.0)
    calls = []
    monkeypatch.setattr(reference, "inverse_cholesky_", lambda *given: calls.append(given))
    inverse = torch.zeros_like(gram)
    ops.inverse_cholesky_(gram.clone(), inverse, 1e-14, 0.0)
    assert not calls
    torch.testing.assert_close(inverse, want)
    monkeypatch.setattr(ops, "_MOST_IN_KERNEL", 5)
    ops.inverse_cholesky_(gram, inverse, 1e-14, 0.0)
    assert len(calls) == 1


def test_shapes_are_checked():
    gram = grams(2, 6)
    for bad in (gram[0], gram[:, :4], gram[..., None]):
        with pytest.raises(ValueError, match=r"gram: expected shape \[b, k, k\]"):
            ops.inverse_cholesky_(bad, bad, 0.0, 0.0)
    with pytest.raises(ValueError, match="inverse: expected shape"):
        ops.inverse_cholesky_(gram, gram[:1], 0.0, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [16, 144, 272, 1000])
def test_large_factors_on_the_gpu(k):
    gram = grams(4, k)
    inverse = by_kernel(gram, 1e-14, 1e-280)
    unit = torch.eye(k, dtype=torch.float64, device=DEVICE).expand(4, -1, -1)
    torch.testing.assert_close(inverse @ gram @ inverse.mT, unit, rtol=0, atol=1e-9)
    assert torch.equal(inverse, inverse.tril())


COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from owlore.kernels import inverse_cholesky as module

kernel = module._inverse_cholesky_kernel
cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
constants = {"SHIFT": 1e-14, "LEAST": 1e-280, "BLOCK": module._BLOCK, "LINES": module._LINES}
types = {"a_ptr": "*fp64", "x_ptr": "*fp64", "k": "i32"}
names = kernel.arg_names
source = ASTSource(
    fn=kernel,
    signature={n: types.get(n, "constexpr") for n in names},
    constexprs={(i,): constants[n] for i, n in enumerate(names) if n in constants},
    attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types},
)
built = triton.compile(
    source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": module._WARPS}
)
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(built.asm["cubin"])
    file.flush()
    text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True)
found = re.search(r"REG:(\\d+) STACK:(\\d+)", text.stdout)
print(json.dumps({"stack": int(found[2]), "shared": built.metadata.shared}))
"""


@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
def test_kernel_compiles_without_spills(architecture, tmp_path):
    environment = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(architecture)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["stack"] == 0
    assert row["shared"] <= 99 * 1024
