"""DDP and FSDP2 on two ranks against one process, on real processes over gloo, and over NCCL."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ranks
import tiny_models
import torch
from test_optimizer import SCORES
from tolerances import TRAINING_FLOAT64
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from owlore import OwLore, distributed, prepare_load

OPTIONS: dict[str, Any] = {
    "blocks": 2,
    "rank": 4,
    "interval": 4,
    "refresh_interval": 3,
    "scores": SCORES,
    "lr": 1e-2,
    "on_refresh": "transport",
    "embeddings": "full",
    "head": "full",
    "norms": "full",
}
STEPS = 12


def device() -> torch.device:
    """Where this process trains: a rank of NCCL on its GPU."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def llama(**overrides: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes | overrides)).train().double().to(device())


def rows(step: int, micro: int, ranks: int = 2) -> Tensor:
    """Token ids of one micro-batch of all ranks. [2 * ranks, 10]"""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randint(0, 64, (2 * ranks, 10), generator=generator).to(device())


def train(
    model: nn.Module,
    optimizer: OwLore,
    steps: range,
    rank: int | None,
    accumulation: int = 1,
    clip: float | None = None,
    quiet: bool = False,
) -> list[float]:
    """Trains on this rank's rows, or on all of them; returns the norms that clipping saw."""
    norms = []
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 2
    for step in steps:
        for micro in range(accumulation):
            ids = rows(step, micro, ranks)
            if rank is not None:
                ids = ids[2 * rank : 2 * rank + 2]
            last = micro == accumulation - 1
            waits = isinstance(model, DistributedDataParallel) and not last
            if quiet and hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            with model.no_sync() if waits else contextlib.nullcontext():
                (model(input_ids=ids, labels=ids).loss / accumulation).backward()
        if clip is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def checkpointing(model: nn.Module, reentrant: bool | None) -> None:
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "projected": ({}, {}),
    "projected, accumulation, clipping": (
        {"state": "keep"},
        {"accumulation": 2, "clip": 0.3, "quiet": True},
    ),
    "exact, accumulation": ({"refresh": "exact"}, {"accumulation": 2}),
    "checkpointing": ({"state": "offload"}, {"reentrant": False, "clip": 0.3}),
    "reentrant checkpointing": ({}, {"reentrant": True}),
    "low-rank embedding and head": ({"embeddings": "lowrank", "head": "lowrank"}, {}),
    "frozen embedding and head": ({"embeddings": "freeze", "head": "freeze"}, {"clip": 0.3}),
    "blocks' weights alone": (
        {"embeddings": "freeze", "head": "freeze", "norms": "freeze"},
        {"accumulation": 2, "clip": 0.3},
    ),
    "left side, all blocks": ({"side": "left", "blocks": "all"}, {"accumulation": 2}),
    "dense": ({"gradient": "dense"}, {"clip": 0.3}),
    "dense, accumulation": (
        {"gradient": "dense", "state": "keep"},
        {"accumulation": 2, "quiet": True},
    ),
    "dense, left side": ({"gradient": "dense", "side": "left", "on_refresh": "reset"}, {}),
    "full rank": ({"rank": None}, {"reentrant": False}),
}


def options_of(case: str) -> dict[str, Any]:
    """Options of a case, with bases that rounding does not turn.

    On a GPU a basis is found by Cholesky-QR of columns of very different lengths. In float64, too,
    the rounding of a gradient, 1e-16, may turn columns by 1e-3 where the gradient is nearly of low
    rank, inside the same subspace: good bases, but another run. Random ones depend on a seed alone,
    and leave to be compared what ranks do. That ranks find the same ones in the averaged gradients
    `OWLORE_DEBUG` checks in the other parts over NCCL.
    """
    steady = {"basis": "random"} if device().type == "cuda" else {}
    return OPTIONS | CASES[case][0] | steady


def run_ddp(cases: list[str], built: str) -> list[dict[str, Any]]:
    """Trains each case on this rank."""
    rank = torch.distributed.get_rank()
    results = []
    for case in cases:
        options, how = options_of(case), CASES[case][1]
        model = llama()
        checkpointing(model, how.get("reentrant"))
        if rank > 0:
            # Wrapping gives every rank the weights of the first.
            with torch.no_grad():
                for param in model.parameters():
                    param.add_(1.0)
        if built == "before":
            optimizer = OwLore(model, **options)
            wrapped = DistributedDataParallel(model)
        else:
            wrapped = DistributedDataParallel(model)
            optimizer = OwLore(wrapped, **options)
        loop = {key: value for key, value in how.items() if key != "reentrant"}
        norms = train(wrapped, optimizer, range(STEPS), rank, **loop)
        results.append({"norms": norms, "draws": optimizer.draws(), "weights": weights_of(model)})
    return results


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All weights, gathered, in host memory."""
    return {name: distributed.whole(weight).cpu() for name, weight in model.state_dict().items()}


def compare_with_one_process(cases: list[str], found: list[list[dict[str, Any]]]) -> None:
    """Every rank's results equal those of one process on all rows."""
    for i, case in enumerate(cases):
        options, how = options_of(case), CASES[case][1]
        model = llama()
        before = weights_of(copy.deepcopy(model))
        checkpointing(model, how.get("reentrant"))
        optimizer = OwLore(model, **options)
        loop = {key: value for key, value in how.items() if key != "reentrant"}
        norms = train(model, optimizer, range(STEPS), None, **loop)
        assert len({drawn for _, drawn in optimizer.draws()}) > 1 or options["blocks"] == "all"
        wanted = weights_of(model)
        for results in found:
            result = results[i]
            assert result["draws"] == optimizer.draws()
            assert result["norms"] == pytest.approx(norms, rel=1e-6)
            for name, want in wanted.items():
                torch.testing.assert_close(
                    result["weights"][name],
                    want,
                    **TRAINING_FLOAT64,
                    msg=lambda text, case=case, name=name: f"{case}: {name}: {text}",
                )
        moved = [name for name, want in wanted.items() if not torch.equal(want, before[name])]
        assert any("proj" in name for name in moved), case
        for results in found[1:]:
            assert_equal(results[i]["weights"], found[0][i]["weights"], case)


