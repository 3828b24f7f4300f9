"""The `owlore train` command: from a model and a JSONL file to a folder one can hand on.

The folder holds the fine-tuned model, the scores, what happened (run.json), pictures and a report.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from owlore import planner
from owlore.config import OwLoreConfig, needs_scores
from owlore.data import Collator, Example, TokenizedData, read_jsonl, split, tokenize
from owlore.models import SOURCE_FILE, LoadedModel, load
from owlore.optimizer import OwLore
from owlore.options import TrainOptions
from owlore.outliers import OutlierScores, outlier_scores
from owlore.report import open_up, write_card, write_json, write_report
from owlore.trainer import OwLoreFactory, log_to

__all__ = [
    "Interrupted",
    "RunError",
    "calibrate",
    "device_of",
    "dtype_of",
    "stored_options",
    "train",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HISTORY = ("step", "loss", "learning_rate", "grad_norm", "owlore/energy")
# Options that do not change what is computed, so that a resumed run may change them.
FREE_ON_RESUME = ("out", "resume", "save_every", "tensorboard", "keep_checkpoints")


class RunError(ValueError):
    """An output folder cannot be used as asked; the message says what to do."""


class Interrupted(Exception):
    """Training was stopped by a signal and left a checkpoint.

    Attributes:
        signal_number: The signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def device_of(name: str) -> torch.device:
    """The device behind auto, cpu or cuda.

    Raises:
        ValueError: cuda is asked for and not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu', since torch finds no CUDA device, got 'cuda'")
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The data type behind auto, fp32 or bf16."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return DTYPES[name]


def calibrate(
    loaded: LoadedModel,
    data: TokenizedData,
    rows: int,
    threshold: float | str,
    batch_size: int,
    cache: Path | None = None,
) -> OutlierScores:
    """Computes outlier scores from the first rows of the data.

    Args:
        loaded: The model, on the device that computes.
        data: Tokenised data.
        rows: Rows used at most.
        threshold: See `owlore.outlier_scores`.
        batch_size: Rows in a batch.
        cache: File with earlier scores, taken if they are of these weights and this data.

    Returns:
        The scores, with the model's name in them.
    """
    sequences = [example["input_ids"] for example in data.examples[:rows]]
    # Rows of the same length share a batch.
    sequences.sort(key=len)
    scores = outlier_scores(
        loaded.model, sequences, threshold=threshold, batch_size=batch_size, cache=cache
    )
    return OutlierScores(**{**asdict(scores), "model": loaded.source.name})


@torch.no_grad()
def held_out_loss(
    model: Any, examples: Sequence[Example], collator: Collator, batch_size: int
) -> float:
    """Mean negative log-likelihood of the labelled tokens.

    Args:
        model: A transformers causal language model.
        examples: Tokenised rows.
        collator: Makes batches.
        batch_size: Rows in a batch.

    Returns:
        Nats per token; every token has the same weight, whatever batch it is in.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    count = 0
    # Rows of like length together: little padding.
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        batch = collator(ordered[start : start + batch_size])
        targets = int((batch["labels"][:, 1:] != -100).sum())
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        total += float(loss) * targets
        count += targets
    model.train(training)
    return total / count


class _SavedBytes:
    """Counts the bytes that autograd keeps for backward, without the parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


class _Trainer(Trainer):
    """Trainer with an exact held-out loss and a measurement of the activations."""

    held_out: Sequence[Example]
    batch_size: int
    control: Any
    activations: int | None = None
    _largest = 0

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Logs the held-out loss with equal weight for every token."""
        assert isinstance(self.data_collator, Collator)
        value = held_out_loss(self.model, self.held_out, self.data_collator, self.batch_size)
        metrics = {f"{metric_key_prefix}_loss": value}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One micro-batch; measures its activations if it is the largest so far."""
        size = inputs["input_ids"].numel()
        if size <= self._largest:
            return super().training_step(model, inputs, num_items_in_batch)
        self._largest = size
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.activations = max(
                self.activations or 0, torch.cuda.max_memory_allocated() - before
            )
            return loss
        if self.args.gradient_checkpointing:
            return super().training_step(model, inputs, num_items_in_batch)
        saved = _SavedBytes(model)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.activations = max(self.activations or 0, saved.bytes)
        return loss

    @property
    def owlore(self) -> OwLore:
        """The optimizer without accelerate's wrapper."""
        optimizer: Any = self.optimizer
        while not isinstance(optimizer, OwLore):
            optimizer = optimizer.optimizer
        return optimizer


