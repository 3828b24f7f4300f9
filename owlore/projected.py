"""Layers whose backward computes the low-rank gradient R directly and never forms G.

For a fixed basis P and output gradients dY [T, m] of a linear layer with inputs X [T, n] the
gradient G = dY^T X has the projections

    R = P^T G = (dY P)^T X    [r, n]    (left)
    R = G P   = dY^T (X P)    [m, r]    (right)

exactly, for T r (m + n) multiply-adds instead of T m n. R is the gradient of the layer's
*coordinates*: a parameter of R's shape that is always zero and takes the memory of one number.
Autograd accumulates, clips and scales R like any other gradient. A second parameter of the kind
takes the sketch Y from which a new basis is made.

Letters as in `owlore.reference`; T is the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import CodeType, MethodType
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from owlore import blocks, distributed, projection
from owlore.blocks import COORDINATES

_STATE = "_owlore"
_PARAMETERS = (COORDINATES, blocks.SKETCH)

# What a layer does in a forward pass with gradients: nothing of ours, R for a basis, R for a random
# test matrix (the sketch), or G for the basis of this very step.
OFF, BASIS, SKETCH, EXACT = "off", "basis", "sketch", "exact"


def sketch_matrix(
    seed: Tensor, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Gaussian test matrix Omega of a sketch, the same for the same seed.

    Its entries have variance 1 / columns, so that E ||G Omega||^2 = ||G||^2: a gradient norm taken
    in a step that sketches is an estimate of that of G.

    Args:
        seed: Seed. [], int64, on the CPU.
        rows: Rows.
        columns: Columns.
        dtype: Its dtype.
        device: Its device.

    Returns:
        [rows, columns]
    """
    return torch.ops.owlore.sketch_matrix(seed, rows, columns, dtype, device)


def _sketch_matrix(
    seed: Tensor, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    generator = torch.Generator(device).manual_seed(int(seed))
    entries = torch.randn(rows, columns, generator=generator, dtype=dtype, device=device)
    return entries.mul_(columns**-0.5)


# An op of its own: a generator is opaque to torch.compile.
torch.library.define(
    "owlore::sketch_matrix",
    "(Tensor seed, SymInt rows, SymInt columns, ScalarType dtype, Device device) -> Tensor",
)
torch.library.impl("owlore::sketch_matrix", "CompositeExplicitAutograd", _sketch_matrix)


@torch.library.register_fake("owlore::sketch_matrix")
def _sketch_matrix_fake(
    seed: Tensor, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=device)


class Projection:
    """What one layer projects with, set by the optimizer between steps.

    Attributes:
        mode: OFF, BASIS, SKETCH or EXACT.
        side: "left" or "right": the layer's side, whatever the mode.
        rank: Rank r.
        basis: P, or None. [m, r] (left) or [n, r] (right).
        seed: Seed of the test matrix. [], int64, on the CPU.
        recipe: Method, power iterations and oversampling of `projection.refresh_bases` (EXACT).
        average: Averages a gradient over ranks in place, or None on one rank (EXACT).
        found: Basis, captured energy and finiteness found in this step's backward (EXACT).
        leaves: Stand-ins of parameters that are spread over ranks, by the parameters' names.
    """

    def __init__(self, side: str, rank: int) -> None:
        self.mode = OFF
        self.side = side
        self.rank = rank
        self.basis: Tensor | None = None
        self.seed: Tensor | None = None
        self.recipe: tuple[str, int, int] = ("subspace", 0, 0)
        self.average: Callable[[Tensor], None] | None = None
        self.found: tuple[Tensor, Tensor, Tensor] | None = None
        self.leaves: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Projection:
        # A copied model (an EMA, a reference model) has no optimizer to set its basis.
        return Projection(self.side, self.rank)

    def __reduce__(self) -> tuple[type[Projection], tuple[str, int]]:
        return Projection, (self.side, self.rank)


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Product a @ b with the sums in float32 at least, stored in dtype."""
    if a.dtype == dtype:
        return a @ b
    if dtype == torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a.to(dtype) @ b.to(dtype)) if dtype.itemsize > a.dtype.itemsize else (a @ b).to(dtype)


def _backward(gradients: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A backward whose products keep the dtypes they have, and that has no gradient itself."""

    @torch.autograd.function.once_differentiable
    def guarded(ctx: Any, dY: Tensor) -> Any:
        with torch.autocast(dY.device.type, enabled=False):
            return gradients(ctx, dY)

    @wraps(gradients)
    def backward(ctx: Any, dY: Tensor) -> Any:
        # Two switches of modes cost as much as the launch of a product. They are for
        # create_graph=True, and for backward() called inside autocast.
        if torch.is_grad_enabled() or torch.is_autocast_enabled(dY.device.type):
            return guarded(ctx, dY)
        return gradients(ctx, dY)

    return backward


# Which pass of a non-reentrant checkpoint a forward belongs to: the first, whose saved tensors are
# dropped but for shape, dtype and device, or the recomputation, which saves them again.
FIRST, AGAIN = "first", "again"


def _packs() -> dict[CodeType | None, str]:
    """The code of the hooks that torch's checkpoint packs saved tensors with, and their passes.

    Empty where this version of torch cannot tell; then every forward computes all it saves.
    """
    asked = (
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C, "_len_torch_function_stack"),
        (torch._C._autograd, "_top_saved_tensors_default_hooks"),
    )
    found: dict[CodeType | None, str] = {}
    if not all(hasattr(module, name) for module, name in asked):
        return found
    for hook, of in (("_checkpoint_hook", FIRST), ("_recomputation_hook", AGAIN)):
        made = getattr(torch.utils.checkpoint, hook, None)
        for code in () if made is None else made.__init__.__code__.co_consts:
            if isinstance(code, CodeType) and code.co_name == "pack_hook":
                found[code] = of
    return found


