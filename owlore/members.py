"""The parameters that `OwLore` trains: which they are, how each trains, what state it has."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from owlore import blocks, distributed, projected, projection
from owlore.config import OwLoreConfig

# A model of whose block weights less than this share trains is warned of.
_LEAST_SHARE = 0.9


class Member:
    """One trained parameter: where it belongs and how it trains.

    `param` is what autograd fills with a gradient and the optimizer's groups and state know: the
    parameter itself, or the coordinates of a layer that computes R in its backward. `sketch` is
    that layer's other parameter, which takes a gradient in their place where a basis is sketched.
    """

    __slots__ = (
        "always",
        "entry",
        "flag",
        "group",
        "param",
        "projection",
        "rank",
        "side",
        "sketch",
        "skipped",
        "spread",
        "stream",
    )

    def __init__(self, entry: blocks.Entry, side: str | None, rank: int, projects: bool) -> None:
        self.entry = entry
        self.param: nn.Parameter = entry.param
        self.sketch: nn.Parameter | None = None
        self.side = side
        self.rank = rank
        # In the projected path `install` puts the layer's own in its place.
        self.projection = projected.Projection(side or "", rank) if projects else None
        self.always = entry.block is None
        self.stream = zlib.crc32(entry.name.encode())
        self.group: dict[str, Any] = {}
        # Steps before the last one in which non-finite gradients were skipped, and whether the last
        # one skipped some, on the weight's device. [], int32.
        self.skipped: Tensor | None = None
        self.flag: Tensor | None = None
        # How FSDP2 spreads the weight.
        self.spread = distributed.spread_of(entry.name, entry.param)

    @property
    def split(self) -> int | None:
        """Dimension of the weight as [out, in] that is cut into parts: 0, 1 or None."""
        if self.spread is None:
            return None
        return 1 if self.entry.transposed else 0

    @property
    def crosses(self) -> bool:
        """Whether the cut goes through the projected side: each rank has some rows of P only."""
        return self.split is not None and (self.side == "left") == (self.split == 0)

    def cut(self, key: str) -> int | None:
        """Dimension along which a tensor of its state is cut, or None for whole ones."""
        if self.split is None or key == "basis":
            return None
        if self.side is None:
            return 0
        return None if self.crosses else self.split

    def place(self) -> tuple[int, int]:
        """Row and column of the whole weight with which this rank's part begins."""
        if self.spread is None:
            return 0, 0
        shape, first = self.entry.param.shape, self.spread.first
        if self.split == 1 or len(shape) < 2:
            return 0, first
        return first * math.prod(shape[1:-1]), 0

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor as the parameter is stored, seen as [out, in]."""
        return self.logical(distributed.local(tensor))

    @property
    def holder(self) -> Mapping[str, Any]:
        """Where `weight` is looked up, under that name."""
        if self.projection is None or self.entry.module is None or self.spread is not None:
            # FSDP2's own parameter, even while what it gathered stands in its place.
            return {"weight": self.entry.param}
        return self.entry.module._parameters

    @property
    def weight(self) -> Tensor:
        """The parameter that is updated, as its module holds it now."""
        return cast(Tensor, self.holder["weight"])

    @property
    def key(self) -> str:
        """Name of the parameter that has the state."""
        if self.projection is None:
            return self.entry.name
        return f"{self.entry.name.rpartition('.')[0]}.{blocks.COORDINATES}"

    @property
    def sketches(self) -> bool:
        """Whether its gradient is a sketch until the next step()."""
        return self.projection is not None and self.projection.mode == projected.SKETCH

    @property
    def grad(self) -> Tensor | None:
        """Its gradient, R or sketch."""
        return self.sketch.grad if self.sketches and self.sketch is not None else self.param.grad

    @property
    def takers(self) -> list[nn.Parameter]:
        """The parameters that take its gradients."""
        return [self.param] if self.sketch is None else [self.param, self.sketch]

    def install(self, config: OwLoreConfig) -> None:
        """Makes the layer compute R."""
        module = self.entry.module
        if self.projection is None or module is None:
            return
        # Embedding and head always sketch: G of either is the largest tensor of all.
        columns = 0
        if config.refresh == "sketch" or self.always:
            columns = min(config.sketch_columns * self.rank, *self.entry.shape)
        dtype = self.gradient_dtype(config, accumulates=False)
        layer = projected.install(
            module, self.side or "", self.rank, columns, self.entry.shape, dtype, self.spread
        )
        layer.recipe = (config.basis, config.power_iterations, config.oversampling)
        self.projection = layer
        self.param = cast(nn.Parameter, module._parameters[blocks.COORDINATES])
        self.sketch = module._parameters.get(blocks.SKETCH)

    def logical(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as [out, in] (a view)."""
        return tensor.mT if self.entry.transposed else tensor

    def gradient_dtype(self, config: OwLoreConfig, accumulates: bool) -> torch.dtype:
        """Dtype of R."""
        if self.weight.dtype == torch.float64:
            return torch.float64
        if self.spread is not None:
            # A DTensor's dtype cannot change once a step accumulates.
            return torch.float32
        return torch.bfloat16 if config.moments == "bf16" and not accumulates else torch.float32

    def moment_spec(self, config: OwLoreConfig) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of its moments."""
        dtype = self.weight.dtype
        if dtype == torch.float64:
            moments = torch.float64
        elif self.entry.role == blocks.BLOCKS or self.side is not None:
            moments = torch.bfloat16 if config.moments == "bf16" else torch.float32
        else:
            auto = config.dense_moments == "auto" and dtype == torch.bfloat16
            moments = torch.bfloat16 if auto or config.dense_moments == "bf16" else torch.float32
        if self.side is None:
            return tuple(self.weight.shape), moments
        m, n = self.entry.shape
        return ((self.rank, n) if self.side == "left" else (m, self.rank)), moments

    def check_state(self, state: dict[str, Any], config: OwLoreConfig) -> None:
        """Checks a loaded state.

        Raises:
            ValueError: It has other keys, shapes or dtypes than its own would have.
        """
        name = self.entry.name
        shape, dtype = self.moment_spec(config)
        expected = {
            "step": ((), torch.float32),
            "exp_avg": (shape, dtype),
            "exp_avg_sq": (shape, dtype),
        }
        if self.side is not None:
            m, n = self.entry.shape
            rows = m if self.side == "left" else n
            expected["basis"] = ((rows, self.rank), self.weight.dtype)
        ages = {"basis_age"} if self.side is not None else set()
        if isinstance(state, dict) and set(state) == {"basis", "basis_age"} and ages:
            # A sketch was taken and no step since.
            expected = {"basis": expected["basis"]}
        if not isinstance(state, dict) or set(state) != set(expected) | ages:
            keys = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"checkpoint: {name}: expected {sorted(set(expected) | ages)}, got {keys}"
            )
        for key, (want_shape, want_dtype) in expected.items():
            value = state[key]
            got = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
            if got != (want_shape, want_dtype):
                want = (want_shape, want_dtype)
                raise ValueError(f"checkpoint: {name}.{key}: expected {want}, got {got}")
        if ages and not isinstance(state["basis_age"], int):
            raise ValueError(f"checkpoint: {name}.basis_age: expected a number")

    def zeros(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros for a tensor of its state, spread over ranks if the weight is."""
        device = self.weight.device
        if self.spread is None or not shape:
            return torch.zeros(shape, dtype=dtype, device=device)
        return self.spread.zeros(shape, dtype, device, self.cut(key))

    def adopted(self, key: str, value: Tensor, device: torch.device) -> Tensor:
        """A copy of a loaded tensor of its state, spread over ranks if the weight is."""
        if self.spread is None or not value.shape:
            return distributed.whole(value).detach().to(device, copy=True)
        return self.spread.adopt(value, device, self.cut(key))


