"""DistributedDataParallel on two ranks against one process, on real processes over gloo."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import ranks
import torch
from test_optimizer import SCORES
from tolerances import TRAINING_FLOAT64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from owlore import OwLore

OPTIONS: dict[str, Any] = {
    "blocks": 2,
    "rank": 4,
    "interval": 4,
    "refresh_interval": 3,
    "scores": SCORES,
    "lr": 1e-2,
    "on_refresh": "transport",
}
STEPS = 12


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
    return LlamaForCausalLM(LlamaConfig(**sizes | overrides)).train().double()


def rows(step: int, micro: int, ranks: int = 2) -> Tensor:
    """Token ids of one micro-batch of all ranks. [2 * ranks, 10]"""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randint(0, 64, (2 * ranks, 10), generator=generator)


def train(
    model: nn.Module,
    optimizer: OwLore,
    steps: range,
    rank: int | None,
    accumulation: int = 1,
    clip: float | None = None,
) -> list[float]:
    """Trains on this rank's rows, or on all of them; returns the norms that clipping saw."""
    norms = []
    for step in steps:
        for micro in range(accumulation):
            ids = rows(step, micro)
            if rank is not None:
                ids = ids[2 * rank : 2 * rank + 2]
            last = micro == accumulation - 1
            waits = isinstance(model, DistributedDataParallel) and not last
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
    "projected, accumulation, clipping": ({"state": "keep"}, {"accumulation": 2, "clip": 0.3}),
    "exact, accumulation": ({"refresh": "exact"}, {"accumulation": 2}),
    "checkpointing": ({"state": "offload"}, {"reentrant": False, "clip": 0.3}),
    "reentrant checkpointing": ({}, {"reentrant": True}),
    "low-rank embedding and head": ({"embeddings": "lowrank", "head": "lowrank"}, {}),
    "frozen embedding and head": ({"embeddings": "freeze", "head": "freeze"}, {"clip": 0.3}),
    "left side, all blocks": ({"side": "left", "blocks": "all"}, {"accumulation": 2}),
    "dense": ({"gradient": "dense"}, {"clip": 0.3}),
    "dense, accumulation": ({"gradient": "dense", "state": "keep"}, {"accumulation": 2}),
    "full rank": ({"rank": None}, {"reentrant": False}),
}


def run_ddp(cases: list[str], built: str) -> list[dict[str, Any]]:
    """Trains each case on this rank."""
    rank = torch.distributed.get_rank()
    results = []
    for case in cases:
        options, how = CASES[case]
        model = llama()
        checkpointing(model, how.get("reentrant"))
        if rank > 0:
            # Wrapping gives every rank the weights of the first.
            with torch.no_grad():
                for param in model.parameters():
                    param.add_(1.0)
        if built == "before":
            optimizer = OwLore(model, **OPTIONS | options)
            wrapped = DistributedDataParallel(model)
        else:
            wrapped = DistributedDataParallel(model)
            optimizer = OwLore(wrapped, **OPTIONS | options)
        loop = {key: value for key, value in how.items() if key != "reentrant"}
        norms = train(wrapped, optimizer, range(STEPS), rank, **loop)
        results.append({"norms": norms, "draws": optimizer.draws(), "weights": model.state_dict()})
    return results


@pytest.mark.parametrize("built", ["before", "after"])
@pytest.mark.parametrize("part", [slice(0, 6), slice(6, None)])
def test_two_ranks_equal_one_process(built, part, monkeypatch):
    monkeypatch.setenv("OWLORE_DEBUG", "1")
    cases = list(CASES)[part]
    found = ranks.run(run_ddp, cases, built)
    for i, case in enumerate(cases):
        options, how = CASES[case]
        model = llama()
        before = copy.deepcopy(model.state_dict())
        checkpointing(model, how.get("reentrant"))
        optimizer = OwLore(model, **OPTIONS | options)
        loop = {key: value for key, value in how.items() if key != "reentrant"}
        norms = train(model, optimizer, range(STEPS), None, **loop)
        assert len({drawn for _, drawn in optimizer.draws()}) > 1 or options.get("blocks") == "all"
        for results in found:
            result = results[i]
            assert result["draws"] == optimizer.draws()
            assert result["norms"] == pytest.approx(norms, rel=1e-6)
            for name, want in model.state_dict().items():
                torch.testing.assert_close(
                    result["weights"][name],
                    want,
                    **TRAINING_FLOAT64,
                    msg=lambda text, case=case, name=name: f"{case}: {name}: {text}",
                )
        moved = [n for n, w in model.state_dict().items() if not torch.equal(w, before[n])]
        assert any("proj" in name for name in moved), case
        first, second = (results[i]["weights"] for results in found)
        for name, weight in first.items():
            assert torch.equal(weight, second[name]), (case, name)