_CHECKPOINT_PACKS = _packs()
_PLAIN = (Tensor, nn.Parameter)


def _checkpoint_pass(x: Tensor, weight: Tensor) -> str | None:
    """FIRST or AGAIN if what a layer saves for backward goes to a non-reentrant checkpoint.

    (A reentrant one runs its first forward without gradients.) None wherever somebody else might
    see what is done differently then, as the dispatch mode of a selective checkpoint does.
    """
    if torch.compiler.is_compiling() or not _CHECKPOINT_PACKS:
        return None
    if type(x) is not Tensor or type(weight) not in _PLAIN:
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return None
    # torch 2.13 wraps the recomputation's hook to keep torch.compile out.
    pack: Any = getattr(hooks[0], "__wrapped__", hooks[0])
    return _CHECKPOINT_PACKS.get(getattr(pack, "__code__", None))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Y = X W^T + b in the dtype of X."""
    W = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    y = F.linear(x, W, bias)
    # With a bias it may be a view, and a view that a Function returns cannot be written to.
    return y if bias is None else torch.ops.aten._unsafe_view(y, y.shape)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coordinates: Tensor,
    P: Tensor | None,
    seed: Tensor | None,
    right: bool,
    state: Projection | None,
) -> Tensor:
    """`_LinearFunction`, which in a checkpoint's recomputation saves before its product.

    A recomputation ends with the last tensor it saves. torch's own linear layer saves its weight
    before its product, so that the last product of a region does not run again. A Function saves
    after its forward: this one returns a stand-in, whose place the product takes afterwards.
    """
    of = _checkpoint_pass(x, weight)
    y = _LinearFunction.apply(x, weight, bias, coordinates, P, seed, right, state, of)
    if of is AGAIN:
        with torch.no_grad():
            y.data = _product(x, weight, bias)
    return y


class _LinearFunction(torch.autograd.Function):
    """Y = X W^T + b; backward gives dX, db and, as the gradient of the coordinates, R."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        coordinates: Tensor,
        P: Tensor | None,
        seed: Tensor | None,
        right: bool,
        state: Projection | None,
        of: str | None,
    ) -> Tensor:
        """Saves X P (right) or X (left); `P` is None where a test matrix takes its place."""
        if of is AGAIN:
            # Shape, dtype and device of Y.
            shape = (*x.shape[:-1], weight.shape[0])
            y = torch.empty_strided(shape, (0,) * x.dim(), dtype=x.dtype, device=x.device)
        else:
            y = _product(x, weight, bias)
        if right:
            n, columns = x.shape[-1], coordinates.shape[1]
            if of is FIRST:
                # Shape, dtype and device of X P without the product. Backward never sees it.
                XP = x.as_strided((x.shape[:-1].numel(), columns), (0, 0))
            else:
                if P is None:
                    P = sketch_matrix(cast(Tensor, seed), n, columns, x.dtype, x.device)
                XP = x.reshape(-1, n) @ (P if P.dtype == x.dtype else P.to(x.dtype))
            ctx.save_for_backward(XP, weight, None, None)
        else:
            ctx.save_for_backward(x, weight, P, seed)
        ctx.right, ctx.state = right, state
        ctx.shape, ctx.dtype = coordinates.shape, coordinates.dtype
        ctx.x_shape = x.shape
        return y

    @staticmethod
    @_backward
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients: dX = dY W, db = sum dY, and R."""
        saved, weight, P, seed = ctx.saved_tensors
        needs_dX, _, needs_dbias, needs_R, *_ = ctx.needs_input_grad
        W = weight if weight.dtype == dY.dtype else weight.to(dY.dtype)
        # Once for all products: behind attention dY is not contiguous, and this copies it.
        tokens = dY.reshape(-1, dY.shape[-1])
        dX = (tokens @ W).view(ctx.x_shape) if needs_dX else None
        dbias = tokens.sum(dim=0) if needs_dbias else None
        R = None
        if needs_R:
            if ctx.right:
                if saved.stride(0) == 0:
                    raise RuntimeError(
                        "a projected layer left its first product to the recomputation of a "
                        f"checkpoint, and there was none (torch {torch.__version__})"
                    )
                R = _mm(tokens.mT, saved, ctx.dtype)
            else:
                X = saved.reshape(-1, saved.shape[-1])
                if ctx.state is not None:
                    R = _exact(ctx.state, tokens, X, ctx.dtype)
                else:
                    if P is None:
                        m, k = tokens.shape[1], ctx.shape[0]
                        P = sketch_matrix(seed, m, k, dY.dtype, dY.device)
                    P = P if P.dtype == dY.dtype else P.to(dY.dtype)
                    R = _mm((tokens @ P).mT, X, ctx.dtype)
        return dX, None, dbias, R, None, None, None, None, None


def _stand_in(param: nn.Parameter) -> Tensor:
    """A plain leaf in the place of a parameter that is spread over ranks, which takes its gradient.

    A gradient that is spread would be made and added up by torch's dispatch of such tensors, which
    takes longer than the products that it comes from, and torch.compile does not save its mesh.
    """
    leaf = zeros(tuple(param.shape), param.dtype, distributed.local(param).device).requires_grad_()

    def deliver(leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        if grad is None:
            return
        if param.grad is None:
            param.grad = distributed.spread_like(grad, param)
        else:
            distributed.local(param.grad).add_(grad)

    leaf.register_post_accumulate_grad_hook(deliver)
    return leaf


def _exact(state: Projection, dY: Tensor, X: Tensor, dtype: torch.dtype) -> Tensor:
    """R in a step that finds its basis in the gradient of its first micro-batch."""
    if state.found is None:
        G = dY.mT @ X
        if state.average is not None:
            state.average(G)
        method, power_iterations, oversampling = state.recipe
        bases, energies, finite = projection.refresh_bases(
            [G], [state.rank], [state.side], [state.basis], [int(cast(Tensor, state.seed))],
            method=method, power_iterations=power_iterations, oversampling=oversampling,
        )  # fmt: skip
        state.found = (bases[0], energies[0], finite[0])
    P = state.found[0].to(dY.dtype)
    if state.side == "left":
        return _mm((dY @ P).mT, X, dtype)
    return _mm(dY.mT, X @ P, dtype)


class _EmbeddingFunction(torch.autograd.Function):
    """Rows of W; backward gives R. G = S^T dY, S [T, V] the one-hot tokens, is never formed."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        coordinates: Tensor,
        P: Tensor | None,
        seed: Tensor | None,
        right: bool,
        padding_idx: int | None,
    ) -> Tensor:
        """`P` is None where a test matrix takes its place."""
        ctx.save_for_backward(ids, P, seed)
        ctx.right, ctx.padding_idx = right, padding_idx
        ctx.shape, ctx.dtype, ctx.rows = coordinates.shape, coordinates.dtype, weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    @_backward
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient R = S^T (dY P) (right) or (S P)^T dY (left)."""
        return None, None, _EmbeddingFunction._gradient(ctx, dY), None, None, None, None

    @staticmethod
    def _gradient(ctx: Any, dY: Tensor) -> Tensor:
        ids, P, seed = ctx.saved_tensors
        rows, tokens = ids.flatten(), dY.reshape(-1, dY.shape[-1])
        if ctx.padding_idx is not None:
            tokens = tokens.masked_fill((rows == ctx.padding_idx)[:, None], 0.0)
        if P is None:
            features = tokens.shape[1] if ctx.right else ctx.rows
            k = ctx.shape[1 if ctx.right else 0]
            P = sketch_matrix(seed, features, k, dY.dtype, dY.device)
        P = P.to(dY.dtype)
        if not ctx.right:
            return _mm(P[rows].mT, tokens, ctx.dtype)
        accumulator = torch.float64 if dY.dtype == torch.float64 else torch.float32
        R = torch.zeros(ctx.shape, dtype=accumulator, device=dY.device)
        return R.index_add_(0, rows, _mm(tokens, P, accumulator)).to(ctx.dtype)


class ProjectedLayer(nn.Module):
    """What the three projected layers share: coordinates that nobody else ever sees.

    A layer becomes one of them in place, by its class, and is restored by `restore`. It stays what
    it was to everyone else: an instance of its class, with its own keys in a state_dict.
    """

    owlore_coordinates: nn.Parameter
    owlore_sketch: nn.Parameter
    _owlore: Projection

    def _computes_r(self) -> bool:
        return self._owlore.mode != OFF and torch.is_grad_enabled()

    def _taker(self, name: str) -> Tensor:
        """What takes a parameter's gradient in backward passes."""
        leaf = self._owlore.leaves.get(name)
        return cast(Tensor, self._parameters[name]) if leaf is None else leaf

    def _plan(self) -> tuple[Tensor, Tensor | None, Tensor | None, bool, Projection | None]:
        """What this forward pass projects with.

        Returns:
            The leaf that takes the result, P or the seed of a test matrix in its place,
            whether the product is the right side's, and the state (EXACT).
        """
        state = self._owlore
        right = state.side == "right"
        if state.mode == BASIS:
            return self._taker(COORDINATES), state.basis, None, right, None
        if state.mode == SKETCH:
            # A basis of G's column space is found in G Omega, which is the other side's product.
            return self._taker(blocks.SKETCH), None, state.seed, not right, None
        return self._taker(COORDINATES), None, None, False, state

    @contextmanager
    def _hidden(self) -> Iterator[None]:
        held = {
            name: self._parameters.pop(name) for name in _PARAMETERS if name in self._parameters
        }
        try:
            yield
        finally:
            self._parameters.update(held)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with self._hidden():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in _PARAMETERS:
            # torch.distributed.checkpoint adds the model's own parameters to what it loads.
            if state_dict.get(prefix + name) is self._parameters.get(name):
                state_dict.pop(prefix + name, None)
        with self._hidden():
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with self._hidden():
            super()._apply(fn, recurse)
        device = cast(Tensor, self.weight).device
        for name in _PARAMETERS:
            param = self._parameters.get(name)
            if param is None or param.device == device:
                continue
            fresh = zeros(tuple(param.shape), param.dtype, device)
            grad, param.grad = param.grad, None
            if torch._has_compatible_shallow_copy_type(param, fresh):
                param.data = fresh
                param.grad = None if grad is None else grad.to(device)
            else:
                # To and from "meta" every parameter of a module is replaced.
                self._parameters[name] = nn.Parameter(fresh, requires_grad=param.requires_grad)
        return self


