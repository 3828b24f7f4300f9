"""Training on several ranks: averages of gradients that no wrapper averages, and shards of weights.

DistributedDataParallel (DDP) expects a gradient of every parameter that it manages in every step,
and keeps a bucket of memory for it. So whatever a draw switches on and off, and the coordinates of
projected layers, are hidden from it. Their gradients are averaged here, concatenated, at the end of
the backward pass that ends a step's accumulation.

FSDP2 (`fully_shard`) holds a part of the rows of each weight on each rank. Coordinates are made
after it, and so it never sees them: they are replicated, and averaged here as well. The step
updates the rows that a rank holds.
"""

from __future__ import annotations

import os
import sys
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

# Compares bases and active blocks over ranks at each step.
DEBUG = "OWLORE_DEBUG"
_IGNORED = "_ddp_params_and_buffers_to_ignore"
# What torch.compile goes by, which cuts a graph wherever it expects one of DDP's buckets to end.
_MARK = "_ddp_ignored"
_OURS = "_owlore_hidden"
# Gradients of at least as many bytes are averaged where they are; a copy would cost more than a
# call of their own.
_LARGE = 2**24
# Where a gradient begins in the concatenation: 128 bytes at most.
_ALIGNED = 64
_BROADCAST_BYTES = 250 * 2**20


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is spread over ranks."""
    # Where nobody imported the module there is none; importing it takes a while.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    if not is_dtensor(tensor):
        return tensor
    # Without gradients it is handed out as it is; to detach it first takes as long as a launch.
    held: Any = tensor.detach() if torch.is_grad_enabled() else tensor
    part: Tensor = held.to_local()
    return part


@dataclass(frozen=True)
class Spread:
    """How a parameter is spread over ranks by FSDP2: a part of the rows on each.

    Attributes:
        mesh: The ranks.
        placements: Its placement on each dimension of the mesh.
        first: First row on this rank.
        count: Number of rows on this rank.
    """

    mesh: Any
    placements: tuple[Any, ...]
    first: int
    count: int

    @property
    def group(self) -> Any:
        """Process group of all ranks over which gradients are averaged."""
        if self.mesh.ndim == 1:
            return self.mesh.get_group()
        if self.mesh.size() == distributed.get_world_size():
            return distributed.group.WORLD
        return self.mesh._flatten().get_group()

    @property
    def shards(self) -> Any:
        """Process group of the ranks that hold the parts of one whole."""
        dims = [i for i, place in enumerate(self.placements) if place.is_shard()]
        return self.mesh.get_group(dims[0] if dims else 0)

    def placed(self, split: int | None) -> tuple[Any, ...]:
        """Placements of a tensor that is cut along a dimension as the parameter is cut in rows."""
        from torch.distributed.tensor import Replicate, Shard

        cut = Replicate() if split is None else Shard(split)
        return tuple(cut if place.is_shard() else place for place in self.placements)

    def wrap(self, part: Tensor, shape: tuple[int, ...], split: int | None) -> Tensor:
        """A tensor of which this rank holds a part, the one that `part_of` takes."""
        from torch.distributed.tensor import DTensor

        stride = tuple(torch.empty(shape, device="meta").stride())
        return DTensor.from_local(
            part,
            self.mesh,
            self.placed(split),
            run_check=False,
            shape=torch.Size(shape),
            stride=stride,
        )

    def part_of(self, whole: Tensor, split: int | None) -> Tensor:
        """This rank's part of a whole tensor (a view)."""
        return whole if split is None else whole.narrow(split, self.first, self.count)

    def zeros(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, split: int | None
    ) -> Tensor:
        """Zeros of which this rank holds a part."""
        size = list(shape)
        if split is not None:
            size[split] = self.count
        return self.wrap(torch.zeros(size, dtype=dtype, device=device), shape, split)

    def adopt(self, value: Tensor, device: torch.device, split: int | None) -> Tensor:
        """A copy of a whole tensor, or of one spread in any way, spread as `zeros` would be."""
        if is_dtensor(value):
            same = value.device_mesh == self.mesh and value.placements == self.placed(split)  # type: ignore[attr-defined]
            if same:
                part = local(value)
                return self.wrap(part.to(device, copy=True), tuple(value.shape), split)
            value = whole(value)
        part = self.part_of(value.detach(), split).to(device, copy=True)
        return self.wrap(part.contiguous(), tuple(value.shape), split)


