"""The optimizer against independent compositions; state, refresh, resume, faults."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import tiny_models
import tolerances
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from owlore import OwLore, ops, projection
from owlore.config import GRADIENTS, PRESETS, REFRESHES, OwLoreConfig

SCORES = [0.1, 0.4, 0.2, 0.3]
# The dense gradient path; tests/test_projected.py holds the projected one to it.
SMALL: dict[str, Any] = {
    "blocks": 2,
    "rank": 4,
    "interval": 3,
    "scores": SCORES,
    "gradient": "dense",
    "embeddings": "full",
    "head": "full",
    "norms": "full",
}


def batch(step: int, micro: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randint(0, 64, (2, 12), generator=generator)


def train_step(model: nn.Module, optimizer: OwLore, step: int, accumulation: int = 1) -> None:
    for micro in range(accumulation):
        ids = batch(step, micro)
        (model(ids, labels=ids).loss / accumulation).backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def in_block(name: str, blocks: tuple[int, ...]) -> bool:
    return any(name.startswith(f"model.layers.{i}.") for i in blocks)


# Parity with independent compositions.


class Composition:
    """OwLore out of torch.optim.AdamW, torch.linalg.svd and numpy, for a LLaMA in float64."""

    def __init__(self, model: nn.Module, config: OwLoreConfig) -> None:
        self.model, self.config = model, config
        p = np.array(config.scores) / np.sum(config.scores)
        self.p = (1 - config.floor) * p + config.floor / len(p)
        self.active: tuple[int, ...] = ()
        self.adam: dict[str, torch.optim.AdamW] = {}
        self.basis: dict[str, torch.Tensor] = {}
        self.age: dict[str, int] = {}
        self.coordinates: dict[str, torch.Tensor] = {}

    def drawn(self, index: int) -> tuple[int, ...]:
        uniforms = np.random.default_rng([self.config.seed, index]).random(self.config.blocks)
        left, chosen = dict(enumerate(self.p)), []
        for u in uniforms:
            edges = np.cumsum(list(left.values())) / sum(left.values())
            chosen.append(list(left)[int((u >= edges).sum())])
            del left[chosen[-1]]
        return tuple(sorted(chosen))

    def step(self, step: int, lr: float) -> None:
        if step % self.config.interval == 0:
            drawn = self.drawn(step // self.config.interval)
            for name in list(self.adam):
                if in_block(name, self.active) and not in_block(name, drawn):
                    del self.adam[name]
                    self.basis.pop(name, None)
            self.active = drawn
        for name, W in self.model.named_parameters():
            if ".layers." in name and not in_block(name, self.active):
                continue
            if self.config.rank is not None and ".layers." in name and W.dim() == 2:
                self.lowrank(name, W, lr)
            else:
                self.dense(name, W, lr)

    def optimizer(self, name: str, tensor: torch.Tensor, lr: float, decay: float):
        c = self.config
        if name not in self.adam:
            options = {"betas": c.betas, "eps": c.eps, "weight_decay": decay}
            self.adam[name] = torch.optim.AdamW([tensor], lr=lr, **options)
        self.adam[name].param_groups[0]["lr"] = lr
        return self.adam[name]

    def dense(self, name: str, W: torch.Tensor, lr: float) -> None:
        decay = self.config.weight_decay if W.dim() == 2 else 0.0
        self.optimizer(name, W, lr, decay).step()

    def right(self, name: str, m: int, n: int) -> bool:
        side = self.config.side
        if side == "auto" and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj"):
            m = 32 + 16 + 16 + 32
        if side == "auto" and name.split(".")[-2] in ("gate_proj", "up_proj"):
            m = 48 + 48
        std = m >= n
        return {"std": std, "auto": std, "reverse": not std, "right": True, "left": False}[side]

    def lowrank(self, name: str, W: torch.Tensor, lr: float) -> None:
        G, right = W.grad, self.right(name, *W.shape)
        fresh = name not in self.basis
        if fresh or self.age[name] == self.config.refresh_interval:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            new = Vh[: self.config.rank].T if right else U[:, : self.config.rank]
            if not fresh:
                new = new * torch.sign((new * self.basis[name]).sum(0))
            if not fresh and self.config.on_refresh == "transport":
                moved, change = self.coordinates.get(name), new.T @ self.basis[name]
                state = self.adam[name].state[moved]
                M = state["exp_avg"]
                state["exp_avg"] = M @ change.T if right else change @ M
            if self.config.on_refresh == "reset":
                self.adam.pop(name, None)
            self.basis[name], self.age[name] = new, 0
        self.age[name] += 1
        P = self.basis[name]
        R = G @ P if right else P.T @ G
        # AdamW moves a zero tensor with gradient R and lr 1 to -N.
        if name not in self.adam:
            self.coordinates[name] = torch.zeros_like(R)
        X = self.coordinates[name]
        X.zero_()
        X.grad = R
        self.optimizer(name, X, 1.0, 0.0).step()
        with torch.no_grad():
            W *= 1 - lr * self.config.weight_decay
            W += lr * self.config.scale * (X @ P.T if right else P @ X)


PARITY = [
    *({"side": side} for side in ("std", "left", "right", "reverse", "auto")),
    {"rank": None},
    {"on_refresh": "transport", "refresh_interval": 4, "interval": 20},
    {"on_refresh": "reset", "refresh_interval": 4, "interval": 20},
    {"on_refresh": "keep", "refresh_interval": 4, "interval": 20, "scale": 0.25},
]


@pytest.mark.parametrize("options", PARITY, ids=lambda o: "-".join(map(str, o.values())))
def test_fifty_steps_equal_an_independent_composition(tiny_llama, options):
    config = OwLoreConfig.from_dict(
        {
            "blocks": 2,
            "rank": 4,
            "interval": 7,
            "scores": SCORES,
            "floor": 0.1,
            "weight_decay": 0.1,
            "basis": "svd",
            "gradient": "dense",
            "seed": 5,
            "embeddings": "full",
            "head": "full",
            "norms": "full",
            **options,
        }
    )
    ours = tiny_llama.double()
    theirs = copy.deepcopy(ours)
    optimizer = OwLore(ours, config)
    composition = Composition(theirs, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 60)
    seen = set()
    for step in range(50):
        ids = batch(step)
        for model in (ours, theirs):
            model(ids, labels=ids).loss.backward()
        composition.step(step, lr=3e-4 * (1 - step / 60))
        optimizer.step()
        schedule.step()
        assert optimizer.active_blocks == composition.active
        seen.add(optimizer.active_blocks)
        for model in (ours, theirs):
            model.zero_grad()
    assert len(seen) > 1
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            a, b, **tolerances.TRAINING_FLOAT64, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("side", ["std", "left", "right"])
def test_all_blocks_and_the_identity_basis_equal_adamw(tiny_llama, side, monkeypatch):
    def identity(grads, ranks, sides, previous, seeds, **options):
        bases = [
            torch.eye(G.shape[0 if s == "left" else 1], dtype=G.dtype)
            for G, s in zip(grads, sides, strict=True)
        ]
        return bases, torch.ones(len(grads)), torch.ones(len(grads), dtype=torch.bool)

    monkeypatch.setattr(projection, "refresh_bases", identity)
    ours = tiny_llama.double()
    theirs = copy.deepcopy(ours)
    optimizer = OwLore(
        ours,
        blocks="all",
        rank=48,
        side=side,
        distribution="uniform",
        weight_decay=0.1,
        gradient="dense",
        embeddings="full",
        head="full",
        norms="full",
    )
    # A rank is clamped to the smaller side; the identity on the larger one needs all its columns.
    for member in optimizer._members:
        if member.side is not None:
            member.rank = member.entry.shape[0 if member.side == "left" else 1]
    decay = [p for p in theirs.parameters() if p.dim() == 2]
    plain = [p for p in theirs.parameters() if p.dim() != 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=3e-4)
    for step in range(20):
        train_step(ours, optimizer, step)
        train_step(theirs, adamw, step)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerances.TRAINING_FLOAT64)


def test_preset_full_equals_adamw(tiny_llama):
    ours = tiny_llama.double()
    theirs = copy.deepcopy(ours)
    optimizer = OwLore(ours, OwLoreConfig.preset("full", lr=1e-3))
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(20):
        train_step(ours, optimizer, step)
        train_step(theirs, adamw, step)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerances.TRAINING_FLOAT64)


def test_a_scheduler_that_moves_rate_and_betas(tiny_llama):
    ours = tiny_llama.double()
    theirs = copy.deepcopy(ours)
    optimizer = OwLore(ours, OwLoreConfig.preset("full", lr=1e-3))
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(each, 1e-2, total_steps=10)
        for each in (optimizer, adamw)
    ]
    seen = set()
    for step in range(9):
        for model, each, scheduler in zip(
            (ours, theirs), (optimizer, adamw), schedulers, strict=True
        ):
            train_step(model, each, step)
            scheduler.step()
        seen |= {group["betas"] for group in optimizer.param_groups}
    assert len(seen) > 5
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerances.TRAINING_FLOAT64)


# What trains and what does not.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_only_active_blocks_and_the_always_trained_move(tiny_llama, preset, dtype):
    model = tiny_llama.to(dtype)
    options = {"blocks": 2, "interval": 3, "scores": SCORES, "weight_decay": 0.1, "lr": 1e-2}
    options["gradient"] = "dense"
    if PRESETS[preset].get("blocks") == "all":
        del options["blocks"]
    if "rank" not in PRESETS[preset]:
        options["rank"] = 4
    optimizer = OwLore(model, OwLoreConfig.preset(preset, **options))
    for step in range(7):
        before = weights(model)
        train_step(model, optimizer, step)
        moved = changed(model, before)
        expected = {
            name
            for name in before
            if ".layers." not in name or in_block(name, optimizer.active_blocks)
        }
        assert moved == expected
        count = 4 if PRESETS[preset].get("blocks") == "all" else 2
        assert len(optimizer.active_blocks) == count


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({"embeddings": "freeze"}, {"model.embed_tokens.weight"}),
        ({"head": "freeze"}, {"lm_head.weight"}),
        ({"norms": "freeze"}, {"model.norm.weight", "layernorm"}),
    ],
)
def test_frozen_roles_stay(tiny_llama, options, frozen):
    optimizer = OwLore(tiny_llama, **SMALL | options)
    before = weights(tiny_llama)
    for step in range(4):
        train_step(tiny_llama, optimizer, step)
    moved = changed(tiny_llama, before)
    assert moved
    assert not [name for name in moved if any(part in name for part in frozen)]
    for name, param in tiny_llama.named_parameters():
        if any(part in name for part in frozen):
            assert not param.requires_grad


def test_lowrank_embedding_and_head(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL | {"embeddings": "lowrank", "head": "lowrank"})
    before = weights(tiny_llama)
    train_step(tiny_llama, optimizer, 0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        param = tiny_llama.get_parameter(name)
        difference = param.detach() - before[name]
        assert torch.linalg.matrix_rank(difference.double(), rtol=1e-5) == 4
        assert optimizer.state[param]["exp_avg"].shape == (64, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": "full"}, "embeddings and head must be the same"),
        ({"embeddings": "lowrank", "head": "lowrank"}, "'lowrank' is not possible"),
    ],
)
def test_tied_embeddings(stories260k, options, message):
    with pytest.raises(ValueError, match=message):
        OwLore(stories260k, blocks=2, distribution="uniform", rank=4, **options)
    optimizer = OwLore(
        stories260k.train(),
        blocks=2,
        distribution="uniform",
        rank=4,
        embeddings="freeze",
        head="freeze",
    )
    before = weights(stories260k)
    ids = torch.randint(0, 512, (2, 12))
    stories260k(ids, labels=ids).loss.backward()
    optimizer.step()
    assert "model.embed_tokens.weight" not in changed(stories260k, before)


def test_the_rank_of_a_step_is_the_rank(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    before = weights(tiny_llama)
    train_step(tiny_llama, optimizer, 0)
    for block in optimizer.active_blocks:
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"):
            name = f"model.layers.{block}.{kind}.weight"
            difference = tiny_llama.get_parameter(name).detach() - before[name]
            assert torch.linalg.matrix_rank(difference.double(), rtol=1e-4) == 4


def test_ranks_follow_the_probabilities_of_blocks(tiny_llama):
    options = {**SMALL, "blocks": "all", "rank_distribution": "probability"}
    optimizer = OwLore(tiny_llama, **options)
    train_step(tiny_llama, optimizer, 0)
    found = {
        block: optimizer.state[tiny_llama.model.layers[block].mlp.up_proj.weight]["basis"].shape[1]
        for block in range(4)
    }
    # Scores .1, .4, .2 and .3 share 16.
    assert found == {0: 2, 1: 6, 2: 3, 3: 5}
    assert "rank of each block: 2, 6, 3, 5; " in "\n".join(optimizer.describe())


def test_a_rank_above_the_smaller_side_is_clamped_and_named(tiny_llama):
    optimizer = OwLore(tiny_llama, **{**SMALL, "rank": 24})
    text = "\n".join(optimizer.describe())
    assert "rank 24 is above the smaller side of model.layers.*.self_attn.k_proj.weight: 16" in text
    assert "q_proj" not in text
    train_step(tiny_llama, optimizer, 0)
    block = optimizer.active_blocks[0]
    k_proj = tiny_llama.get_parameter(f"model.layers.{block}.self_attn.k_proj.weight")
    assert optimizer.state[k_proj]["basis"].shape == (16, 16)


def test_dense_lr_is_for_what_trains_densely(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL | {"head": "lowrank"}, dense_lr=1e-5, moments="bf16")
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["head"] == 3e-4
    assert rates["embeddings"] == 1e-5
    train_step(tiny_llama, optimizer, 0)
    assert optimizer.state[tiny_llama.lm_head.weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({}, True),
        ({"rank": None}, True),
        ({"embeddings": "lowrank", "head": "lowrank"}, True),
        ({"norms": "full"}, False),
        ({"head": "full"}, False),
    ],
)
def test_a_dense_lr_that_nothing_has_is_named(tiny_llama, caplog, options, idle):
    OwLore(tiny_llama, dense_lr=1e-5, **options).detach()
    assert ("dense_lr has no effect" in caplog.text) == idle


def test_dense_lr_and_moment_dtypes(tiny_llama):
    model = tiny_llama.bfloat16()
    optimizer = OwLore(model, **SMALL, dense_lr=1e-5)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
        "blocks": 3e-4,
        "block_norms": 1e-5,
        "embeddings": 1e-5,
        "head": 1e-5,
        "norm": 1e-5,
    }
    train_step(model, optimizer, 0)
    for name, param in model.named_parameters():
        if param in optimizer.state:
            in_blocks = ".layers." in name and param.dim() == 2
            want = torch.float32 if in_blocks else torch.bfloat16
            assert optimizer.state[param]["exp_avg"].dtype == want, name
            assert optimizer.state[param]["step"].dtype == torch.float32
    other = OwLore(copy.deepcopy(model), **SMALL, moments="bf16", dense_moments="fp32")
    moments = {m.entry.role: other._new_state(m)["exp_avg"].dtype for m in other._members}
    assert moments.pop("blocks") == torch.bfloat16
    assert set(moments.values()) == {torch.float32}


def test_nearest_rounding_loses_updates_that_stochastic_rounding_keeps(tiny_llama):
    stuck = {}
    for rounding in ("nearest", "stochastic"):
        model = copy.deepcopy(tiny_llama).bfloat16()
        optimizer = OwLore(model, **SMALL, lr=1e-5, rounding=rounding)
        before = weights(model)
        for step in range(3):
            train_step(model, optimizer, step)
        name = f"model.layers.{optimizer.active_blocks[0]}.mlp.gate_proj.weight"
        same = (model.get_parameter(name) == before[name]).float().mean()
        drift = (model.get_parameter(name).double() - before[name].double()).norm()
        stuck[rounding] = (float(same), float(drift.detach()))
    assert stuck["nearest"][0] > stuck["stochastic"][0]
    assert stuck["stochastic"][1] > 2 * stuck["nearest"][1]


# The draw clock.


def test_nothing_is_frozen_before_the_first_training_forward(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    tiny_llama.eval()
    tiny_llama(batch(0))
    tiny_llama.train()
    with torch.no_grad():
        tiny_llama(batch(0))
    assert optimizer.active_blocks == ()
    assert all(p.requires_grad for p in tiny_llama.parameters())
    tiny_llama(batch(0))
    assert len(optimizer.active_blocks) == 2
    flags = {name: p.requires_grad for name, p in tiny_llama.named_parameters()}
    for name, flag in flags.items():
        assert flag == (".layers." not in name or in_block(name, optimizer.active_blocks))


def test_draws_follow_the_steps_and_gradients_of_left_blocks_go(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    for step in range(10):
        ids = batch(step)
        tiny_llama(ids, labels=ids).loss.backward()
        for name, param in tiny_llama.named_parameters():
            trains = ".layers." not in name or in_block(name, optimizer.active_blocks)
            assert (param.grad is not None) == trains
        optimizer.step()
        # Gradients are kept here, as in loops that call zero_grad before backward.
    draws = optimizer.draws()
    assert [step for step, _ in draws] == [0, 3, 6, 9]
    assert draws[-1][1] == optimizer.active_blocks
    assert optimizer.steps == 10


def test_evaluation_between_steps_does_not_move_the_draw(tiny_llama):
    def run(evaluate: bool) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(tiny_llama)
        optimizer = OwLore(model, **SMALL)
        for step in range(7):
            train_step(model, optimizer, step)
            if evaluate:
                model.eval()
                model(batch(99))
                model.train()
        return weights(model)

    plain, evaluated = run(False), run(True)
    assert all(torch.equal(plain[name], evaluated[name]) for name in plain)


def test_a_deep_copy_neither_draws_nor_holds_the_optimizer(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    clone = copy.deepcopy(tiny_llama)
    loaded = pickle.loads(pickle.dumps(tiny_llama))
    for other in (clone, loaded):
        other.train()
        other(batch(0))
        assert optimizer.active_blocks == ()
        assert all(p.requires_grad for p in other.parameters())
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    tiny_llama(batch(0))
    assert all(p.requires_grad for p in tiny_llama.parameters())


@pytest.mark.parametrize("options", [{}, {"gradient": "projected", "state": "keep"}], ids=str)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_pair_goes_on_beside_the_first(tiny_llama, how, options):
    pair = tiny_llama, OwLore(tiny_llama, **SMALL | options)
    pair[1].param_groups[0]["lr"] = 3e-3
    # In the middle of an interval.
    for step in range(4):
        train_step(*pair, step)
    other = how(pair)
    assert other[1].active_blocks == pair[1].active_blocks
    assert not {id(p) for p in pair[0].parameters()} & {id(p) for p in other[0].parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="owlore")
        # Two optimizers in one process, taking turns.
        for step in range(4, 9):
            train_step(*pair, step)
            train_step(*other, step)
    assert_same(pair, other)
    with pytest.raises(TypeError, match=r"copy\.deepcopy\(\(model, optimizer\)\)"):
        copy.copy(pair[1])
    pair[1].detach()
    with pytest.raises(TypeError, match="was detached"):
        pickle.dumps(pair[1])


def test_optimizers_of_two_models_do_not_meet(tiny_llama):
    first = [copy.deepcopy(tiny_llama) for _ in range(2)]
    second = [copy.deepcopy(tiny_llama) for _ in range(2)]
    options = [SMALL, SMALL | {"gradient": "projected", "seed": 7, "blocks": 1, "rank": 2}]
    alone = [OwLore(model, **some) for model, some in zip(first, options, strict=True)]
    for model, optimizer in zip(first, alone, strict=True):
        for step in range(7):
            train_step(model, optimizer, step)
    both = [OwLore(model, **some) for model, some in zip(second, options, strict=True)]
    for step in range(7):
        for model in second:
            ids = batch(step)
            model(ids, labels=ids).loss.backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    for i in range(2):
        assert_same((first[i], alone[i]), (second[i], both[i]))


def test_a_shallow_copy_does_not_draw(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    # It shares the hooks of the original.
    other = copy.copy(tiny_llama.model)
    other(batch(0))
    assert optimizer.active_blocks == ()


def test_training_in_eval_mode_warns_and_still_trains(tiny_llama):
    tiny_llama.eval()
    optimizer = OwLore(tiny_llama, **SMALL)
    before = weights(tiny_llama)
    with pytest.warns(UserWarning, match="eval mode"):
        train_step(tiny_llama, optimizer, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 5):
            train_step(tiny_llama, optimizer, step)
    blocks = {block for _, drawn in optimizer.draws() for block in drawn}
    for name in changed(tiny_llama, before):
        assert ".layers." not in name or in_block(name, tuple(blocks))
    assert any(".layers." in name for name in changed(tiny_llama, before))


def test_a_step_without_gradients_warns_once(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    tiny_llama(batch(0))
    before = weights(tiny_llama)
    with pytest.warns(UserWarning, match="no gradient on any active block"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert not changed(tiny_llama, before)


def test_detach_restores_the_model(tiny_llama):
    tiny_llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in tiny_llama.named_parameters()}
    optimizer = OwLore(tiny_llama, **SMALL)
    train_step(tiny_llama, optimizer, 0)
    assert flags != {name: p.requires_grad for name, p in tiny_llama.named_parameters()}
    optimizer.detach()
    assert flags == {name: p.requires_grad for name, p in tiny_llama.named_parameters()}
    assert not tiny_llama.model._forward_pre_hooks
    tiny_llama(batch(0))
    assert flags == {name: p.requires_grad for name, p in tiny_llama.named_parameters()}
    with pytest.raises(RuntimeError, match="detached"):
        optimizer.step()
    # A second optimizer finds the model as the first one found it.
    train_step(tiny_llama, OwLore(tiny_llama, **SMALL), 0)


def trained_count(optimizer: OwLore) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


@pytest.mark.parametrize("how", ["alive", "gone", "copy", "pickle"])
def test_a_later_optimizer_does_not_take_a_draw_for_the_users_freezing(tiny_llama, how):
    tiny_llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    first = OwLore(tiny_llama, **SMALL)
    every = trained_count(first)
    train_step(tiny_llama, first, 0)
    model = tiny_llama
    if how == "copy":
        model = copy.deepcopy(tiny_llama)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(tiny_llama))
    if how == "alive":
        with pytest.warns(UserWarning, match="detached"):
            second = OwLore(model, **SMALL)
        with pytest.raises(RuntimeError, match="detached"):
            first.step()
    else:
        if how == "gone":
            del first
            gc.collect()
        second = OwLore(model, **SMALL)
    assert trained_count(second) == every
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert len(model.model._forward_pre_hooks) == 1
    before = weights(model)
    for step in range(4):
        train_step(model, second, step)
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert any(".layers." in name for name in changed(model, before))


def test_a_failed_construction_leaves_the_earlier_optimizer_alone(tiny_llama):
    first = OwLore(tiny_llama, **SMALL)
    train_step(tiny_llama, first, 0)
    with pytest.raises(ValueError, match="blocks: expected at most"):
        OwLore(tiny_llama, **{**SMALL, "blocks": 9})
    before = weights(tiny_llama)
    train_step(tiny_llama, first, 1)
    assert changed(tiny_llama, before)


def test_a_block_frozen_by_its_user_is_never_drawn(tiny_llama):
    tiny_llama.model.layers[1].requires_grad_(False)
    optimizer = OwLore(tiny_llama, **{**SMALL, "interval": 1})
    np.testing.assert_allclose(optimizer.probabilities, np.array([1, 0, 2, 3]) / 6)
    assert any("blocks 1, whose weights are frozen" in line for line in optimizer.describe())
    for step in range(6):
        train_step(tiny_llama, optimizer, step)
        assert 1 not in optimizer.active_blocks
    optimizer.detach()
    everything = OwLore(tiny_llama, blocks="all", distribution="uniform", rank=4)
    train_step(tiny_llama, everything, 0)
    assert everything.active_blocks == (0, 2, 3)
    everything.detach()
    with pytest.raises(ValueError, match="at most 3"):
        OwLore(tiny_llama, **{**SMALL, "blocks": 4})


LINEAR = {
    "llama": r"model\.layers\..*_proj\.weight",
    "qwen2": r"model\.layers\..*_proj\.weight",
    "gpt2": r"transformer\.h\..*\.(c_attn|c_fc|c_proj)\.weight",
}


@pytest.mark.parametrize("refresh", REFRESHES)
def test_gradients_that_are_never_finite_are_reported(tiny_llama, refresh):
    optimizer = OwLore(tiny_llama, rank=4, interval=3, refresh=refresh)
    before = weights(tiny_llama)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            (tiny_llama(batch(step), labels=batch(step)).loss * float("nan")).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert ["owlore: non-finite gradients" in str(w.message) for w in caught] == [True]
    assert not changed(tiny_llama, before)
    counts = optimizer.nonfinite()
    assert set(counts) == {name for name in before if re.match(LINEAR["llama"], name)}
    # A sketch is due again in every step; an exact refresh and its step are one.
    assert set(counts.values()) == {5}
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.nonfinite() == {}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", LINEAR)
def test_the_blocks_linear_weights_alone_train_by_default(name, gradient):
    model = tiny_models.build(name)
    optimizer = OwLore(model, rank=4, gradient=gradient)
    before = weights(model)
    for step in range(4):
        model(**tiny_models.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    linear = {key for key in before if re.fullmatch(LINEAR[name], key)}
    assert changed(model, before) == linear
    assert {group["name"] for group in optimizer.param_groups} == {"blocks"}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_biases_too(preset):
    model = tiny_models.build("gpt2")
    options = {} if "rank" in PRESETS[preset] else {"rank": 4}
    config = OwLoreConfig.preset(preset, blocks="all", gradient="dense", lr=1e-2, **options)
    optimizer = OwLore(model, config)
    before = weights(model)
    model(**tiny_models.batch()).loss.backward()
    optimizer.step()
    assert changed(model, before) == set(before)


def test_the_head_of_a_classifier_trains(tiny_llama):
    from transformers import LlamaForSequenceClassification

    config = copy.deepcopy(tiny_llama.config)
    config.num_labels, config.pad_token_id = 3, 0
    model = LlamaForSequenceClassification(config).train()
    optimizer = OwLore(model, rank=4, gradient="dense")
    before = weights(model)
    model(batch(0), labels=torch.tensor([1, 2])).loss.backward()
    optimizer.step()
    linear = {key for key in before if key.endswith("_proj.weight")}
    assert changed(model, before) == linear | {"score.weight"}


def test_a_head_put_in_place_of_the_lm_head_trains(tiny_llama):
    """A reward model's, say: its weights are new."""
    tiny_llama.lm_head = nn.Linear(tiny_llama.config.hidden_size, 1)
    optimizer = OwLore(tiny_llama, rank=4, gradient="dense")
    before = weights(tiny_llama)
    tiny_llama(batch(0)).logits.square().mean().backward()
    optimizer.step()
    linear = {key for key in before if key.endswith("_proj.weight")}
    assert changed(tiny_llama, before) == linear | {"lm_head.weight", "lm_head.bias"}