@pytest.mark.parametrize("built", ["before", "after"])
@pytest.mark.parametrize("part", [slice(0, 4), slice(4, 8), slice(8, None)])
def test_two_ranks_equal_one_process(built, part, monkeypatch):
    monkeypatch.setenv("OWLORE_DEBUG", "1")
    cases = list(CASES)[part]
    compare_with_one_process(cases, ranks.run(run_ddp, cases, built))


WRAPPERS: list[dict[str, bool]] = [
    {"static_graph": True},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
]


def run_wrappers() -> list[dict[str, Tensor]]:
    """Trains under each kind of wrapper, and a copy of the model on the way."""
    rank = torch.distributed.get_rank()
    found = []
    for options in WRAPPERS:
        for built in ("before", "after"):
            model = llama()
            if built == "before":
                optimizer = OwLore(model, **OPTIONS)
                wrapped = DistributedDataParallel(model, **options)
            else:
                wrapped = DistributedDataParallel(model, **options)
                optimizer = OwLore(wrapped, **OPTIONS)
            train(wrapped, optimizer, range(3), rank)
            # A copy is no part of the exchange.
            if rank == 0:
                copy.deepcopy(model)(input_ids=rows(0, 0), labels=rows(0, 0)).loss.backward()
            train(wrapped, optimizer, range(3, 6), rank)
            found.append(model.state_dict())
    # As torch.compile wraps a wrapper.
    outer = nn.Module()
    outer._orig_mod = wrapped
    assert distributed.find_ddp(outer) is wrapped
    return found


def test_every_kind_of_wrapper():
    model = llama()
    optimizer = OwLore(model, **OPTIONS)
    train(model, optimizer, range(6), None)
    for found in ranks.run(run_wrappers):
        assert len(found) == 6
        for weights in found:
            for name, want in model.state_dict().items():
                torch.testing.assert_close(weights[name], want, **TRAINING_FLOAT64)


class Picky(nn.Module):
    """Leaves its second block out on rank 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor, skips: bool) -> tuple[Tensor, None]:
        for i, layer in enumerate(self.layers):
            if i != 1 or not skips:
                x = x + torch.tanh(layer(x))
        return self.head(x).square().mean(), None


def picky(optimizer: OwLore, model: nn.Module, rank: int | None) -> None:
    for step in range(6):
        x = torch.randn(2, 12, generator=torch.Generator().manual_seed(step))
        mine = range(2) if rank is None else (rank,)
        for i in mine:
            loss, _ = model(x[i : i + 1].double(), i == 1)
            (loss / len(mine)).backward()
        optimizer.step()
        optimizer.zero_grad()


PICKY: list[dict[str, Any]] = [
    {
        "rank": 3,
        "blocks": "all",
        "distribution": "uniform",
        "gradient": gradient,
        "lr": 1e-2,
        "norms": "full",
    }
    for gradient in ("projected", "dense")
]


def run_picky() -> list[dict[str, Tensor]]:
    rank = torch.distributed.get_rank()
    found = []
    # Some are averaged where they are, the others together.
    distributed._LARGE = 12 * 12 * 8
    for options in PICKY:
        model = Picky().double()
        optimizer = OwLore(model, **options)
        picky(optimizer, DistributedDataParallel(model), rank)
        found.append(model.state_dict())
        optimizer.detach()
        assert not model._forward_hooks
    return found


def test_a_block_that_a_rank_leaves_out_is_averaged_all_the_same():
    for found in ranks.run(run_picky):
        for options, weights in zip(PICKY, found, strict=True):
            model = Picky().double()
            before = copy.deepcopy(model.state_dict())
            picky(OwLore(model, **options), model, None)
            for name, want in model.state_dict().items():
                torch.testing.assert_close(weights[name], want, **TRAINING_FLOAT64)
            assert not torch.equal(before["layers.1.weight"], weights["layers.1.weight"])


@pytest.mark.parametrize("first", ["optimizer", "group", "wrapper"])
def test_a_rank_alone_trains_the_default_whatever_comes_first(first):
    """DDP with the blocks' weights alone, which leave it nothing to manage."""
    plain, model = tiny_models.build("llama"), tiny_models.build("llama")
    before = copy.deepcopy(model.state_dict())

    def optimizer_of(model: nn.Module) -> OwLore:
        return OwLore(model, rank=4, lr=1e-2)

    def trained(model: nn.Module, optimizer: OwLore) -> list[float]:
        norms = []
        for step in range(4):
            model(**tiny_models.batch(step)).loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.3)))
            optimizer.step()
            optimizer.zero_grad()
        return norms

    norms = trained(plain, optimizer_of(plain))
    optimizer = optimizer_of(model) if first == "optimizer" else None
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        optimizer = optimizer_of(model) if first == "group" else optimizer
        wrapped = DistributedDataParallel(model)
        optimizer = optimizer_of(wrapped) if first == "wrapper" else optimizer
        assert optimizer is not None
        assert trained(wrapped, optimizer) == norms
        optimizer.detach()
    finally:
        torch.distributed.destroy_process_group()
    for name, want in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], want), name
    assert torch.equal(model.model.norm.weight, before["model.norm.weight"])
    assert all(param.requires_grad for param in model.parameters())


def run_late() -> tuple[list[str], dict[str, Tensor]]:
    """The last micro-batch of a step runs inside no_sync()."""
    rank = torch.distributed.get_rank()
    model = llama()
    # What DDP averages itself it would not average then.
    optimizer = OwLore(model, **OPTIONS | {"embeddings": "freeze", "head": "freeze"})
    wrapped = DistributedDataParallel(model)
    ids = rows(0, 0)[2 * rank : 2 * rank + 2]
    with wrapped.no_sync():
        wrapped(input_ids=ids, labels=ids).loss.backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(warning.message) for warning in caught], optimizer._bases()


