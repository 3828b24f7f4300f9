"""Training with Hugging Face's Trainer, from the options to the logs."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import signal
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tolerances import TRAINING_FLOAT32, TRAINING_FLOAT64
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from owlore import OwLore, OwLoreConfig
from owlore.trainer import OwLoreFactory, log_to, log_values

OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "distribution": "uniform",
    "blocks": 1,
    "rank": 3,
    "interval": 2,
    "seed": 1,
    "embeddings": "full",
    "head": "full",
    "norms": "full",
}
ROWS = 64


def rows(count: int = ROWS) -> list[dict[str, Tensor]]:
    examples = (tiny_models.batch(seed=i, rows=1) for i in range(count))
    return [{key: value[0] for key, value in example.items()} for example in examples]


def build(
    folder: Path,
    model: nn.Module,
    options: dict[str, Any] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **arguments: Any,
) -> Trainer:
    """A Trainer that is told nothing of OwLore but `optimizer_cls_and_kwargs`."""
    given = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": OPTIONS["lr"],
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **given | arguments),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=callbacks,
        optimizer_cls_and_kwargs=(OwLoreFactory, OPTIONS | (options or {})),
    )


def train(trainer: Trainer, **options: Any) -> OwLore:
    """Trains; a warning of owlore's is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="owlore")
        trainer.train(**options)
    optimizer = trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(optimizer, OwLore)
    return optimizer


def assert_same_bits(found: Any, want: Any, where: str = "") -> None:
    """Nested dicts and lists of tensors and numbers are identical."""
    assert type(found) is type(want), where
    if isinstance(want, Tensor):
        assert found.dtype == want.dtype, where
        assert torch.equal(found, want), where
    elif isinstance(want, dict):
        assert found.keys() == want.keys(), where
        for key in want:
            assert_same_bits(found[key], want[key], f"{where}.{key}")
    elif isinstance(want, list | tuple):
        assert len(found) == len(want), where
        for i, (one, other) in enumerate(zip(found, want, strict=True)):
            assert_same_bits(one, other, f"{where}.{i}")
    else:
        assert found == want, where


class EachStep(TrainerCallback):
    """Calls a function with the optimizer after every step."""

    def __init__(self, call: Callable[[OwLore], None]) -> None:
        self.call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        optimizer = objects["optimizer"]
        self.call(getattr(optimizer, "optimizer", optimizer))


# The loop.


@pytest.mark.parametrize("accumulation", [1, 4])
def test_accumulation_clipping_and_schedule_equal_a_plain_loop(tmp_path, accumulation):
    steps, clip = 6, 0.3
    options = OPTIONS | {"dense_lr": 4e-3, "weight_decay": 0.1, "refresh_interval": 1}
    options["gradient"] = "dense"
    model = tiny_models.build("llama").double()
    seen: list[dict[str, float]] = []
    trainer = build(
        tmp_path,
        model,
        options,
        [EachStep(lambda o: seen.append({g["name"]: g["lr"] for g in o.param_groups}))],
        gradient_accumulation_steps=accumulation,
        max_grad_norm=clip,
        lr_scheduler_type="linear",
        train_sampling_strategy="sequential",
    )
    ours = train(trainer)

    twin = tiny_models.build("llama").double()
    optimizer = OwLore(twin, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    data = rows()
    clipped = 0
    for step in range(steps):
        start = 2 * accumulation * (step % (ROWS // (2 * accumulation)))
        for micro in range(accumulation):
            pair = data[start + 2 * micro : start + 2 * micro + 2]
            ids = torch.stack([row["input_ids"] for row in pair])
            (twin(input_ids=ids, labels=ids).loss / accumulation).backward()
        clipped += int(nn.utils.clip_grad_norm_(twin.parameters(), clip) > clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert clipped == steps
    assert ours.draws() == optimizer.draws()
    assert [step for step, _ in ours.draws()] == [0, 2, 4]
    assert len({drawn for _, drawn in ours.draws()}) > 1
    start = tiny_models.build("llama").double().state_dict()
    for name, want in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], want, **TRAINING_FLOAT64)
    moved = {
        name for name, want in start.items() if not torch.equal(model.state_dict()[name], want)
    }
    assert {name for name in start if "layers" not in name} <= moved

    # The callback sees the rate of the step to come.
    lows = {"blocks": OPTIONS["lr"]}
    for step, rates in enumerate(seen, start=1):
        for name, rate in rates.items():
            assert rate == pytest.approx(lows.get(name, 4e-3) * (1 - step / steps)), name
    assert set(seen[0]) == {"blocks", "block_norms", "embeddings", "head", "norm"}


def test_warmup_reaches_the_weights(tmp_path):
    model = tiny_models.build("llama").double()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[dict[str, Tensor]] = [start]

    def keep(optimizer: OwLore) -> None:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})

    warmup = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "max_steps": 3}
    train(build(tmp_path, model, {"blocks": "all"}, [EachStep(keep)], **warmup))
    # The rates are 0, lr / 2 and lr, and AdamW's first steps move an element by the rate at most.
    for name, value in start.items():
        assert torch.equal(seen[1][name], value), name
        moved = (seen[2][name] - value).abs().max() / OPTIONS["lr"]
        assert moved > 0, name
        if "proj" not in name:
            assert moved < 0.51, name
            assert (seen[3][name] - seen[2][name]).abs().max() / OPTIONS["lr"] > 0.6, name