def test_groups_are_complete_from_the_start(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in tiny_llama.parameters()}
    with pytest.raises(ValueError, match="complete from the start"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_closure(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    before = weights(tiny_llama)

    def closure() -> torch.Tensor:
        ids = batch(0)
        loss = tiny_llama(ids, labels=ids).loss
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert changed(tiny_llama, before)


# Refresh.


class Refreshes:
    """Counts the matrices whose basis is computed, and by which seed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        original = projection.refresh_bases

        def counted(grads, *args, **options):
            self.counts.append(len(grads))
            return original(grads, *args, **options)

        monkeypatch.setattr(projection, "refresh_bases", counted)

    def taken(self) -> int:
        total = sum(self.counts)
        self.counts.clear()
        return total


def test_refresh_clock_starts_at_activation(tiny_llama, monkeypatch):
    refreshes = Refreshes(monkeypatch)
    # Blocks 0 and 1 are always drawn: they are never left, and their clock runs on over the draws.
    optimizer = OwLore(
        tiny_llama,
        blocks=2,
        rank=4,
        interval=3,
        scores=[0.5, 0.5, 0.0, 0.0],
        refresh_interval=4,
    )
    taken = []
    for step in range(10):
        train_step(tiny_llama, optimizer, step)
        taken.append(refreshes.taken())
    assert taken == [14, 0, 0, 0, 14, 0, 0, 0, 14, 0]


@pytest.mark.parametrize("state", ["reset", "keep", "offload"])
def test_every_activation_starts_on_a_fresh_basis(tiny_llama, monkeypatch, state):
    refreshes = Refreshes(monkeypatch)
    optimizer = OwLore(tiny_llama, **{**SMALL, "blocks": 1}, state=state)
    last: tuple[int, ...] = ()
    for step in range(24):
        train_step(tiny_llama, optimizer, step)
        entered = optimizer.active_blocks != last
        assert refreshes.taken() == (7 if entered else 0)
        last = optimizer.active_blocks
    assert len({drawn for _, drawn in optimizer.draws()}) > 1


def test_a_block_drawn_twice_in_a_row_keeps_its_state(tiny_llama):
    scores = [1.0, 0.0, 0.0, 0.0]
    optimizer = OwLore(
        tiny_llama, blocks=1, rank=4, interval=2, scores=scores, state="reset", gradient="dense"
    )
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    for step in range(5):
        train_step(tiny_llama, optimizer, step)
        assert float(optimizer.state[weight]["step"]) == step + 1


def test_keep_counts_steps_over_visits(tiny_llama):
    optimizer = OwLore(tiny_llama, **{**SMALL, "blocks": 1}, state="keep")
    for step in range(24):
        train_step(tiny_llama, optimizer, step)
    visits = np.bincount([drawn[0] for _, drawn in optimizer.draws()], minlength=4)
    for block, count in enumerate(visits):
        weight = tiny_llama.model.layers[block].mlp.up_proj.weight
        steps = float(optimizer.state[weight]["step"]) if count else 0.0
        assert steps == 3 * count


def test_nonfinite_gradient_at_a_refresh_leaves_it_due(tiny_llama, monkeypatch):
    refreshes = Refreshes(monkeypatch)
    optimizer = OwLore(tiny_llama, **SMALL)
    ids = batch(0)
    tiny_llama(ids, labels=ids).loss.backward()
    block = optimizer.active_blocks[0]
    weight = tiny_llama.model.layers[block].mlp.up_proj.weight
    before = weights(tiny_llama)
    weight.grad[1, 2] = float("nan")
    optimizer.step()
    optimizer.zero_grad()
    name = f"model.layers.{block}.mlp.up_proj.weight"
    assert refreshes.taken() == 14
    # No basis yet: the whole matrix is skipped, t stays, everything else trains.
    assert float(optimizer.state[weight]["step"]) == 0
    assert torch.equal(weight, before[name])
    assert name not in changed(tiny_llama, before)
    assert len(changed(tiny_llama, before)) > 14
    assert optimizer.nonfinite() == {name: 1}
    train_step(tiny_llama, optimizer, 1)
    assert refreshes.taken() == 1
    assert name in changed(tiny_llama, before)
    assert all(torch.isfinite(p).all() for p in tiny_llama.parameters())
    train_step(tiny_llama, optimizer, 2)
    assert refreshes.taken() == 0
    # The draw reports what was skipped.
    with pytest.warns(UserWarning, match="non-finite gradients were skipped in 1 updates"):
        train_step(tiny_llama, optimizer, 3)


def test_a_draw_waits_for_no_count(tiny_llama, monkeypatch):
    """What it reports is on its way to the host until the next step(), also where step() draws."""
    reads = []
    read = projection.DeferredFlags.read
    monkeypatch.setattr(
        projection.DeferredFlags, "read", lambda self: reads.append(self) or read(self)
    )
    monkeypatch.setattr(OwLore, "nonfinite", None)
    optimizer = OwLore(tiny_llama, **{**SMALL, "blocks": "all", "refresh_interval": 100})
    for step in range(8):
        ids = batch(step)
        reads.clear()
        tiny_llama(ids, labels=ids).loss.backward()
        # The second pass looks at the bases of the first step.
        assert not reads or step == 1
        reads.clear()
        if step in (1, 4):
            tiny_llama.model.embed_tokens.weight.grad[0, 0] = float("nan")
        if step == 6:
            with pytest.warns(UserWarning, match="a draw of blocks was due"):
                optimizer.step()
            assert not reads
        elif step in (3, 7):
            with pytest.warns(UserWarning, match=r"in 1 updates .* \(such as model.embed_tokens"):
                optimizer.step()
            assert len(reads) == 1
        else:
            optimizer.step()
        optimizer.zero_grad()
        # Without a pass in training mode the second draw is left to step().
        tiny_llama.train(step < 5)


def test_nonfinite_gradient_with_a_basis_skips_its_lines(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    train_step(tiny_llama, optimizer, 0)
    ids = batch(1)
    tiny_llama(ids, labels=ids).loss.backward()
    weight = tiny_llama.model.layers[optimizer.active_blocks[0]].mlp.up_proj.weight
    old = {key: copy.deepcopy(value) for key, value in optimizer.state[weight].items()}
    before = weight.detach().clone()
    weight.grad[5] = float("inf")
    optimizer.step()
    # [48, 32] is projected on the input side: rows are skipped.
    assert torch.equal(weight[5], before[5])
    assert torch.equal(optimizer.state[weight]["exp_avg"][5], old["exp_avg"][5])
    assert torch.equal(optimizer.state[weight]["basis"], old["basis"])
    assert (weight != before).any(dim=1).sum() == 47


def test_a_skipped_step_leaves_the_refresh_due(tiny_llama, monkeypatch):
    refreshes = Refreshes(monkeypatch)
    optimizer = OwLore(tiny_llama, **SMALL)
    ids = batch(0)
    # A GradScaler that meets an overflow does not call step().
    tiny_llama(ids, labels=ids).loss.backward()
    optimizer.zero_grad()
    first = optimizer.active_blocks
    assert refreshes.taken() == 0
    train_step(tiny_llama, optimizer, 1)
    assert refreshes.taken() == 14
    assert optimizer.active_blocks == first
    assert optimizer.steps == 1


def test_energy_is_that_of_the_basis(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    ids = batch(0)
    tiny_llama(ids, labels=ids).loss.backward()
    block = optimizer.active_blocks[0]
    name = f"model.layers.{block}.mlp.down_proj.weight"
    weight = tiny_llama.get_parameter(name)
    G = weight.grad.clone()
    optimizer.step()
    R = optimizer.state[weight]["basis"].T @ G
    want = float(R.square().sum() / G.square().sum())
    assert optimizer.energy()[name] == pytest.approx(want, rel=1e-4)
    assert len(optimizer.energy()) == 14


# Memory.


@pytest.mark.parametrize("gradient", ["dense", "projected"])
def test_only_steps_with_a_gradient_count(tiny_llama, gradient):
    """The counts of a bucket lie in one tensor, from which members come and go."""
    options = {**SMALL, "blocks": "all", "gradient": gradient, "refresh_interval": 3}
    optimizer = OwLore(tiny_llama, **options, state="keep")
    rests = {0: {1, 4, 5}, 2: {3, 5, 6, 7}}
    for step in range(9):
        ids = batch(step)
        tiny_llama(ids, labels=ids).loss.backward()
        for member in optimizer._members:
            if step in rests.get(member.entry.block, ()):
                for param in member.takers:
                    param.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if step == 6:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(saved)
    # A basis from a sketch takes a step of its own, every third of those with a gradient.
    for member in optimizer._members:
        steps = 9 - len(rests.get(member.entry.block, ()))
        if gradient == "projected" and member.side is not None:
            steps -= -(-steps // 3)
        assert optimizer.state[member.param]["step"].item() == steps, member.entry.name


@pytest.mark.parametrize("refresh", ["sketch", "exact"])
def test_a_basis_that_no_gradient_gave_is_due_by_the_seed_of_each_step(tiny_llama, refresh):
    options = {**SMALL, "blocks": "all", "gradient": "projected", "refresh": refresh}
    optimizer = OwLore(tiny_llama, **options)
    member = next(member for member in optimizer._members if member.projection is not None)
    for step in range(3):
        ids = batch(step)
        tiny_llama(ids, labels=ids).loss.backward()
        seed = projection.matrix_seed(optimizer.config.seed, step, member.entry.name)
        assert member.projection.mode == refresh
        assert member.projection.seed == seed
        for param in member.takers:
            param.grad = None
        member.projection.found = None
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_basis_found_in_a_gradient_goes_with_it(tiny_llama, accumulation):
    options = {**SMALL, "gradient": "projected", "refresh": "exact", "refresh_interval": 1}
    optimizer = OwLore(tiny_llama, **options)
    train_step(tiny_llama, optimizer, 0, accumulation)
    layers = [m.projection for m in optimizer._members if m.projection is not None]
    ids = batch(1)
    tiny_llama(ids, labels=ids).loss.backward()
    assert any(layer.found is not None for layer in layers)
    # As where a GradScaler saw an overflow: no step() and no zero_grad() of the optimizer's.
    tiny_llama.zero_grad()
    tiny_llama(ids, labels=ids)
    assert all(layer.found is None for layer in layers)


class Launches(TorchDispatchMode):
    """Names of the torch ops that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.__name__)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradient", ["dense", "projected"])
def test_a_step_counts_in_three_launches(tiny_llama, gradient, monkeypatch):
    optimizer = OwLore(tiny_llama, **{**SMALL, "gradient": gradient, "interval": 10})
    for step in range(3):
        train_step(tiny_llama, optimizer, step)
    ids = batch(3)
    tiny_llama(ids, labels=ids).loss.backward()
    steps = []
    monkeypatch.setattr(ops._Step, "__call__", lambda self, grads, **hyper: steps.append(self))
    with Launches() as seen:
        optimizer.step()
    # Block weights, their norms, embedding, head and final norm.
    assert len(steps) == 5
    assert seen.names == ["_foreach_add_.Scalar", "_foreach_add_.List", "_foreach_zero_.default"]


def test_random_bits_follow_the_step_count(tiny_llama, monkeypatch):
    optimizer = OwLore(tiny_llama, **SMALL)
    seen = []
    call = ops._Step.__call__

    def spy(self, grads, **hyper):
        seen.append(int(self._scalars[2]))
        call(self, grads, **hyper)

    monkeypatch.setattr(ops._Step, "__call__", spy)
    for step in range(3):
        train_step(tiny_llama, optimizer, step)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.detach()
    resumed = OwLore(tiny_llama, **SMALL)
    resumed.load_state_dict(saved)
    for step in range(3, 5):
        train_step(tiny_llama, resumed, step)
    # The buckets of a step: block weights, their norms, embedding, head and final norm.
    assert seen == [step for step in range(5) for _ in range(5)]


def test_a_state_replaced_while_its_parameter_rests_is_used(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    train_step(tiny_llama, optimizer, 0)
    weight = tiny_llama.model.norm.weight
    optimizer.state[weight] = copy.deepcopy(optimizer.state[weight])
    ids = batch(1)
    tiny_llama(ids, labels=ids).loss.backward()
    weight.grad = None
    optimizer.step()
    assert float(optimizer.state[weight]["step"]) == 1
    train_step(tiny_llama, optimizer, 2)
    assert float(optimizer.state[weight]["step"]) == 2


@pytest.mark.parametrize("gradient", ["dense", "projected"])
def test_states_that_went_to_the_host_and_back_are_used(tiny_llama, gradient):
    """As rollouts between steps make room: each tensor of a state is replaced by a copy."""
    options = {**SMALL, "gradient": gradient, "interval": 50, "refresh_interval": 3}
    other = copy.deepcopy(tiny_llama)
    optimizers = [OwLore(tiny_llama, **options), OwLore(other, **options)]
    for step in range(5):
        train_step(tiny_llama, optimizers[0], step)
        train_step(other, optimizers[1], step)
        for state in optimizers[1].state.values():
            state.update({k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)})
    want, got = (optimizer.state_dict()["state"] for optimizer in optimizers)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert changed(other, weights(tiny_llama)) == set()


def test_backward_lets_go_of_a_basis_that_was_replaced(tiny_llama):
    optimizer = OwLore(tiny_llama, **{**SMALL, "gradient": "projected", "interval": 50})
    for step in range(3):
        train_step(tiny_llama, optimizer, step)
    for state in optimizer.state.values():
        state.update({k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)})
    for step in range(3, 5):
        train_step(tiny_llama, optimizer, step)
    layers = [(m, m.projection) for m in optimizer._members if m.projection is not None]
    used = [(m, layer.basis) for m, layer in layers if layer.basis is not None]
    assert used
    assert all(basis is optimizer.state[m.param]["basis"] for m, basis in used)