def spread_like(part: Tensor, other: Tensor) -> Tensor:
    """A tensor of which this rank holds a part, spread as another of its shape and dtype is."""
    from torch.distributed.tensor import DTensor

    # `DTensor.from_local` finds the same in ten times as long.
    return DTensor(part, other._spec, requires_grad=False)  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is spread."""
    gathered: Tensor = tensor.detach().full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def spread_of(name: str, param: nn.Parameter) -> Spread | None:
    """How a parameter is spread, or None if this rank holds all of it.

    Raises:
        ValueError: Not by rows over data-parallel ranks: tensor parallelism.
    """
    if not is_dtensor(param):
        return None
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    kinds = [type(place) for place in placements]
    rows = all(type(p) is Replicate or (type(p) is Shard and p.dim == 0) for p in placements)
    if not rows or kinds.count(Shard) > 1:
        raise ValueError(
            f"model: {name} is spread over ranks as {placements}; OwLore trains models that "
            "fully_shard (FSDP2) spreads by rows, without tensor parallelism"
        )
    shape, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    # A rank without rows may get an offset beyond the end.
    first = min(offset[0], param.shape[0]) if shape else 0
    return Spread(mesh, tuple(placements), first, shape[0] if shape else 1)


def refuse_flat_shards(model: nn.Module) -> None:
    """Raises ValueError for flat, one-dimensional shards, and for those kept in host memory."""
    for module in (model, *model.modules()):
        kind = type(module)
        if kind.__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "model: FullyShardedDataParallel (FSDP1) flattens weights, which OwLore needs as "
                "matrices; use FSDP2 (torch.distributed.fsdp.fully_shard)"
            )
        if kind.__module__.split(".")[0] == "deepspeed":
            raise ValueError(_NO_ZERO)
    if any(hasattr(param, "ds_id") for param in model.parameters()):
        raise ValueError(_NO_ZERO)
    params = (param for group in _fsdp_groups(model) for param in group.fsdp_params)
    if any(param.offload_to_cpu for param in params):
        raise ValueError(
            "model: fully_shard with CPUOffloadPolicy keeps weights in host memory, and OwLore "
            "updates them where they are computed with; shard without offload_policy "
            "(offload_params: false in accelerate): OwLore's own state is small, and "
            "state='offload' moves it"
        )


_NO_ZERO = (
    "model: DeepSpeed ZeRO flattens weights, which OwLore needs as matrices; use FSDP2 "
    "(torch.distributed.fsdp.fully_shard; in accelerate fsdp_version: 2)"
)


def refuse_later_shards() -> None:
    """Raises ValueError where accelerate is going to shard a model after its optimizer is built."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(_NO_ZERO)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "model: accelerate's FSDP shards a model after its optimizer is built, and OwLore must "
            "be built from the sharded model: call owlore.trainer.shard_first(trainer) before a "
            "Trainer's train(), or owlore.trainer.shard_with(accelerator, model) before OwLore("
            "model) (fsdp_version: 2); or train with DistributedDataParallel"
        )


def refuse_flat_groups() -> None:
    """Raises RuntimeError: something replaced the optimizer's parameters."""
    raise RuntimeError(
        "owlore: the parameters in param_groups were replaced, as DeepSpeed ZeRO does, which "
        "flattens them; OwLore needs matrices: use FSDP2 (torch.distributed.fsdp.fully_shard; in "
        "accelerate fsdp_version: 2)"
    )