def choose_members(
    layout: blocks.Layout,
    config: OwLoreConfig,
    trainable: dict[str, bool],
    ranks: Sequence[int] | None,
) -> tuple[list[Member], dict[str, str]]:
    """The parameters that train, in the model's order, each with side and rank.

    Args:
        layout: Where the model's parameters are.
        config: The options.
        trainable: Whether each parameter may train, by name.
        ranks: Rank of each block's matrices, or None for the same in all.

    Returns:
        The members; and why the gradient of a low-rank weight is formed all the same, by name.
    """
    if layout.tied:
        if config.embeddings != config.head:
            raise ValueError(
                "head: the LM head shares its weight with the embedding in this model, so "
                f"embeddings and head must be the same, got {config.embeddings!r} and "
                f"{config.head!r}"
            )
        if config.head == "lowrank":
            raise ValueError(
                "head: 'lowrank' is not possible where the LM head shares its weight with the "
                "embedding; use 'full' or 'freeze'"
            )
    policy = {
        blocks.BLOCKS: "full" if config.rank is None else "lowrank",
        blocks.BLOCK_NORMS: config.norms,
        blocks.EMBEDDINGS: config.embeddings,
        blocks.HEAD: config.head,
        # New weights, as a rule.
        blocks.CLASSIFIER: "full",
        blocks.NORM: config.norms,
        blocks.OTHER: config.other,
    }
    sides = _sides(layout, config.side)
    members = []
    dense = {}
    for entry in layout.entries:
        choice = policy[entry.role]
        if choice == "freeze" or not trainable[entry.name]:
            continue
        if choice == "lowrank" and entry.param.dim() == 2:
            if config.rank is None:
                raise ValueError(f"rank: {entry.role}='lowrank' needs a rank, got None")
            own = config.rank if ranks is None or entry.block is None else ranks[entry.block]
            rank = min(own, *entry.param.shape)
            obstacle = None
            if config.gradient == "projected":
                obstacle = projected.obstacle(entry.module)
                if obstacle is not None:
                    dense[entry.name] = obstacle
            projects = config.gradient == "projected" and obstacle is None
            members.append(Member(entry, sides[id(entry.param)], rank, projects))
        else:
            members.append(Member(entry, None, 0, False))
    if not any(member.entry.role == blocks.BLOCKS for member in members):
        raise ValueError(
            "model: every linear weight of its blocks has requires_grad=False, so there is nothing "
            "to train; call model.requires_grad_(True), or detach() the optimizer used before"
        )
    _refuse_offloaded(layout, members)
    return members, dense


