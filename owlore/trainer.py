"""The glue for Hugging Face's Trainer, and for accelerate.

`Trainer(model=..., optimizer_cls_and_kwargs=(OwLoreFactory, {"lr": 3e-4}))` trains with OwLore,
`log_to(trainer)` logs what it does, and looks at a checkpoint before it is loaded. With `fsdp` call
`shard_first(trainer)` before `train()`, in a loop with accelerate `shard_with(accelerator, model)`
before OwLore is built.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import Unpack

from owlore import checkpoints
from owlore.config import Options, OwLoreConfig
from owlore.optimizer import OwLore, prepare_load


class OwLoreFactory:
    """Builds an `OwLore` where the Trainer builds its optimizer, from the whole model.

    The Trainer does not pass its learning rate on: give `lr` here.
    """

    def __call__(
        self,
        model: nn.Module,
        config: OwLoreConfig | None = None,
        **options: Unpack[Options],
    ) -> OwLore:
        """Builds the optimizer; arguments as for `OwLore`."""
        return OwLore(model, config, **options)


class _LogCallback(TrainerCallback):
    """Adds what OwLore is doing to every log entry of a training step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        optimizer = kwargs.get("optimizer")
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if logs is None or "loss" not in logs or not isinstance(optimizer, OwLore):
            return
        logs.update(log_values(optimizer))


def log_values(optimizer: OwLore) -> dict[str, float]:
    """Numbers worth logging.

    Returns:
        "owlore/block/07" for each block: 1 while it trains, else 0; "owlore/energy" and
        "owlore/energy_min": mean and least share of gradient energy that the active bases held when
        they were computed; "owlore/nonfinite": updates of single parameters in which non-finite
        gradients were skipped.
    """
    active = optimizer.active_blocks
    values = {
        f"owlore/block/{i:02d}": float(i in active) for i in range(len(optimizer.probabilities))
    }
    energy = list(optimizer.energy().values())
    if energy:
        values["owlore/energy"] = sum(energy) / len(energy)
        values["owlore/energy_min"] = min(energy)
    values["owlore/nonfinite"] = float(sum(optimizer.nonfinite().values()))
    return values


def log_to(trainer: Trainer) -> None:
    """Puts active blocks and captured gradient energy into a Trainer's logs, TensorBoard included.

    A checkpoint to resume from is looked at before it is loaded: one that is damaged, or was not
    written by OwLore, raises ValueError; one without an optimizer's state, with which the Trainer
    would go on without a word, warns.

    Args:
        trainer: A Trainer whose optimizer is (or will be) an `OwLore`.
    """
    # The first callback: those that write logs out run after it and see its keys.
    trainer.callback_handler.callbacks.insert(0, _LogCallback())

    def look(checkpoint: str) -> None:
        if not isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), OwLore):
            return
        if checkpoints.holds_state(Path(checkpoint)):
            checkpoints.read(checkpoint)
            return
        warnings.warn(
            f"owlore: {checkpoint} holds no state of an optimizer (save_only_model?): moments, "
            "draws and their clock begin anew",
            stacklevel=2,
        )

    _before_loading(trainer, look)


def _before_loading(trainer: Trainer, first: Callable[[str], None]) -> None:
    """Calls something before a Trainer loads its optimizer's state from a checkpoint."""
    load = trainer._load_optimizer_and_scheduler

    def prepared(checkpoint: str | None) -> None:
        if checkpoint is not None:
            first(checkpoint)
        load(checkpoint)

    trainer._load_optimizer_and_scheduler = prepared


def shard_with(accelerator: Any, model: nn.Module) -> None:
    """Shards a model as `accelerator.prepare` would, for an optimizer that is built from it then.

    accelerate shards a model after its optimizer is built, and leaves one that is sharded as it is.
    Before `accelerator.load_state(folder)` call `owlore.prepare_load(optimizer, folder)`.

    Args:
        accelerator: An Accelerator with FSDP2 (`fsdp_version: 2`).
        model: What `prepare` will be given together with the optimizer.

    Raises:
        ValueError: It has no FSDP2, or one that checkpoints activations itself.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    version = getattr(plugin, "fsdp_version", None)
    if plugin is None or version != 2:
        found = "no FSDP" if plugin is None else f"version {version}"
        raise ValueError(f"accelerator: expected FSDP of version 2 (fsdp_config), got {found}")
    if plugin.activation_checkpointing:
        raise ValueError(
            "accelerator: activation_checkpointing of fsdp_config wraps blocks after they are "
            "sharded; use the model's own gradient checkpointing in its place"
        )
    from accelerate.utils import fsdp_utils

    # By the names of classes, which sharding changes.
    plugin.set_auto_wrap_policy(model)
    fsdp_utils.fsdp2_prepare_model(accelerator, model)


def shard_first(trainer: Trainer) -> None:
    """Shards the model of a Trainer with `fsdp` now, before its optimizer is built from it.

    Call it between building the Trainer and `train()`; resuming works then too.

    Args:
        trainer: A Trainer with `fsdp` in its arguments, and version 2 in `fsdp_config`.

    Raises:
        ValueError: It has no FSDP2, or one that checkpoints activations itself.
    """
    shard_with(trainer.accelerator, trainer.model)
    _before_loading(trainer, lambda checkpoint: prepare_load(trainer.optimizer, checkpoint))
