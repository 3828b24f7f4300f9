"""What the grouped optimizer kernels share: launches, addresses, scalars and bias corrections."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
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


def current_stream(device: torch.device) -> int:
    """Handle of a device's current stream."""
    # Triton asks for the handle alone, where torch makes an object of the stream.
    return driver.active.get_current_stream(device.index) if device.type == "cuda" else 0


_arenas: dict[tuple[torch.device, int], Tensor] = {}
_captured: list[object] = []


def arena(device: torch.device, size: int) -> Tensor:
    """Scratch memory of at least this many bytes, one piece for each device and stream.

    All launches on a stream run after each other, so they share it: were each set of blocks to keep
    scratch of its own, the memory would grow with every draw.
    """
    stream = current_stream(device)
    held = _arenas.get((device, stream))
    if held is None or held.numel() < size:
        held = torch.empty(size, dtype=torch.uint8, device=device)
        _arenas[device, stream] = held
    return held


class Launch:
    """One launch of a kernel over its tiles, made again and again with other tables and scalars.

    From the second time on the compiled kernel is started as it is: Triton's own way looks at every
    argument and takes several times as long. It is given addresses, of which it asks the driver
    nothing.

    Args:
        kernel: The kernel.
        tiles: A row for each program, or None for a kernel that needs none.
        constants: Its compile-time arguments and launch options.
        programs: How many, without tiles.
    """

    def __init__(
        self, kernel: Any, tiles: Tensor | None, constants: dict[str, Any], programs: int = 1
    ) -> None:
        self._kernel = kernel
        self._tiles = tiles
        self._tiles_address = 0 if tiles is None else tiles.data_ptr()
        self._grid = (programs if tiles is None else tiles.shape[0], 1, 1)
        self._constants = constants
        self._names = [name for name in kernel.arg_names if name not in constants]
        self._tail = [constants[name] for name in kernel.arg_names if name in constants]
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self, kind: Hashable, values: dict[str, Any], tensors: dict[str, Tensor], stream: int
    ) -> None:
        """Launches.

        Args:
            kind: What the types and alignments of the arguments follow from.
            values: Arguments by name, addresses of tensors; those the kernel does not have are left
                out.
            tensors: The tensors by name.
            stream: Handle of the device's current stream.
        """
        start = self._compiled.get(kind)
        if start is not None:
            values["tiles_ptr"] = self._tiles_address
            start(*[values[name] for name in self._names], *self._tail, stream=stream)
            return
        named = {**values, **tensors, "tiles_ptr": self._tiles}
        named = {name: named[name] for name in self._names}
        built = self._kernel[self._grid](**named, **self._constants)
        # The interpreter, and an asynchronous compilation, return something else.
        if isinstance(built, CompiledKernel):
            self._compiled[kind] = built[self._grid]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep(*objects: object) -> None:
    """Keeps what a captured launch refers to for good: a CUDA graph may replay it at any time."""
    _captured.append(objects)


@triton.jit
def _write_kernel(array_ptr, numbers, COUNT: tl.constexpr):
    """array[i] <- numbers[i], by a single program.

    Triton compiles for the alignment of the first call's numbers, which no store depends on.
    """
    for i in tl.static_range(COUNT):
        tl.store(array_ptr + i, numbers[i])


class Addresses:
    """Addresses of tensors that move from step to step, on the device.

    They travel as arguments of a launch: unlike a copy that needs no pinned memory, which the host
    must not touch before the copy is done. The arrays used last are kept, as a training loop comes
    back to the same addresses every few steps. The steps of one optimizer follow each other on the
    device, so that an array may be written again once its addresses are forgotten; those that a
    CUDA graph refers to never are.
    """

    # Arrays kept, and addresses in one launch: kernels take at least 4 KiB of arguments.
    _MOST = 8
    _AT_ONCE = 256
    # In the place of addresses that nobody reads. Triton takes small numbers for int32.
    _NOWHERE = 1 << 62

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        least = 1 << max(count - 1, 0).bit_length()
        self._at_once = min(max(least, 16), self._AT_ONCE)
        self._size = triton.cdiv(count, self._at_once) * self._at_once
        self._write = Launch(_write_kernel, None, {"COUNT": self._at_once, "num_warps": 1})
        self._known: dict[tuple[int, ...], Tensor] = {}
        # Arrays written so far.
        self.written = 0

    def __contains__(self, addresses: tuple[int, ...]) -> bool:
        return addresses in self._known

    def at(self, addresses: tuple[int, ...], capturing: bool, stream: int = 0) -> Tensor:
        """The addresses as int64; the caller keeps the array if it is capturing.

        Args:
            addresses: The same number in every call.
            capturing: A CUDA graph is being captured.
            stream: Handle of the device's current stream.
        """
        known = self._known
        array = known.pop(addresses, None)
        if array is None:
            if len(known) < self._MOST or capturing:
                array = torch.empty(self._size, dtype=torch.int64, device=self._device)
            else:
                array = known.pop(next(iter(known)))
            numbers = addresses + (self._NOWHERE,) * (self._size - len(addresses))
            if 0 in addresses:
                numbers = tuple([number or self._NOWHERE for number in numbers])
            for start in range(0, self._size, self._at_once):
                part = array[start:] if start else array
                values = {
                    "array_ptr": part.data_ptr(),
                    "numbers": numbers[start : start + self._at_once],
                }
                self._write(0, values, {"array_ptr": part}, stream)
            self.written += 1
        if not capturing:
            # At the end: the first one is the one used longest ago.
            known[addresses] = array
        return array


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the current one, if it is not."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


