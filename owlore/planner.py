"""How much memory a training step will take, part by part, before anything is loaded.

The model is built on the meta device, where tensors have shapes and no storage, and trained there
for a few steps by the real optimizer; every storage that comes and goes is counted. So the plan
follows whatever the model's and the optimizer's own code keeps, for any architecture.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from owlore import blocks, projection
from owlore.config import OwLoreConfig
from owlore.models import ModelError, quiet, resolve
from owlore.optimizer import OwLore

__all__ = ["PARTS", "SHAPES", "Plan", "plan"]

PARTS = (
    "weights",
    "moments",
    "bases",
    "dense gradients",
    "low-rank gradients",
    "activations",
    "logits and loss",
    "block in backward",
    "step",
    "kernel scratch",
)
MOMENTS = ("forward", "loss", "backward", "step")
# Models whose shape is known by name: transformers' model type and the config's fields.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-7b": (
        "llama",
        {
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
            "max_position_embeddings": 4096,
        },
    ),
    "llama3-8b": (
        "llama",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 8192,
        },
    ),
    "qwen3-4b": (
        "qwen3",
        {
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
        },
    ),
    "smollm2-135m": (
        "llama",
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
            "max_position_embeddings": 8192, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip

# cuBLAS keeps a workspace for each thread that calls it, 32 MiB on Hopper: the one of forward and
# the one of backward.
_CUBLAS = 2 * 32 * 2**20
# The architecture whose launch configurations count where there is no GPU to ask.
_ARCHITECTURE = 90
# Every how many simulated steps the bases are due: one normal step lies between two refreshes.
_PERIOD = 3


@dataclass(frozen=True)
class Plan:
    """What a step is expected to hold on the device, in bytes.

    Attributes:
        parts: Bytes of each of `PARTS` at the peak.
        peak: Their sum: what torch.cuda.max_memory_allocated() should read.
        at: Where the peak lies, such as "normal step, loss".
        moments: Parts at the highest point of each moment of a normal and of a refresh step.
    """

    parts: dict[str, int]
    peak: int
    at: str
    moments: dict[str, dict[str, int]]

    def account(self) -> dict[str, int]:
        """The plan in the terms of a run's memory account (run.json), to stand beside it.

        Returns:
            "weights", "gradients", "moments" and "basis" at the end of a normal step, and
            "activations": what forward and backward take beyond what was there before.
        """
        step = self.moments["normal step, step"]
        held = ("weights", "moments", "bases", "kernel scratch")
        passes = [parts for name, parts in self.moments.items() if not name.endswith("step")]
        return {
            "weights": step["weights"],
            "gradients": step["dense gradients"] + step["low-rank gradients"],
            "moments": step["moments"],
            "basis": step["bases"],
            "activations": max(
                sum(size for part, size in parts.items() if part not in held) for parts in passes
            ),
        }

    def table(self) -> str:
        """Parts at each moment and their sums, in GiB, for a terminal."""
        columns = {name: [parts[part] for part in PARTS] for name, parts in self.moments.items()}
        kinds = list(dict.fromkeys(name.partition(", ")[0] for name in columns))
        width = 10
        lines = [
            f"{'GiB':<20}"
            + "".join(
                f"{kind:^{width * sum(n.startswith(kind) for n in columns)}}" for kind in kinds
            )
        ]
        lines.append(
            f"{'':<20}" + "".join(f"{name.partition(', ')[2]:>{width}}" for name in columns)
        )
        for i, part in enumerate(PARTS):
            sizes = [sizes[i] for sizes in columns.values()]
            if any(sizes):
                cells = "".join(f"{size / 2**30:>{width}.3f}" for size in sizes)
                lines.append(f"{part:<20}{cells}")
        sums = "".join(f"{sum(sizes) / 2**30:>{width}.3f}" for sizes in columns.values())
        lines.append(f"{'sum':<20}{sums}")
        lines.append(f"peak {self.peak / 2**30:.2f} GiB ({self.at})")
        return "\n".join(line.rstrip() for line in lines)


class _Storage:
    """One storage while it lives; its part may be corrected later."""

    __slots__ = ("bytes", "part", "ref")

    def __init__(self, size: int, part: str) -> None:
        self.bytes = size
        self.part = part
        self.ref: Any = None


class _Tracker(TorchDispatchMode):
    """Counts every storage that an operation returns, from then until nobody holds it."""

    def __init__(self, scratch: Callable[..., int]) -> None:
        super().__init__()
        self._live: dict[int, _Storage] = {}
        # Storages as they came (True) and went, with the moment in which they did.
        self._events: list[tuple[str, _Storage, bool]] = []
        self._scratch = scratch
        self._arena: _Storage | None = None
        self.part = "activations"
        self.moment = "forward"

    def see(self, tensor: Tensor, part: str | None = None) -> None:
        """Counts a tensor's storage if it is new, and puts it under a part if one is given."""
        storage = tensor.untyped_storage()
        key = id(storage)
        found = self._live.get(key)
        if found is None:
            found = _Storage(storage.nbytes(), part or self.part)

            def gone(_: Any, storage: _Storage = found) -> None:
                del self._live[key]
                self._events.append((self.moment, storage, False))

            found.ref = weakref.ref(storage, gone)
            self._live[key] = found
            self._events.append((self.moment, found, True))
        elif part is not None:
            found.part = part

    def allocate(self, size: int, part: str) -> _Storage:
        """Counts memory that no tensor of ours stands for, until `free`."""
        storage = _Storage(size, part)
        self._events.append((self.moment, storage, True))
        return storage

    def free(self, storage: _Storage) -> None:
        """Ends what `allocate` began."""
        self._events.append((self.moment, storage, False))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # Models ask whether a mask is empty or sequences are packed: no padding, no packing.
            return args[0].dtype == torch.bool
        if func.namespace == "owlore" and not func._schema.returns:
            self._own_op(func, args, kwargs or {})
            return None
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out

    def _own_op(self, func: Any, args: Any, kwargs: Any) -> None:
        """An in-place step of ours: no tensor comes of it, only the kernels' scratch, kept."""
        size = self._scratch(func._opname, *args, **kwargs)
        held = self._arena
        if held is None or held.bytes < size:
            if held is not None:
                self.free(held)
            self._arena = self.allocate(size, "kernel scratch")

    @property
    def events(self) -> int:
        """Number of storages that came or went so far."""
        return len(self._events)

    def peaks(self, starts: Sequence[int]) -> list[dict[str, dict[str, int]]]:
        """Parts at the highest point of each moment, for each stretch between event numbers."""
        now = dict.fromkeys(PARTS, 0)
        total = 0
        best: list[dict[str, dict[str, int]]] = [{} for _ in starts]
        highest = [dict.fromkeys(MOMENTS, -1) for _ in starts]
        stretch = -1
        for i, (moment, storage, came) in enumerate(self._events):
            while stretch + 1 < len(starts) and starts[stretch + 1] <= i:
                stretch += 1
            # Before the event too: a moment may begin with storages that go.
            for change in (0, storage.bytes if came else -storage.bytes):
                now[storage.part] += change
                total += change
                if stretch >= 0 and total > highest[stretch][moment]:
                    highest[stretch][moment] = total
                    best[stretch][moment] = dict(now)
        return best


