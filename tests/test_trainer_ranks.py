"""Hugging Face's Trainer and accelerate on two ranks, as torchrun starts them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_models
import torch
from accelerate import (
    Accelerator,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from test_distributed import CASES, assert_equal, compare_with_one_process, llama, weights_of
from test_distributed import OPTIONS as CASE_OPTIONS
from test_distributed import STEPS as CASE_STEPS
from test_distributed import rows as case_rows
from test_trainer import OPTIONS, Terminated, build, train
from tolerances import TRAINING_FLOAT64
from torch import Tensor

from owlore import OwLore, distributed
from owlore.trainer import shard_first, shard_with

STEPS = 9


def run_trainer(
    folder: str, options: dict[str, Any], arguments: dict[str, Any], resume: int | None
) -> tuple[dict[str, Tensor], dict[str, Any], list[Any], float]:
    model = tiny_models.build("llama").double()
    if resume is None:
        arguments = arguments | {"save_strategy": "steps", "save_steps": 1}
    trainer = build(
        Path(folder),
        model,
        options,
        max_steps=STEPS,
        max_grad_norm=0.3,
        ddp_backend="gloo",
        train_sampling_strategy="sequential",
        **arguments,
    )
    checkpoint = None if resume is None else f"{folder}/checkpoint-{resume}"
    optimizer = train(trainer, resume_from_checkpoint=checkpoint)
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    return model.state_dict(), optimizer.state_dict(), optimizer.draws(), norms[-1]


@pytest.mark.parametrize(
    "options, accumulation",
    [({"state": "keep"}, 1), ({"gradient": "dense", "state": "offload"}, 2)],
    ids=str,
)
def test_the_trainer_on_two_ranks(tmp_path, options, accumulation):
    options = {"interval": 3, "refresh_interval": 2, "on_refresh": "transport"} | options
    arguments = {"gradient_accumulation_steps": accumulation}
    folder = str(tmp_path / "two")
    whole = ranks.run(run_trainer, folder, options, arguments, None)
    assert_equal(whole[1], whole[0], "ranks")
    assert len({drawn for _, drawn in whole[0][2]}) > 1
    # In the middle of an interval, on two ranks.
    for again in ranks.run(run_trainer, folder, options, arguments, 5):
        assert_equal(again[:3], whole[0][:3], "resumed")
    # One process sees the rows of both ranks in a step.
    model = tiny_models.build("llama").double()
    trainer = build(
        tmp_path / "one",
        model,
        options,
        max_steps=STEPS,
        max_grad_norm=0.3,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        **arguments,
    )
    optimizer = train(trainer)
    assert optimizer.draws() == whole[0][2]
    assert OPTIONS["interval"] != options["interval"]
    for name, want in model.state_dict().items():
        torch.testing.assert_close(whole[0][0][name], want, **TRAINING_FLOAT64)


def run_terminated(folder: str, dies: bool) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """All ranks get SIGTERM before the fifth step, as torchrun hands it on; or resume."""
    from transformers import trainer_jit_checkpoint

    create = trainer_jit_checkpoint.CheckpointManager.__init__
    trainer_jit_checkpoint.CheckpointManager.__init__ = functools.partialmethod(create, kill_wait=0)
    checkpoints = sorted(Path(folder).glob("checkpoint-*"))
    model = tiny_models.build("llama")
    trainer = build(
        Path(folder),
        model,
        {"interval": 3, "refresh_interval": 2, "state": "keep"},
        [Terminated()] if dies else [],
        max_steps=STEPS,
        ddp_backend="gloo",
        train_sampling_strategy="sequential",
        enable_jit_checkpoint=dies,
    )
    optimizer = train(trainer, resume_from_checkpoint=str(checkpoints[0]) if checkpoints else None)
    return model.state_dict(), optimizer.state_dict(), trainer.state.global_step


def test_sigterm_on_two_ranks_loses_nothing(tmp_path):
    whole = ranks.run(run_terminated, str(tmp_path / "whole"), False)
    for _, _, steps in ranks.run(run_terminated, str(tmp_path / "stopped"), True):
        assert steps < STEPS
    assert len(list((tmp_path / "stopped").glob("checkpoint-*"))) == 1
    for again, want in zip(
        ranks.run(run_terminated, str(tmp_path / "stopped"), False), whole, strict=True
    ):
        assert_equal(again, want, "resumed")


def run_saved_loop(folder: str, options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """A loop with accelerate that saves on the way, and one that goes on from there."""
    ends = []
    for begin in (0, 5):
        model = tiny_models.build("llama").bfloat16()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = OwLore(model, **OPTIONS | options)
        wrapped, outer = accelerator.prepare(model, optimizer)
        if begin:
            accelerator.load_state(folder)
            assert optimizer.steps == begin
        for step in range(begin, STEPS):
            if step == 5 and not begin:
                accelerator.save_state(folder)
            for micro in range(2):
                batch = tiny_models.batch(seed=4 * step + 2 * micro + accelerator.process_index)
                with accelerator.accumulate(wrapped):
                    accelerator.backward(wrapped(**batch).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), 0.3)
                    outer.step()
                    outer.zero_grad()
        ends.append([dict(model.state_dict()), optimizer.state_dict(), optimizer.draws()])
    return ends[0], ends[1]


def test_a_loop_with_accelerate_goes_on_from_what_it_saved(tmp_path):
    options = {"interval": 3, "refresh_interval": 2, "state": "keep"}
    first, second = ranks.run(run_saved_loop, str(tmp_path), options)
    for whole, again in (first, second):
        assert_equal(again, whole, "resumed")
        assert_equal(whole, first[0], "ranks")
    assert len({drawn for _, drawn in first[0][2]}) > 1


# accelerate's FSDP2.


def plugin(**options: Any) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        **options,
    )


def shards_on(accelerator: Accelerator, given: FullyShardedDataParallelPlugin) -> None:
    """Lets accelerate, which shards on GPUs alone, take the CPU for one."""
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = given
    assert accelerator.is_fsdp2


def run_accelerate(case: str) -> list[dict[str, Any]]:
    rank = torch.distributed.get_rank()
    options, how = CASES[case]
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin())
    shards_on(accelerator, plugin())
    model = llama()
    shard_with(accelerator, model)
    optimizer = OwLore(model, **CASE_OPTIONS | options)
    wrapped, outer = accelerator.prepare(model, optimizer)
    assert wrapped is model
    norms = []
    for step in range(CASE_STEPS):
        ids = case_rows(step, 0)[2 * rank : 2 * rank + 2]
        accelerator.backward(wrapped(input_ids=ids, labels=ids).loss)
        norms.append(float(accelerator.clip_grad_norm_(wrapped.parameters(), how["clip"])))
        outer.step()
        outer.zero_grad()
    return [{"norms": norms, "draws": optimizer.draws(), "weights": weights_of(model)}]


@pytest.mark.parametrize("case", ["frozen embedding and head", "dense"])
def test_a_loop_with_accelerate_equals_one_process(case):
    compare_with_one_process([case], ranks.run(run_accelerate, case))


FSDP_OPTIONS = {"interval": 3, "refresh_interval": 2, "on_refresh": "transport", "state": "keep"}


def run_sharded_trainer(
    folder: str, kind: str, resume: int | None
) -> tuple[dict[str, Tensor], list[Any], dict[str, Any]]:
    model = tiny_models.build("llama").double()
    arguments: dict[str, Any] = {"ddp_backend": "gloo"}
    gpus = torch.distributed.get_backend() == "nccl"
    if gpus:
        wrapped = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        config = {"version": 2, "state_dict_type": kind, **wrapped}
        arguments = {"use_cpu": False, "fsdp": "full_shard auto_wrap", "fsdp_config": config}
    if resume is None:
        arguments |= {"save_strategy": "steps", "save_steps": 5}
    trainer = build(
        Path(folder),
        model,
        FSDP_OPTIONS,
        max_steps=STEPS,
        max_grad_norm=0.3,
        train_sampling_strategy="sequential",
        **arguments,
    )
    if not gpus:
        shards_on(trainer.accelerator, plugin(state_dict_type=kind))
        trainer.is_fsdp_enabled = True
    shard_first(trainer)
    checkpoint = None if resume is None else f"{folder}/checkpoint-{resume}"
    optimizer = train(trainer, resume_from_checkpoint=checkpoint)
    state = {key: weights_of_state(value) for key, value in optimizer.state_dict()["state"].items()}
    return weights_of(model), optimizer.draws(), state


def weights_of_state(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: distributed.whole(value).cpu() if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_trainer_with_fsdp_trains_and_resumes(tmp_path, kind):
    whole = ranks.run(run_sharded_trainer, str(tmp_path / "two"), kind, None)
    assert_equal(whole[1], whole[0], "ranks")
    assert len({drawn for _, drawn in whole[0][1]}) > 1
    for again in ranks.run(run_sharded_trainer, str(tmp_path / "two"), kind, 5):
        assert_equal(again, whole[0], "resumed")
    model = tiny_models.build("llama").double()
    trainer = build(
        tmp_path / "one",
        model,
        FSDP_OPTIONS,
        max_steps=STEPS,
        max_grad_norm=0.3,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
    )
    optimizer = train(trainer)
    assert optimizer.draws() == whole[0][1]
    for name, want in model.state_dict().items():
        torch.testing.assert_close(whole[0][0][name], want, **TRAINING_FLOAT64)


def test_other_shards_of_a_trainer_are_refused(tmp_path):
    trainer = build(tmp_path, tiny_models.build("llama"))
    with pytest.raises(ValueError, match=r"expected FSDP of version 2 .*, got no FSDP"):
        shard_first(trainer)
    for changes, message in (
        ({"fsdp_version": 1}, "got version 1"),
        ({"activation_checkpointing": True}, "gradient checkpointing in its place"),
    ):
        given = plugin()
        for name, value in changes.items():
            setattr(given, name, value)
        trainer.accelerator.state.fsdp_plugin = given
        with pytest.raises(ValueError, match=message):
            shard_first(trainer)
    del trainer.accelerator.state.fsdp_plugin