@triton.jit
def _count_kernel(tiles_ptr, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts a step.

        steps <- steps + 1,  skipped <- skipped + flags,  flags <- 0,  clock <- clock + 1

    Program i does so for row i: the three vectors' addresses, their length, and a clock's or zero.
    """
    row_ptr = tiles_ptr + tl.program_id(0) * FIELDS
    steps_ptr = pointer(row_ptr, 0, tl.float32, False)
    skipped_ptr = pointer(row_ptr, 1, tl.int32, False)
    flags_ptr = pointer(row_ptr, 2, tl.int32, False)
    count = tl.load(row_ptr + 3).to(tl.int32)
    if tl.load(row_ptr + 4) != 0:
        clock_ptr = pointer(row_ptr, 4, tl.int32, False)
        tl.store(clock_ptr, tl.load(clock_ptr) + 1)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < count
        tl.store(steps_ptr + at, tl.load(steps_ptr + at, mask=mask, other=0.0) + 1.0, mask=mask)
        skipped = tl.load(skipped_ptr + at, mask=mask, other=0)
        skipped += tl.load(flags_ptr + at, mask=mask, other=0)
        tl.store(skipped_ptr + at, skipped, mask=mask)
        tl.store(flags_ptr + at, tl.zeros([BLOCK], tl.int32), mask=mask)


class Counting:
    """`owlore.reference.count_` on the same vectors and clocks of a device, in one launch.

    It knows addresses, not tensors: the caller keeps the tensors in their places.

    Args:
        steps: Vectors of step counts. float32.
        skipped: Vectors of how many of them skipped something. int32.
        flags: Vectors of those that skipped something since. int32.
        clocks: Numbers to count up, too. [], int32.
    """

    def __init__(
        self,
        steps: Sequence[Tensor],
        skipped: Sequence[Tensor],
        flags: Sequence[Tensor],
        clocks: Sequence[Tensor],
    ) -> None:
        self._device = (*clocks, *steps)[0].device
        rows = [[0] * 5 for _ in range(max(len(steps), len(clocks)))]
        for row, *vectors in zip(rows, steps, skipped, flags, strict=False):
            row[:4] = [*(x.data_ptr() for x in vectors), vectors[0].numel()]
        for row, clock in zip(rows, clocks, strict=False):
            row[4] = clock.data_ptr()
        self._table = upload(torch.tensor(rows, dtype=torch.int64), self._device)
        constants = {"FIELDS": 5, "BLOCK": 256, "num_warps": 4}
        self._launch = Launch(_count_kernel, self._table, constants)

    def __call__(self) -> None:
        """Counts."""
        if is_capturing(self._device):
            keep(self._launch)
        with on(self._device):
            self._launch(0, {}, {}, current_stream(self._device))


class Prepared:
    """A step on the same tensors again and again, of which only the gradients move.

    It knows addresses, not tensors: the caller keeps the tensors in their places.

    Attributes:
        addresses: Where the gradients of recent steps were.

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
        self._groups = [(launches, table, table.data_ptr()) for launches, table in groups]
        self._seed = seed
        self._scratch_size = scratch_size
        self._device = grads[0].device
        self.addresses = Addresses(self._device, len(grads))
        self._places = _places(grads)
        self._strides = [G.stride() for G in grads]
        self._dtypes = [G.dtype for G in grads]
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
        if [G.stride() for G in grads] != self._strides or [G.dtype for G in grads] != self._dtypes:
            return False
        if not fitting and _places(grads) != self._places:
            return False
        pointers = tuple(map(Tensor.data_ptr, grads))
        if pointers not in self.addresses and _all_even(pointers) != self._aligned:
            return False
        device = self._device
        capturing = is_capturing(device)
        with on(device):
            stream = current_stream(device)
            array = self.addresses.at(pointers, capturing, stream)
            tensors = {
                "lr_ptr": lr, "nonfinite_ptr": nonfinite, "rng_step_ptr": rng_step,
                "grads_ptr": array,
            }  # fmt: skip
            if self._scratch_size:
                tensors["scratch_ptr"] = arena(device, self._scratch_size)
            values = {name: tensor.data_ptr() for name, tensor in tensors.items()}
            kind = (
                lr.dtype, nonfinite.dtype, rng_step.dtype,
                values["lr_ptr"] % 16, values["nonfinite_ptr"] % 16, values["rng_step_ptr"] % 16,
            )  # fmt: skip
            values.update(scalars(beta1, beta2, eps, weight_decay, self._seed), scale=float(scale))
            for launches, table, table_address in self._groups:
                values["table_ptr"], tensors["table_ptr"] = table_address, table
                if capturing:
                    keep(launches, *tensors.values())
                for launch in launches:
                    launch(kind, values, tensors, stream)
        return True


def _places(tensors: Sequence[Tensor]) -> list[tuple]:
    return [(x.shape, x.device) for x in tensors]


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether all begin at multiples of 16 bytes."""
    return _all_even([x.data_ptr() for x in tensors])


def _all_even(pointers: Sequence[int]) -> bool:
    return not functools.reduce(operator.or_, pointers, 0) & 15


def fixed_key(lists: Sequence[Sequence[Tensor]], *more: Hashable) -> tuple:
    """What tells steps on these tensors, in their places, from others."""
    places = [
        (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for tensors in lists for x in tensors
    ]
    return tuple(places), *more
