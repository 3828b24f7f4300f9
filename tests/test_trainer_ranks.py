"""Hugging Face's Trainer on two ranks, as torchrun starts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_models
import torch
from test_distributed import assert_equal
from test_trainer import OPTIONS, build, train
from tolerances import TRAINING_FLOAT64
from torch import Tensor

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