def test_a_state_on_another_device_is_refused(tiny_llama):
    """Kernels are given addresses, which say nothing of a device."""
    optimizer = OwLore(tiny_llama, **SMALL)
    train_step(tiny_llama, optimizer, 0)
    for state in optimizer.state.values():
        state.update({k: v.to("meta") for k, v in state.items() if isinstance(v, torch.Tensor)})
    with pytest.raises(ValueError, match="expected device cpu, where the weight is, got meta"):
        train_step(tiny_llama, optimizer, 1)


def test_a_draw_frees_what_it_drops(tiny_llama):
    """Before the backward pass, in which memory is short."""
    optimizer = OwLore(tiny_llama, **{**SMALL, "blocks": 1})
    for step in range(3):
        train_step(tiny_llama, optimizer, step)
    (left,) = optimizer.active_blocks
    for index in range(1, 9):
        weight = tiny_llama.model.layers[left].mlp.up_proj.weight
        moments = weakref.ref(optimizer.state[weight]["exp_avg"])
        optimizer._apply_due_draw()
        assert (moments() is None) == (optimizer.active_blocks != (left,))
        (left,) = optimizer.active_blocks
        for step in range(3):
            train_step(tiny_llama, optimizer, 3 * index + step)
    assert len({drawn for _, drawn in optimizer.draws()}) > 1