def test_a_step_whose_gradients_are_not_averaged_averages_them():
    (first, bases), (_, others) = ranks.run(run_late)
    assert any("were not averaged over the ranks" in message for message in first)
    assert_equal(others, bases, "bases")
    assert bases


def run_successors() -> list[dict[str, Tensor]]:
    """A second optimizer trains what the first left frozen: on the wrapper, a new one, a copy."""
    rank = torch.distributed.get_rank()
    frozen = OPTIONS | {"embeddings": "freeze"}
    found = []
    for how in ("same wrapper", "new wrapper", "copy"):
        model = llama()
        first = OwLore(model, **frozen)
        wrapped = DistributedDataParallel(model)
        train(wrapped, first, range(2), rank)
        if how == "copy":
            model = copy.deepcopy(model)
            wrapped = model
        else:
            first.detach()
        if how == "same wrapper":
            second = OwLore(wrapped, **OPTIONS)
        else:
            second = OwLore(model, **OPTIONS)
            wrapped = DistributedDataParallel(model)
        train(wrapped, second, range(2, 6), rank)
        found.append(model.state_dict())
    return found


def test_a_second_optimizer_shares_what_the_first_left_alone():
    model = llama()
    first = OwLore(model, **OPTIONS | {"embeddings": "freeze"})
    train(model, first, range(2), None)
    first.detach()
    train(model, OwLore(model, **OPTIONS), range(2, 6), None)
    for found in ranks.run(run_successors):
        for weights in found:
            for name, want in model.state_dict().items():
                torch.testing.assert_close(weights[name], want, **TRAINING_FLOAT64)


def test_what_others_hid_from_ddp_stays_hidden(tiny_llama):
    name = "_ddp_params_and_buffers_to_ignore"
    OwLore(tiny_llama, **OPTIONS).detach()
    assert not hasattr(tiny_llama, name)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        tiny_llama, ["lm_head.weight"]
    )
    optimizer = OwLore(tiny_llama, **OPTIONS)
    hidden = getattr(tiny_llama, name)
    assert len(hidden) > 1
    assert "lm_head.weight" in hidden

    def marked() -> set[str]:
        # torch.compile cuts a graph for the buckets of those that are not.
        named = tiny_llama.named_parameters()
        return {name for name, param in named if getattr(param, "_ddp_ignored", False)}

    assert marked() == set(hidden)
    optimizer.detach()
    assert getattr(tiny_llama, name) == ["lm_head.weight"]
    assert marked() == {"lm_head.weight"}


@contextlib.contextmanager
def counted_sums() -> Iterator[list[int]]:
    """Bytes of each call of all_reduce."""
    sizes: list[int] = []
    call = torch.distributed.all_reduce

    def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return call(tensor, *args, **kwargs)

    torch.distributed.all_reduce = count
    try:
        yield sizes
    finally:
        torch.distributed.all_reduce = call


def run_bytes(options: dict[str, Any], sharded: bool, built: str = "before") -> dict[str, Any]:
    """What goes over the wire in a step that sketches, and in one that steps, of two batches."""
    rank = torch.distributed.get_rank()
    model = llama().float()
    buckets: list[int] = []
    if sharded:
        shard(model)
        optimizer = OwLore(model, **OPTIONS | options)
    else:
        if built == "before":
            optimizer = OwLore(model, **OPTIONS | options)
        model = DistributedDataParallel(model)

        # DDP wants its own annotations, or none.
        def hook(state, bucket):  # type: ignore[no-untyped-def]
            buffer = bucket.buffer()
            buckets.append(buffer.nbytes)
            done: Any = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
            done.set_result(bucket.buffer())
            return done

        model.register_comm_hook(None, hook)
        if built == "after":
            # The hook moves to the reducer that is built anew.
            optimizer = OwLore(model, **OPTIONS | options)
    steps = []
    for step in range(2):
        start = len(buckets)
        with counted_sums() as sums:
            train(model, optimizer, range(step, step + 1), rank, accumulation=2, quiet=True)
        steps.append((sums, sum(buckets[start:])))
    members = [m for m in optimizer._members if optimizer._is_active(m)]
    projected = [m for m in members if m.projection is not None]
    small = 4 * sum(m.param.numel() for m in members if m.entry.role == "block_norms")
    return {
        "steps": steps,
        "R": 4 * sum(m.param.numel() for m in projected) + (0 if sharded else small),
        "Y": 4 * sum(m.sketch.numel() for m in projected) + (0 if sharded else small),
        "G": 4 * sum(m.weight.numel() for m in members if m.entry.role == "blocks") + small,
        "always": 4 * sum(m.weight.numel() for m in members if m.always),
    }


@pytest.mark.parametrize(
    "sharded, built", [(False, "before"), (False, "after"), (True, "after")], ids=str
)
def test_only_low_rank_gradients_cross_in_one_call(sharded, built):
    for counts in ranks.run(run_bytes, {}, sharded, built):
        for (sums, buckets), key in zip(counts["steps"], ("Y", "R"), strict=True):
            assert len(sums) == 1
            # Each piece begins at a multiple of 256 bytes.
            assert counts[key] <= sums[0] <= counts[key] + 256 * 30
            assert sums[0] < counts["G"]
            # DDP keeps to what always trains.
            assert buckets == (0 if sharded else counts["always"])


def test_ddp_holds_no_bucket_for_dense_blocks():
    for counts in ranks.run(run_bytes, {"gradient": "dense"}, False):
        for sums, buckets in counts["steps"]:
            assert counts["G"] <= sum(sums) <= counts["G"] + 256 * 30
            assert buckets == counts["always"]


# FSDP2.