def test_an_unknown_option_is_refused_by_name(tmp_path):
    trainer = build(tmp_path, tiny_models.build("llama"), {"interva": 3})
    with pytest.raises(TypeError, match="unknown option 'interva': did you mean 'interval'"):
        trainer.train()


def test_a_configuration_in_place_of_options(tmp_path):
    trainer = build(tmp_path, tiny_models.build("llama"))
    config = OwLoreConfig(distribution="uniform", blocks=2, rank=2, interval=3)
    trainer.optimizer_cls_and_kwargs = (OwLoreFactory, {"config": config, "lr": 1e-3})
    optimizer = train(trainer)
    assert optimizer.config == config.replace(lr=1e-3)
    assert [len(drawn) for _, drawn in optimizer.draws()] == [2, 2]


def test_a_distribution_without_a_name(tmp_path):
    # Accelerate saves the state of every optimizer that it wraps.
    options = {"distribution": lambda scores: [0.0, 1.0, 0.0]}
    optimizer = train(build(tmp_path, tiny_models.build("llama"), options))
    assert {drawn for _, drawn in optimizer.draws()} == {(1,)}


def test_evaluation_does_not_move_the_draw(tmp_path):
    results = []
    for evaluates in (False, True):
        model = tiny_models.build("llama")
        more = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
        trainer = build(tmp_path, model, **(more if evaluates else {}))
        optimizer = train(trainer)
        results.append((optimizer.draws(), optimizer.state_dict(), dict(model.state_dict())))
        evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert bool(evaluated) is evaluates
    assert_same_bits(results[1], results[0])


# Precision and memory.


def test_bfloat16_weights(tmp_path):
    model = tiny_models.build("llama").bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = train(build(tmp_path, model, {"lr": 1e-3}))
    drawn = {block for _, blocks in optimizer.draws() for block in blocks}
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.isfinite(value).all()
        parts = name.split(".")
        trains = "layers" not in parts or int(parts[2]) in drawn
        assert torch.equal(value, before[name]) is not trains, name
    names = {param: name for name, param in model.named_parameters()}
    for param, state in optimizer.state.items():
        # The blocks' weights have float32 moments, the rest bfloat16 ones.
        low_rank = names[param].endswith("proj.owlore_coordinates")
        want = torch.float32 if low_rank else torch.bfloat16
        assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {want}


class Dtypes:
    """What a module puts out."""

    def __init__(self) -> None:
        self.seen: set[torch.dtype] = set()

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.add(output.dtype)