class ProjectedLinear(ProjectedLayer, nn.Linear):
    """An `nn.Linear` whose backward computes R."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`. [..., n] to [..., m]."""
        if not self._computes_r():
            return super().forward(input)
        return _linear(_autocast(input), self.weight, self.bias, *self._plan())


class _ProjectedConv1D(ProjectedLayer):
    """GPT-2's Conv1D, a linear layer with its weight stored [n, m], whose backward computes R."""

    def forward(self, x: Tensor) -> Tensor:
        """As Conv1D. [..., n] to [..., m]."""
        if not self._computes_r():
            return super().forward(x)
        weight, bias = cast(Tensor, self.weight), cast(Tensor, self.bias)
        return _linear(_autocast(x), weight.mT, bias, *self._plan())


class ProjectedEmbedding(ProjectedLayer, nn.Embedding):
    """An `nn.Embedding` whose backward computes R."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Embedding`. [...] to [..., d]."""
        if not self._computes_r():
            return super().forward(input)
        taker, P, seed, right, _ = self._plan()
        return _EmbeddingFunction.apply(input, self.weight, taker, P, seed, right, self.padding_idx)


def _autocast(x: Tensor) -> Tensor:
    """What autocast would make of a linear layer's input."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of any shape in the memory of one."""
    return torch.zeros(1, dtype=dtype, device=device).expand(shape)