def shard(model: nn.Module, mesh: Any = None, policy: Any = None) -> nn.Module:
    """fully_shard per block and at the root."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for block in model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def run_fsdp(cases: list[str]) -> list[dict[str, Any]]:
    rank = torch.distributed.get_rank()
    results = []
    for case in cases:
        options, how = options_of(case), CASES[case][1]
        model = llama()
        checkpointing(model, how.get("reentrant"))
        shard(model)
        optimizer = OwLore(model, **options)
        loop = {key: value for key, value in how.items() if key != "reentrant"}
        norms = train(model, optimizer, range(STEPS), rank, **loop)
        results.append({"norms": norms, "draws": optimizer.draws(), "weights": weights_of(model)})
    return results


@pytest.mark.parametrize("part", [slice(0, 4), slice(4, 8), slice(8, None)])
def test_two_shards_equal_one_process(part, monkeypatch):
    monkeypatch.setenv("OWLORE_DEBUG", "1")
    cases = list(CASES)[part]
    compare_with_one_process(cases, ranks.run(run_fsdp, cases))


def run_ways_to_shard(folder: str) -> list[dict[str, Tensor]]:
    """Trains sharded in several ways; in the last one a checkpoint is written meanwhile."""
    from torch.distributed.fsdp import fully_shard

    rank = torch.distributed.get_rank()

    def pairs(model: nn.Module) -> None:
        blocks = list(model.model.layers)
        fully_shard(blocks[:2])
        fully_shard(blocks[2:], reshard_after_forward=False)
        fully_shard(model)

    def blocks_alone(model: nn.Module) -> None:
        for block in model.model.layers:
            fully_shard(block)

    def prefetching(model: nn.Module) -> None:
        shard(model)
        first, second, *_ = model.model.layers
        first.set_modules_to_forward_prefetch([second])
        second.set_modules_to_backward_prefetch([first])

    found = []
    for way in (pairs, blocks_alone, prefetching):
        model = llama()
        way(model)
        optimizer = OwLore(model, **OPTIONS)
        train(model, optimizer, range(3), rank)
        saving = None
        if way is prefetching:
            beside = torch.distributed.new_group(backend="gloo")
            saving = dcp.async_save(
                states(model, optimizer), checkpoint_id=folder, process_group=beside
            )
        train(model, optimizer, range(3, 6), rank)
        found.append(weights_of(model))
    saving.result()
    model = shard(llama())
    optimizer = OwLore(model, **OPTIONS)
    load(folder, model, optimizer)
    train(model, optimizer, range(3, 6), rank)
    return [*found, weights_of(model)]


def test_every_way_to_shard_equals_one_process(tmp_path):
    model = llama()
    train(model, OwLore(model, **OPTIONS), range(6), None)
    for found in ranks.run(run_ways_to_shard, str(tmp_path)):
        for weights in found:
            for name, want in model.state_dict().items():
                torch.testing.assert_close(weights[name], want, **TRAINING_FLOAT64)
        assert_equal(found[-1], found[-2], "resumed")


COMPILED = {"ddp": ["projected", "dense"], "fsdp2": ["checkpointing"]}


def run_compiled(strategy: str) -> list[dict[str, Any]]:
    """Trains with each block compiled."""
    rank = torch.distributed.get_rank()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    results = []
    for case in COMPILED[strategy]:
        options, how = options_of(case), CASES[case][1]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = llama(use_cache=False)
        checkpointing(model, how.get("reentrant"))
        for block in model.model.layers:
            block.compile(backend="aot_eager")
        if strategy == "fsdp2":
            shard(model)
        optimizer = OwLore(model, **options)
        wrapped = DistributedDataParallel(model) if strategy == "ddp" else model
        norms = train(wrapped, optimizer, range(STEPS), rank, clip=how.get("clip"))
        results.append(
            {
                "norms": norms,
                "draws": optimizer.draws(),
                "weights": weights_of(model),
                "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            }
        )
    return results


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_compiled_blocks_train_the_same_on_two_ranks(strategy, monkeypatch):
    monkeypatch.setenv("OWLORE_DEBUG", "1")
    found = ranks.run(run_compiled, strategy)
    compare_with_one_process(COMPILED[strategy], found)
    # Off, sketching and with a basis; where draws switch weights themselves, with and without.
    for results in found:
        assert max(result["graphs"] for result in results) <= 3


# Checkpoints on another number of ranks.


def states(model: nn.Module, optimizer: OwLore) -> dict[str, Any]:
    return {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}


def load(folder: str, model: nn.Module, optimizer: OwLore) -> None:
    prepare_load(optimizer, folder)
    state = states(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])


def resumable(
    folder: str,
    options: dict[str, Any],
    strategy: str,
    saves: list[int],
    begin: int | None = None,
    end: int = STEPS,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A run that saves before some steps, or goes on from one; weights and state at its end."""
    rank = None if strategy == "one" else torch.distributed.get_rank()
    model = llama()
    if options.get("moments") == "bf16":
        model = model.bfloat16()
    if begin is not None:
        with torch.no_grad():
            for param in model.parameters():
                param.add_(1.0)
    if strategy == "fsdp2":
        shard(model)
    optimizer = OwLore(model, **OPTIONS | options)
    wrapped = DistributedDataParallel(model) if strategy == "ddp" else model
    if begin is not None:
        load(f"{folder}/{begin}", model, optimizer)
    for step in range(begin or 0, end):
        if step in saves:
            dcp.save(states(model, optimizer), checkpoint_id=f"{folder}/{step}")
        train(wrapped, optimizer, range(step, step + 1), rank)
    whole = StateDictOptions(full_state_dict=True)
    return weights_of(model), get_optimizer_state_dict(model, optimizer, options=whole)["state"]


RESUMES: list[tuple[str, dict[str, Any]]] = [
    ("fsdp2", {}),
    ("fsdp2", {"state": "keep", "moments": "bf16"}),
    ("fsdp2", {"gradient": "dense", "state": "offload"}),
    ("ddp", {"state": "keep"}),
]


def run_resumable(tasks: list[tuple[Any, ...]]) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    return [resumable(*task) for task in tasks]


