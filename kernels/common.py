"""What the grouped optimizer kernels share: launches, addresses, scalars and bias corrections."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

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


@functools.lru_cache(maxsize=64)
def scalars(
    beta1: float, beta2: float, eps: float, weight_decay: float, seed: int
) -> dict[str, float | int]:
    """Scalar arguments of a kernel; what float32 would spoil is computed here."""
    return {
        "beta1": float(beta1),
        "one_minus_beta1": 1.0 - beta1,
        "log_beta1": math.log(beta1) if beta1 > 0 else -math.inf,
        "beta2": float(beta2),
        "one_minus_beta2": 1.0 - beta2,
        "log_beta2": math.log(beta2) if beta2 > 0 else -math.inf,
        "eps": float(eps),
        "weight_decay": float(weight_decay),
        "seed_low": _signed(seed & 0xFFFFFFFF),
        "seed_high": _signed(seed >> 32 & 0xFFFFFFFF),
    }


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for it."""
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


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
    # Triton asks for the handle alone, where torch makes an object of the stream.
    stream = driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    held = _arenas.get((device, stream))
    if held is None or held.numel() < size:
        held = torch.empty(size, dtype=torch.uint8, device=device)
        _arenas[device, stream] = held
    return held


class Launch:
    """One launch of a kernel over its tiles, made again and again with other tables and scalars.

    From the second time on the compiled kernel is started as it is: Triton's own way looks at every
    argument and takes several times as long.

    Args:
        kernel: The kernel.
        tiles: A row for each program.
        constants: Its compile-time arguments and launch options.
    """

    def __init__(self, kernel: Any, tiles: Tensor, constants: dict[str, Any]) -> None:
        self._kernel = kernel
        self._tiles = tiles
        self._constants = constants
        self._names = [name for name in kernel.arg_names if name not in constants]
        self._tail = [constants[name] for name in kernel.arg_names if name in constants]
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, kind: Hashable, values: dict[str, Any]) -> None:
        """Launches.

        Args:
            kind: What the types and alignments of the arguments follow from.
            values: Arguments by name; those the kernel does not have are left out.
        """
        values["tiles_ptr"] = self._tiles
        arguments = [values[name] for name in self._names]
        start = self._compiled.get(kind)
        if start is not None:
            start(*arguments, *self._tail)
            return
        grid = (self._tiles.shape[0], 1, 1)
        named = dict(zip(self._names, arguments, strict=True))
        built = self._kernel[grid](**named, **self._constants)
        # The interpreter, and an asynchronous compilation, return something else.
        if isinstance(built, CompiledKernel):
            self._compiled[kind] = built[grid]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep(*objects: object) -> None:
    """Keeps what a captured launch refers to for good: a CUDA graph may replay it at any time."""
    _captured.append(objects)


class Addresses:
    """Addresses of tensors that move from step to step, on the device.

    An array, once uploaded, is never written again: a CUDA graph may replay launches that read it.
    """

    _MOST = 4

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple[int, ...], Tensor] = {}
        self._staged: Tensor | None = None

    def __contains__(self, addresses: tuple[int, ...]) -> bool:
        return addresses in self._known

    def at(self, addresses: tuple[int, ...], capturing: bool) -> Tensor:
        """The addresses as int64.

        Args:
            addresses: The same number in every call.
            capturing: A CUDA graph is being captured.
        """
        array = self._known.get(addresses)
        if array is None:
            host = self._blank(len(addresses)) if self._staged is None else self._staged
            host.numpy()[:] = addresses
            array = host.to(self._device, non_blocking=True)
            if capturing:
                # A replay reads the host's copy again.
                keep(host)
            self._staged = None
            remember(self._known, addresses, array, self._MOST)
        if self._staged is None and not capturing:
            # Ahead of time: CUDA allocates no pinned memory during a capture.
            self._staged = self._blank(len(addresses))
        return array

    def _blank(self, count: int) -> Tensor:
        on_gpu = self._device.type == "cuda"
        return torch.empty(count, dtype=torch.int64, pin_memory=on_gpu)


class Prepared:
    """A step on the same tensors again and again, of which only the gradients move.

    It knows addresses, not tensors: the caller keeps the tensors in their places.

    Args:
        groups: Launches and the table on the device of each group of tensors.
        grads: Gradients like those that will come.
        seed: Seed of the random bits.
        scratch_size: Bytes of scratch memory.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Sequence[Launch], Tensor]],
        grads: Sequence[Tensor],
        seed: int,
        scratch_size: int = 0,
    ) -> None:
        self._groups = groups
        self._seed = seed
        self._scratch_size = scratch_size
        self._device = grads[0].device
        self._addresses = Addresses(self._device)
        self._shapes = _shapes(grads)
        self._layouts = _layouts(grads)
        self._aligned = aligned(grads)

    def launch(
        self,
        grads: Sequence[Tensor],
        lr: Tensor,
        nonfinite: Tensor,
        rng_step: Tensor,
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        scale: float = 1.0,
        fitting: bool = False,
    ) -> bool:
        """One step.

        Args:
            grads: Gradients.
            lr: Rate. [].
            nonfinite: Set to one for each gradient that is not finite. int32.
            rng_step: Counter of the random bits. [], int32.
            beta1: Decay of the first moment.
            beta2: Decay of the second moment.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled decay.
            scale: Factor of a low-rank update.
            fitting: Shapes and devices of the gradients are known to be those prepared for.

        Returns:
            False if the gradients differ in shape, strides, dtype, device or alignment from those
            it was prepared for; then nothing was done.
        """
        pointers = tuple([G.data_ptr() for G in grads])
        if _layouts(grads) != self._layouts or not (fitting or _shapes(grads) == self._shapes):
            return False
        device = self._device
        capturing = is_capturing(device)
        if pointers not in self._addresses and _all_even(pointers) != self._aligned:
            return False
        kind = tuple([(x.dtype, x.data_ptr() % 16 == 0) for x in (lr, nonfinite, rng_step)])
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            values = {
                **scalars(beta1, beta2, eps, weight_decay, self._seed), "scale": float(scale),
                "lr_ptr": lr, "nonfinite_ptr": nonfinite, "rng_step_ptr": rng_step,
                "grads_ptr": self._addresses.at(pointers, capturing),
                "scratch_ptr": arena(device, self._scratch_size) if self._scratch_size else None,
            }  # fmt: skip
            for launches, table in self._groups:
                values["table_ptr"] = table
                if capturing:
                    keep(launches, *values.values())
                for launch in launches:
                    launch(kind, values)
        return True


def _shapes(tensors: Sequence[Tensor]) -> list[tuple]:
    return [(x.shape, x.device) for x in tensors]


def _layouts(tensors: Sequence[Tensor]) -> list[tuple]:
    return [(x.stride(), x.dtype) for x in tensors]


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether all begin at multiples of 16 bytes."""
    return _all_even([x.data_ptr() for x in tensors])


def _all_even(pointers: Sequence[int]) -> bool:
    return not any([pointer & 15 for pointer in pointers])


def fixed_key(lists: Sequence[Sequence[Tensor]], *more: Hashable) -> tuple:
    """What tells steps on these tensors, in their places, from others."""
    places = [
        (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for tensors in lists for x in tensors
    ]
    return tuple(places), *more
