"""What the grouped optimizer kernels share: the pointer table, scalars and bias corrections."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

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
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
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
        kernel: The kernel; its first two parameters are the table and the tiles.
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

    def __call__(self, kind: Hashable, table: Tensor, values: dict[str, Any]) -> None:
        """Launches.

        Args:
            kind: What the types and alignments of the arguments follow from.
            table: The table.
            values: Arguments by name; those the kernel does not have are left out.
        """
        arguments = [table, self._tiles, *[values[name] for name in self._names[2:]]]
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


class Tables:
    """Tables on the device for launches whose gradients move from step to step.

    A table, once uploaded, is never written again: a CUDA graph may replay launches that read it.

    Args:
        rows: The table; what moves is zero, or an offset.
        device: Where the launches run.
    """

    _MOST = 4

    def __init__(self, rows: Sequence[Sequence[int]], device: torch.device) -> None:
        self._rows = torch.tensor(rows, dtype=torch.int64)
        self._device = device
        self._known: dict[tuple[int, ...], Tensor] = {}
        self._staged: Tensor | None = None

    def at(self, moved: Sequence[tuple[int, Sequence[int]]], capturing: bool) -> Tensor:
        """The table with addresses added to whole columns.

        Args:
            moved: Columns, and the addresses to add to each.
            capturing: A CUDA graph is being captured.
        """
        key = tuple([address for _, addresses in moved for address in addresses])
        table = self._known.get(key)
        if table is None:
            host = self._blank() if self._staged is None else self._staged
            host.copy_(self._rows)
            for column, addresses in moved:
                host[:, column] += torch.tensor(addresses, dtype=torch.int64)
            table = host.to(self._device, non_blocking=True)
            if capturing:
                # A replay reads the host's copy again.
                keep(host)
            self._staged = None
            remember(self._known, key, table, self._MOST)
        if self._staged is None and not capturing:
            # Ahead of time: CUDA allocates no pinned memory during a capture.
            self._staged = self._blank()
        return table

    def _blank(self) -> Tensor:
        return torch.empty_like(self._rows, pin_memory=self._device.type == "cuda")


class Prepared:
    """A step on the same tensors again and again, of which only the gradients move.

    It knows addresses, not tensors: the caller keeps the tensors in their places.

    Args:
        groups: Of each group its members among the tensors, its launches and its tables.
        grads: Gradients like those that will come.
        seed: Seed of the random bits.
        grad_columns: Columns of the tables that take a gradient's address.
        scratch_columns: Columns that take the address of the scratch memory.
        scratch_size: Bytes of scratch memory.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Sequence[int], Sequence[Launch], Tables]],
        grads: Sequence[Tensor],
        seed: int,
        grad_columns: Sequence[int],
        scratch_columns: Sequence[int] = (),
        scratch_size: int = 0,
    ) -> None:
        self._groups = groups
        self._seed = seed
        self._grad_columns = grad_columns
        self._scratch_columns = scratch_columns
        self._scratch_size = scratch_size
        self._device = grads[0].device
        self._kinds = _kinds(grads)
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
    ) -> bool:
        """One step.

        Returns:
            False if the gradients differ in shape, strides, dtype or alignment from those it was
            prepared for; then nothing was done.
        """
        if _kinds(grads) != self._kinds or aligned(grads) != self._aligned:
            return False
        device = self._device
        capturing = is_capturing(device)
        scratch = arena(device, self._scratch_size) if self._scratch_size else None
        values = {
            **scalars(beta1, beta2, eps, weight_decay, self._seed), "scale": float(scale),
            "lr_ptr": lr, "nonfinite_ptr": nonfinite, "rng_step_ptr": rng_step,
        }  # fmt: skip
        kind = tuple([(x.dtype, x.data_ptr() % 16 == 0) for x in (lr, nonfinite, rng_step)])
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for members, launches, tables in self._groups:
                pointers = [grads[i].data_ptr() for i in members]
                moved = [(column, pointers) for column in self._grad_columns]
                if scratch is not None:
                    moved += [(column, [scratch.data_ptr()]) for column in self._scratch_columns]
                table = tables.at(moved, capturing)
                if capturing:
                    keep(launches, table, scratch)
                for launch in launches:
                    launch(kind, table, values)
        return True


def _kinds(tensors: Sequence[Tensor]) -> list[tuple]:
    return [(x.shape, x.stride(), x.dtype) for x in tensors]


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether all begin at multiples of 16 bytes."""
    return all([x.data_ptr() % 16 == 0 for x in tensors])


def fixed_key(lists: Sequence[Sequence[Tensor]], *more: Hashable) -> tuple:
    """What tells steps on these tensors, in their places, from others."""
    places = [
        (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for tensors in lists for x in tensors
    ]
    return tuple(places), *more