@pytest.mark.parametrize("strategy, options", RESUMES, ids=str)
def test_a_checkpoint_continues_on_as_many_ranks_and_on_others(tmp_path, strategy, options):
    # After a sketch, and in the middle of the second interval.
    begins = [1, 6]
    begin = begins[1]
    folders = {name: str(tmp_path / name) for name in ("many", "one")}
    one = resumable(folders["one"], options, "one", begins)
    first = (folders["many"], options, strategy, begins)
    again = [(folders["many"], options, strategy, [], b) for b in begins]
    loads = [(folder, options, strategy, [], begin, begin) for folder in folders.values()]
    more = (folders["one"], options, strategy, [], begin)
    for rank, (many, *results) in enumerate(
        ranks.run(run_resumable, [first, *again, *loads, more])
    ):
        for found in results[:2]:
            assert_equal(found, many, f"resumed on rank {rank}")
        # What one rank loads is what the others load, to the bit.
        for folder, found in zip(folders.values(), results[2:4], strict=True):
            want = resumable(folder, options, "one", [], begin, begin)
            assert_equal(found, want, f"loaded on rank {rank}")
        if options.get("moments") == "bf16":
            # In bfloat16 a sum in another order is another run after a dozen steps.
            continue
        fewer = resumable(folders["many"], options, "one", [], begin)
        for found in (fewer, results[4]):
            assert found[1].keys() == one[1].keys()
            for key, want in one[0].items():
                torch.testing.assert_close(found[0][key], want, **TRAINING_FLOAT64)


def assert_equal(found: Any, want: Any, where: str) -> None:
    if isinstance(want, Tensor):
        assert torch.equal(found, want), where
    elif isinstance(want, tuple | list):
        for i, value in enumerate(want):
            assert_equal(found[i], value, f"{where}: {i}")
    elif isinstance(want, dict):
        assert found.keys() == want.keys(), where
        for key, value in want.items():
            assert_equal(found[key], value, f"{where}: {key}")
    else:
        assert found == want, where


# More of FSDP2.


def run_mixed(options: dict[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    rank = torch.distributed.get_rank()
    model = llama().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    optimizer = OwLore(shard(model, policy=policy), **OPTIONS | options)
    losses = []
    for _ in range(STEPS):
        # The same rows at each step, so that they are learnt.
        ids = rows(0, 0)[2 * rank : 2 * rank + 2]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return weights_of(model), losses


@pytest.mark.parametrize("options", [{}, {"gradient": "dense"}], ids=str)
def test_mixed_precision_trains_float32_weights(options):
    found = ranks.run(run_mixed, options)
    assert_equal(found[1][0], found[0][0], "weights")
    for _, losses in found:
        assert losses[-1] < losses[0] - 0.5
    start = llama().float().state_dict()
    trained = [n for n, w in found[0][0].items() if not torch.equal(w, start[n])]
    assert len(trained) > 0.7 * len(start)


def mesh(shape: tuple[int, ...]) -> Any:
    """Of three dimensions the last two, as beside pipeline parallelism."""
    from torch.distributed.device_mesh import init_device_mesh

    names = ("stage", "replicate", "shard")[-len(shape) :]
    made = init_device_mesh(device().type, shape, mesh_dim_names=names)
    return made["replicate", "shard"] if len(shape) == 3 else made


BOTH_PATHS: list[dict[str, Any]] = [{}, {"gradient": "dense"}]


def run_hybrid(shape: tuple[int, ...]) -> list[dict[str, Tensor]]:
    return [train_hybrid(shape, options) for options in BOTH_PATHS]


def train_hybrid(shape: tuple[int, ...], options: dict[str, Any]) -> dict[str, Tensor]:
    grid = mesh(shape)
    size = grid.size()
    rank = torch.distributed.get_rank() % size
    model = shard(llama(), grid)
    optimizer = OwLore(model, **OPTIONS | options)
    for step in range(6):
        ids = rows(step, 0, size)[2 * rank : 2 * rank + 2]
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (2, 1), (2, 1, 2)], ids=str)
def test_hybrid_shards_equal_one_process(shape, monkeypatch):
    monkeypatch.setenv("OWLORE_DEBUG", "1")
    size = math.prod(shape[-2:])
    found = ranks.run(run_hybrid, shape, ranks=math.prod(shape))
    for i, options in enumerate(BOTH_PATHS):
        model = llama()
        optimizer = OwLore(model, **OPTIONS | options)
        for step in range(6):
            ids = rows(step, 0, size)
            model(input_ids=ids, labels=ids).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
        for results in found:
            for name, want in model.state_dict().items():
                torch.testing.assert_close(results[i][name], want, **TRAINING_FLOAT64)


