"""The one door to fast code: schema, checks, registration. Definitions stand in `owlore.reference`.

Each op is a torch op in the namespace `owlore`. The reference serves every device; C++ and Triton
override single devices. `backends()` says which implementation a call would reach, and why.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from owlore import _extension, reference

_LIBRARY = torch.library.Library("owlore", "DEF")
_ADAM_TENSORS = (
    "Tensor(a!)[] params, Tensor[] grads, {bases}Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor[] steps, Tensor lr, Tensor(d!) nonfinite, Tensor rng_step"
)
_ADAM_SCALARS = "float beta1, float beta2, float eps, float weight_decay, "
_SCHEMAS = {
    "lowrank_adam_": f"({_ADAM_TENSORS.format(bases='Tensor[] bases, ')}, *, str side, "
    f"{_ADAM_SCALARS}float scale, bool stochastic, int seed, int[] streams) -> ()",
    "adamw_": f"({_ADAM_TENSORS.format(bases='')}, *, "
    f"{_ADAM_SCALARS}bool stochastic, int seed, int[] streams) -> ()",
    "column_sq_norm_": "(Tensor(a!) acc, Tensor x, Tensor? mask=None) -> ()",
    "outlier_counts": "(Tensor[] weights, Tensor[] norms, float[] thresholds) -> (Tensor, Tensor)",
}
_IN_EXTENSION = ("column_sq_norm_", "outlier_counts")


def _define() -> None:
    for name, schema in _SCHEMAS.items():
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        if name not in _IN_EXTENSION:
            _LIBRARY.impl(name, _slow_on_cuda(name), "CUDA")


@functools.cache
def _load_extension() -> None:
    _extension.load()
    if not _extension.status()["cuda"]:
        for name in _IN_EXTENSION:
            _LIBRARY.impl(name, _slow_on_cuda(name), "CUDA")


def _slow_on_cuda(name: str) -> Callable[..., Any]:
    definition = getattr(reference, name)

    @functools.wraps(definition)
    def call(*args: Any, **options: Any) -> Any:
        _warn_slow(name)
        return definition(*args, **options)

    return call


@functools.cache
def _warn_slow(name: str) -> None:
    warnings.warn(
        f"owlore: no CUDA kernel for {name}; the PyTorch reference runs, which is slower "
        "(`owlore info` says why)",
        stacklevel=2,
    )


_define()


@torch.library.register_fake("owlore::outlier_counts")
def _outlier_counts_fake(
    weights: Sequence[Tensor], norms: Sequence[Tensor], thresholds: Sequence[float]
) -> tuple[Tensor, Tensor]:
    counts = weights[0].new_empty((len(weights), len(thresholds)), dtype=torch.int64)
    return counts, weights[0].new_empty((), dtype=torch.float64)


def _in_place_fake(*args: Any, **options: Any) -> None:
    return None


for _name in ("lowrank_adam_", "adamw_", "column_sq_norm_"):
    torch.library.register_fake(f"owlore::{_name}", _in_place_fake)


def backends() -> list[dict[str, str]]:
    """Which implementation each op reaches on each device.

    Returns:
        One row for each op and device: "op", "device", "backend" ("C++", "Triton" or "reference")
        and "reason".
    """
    extension = _extension.status()
    rows = []
    for op in _SCHEMAS:
        for device in ("cpu", "cuda"):
            backend, reason = "reference", "the PyTorch definition; no kernel is written for it"
            if op in _IN_EXTENSION:
                reason = f"extension not in use: {extension['reason']}"
                if extension["available"] and (device == "cpu" or extension["cuda"]):
                    backend, reason = "C++", f"extension {extension['path']}"
                elif extension["available"]:
                    reason = "the extension was built without CUDA"
            rows.append({"op": op, "device": device, "backend": backend, "reason": reason})
    return rows


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _check_adam(
    params: Sequence[Tensor],
    tensors: dict[str, Sequence[Tensor]],
    lr: Tensor,
    nonfinite: Tensor,
    streams: Sequence[int],
) -> None:
    for name, values in {**tensors, "streams": streams}.items():
        _expect(len(values) == len(params), name, f"{len(params)} entries", len(values))
    _expect(lr.dim() == 0, "lr", "a tensor of no dimension", tuple(lr.shape))
    _expect(nonfinite.shape == (len(params),), "nonfinite", f"[{len(params)}]", nonfinite.shape)
    for i, W in enumerate(params):
        G = tensors["grads"][i]
        _expect(G.shape == W.shape, f"grads[{i}]", f"shape {tuple(W.shape)}", tuple(G.shape))
        _expect(G.device == W.device, f"grads[{i}]", f"device {W.device}", G.device)


def lowrank_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    nonfinite: Tensor,
    rng_step: Tensor,
    *,
    side: str,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    stochastic: bool,
    seed: int,
    streams: Sequence[int],
) -> None:
    """AdamW inside a low-rank subspace; see `owlore.reference.lowrank_adam_`.

    Raises:
        ValueError: Shapes, devices, counts or side do not fit together.
    """
    _expect(side in ("left", "right"), "side", "'left' or 'right'", repr(side))
    lists = {
        "grads": grads,
        "bases": bases,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "steps": steps,
    }
    _check_adam(params, lists, lr, nonfinite, streams)
    for i, (W, P) in enumerate(zip(params, bases, strict=True)):
        m, n = W.shape
        r = P.shape[1]
        rows = m if side == "left" else n
        _expect(P.shape[0] == rows, f"bases[{i}]", f"{rows} rows for {side}", tuple(P.shape))
        moment = (r, n) if side == "left" else (m, r)
        for name, values in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
            shape = tuple(values[i].shape)
            _expect(shape == moment, f"{name}[{i}]", f"shape {moment}", shape)
    torch.ops.owlore.lowrank_adam_(
        params,
        grads,
        bases,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr,
        nonfinite,
        rng_step,
        side=side,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        stochastic=stochastic,
        seed=seed,
        streams=streams,
    )


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    nonfinite: Tensor,
    rng_step: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    stochastic: bool,
    seed: int,
    streams: Sequence[int],
) -> None:
    """AdamW on whole parameters; see `owlore.reference.adamw_`.

    Raises:
        ValueError: Shapes, devices or counts do not fit together.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    _check_adam(params, lists, lr, nonfinite, streams)
    for i, W in enumerate(params):
        for name, values in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
            shape = tuple(values[i].shape)
            _expect(shape == W.shape, f"{name}[{i}]", f"shape {tuple(W.shape)}", shape)
    torch.ops.owlore.adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr,
        nonfinite,
        rng_step,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        stochastic=stochastic,
        seed=seed,
        streams=streams,
    )