class _Monitor(TrainerCallback):
    """Progress bar, memory account, and the reaction to signals."""

    def __init__(self, trainer: _Trainer, memory: dict[str, int]) -> None:
        self.trainer = trainer
        self.memory = memory
        self.signal_number: int | None = None
        self.bar = Progress(disable=True)
        self.task = self.bar.add_task("")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # On a terminal a bar, elsewhere (a log file) a line now and then.
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            disable=not sys.stdout.isatty(),
        )
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Between the optimizer's step and zero_grad everything that the step needs is there.
        account = self.trainer.owlore.memory()
        for name, size in account.items():
            self.memory[name] = max(self.memory.get(name, 0), size)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return
        active = self.trainer.owlore.active_blocks
        blocks = "blocks " + " ".join(map(str, active)) if len(active) <= 8 else "many blocks"
        if len(active) == len(self.trainer.owlore.probabilities):
            blocks = "all blocks"
        description = f"loss {logs['loss']:.3f}, {blocks}"
        self.bar.update(self.task, completed=state.global_step, description=description)
        every = max(1, state.max_steps // 10)
        if self.bar.disable and state.global_step % every == 0:
            _say(f"training  step {state.global_step}/{state.max_steps}, {description}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signal_number is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Lets the step in progress end at the first signal; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def handle(number: int, frame: Any) -> None:
            self.signal_number = number
            for other, action in before.items():
                signal.signal(other, action)
            print("\nstopping after this step; once more to stop at once", file=sys.stderr)

        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, action in before.items():
                signal.signal(number, action)


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: the trainer writes its state last."""
    found = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            found.append((json.loads(state.read_text())["global_step"], state.parent))
        except (json.JSONDecodeError, KeyError):
            continue
    return max(found)[1] if found else None


def _check_out(out: Path, resume: bool) -> dict[str, Any] | None:
    """Checks the output folder; returns the run in it when it is to be continued."""
    run_file = out / "run.json"
    if out.exists() and not out.is_dir():
        raise RunError(f"out: {out} is a file; expected a folder that does not exist yet")
    if resume:
        if not run_file.is_file():
            raise RunError(f"resume: {out} holds no run that was started (no run.json)")
        run: dict[str, Any] = json.loads(run_file.read_text())
        if run["status"] == "finished":
            raise RunError(f"resume: the run in {out} is finished; choose another --out")
        return run
    if run_file.is_file():
        raise RunError(
            f"out: {out} already holds a run; choose another folder, or continue it with --resume"
        )
    if out.exists() and any(out.iterdir()):
        raise RunError(f"out: {out} is not empty; choose a folder that does not exist yet")
    return None


def stored_options(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The options that a run was started with, for `--resume`.

    Args:
        out: The run's folder.
        given: Options given now; those that change what is computed must agree.

    Raises:
        RunError: There is nothing to continue, or a given option differs.
    """
    run = _check_out(out, resume=True)
    assert run is not None
    stored = {**run["options"], **run["config"]}
    for name, value in given.items():
        if name in FREE_ON_RESUME or name == "preset":
            stored[name] = value
        elif stored.get(name) != (list(value) if isinstance(value, tuple) else value):
            raise RunError(
                f"resume: {name} was {stored.get(name)!r} when the run was started and cannot "
                f"become {value!r}; leave it out, or start another run"
            )
    stored.pop("preset", None)
    return stored


def _arguments(options: TrainOptions, config: OwLoreConfig, out: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=config.lr,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup if options.warmup < 1 else int(options.warmup),
        max_grad_norm=options.clip,
        gradient_checkpointing=options.gradient_checkpointing,
        train_sampling_strategy="group_by_length" if options.group_by_length else "random",
        logging_steps=1,
        # A loss that is not finite must be seen.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if options.eval_every and options.eval_rows else "no",
        eval_steps=options.eval_every or None,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        save_total_limit=None if options.keep_checkpoints else 1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device_of(options.device).type == "cpu",
        seed=config.seed % 2**32,
        dataloader_pin_memory=device_of(options.device).type == "cuda",
        remove_unused_columns=False,
    )
    # NOTE: with several GPUs and one process Trainer would fall back to DataParallel, which copies
    # the model at each step and so loses the choice of blocks.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _save_model(folder: Path, loaded: LoadedModel, run: dict[str, Any]) -> None:
    """Writes an ordinary Hugging Face checkpoint with its card, whole or not at all."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        loaded.model.save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)
        write_json(temporary / SOURCE_FILE, {**asdict(loaded.source), "location": ""})
        write_card(temporary / "README.md", run)
        open_up(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _versions(versions: dict[str, Any]) -> dict[str, str]:
    """Versions as text, with those that matter to this command only."""
    import transformers

    more = {"transformers": transformers.__version__, "cpu threads": torch.get_num_threads()}
    shown = {**versions, **more}
    # The path of the extension is of no use to whom the folder is sent.
    if isinstance(shown.get("extension"), dict):
        shown["extension"] = shown["extension"].get("reason")
    return {
        name: ", ".join(value) if isinstance(value, list) else str(value)
        for name, value in shown.items()
    }


def _plan(
    loaded: LoadedModel, config: OwLoreConfig, options: TrainOptions, longest: int
) -> dict[str, Any] | None:
    """What `owlore plan` says of the largest batch there can be; None if it has to pass."""
    try:
        plan = planner.plan(
            loaded.model.config,
            config,
            options.batch_size,
            longest,
            accumulation=options.accumulation,
            checkpointing=options.gradient_checkpointing,
            dtype=loaded.model.dtype,
        )
    except ValueError as error:
        _say(f"memory    no plan: {error}")
        return None
    parts = ", ".join(f"{part} {size / 2**20:,.0f}" for part, size in plan.account().items())
    _say(
        f"memory    planned for {options.batch_size} x {longest} tokens, in MiB: {parts}; peak on "
        f"a GPU {plan.peak / 2**20:,.0f} ({plan.at})"
    )
    return {"bytes": plan.account(), "peak_cuda_bytes": plan.peak, "at": plan.at}


def _memory(
    trainer: _Trainer, account: dict[str, int], planned: dict[str, Any] | None
) -> dict[str, Any]:
    """The memory account with how each part was measured, and what was planned."""
    cuda = trainer.args.device.type == "cuda"
    if cuda:
        how = (
            "activations: the CUDA allocator's peak during forward and backward of the largest "
            "batch, minus what was allocated before (gradients that backward allocates included)"
        )
    elif trainer.activations is None:
        how = "activations: not measured on a CPU with gradient checkpointing"
    else:
        how = (
            "activations: bytes that autograd keeps for backward in the largest batch (every "
            "storage once, parameters left out); temporary buffers are not in it"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "bytes": {**account, "activations": trainer.activations},
        "peak_process_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "planned": planned,
        "how": f"weights to basis: largest of all optimizer steps, before zero_grad; {how}",
    }


def _history(trainer: Trainer) -> list[dict[str, float]]:
    return [
        {name: entry[name] for name in HISTORY if name in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _say(text: str) -> None:
    print(text, flush=True)


def train(options: TrainOptions, config: OwLoreConfig, versions: dict[str, Any]) -> dict[str, Any]:
    """Fine-tunes a model and writes the run's folder.

    Args:
        options: What to train, on what, for how long.
        config: The optimizer's hyper-parameters. Outlier scores that it needs and does not have
            are computed from the training data.
        versions: What is installed, for the report.

    Returns:
        The content of run.json.

    Raises:
        RunError: The output folder cannot be used.
        DataError: A data file cannot be used.
        ModelError: The model cannot be loaded.
        ValueError: A value does not fit the model.
        Interrupted: A signal came; a checkpoint to resume from was written.
    """
    out = Path(options.out)
    stored = _check_out(out, options.resume)
    # What the libraries have to say does not concern the user of this command.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    seconds: dict[str, float] = dict(stored["seconds"]) if stored else {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name] = seconds.get(name, 0.0) + now - clock
        clock = now

    device = device_of(options.device)
    rows = read_jsonl(options.data)
    if options.eval_data is not None:
        held_rows = read_jsonl(options.eval_data)
        if len(held_rows) > options.eval_rows:
            held_rows = split(held_rows, options.eval_rows, config.seed)[1]
    else:
        rows, held_rows = split(rows, options.eval_rows, config.seed)
    _say(f"model     {options.model}")
    loaded = load(options.model, dtype_of(options.dtype, device))
    model, tokenizer, source = loaded.model, loaded.tokenizer, loaded.source
    if source.note:
        _say(f"          {source.note}")
    model.to(device)
    use_cache = model.config.use_cache
    lap("loading")
    data = tokenize(rows, tokenizer, options.max_length)
    held = tokenize(held_rows, tokenizer, options.max_length) if held_rows else None
    data_account = {
        "rows": len(data.examples),
        "tokens": data.tokens,
        "trained_tokens": data.trained_tokens,
        "truncated_rows": data.truncated,
        "dropped_rows": data.dropped,
        "held_out_rows": len(held.examples) if held else 0,
        "held_out_tokens": held.trained_tokens if held else 0,
        "held_out_truncated_rows": held.truncated if held else 0,
    }
    _say(
        f"data      {len(data.examples)} rows, {data.tokens} tokens; cut to {options.max_length} "
        f"tokens: {data.truncated} rows, left out: {data.dropped}; "
        f"held out: {data_account['held_out_rows']} rows"
    )
    lap("tokenising")
    scores_file = out / "scores.json"
    scores: OutlierScores | None = None
    if stored and scores_file.is_file():
        scores = OutlierScores.load(scores_file)
    elif needs_scores(config):
        used = min(options.calibration_rows, len(data.examples))
        _say(f"scores    computing outlier scores from {used} training rows")
        scores = calibrate(
            loaded, data, options.calibration_rows, options.threshold, options.batch_size
        )
    elif isinstance(config.scores, str):
        scores = OutlierScores.load(config.scores)
    lap("outlier scores")
    planned = _plan(loaded, config, options, max(len(row["input_ids"]) for row in data.examples))
    lap("memory plan")

    trainer = _Trainer(
        model=model,
        args=_arguments(options, config, out),
        train_dataset=data.examples,
        eval_dataset=held.examples if held else None,
        data_collator=Collator.of(tokenizer),
        optimizer_cls_and_kwargs=(
            OwLoreFactory,
            {"config": config if scores is None else config.replace(scores=scores)},
        ),
    )
    trainer.held_out = held.examples if held else []
    trainer.batch_size = options.batch_size
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    account: dict[str, int] = {}
    monitor = _Monitor(trainer, account)
    trainer.add_callback(monitor)
    if options.tensorboard:
        _add_tensorboard(trainer, out / "tensorboard")
    log_to(trainer)

    # Now, so that options that do not fit the model are refused before anything is written.
    try:
        trainer.create_optimizer()
    except BaseException:
        # The trainer has made its folder already; what holds something stays.
        with suppress(OSError):
            (out / "checkpoints").rmdir()
            out.rmdir()
        raise

    def measure() -> float | None:
        if held is None:
            return None
        collator = Collator.of(tokenizer)
        return held_out_loss(model, held.examples, collator, options.batch_size)

    before = stored["loss"]["before"] if stored else measure()
    if before is not None:
        _say(f"held out  loss {before:.4f} before training")
    lap("held-out loss before")
    run: dict[str, Any] = {
        "status": "running",
        # Not its location: that is a path on this machine.
        "model": {
            "name": source.name,
            "license": source.license,
            "quantised": source.quantised,
            "note": source.note,
        },
        "options": asdict(options),
        "config": config.to_dict(),
        "data": data_account,
        "loss": {"before": before, "after": None, "training": [], "held_out": []},
        "versions": _versions(versions),
        "seconds": seconds,
    }
    out.mkdir(parents=True, exist_ok=True)
    if scores is not None and not scores_file.is_file():
        scores.save(scores_file)
    write_json(out / "run.json", run)

    checkpoint = _last_checkpoint(out / "checkpoints") if options.resume else None
    if options.resume:
        at = "the beginning (no checkpoint)" if checkpoint is None else checkpoint.name
        _say(f"resume    from {at}")
    with monitor.signals():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    lap("training")
    optimizer = trainer.owlore
    steps = trainer.state.global_step
    run["steps"] = steps
    run["planned_steps"] = trainer.state.max_steps
    run["blocks"] = len(optimizer.probabilities)
    run["probabilities"] = [float(p) for p in optimizer.probabilities]
    run["scores"] = None if optimizer.scores is None else [float(s) for s in optimizer.scores]
    run["draws"] = [[int(step), [int(b) for b in blocks]] for step, blocks in optimizer.draws()]
    run["plan"] = optimizer.describe()
    run["nonfinite"] = sum(optimizer.nonfinite().values())
    run["memory"] = _memory(trainer, account, planned)
    run["loss"]["training"] = _history(trainer)
    held_out = [
        {"step": entry["step"], "loss": entry["eval_loss"]}
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]
    if monitor.signal_number is not None and steps < trainer.state.max_steps:
        run["status"] = "interrupted"
        run["loss"]["held_out"] = held_out
        write_json(out / "run.json", run)
        raise Interrupted(
            f"stopped at step {steps} of {trainer.state.max_steps}; "
            f"continue with: owlore train --resume --out {options.out}",
            monitor.signal_number,
        )
    if held is not None:
        if held_out and held_out[-1]["step"] == steps:
            run["loss"]["after"] = held_out[-1]["loss"]
        else:
            run["loss"]["after"] = measure()
            held_out.append({"step": steps, "loss": run["loss"]["after"]})
        held_out.insert(0, {"step": 0, "loss": before})
    run["loss"]["held_out"] = held_out
    lap("held-out loss after")
    optimizer.detach()
    model.config.use_cache = use_cache
    _save_model(out / "model", loaded, run)
    lap("saving")
    run["status"] = "finished"
    write_json(out / "run.json", run)
    write_report(out)
    if not options.keep_checkpoints:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return run


def _add_tensorboard(trainer: Trainer, folder: Path) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback
    except ImportError as error:
        raise ValueError("tensorboard: needs the package: pip install tensorboard") from error
    trainer.add_callback(TensorBoardCallback(SummaryWriter(str(folder))))