def run_edges() -> tuple[tuple[int, ...], list[dict[str, Tensor]]]:
    """A rank without rows, and a draw that finds blocks gathered by a forward pass before it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    row = nn.Parameter(distribute_tensor(torch.ones(1, 4), mesh((size,)), [Shard(0)]))
    spread = distributed.spread_of("row", row)
    assert spread is not None
    part = spread.part_of(torch.ones(1, 4), 0)
    found = []
    for options in BOTH_PATHS:
        model = llama()
        for block in model.model.layers:
            fully_shard(block, reshard_after_forward=False)
        fully_shard(model)
        optimizer = OwLore(model, **OPTIONS | options)
        for step in range(STEPS):
            if step % OPTIONS["interval"] == 0:
                model.eval()
                with torch.no_grad():
                    model(input_ids=rows(0, 0))
                model.train()
            train(model, optimizer, range(step, step + 1), rank)
        found.append(weights_of(model))
    return tuple(part.shape), found


def test_rows_and_gathered_weights_at_the_edges():
    answers = ranks.run(run_edges)
    assert [shape for shape, _ in answers] == [(1, 4), (0, 4)]
    for i, options in enumerate(BOTH_PATHS):
        model = llama()
        train(model, OwLore(model, **OPTIONS | options), range(STEPS), None)
        for _, found in answers:
            for name, want in model.state_dict().items():
                torch.testing.assert_close(found[i][name], want, **TRAINING_FLOAT64)


def same_gradients(model: nn.Module, optimizer: OwLore, step: int) -> None:
    """Fills gradients with numbers that do not depend on the ranks."""
    for member in optimizer._members:
        if not optimizer._is_active(member):
            continue
        taker = member.sketch if member.sketches else member.param
        generator = torch.Generator().manual_seed(member.stream + step)
        value = torch.randn(taker.shape, generator=generator).bfloat16()
        value = value.to(taker.device, taker.dtype)
        if member.spread is not None:
            split = None if member.projection is not None else 0
            value = member.spread.adopt(value, value.device, split)
        taker.grad = value


def run_bits(sharded: bool, options: dict[str, Any], conv: bool) -> dict[str, Tensor]:
    if conv:
        # A Conv1D is cut by input features, and a rank whose part begins within eight of them
        # leaves its matrices to the reference: on two GPUs no part does.
        sizes = (16, 32) if device().type == "cuda" else (20, 28)
        model = tiny_models.build("gpt2", hidden_size=sizes[0], n_inner=sizes[1])
        blocks = model.transformer.h
    else:
        model = tiny_models.build("llama", hidden_size=24, intermediate_size=28)
        blocks = model.model.layers
    model = model.bfloat16().to(device())
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = OwLore(model, **OPTIONS | {"scores": None, "distribution": "uniform"} | options)
    if not sharded:
        # As shards take R: a basis from bfloat16 is another one on a GPU.
        optimizer._accumulates = True
        optimizer._set_gradient_dtype()
    for step in range(3):
        model(**{key: value.to(device()) for key, value in tiny_models.batch(seed=step).items()})
        same_gradients(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


BITS: list[tuple[dict[str, Any], bool]] = [
    (options, conv)
    for options in ({"moments": "bf16"}, {"moments": "bf16", "side": "left"}, {"rank": None})
    for conv in (False, True)
]


def run_all_bits(sharded: bool) -> list[dict[str, Tensor]]:
    return [run_bits(sharded, options | {"blocks": "all"}, conv) for options, conv in BITS]


@pytest.mark.parametrize("count", [2, 3])
def test_random_bits_do_not_depend_on_the_shards(count):
    want = run_all_bits(False)
    for found in ranks.run(run_all_bits, True, ranks=count):
        for (options, conv), weights, expected in zip(BITS, found, want, strict=True):
            assert_equal(weights, expected, f"{options}, conv {conv}")


def run_memory() -> tuple[dict[str, int], int, int]:
    model = shard(llama().float())
    optimizer = OwLore(model, **OPTIONS)
    train(model, optimizer, range(2), torch.distributed.get_rank())
    before = sum(p.to_local().numel() for n, p in model.named_parameters() if "owlore" not in n)
    return optimizer.memory(), 4 * before, 4 * sum(p.numel() for p in llama().parameters())


def test_each_rank_holds_its_part_alone():
    plain = llama().float()
    optimizer = OwLore(plain, **OPTIONS)
    train(plain, optimizer, range(2), None)
    alone = optimizer.memory()
    for account, part, all_of_it in ranks.run(run_memory):
        assert account["weights"] == part == all_of_it // 2
        # Moments on the output side's weights are whole on every rank.
        assert 0.5 * alone["moments"] <= account["moments"] < 0.75 * alone["moments"]
        assert account["basis"] == alone["basis"]


# Faults.


def run_wrong_orders() -> list[str]:
    messages = []
    rows_ = rows(0, 0)

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    def attempt(build: Callable[[], Any]) -> None:
        try:
            build()
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
        else:
            messages.append("nothing was raised")

    def outer() -> None:
        model = llama()
        kept = OwLore(model, **OPTIONS | {"gradient": "dense"})
        DistributedDataParallel(Outer(model))(input_ids=rows_, labels=rows_)
        kept.detach()

    def inner_later() -> None:
        model = llama()
        wrapped = DistributedDataParallel(model)
        kept = OwLore(model, rank=4)
        try:
            wrapped(input_ids=rows_, labels=rows_)
        finally:
            kept.detach()

    def late() -> None:
        model = llama()
        kept = OwLore(model, **OPTIONS | {"gradient": "dense"})
        shard(model)(input_ids=rows_, labels=rows_)
        kept.detach()

    def nothing_left() -> None:
        model = llama()
        model.model.norm = nn.Identity()
        frozen = {"embeddings": "freeze", "head": "freeze", "norms": "freeze"}
        OwLore(DistributedDataParallel(model), **OPTIONS | frozen)

    def forgotten() -> None:
        model = llama()
        first = OwLore(model, **OPTIONS | {"embeddings": "freeze"})
        wrapped = DistributedDataParallel(model)
        wrapped(input_ids=rows_, labels=rows_).loss.backward()
        first.detach()
        kept = OwLore(model, **OPTIONS)
        wrapped(input_ids=rows_, labels=rows_)
        kept.detach()

    def two_cuts() -> None:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        model = llama()
        linear = model.model.layers[0].mlp.up_proj
        grid = mesh((1, 2))
        for placements in ([Shard(0), Shard(0)], [Replicate(), Shard(1)]):
            spread = nn.Parameter(distribute_tensor(linear.weight.detach(), grid, placements))
            with pytest.raises(ValueError, match="without tensor parallelism"):
                distributed.spread_of("weight", spread)
        raise ValueError("refused twice")

    def tensor_parallel() -> None:
        from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

        model = llama()
        parallelize_module(model.model.layers[0].mlp, mesh((2,)), {"down_proj": RowwiseParallel()})
        OwLore(model, **OPTIONS)

    def in_host_memory() -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        OwLore(fully_shard(llama(), offload_policy=CPUOffloadPolicy(False)), **OPTIONS)

    builds = (
        outer, inner_later, late, nothing_left, forgotten, two_cuts, tensor_parallel,
        in_host_memory,
    )  # fmt: skip
    for build in builds:
        attempt(build)
    return messages


def test_wrong_orders_and_wrappers_say_what_to_do():
    wants = [
        "Wrap the very model that OwLore was built from",
        "Wrap the very model that OwLore was built from",
        "call fully_shard first",
        "under it embeddings or head must be 'full'",
        "wrap the model anew",
        "refused twice",
        "without tensor parallelism",
        "shard without offload_policy",
    ]
    for messages in ranks.run(run_wrong_orders):
        for message, want in zip(messages, wants, strict=True):
            assert want in message, messages


def run_nan(strategy: str) -> list[tuple[dict[str, Tensor], dict[str, int], bool]]:
    """A bad gradient in the step that sketches, and in one that steps."""
    return [train_with_nan(strategy, bad) for bad in (0, 2)]


def train_with_nan(strategy: str, bad: int) -> tuple[dict[str, Tensor], dict[str, int], bool]:
    rank = torch.distributed.get_rank()
    model = llama()
    if strategy == "fsdp2":
        shard(model)
    optimizer = OwLore(model, **OPTIONS | {"embeddings": "freeze"})
    wrapped = DistributedDataParallel(model) if strategy == "ddp" else model
    for step in range(STEPS):
        ids = rows(step, 0)[2 * rank : 2 * rank + 2]
        loss = wrapped(input_ids=ids, labels=ids).loss
        (loss * float("nan") if step == bad and rank == 1 else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = weights_of(model)
    finite = all(bool(torch.isfinite(weight).all()) for weight in weights.values())
    return weights, optimizer.nonfinite(), finite


@pytest.mark.filterwarnings("ignore:owlore. non-finite")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_nan_on_one_rank_is_one_decision(strategy, monkeypatch):
    monkeypatch.setenv("OWLORE_DEBUG", "1")
    for first, second in zip(*ranks.run(run_nan, strategy), strict=True):
        assert first[2]
        assert_equal(second[0], first[0], "weights")
        assert first[1]


def run_debug() -> list[str]:
    rank = torch.distributed.get_rank()
    model = DistributedDataParallel(llama())
    optimizer = OwLore(model, **OPTIONS)
    train(model, optimizer, range(1), rank)
    state = next(state for state in optimizer.state.values() if "basis" in state)
    if rank == 1:
        state["basis"][0, 0] += 1e-3
    messages = []
    try:
        train(model, optimizer, range(1, 2), rank)
    except RuntimeError as error:
        messages.append(str(error))
    try:
        optimizer._exchange.compare({}, (0, rank))
    except RuntimeError as error:
        messages.append(str(error))
    return messages


def test_debug_mode_finds_ranks_that_drifted_apart(monkeypatch):
    monkeypatch.setenv("OWLORE_DEBUG", "1")
    for bases, blocks in ranks.run(run_debug):
        assert "has another model.layers" in bases
        assert "has another active blocks" in blocks


def test_flat_groups_are_refused(tiny_llama, monkeypatch):
    optimizer = OwLore(tiny_llama, **OPTIONS)
    # As DeepSpeed's ZeRO does it.
    flat = nn.Parameter(torch.zeros(100))
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"DeepSpeed ZeRO .* FSDP2"):
        optimizer.step()
    assert not optimizer.state
    for name, message in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed ZeRO"),
        ("ACCELERATE_USE_FSDP", r"shard_first\(trainer\) .*shard_with\("),
    ):
        # accelerate and TrainingArguments set these.
        with monkeypatch.context() as patch:
            patch.setenv(name, "true")
            with pytest.raises(ValueError, match=message):
                OwLore(llama(), **OPTIONS)
    partitioned = llama()
    partitioned.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO .* FSDP2"):
        OwLore(partitioned, **OPTIONS)
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = tiny_llama
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO .* FSDP2"):
        OwLore(engine, **OPTIONS)
    old = type("FullyShardedDataParallel", (nn.Module,), {})()
    old.module = tiny_llama
    with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
        OwLore(old, **OPTIONS)


# Ranks that die, and files that end.


def run_killed(folder: str, dies: bool) -> int:
    """Saves twice; in the second save rank 1 is killed while it writes."""
    rank = torch.distributed.get_rank()
    model = shard(llama())
    optimizer = OwLore(model, **OPTIONS)
    train(model, optimizer, range(3), rank)
    dcp.save(states(model, optimizer), checkpoint_id=f"{folder}/3")
    train(model, optimizer, range(3, 5), rank)
    writer = dcp.FileSystemWriter(f"{folder}/5")
    if dies and rank == 1:
        write = writer.write_data

        def killed(plan: Any, planner: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)
            return write(plan, planner)

        writer.write_data = killed
    dcp.save(states(model, optimizer), storage_writer=writer)
    return 0


def test_a_rank_killed_while_saving_loses_that_checkpoint_alone(tmp_path):
    folder = str(tmp_path)
    began = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1: ended with -9"):
        ranks.run(run_killed, folder, True, timeout=8)
    # No hang beyond the group's timeout.
    assert time.monotonic() - began < 45
    model = llama()
    optimizer = OwLore(model, **OPTIONS)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"checkpoint: no optimizer state in .*interrupted"):
        prepare_load(optimizer, f"{folder}/5")
    assert optimizer.state_dict() == before
    # The one before it goes on.
    load(f"{folder}/3", model, optimizer)
    train(model, optimizer, range(3, 5), None)
    want = llama()
    other = OwLore(want, **OPTIONS)
    train(want, other, range(5), None)
    for name, weight in want.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, **TRAINING_FLOAT64)


def run_full_disk(folder: str) -> tuple[list[str], dict[str, Tensor]]:
    """On rank 0 no file may grow beyond a few kilobytes while it saves a second time."""
    rank = torch.distributed.get_rank()
    model = shard(llama())
    optimizer = OwLore(model, **OPTIONS)
    errors = []
    for step in range(6):
        train(model, optimizer, range(step, step + 1), rank)
        if step in (2, 4):
            if step == 4 and rank == 0:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                limit = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
            try:
                dcp.save(states(model, optimizer), checkpoint_id=f"{folder}/{step}")
            except dcp.CheckpointException as error:
                errors.append(str(error))
            if step == 4 and rank == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return errors, weights_of(model)


def test_a_full_disk_loses_that_checkpoint_alone(tmp_path):
    want = llama()
    other = OwLore(want, **OPTIONS)
    train(want, other, range(6), None)
    for errors, weights in ranks.run(run_full_disk, str(tmp_path)):
        # torch's writer says that it could not write; every rank hears of it.
        assert len(errors) == 1
        assert "RANK 0" in errors[0]
        # Training went on.
        for name, weight in want.state_dict().items():
            torch.testing.assert_close(weights[name], weight, **TRAINING_FLOAT64)
    model = llama()
    optimizer = OwLore(model, **OPTIONS)
    with pytest.raises(ValueError, match="checkpoint: "):
        prepare_load(optimizer, tmp_path / "4")
    load(str(tmp_path / "2"), model, optimizer)
    train(model, optimizer, range(3, 6), None)
    for name, weight in want.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, **TRAINING_FLOAT64)


# NCCL, a GPU for each rank.


def gathered(value: Any) -> list[Any]:
    """Every rank's value."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def part_ddp() -> None:
    compare_with_one_process(list(CASES), gathered(run_ddp(list(CASES), "before")))