def _fsdp_groups(model: nn.Module) -> list[Any]:
    """FSDP2's parameter groups in a model."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return []
    found = []
    for child in model.modules():
        if isinstance(child, module.FSDPModule):
            state = child._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:
                groups = [state._fsdp_param_group]
            found += [group for group in groups if group is not None]
    return found


class Flags:
    """Sets requires_grad, of what FSDP2 has gathered in a parameter's place too."""

    def __init__(self, model: nn.Module) -> None:
        # With FSDP2's records rather than what it gathered: that comes and goes.
        params = [param for group in _fsdp_groups(model) for param in group.fsdp_params]
        self._records = {id(param.sharded_param): param for param in params}

    def set(self, param: Tensor, flag: bool) -> None:
        """param.requires_grad_(flag)."""
        param.requires_grad_(flag)
        record = self._records.get(id(param))
        gathered = getattr(record, "_unsharded_param", None)
        if gathered is not None:
            gathered.requires_grad_(flag)


def has_group() -> bool:
    """Whether this process belongs to a group, be it alone there: DDP may wrap the model."""
    return distributed.is_available() and distributed.is_initialized()


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper that a model was given in, inside torch.compile's."""
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


def names_of(model: nn.Module, params: Iterable[nn.Parameter]) -> list[str]:
    """All names that parameters have in a model."""
    wanted = {id(param) for param in params}
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, param in named if id(param) in wanted]


class _Hidden(list[str]):
    """Names that DDP is to leave alone; `before` are those that were so without OwLore."""

    def __init__(self, before: Iterable[str] | None = None, names: Iterable[str] = ()) -> None:
        super().__init__([*(before or ()), *names])
        self.before = before


def hide_from_ddp(
    model: nn.Module, ddp: DistributedDataParallel | None, params: list[nn.Parameter]
) -> Callable[[], None]:
    """Makes DDP, present or future, leave parameters of a model alone.

    Args:
        model: The model inside the wrapper.
        ddp: Its wrapper, if it has one already.
        params: What to hide.

    Returns:
        What shows them to later wrappers again.

    Raises:
        ValueError: Nothing would be left for the wrapper.
    """
    names = names_of(model, params)
    before = getattr(model, _IGNORED, None)
    if isinstance(before, _Hidden):
        # Of an optimizer that is gone, or of the model that this one is a copy of.
        before = before.before
    if ddp is not None:
        _rebuild(ddp, names)
    setattr(model, _IGNORED, _Hidden(before, names))
    marked = [param for param in params if not hasattr(param, _MARK)]
    for param in marked:
        setattr(param, _MARK, True)

    def show() -> None:
        for param in marked:
            if hasattr(param, _MARK):
                delattr(param, _MARK)
        if before is None:
            delattr(model, _IGNORED)
        else:
            setattr(model, _IGNORED, before)

    return show


def _rebuild(ddp: DistributedDataParallel, names: list[str]) -> None:
    """Builds a wrapper's reducer anew, without the named parameters."""
    # Without what an earlier optimizer hid.
    ignored = (ddp.parameters_to_ignore - getattr(ddp, _OURS, set())) | set(names)
    managed = [param for name, param in ddp.module.named_parameters() if name not in ignored]
    if not any(param.requires_grad for param in managed):
        raise ValueError(
            "model: DistributedDataParallel would have no parameter to manage, as the model has no "
            "final norm: under it embeddings or head must be 'full'"
        )
    ddp.parameters_to_ignore = ignored
    setattr(ddp, _OURS, set(names))
    ddp._module_parameters = managed
    # As DDP does it for a wrapper that was pickled.
    parameters, sparse = ddp._build_params_for_reducer()
    names_by_index = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names_by_index, ddp.static_graph)
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
        if ddp.logger is not None:
            ddp.logger._set_static_graph()
    hooks, ddp._comm_hooks = ddp._comm_hooks, []
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)