def _refuse_offloaded(layout: blocks.Layout, members: list[Member]) -> None:
    """Raises ValueError for weights that accelerate brings from host memory or disk by hooks."""
    modules = (module for block in layout.blocks for module in block.modules())
    away = [member.entry.name for member in members if member.entry.param.is_meta]
    if away and any(hasattr(module, "_hf_hook") for module in modules):
        raise ValueError(
            f"model: {len(away)} weights to train are not on a device but offloaded to host memory "
            f"or disk (such as {away[0]}), where no update reaches them; load the model with a "
            "device_map that has no 'cpu' or 'disk' beside GPUs"
        )


def _sides(layout: blocks.Layout, side: str) -> dict[int, str]:
    """Projected side of each matrix; "auto" decides once for layers that may share an input.

    Layers share an input if they hang on the same parent and have as many in features; they are
    taken as one stacked weight [sum of m, n], whose "std" side all of them get.
    """
    stacked: dict[tuple[int | None, tuple[str, int] | None], int] = {}
    matrices = [entry for entry in layout.entries if entry.param.dim() == 2]
    for entry in matrices:
        key = (entry.block, entry.siblings)
        stacked[key] = stacked.get(key, 0) + entry.shape[0]
    sides = {}
    for entry in matrices:
        m, n = entry.shape
        if side == "auto":
            if entry.siblings is not None:
                m = stacked[(entry.block, entry.siblings)]
            sides[id(entry.param)] = projection.choose_side(m, n, "std")
        else:
            sides[id(entry.param)] = projection.choose_side(m, n, side)
    return sides


def without_frozen_blocks(p: np.ndarray, members: list[Member]) -> np.ndarray:
    """Probabilities over the blocks that have a weight to train."""
    trains = np.zeros(len(p), dtype=bool)
    for member in members:
        if member.entry.role == blocks.BLOCKS:
            trains[member.entry.block] = True
    left = np.where(trains, p, 0.0)
    if left.sum() == 0:
        raise ValueError(
            "scores: every block with a probability above 0 has requires_grad=False in all of its "
            "linear weights"
        )
    return left / left.sum() if not trains.all() else p


def param_groups(members: list[Member], config: OwLoreConfig) -> list[dict[str, Any]]:
    """The optimizer's groups, one for each role."""
    groups = []
    for role in blocks.ROLES:
        params = []
        for member in (m for m in members if m.entry.role == role):
            params.append((member.entry.name, member.param))
            if member.sketch is not None:
                params.append((f"{member.entry.name}.sketch", member.sketch))
        lowrank = any(m.side is not None for m in members if m.entry.role == role)
        dense = role != blocks.BLOCKS and not lowrank and config.dense_lr is not None
        if params:
            groups.append(
                {
                    "params": params,
                    "name": role,
                    "lr": config.dense_lr if dense else config.lr,
                    "betas": config.betas,
                    "eps": config.eps,
                    "weight_decay": config.weight_decay,
                    "scale": config.scale,
                }
            )
    return groups


