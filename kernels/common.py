"""What the grouped optimizer kernels share: the pointer table, scalars and bias corrections."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

TL_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


@triton.jit
def pointer(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in one column of a table row."""
    ptr = tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE))
    # A pointer that comes out of memory carries no alignment, and every access would be scalar.
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def bias_correction(t, log_beta):
    """1 - beta^t without cancellation: -expm1(t log(beta)), by its series near zero."""
    y = t * log_beta
    near = 1.0 + y * (1.0 / 9)
    near = 1.0 + y * (1.0 / 8) * near
    near = 1.0 + y * (1.0 / 7) * near
    near = 1.0 + y * (1.0 / 6) * near
    near = 1.0 + y * (1.0 / 5) * near
    near = 1.0 + y * (1.0 / 4) * near
    near = 1.0 + y * (1.0 / 3) * near
    near = 1.0 + y * (1.0 / 2) * near
    return tl.where(y > -0.5, -y * near, 1.0 - tl.exp(y))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def scalars(
    beta1: float, beta2: float, eps: float, weight_decay: float, seed: int
) -> dict[str, float | int]:
    """Scalar arguments of a kernel; what float32 would spoil is computed here."""
    return {
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "log_beta1": math.log(beta1) if beta1 > 0 else -math.inf,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "log_beta2": math.log(beta2) if beta2 > 0 else -math.inf,
        "eps": eps,
        "weight_decay": weight_decay,
        "seed_low": _signed(seed & 0xFFFFFFFF),
        "seed_high": _signed(seed >> 32 & 0xFFFFFFFF),
    }


def upload(rows: Iterable[Iterable[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A table on the device, without waiting for it, and its host copy, which must live on."""
    host = torch.tensor(rows, dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory()
    return [host.to(device, non_blocking=True), host]


def remember(cache: dict, key: object, value: object, most: int) -> None:
    """Adds to a cache of bounded size; the oldest entry goes."""
    if len(cache) >= most:
        cache.pop(next(iter(cache)))
    cache[key] = value


_arenas: dict[tuple[torch.device, int], Tensor] = {}
_captured: list[object] = []


def arena(device: torch.device, size: int) -> Tensor:
    """Scratch memory of at least this many bytes, one piece for each device and stream.

    All launches on a stream run after each other, so they share it: were each set of blocks to keep
    scratch of its own, the memory would grow with every draw.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _arenas.get((device, stream))
    if held is None or held.numel() < size:
        held = torch.empty(size, dtype=torch.uint8, device=device)
        _arenas[device, stream] = held
    return held


def keep_if_captured(device: torch.device, *objects: object) -> None:
    """Keeps what a launch refers to for good, if a CUDA graph that replays it is being captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(objects)