def part_fsdp2() -> None:
    compare_with_one_process(list(CASES), gathered(run_fsdp(list(CASES))))


def part_bits() -> None:
    """Shards in bfloat16 with the kernels, from the same gradients."""
    for (options, conv), found, want in zip(
        BITS, run_all_bits(True), run_all_bits(False), strict=True
    ):
        assert_equal(found, want, f"{options}, conv {conv}")


def part_mixed_precision() -> None:
    for options in BOTH_PATHS:
        weights, losses = run_mixed(options)
        assert losses[-1] < losses[0] - 0.5
        for other in gathered(weights):
            assert_equal(other, weights, str(options))


def part_bytes() -> None:
    if torch.distributed.get_world_size() == 1:
        return
    for sharded in (False, True):
        counts = run_bytes({}, sharded)
        for (sums, _), key in zip(counts["steps"], ("Y", "R"), strict=True):
            assert len(sums) == 1
            assert counts[key] <= sums[0] <= counts[key] + 256 * 30


def part_resume(folder: str, strategy: str) -> None:
    """In the middle of an interval, in bfloat16 with the kernels, to the bit."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    for options in BOTH_PATHS:
        options = options | {"state": "offload", "moments": "bf16"}
        place = f"{folder}/{strategy}-{options.get('gradient', 'projected')}"
        whole = resumable(place, options, strategy, [6])
        assert_equal(resumable(place, options, strategy, [], 6), whole, place)
        for other in gathered(whole[0]):
            assert_equal(other, whole[0], place)
    torch.use_deterministic_algorithms(False)


def part_trainer(folder: str, kind: str) -> None:
    """A Trainer with accelerate's own FSDP2, which there is on GPUs alone."""
    from test_trainer_ranks import run_sharded_trainer

    place = f"{folder}/{kind}"
    whole = run_sharded_trainer(place, kind, None)
    again = run_sharded_trainer(place, kind, 5)
    assert again[1] == whole[1]
    for name, want in whole[0].items():
        torch.testing.assert_close(again[0][name], want, **TRAINING_FLOAT64)
    for other in gathered(whole):
        assert_equal(other, whole, kind)