def warn_of_small_share(layout: blocks.Layout) -> None:
    """Warns of a model of whose block weights few fit the scheme, such as 3-D expert stacks."""
    inside = [e for e in layout.entries if e.block is not None and e.param.dim() >= 2]
    others = [entry for entry in inside if entry.role != blocks.BLOCKS]
    total = sum(entry.param.numel() for entry in inside)
    fits = total - sum(entry.param.numel() for entry in others)
    if fits < _LEAST_SHARE * total:
        kinds = sorted({_pattern(entry.name) for entry in others})
        warnings.warn(
            f"owlore: only {fits:,} of the blocks' {total:,} weights ({fits / total:.0%}) fit the "
            f"scheme; the others are {', '.join(kinds)}",
            stacklevel=3,
        )


def describe(
    layout: blocks.Layout,
    members: list[Member],
    config: OwLoreConfig,
    gamma: int,
    dense: dict[str, str],
) -> list[str]:
    """What trains how, what is frozen, and which ranks were clamped; one line each.

    Args:
        layout: Where the model's parameters are.
        members: Those that train.
        config: The options.
        gamma: How many blocks train at a time.
        dense: Why the gradient of a low-rank weight is formed all the same, by name.
    """
    return [*_describe_roles(layout, members, config, gamma), *_describe_paths(members, dense)]


def _describe_roles(
    layout: blocks.Layout, members: list[Member], config: OwLoreConfig, gamma: int
) -> list[str]:
    count = len(layout.blocks)
    drawn = f"{gamma} train at a time, drawn every {config.interval} steps"
    lines = [
        f"{count} decoder blocks in {layout.blocks_path}, "
        + ("all train" if gamma == count else drawn)
    ]
    by_param = {id(member.entry.param): member for member in members}
    for role in blocks.ROLES:
        entries = [entry for entry in layout.entries if entry.role == role]
        if not entries:
            continue
        low = [e for e in entries if (m := by_param.get(id(e.param))) and m.side is not None]
        dense = [e for e in entries if (m := by_param.get(id(e.param))) and m.side is None]
        frozen = [e for e in entries if id(e.param) not in by_param]
        parts = [
            f"{len(found)} {how} ({sum(e.param.numel() for e in found):,} weights)"
            for found, how in ((low, "low-rank"), (dense, "dense"), (frozen, "frozen"))
            if found
        ]
        lines.append(f"{role}: {', '.join(parts)}")
        if frozen and role in (blocks.OTHER, blocks.BLOCKS):
            kinds = sorted({_pattern(entry.name) for entry in frozen})
            lines.append(f"{role}: not trained: {', '.join(kinds)}")
    trained = {m.entry.block for m in members if m.entry.role == blocks.BLOCKS}
    idle = sorted(set(range(len(layout.blocks))) - trained)
    if idle:
        numbers = ", ".join(map(str, idle))
        lines.append(f"not trained, and never drawn: blocks {numbers}, whose weights are frozen")
    groups = param_groups(members, config)
    if config.dense_lr is not None and all(group["lr"] != config.dense_lr for group in groups):
        lines.append("dense_lr has no effect: what it is for is not trained, or in low rank")
    if config.rank is not None and config.rank_distribution != "even":
        ranks = [0] * len(layout.blocks)
        for member in members:
            if member.entry.block is not None:
                ranks[member.entry.block] = max(ranks[member.entry.block], member.rank)
        text = ", ".join(map(str, ranks))
        lines.append(f"rank of each block: {text}; less where a weight's smaller side is less")
        return lines
    clamped: dict[str, int] = {}
    for member in members:
        if config.rank is not None and member.side is not None and member.rank < config.rank:
            clamped[_pattern(member.entry.name)] = member.rank
    for pattern, rank in clamped.items():
        lines.append(f"rank {config.rank} is above the smaller side of {pattern}: {rank} is used")
    return lines


def _describe_paths(members: list[Member], dense: dict[str, str]) -> list[str]:
    """How many low-rank weights form no gradient, and which do, and why."""
    lines = []
    projects = sum(member.projection is not None for member in members)
    if projects:
        lines.append(f"{projects} weights take the projected path: their gradient is never formed")
    reasons: dict[tuple[str, str], int] = {}
    for name, reason in dense.items():
        key = (_pattern(name), reason)
        reasons[key] = reasons.get(key, 0) + 1
    for (pattern, reason), count in reasons.items():
        lines.append(f"{count} weights take the dense gradient path: {pattern} ({reason})")
    return lines


def _pattern(name: str) -> str:
    """A parameter's name with '*' for the numbers in it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