def test_hooks_and_profilers_see_a_step(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    train_step(tiny_llama, optimizer, 0)
    calls = []
    hooks = [
        optimizer.register_step_pre_hook(lambda *args: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *args: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *args: calls.append("every pre")),
        register_optimizer_step_post_hook(lambda *args: calls.append("every post")),
    ]
    for hook in hooks:
        calls.clear()
        train_step(tiny_llama, optimizer, 1)
        assert len(calls) == len(hooks) - hooks.index(hook)
        hook.remove()
    calls.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train_step(tiny_llama, optimizer, 2)
    assert not calls
    assert "Optimizer.step#OwLore.step" in {event.name for event in profile.events()}


def capture(step: Callable[[], Any]) -> Callable[[], None]:
    """The launches of one step, to be made again and again."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.gpu
@pytest.mark.parametrize("state", ["reset", "keep", "offload"])
def test_draws_on_a_gpu_do_not_wait_for_it(tiny_llama, state):
    model = tiny_llama.to("cuda", torch.bfloat16)
    optimizer = OwLore(model, **{**SMALL, "blocks": 1}, state=state)
    drawn = set()
    for step in range(12):
        ids = batch(step).to("cuda")
        if step > 0:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer._apply_due_draw()
            torch.cuda.set_sync_debug_mode("default")
            model(ids, labels=ids).loss.backward()
            model.model.embed_tokens.weight.grad[0, 0] = float("nan")
            if step > 0:
                torch.cuda.set_sync_debug_mode("error")
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
        reports = [str(w.message) for w in seen if "non-finite" in str(w.message)]
        assert len(reports) == (step in (3, 6, 9))
        drawn.update(optimizer.active_blocks)
        assert all("in 3 updates" in report for report in reports)
    assert len(drawn) > 1
    assert optimizer.nonfinite() == {"model.embed_tokens.weight": 12}


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", ["dense", "projected"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_step_in_a_cuda_graph_is_the_step(tiny_llama, gradient, moments):
    """Bit for bit, as rate and gradients change in their places, and count for count."""
    options = {**SMALL, "gradient": gradient, "moments": moments, "weight_decay": 0.1}
    options |= {"interval": 100, "refresh_interval": 100}
    runs = []
    like = tiny_llama.to("cuda", torch.bfloat16)
    for _ in range(2):
        model = copy.deepcopy(like)
        optimizer = OwLore(model, **options)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1e-2, device="cuda")
        ids = batch(0).to("cuda")
        # A basis, a step, and one that reads what the first found.
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        runs.append((model, optimizer))
    (_, graphed), (_, eager) = runs
    replay = capture(graphed.step)
    generator = torch.Generator().manual_seed(0)
    for k in range(6):
        for mine, other in zip(graphed._members, eager._members, strict=True):
            if other.param.grad is None:
                continue
            grad = torch.randn(other.param.grad.shape, generator=generator)
            if k == 3 and other.entry.name.endswith("o_proj.weight"):
                grad[2, 3] = float("nan")
            mine.param.grad.copy_(grad)
            other.param.grad.copy_(grad)
        for optimizer in (graphed, eager):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"].fill_(1e-2 / (k + i + 1))
        before = weights(runs[0][0])
        replay()
        eager.step()
        assert changed(runs[0][0], before) == trained_names(eager)
        for (name, p), q in zip(
            runs[0][0].named_parameters(), runs[1][0].parameters(), strict=True
        ):
            assert torch.equal(p, q), name
    for mine, other in zip(graphed._members, eager._members, strict=True):
        for key, value in eager.state.get(other.param, {}).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(graphed.state[mine.param][key], value), (other.entry.name, key)
    assert graphed.nonfinite() == eager.nonfinite()
    assert set(eager.nonfinite().values()) == {1}
    assert len(eager.nonfinite()) == 2


def trained_names(optimizer: OwLore) -> set[str]:
    return {member.entry.name for member in optimizer._members if optimizer._is_active(member)}


def tensor_bytes(optimizer: OwLore, only=lambda member: True) -> int:
    return sum(
        value.numel() * value.element_size()
        for member in optimizer._members
        if only(member)
        for value in optimizer.state.get(member.param, {}).values()
        if isinstance(value, torch.Tensor)
    )


@pytest.mark.parametrize("state", ["reset", "offload", "keep"])
def test_state_memory_after_forty_intervals(tiny_llama, state):
    optimizer = OwLore(tiny_llama, **{**SMALL, "interval": 1}, state=state)
    train_step(tiny_llama, optimizer, 0)
    one = optimizer.memory()
    # By hand, for one block: R is [m, 4] or [4, n], twice, float32, and one basis.
    moments = 2 * 4 * (32 * 4 + 16 * 4 + 16 * 4 + 32 * 4 + 48 * 4 + 48 * 4 + 4 * 48)
    moments -= 2 * 4 * (16 * 4 + 16 * 4) - 2 * 4 * (4 * 32 + 4 * 32)
    norms = 2 * 4 * 2 * 32
    counts = 4 * 9
    always = 2 * 4 * (64 * 32 + 64 * 32 + 32) + 4 * 3
    assert one["moments"] == 2 * (moments + norms + counts) + always
    assert one["basis"] == 2 * 4 * 4 * (32 + 16 + 16 + 32 + 32 + 32 + 32)
    for step in range(1, 40):
        train_step(tiny_llama, optimizer, step)
    assert {block for _, drawn in optimizer.draws() for block in drawn} == {0, 1, 2, 3}
    many = optimizer.memory()
    per_block = moments + norms + counts + one["basis"] // 2
    if state == "keep":
        assert many["moments"] + many["basis"] == always + 4 * per_block
        assert many["host"] == 0
    else:
        assert (many["moments"], many["basis"]) == (one["moments"], one["basis"])
        assert many["host"] == (2 * per_block if state == "offload" else 0)
    total = many["moments"] + many["basis"] + many["host"]
    assert tensor_bytes(optimizer) == total


@pytest.mark.gpu
@pytest.mark.parametrize("state", ["reset", "offload"])
def test_device_memory_after_forty_intervals(tiny_llama, state):
    model = tiny_llama.cuda()
    optimizer = OwLore(model, **{**SMALL, "interval": 1}, state=state)

    def step(i: int) -> int:
        ids = batch(i).cuda()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    allocated = [step(i) for i in range(80)]
    # The kernels' caches of pointer tables fill up to a bound of their own first; then nothing may
    # grow, not even by the state of half a block.
    first = max(allocated[:40])
    assert max(allocated[40:]) - first < optimizer.memory()["moments"] / 4
    for member in optimizer._members:
        for value in optimizer.state.get(member.param, {}).values():
            if isinstance(value, torch.Tensor):
                assert value.is_cuda == optimizer._is_active(member)


def test_memory_account_counts_weights_and_gradients(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    ids = batch(0)
    tiny_llama(ids, labels=ids).loss.backward()
    account = optimizer.memory()
    params = list(tiny_llama.parameters())
    assert account["weights"] == sum(4 * p.numel() for p in params)
    assert account["gradients"] == sum(4 * p.numel() for p in params if p.requires_grad)
    assert account["gradients"] < account["weights"]


# Checkpoints.


def snapshot(model: nn.Module, optimizer: OwLore) -> bytes:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


def restore(saved: bytes, like: nn.Module, options: dict[str, Any]) -> tuple[nn.Module, OwLore]:
    content = torch.load(io.BytesIO(saved), weights_only=True)
    model = copy.deepcopy(like)
    # Nothing of the new model's own weights may survive.
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    optimizer = OwLore(model, **options)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return model, optimizer


def assert_same(a: tuple[nn.Module, OwLore], b: tuple[nn.Module, OwLore]) -> None:
    for (name, p), q in zip(a[0].named_parameters(), b[0].parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.requires_grad == q.requires_grad, name
    first, second = a[1].state_dict(), b[1].state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for number, state in first["state"].items():
        for key, value in state.items():
            other = second["state"][number][key]
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype
                assert torch.equal(value, other), (number, key)
            else:
                assert value == other, (number, key)


def assert_resumes(
    like: nn.Module,
    options: dict[str, Any],
    total: int,
    starts: Iterable[int],
    step: Callable[[nn.Module, OwLore, int], None] = train_step,
) -> None:
    """A run that goes on from a checkpoint ends in the same bits as one that was never stopped.

    Args:
        like: The model before training.
        options: Options of the optimizer.
        total: Steps of a run.
        starts: Steps after which a run was stopped.
        step: Takes step i with a model and its optimizer.
    """
    model = copy.deepcopy(like)
    optimizer = OwLore(model, **options)
    saved = [snapshot(model, optimizer)]
    for i in range(total):
        step(model, optimizer, i)
        saved.append(snapshot(model, optimizer))
    for start in starts:
        resumed = restore(saved[start], like, options)
        for i in range(start, total):
            step(*resumed, i)
        if start == total:
            resumed[1]._apply_due_draw()
        assert_same((model, optimizer), resumed)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("state", ["reset", "keep", "offload"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_at_any_step_gives_the_same_bits(tiny_llama, state, accumulation, dtype):
    like = tiny_llama.to(dtype)
    options = {
        **SMALL,
        "state": state,
        "refresh_interval": 2,
        "on_refresh": "transport",
        "moments": "bf16" if dtype == torch.bfloat16 else "fp32",
        "weight_decay": 0.1,
    }
    # Every step of one interval, before the first step and after the last.
    starts = (0, 3, 4, 5, 9, 10)
    assert_resumes(like, options, 10, starts, partial(train_step, accumulation=accumulation))


def test_state_dict_is_plain_and_keeps_dtypes(tiny_llama):
    optimizer = OwLore(tiny_llama, **SMALL)
    train_step(tiny_llama, optimizer, 0)

    def check(value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                assert type(key) in (str, int)
                check(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                check(inner)
        else:
            plain = (torch.Tensor, int, float, str, bool, type(None))
            assert type(value) in plain, type(value)

    saved = optimizer.state_dict()
    check(saved)
    optimizer.load_state_dict(saved)
    # Loading copies: training on does not write into what was loaded.
    kept = copy.deepcopy(saved)
    train_step(tiny_llama, optimizer, 1)
    for number, state in saved["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, kept["state"][number][key])


def test_a_distribution_without_a_name_can_be_saved(tiny_llama):
    options = {**SMALL, "distribution": lambda scores: scores**2}
    optimizer = OwLore(copy.deepcopy(tiny_llama), **options)
    other = OwLore(tiny_llama, **options)
    other.load_state_dict(optimizer.state_dict())
    assert other.probabilities == optimizer.probabilities
    with pytest.raises(ValueError, match="no importable name"):
        optimizer.config.to_dict()


def test_loading_restores_hyper_parameters_as_torch_does(tiny_llama):
    options = {**SMALL, "lr": 1e-3}
    optimizer = OwLore(copy.deepcopy(tiny_llama), **options)
    for group in optimizer.param_groups:
        group["lr"] = 5e-4
        group["initial_lr"] = 1e-3
    other = OwLore(tiny_llama, **options)
    other.load_state_dict(optimizer.state_dict())
    assert all(g["lr"] == 5e-4 and g["initial_lr"] == 1e-3 for g in other.param_groups)


def damage(saved: dict[str, Any], what: str) -> Any:
    groups, state = saved["param_groups"], saved["state"]
    number = next(n for n, s in state.items() if "basis" in s)
    if what == "not a dict":
        return [1, 2]
    if what == "foreign":
        model = nn.Linear(2, 2)
        return torch.optim.AdamW(model.parameters()).state_dict()
    if what == "no state":
        del saved["state"]
    elif what == "version":
        groups[0]["owlore"]["version"] = 99
    elif what == "steps":
        groups[0]["owlore"]["steps"] = -5
    elif what == "probabilities":
        groups[0]["owlore"]["probabilities"] = [0.5, 0.5]
    elif what == "shape":
        state[number]["exp_avg"] = state[number]["exp_avg"][:1]
    elif what == "dtype":
        state[number]["exp_avg_sq"] = state[number]["exp_avg_sq"].bfloat16()
    elif what == "missing key":
        del state[number]["basis"]
    elif what == "unknown parameter":
        state[1000] = state.pop(number)
    elif what == "names":
        groups[0]["param_names"][0] = "something.else"
    elif what == "groups":
        groups.pop()
    return saved


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("not a dict", "expected a dict"),
        ("foreign", "not written by OwLore"),
        ("no state", "expected a dict with 'state'"),
        ("version", "expected version 1, got 99"),
        ("steps", "steps: expected a number >= 0, got -5"),
        ("probabilities", "probabilities: expected 4"),
        ("shape", "exp_avg: expected"),
        ("dtype", "exp_avg_sq: expected"),
        ("missing key", "expected .*basis"),
        ("unknown parameter", "unknown parameter 1000"),
        ("names", "something.else"),
        ("groups", "expected groups"),
    ],
)
def test_damaged_checkpoints_change_nothing(tiny_llama, what, message):
    other = copy.deepcopy(tiny_llama)
    optimizer = OwLore(other, **SMALL)
    train_step(other, optimizer, 0)
    bad = damage(copy.deepcopy(optimizer.state_dict()), what)
    victim = OwLore(tiny_llama, **SMALL)
    for step in range(4):
        train_step(tiny_llama, victim, step)
    before = copy.deepcopy(victim.state_dict())
    with pytest.raises(ValueError, match=message):
        victim.load_state_dict(bad)
    after = victim.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][number][key]))


@pytest.mark.parametrize("change", [{"rank": 8}, {"blocks": 3}, {"seed": 1}, {"interval": 4}])
def test_a_checkpoint_made_with_other_options_is_refused(tiny_llama, change):
    saved = OwLore(copy.deepcopy(tiny_llama), **SMALL).state_dict()
    (name, value) = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"other options: {name} .*{SMALL.get(name, 0)}.*{value}"):
        OwLore(tiny_llama, **{**SMALL, **change}).load_state_dict(saved)


def test_a_checkpoint_with_other_scores_warns_and_wins(tiny_llama):
    first = OwLore(copy.deepcopy(tiny_llama), **SMALL)
    second = OwLore(tiny_llama, **{**SMALL, "scores": [1.0, 1.0, 1.0, 1.0]})
    with pytest.warns(UserWarning, match="other block probabilities"):
        second.load_state_dict(first.state_dict())
    assert second.probabilities == first.probabilities


# Bad input at the door.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"blocks": 9}, ValueError, "blocks: expected at most 4"),
        ({"scores": [0.1, 0.2]}, ValueError, "scores: expected 4 numbers"),
        ({"scores": [0.1, 0.2, -1.0, 0.0]}, ValueError, "scores: expected finite"),
        ({"scores": [1.0, 0.0, 0.0, 0.0]}, ValueError, "at most 1, the blocks with a probability"),
        ({"scores": None}, ValueError, "owlore outliers"),
        ({"scores": "nowhere.json"}, ValueError, "cannot read nowhere.json"),
        ({"scores": 3}, TypeError, "scores: expected a path"),
        ({"rank": 0}, ValueError, "rank: expected a whole number >= 1"),
        ({"rnak": 8}, TypeError, "did you mean 'rank'"),
        ({"blocks_path": "model.nothing"}, ValueError, "blocks_path"),
        ({"rank": None, "head": "lowrank"}, ValueError, "needs a rank"),
    ],
)
def test_bad_options_leave_the_model_alone(tiny_llama, options, error, message):
    with pytest.raises(error, match=message):
        OwLore(tiny_llama, **{**SMALL, **options})
    assert not tiny_llama.model._forward_pre_hooks
    assert all(p.requires_grad for p in tiny_llama.parameters())


def test_bad_models():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        OwLore([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none was found"):
        OwLore(nn.Linear(3, 3), distribution="uniform")


def test_a_model_frozen_by_its_user_is_refused(tiny_llama):
    tiny_llama.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        OwLore(tiny_llama, **SMALL)


@pytest.mark.parametrize("gradient", ["dense", "projected"])
def test_weights_that_device_map_offloads_are_refused(tiny_llama, gradient):
    """As "auto" does where a GPU is too small; accelerate's hooks know nothing of coordinates."""
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_llama, execution_device="cpu")
    with pytest.raises(ValueError, match=r"offloaded .*model\.layers\.0\..*device_map"):
        OwLore(model, **{**SMALL, "gradient": gradient, "embeddings": "freeze", "head": "freeze"})


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", ["dense", "projected"])
def test_a_model_that_device_map_spreads(tiny_llama, gradient):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 CUDA devices; torch sees {torch.cuda.device_count()}")
    accelerate = pytest.importorskip("accelerate")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{i}": i // 2 for i in range(4)}
    # Bases that rounding does not turn: in batches of fewer matrices it is another.
    options = SMALL | {"gradient": gradient, "state": "offload", "lr": 1e-2, "basis": "random"}
    plain, spread = copy.deepcopy(tiny_llama).double().to(0), copy.deepcopy(tiny_llama).double()
    spread = accelerate.dispatch_model(spread, places, main_device=0, force_hooks=True)
    pairs = [(model, OwLore(model, **options)) for model in (plain, spread)]
    assert pairs[1][1].describe() == pairs[0][1].describe()
    for step in range(7):
        for model, optimizer in pairs:
            ids = batch(step).to(0)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len({param.device for param in spread.parameters()}) == 2
    found = dict(spread.named_parameters())
    for name, want in plain.named_parameters():
        torch.testing.assert_close(found[name].to(0), want, **tolerances.TRAINING_FLOAT64)