def test_autocast(tmp_path):
    model = tiny_models.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dtypes = Dtypes()
    model.model.layers[0].mlp.down_proj.register_forward_hook(dtypes)
    optimizer = train(build(tmp_path, model, {"blocks": "all"}, bf16=True))
    assert dtypes.seen == {torch.bfloat16}
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name]), name
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == torch.float32
        assert torch.isfinite(state["exp_avg"]).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path, reentrant):
    models = [tiny_models.build("llama").double() for _ in range(2)]
    counts = []
    for model, checkpoints in zip(models, (False, True), strict=True):
        calls: list[int] = []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        more = {"gradient_checkpointing": True, **kwargs} if checkpoints else {}
        optimizer = train(build(tmp_path, model, **more))
        counts.append(len(calls))
    # Every block ran a second time.
    assert counts == [18, 36]
    assert len({drawn for _, drawn in optimizer.draws()}) > 1
    for name, want in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], want, **TRAINING_FLOAT64)


class NoInputGradients(TrainerCallback):
    """Undoes what makes the output of a frozen embedding require a gradient."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        objects["model"].disable_input_require_grads()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("input_gradients", [False, True])
def test_frozen_embeddings_under_activation_checkpointing(tmp_path, reentrant, input_gradients):
    frozen = {"embeddings": "freeze", "blocks": "all"}
    model, plain = tiny_models.build("llama"), tiny_models.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = build(
        tmp_path,
        model,
        frozen,
        [] if input_gradients else [NoInputGradients()],
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    if reentrant and not input_gradients:
        # No block gets a gradient, in silence; head and norm train on, which must not hide it.
        with pytest.warns(UserWarning, match=r"owlore: .*reentrant activation checkpointing"):
            trainer.train()
        for name, value in model.state_dict().items():
            trained = name in ("lm_head.weight", "model.norm.weight")
            assert torch.equal(value, before[name]) is not trained, name
        return
    train(trainer)
    train(build(tmp_path, plain, frozen))
    for name, want in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], want, **TRAINING_FLOAT32)
        assert torch.equal(want, before[name]) is (name == "model.embed_tokens.weight"), name


# Resuming.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("state", ["reset", "keep", "offload"])
def test_resuming_gives_the_same_bits(tmp_path, state, accumulation, dtype):
    options = {"state": state, "interval": 3, "refresh_interval": 2, "on_refresh": "transport"}
    arguments = {"gradient_accumulation_steps": accumulation, "max_steps": 9, "max_grad_norm": 0.5}

    def fresh(dropout: float = 0.1) -> nn.Module:
        return tiny_models.build("llama", attention_dropout=dropout).to(dtype)

    model = fresh()
    saves = {"save_strategy": "steps", "save_steps": 1}
    optimizer = train(build(tmp_path, model, options, **arguments, **saves))
    assert len({drawn for _, drawn in optimizer.draws()}) > 1
    want = (dict(model.state_dict()), optimizer.state_dict(), optimizer.draws())
    # After the first step of an interval, after the second, and between two intervals.
    for step in (4, 5, 6):
        model = fresh()
        trainer = build(tmp_path / "resumed", model, options, **arguments)
        optimizer = train(trainer, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert trainer.state.global_step == 9
        found = (dict(model.state_dict()), optimizer.state_dict(), optimizer.draws())
        assert_same_bits(found, want, f"from step {step}: ")


class Terminated(TrainerCallback):
    """Sends SIGTERM to the process, as a scheduler that takes the machine away does."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            # The Trainer's handler waits a while to see if SIGKILL follows.
            time.sleep(0.2)