class Exchange:
    """Averages gradients over ranks that no wrapper averages.

    Args:
        owner: The module whose forward runs the blocks.
        hidden: Parameters whose gradients the wrapper does not average: those that a draw switches
            on and off.
        values: Parameters that are to begin with rank 0's values, which the wrapper does not see.
        visible: Parameters whose gradients the wrapper averages.
    """

    def __init__(
        self,
        owner: nn.Module,
        hidden: list[nn.Parameter],
        values: list[nn.Parameter],
        visible: list[nn.Parameter],
    ) -> None:
        self._owner = weakref.ref(owner)
        self._hidden = hidden
        self._visible = visible
        self._values: list[nn.Parameter] | None = values
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._handle: Any = None
        self._queued = False
        self._syncs = True
        self._fsdp: list[Any] = []
        self._ordered = False
        # Whether gradients of this step are still each rank's own.
        self.owes = False
        self.group: Any = None
        self.size = 1

    @property
    def active(self) -> bool:
        """Whether there is more than one rank to average over."""
        return self.size > 1

    def wrapped_by(self, ddp: DistributedDataParallel, synced: bool) -> None:
        """Works beside a DDP wrapper from now on.

        Args:
            ddp: The wrapper.
            synced: Whether it made all hidden parameters equal on all ranks.

        Raises:
            RuntimeError: The wrapper manages a hidden parameter, waits for the gradient of one that
                rests, or does not manage a visible one.
        """
        managed = {id(param) for param in ddp._module_parameters}
        # Built before OwLore, it waits for gradients of weights that rest now, unless told not to.
        early = not set(names_of(ddp.module, self._hidden)) <= set(ddp.parameters_to_ignore)
        waits = early and not (synced or ddp.find_unused_parameters or ddp.static_graph)
        if waits or any(id(param) in managed for param in self._hidden):
            raise RuntimeError(
                "owlore: DistributedDataParallel manages parameters that OwLore switches on and "
                "off, or off for good. Wrap the very model that OwLore was built from, or build "
                "OwLore from the wrapped model: OwLore(DistributedDataParallel(model), ...)"
            )
        if any(id(param) not in managed for param in self._visible):
            raise RuntimeError(
                "owlore: DistributedDataParallel was told to ignore parameters that train at every "
                "step (by an optimizer that is gone, perhaps): wrap the model anew"
            )
        setattr(ddp, _OURS, set(names_of(ddp.module, [*self._hidden, *(self._values or ())])))
        self._ddp = weakref.ref(ddp)
        self.group = ddp.process_group
        self.size = distributed.get_world_size(self.group)
        if not self.active:
            return
        if not synced and self._values:
            values = [param.detach() for param in self._values]
            # Rank 0 of the group.
            distributed._broadcast_coalesced(self.group, values, _BROADCAST_BYTES, 0)
        self._values = None
        self._listen()

    def sharded_as(self, spread: Spread, model: nn.Module) -> None:
        """Works beside FSDP2 from now on.

        Args:
            spread: How weights are spread.
            model: The model.
        """
        self._fsdp = _fsdp_groups(model)
        self._values = None
        self.group = spread.group
        self.size = distributed.get_world_size(self.group)
        if self.active:
            self._listen()

    def check_order(self, model: nn.Module) -> None:
        """Raises RuntimeError where fully_shard came after the optimizer."""
        if self._ordered or self._fsdp:
            return
        self._ordered = True
        if _fsdp_groups(model):
            raise RuntimeError(
                "owlore: fully_shard was applied to a model that OwLore trains; call fully_shard "
                "first and build OwLore from the sharded model"
            )

    def _listen(self) -> None:
        owner = self._owner()
        if self._handle is None and owner is not None:
            self._handle = owner.register_forward_hook(_OutputHook(self))

    def before_forward(self) -> None:
        """At each training forward pass: finds the wrapper around it, and whether it averages."""
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is None:
            return
        if self._ddp is None or self._ddp() is not ddp:
            self.wrapped_by(ddp, synced=False)
        self._syncs = ddp.require_backward_grad_sync

    def after_forward(self, output: Any) -> None:
        """Waits for the backward pass of an output."""
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._queue)

    def _queue(self, grad: Tensor) -> None:
        if not self._queued:
            self._queued = True
            # In the outermost backward pass: reentrant checkpointing runs others inside it.
            Variable._execution_engine.queue_callback(self._end_of_backward)

    def _end_of_backward(self) -> None:
        self._queued = False
        self.owes = True
        if self._fsdp:
            self._syncs = all(g.reduce_grads and g.all_reduce_grads for g in self._fsdp)
        if self._syncs:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Averages all gradients of the hidden parameters over the ranks."""
        self.owes = False
        shared: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in self._hidden:
            if not param.requires_grad:
                continue
            if param.grad is None:
                # Unused in this rank's batch, perhaps not in the others'.
                param.grad = torch.zeros_like(param, memory_format=torch.contiguous_format)
            grad = local(param.grad)
            shared.setdefault((grad.device, grad.dtype), []).append(grad)
        for grads in shared.values():
            small = []
            for grad in grads:
                if grad.nbytes >= _LARGE and grad.is_contiguous():
                    self.average_(grad)
                else:
                    small.append(grad)
            if small:
                self._average_together(small)

    def _average_together(self, grads: list[Tensor]) -> None:
        places, total = [], 0
        for grad in grads:
            places.append(total)
            total += -(-grad.numel() // _ALIGNED) * _ALIGNED
        together = grads[0].new_zeros(total)
        views = [
            together[place : place + grad.numel()].view(grad.shape)
            for place, grad in zip(places, grads, strict=True)
        ]
        torch._foreach_copy_(views, grads)
        self.average_(together)
        torch._foreach_copy_(grads, views)

    def average_(self, tensor: Tensor) -> None:
        """Replaces a whole tensor by its average over the ranks."""
        # Of several backends, as where none was named, the tensor's device has one.
        if f"{tensor.device.type}:nccl" in distributed.get_backend_config(self.group):
            distributed.all_reduce(tensor, distributed.ReduceOp.AVG, group=self.group)
        else:
            distributed.all_reduce(tensor, group=self.group)
            tensor.div_(self.size)

    @property
    def compares(self) -> bool:
        """Whether ranks are compared at each step: debug mode."""
        return self.active and os.environ.get(DEBUG, "0") not in ("", "0")

    def compare(self, tensors: Mapping[str, Tensor], blocks: tuple[int, ...]) -> None:
        """Raises RuntimeError where ranks hold different tensors or blocks."""
        mine: dict[str, Any] = {name: _digest(tensor) for name, tensor in tensors.items()}
        mine["active blocks"] = blocks
        theirs: list[dict[str, Any]] = [{} for _ in range(self.size)]
        distributed.all_gather_object(theirs, mine, group=self.group)
        for rank, other in enumerate(theirs):
            names = [name for name in {**mine, **other} if mine.get(name) != other.get(name)]
            if names:
                raise RuntimeError(
                    f"owlore: rank {rank} of the group has another {names[0]} than this rank "
                    f"({len(names)} of {len(mine)} differ)"
                )

    def close(self) -> None:
        """Stops listening."""
        if self._handle is not None:
            self._handle.remove()


class _OutputHook:
    """Forward hook of the module that owns the blocks; a copy of the model gets one that is off."""

    def __init__(self, exchange: Exchange | None) -> None:
        self._exchange = weakref.ref(exchange) if exchange is not None else lambda: None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        exchange = self._exchange()
        if exchange is None or exchange._owner() is not module or not module.training:
            return
        if torch.is_grad_enabled():
            exchange.after_forward(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OutputHook:
        return _OutputHook(None)

    def __reduce__(self) -> tuple[type[_OutputHook], tuple[None]]:
        return _OutputHook, (None,)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Tensors in a module's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output):
        for entry in fields(output):
            yield from _tensors(getattr(output, entry.name))


def sum_together_(tensors: list[Tensor], group: Any) -> None:
    """Replaces tensors of one dtype and device by their sums over ranks, in one call."""
    together = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(together, group=group)
    sums = together.split([tensor.numel() for tensor in tensors])
    for tensor, total in zip(tensors, sums, strict=True):
        tensor.copy_(total.view(tensor.shape))


def _digest(tensor: Tensor) -> int:
    data = local(tensor).detach().cpu().contiguous().view(torch.uint8)
    return zlib.crc32(data.numpy().tobytes())