class _Attention(torch.autograd.Function):
    """The memory of FlashAttention: one number a row is kept, never a matrix of scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)[..., : v.shape[-1]]
        rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, rows = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # Sums over parts of a sequence are taken in float32, those over shared heads afterwards.
        work = [q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(rows)]
        if k.shape[1] != q.shape[1]:
            work += [torch.empty_like(q), torch.empty_like(q)]
        del work
        return dq, dk, dv


class _Finite:
    """`projection.DeferredFlags` of flags without values: every gradient was finite."""

    def __init__(self, flags: Tensor) -> None:
        self._count = flags.numel()

    def read(self) -> list[bool]:
        """The flags."""
        return [True] * self._count


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = _Attention.apply(query, key, value)
    return out


@contextlib.contextmanager
def _like_a_gpu() -> Iterator[None]:
    """Lets tensors on the meta device take the ways that tensors on a GPU take."""
    generator, attention = torch.Generator, nn.functional.scaled_dot_product_attention
    autocast, flags = torch.is_autocast_enabled, projection.DeferredFlags
    changed: Any = torch
    changed.Generator = lambda *_: generator()
    changed.is_autocast_enabled = lambda *device: device != ("meta",) and autocast(*device)
    changed.Tensor.is_cuda = property(lambda tensor: tensor.device.type in ("cuda", "meta"))
    changed.nn.functional.scaled_dot_product_attention = _attention
    changed_projection: Any = projection
    changed_projection.DeferredFlags = _Finite
    try:
        yield
    finally:
        changed.Generator = generator
        changed.is_autocast_enabled = autocast
        del changed.Tensor.is_cuda
        changed.nn.functional.scaled_dot_product_attention = attention
        changed_projection.DeferredFlags = flags


def _architecture() -> int:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    return _ARCHITECTURE


def _scratch(name: str, *args: Any, **kwargs: Any) -> int:
    """Bytes that the kernels behind an op keep beside its tensors."""
    if name != "lowrank_adam_":
        return 0
    try:
        from owlore.kernels import lowrank_adam
    except ImportError:
        return 0
    return lowrank_adam.scratch_bytes(
        *args[:5],
        sides=kwargs["sides"],
        projected=kwargs.get("projected", False),
        architecture=_architecture(),
    )


def meta_model(model: Any, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model without storage, in training mode.

    Args:
        model: One of `SHAPES`, what `owlore.models.resolve` takes, a transformers configuration, or
            a model (which keeps its own data types, and is left as it is).
        dtype: Data type of the weights.

    Returns:
        The model on the meta device.

    Raises:
        ModelError: There is no such model.
        TypeError: `model` is none of these.
    """
    if isinstance(model, nn.Module):
        memo: dict[int, Any] = {}
        tensors = [*model.parameters(), *model.buffers()]
        for tensor in tensors:
            empty = torch.empty_like(tensor, device="meta")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = empty
        return copy.deepcopy(model, memo).train()
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    if isinstance(model, str):
        if model in SHAPES:
            kind, fields = SHAPES[model]
            model = AutoConfig.for_model(kind, **fields)
        else:
            location = resolve(model).location
            try:
                with quiet():
                    model = AutoConfig.from_pretrained(location)
            except (OSError, ValueError, KeyError) as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                known = ", ".join(SHAPES)
                raise ModelError(
                    f"the model {model} cannot be planned: {first} (known shapes: {known})"
                ) from error
    if not isinstance(model, PretrainedConfig):
        raise TypeError(
            f"model: expected a name, a configuration or a model, got {type(model).__name__}"
        )
    config = copy.deepcopy(model)
    config.use_cache = False
    with quiet(), torch.device("meta"):
        built: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return built.train()