@pytest.mark.parametrize("options", [{}, {"refresh": "exact"}, {"gradient": "dense"}], ids=str)
def test_sigterm_saves_and_the_run_goes_on(tmp_path, options, monkeypatch):
    from transformers import trainer_jit_checkpoint

    create = trainer_jit_checkpoint.CheckpointManager.__init__
    monkeypatch.setattr(
        trainer_jit_checkpoint.CheckpointManager,
        "__init__",
        lambda self, trainer: create(self, trainer, kill_wait=0),
    )
    options = {"interval": 3, "refresh_interval": 2, "state": "keep"} | options
    arguments = {"max_steps": 9, "train_sampling_strategy": "sequential"}
    model = tiny_models.build("llama")
    whole = train(build(tmp_path / "whole", model, options, **arguments))
    want = (dict(model.state_dict()), whole.state_dict(), whole.draws())

    trainer = build(
        tmp_path,
        tiny_models.build("llama"),
        options,
        [Terminated()],
        enable_jit_checkpoint=True,
        **arguments,
    )
    train(trainer)
    saved = sorted(tmp_path.glob("checkpoint-*"))
    assert len(saved) == 1
    assert trainer.state.global_step < 9
    model = tiny_models.build("llama")
    trainer = build(tmp_path / "resumed", model, options, **arguments)
    optimizer = train(trainer, resume_from_checkpoint=str(saved[0]))
    assert_same_bits((dict(model.state_dict()), optimizer.state_dict(), optimizer.draws()), want)


