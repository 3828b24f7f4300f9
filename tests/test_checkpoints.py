"""Checkpoints of torch.distributed.checkpoint and of trainers, whole, damaged and foreign."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_optimizer import SCORES, assert_same, snapshot, train_step
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from owlore import OwLore, checkpoints, prepare_load

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")

OPTIONS: dict[str, Any] = {
    "blocks": 2,
    "rank": 4,
    "interval": 5,
    "scores": SCORES,
    "refresh_interval": 3,
    "on_refresh": "transport",
    "embeddings": "full",
    "head": "full",
    "norms": "full",
}


def fresh(like: nn.Module, options: dict[str, Any]) -> tuple[nn.Module, OwLore]:
    """A model with other weights, and its optimizer."""
    model = copy.deepcopy(like)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    return model, OwLore(model, **options)


def save(folder: Path, model: nn.Module, optimizer: OwLore, options: StateDictOptions) -> None:
    state = {
        "model": get_model_state_dict(model, options=options),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(state, checkpoint_id=str(folder))


def load(folder: Path, model: nn.Module, optimizer: OwLore, options: StateDictOptions) -> None:
    prepare_load(optimizer, folder)
    state = {
        "model": get_model_state_dict(model, options=options),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(state, checkpoint_id=str(folder))
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optim"], options=options)


FORMS = {
    "sharded": StateDictOptions(),
    "full": StateDictOptions(full_state_dict=True),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state": "keep"},
        {"state": "offload", "moments": "bf16"},
        {"refresh": "exact"},
        {"gradient": "dense"},
    ],
    ids=str,
)
def test_a_distributed_checkpoint_continues_bit_for_bit(tiny_llama, tmp_path, form, options):
    options = OPTIONS | options
    like = tiny_llama.bfloat16() if options.get("moments") == "bf16" else tiny_llama
    model = copy.deepcopy(like)
    optimizer = OwLore(model, **options)
    # After a sketch, in the middle of an interval, before a draw and after one.
    starts = (1, 3, 10, 11) if form == "sharded" else (1, 12)
    for step in range(14):
        if step in starts:
            save(tmp_path / str(step), model, optimizer, FORMS[form])
        train_step(model, optimizer, step)
    assert len({drawn for _, drawn in optimizer.draws()}) > 1
    for start in starts:
        resumed = fresh(like, options)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="owlore")
            load(tmp_path / str(start), *resumed, FORMS[form])
            for step in range(start, 14):
                train_step(*resumed, step)
        assert_same((model, optimizer), resumed)


def test_loading_from_a_dict_needs_no_files(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    optimizer = OwLore(model, **OPTIONS)
    for step in range(7):
        train_step(model, optimizer, step)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    keys = {name.rpartition(".")[2] for name in saved["state"]}
    assert keys == {"owlore_coordinates", "weight"}
    resumed = fresh(tiny_llama, OPTIONS)
    resumed[0].load_state_dict(model.state_dict())
    prepare_load(resumed[1], {"epoch": 3, "optim": saved})
    set_optimizer_state_dict(*resumed, saved)
    for step in range(7, 12):
        train_step(model, optimizer, step)
        train_step(*resumed, step)
    assert_same((model, optimizer), resumed)


def test_a_flat_dict_is_read_as_the_nested_one(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    optimizer = OwLore(model, **OPTIONS)
    for step in range(7):
        train_step(model, optimizer, step)
    nested, flat = (
        copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FORMS[form]))
        for form in ("full", "flat")
    )
    want, found = checkpoints.read(nested), checkpoints.read({"epoch": 3, "optim": flat})
    assert found.counters == want.counters
    assert want.counters["steps"] == 7
    # By the weight's name, or by that of its coordinates.
    shapes = [
        {
            name.replace("owlore_coordinates", "weight"): {
                key: getattr(value, "shape", value) for key, value in state.items()
            }
            for name, state in saved.states.items()
        }
        for saved in (want, found)
    ]
    assert shapes[0] == shapes[1]
    assert any("basis" in state for state in want.states.values())
    # What is read holds no memory.
    tensors = [v for state in want.states.values() for v in state.values() if hasattr(v, "shape")]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_checkpoint_of_before_the_first_step(tiny_llama, tmp_path):
    model = copy.deepcopy(tiny_llama)
    optimizer = OwLore(model, **OPTIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="owlore")
        save(tmp_path / "0", model, optimizer, StateDictOptions())
        # Nothing was drawn, moved or kept by the step that torch makes to see the states.
        assert (optimizer.steps, optimizer.active_blocks, optimizer.draws()) == (0, (), [])
        assert not optimizer.state
        assert all(p.requires_grad for g in optimizer.param_groups for p in g["params"])
        resumed = fresh(tiny_llama, OPTIONS)
        load(tmp_path / "0", *resumed, StateDictOptions())
        for step in range(6):
            train_step(model, optimizer, step)
            train_step(*resumed, step)
    assert_same((model, optimizer), resumed)


def test_a_first_step_at_rate_zero_is_a_step(tiny_llama):
    optimizer = OwLore(tiny_llama, **OPTIONS | {"lr": 0.0})
    train_step(tiny_llama, optimizer, 0)
    assert optimizer.steps == 1
    assert optimizer.state


def contents(optimizer: OwLore) -> bytes:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file.getvalue()


def truncated(folder: Path) -> None:
    for file in folder.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lost(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def scrambled(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"nothing of the kind")


def garbled(folder: Path) -> None:
    """The numbers among the tensors are no longer what they were."""
    for file in folder.glob("*.distcp"):
        size = file.stat().st_size
        file.write_bytes(b"\0" * size)


def unfinished(folder: Path) -> None:
    (folder / ".metadata").unlink()


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    dcp.save({"model": {"weight": torch.ones(3)}}, checkpoint_id=str(folder))


def of_another(folder: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    empty(folder)
    save(folder, model, optimizer, StateDictOptions())  # type: ignore[arg-type]


DAMAGES = {
    truncated: "is truncated: expected at least",
    lost: "is missing",
    scrambled: r"\.metadata is damaged",
    garbled: "is damaged",
    unfinished: "no optimizer state in",
    empty: "no optimizer state that OwLore wrote",
    of_another: "no optimizer state that OwLore wrote",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_foreign_folders_change_nothing(tiny_llama, tmp_path, damage):
    model = copy.deepcopy(tiny_llama)
    optimizer = OwLore(model, **OPTIONS)
    for step in range(7):
        train_step(model, optimizer, step)
    save(tmp_path, model, optimizer, StateDictOptions())
    train_step(model, optimizer, 7)
    before = snapshot(model, optimizer)
    flags = [param.requires_grad for param in model.parameters()]
    damage(tmp_path)
    with pytest.raises(ValueError, match=rf"checkpoint: .*{DAMAGES[damage]}"):
        prepare_load(optimizer, tmp_path)
    assert snapshot(model, optimizer) == before
    assert [param.requires_grad for param in model.parameters()] == flags


@pytest.mark.parametrize("size", [0, 100, 0.5])
def test_a_truncated_file_of_a_trainer_changes_nothing(tiny_llama, tmp_path, size):
    optimizer = OwLore(tiny_llama, **OPTIONS)
    train_step(tiny_llama, optimizer, 0)
    whole = contents(optimizer)
    file = tmp_path / "optimizer.pt"
    file.write_bytes(whole[: int(size * len(whole)) if size < 1 else size])
    for path in (tmp_path, file):
        with pytest.raises(ValueError, match=r"checkpoint: .*optimizer\.pt is damaged"):
            prepare_load(optimizer, path)
    assert contents(optimizer) == whole


def test_files_that_are_missing_or_something_else_are_named(tiny_llama, tmp_path):
    optimizer = OwLore(tiny_llama, **OPTIONS)
    train_step(tiny_llama, optimizer, 0)
    whole = contents(optimizer)
    with pytest.raises(ValueError, match=r"checkpoint: there is no .*gone\.pt"):
        prepare_load(optimizer, tmp_path / "gone.pt")
    file = tmp_path / "other.pt"
    adamw = torch.optim.AdamW(tiny_llama.parameters()).state_dict()
    strange = copy.deepcopy(adamw)
    strange["param_groups"][0]["owlore"] = 7
    for content, message in (
        ([1, 2], "holds a list, no state dict"),
        (adamw, "not written by OwLore"),
        ({"state": {}, "param_groups": []}, "not written by OwLore"),
        ({"state.a.step": 1, "param_groups.a.lr": 1.0}, "not written by OwLore"),
        (strange, "not written by OwLore"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=rf"checkpoint: .*{message}"):
            prepare_load(optimizer, file)
    assert contents(optimizer) == whole


def test_other_options_and_other_models_are_refused(tiny_llama, tmp_path):
    model = copy.deepcopy(tiny_llama)
    optimizer = OwLore(model, **OPTIONS)
    train_step(model, optimizer, 0)
    save(tmp_path, model, optimizer, StateDictOptions())
    other = OwLore(copy.deepcopy(tiny_llama), **OPTIONS | {"rank": 5})
    before = contents(other)
    with pytest.raises(ValueError, match=r"checkpoint: .*rank \(checkpoint 4, here 5\)"):
        prepare_load(other, tmp_path)
    small = copy.deepcopy(tiny_llama)
    del small.model.layers[2:]
    with pytest.raises(ValueError, match="checkpoint: probabilities: expected 2"):
        prepare_load(OwLore(small, **OPTIONS | {"scores": SCORES[:2]}), tmp_path)
    assert contents(other) == before
    with pytest.raises(TypeError, match="optimizer: expected an OwLore, got AdamW"):
        prepare_load(torch.optim.AdamW(tiny_llama.parameters()), tmp_path)


def test_a_load_that_fails_or_never_comes_leaves_the_run_as_it_was(tiny_llama, tmp_path):
    model, twin = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    optimizer, other = OwLore(model, **OPTIONS), OwLore(twin, **OPTIONS)
    for step in range(8):
        train_step(model, optimizer, step)
        if step == 2:
            save(tmp_path, model, optimizer, StateDictOptions())
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        train_step(twin, other, step)
    before = contents(optimizer)
    prepare_load(optimizer, tmp_path)
    assert optimizer.steps == 3
    with pytest.raises(ValueError, match="not written by OwLore"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())
    assert contents(optimizer) == before
    prepare_load(optimizer, tmp_path)
    with pytest.warns(UserWarning, match="no state was loaded"):
        train_step(model, optimizer, 8)
    train_step(twin, other, 8)
    assert_same((model, optimizer), (twin, other))