def plan(
    model: Any,
    config: OwLoreConfig,
    batch: int,
    seq: int,
    *,
    accumulation: int = 1,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    active: Sequence[int] | None = None,
    input_grads: bool = False,
) -> Plan:
    """Predicts the peak of a training step on a GPU.

    Counted are the weights, the optimizer's state, everything autograd and the model's code hold
    on the way, the workspace of a refresh and of the kernels. Attention counts as FlashAttention
    where the model uses torch's; sequences have no padding. The caching allocator's reserve, the
    CUDA context and other programs are not counted.

    Args:
        model: See `meta_model`.
        config: Options of the optimizer. Scores are not needed: the plan takes the most expensive
            draw: the last blocks, and the first where the embeddings are frozen.
        batch: Sequences in a micro-batch.
        seq: Tokens in a sequence.
        accumulation: Micro-batches in an optimizer step.
        checkpointing: Recompute the blocks' activations in backward (non-reentrant).
        dtype: Data type of the weights, unless a model is given.
        active: The blocks that train, instead of that draw.
        input_grads: The embeddings' output requires a gradient, so that backward runs through all
            blocks though nothing below the lowest active one trains.

    Returns:
        The plan.

    Raises:
        ValueError: An option does not fit the model, or what its code does depends on values.
        ModelError: There is no such model.
    """
    for name, value in (("batch", batch), ("seq", seq), ("accumulation", accumulation)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
    empty = meta_model(model, dtype)
    _set_checkpointing(empty, checkpointing)
    if input_grads:
        embeddings: Any = empty.get_input_embeddings()  # type: ignore[operator]
        embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_(True))
    count = len(blocks.find_layout(empty, config.blocks_path).blocks)
    if active is None:
        gamma = count if config.blocks == "all" else int(config.blocks)
        if gamma > count:
            raise ValueError(f"blocks: expected at most {count}, got {gamma}")
        # The last blocks, whose gradients come while backward still holds everything; and the
        # first, so that backward goes all the way, unless embeddings that train see to it.
        active = list(range(count - gamma, count))
        if config.embeddings == "freeze":
            active[0] = 0
    chosen = [1.0 if i in active else 0.0 for i in range(count)]
    simulated = config.replace(
        blocks=len(active), distribution=lambda _: chosen, scores=None, floor=0.0,
        interval=10**9, refresh_interval=_PERIOD,
    )  # fmt: skip
    try:
        with _like_a_gpu():
            steps, state = _simulate(empty, simulated, config, batch, seq, accumulation)
    except (RuntimeError, NotImplementedError) as error:
        # What a model's code does with values (experts that pick their tokens) has no shape here.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = type(empty).__name__
        raise ValueError(f"model: {kind} cannot be planned without its weights: {first}") from error
    moments = {
        f"{kind} step, {moment}": parts
        for kind, step in steps.items()
        for moment, parts in step.items()
    }
    if config.state == "keep":
        # In the long run every block was drawn once and left its state.
        for parts in moments.values():
            for part, size in state.items():
                parts[part] += size * (count - len(active)) // len(active)
    at = max(moments, key=lambda name: sum(moments[name].values()))
    return Plan(moments[at], sum(moments[at].values()), at, moments)