def test_what_was_offloaded_comes_back_as_it_was(tmp_path):
    results = {}
    for state in ("keep", "offload", "reset"):
        model = tiny_models.build("llama")
        options = {"state": state, "interval": 1, "on_refresh": "transport", "refresh": "exact"}
        optimizer = train(build(tmp_path, model, options, max_steps=9))
        drawn = [blocks for _, blocks in optimizer.draws()]
        results[state] = dict(model.state_dict())
    returns = [i for i in range(2, 9) if drawn[i] in drawn[: i - 1] and drawn[i] != drawn[i - 1]]
    assert len(returns) > 2
    assert_same_bits(results["offload"], results["keep"])
    name = f"model.layers.{drawn[returns[0]][0]}.mlp.up_proj.weight"
    assert not torch.equal(results["reset"][name], results["keep"][name])


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    train(build(tmp_path, tiny_models.build("llama"), **saves))
    trainer = build(tmp_path / "resumed", tiny_models.build("llama"), {"rank": 2})
    with pytest.raises(ValueError, match=r"checkpoint: .* rank \(checkpoint 3, here 2\)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_is_looked_at_before_it_is_loaded(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    train(build(tmp_path, tiny_models.build("llama"), **saves))
    saved = tmp_path / "checkpoint-2"

    def resume(folder: Path, looks: bool = True) -> OwLore:
        trainer = build(tmp_path / "resumed", tiny_models.build("llama"), max_steps=3)
        if looks:
            log_to(trainer)
        return train(trainer, resume_from_checkpoint=str(folder))

    assert resume(saved).steps == 3
    damaged = shutil.copytree(saved, tmp_path / "damaged")
    content = (saved / "optimizer.pt").read_bytes()
    (damaged / "optimizer.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"checkpoint: .*optimizer.pt is damaged"):
        resume(damaged)
    adamw = tiny_models.build("llama")
    torch.save(torch.optim.AdamW(adamw.parameters()).state_dict(), damaged / "optimizer.pt")
    with pytest.raises(ValueError, match="checkpoint: not written by OwLore"):
        resume(damaged)
    # As save_only_model leaves it: the Trainer goes on without a word.
    (damaged / "optimizer.pt").unlink()
    assert resume(damaged, looks=False).steps == 1
    with pytest.raises(UserWarning, match=r"owlore: .* holds no state of an optimizer"):
        resume(damaged)


# Logs.


def test_blocks_and_energy_arrive_in_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    energies: list[dict[str, float]] = []
    trainer = build(
        tmp_path,
        tiny_models.build("llama"),
        {"interval": 2, "refresh_interval": 1, "refresh": "exact"},
        [EachStep(lambda optimizer: energies.append(optimizer.energy()))],
        report_to=["tensorboard"],
        eval_strategy="steps",
        eval_steps=2,
    )
    log_to(trainer)
    optimizer = train(trainer)
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = set(board.Tags()["scalars"])
    assert {tag for tag in tags if "owlore" in tag} == {
        *(f"train/owlore/block/{i:02d}" for i in range(3)),
        "train/owlore/energy",
        "train/owlore/energy_min",
        "train/owlore/nonfinite",
    }

    def series(tag: str) -> dict[int, float]:
        events = {event.step: event.value for event in board.Scalars(tag)}
        # Once for each step: an evaluation's log is not one of a training step.
        assert len(events) == len(board.Scalars(tag))
        return events

    for block in range(3):
        drawn = {step + 1: float(block in optimizer._draw(step // 2)) for step in range(6)}
        assert series(f"train/owlore/block/{block:02d}") == drawn
    assert len(energies) == 6
    for step, energy in enumerate(energies, start=1):
        # One block's seven matrices.
        assert len(energy) == 7
        mean, least = sum(energy.values()) / 7, min(energy.values())
        assert 0 < least < mean < 1
        assert series("train/owlore/energy")[step] == pytest.approx(mean, rel=1e-5)
        assert series("train/owlore/energy_min")[step] == pytest.approx(least, rel=1e-5)
    assert len(set(series("train/owlore/energy").values())) > 3
    assert set(series("train/owlore/nonfinite").values()) == {0.0}
    # What is logged anyway is still there.
    assert set(series("train/loss")) == {1, 2, 3, 4, 5, 6}
    assert set(series("eval/loss")) == {2, 4, 6}


def test_logging_without_owlore_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = build(tmp_path, tiny_models.build("llama"), report_to=["tensorboard"])
    trainer.optimizer_cls_and_kwargs = None
    log_to(trainer)
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert "train/loss" in board.Tags()["scalars"]
    assert not any("owlore" in tag for tag in board.Tags()["scalars"])


def test_dense_blocks_log_no_energy_and_bad_gradients_are_counted():
    model = tiny_models.build("llama")
    optimizer = OwLore(model, **OPTIONS | {"rank": None})
    model(**tiny_models.batch()).loss.backward()
    model.lm_head.weight.grad[0, 0] = float("nan")
    model.model.norm.weight.grad[0] = float("inf")
    optimizer.step()
    (active,) = optimizer.active_blocks
    assert log_values(optimizer) == {
        **{f"owlore/block/{i:02d}": float(i == active) for i in range(3)},
        "owlore/nonfinite": 2.0,
    }


# Copies of the model.


class Average(TrainerCallback):
    """Keeps an exponential average of the weights in a deep copy, and runs it in training mode."""

    def __init__(self) -> None:
        self.copies: list[nn.Module] = []
        self.seen: list[tuple[int, ...]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.average = torch.optim.swa_utils.AveragedModel(objects["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        optimizer = objects["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.average.update_parameters(objects["model"])
        self.copies.append(copy.deepcopy(objects["model"]))
        before = optimizer.active_blocks, optimizer.draws(), optimizer.steps
        # A draw is due after every second step, and the next forward of the model would make it.
        for twin in (self.average.module, *self.copies):
            flags = [param.requires_grad for param in twin.parameters()]
            twin.train()
            twin(**tiny_models.batch()).loss.backward()
            assert [param.requires_grad for param in twin.parameters()] == flags
        assert (optimizer.active_blocks, optimizer.draws(), optimizer.steps) == before
        self.seen.append(optimizer.active_blocks)


def test_copies_of_the_model_neither_draw_nor_hold_the_optimizer(tmp_path):
    model, plain = tiny_models.build("llama"), tiny_models.build("llama")
    average = Average()
    trainer = build(tmp_path, model, callbacks=[average])
    optimizer = train(trainer)
    assert average.seen == [drawn for _, drawn in optimizer.draws() for _ in range(2)]
    want = train(build(tmp_path, plain))
    assert optimizer.draws() == want.draws()
    assert_same_bits(dict(model.state_dict()), dict(plain.state_dict()))
    held = weakref.ref(optimizer)
    del optimizer, trainer
    gc.collect()
    assert held() is None
    assert len(average.copies) == 6
