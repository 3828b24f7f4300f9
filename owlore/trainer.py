"""The glue for Hugging Face's Trainer: two names, nothing else is needed.

`Trainer(model=..., optimizer_cls_and_kwargs=(OwLoreFactory, {"lr": 3e-4}))` trains with OwLore,
`log_to(trainer)` logs what it does.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import Unpack

from owlore.config import Options, OwLoreConfig
from owlore.optimizer import OwLore


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

    Args:
        trainer: A Trainer whose optimizer is (or will be) an `OwLore`.
    """
    # The first callback: those that write logs out run after it and see its keys.
    trainer.callback_handler.callbacks.insert(0, _LogCallback())