_classes: dict[type[nn.Module], type[ProjectedLayer]] = {
    nn.Linear: ProjectedLinear,
    nn.Embedding: ProjectedEmbedding,
}


def _is_conv1d(kind: type[nn.Module]) -> bool:
    # transformers.pytorch_utils.Conv1D, recognised without importing transformers.
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _projected_class(kind: type[nn.Module]) -> type[ProjectedLayer] | None:
    if issubclass(kind, ProjectedLayer):
        return kind
    if kind not in _classes and _is_conv1d(kind):
        # Built when it is first met, since transformers is not imported here; __reduce_ex__ of a
        # pickled layer finds it by this name in this module.
        made: Any = type("ProjectedConv1D", (_ProjectedConv1D, kind), {"__module__": __name__})
        globals()["ProjectedConv1D"] = _classes[kind] = made
    return _classes.get(kind)


def __getattr__(name: str) -> Any:
    if name == "ProjectedConv1D":
        from transformers.pytorch_utils import Conv1D

        return _projected_class(Conv1D)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _own_forward(module: nn.Module) -> str | None:
    """The attribute that holds a layer's own forward, where it has one beside its class'.

    accelerate's hooks (`device_map`) put theirs in its place and call it in the middle; taken off,
    they leave it in the layer.
    """
    for name in ("_old_forward", "forward"):
        held = module.__dict__.get(name)
        if isinstance(held, MethodType) and held.__func__ is type(module).forward:
            return name
    return None


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Changes a layer's class, and its own forward along with it."""
    place = _own_forward(module)
    module.__class__ = kind
    if place is not None:
        module.__dict__[place] = MethodType(kind.forward, module)


