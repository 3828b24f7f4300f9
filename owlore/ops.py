"""The one door to fast code: schema, checks, registration. Definitions stand in `owlore.reference`.

Each op is a torch op in the namespace `owlore`. The reference serves every device; C++ and Triton
override single devices. `backends()` says which implementation a call would reach, and why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
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
_PLACES = "int[] first_rows=[], int[] first_columns=[]"
_SCHEMAS = {
    "lowrank_adam_": f"({_ADAM_TENSORS.format(bases='Tensor[] bases, ')}, *, str[] sides, "
    f"{_ADAM_SCALARS}float scale, bool stochastic, int seed, int[] streams, "
    f"bool projected=False, {_PLACES}) -> ()",
    "adamw_": f"({_ADAM_TENSORS.format(bases='')}, *, "
    f"{_ADAM_SCALARS}bool stochastic, int seed, int[] streams, {_PLACES}) -> ()",
    "inverse_cholesky_": "(Tensor(a!) gram, Tensor(b!) inverse, float shift, float least) -> ()",
    "column_sq_norm_": "(Tensor(a!) acc, Tensor x, Tensor? mask=None) -> ()",
    "outlier_counts": "(Tensor[] weights, Tensor[] norms, float[] thresholds) -> (Tensor, Tensor)",
}
_IN_EXTENSION = ("column_sq_norm_", "outlier_counts")
_IN_TRITON = ("lowrank_adam_", "adamw_", "inverse_cholesky_")
# Rows of the largest matrix that one program factors about as fast as torch's solvers do (H100).
_MOST_IN_KERNEL = 320


def _define() -> None:
    for name, schema in _SCHEMAS.items():
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        if name in _IN_TRITON:
            _LIBRARY.impl(name, _kernel_or_reference(name), "CUDA")


@functools.cache
def _load_extension() -> None:
    _extension.load()
    if not _extension.status()["cuda"]:
        for name in _IN_EXTENSION:
            _LIBRARY.impl(name, _slow_on_cuda(name), "CUDA")


@functools.cache
def _kernel(name: str) -> ModuleType | ImportError:
    """The module of an op's Triton kernel, imported at its first use, or why there is none."""
    try:
        return importlib.import_module(f"owlore.kernels.{name.rstrip('_')}")
    except ImportError as error:
        return error


def _kernel_or_reference(name: str) -> Callable[..., Any]:
    definition = getattr(reference, name)
    launcher = f"launch_{name.rstrip('_')}"

    @functools.wraps(definition)
    def call(*args: Any, **options: Any) -> Any:
        kernel = _kernel(name)
        if isinstance(kernel, ImportError) or not getattr(kernel, launcher)(*args, **options):
            _warn_slow(name)
            return definition(*args, **options)
        for i in _left_out(name, kernel, options):
            *lists, lr, nonfinite, rng_step = args
            _step_alone(name, i, lists, (lr, nonfinite, rng_step), options)

    return call


def _left_out(name: str, kernel: ModuleType, options: dict[str, Any]) -> list[int]:
    """Parameters that a launch leaves to the reference."""
    if name != "lowrank_adam_":
        return []
    left_out: list[int] = kernel.left_out(options.get("first_columns", ()))
    return left_out


def _step_alone(
    name: str,
    i: int,
    lists: Sequence[Sequence[Tensor]],
    scalars: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
) -> None:
    """The reference on one of several parameters."""
    _warn_slow(name)
    lr, nonfinite, rng_step = scalars
    own = {
        key: [value[i]] if isinstance(value, (list, tuple)) and value else value
        for key, value in options.items()
    }
    tensors = [[values[i]] for values in lists]
    getattr(reference, name)(*tensors, lr, nonfinite[i : i + 1], rng_step, **own)


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


