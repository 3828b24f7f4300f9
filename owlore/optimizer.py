"""OwLore as a `torch.optim.Optimizer` that draws blocks from its own step count."""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import math
import operator
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from typing_extensions import Unpack

from owlore import blocks, checkpoints, distributed, ops, projected, projection, sampling
from owlore.config import Options, OwLoreConfig, importable, needs_scores
from owlore.members import (
    Member,
    choose_members,
    describe,
    param_groups,
    warn_of_small_share,
    without_frozen_blocks,
)
from owlore.outliers import read_scores

logger = logging.getLogger(__name__)

_CHECKPOINT = checkpoints.ENTRY
_VERSION = 1
# Options that may differ between a checkpoint and the optimizer that loads it: they stand in the
# param_groups, which a checkpoint restores as every torch optimizer does, or in the saved scores.
_FREE_OPTIONS = ("lr", "dense_lr", "betas", "eps", "weight_decay", "scale", "scores")
# What `prepare_load` changes, beside states and flags.
_COUNTERS = ("_p", "_scores", "_steps", "_drawn", "_active", "_accumulates")
# Sketches from which bases are made at a time; each is freed when its basis is there.
_SKETCHES = 16
# What a step looks up for every parameter, without a Python call for each.
_GRAD = operator.attrgetter("grad")
_WEIGHT = operator.itemgetter("weight")
_MOMENT = operator.itemgetter("exp_avg")


class _Ready(NamedTuple):
    """A step of some members of a bucket, prepared."""

    # Indices of the members in the bucket: those that have a gradient.
    have: tuple[int, ...]
    members: list[Member]
    states: list[dict[str, Any]]
    # First moment of each. Who takes states to the host and back replaces all of their tensors.
    moments: list[Tensor]
    # Where each weight is looked up, and where it was.
    holders: list[Mapping[str, Any]]
    addresses: list[int]
    # One number a member. The states' `step` and the members' `skipped` are views of these, so that
    # one launch counts for all.
    steps: Tensor
    skipped: Tensor
    flags: Tensor
    step: Callable[..., None]


class _Before(NamedTuple):
    """What `prepare_load` changed, as it was."""

    fields: dict[str, Any]
    state: dict[Tensor, Any]
    flags: list[tuple[nn.Parameter, bool]]


class _Bucket:
    """Members that share one call of an op: same device, dtypes, group, path and decay."""

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self.params = [member.param for member in members]
        self.everyone = tuple(range(len(members)))
        self.block_weights = members[0].entry.role == blocks.BLOCKS
        self.transposed = any(member.entry.transposed for member in members)
        self.decays = members[0].weight.dim() >= 2
        self.projects = members[0].projection is not None
        self.spread = any(member.spread is not None for member in members)
        # Whether R is the sum of what the ranks' parts of G give.
        self.sums = members[0].side is not None and members[0].crosses and not self.projects
        self.ready: _Ready | None = None


