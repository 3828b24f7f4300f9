"""Benchmarks the outlier statistics: counts of a block, squared norms, a whole calibration pass.

    python benchmarks/bench_outliers.py --json benchmarks/results/h100/outliers.json
    python benchmarks/bench_outliers.py --device cpu --json benchmarks/results/cpu/outliers.json

Every row is printed only after the same inputs gave the right answer. `floor_ms` is the time of two
reads of the weights at the copy bandwidth measured in the same run, `fraction` the share of that
bandwidth.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from common import bytes_moved, copy_bandwidth, machine, measure, show, write_rows
from torch import Tensor

from owlore import _extension, ops, reference

TAUS = [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 13.0]
# Weights of one block as (out, in) features.
BLOCKS = {
    "llama2-7b-block": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)],
    "smollm2-135m-block": [(576, 576), (192, 576), (192, 576), (576, 576)]
    + [(1536, 576)] * 2
    + [(576, 1536)],
}
ACTIVATIONS = {"cuda": [(8192, 4096), (8192, 11008)], "cpu": [(4096, 576), (4096, 1536)]}


def torch_counts(
    weights: Sequence[Tensor], norms: Sequence[Tensor], taus: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The formula as one would write it in PyTorch, in float32, with the scores in memory."""
    A = [W.abs().float() * norm.float() for W, norm in zip(weights, norms, strict=True)]
    mean = sum(a.sum() for a in A) / sum(a.numel() for a in A)
    counts = [torch.stack([(a > tau * mean).sum() for tau in taus]) for a in A]
    return torch.stack(counts), mean


def torch_sq_norm(acc: Tensor, x: Tensor) -> None:
    acc += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()


def check_counts(weights: list[Tensor], norms: list[Tensor]) -> None:
    """Counts of both agree, but for entries within 1e-6 of a bound."""
    counts, mean = ops.outlier_counts(weights, norms, TAUS)
    _, expected_mean = reference.outlier_counts(weights, norms, [])
    assert abs(mean - expected_mean) <= 1e-9 * expected_mean, (mean, expected_mean)
    low, _ = reference.outlier_counts(weights, norms, [tau * (1 + 1e-6) for tau in TAUS])
    high, _ = reference.outlier_counts(weights, norms, [tau * (1 - 1e-6) for tau in TAUS])
    assert bool(((low <= counts) & (counts <= high)).all()), (low, counts, high)


def bench_counts(device: str, case: str, bandwidth: float, compiled: bool) -> Iterator[dict]:
    torch.manual_seed(0)
    weights = [(torch.randn(shape, device=device) * 0.02).bfloat16() for shape in BLOCKS[case]]
    norms = [torch.rand(W.shape[1], device=device, dtype=torch.float64) * 50 for W in weights]
    check_counts(weights, norms)
    floor = 2 * bytes_moved(*weights) / bandwidth * 1e3
    providers: dict[str, Callable] = {"owlore": ops.outlier_counts, "torch": torch_counts}
    if compiled:
        providers["torch.compile"] = torch.compile(torch_counts)
    if device == "cpu":
        providers["reference"] = reference.outlier_counts
    for provider, function in providers.items():
        for taus in ([5.0], TAUS):
            timing = measure(
                [functools.partial(function, weights, norms, taus)],
                device,
                graph=provider == "owlore",
                repeats=30 if device == "cuda" else 7,
            )
            yield {
                "bench": "outlier_count",
                "case": case,
                "provider": provider,
                "thresholds": len(taus),
                **timing._asdict(),
                "floor_ms": floor,
            }


def bench_sq_norm(device: str, bandwidth: float, compiled: bool) -> Iterator[dict]:
    for T, n in ACTIVATIONS[device]:
        torch.manual_seed(0)
        # Together far larger than the cache.
        copies = 8 if device == "cuda" else 2
        xs = [torch.randn(T, n, device=device).bfloat16() for _ in range(copies)]
        acc = torch.zeros(n, device=device, dtype=torch.float64)
        mask = torch.rand(T, device=device) < 0.9
        for keep in (None, mask):
            found, expected = acc.clone(), acc.clone()
            ops.column_sq_norm_(found, xs[0], keep)
            reference.column_sq_norm_(expected, xs[0], keep)
            torch.testing.assert_close(found.sqrt(), expected.sqrt(), rtol=1e-6, atol=0)
        providers: dict[str, Callable] = {
            "owlore": ops.column_sq_norm_,
            "owlore, mask": lambda acc, x, mask=mask: ops.column_sq_norm_(acc, x, mask),
            "torch": torch_sq_norm,
        }
        if compiled:
            providers["torch.compile"] = torch.compile(torch_sq_norm)
        if device == "cpu":
            providers["reference"] = reference.column_sq_norm_
        for provider, function in providers.items():
            calls = [functools.partial(function, acc, x) for x in xs]
            timing = measure(calls, device, graph=provider.startswith("owlore"))
            yield {
                "bench": "sq_norm",
                "case": f"{T}x{n}",
                "provider": provider,
                **timing._asdict(),
                "fraction": bytes_moved(xs[0]) / (timing.ms * 1e-3) / bandwidth,
            }


def bench_calibration(layers: int) -> Iterator[dict]:
    """The calibration pass of a LLaMA-2-7B shape against the plain forward pass."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from owlore import outlier_scores

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(32000, (16, 2048))
    batch_size = 4

    @torch.no_grad()
    def forward() -> None:
        for rows in ids.split(batch_size):
            device_ids = rows.cuda()
            mask = torch.ones_like(device_ids)
            model.model(input_ids=device_ids, attention_mask=mask, use_cache=False)

    def calibrate() -> None:
        outlier_scores(model, list(ids), batch_size=batch_size)

    peaks, times = [], []
    for function in (forward, calibrate):
        function()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        times.append(measure([function], "cuda", repeats=5, graph=False).ms)
        peaks.append(torch.cuda.max_memory_allocated())
    yield {
        "bench": "calibration",
        "case": f"llama2-7b-16x2048{'' if layers == 32 else f', {layers} blocks'}",
        "ms": times[1],
        "forward_ms": times[0],
        "extra_mib": (peaks[1] - peaks[0]) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", default=["counts", "sq_norm", "calibration"])
    parser.add_argument("--layers", type=int, default=32, help="blocks of the calibration model")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; try --device cpu")
    state = _extension.status()
    if not state["available"] or (options.device == "cuda" and not state["cuda"]):
        parser.error(f"the extension does not serve {options.device}: {state}")

    bandwidth = copy_bandwidth(options.device)
    rows: list[dict[str, Any]] = [machine(options.device) | {"copy_gb_s": bandwidth / 1e9}]
    show(rows[0])
    compiled = not options.no_compile and options.device == "cuda"
    parts: list[Iterator[dict]] = []
    if "counts" in options.only:
        case = "llama2-7b-block" if options.device == "cuda" else "smollm2-135m-block"
        parts.append(bench_counts(options.device, case, bandwidth, compiled))
    if "sq_norm" in options.only:
        parts.append(bench_sq_norm(options.device, bandwidth, compiled))
    if "calibration" in options.only and options.device == "cuda":
        parts.append(bench_calibration(options.layers))
    for part in parts:
        for row in part:
            show(row)
            rows.append(row)
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