def column_sq_norm_(acc: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
    """Adds squared column norms of activations; see `owlore.reference.column_sq_norm_`.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    _expect(acc.dim() == 1, "acc", "one dimension", tuple(acc.shape))
    accumulates = acc.dtype in (torch.float32, torch.float64)
    _expect(accumulates, "acc", "float32 or float64", acc.dtype)
    _expect(x.is_floating_point(), "x", "a float dtype", x.dtype)
    fits = x.dim() >= 1 and x.shape[-1] == acc.shape[0]
    _expect(fits, "x", f"last dimension {acc.shape[0]}", tuple(x.shape))
    _expect(x.device == acc.device, "x", f"device {acc.device}", x.device)
    if mask is not None:
        _expect(mask.dtype == torch.bool, "mask", "bool", mask.dtype)
        _expect(mask.shape == x.shape[:-1], "mask", f"{tuple(x.shape[:-1])}", tuple(mask.shape))
        _expect(mask.device == x.device, "mask", f"device {x.device}", mask.device)
    _load_extension()
    torch.ops.owlore.column_sq_norm_(acc, x, mask)


def outlier_counts(
    weights: Sequence[Tensor], norms: Sequence[Tensor], thresholds: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Counts outliers of a block; see `owlore.reference.outlier_counts`.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or there is no weight.
    """
    _expect(len(weights) > 0, "weights", "at least one weight", 0)
    _expect(len(norms) == len(weights), "norms", f"{len(weights)} entries", len(norms))
    for k, (W, norm) in enumerate(zip(weights, norms, strict=True)):
        is_matrix = W.dim() == 2 and W.is_floating_point()
        _expect(is_matrix, f"weights[{k}]", "a float matrix", f"{W.dtype} {tuple(W.shape)}")
        features = (W.shape[1],)
        _expect(norm.shape == features, f"norms[{k}]", f"shape {features}", tuple(norm.shape))
        is_norm = norm.dtype in (torch.float32, torch.float64)
        _expect(is_norm, f"norms[{k}]", "float32 or float64", norm.dtype)
        device = weights[0].device
        _expect(W.device == device, f"weights[{k}]", f"device {device}", W.device)
        _expect(norm.device == device, f"norms[{k}]", f"device {device}", norm.device)
    _load_extension()
    return torch.ops.owlore.outlier_counts(weights, norms, thresholds)
