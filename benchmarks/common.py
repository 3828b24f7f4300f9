"""What the benchmarks share: timing, the measured copy bandwidth, machine line and JSON file."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BLOCKS",
    "Timing",
    "bytes_moved",
    "copy_bandwidth",
    "gemm_rate",
    "machine",
    "measure",
    "show",
    "write_rows",
]

# The linear weights of one decoder block [out, in], as they come.
BLOCKS = {
    "llama2-7b": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)],
    "llama3-8b": [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)],
    "qwen3-8b": [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(12288, 4096)] * 2 + [(4096, 12288)],
    "smollm2-135m": [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)],
}


class Timing(NamedTuple):
    """Milliseconds of one call: the median and the 20th and 80th percentile."""

    ms: float
    p20: float
    p80: float


def _timing(samples: Sequence[float]) -> Timing:
    cuts = statistics.quantiles(samples, n=10)
    return Timing(statistics.median(samples), cuts[1], cuts[7])


def measure(
    calls: Sequence[Callable[[], Any]], device: str, *, repeats: int = 30, graph: bool = True
) -> Timing:
    """Time of one call, the calls taken in turn.

    Several calls on different tensors keep small inputs out of the cache. On CUDA they are replayed
    from a graph, so that the time is the device's and not the launching thread's.

    Args:
        calls: What to time; all do the same work.
        device: "cuda" or "cpu".
        repeats: Samples; each runs every call once.
        graph: Replay from a CUDA graph; off for calls that cannot be captured.
    """
    for call in calls:
        call()
    if device == "cpu":
        samples = []
        for _ in range(repeats):
            began = time.perf_counter()
            for call in calls:
                call()
            samples.append((time.perf_counter() - began) * 1e3 / len(calls))
        return _timing(samples)

    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph() if graph else None
    if captured is not None:
        with torch.cuda.graph(captured):
            for call in calls:
                call()
    begins = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 3)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 3)]
    for begin, end in zip(begins, ends, strict=True):
        begin.record()
        if captured is not None:
            captured.replay()
        else:
            for call in calls:
                call()
        end.record()
    torch.cuda.synchronize()
    samples = [b.elapsed_time(e) / len(calls) for b, e in zip(begins, ends, strict=True)]
    return _timing(samples[3:])


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a large device copy: the ceiling that rows refer to."""
    size = 2**31 if device == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    # Not from a graph: there a copy becomes a memcpy node, which is a fifth slower than the kernel.
    ms = measure([lambda: target.copy_(source)], device, repeats=10, graph=False).ms
    return 2 * size / (ms * 1e-3)


def gemm_rate(device: str) -> float:
    """Floating-point operations per second of a large bfloat16 matrix product on random data."""
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    ms = measure([lambda: a @ b], device, repeats=10).ms
    return 2 * n**3 / (ms * 1e-3)


def bytes_moved(*tensors: Tensor) -> int:
    """Bytes of the tensors, each read or written once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def machine(device: str) -> dict[str, Any]:
    """The machine line of a results file."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    row = {
        "bench": "machine",
        "torch": torch.__version__,
        "triton": triton_version,
        # A copy of the tree without its history is told the commit.
        "commit": os.environ.get("OWLORE_COMMIT")
        or _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
    }
    if device == "cuda":
        row["gpu"] = torch.cuda.get_device_name()
        row["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        row["threads"] = torch.get_num_threads()
    return row


def show(row: dict[str, Any]) -> None:
    """Prints a row."""
    texts = (
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in row.items()
    )
    print("  ".join(texts), flush=True)


def write_rows(path: str | None, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows as a JSON list, the machine line first."""
    if path is None:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8"
    )
    print(f"wrote {target}")