for _name in ("lowrank_adam_", "adamw_", "inverse_cholesky_", "column_sq_norm_"):
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
            if op in _IN_TRITON and device == "cuda":
                reason = "Triton is not installed"
                if importlib.util.find_spec("triton") is not None:
                    backend, reason = "Triton", "float64 and unusual strides reach the reference"
                    kernel = _kernel(op)
                    if op == "lowrank_adam_" and not isinstance(kernel, ImportError):
                        gluon = kernel.gluon()
                        ranks = "no rank" if gluon is None else f"ranks {[*gluon.CONFIGS]}"
                        reason += f"; Gluon updates {ranks} on sm_90"
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
    for name, values in tensors.items():
        for i, (W, x) in enumerate(zip(params, values, strict=True)):
            # Composing a message costs more than the check, so that comes second here and below.
            if x.device != W.device:
                _expect(False, f"{name}[{i}]", f"device {W.device}", x.device)


def _check_shapes(name: str, values: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    for i, (value, shape) in enumerate(zip(values, shapes, strict=True)):
        if value.shape != shape:
            _expect(False, f"{name}[{i}]", f"shape {tuple(shape)}", tuple(value.shape))


def _check_lowrank(
    params: Sequence[Tensor],
    bases: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    sides: Sequence[str],
    projected: bool,
) -> list[tuple[int, ...]]:
    """The shapes that gradients must have."""
    _expect(len(sides) == len(params), "sides", f"{len(params)} entries", len(sides))
    moments: list[tuple[int, ...]] = []
    for i, (W, P, side) in enumerate(zip(params, bases, sides, strict=True)):
        m, n = W.shape
        rows, r = P.shape
        if side == "left":
            expected, moment = m, (r, n)
        elif side == "right":
            expected, moment = n, (m, r)
        else:
            raise ValueError(f"sides[{i}]: expected 'left' or 'right', got {side!r}")
        if rows != expected:
            _expect(False, f"bases[{i}]", f"{expected} rows for {side}", tuple(P.shape))
        moments.append(moment)
    _check_shapes("exp_avgs", exp_avgs, moments)
    _check_shapes("exp_avg_sqs", exp_avg_sqs, moments)
    return moments if projected else [tuple(W.shape) for W in params]


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
    sides: Sequence[str],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    stochastic: bool,
    seed: int,
    streams: Sequence[int],
    projected: bool = False,
    first_rows: Sequence[int] = (),
    first_columns: Sequence[int] = (),
) -> None:
    """AdamW inside a low-rank subspace; see `owlore.reference.lowrank_adam_`.

    Raises:
        ValueError: Shapes, devices, counts or sides do not fit together.
    """
    lists = {
        "grads": grads,
        "bases": bases,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "steps": steps,
    }
    _check_adam(params, lists, lr, nonfinite, streams)
    shapes = _check_lowrank(params, bases, exp_avgs, exp_avg_sqs, sides, projected)
    _check_shapes("grads", grads, shapes)
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
        sides=sides,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        stochastic=stochastic,
        seed=seed,
        streams=streams,
        projected=projected,
        first_rows=first_rows,
        first_columns=first_columns,
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
    first_rows: Sequence[int] = (),
    first_columns: Sequence[int] = (),
) -> None:
    """AdamW on whole parameters; see `owlore.reference.adamw_`.

    Raises:
        ValueError: Shapes, devices or counts do not fit together.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    _check_adam(params, lists, lr, nonfinite, streams)
    shapes = [W.shape for W in params]
    _check_shapes("grads", grads, shapes)
    _check_shapes("exp_avgs", exp_avgs, shapes)
    _check_shapes("exp_avg_sqs", exp_avg_sqs, shapes)
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
        first_rows=first_rows,
        first_columns=first_columns,
    )


class Counting:
    """`owlore.reference.count_` on the same tensors step after step, one launch for each GPU.

    Args:
        steps: Vectors of step counts. float32.
        skipped: Vectors of how often something was skipped. int32.
        flags: Vectors of what was skipped in the last step. int32.
        clocks: Numbers to count up, too. [], int32.
    """

    def __init__(
        self,
        steps: Sequence[Tensor],
        skipped: Sequence[Tensor],
        flags: Sequence[Tensor],
        clocks: Sequence[Tensor],
    ) -> None:
        self._lists = (list(steps), list(skipped), list(flags), list(clocks))
        self._counts: list[Callable[[], None]] = []
        for device in dict.fromkeys(x.device for x in (*steps, *clocks)):
            here = [[x for x in xs if x.device == device] for xs in self._lists]
            kernel = _kernel("common") if device.type == "cuda" else None
            if kernel is None or isinstance(kernel, ImportError):
                self._counts.append(functools.partial(reference.count_, *here))
            else:
                self._counts.append(kernel.Counting(*here))

    def covers(self, steps: Sequence[Tensor], clocks: Sequence[Tensor]) -> bool:
        """Whether these very vectors and clocks are the ones that it counts."""
        mine = (self._lists[0], self._lists[-1])
        return all(
            len(own) == len(given) and all(map(operator.is_, own, given))
            for own, given in zip(mine, (steps, clocks), strict=True)
        )

    def __call__(self) -> None:
        """Counts."""
        for count in self._counts:
            count()


class _Step:
    """An optimizer op on the same parameters and states, step after step; call it with gradients.

    A call checks and computes what the op does, at a tenth of its cost on the host: addresses,
    launches and compiled kernels are ready, except for what follows from the gradients, which may
    move. Nothing waits for the device, and a CUDA graph may capture a call. The tensors must stay
    in their places; lr, rng_step and steps are read on the device at each call.
    """

    def __init__(
        self,
        name: str,
        lists: Sequence[Sequence[Tensor]],
        scalars: tuple[Tensor, Tensor, Tensor],
        shapes: Sequence[tuple[int, ...]],
        options: dict[str, Any],
    ) -> None:
        self._name = name
        self._lists = lists
        self._scalars = scalars
        self._shapes = list(shapes)
        self._options = options
        self._prepared: Any = None
        self._left_out: list[int] = []

    def __call__(
        self,
        grads: Sequence[Tensor],
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        scale: float = 1.0,
        fitting: bool = False,
    ) -> None:
        """One step; see `owlore.reference` for the op.

        Args:
            grads: Gradients, as the op takes them, anywhere in memory.
            beta1: Decay of the first moment.
            beta2: Decay of the second moment.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled decay.
            scale: Factor of a low-rank update.
            fitting: Shapes and devices are known to fit. Where torch has checked them, as it does
                for `.grad`, this saves a third of the call.

        Raises:
            ValueError: A gradient's shape, device or count does not fit.
        """
        hyper = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        if self._name == "lowrank_adam_":
            hyper["scale"] = scale
        # Gradients like those of the step before need no other look than this one.
        prepared = self._prepared
        if prepared is not None and prepared.launch(
            grads, *self._scalars, **hyper, fitting=fitting
        ):
            self._step_left_out(grads, hyper)
            return
        if [G.shape for G in grads] != self._shapes:
            _expect(
                len(grads) == len(self._shapes), "grads", f"{len(self._shapes)} entries", len(grads)
            )
            _check_shapes("grads", grads, self._shapes)
        if not grads:
            return
        device = self._lists[0][0].device
        for i, G in enumerate(grads):
            if G.device != device:
                _expect(False, f"grads[{i}]", f"device {device}", G.device)
        if self._options.get("projected"):
            grads = [R.contiguous() for R in grads]
        if device.type == "cuda" and self._launch(grads, hyper):
            return
        params, *states = self._lists
        op = getattr(torch.ops.owlore, self._name)
        op(params, grads, *states, *self._scalars, **hyper, **self._options)

    def _launch(self, grads: Sequence[Tensor], hyper: dict[str, float]) -> bool:
        """Prepares kernels and starts them; False if they do not cover these tensors."""
        kernel = _kernel(self._name)
        if isinstance(kernel, ImportError):
            return False
        params, *states = self._lists
        prepare = getattr(kernel, f"prepare_{self._name.rstrip('_')}")
        self._prepared = prepare(params, grads, *states, **self._options)
        if self._prepared is None:
            return False
        launched: bool = self._prepared.launch(grads, *self._scalars, **hyper)
        self._left_out = _left_out(self._name, kernel, self._options)
        if launched:
            self._step_left_out(grads, hyper)
        return launched

    def _step_left_out(self, grads: Sequence[Tensor], hyper: dict[str, float]) -> None:
        """Steps with what the kernels do not cover."""
        params, *states = self._lists
        for i in self._left_out:
            lists = (params, grads, *states)
            _step_alone(self._name, i, lists, self._scalars, {**hyper, **self._options})


def prepare_lowrank_adam(
    params: Sequence[Tensor],
    bases: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    nonfinite: Tensor,
    rng_step: Tensor,
    *,
    sides: Sequence[str],
    stochastic: bool,
    seed: int,
    streams: Sequence[int],
    projected: bool = False,
    first_rows: Sequence[int] = (),
    first_columns: Sequence[int] = (),
) -> _Step:
    """`lowrank_adam_` on the same tensors step after step.

    Returns:
        `step(grads, *, beta1, beta2, eps, weight_decay, scale)`, which does what `lowrank_adam_`
        does, to the bit.

    Raises:
        ValueError: Shapes, devices, counts or sides do not fit together.
    """
    lists = {"bases": bases, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    _check_adam(params, lists, lr, nonfinite, streams)
    shapes = _check_lowrank(params, bases, exp_avgs, exp_avg_sqs, sides, projected)
    options = {
        "sides": list(sides),
        "stochastic": stochastic,
        "seed": seed,
        "streams": list(streams),
        "projected": projected,
        "first_rows": list(first_rows),
        "first_columns": list(first_columns),
    }
    kept = [list(params), *(list(values) for values in lists.values())]
    return _Step("lowrank_adam_", kept, (lr, nonfinite, rng_step), shapes, options)


def prepare_adamw(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    nonfinite: Tensor,
    rng_step: Tensor,
    *,
    stochastic: bool,
    seed: int,
    streams: Sequence[int],
    first_rows: Sequence[int] = (),
    first_columns: Sequence[int] = (),
) -> _Step:
    """`adamw_` on the same tensors step after step.

    Returns:
        `step(grads, *, beta1, beta2, eps, weight_decay)`, which does what `adamw_` does, to the
        bit.

    Raises:
        ValueError: Shapes, devices or counts do not fit together.
    """
    lists = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    _check_adam(params, lists, lr, nonfinite, streams)
    shapes = [tuple(W.shape) for W in params]
    _check_shapes("exp_avgs", exp_avgs, shapes)
    _check_shapes("exp_avg_sqs", exp_avg_sqs, shapes)
    options = {
        "stochastic": stochastic,
        "seed": seed,
        "streams": list(streams),
        "first_rows": list(first_rows),
        "first_columns": list(first_columns),
    }
    kept = [list(params), *(list(values) for values in lists.values())]
    return _Step("adamw_", kept, (lr, nonfinite, rng_step), shapes, options)


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


def inverse_cholesky_(gram: Tensor, inverse: Tensor, shift: float, least: float) -> None:
    """Inverse Cholesky factors of many matrices; see `owlore.reference.inverse_cholesky_`.

    Raises:
        ValueError: Shapes do not fit together.
    """
    square = gram.dim() == 3 and gram.shape[1] == gram.shape[2]
    _expect(square, "gram", "shape [b, k, k]", tuple(gram.shape))
    _expect(inverse.shape == gram.shape, "inverse", f"shape {gram.shape}", inverse.shape)
    if gram.shape[1] > _MOST_IN_KERNEL:
        reference.inverse_cholesky_(gram, inverse, shift, least)
    else:
        torch.ops.owlore.inverse_cholesky_(gram, inverse, shift, least)


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