def _set_checkpointing(model: nn.Module, on: bool) -> None:
    switch = getattr(model, f"gradient_checkpointing_{'enable' if on else 'disable'}", None)
    if switch is None:
        if on:
            kind = type(model).__name__
            raise ValueError(f"checkpointing: {kind} has no gradient_checkpointing_enable()")
        return
    with warnings.catch_warnings():
        # transformers 5.20 renamed it and warns; older ones know this name only.
        warnings.simplefilter("ignore", FutureWarning)
        if on:
            switch(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            switch()


def _simulate(
    model: nn.Module,
    simulated: OwLoreConfig,
    config: OwLoreConfig,
    batch: int,
    seq: int,
    accumulation: int,
) -> tuple[dict[str, dict[str, dict[str, int]]], dict[str, int]]:
    """Parts at each moment of a normal and of a refresh step; state of the active blocks."""
    log = logging.getLogger("owlore")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        optimizer = OwLore(model, simulated)
    finally:
        log.setLevel(level)
    tracker = _Tracker(_scratch)
    _watch_head(model, tracker)
    tracker.allocate(_CUBLAS, "kernel scratch")
    drawn = config.blocks != "all" and config.interval <= config.refresh_interval
    starts = []
    with tracker:
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.see(tensor, "weights")
        ids = torch.empty(batch, seq, dtype=torch.long, device="meta")
        for step in range(_PERIOD + 1):
            if step == _PERIOD:
                state = _block_state(optimizer, drop=drawn)
            starts.append(tracker.events)
            _train_step(model, optimizer, tracker, ids, accumulation)
    optimizer.detach()
    peaks = tracker.peaks(starts)
    return {"normal": peaks[_PERIOD - 1], "refresh": peaks[_PERIOD]}, state


def _block_state(optimizer: OwLore, drop: bool) -> dict[str, int]:
    """Bytes of the blocks' state; dropped if bases fall due because other blocks are drawn."""
    sizes = {"moments": 0, "bases": 0}
    for group in optimizer.param_groups:
        if group["name"] in (blocks.BLOCKS, blocks.BLOCK_NORMS):
            for param in group["params"]:
                for key, value in optimizer.state.get(param, {}).items():
                    if isinstance(value, Tensor):
                        size = value.numel() * value.element_size()
                        sizes["bases" if key == "basis" else "moments"] += size
                if drop:
                    optimizer.state.pop(param, None)
    if drop:
        # What a draw forgets too: prepared steps, which hold on to the state they were made for.
        optimizer._forget_buckets()
    return sizes


def _watch_head(model: nn.Module, tracker: _Tracker) -> None:
    """Tells the tracker when the blocks' forward ends and when their backward begins."""
    head = blocks.find_lm_head(model)
    if head is None:
        raise ValueError(f"model: expected a causal language model, got {type(model).__name__}")

    def backward_begins(_: Tensor) -> None:
        tracker.moment, tracker.part = "backward", "block in backward"

    def loss_begins(_: nn.Module, args: Any) -> None:
        tracker.moment, tracker.part = "loss", "logits and loss"
        if args[0].requires_grad:
            args[0].register_hook(backward_begins)

    head.register_forward_pre_hook(loss_begins)


def _train_step(
    model: nn.Module, optimizer: OwLore, tracker: _Tracker, ids: Tensor, accumulation: int
) -> None:
    """Forward, backward and the optimizer's step, and what it leaves put under its part."""
    for _ in range(accumulation):
        tracker.moment, tracker.part = "forward", "activations"
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        del loss
        for param in model.parameters():
            if param.grad is not None:
                # The coordinates of a low-rank gradient stand in one element's storage.
                small = param.untyped_storage().nbytes() < param.numel() * param.element_size()
                tracker.see(param.grad, f"{'low-rank' if small else 'dense'} gradients")
    tracker.moment, tracker.part = "step", "step"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tracker.see(value, "bases" if key == "basis" else "moments")
    optimizer.zero_grad()