def part_nan() -> None:
    for strategy in ("ddp", "fsdp2"):
        results = gathered([(weights, fine) for weights, _, fine in run_nan(strategy)])
        for other in results:
            assert_equal(other, results[0], strategy)
            assert all(fine for _, fine in other)


def without_float32() -> None:
    """Norms and loss in the weights' dtype: transformers takes them in float32.

    On a GPU the order of such sums depends on the shape of the batch, and ranks have other shapes
    than one process. What stays in float32, the angles of rotary embeddings, depends on positions.
    """
    from transformers.loss import loss_utils
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def norm(self: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x * scale

    def loss(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    LlamaRMSNorm.forward = norm
    loss_utils.LOSS_MAPPING["ForCausalLM"] = loss


def run_nccl(folder: str, names: list[str]) -> dict[str, str]:
    """What failed of each part; empty where nothing did."""
    failed = {}
    without_float32()
    for name in names:
        kind, _, strategy = name.partition(" ")
        part = globals()[f"part_{kind}"]
        began = time.monotonic()
        try:
            part(folder, strategy) if strategy else part()
            failed[name] = ""
        except Exception:
            failed[name] = traceback.format_exc()
        # A rank that hangs takes its answer along.
        state = "failed" if failed[name] else "passed"
        print(f"{name}: {state} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return failed


PARTS = ["ddp", "fsdp2", "bits", "mixed_precision", "bytes", "resume ddp", "resume fsdp2", "nan"]
PARTS += ["trainer FULL_STATE_DICT", "trainer SHARDED_STATE_DICT"]


@pytest.mark.gpu
@pytest.mark.timeout(400)
@pytest.mark.parametrize("count", [1, 2])
def test_nccl(count, tmp_path, monkeypatch):
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA devices; torch sees {torch.cuda.device_count()}")
    monkeypatch.setenv("OWLORE_DEBUG", "1")
    # On one rank nothing is averaged, and shards are whole.
    parts = PARTS if count > 1 else ["fsdp2", "bits", "resume fsdp2"]
    answers = ranks.run(
        run_nccl, str(tmp_path), parts, ranks=count, timeout=60, backend="nccl", wait=360
    )
    failed = [text for answer in answers for text in answer.values() if text]
    assert not failed, "\n".join(failed)