class _DrawHook:
    """Forward pre-hook of the module that owns the blocks: applies a draw that is due.

    It holds module and optimizer weakly and acts on that very module only, so that a deep copy of
    the model (an EMA, a reference model) neither copies the optimizer nor drives its draws.
    """

    def __init__(
        self, optimizer: OwLore | None, module: nn.Module | None, flags: dict[str, bool]
    ) -> None:
        self._optimizer = weakref.ref(optimizer) if optimizer is not None else lambda: None
        self._module = weakref.ref(module) if module is not None else lambda: None
        # requires_grad of every parameter before any draw, for the next optimizer of this model or
        # of a copy: it must not take a draw's freezing for the user's.
        self.flags = flags

    @property
    def optimizer(self) -> OwLore | None:
        """The optimizer, while it lives."""
        return self._optimizer()

    def __call__(self, module: nn.Module, args: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is None or self._module() is not module:
            return
        if module.training and torch.is_grad_enabled():
            optimizer._abandon_load()
            optimizer._apply_due_draw()
            optimizer._exchange.check_order(optimizer._model)
            optimizer._exchange.before_forward()
            optimizer._set_modes()

    def __deepcopy__(self, memo: dict[int, Any]) -> _DrawHook:
        return _DrawHook(None, None, dict(self.flags))

    def __reduce__(self) -> tuple[type[_DrawHook], tuple[None, None, dict[str, bool]]]:
        return _DrawHook, (None, None, self.flags)


class OwLore(Optimizer):
    """Outlier-weighted sampled low-rank training (OwLore / OWS, arXiv 2405.18380).

    Every `interval` steps `blocks` decoder blocks are drawn; the linear weights of a drawn block
    train with AdamW in a rank-`rank` subspace of their gradient (GaLore, arXiv 2403.03507). All
    other parameters rest by default, but the head of a model that classifies. On request norms and
    biases train with AdamW while their block is drawn; final norm, embeddings and LM head then
    train at every step. What is not trained has `requires_grad=False`.

    The first draw takes effect at the first training forward pass, not at construction, so that
    trainers and wrappers see every parameter before any is frozen. The active blocks are a pure
    function of seed, step and scores. Parameters that already have `requires_grad=False` at
    construction are left alone for good, and a block without any other weights is never drawn. An
    optimizer that trained the same model before is detached.

    Args:
        model: A Hugging Face decoder, or any module whose blocks stand in one `nn.ModuleList`.
        config: All options; or None and give them as keywords.
        **options: Fields of `OwLoreConfig`; they override `config`.

    Raises:
        ValueError: An option does not fit the model, or outlier scores are missing.
        TypeError: An option is unknown or of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OwLoreConfig | None = None,
        **options: Unpack[Options],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if config is not None and not isinstance(config, OwLoreConfig):
            raise TypeError(f"config: expected an OwLoreConfig, got {type(config).__name__}")
        given = OwLoreConfig.from_dict(options) if config is None else config.replace(**options)
        distributed.refuse_flat_shards(model)
        layout = blocks.find_layout(model, given.blocks_path)
        n = len(layout.blocks)
        self.config = given
        self._layout = layout
        self._model = blocks.unwrap(model)
        self._inputs_needed_grads = False
        scores = None if given.scores is None else read_scores(given.scores)
        self._scores = None if scores is None else sampling.check_scores(scores, n).tolist()
        norms = blocks.weight_norms(layout) if given.distribution == "weight_norm" else None
        drawn = given.distribution
        if drawn in ("outlier", "reverse") and self._scores is None and not needs_scores(given):
            drawn = "uniform"
        p = sampling.probabilities(drawn, n, self._scores, norms, given.floor)
        earlier = _earlier_hooks(layout.owner)
        before = {entry.name: entry.param.requires_grad for entry in layout.entries}
        for hook in earlier.values():
            before.update(hook.flags)
        ranks = None
        if given.rank is not None and given.rank_distribution == "probability":
            ranks = sampling.spread_rank(p, given.rank)
        members, dense = choose_members(layout, given, before, ranks)
        self._p = without_frozen_blocks(p, members)
        drawable = int((self._p > 0).sum())
        self._gamma = drawable if given.blocks == "all" else int(given.blocks)
        sampling.check_drawable(self._p, self._gamma)
        for key, hook in earlier.items():
            if hook.optimizer is not None:
                warnings.warn(
                    "owlore: this model was trained by another OwLore optimizer, which is detached "
                    "now",
                    stacklevel=2,
                )
                hook.optimizer.detach()
            layout.owner._forward_pre_hooks.pop(key, None)
        self._flags = distributed.Flags(self._model)
        for param, flag in ((e.param, before[e.name]) for e in layout.entries):
            self._flags.set(param, flag)
        # Layers of a copy, whose optimizer did not come along.
        projected.restore_all(model)
        for member in members:
            member.install(given)
            if member.projection is not None:
                self._flags.set(member.weight, False)
        self._sealed = False
        # Schedulers look here for what they may change (OneCycleLR for betas).
        names = ("lr", "betas", "eps", "weight_decay")
        defaults = {name: getattr(given, name) for name in names}
        super().__init__(param_groups(members, given), defaults)
        self._sealed = True
        # A flattened distributed checkpoint takes the keys of the groups, of which this is one;
        # `state_dict` fills it.
        self.param_groups[0][_CHECKPOINT] = None
        for group in self.param_groups:
            for member in members:
                if member.entry.role == group["name"]:
                    member.group = group
        self._members = members
        trained = {id(member.entry.param) for member in members}
        self._frozen = [e.param for e in layout.entries if id(e.param) not in trained]
        self._original_flags = [(e.param, before[e.name]) for e in layout.entries]
        self._steps = 0
        self._drawn = -1
        self._active: tuple[int, ...] = ()
        self._flags_applied = True
        # The step for which the layers' modes were set; they hold until step().
        self._modes_step = -1
        self._sketching = False
        # Whether a layer's basis is to come from this step's backward: by a seed of that step.
        self._awaits_bases = False
        # Whether a step takes more than one backward pass.
        self._accumulates = False
        self._buckets: list[_Bucket] | None = None
        # The states after the last step, in their order: prepared steps refer to these.
        self._states_stepped: list[dict[str, Any]] = []
        self._pending: list[tuple[list[Member], projection.DeferredFlags]] = []
        self._energy: dict[str, Tensor] = {}
        # The number of steps before the present one, on each device.
        self._rng_steps: dict[torch.device, Tensor] = {}
        self._counting: ops.Counting | None = None
        self._lrs: dict[tuple[str, torch.device], tuple[Tensor, float]] = {}
        self._warned: set[str] = set()
        # Names and numbers of skipped gradients as of the last draw, until a step() reported them.
        self._skips: list[tuple[list[str], projection.DeferredFlags]] = []
        self._lost_sketches: collections.Counter[str] = collections.Counter()
        self._reported_skips = 0
        self._detached = False
        self._before_load: _Before | None = None
        self._first = self.param_groups[0]["params"][0]
        # A frozen parameter that DDP is given where it would have none; its gradient is zeroed.
        self._shown: nn.Parameter | None = None
        self._silence: Any = None
        self._share(model)
        own_hook = _DrawHook(self, layout.owner, before)
        self._hook = layout.owner.register_forward_pre_hook(own_hook)
        self._dense_path = dense
        for line in self.describe():
            logger.log(logging.WARNING if "not trained" in line else logging.INFO, line)
        warn_of_small_share(layout)

    def _share(self, model: nn.Module) -> None:
        """Gets ready for training on several ranks."""
        toggled = [m for m in self._members if not m.always or m.projection is not None]
        hidden = [param for member in toggled for param in member.takers]
        coordinates = [param for m in toggled if m.projection is not None for param in m.takers]
        values = [m.param for m in toggled if m.projection is None] + self._frozen
        always = [m.param for m in self._members if m.always and m.projection is None]
        self._exchange = distributed.Exchange(self._layout.owner, hidden, values, always)
        spread = next((m.spread for m in self._members if m.spread is not None), None)
        if spread is not None:
            # FSDP2 has seen every parameter; it averages norms and dense weights itself.
            for param in self._frozen:
                self._flags.set(param, False)
            # What stands outside of it, as where blocks alone were sharded, nobody averages.
            outside = [m.param for m in self._members if m.projection is None and m.spread is None]
            averaged = [*coordinates, *outside]
            self._exchange = distributed.Exchange(self._layout.owner, averaged, [], [])
            self._exchange.sharded_as(spread, self._model)
            self._show = lambda: None
            return
        distributed.refuse_later_shards()
        ddp = distributed.find_ddp(model)
        frozen = self._frozen
        if not always:
            norms = [e for e in self._layout.entries if e.role == blocks.NORM]
            self._shown = next((e.param for e in norms if any(e.param is p for p in frozen)), None)
            if self._shown is not None:
                # DDP refuses a model without a parameter to manage: it averages zeros of this one.
                if distributed.has_group():
                    self._shown.requires_grad_(True)
                frozen = [param for param in frozen if param is not self._shown]
                self._exchange = distributed.Exchange(
                    self._layout.owner, hidden, values, [self._shown]
                )
        self._show = distributed.hide_from_ddp(self._model, ddp, [*hidden, *frozen])
        if ddp is not None:
            self._exchange.wrapped_by(ddp, synced=True)

    # What the user reads.

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far."""
        return self._steps

    @property
    def active_blocks(self) -> tuple[int, ...]:
        """Blocks that train now, ascending; empty before the first draw."""
        return self._active

    @property
    def probabilities(self) -> list[float]:
        """Probability of each block, [L], summing to 1."""
        return [float(p) for p in self._p]

    @property
    def scores(self) -> list[float] | None:
        """Outlier score of each block, [L], if scores were given."""
        return self._scores

    @property
    def trained_parameters(self) -> int:
        """Number of weights that can change over the whole run."""
        return sum(member.weight.numel() for member in self._members)

    def draws(self) -> list[tuple[int, tuple[int, ...]]]:
        """Every draw so far: the step from which it holds and its blocks."""
        return [(i * self.config.interval, self._draw(i)) for i in range(self._drawn + 1)]

    def describe(self) -> list[str]:
        """What trains how, what is frozen, and which ranks were clamped; one line each."""
        return describe(self._layout, self._members, self.config, self._gamma, self._dense_path)

    def energy(self) -> dict[str, float]:
        """Captured gradient energy ||P^T G||^2 / ||G||^2 of each active weight's basis.

        Taken when the basis was computed; by parameter name. Waits for the device.
        """
        return _read_together(self._energy)

    def nonfinite(self) -> dict[str, int]:
        """Number of steps in which a parameter's non-finite gradients were skipped, by its name.

        Steps that sketched for a new basis are among them. Parameters without such a step are left
        out. Counted since construction or loading. Waits for the device.
        """
        self._read_pending()
        counts = collections.Counter(_read_together(self._skip_counts())) + self._lost_sketches
        return dict(counts)

    def _skip_counts(self) -> dict[str, Tensor]:
        counted = [m for m in self._members if m.skipped is not None and m.flag is not None]
        if not counted:
            return {}
        before = [cast(Tensor, member.skipped) for member in counted]
        last = [cast(Tensor, member.flag) for member in counted]
        totals = torch._foreach_add(before, last)
        return {m.entry.name: total for m, total in zip(counted, totals, strict=True)}

    def memory(self) -> dict[str, int]:
        """Bytes held now.

        Returns:
            "weights" and "gradients" of the whole model, "moments" (with their step counts) and
            "basis" on the device, and "host", the state of left blocks under state="offload".
        """
        account = dict.fromkeys(("weights", "gradients", "moments", "basis", "host"), 0)
        for entry in self._layout.entries:
            account["weights"] += _bytes(entry.param)
            if entry.param.grad is not None:
                account["gradients"] += _bytes(entry.param.grad)
        for member in self._members:
            if member.projection is not None and member.grad is not None:
                account["gradients"] += _bytes(member.grad)
            away = self.config.state == "offload" and not self._is_active(member)
            for key, value in self.state.get(member.param, {}).items():
                if isinstance(value, Tensor):
                    part = "host" if away else "basis" if key == "basis" else "moments"
                    account[part] += _bytes(value)
        return account

    # The draw clock.

    def _draw(self, index: int) -> tuple[int, ...]:
        if self._gamma == int((self._p > 0).sum()):
            return tuple(int(block) for block in np.flatnonzero(self._p))
        return sampling.draw(self._p, self._gamma, self.config.seed, index, self.config.draw)

    def _is_active(self, member: Member) -> bool:
        return member.always or member.entry.block in self._active

    def _draw_is_due(self) -> bool:
        return self._steps // self.config.interval != self._drawn

    def _apply_due_draw(self) -> None:
        """Activates the blocks of the present interval, if they are not active already."""
        if self._draw_is_due():
            self._activate(self._steps // self.config.interval)
        if not self._flags_applied:
            self._apply_flags()

    def _activate(self, index: int) -> None:
        self._read_pending()
        self._skips = [
            (names, projection.DeferredFlags(counts))
            for names, counts in _stacked(self._skip_counts())
        ]
        before, self._active = self._active, self._draw(index)
        first, self._drawn = self._drawn < 0, index
        if first or before != self._active:
            for member in self._members:
                block = member.entry.block
                if block in before and block not in self._active:
                    self._leave(member)
                elif block in self._active and block not in before:
                    self._enter(member)
            self._flags_applied = False
            self._forget_buckets()
            self._modes_step = -1

    def _apply_flags(self) -> None:
        shows = self._shown is not None and distributed.has_group()
        for param in self._frozen:
            self._flags.set(param, shows and param is self._shown)
            param.grad = None
        if shows and self._silence is None:
            self._silence = cast(Tensor, self._shown).register_hook(torch.zeros_like)
        for member in self._members:
            active = self._is_active(member)
            if member.projection is not None:
                # For good: wrappers replace parameters, and new ones start as trainable.
                self._flags.set(member.weight, False)
            else:
                self._flags.set(member.param, active)
            if not active:
                member.param.grad = None
                if member.sketch is not None:
                    member.sketch.grad = None
        self._flags_applied = True
        self._end_backward_early()

    def _end_backward_early(self) -> None:
        """Lets backward end at the lowest active block where nothing below it trains."""
        below = (blocks.EMBEDDINGS, blocks.OTHER)
        if any(member.always and member.entry.role in below for member in self._members):
            return
        if blocks.inputs_need_no_gradient(self._model):
            cast(Any, self._model).disable_input_require_grads()
            self._inputs_needed_grads = True

    def _leave(self, member: Member) -> None:
        self._energy.pop(member.entry.name, None)
        if self.config.state == "reset":
            self.state.pop(member.param, None)
        elif self.config.state == "offload" and member.param in self.state:
            self._move_state(member, _to_host)

    def _enter(self, member: Member) -> None:
        state = self.state.get(member.param)
        if not state:
            return
        if self.config.state == "offload":
            device = member.weight.device
            self._move_state(member, lambda value: value.to(device, non_blocking=True))
        if member.side is not None:
            state["basis_age"] = -1

    def _set_modes(self) -> None:
        """Tells every layer with a projection what its backward computes until the next step().

        What a forward pass saves must not change between it and a recomputation of it, so modes
        change before the first forward pass of a step and nowhere else.
        """
        if self._modes_step == self._steps:
            self._see_accumulation()
            return
        self._read_pending()
        if self._modes_step >= 0 and not self._awaits_bases:
            # Every layer has the basis that it had.
            self._modes_step = self._steps
            return
        self._sketching = self._awaits_bases = False
        for member in self._members:
            layer = member.projection
            if layer is None:
                continue
            state = self.state.get(member.param, {})
            layer.found, layer.basis = None, None
            layer.average = self._exchange.average_ if self._exchange.active else None
            if not self._is_active(member):
                layer.mode = projected.OFF
            elif state.get("basis_age", -1) >= 0:
                layer.mode, layer.basis = projected.BASIS, distributed.local(state["basis"])
            else:
                basis = state.get("basis")
                layer.basis = None if basis is None else distributed.local(basis)
                seed = projection.matrix_seed(self.config.seed, self._steps, member.entry.name)
                layer.seed = torch.tensor(seed)
                layer.mode = projected.EXACT if member.sketch is None else projected.SKETCH
            sketches = layer.mode == projected.SKETCH
            self._sketching |= sketches
            self._awaits_bases |= sketches or layer.mode == projected.EXACT
            member.param.requires_grad_(layer.mode != projected.OFF and not sketches)
            if member.sketch is not None:
                member.sketch.requires_grad_(sketches)
        self._modes_step = self._steps

    def _see_accumulation(self) -> None:
        """Before a later forward pass of a step: R in bfloat16 is no place to sum gradients in."""
        if self._accumulates and not self._awaits_bases:
            return
        layers = [m for m in self._members if m.projection is not None and self._is_active(m)]
        for member in layers:
            if member.projection is not None and member.grad is None:
                # Nothing depends on the basis found since: its gradient was dropped, as after an
                # overflow that a GradScaler saw.
                member.projection.found = None
        if not self._accumulates and any(member.grad is not None for member in layers):
            self._accumulates = True
            self._set_gradient_dtype()

    def _set_gradient_dtype(self) -> None:
        """Gives coordinates and sketches the dtype in which gradients now arrive."""
        for member in self._members:
            if member.projection is None:
                continue
            dtype = member.gradient_dtype(self.config, self._accumulates)
            for param in member.takers:
                if param.dtype != dtype:
                    grad, param.grad = param.grad, None
                    param.data = projected.zeros(tuple(param.shape), dtype, param.device)
                    param.grad = None if grad is None else grad.to(dtype)

    def _move_state(self, member: Member, move: Callable[[Tensor], Tensor]) -> None:
        state = self.state[member.param]
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = move(value)

    def detach(self) -> None:
        """Takes the optimizer off the model; the trained weights stay.

        Removes the hook, restores every requires_grad, frees gradients and state.
        """
        self._hook.remove()
        self._exchange.close()
        self._show()
        if self._silence is not None:
            self._silence.remove()
        if self._inputs_needed_grads:
            cast(Any, self._model).enable_input_require_grads()
        for member in self._members:
            module = member.entry.module
            if member.projection is not None and module is not None:
                if getattr(module, "_owlore", None) is member.projection:
                    projected.restore(module)
                for param in member.takers:
                    param.grad = None
        for param, flag in self._original_flags:
            self._flags.set(param, flag)
            param.grad = None
        self.state.clear()
        self._forget_buckets()
        self._pending.clear()
        self._skips.clear()
        self._energy.clear()
        self._detached = True

    # The step.

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """As torch's, around which a step without hooks goes while no profiler runs.

        The range that it opens for profilers costs the host as much as several launches.
        """
        watched = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: OwLore, *args: Any, **kwargs: Any) -> Any:
            hooks = (
                self._optimizer_step_pre_hooks,
                self._optimizer_step_post_hooks,
                _global_optimizer_pre_hooks,
                _global_optimizer_post_hooks,
            )
            if any(hooks) or torch.autograd._profiler_enabled():
                return watched(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the active blocks' weights and the parameters that always train.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: The optimizer was detached.
        """
        if self._detached:
            raise RuntimeError("this OwLore optimizer was detached from its model; build a new one")
        if self.param_groups[0]["params"][0] is not self._first:
            distributed.refuse_flat_groups()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_probed():
            return loss
        self._abandon_load()
        if self._skips:
            self._report_skipped()
        if self._draw_is_due():
            self._warn_once(
                "a draw of blocks was due and no training forward pass of "
                f"{type(self._layout.owner).__name__} came before step(): the blocks are drawn now "
                "and train from the next backward pass on (is the model in eval mode?)"
            )
            self._apply_due_draw()
        if self._modes_step < 0:
            # Without a forward pass that set them, as after a draw in this very call.
            self._set_modes()
        if self._exchange.owes:
            self._warn_once(
                "step() found gradients that were not averaged over the ranks, and averages them "
                "now, after any clipping: let the last backward pass of a step run outside "
                "no_sync()"
            )
            self._exchange.settle()
        self._read_pending()
        if self._buckets is None:
            self._buckets = self._build_buckets()
        if not self._step_buckets(self._buckets):
            self._warn_once(
                "step() found no gradient on any active block's weights, so no block was trained "
                "(was backward() called? reentrant activation checkpointing without input "
                "gradients yields none)"
            )
        if self._exchange.compares:
            self._exchange.compare(self._bases(), self._active)
        self._steps += 1
        return loss

    def _bases(self) -> dict[str, Tensor]:
        """Bases of what trains, by parameter name."""
        active = [member for member in self._members if self._is_active(member)]
        states = {member.entry.name: self.state.get(member.param, {}) for member in active}
        return {name: state["basis"] for name, state in states.items() if "basis" in state}

    def _is_probed(self) -> bool:
        """Whether this step() only asks for empty states, which a later load is to fill.

        `torch.distributed.checkpoint` does so, with rates and gradients of zero, where an
        optimizer has no state. Which states a checkpoint has, `prepare_load` knows.
        """
        if self.state or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        if self._before_load is not None:
            return True
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        return bool(grads) and not any(bool(distributed.local(g).any()) for g in grads)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; an exact refresh whose step was skipped starts over."""
        super().zero_grad(set_to_none)
        if self._awaits_bases:
            for member in self._members:
                if member.projection is not None:
                    member.projection.found = None

    def _build_buckets(self) -> list[_Bucket]:
        shared: dict[tuple[Any, ...], list[Member]] = {}
        for member in self._members:
            if self._is_active(member):
                weight = member.weight
                path = "dense" if member.side is None else type(member.projection).__name__
                sums = member.crosses and member.projection is None
                decays = weight.dim() >= 2
                key = (member.group["name"], weight.device, weight.dtype, path, sums, decays)
                shared.setdefault(key, []).append(member)
        return [_Bucket(members) for members in shared.values()]

    def _step_buckets(self, buckets: list[_Bucket]) -> bool:
        """Steps with every gradient that there is.

        Returns:
            Whether a block was trained.
        """
        trained = False
        stepped: list[tuple[_Bucket, _Ready, list[Tensor]]] = []
        states, before = self.state.values(), self._states_stepped
        # Looking at all states is faster than looking some up by their parameters.
        same = len(states) == len(before) and all(map(operator.is_, states, before))
        if not same or any(_is_replaced(bucket.ready) for bucket in buckets):
            self._drop_prepared()
        for bucket in buckets:
            sketched = self._sketching and bucket.projects and self._refresh_from_sketches(bucket)
            grads = list(map(_GRAD, bucket.params))
            have = bucket.everyone
            if any(map(operator.is_, grads, itertools.repeat(None))):
                have = tuple([i for i, grad in enumerate(grads) if grad is not None])
                grads = [grads[i] for i in have]
            trained |= bucket.block_weights and (bool(have) or sketched)
            if have:
                ready = bucket.ready
                if ready is None or ready.have != have or _has_moved(ready):
                    ready = bucket.ready = self._prepare(bucket, have)
                stepped.append((bucket, ready, grads))
        if not same or len(states) != len(before):
            self._states_stepped = list(states)
        self._count([ready for _, ready, _ in stepped])
        for bucket, ready, found in stepped:
            first = ready.members[0]
            group = first.group
            beta1, beta2 = group["betas"]
            self._device_lr(group, ready.flags.device)
            ready.step(
                self._inputs(bucket, ready.members, found),
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"] if bucket.decays else 0.0,
                scale=group["scale"],
                # torch has compared every `.grad` with the parameter.
                fitting=not bucket.spread,
            )
            if first.side is not None:
                self._grow_older(ready.states)
        return trained

    def _count(self, readies: list[_Ready]) -> None:
        """Counts the step, and what the one before skipped."""
        steps, clocks = [ready.steps for ready in readies], list(self._rng_steps.values())
        if self._counting is None or not self._counting.covers(steps, clocks):
            skipped, flags = [ready.skipped for ready in readies], [r.flags for r in readies]
            self._counting = ops.Counting(steps, skipped, flags, clocks)
        self._counting()

    def _inputs(self, bucket: _Bucket, members: list[Member], grads: list[Tensor]) -> list[Tensor]:
        """Gradients as the op takes them: G, or R, of this rank's part of each weight."""
        if not bucket.spread:
            if bucket.projects or not bucket.transposed:
                return grads
            return [m.logical(grad) for m, grad in zip(members, grads, strict=True)]
        if not bucket.projects:
            parts = [m.part(grad) for m, grad in zip(members, grads, strict=True)]
            return self._summed(members, parts) if bucket.sums else parts
        whole = [distributed.local(grad) for grad in grads]
        return [
            (R if m.spread is None else m.spread.part_of(R, m.cut("exp_avg"))).contiguous()
            for m, R in zip(members, whole, strict=True)
        ]

    def _summed(self, members: list[Member], parts: list[Tensor]) -> list[Tensor]:
        """R from parts of G: those of the projected side add up."""
        inputs = []
        for member, G in zip(members, parts, strict=True):
            dtype = torch.float64 if G.dtype == torch.float64 else torch.float32
            P = self._basis_part(member).to(dtype)
            inputs.append(P.mT @ G.to(dtype) if member.side == "left" else G.to(dtype) @ P)
        spread = members[0].spread
        assert spread is not None
        distributed.sum_together_(inputs, spread.shards)
        return inputs

    def _basis_part(self, member: Member) -> Tensor:
        """The rows of P that belong to this rank's part of the weight."""
        P = distributed.local(self.state[member.param]["basis"])
        if member.spread is None or not member.crosses:
            return P
        return member.spread.part_of(P, 0)

    def _prepare(self, bucket: _Bucket, have: tuple[int, ...]) -> _Ready:
        """Everything that a step of these members needs and that stays as it is until a refresh."""
        members = [bucket.members[i] for i in have]
        for member in members:
            state = self.state[member.param]
            if "step" not in state:
                state.update(self._new_state(member))
        first = members[0]
        if first.side is not None:
            due = [m for m in members if self.state[m.param].get("basis_age", -1) < 0]
            if first.projection is None:
                self._refresh(due)
            else:
                self._adopt_found(due)
        states = [self.state[member.param] for member in members]
        device = first.weight.device
        for member, state in zip(members, states, strict=True):
            if state["exp_avg"].device != device:
                raise ValueError(
                    f"state of {member.entry.name}: expected device {device}, where the weight is, "
                    f"got {state['exp_avg'].device}"
                )
        rng_step = self._device_clock(device)
        flags = torch.zeros(len(members), dtype=torch.int32, device=device)
        zero = torch.zeros((), dtype=torch.int32, device=device)
        before = [zero if member.skipped is None else member.skipped for member in members]
        last = [zero if member.flag is None else member.flag for member in members]
        skipped = torch.stack(before) + torch.stack(last)
        steps = torch.stack([state["step"] for state in states])
        for i, (member, state) in enumerate(zip(members, states, strict=True)):
            state["step"], member.skipped, member.flag = steps[i], skipped[i], flags[i]
        lr = self._device_lr(first.group, device)
        params = [member.part(member.weight.detach()) for member in members]
        moments = [state["exp_avg"] for state in states]
        exp_avgs = list(map(distributed.local, moments))
        exp_avg_sqs = [distributed.local(state["exp_avg_sq"]) for state in states]
        places: dict[str, list[int]] = {}
        if any(member.spread is not None for member in members):
            rows, columns = zip(*(member.place() for member in members), strict=True)
            places = {"first_rows": list(rows), "first_columns": list(columns)}
        stochastic = self.config.rounding == "stochastic"
        streams = [member.stream for member in members]
        if first.side is None:
            step = ops.prepare_adamw(
                params,
                [m.logical(M) for m, M in zip(members, exp_avgs, strict=True)],
                [m.logical(V) for m, V in zip(members, exp_avg_sqs, strict=True)],
                [state["step"] for state in states],
                lr,
                flags,
                rng_step,
                stochastic=stochastic,
                seed=self.config.seed,
                streams=streams,
                **places,
            )
        else:
            step = ops.prepare_lowrank_adam(
                params,
                [self._basis_part(member) for member in members],
                exp_avgs,
                exp_avg_sqs,
                [state["step"] for state in states],
                lr,
                flags,
                rng_step,
                sides=[member.side or "" for member in members],
                stochastic=stochastic,
                seed=self.config.seed,
                streams=streams,
                projected=first.projection is not None or bucket.sums,
                **places,
            )
        holders = [member.holder for member in members]
        addresses = [distributed.local(member.weight).data_ptr() for member in members]
        return _Ready(
            have, members, states, moments, holders, addresses, steps, skipped, flags, step
        )

    def _new_state(self, member: Member) -> dict[str, Any]:
        shape, dtype = member.moment_spec(self.config)
        device = member.weight.device
        state: dict[str, Any] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": member.zeros("exp_avg", shape, dtype),
            "exp_avg_sq": member.zeros("exp_avg_sq", shape, dtype),
        }
        if member.side is not None:
            # Minus one: no basis, or one that is due to be computed anew.
            state["basis_age"] = self.state[member.param].get("basis_age", -1)
        return state

    def _grow_older(self, states: list[dict[str, Any]]) -> None:
        """Counts a step of bases and makes those due whose time is up."""
        due = False
        for state in states:
            age = state["basis_age"] + 1
            if age >= self.config.refresh_interval:
                age, due = -1, True
            state["basis_age"] = age
        if due:
            self._drop_prepared()

    def _forget_buckets(self) -> None:
        self._buckets = None
        self._states_stepped = []

    def _drop_prepared(self) -> None:
        """Forgets what was made ready for bases and moments that are new or due now."""
        self._modes_step = -1
        for bucket in self._buckets or ():
            bucket.ready = None

    def _refresh(self, members: list[Member]) -> None:
        """Computes the bases of members that are due, from their gradients."""
        alone = [member for member in members if member.spread is not None]
        for member in alone:
            # Gathered one by one: only one whole gradient is in memory at a time.
            G = member.logical(distributed.whole(_grad(member)))
            self._adopt([member], *self._refresh_bases([member], [G]))
        members = [member for member in members if member.spread is None]
        if members:
            grads = [member.logical(_grad(member)) for member in members]
            self._adopt(members, *self._refresh_bases(members, grads))

    def _refresh_from_sketches(self, bucket: _Bucket) -> bool:
        """Computes bases from Y = G Omega (left) or Omega^T G (right), which the backward left.

        The leading left (right) singular vectors of Y are nearly those of G (Halko et al., arXiv
        0909.4061, section 4.1). Y is no gradient to step with: these weights rest for this step.

        Returns:
            Whether there was a sketch.
        """
        members = [m for m in bucket.members if m.sketches and m.grad is not None]
        shapes: dict[torch.Size, list[Member]] = {}
        for member in members:
            shapes.setdefault(_grad(member).shape, []).append(member)
        for alike in shapes.values():
            for start in range(0, len(alike), _SKETCHES):
                some = alike[start : start + _SKETCHES]
                sketches = [distributed.local(_grad(m)) for m in some]
                self._adopt(some, *self._refresh_bases(some, sketches))
                self._grow_older([self.state[member.param] for member in some])
                for member in some:
                    if member.sketch is not None:
                        member.sketch.grad = None
        return bool(members)

    def _refresh_bases(
        self, members: list[Member], matrices: list[Tensor]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        config = self.config
        return projection.refresh_bases(
            matrices,
            [member.rank for member in members],
            [member.side or "" for member in members],
            [_local_basis(self.state[member.param]) for member in members],
            [
                projection.matrix_seed(config.seed, self._steps, member.entry.name)
                for member in members
            ],
            method=config.basis,
            power_iterations=config.power_iterations,
            oversampling=config.oversampling,
        )

    def _adopt_found(self, members: list[Member]) -> None:
        """Takes over the bases that an exact refresh found in the backward pass."""
        members = [
            m for m in members if m.projection is not None and m.projection.found is not None
        ]
        if members:
            found = [m.projection.found for m in members if m.projection is not None]
            bases, energies, finite = zip(*(f for f in found if f is not None), strict=True)
            self._adopt(members, list(bases), torch.stack(energies), torch.stack(finite))

    def _adopt(
        self, members: list[Member], new: list[Tensor], energies: Tensor, finite: Tensor
    ) -> None:
        """Makes new bases the members' bases, and their moments fit (`on_refresh`)."""
        config = self.config
        for i, member in enumerate(members):
            state = self.state[member.param]
            before = _local_basis(state)
            P = new[i].to(member.weight.dtype)
            has_moments = "step" in state
            if before is None and has_moments:
                # Without a basis the whole matrix is skipped: t must not count this step.
                state["step"].sub_((~finite[i]).to(state["step"].dtype))
            elif before is not None and has_moments and config.on_refresh == "transport":
                M = distributed.local(state["exp_avg"])
                moved = projection.transport(M, before, P, member.side or "")
                M.copy_(torch.where(finite[i], moved, M))
            elif before is not None and has_moments and config.on_refresh == "reset":
                for key in ("exp_avg", "exp_avg_sq", "step"):
                    distributed.local(state[key]).masked_fill_(finite[i], 0)
            if member.spread is not None:
                P = member.spread.wrap(P, tuple(P.shape), None)
            state["basis"] = P
            state["basis_age"] = 0
            self._energy[member.entry.name] = energies[i]
        self._drop_prepared()
        self._pending.append((members, projection.DeferredFlags(finite)))

    def _read_pending(self) -> None:
        """Makes due again every basis whose last gradient turned out not to be finite."""
        sketched = []
        for members, flags in self._pending:
            for member, finite in zip(members, flags.read(), strict=True):
                if not finite and member.param in self.state:
                    self.state[member.param]["basis_age"] = -1
                    self._drop_prepared()
                    if member.sketch is not None:
                        sketched.append(member.entry.name)
        self._pending.clear()
        if sketched:
            # A member that steps counts its own.
            self._lost_sketches.update(sketched)
            self._warn_once(
                f"non-finite gradients in a step that sketches: {len(sketched)} weights (such as "
                f"{sketched[0]}) have no new basis, and rest until a sketch is finite"
            )

    def _device_clock(self, device: torch.device) -> Tensor:
        """The number of steps taken, on a device: right once the present one is counted."""
        if device not in self._rng_steps:
            clock = torch.full((), self._steps - 1, dtype=torch.int32, device=device)
            self._rng_steps[device] = clock
        return self._rng_steps[device]

    def _device_lr(self, group: dict[str, Any], device: torch.device) -> Tensor:
        key = (group["name"], device)
        if key not in self._lrs:
            self._lrs[key] = (torch.zeros((), dtype=torch.float64, device=device), 0.0)
        tensor, held = self._lrs[key]
        lr = group["lr"]
        if isinstance(lr, Tensor):
            # A CUDA graph of step() that is replayed reads it anew.
            tensor.copy_(lr, non_blocking=True)
            self._lrs[key] = (tensor, math.nan)
        elif lr != held:
            tensor.fill_(lr)
            self._lrs[key] = (tensor, lr)
        return tensor

    def _report_skipped(self) -> None:
        """Warns of the non-finite gradients that a draw counted, and forgets its counts."""
        counts: dict[str, int] = {}
        for counted, numbers in self._skips:
            found = zip(counted, numbers.read(), strict=True)
            counts.update((name, number) for name, number in found if number)
        self._skips.clear()
        total = sum(counts.values())
        if total > self._reported_skips:
            names = ", ".join(list(counts)[:3])
            warnings.warn(
                f"owlore: non-finite gradients were skipped in {total - self._reported_skips} "
                f"updates of single parameters since the last draw (such as {names}); their "
                "weights and moments were left as they were",
                stacklevel=5,
            )
            self._reported_skips = total

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"owlore: {message}", stacklevel=5)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: the groups are complete from the start.

        Raises:
            ValueError: Always, once the optimizer is built.
        """
        if getattr(self, "_sealed", False):
            raise ValueError(
                "OwLore's parameter groups are complete from the start; train further parameters "
                "with an optimizer of their own"
            )
        super().add_param_group(param_group)

    # Copies and checkpoints.

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is unpickled, trains a copy of the model: the same one in a pair."""
        if self._detached:
            raise TypeError("this OwLore optimizer was detached from its model; there is no copy")
        config = self.config if self._scores is None else self.config.replace(scores=self._scores)
        return _rebuilt, (self._model, config, self.state_dict())

    def __copy__(self) -> OwLore:
        raise TypeError(
            "an OwLore optimizer belongs to its model: copy both, copy.deepcopy((model, optimizer))"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact resume needs, as plain tensors, numbers, strings and lists.

        Counters, probabilities and options stand in `param_groups[0]["owlore"]`.
        """
        self._read_pending()
        if self.config.state == "offload":
            for device in {member.weight.device for member in self._members}:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        saved = super().state_dict()
        saved["param_groups"][0][_CHECKPOINT] = {
            "version": _VERSION,
            "steps": self._steps,
            "drawn": self._drawn,
            "accumulates": self._accumulates,
            "probabilities": self.probabilities,
            "scores": self._scores,
            "config": _bound_options(self.config),
        }
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a `state_dict()`: dtypes are kept, tensors are copied to their devices.

        Everything is checked before anything changes.

        Raises:
            ValueError: The checkpoint is damaged, comes from another optimizer or model, or was
                made with other options.
        """
        try:
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                replaced = hook(self, state_dict)
                state_dict = state_dict if replaced is None else replaced
            counters, states = self._check_checkpoint(state_dict)
        except Exception:
            self._undo_prepare()
            raise
        self._set_counters(counters)
        self._set_gradient_dtype()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own = ("params", "param_names", "name", _CHECKPOINT)
            group.update({k: v for k, v in saved.items() if k not in own})
            group["betas"] = tuple(group["betas"])
        self.state.clear()
        for member, saved_state in states:
            away = self.config.state == "offload" and not self._is_active(member)
            device = torch.device("cpu") if away else member.weight.device
            self.state[member.param] = {
                key: member.adopted(key, value, device) if isinstance(value, Tensor) else value
                for key, value in saved_state.items()
            }
            if away:
                self._move_state(member, _to_host)
        if self._before_load is not None:
            for param, flag in self._before_load.flags:
                param.requires_grad_(flag)
            self._before_load = None
        self._reported_skips = 0
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _set_counters(self, counters: dict[str, Any]) -> None:
        """Goes to the step of a checkpoint."""
        self._p = np.array(counters["probabilities"])
        self._scores = counters["scores"]
        self._steps, self._drawn = counters["steps"], counters["drawn"]
        self._active = self._draw(self._drawn) if self._drawn >= 0 else ()
        self._accumulates = bool(counters.get("accumulates", False))
        self._forget_derived()

    def _forget_derived(self) -> None:
        """Drops what was worked out for another step."""
        self._flags_applied = self._drawn < 0
        self._modes_step = -1
        self._forget_buckets()
        self._pending.clear()
        self._skips.clear()
        self._lost_sketches.clear()
        self._energy.clear()
        self._rng_steps.clear()
        for member in self._members:
            member.skipped = member.flag = None

    @torch.no_grad()
    def prepare_load(self, checkpoint: Any) -> None:
        """See `owlore.prepare_load`."""
        saved = checkpoints.read(checkpoint)
        self._check_header(saved.counters)
        members = {m.key: m for m in self._members} | {m.entry.name: m for m in self._members}
        states = []
        for name, state in saved.states.items():
            member = members.get(blocks.clean_name(name))
            if member is None:
                raise ValueError(f"checkpoint: state of unknown parameter {name!r}")
            member.check_state(state, self.config)
            states.append((member, state))
        self._undo_prepare()
        params = [param for member in self._members for param in member.takers]
        self._before_load = _Before(
            {name: getattr(self, name) for name in _COUNTERS},
            dict(self.state),
            [(param, param.requires_grad) for param in params],
        )
        self._set_counters(saved.counters)
        self.state.clear()
        for param in params:
            # Distributed loading takes the state of what requires a gradient and of nothing else.
            param.requires_grad_(False)
            param.grad = None
        for member, state in states:
            member.param.requires_grad_(True)
            self.state[member.param] = {
                key: member.zeros(key, tuple(value.shape), value.dtype)
                if isinstance(value, Tensor)
                else value
                for key, value in state.items()
            }

    def _undo_prepare(self) -> None:
        """Goes back to before `prepare_load`, if nothing was loaded since."""
        if self._before_load is None:
            return
        before, self._before_load = self._before_load, None
        for name, value in before.fields.items():
            setattr(self, name, value)
        self.state.clear()
        self.state.update(before.state)
        for param, flag in before.flags:
            param.requires_grad_(flag)
        self._forget_derived()

    def _abandon_load(self) -> None:
        if self._before_load is not None:
            self._warn_once(
                "prepare_load() was called, and no state was loaded: training goes on "
                "from where it was"
            )
            self._undo_prepare()

    def _check_header(self, counters: dict[str, Any]) -> None:
        """Checks what does not depend on the states."""
        if not isinstance(counters, dict) or counters.get("version") != _VERSION:
            version = counters.get("version") if isinstance(counters, dict) else counters
            raise ValueError(f"checkpoint: expected version {_VERSION}, got {version!r}")
        mine, theirs = _bound_options(self.config), counters.get("config", {})
        different = [
            f"{name} (checkpoint {theirs.get(name)!r}, here {mine[name]!r})"
            for name in mine
            if theirs.get(name) != mine[name]
        ]
        if different:
            raise ValueError(
                f"checkpoint: made with other options: {', '.join(different)}; resume with the "
                "same options, or start a new optimizer from the saved weights"
            )
        self._check_counters(counters)

    def _check_checkpoint(
        self, state_dict: dict[str, Any]
    ) -> tuple[dict[str, Any], list[tuple[Member, dict[str, Any]]]]:
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
            raise ValueError("checkpoint: expected a dict with 'state' and 'param_groups'")
        saved_groups = state_dict["param_groups"]
        if not saved_groups or not saved_groups[0].get(_CHECKPOINT):
            raise ValueError("checkpoint: not written by OwLore (no 'owlore' entry in its groups)")
        counters = saved_groups[0][_CHECKPOINT]
        self._check_header(counters)
        by_id: dict[int, Member] = {}
        members = {id(member.param): member for member in self._members}
        names = [group["name"] for group in self.param_groups]
        saved_names = [group.get("name") for group in saved_groups]
        if saved_names != names:
            raise ValueError(f"checkpoint: expected groups {names}, got {saved_names}")
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            expected, got = group["param_names"], saved.get("param_names")
            if got != expected:
                odd = next((a for a in got or () if a not in set(expected)), "another order")
                raise ValueError(
                    f"checkpoint: parameters of group {group['name']!r} are not this model's "
                    f"({len(got or ())} against {len(expected)}; the first difference: {odd})"
                )
            for param, number in zip(group["params"], saved["params"], strict=True):
                if id(param) in members:
                    by_id[number] = members[id(param)]
        states = []
        for number, state in state_dict["state"].items():
            if not state:
                # A flattened distributed checkpoint has empty states of what has none.
                continue
            if number not in by_id:
                raise ValueError(f"checkpoint: state of unknown parameter {number!r}")
            member = by_id[number]
            member.check_state(state, self.config)
            states.append((member, state))
        return counters, states

    def _check_counters(self, counters: dict[str, Any]) -> None:
        n = len(self._p)
        for name, least in (("steps", 0), ("drawn", -1)):
            value = counters.get(name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"checkpoint: {name}: expected a number >= {least}, got {value!r}")
        p = counters.get("probabilities")
        if not isinstance(p, list) or len(p) != n or abs(sum(p) - 1) > 1e-6 or min(p) < 0:
            raise ValueError(f"checkpoint: probabilities: expected {n} that sum to 1, got {p!r}")
        if any(abs(a - b) > 1e-9 for a, b in zip(p, self._p, strict=True)):
            warnings.warn(
                "owlore: the checkpoint was made with other block probabilities (other scores); "
                "the checkpoint's are used",
                stacklevel=5,
            )


def _bound_options(config: OwLoreConfig) -> dict[str, Any]:
    """The options that a checkpoint and the optimizer that loads it must have in common."""
    if callable(config.distribution) and not importable(config.distribution):
        # A function without a name cannot be compared; its probabilities are saved and compared.
        config = config.replace(distribution="uniform")
    plain = config.to_dict()
    return {name: plain[name] for name in plain if name not in _FREE_OPTIONS}


def _earlier_hooks(owner: nn.Module) -> dict[int, _DrawHook]:
    """Hooks that earlier optimizers of this model, or of the model it is a copy of, left on it."""
    hooks = owner._forward_pre_hooks.items()
    return {key: hook for key, hook in hooks if isinstance(hook, _DrawHook)}


def _local_basis(state: dict[str, Any]) -> Tensor | None:
    basis = state.get("basis")
    return None if basis is None else distributed.local(basis)


def _stacked(values: dict[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Tensors of no dimension as one vector a device, with their names."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in values.items():
        by_device.setdefault(value.device, {})[name] = value
    return [(list(some), torch.stack(list(some.values()))) for some in by_device.values()]


def _read_together(values: dict[str, Tensor]) -> dict[str, Any]:
    """The values of tensors of no dimension, with one transfer a device."""
    read: dict[str, Any] = {}
    for names, stacked in _stacked(values):
        read.update(zip(names, stacked.tolist(), strict=True))
    return read


def _has_moved(ready: _Ready) -> bool:
    """Whether a weight is no longer where it was."""
    held = map(_WEIGHT, ready.holders)
    if ready.members[0].spread is not None:
        held = map(distributed.local, held)
    return list(map(Tensor.data_ptr, held)) != ready.addresses


def _is_replaced(ready: _Ready | None) -> bool:
    """Whether a state's tensors are no longer those of the prepared step."""
    if ready is None:
        return False
    return not all(map(operator.is_, map(_MOMENT, ready.states), ready.moments))


def _grad(member: Member) -> Tensor:
    grad = member.grad
    assert grad is not None
    return grad


def _bytes(tensor: Tensor) -> int:
    tensor = distributed.local(tensor)
    return tensor.numel() * tensor.element_size()


def _to_host(value: Tensor) -> Tensor:
    """A copy in host memory, pinned where there is a GPU."""
    if distributed.is_dtensor(value):
        return value.to("cpu")
    host = torch.empty_like(value, device="cpu", pin_memory=torch.cuda.is_available())
    return host.copy_(value, non_blocking=True)


def _rebuilt(model: nn.Module, config: OwLoreConfig, state_dict: dict[str, Any]) -> OwLore:
    """A copied or unpickled optimizer."""
    optimizer = OwLore(model, config)
    optimizer.load_state_dict(state_dict)
    return optimizer


def prepare_load(optimizer: Any, checkpoint: Any) -> None:
    """Gets an optimizer ready for state that `torch.distributed.checkpoint` is to load.

    Distributed loading fills the states that an optimizer has, and which blocks have one, their
    checkpoint alone knows. Call this between building the optimizer and `get_optimizer_state_dict`
    or `set_optimizer_state_dict`; plain `load_state_dict` needs no preparation. If nothing is
    loaded then, the optimizer goes back to what it was at the next training step.

    Args:
        optimizer: An `OwLore`, or a wrapper with it as `optimizer` (accelerate's).
        checkpoint: An optimizer's state dict, a file of one, a folder of
            `torch.distributed.checkpoint`, or a trainer's checkpoint folder.

    Raises:
        TypeError: The optimizer is no `OwLore`.
        ValueError: The checkpoint is damaged, or does not fit; the optimizer is unchanged.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, OwLore):
        raise TypeError(f"optimizer: expected an OwLore, got {type(optimizer).__name__}")
    inner.prepare_load(checkpoint)