def obstacle(module: nn.Module | None) -> str | None:
    """Why a layer cannot compute R in its backward, or None if it can."""
    if module is None:
        return "shared by several layers"
    if _projected_class(type(module)) is None:
        return f"{type(module).__name__} is no plain linear layer"
    if "forward" in module.__dict__ and _own_forward(module) is None:
        return "its forward was replaced"
    if isinstance(module, nn.Embedding):
        for name, plain in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
            if getattr(module, name) != plain:
                return f"{name} is set"
    return None


def install(
    module: nn.Module,
    side: str,
    rank: int,
    columns: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    spread: distributed.Spread | None = None,
) -> Projection:
    """Makes a layer compute R for its coordinates, once its projection says so.

    Args:
        module: A layer without `obstacle`.
        side: "left" or "right".
        rank: Rank r.
        columns: Columns k of its sketches; 0 for a layer that never sketches.
        shape: Out and in features [m, n]; entries and features of an embedding.
        dtype: Dtype of R and of sketches.
        spread: How the weight is spread over ranks; coordinates are replicated there.

    Returns:
        The layer's projection, off.
    """
    kind = _projected_class(type(module))
    assert kind is not None
    restore(module)
    m, n = shape
    device = cast(Tensor, module.weight).device
    left = side == "left"
    shapes = {COORDINATES: (rank, n) if left else (m, rank)}
    if columns:
        shapes[blocks.SKETCH] = (m, columns) if left else (columns, n)
    state = Projection(side, rank)
    _become(module, kind)
    for name, size in shapes.items():
        value = zeros(size, dtype, device)
        if spread is not None:
            value = spread.wrap(value, size, None)
        param = module._parameters[name] = nn.Parameter(value)
        if spread is not None:
            state.leaves[name] = _stand_in(param)
    module.__dict__[_STATE] = state
    return state


def restore(module: nn.Module) -> None:
    """Undoes `install`."""
    if isinstance(module, ProjectedLayer):
        for name in _PARAMETERS:
            module._parameters.pop(name, None)
        module.__dict__.pop(_STATE, None)
        plain: Any = next(plain for plain, kind in _classes.items() if type(module) is kind)
        _become(module, plain)


def restore_all(model: nn.Module) -> None:
    """Undoes `install` in a whole model."""
    for module in model.modules():
        restore(module)
