"""Every choice a user has, validated, with one line of help each."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

SIDES = ("std", "left", "right", "reverse", "auto")
DISTRIBUTIONS = ("outlier", "uniform", "decrease", "increase", "reverse", "weight_norm")
RANK_DISTRIBUTIONS = ("even", "probability")
DRAWS = ("sequential", "inclusion")
GRADIENTS = ("projected", "dense")
BASES = ("subspace", "svd", "random")
REFRESHES = ("sketch", "exact")
ON_REFRESH = ("keep", "reset", "transport")
STATES = ("reset", "keep", "offload")
ROUNDINGS = ("stochastic", "nearest")
MOMENTS = ("fp32", "bf16")
# The published methods train embeddings, head, norms and biases with plain Adam.
_TRAINED = {"embeddings": "full", "head": "full", "norms": "full"}
PRESETS: dict[str, dict[str, Any]] = {
    "owlore": {"blocks": 5} | _TRAINED,
    "ows": {"blocks": 5, "rank": None} | _TRAINED,
    "lisa": {"distribution": "uniform", "blocks": 5, "rank": None} | _TRAINED,
    "galore": {"distribution": "uniform", "blocks": "all"} | _TRAINED,
    "full": {"distribution": "uniform", "blocks": "all", "rank": None} | _TRAINED,
}

Distribution = str | Callable[[Any], Sequence[float]]


class Options(TypedDict, total=False):
    """Keyword arguments of `OwLore`: the fields of `OwLoreConfig`, for type checkers."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scale: float
    blocks: int | str
    rank: int | None
    rank_distribution: str
    interval: int
    distribution: Distribution
    draw: str
    floor: float
    scores: Any
    side: str
    gradient: str
    basis: str
    power_iterations: int
    oversampling: int
    refresh: str
    sketch_columns: int
    refresh_interval: int
    on_refresh: str
    state: str
    embeddings: str
    head: str
    norms: str
    other: str
    dense_lr: float | None
    dense_moments: str
    moments: str
    rounding: str
    seed: int
    blocks_path: str | None


def option(default: Any, text: str, choices: Sequence[str] = ()) -> Any:
    """A dataclass field with a line of help, and the values it may have if they are few."""
    return field(default=default, metadata={"help": text, "choices": tuple(choices)})


@dataclass(frozen=True)
class OwLoreConfig:
    """Hyper-parameters of OwLore (arXiv 2405.18380); all are keyword arguments of `OwLore` too.

    Raises:
        ValueError: A value is out of its range; the message names the option, what was expected
            and what came.
        TypeError: A value is of the wrong type, or an option is unknown.
    """

    lr: float = option(3e-4, "learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), "decay of the first and second moment")
    eps: float = option(1e-8, "added to Adam's denominator after bias correction")
    weight_decay: float = option(0.0, "decoupled decay of weights with two or more dimensions")
    scale: float = option(1.0, "factor on the low-rank update (GaLore's alpha)")
    blocks: int | str = option("all", "decoder blocks that train at a time (gamma), or 'all'")
    rank: int | None = option(128, "rank of the subspace; 'none' trains drawn blocks densely")
    rank_distribution: str = option(
        "even",
        "rank of each block: the same, or as its probability is, with `rank` the mean",
        RANK_DISTRIBUTIONS,
    )
    interval: int = option(50, "optimizer steps between draws")
    distribution: Distribution = option(
        "outlier",
        f"how likely a block is drawn: {', '.join(DISTRIBUTIONS)} or package.module:function",
    )
    draw: str = option(
        "sequential", "one block after another, or exact inclusion probabilities", DRAWS
    )
    floor: float = option(0.0, "share of the probability spread evenly over all blocks, 0 to 1")
    scores: Any = option(None, "outlier score of each block: a scores.json or a list of numbers")
    side: str = option("std", "which side of a weight is projected", SIDES)
    gradient: str = option(
        "projected", "low-rank gradient out of the backward pass, or from weight.grad", GRADIENTS
    )
    basis: str = option("subspace", "how the basis is found in the gradient", BASES)
    power_iterations: int = option(2, "power iterations of basis='subspace'")
    oversampling: int = option(8, "extra columns of basis='subspace'")
    refresh: str = option(
        "sketch", "what a basis is made from where gradient='projected'", REFRESHES
    )
    sketch_columns: int = option(2, "columns of a sketch, as a multiple of the rank")
    refresh_interval: int = option(200, "steps between refreshes of a basis while a block stays")
    on_refresh: str = option("keep", "what happens to the moments at a refresh", ON_REFRESH)
    state: str = option("reset", "what happens to a block's state when it is left", STATES)
    embeddings: str = option("freeze", "how the embeddings train", ("full", "freeze", "lowrank"))
    head: str = option("freeze", "how the LM head trains", ("full", "freeze", "lowrank"))
    norms: str = option("freeze", "how norms and biases train", ("full", "freeze"))
    other: str = option("freeze", "how parameters that fit no scheme train", ("freeze", "full"))
    dense_lr: float | None = option(None, "learning rate outside low-rank weights (default: lr)")
    dense_moments: str = option(
        "auto",
        "moments of embeddings, head, norms and biases; auto: bf16 for bf16 weights",
        ("auto", *MOMENTS),
    )
    moments: str = option("fp32", "moments of the blocks' weights", MOMENTS)
    rounding: str = option("stochastic", "how bf16 weights are rounded", ROUNDINGS)
    seed: int = option(0, "seed of draws, random test matrices and rounding")
    blocks_path: str | None = option(None, "where the block list is ('model.layers'), if unclear")

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        if isinstance(self.scores, Path):
            object.__setattr__(self, "scores", str(self.scores))
        _validate(self)
        # NumPy's numbers pass the checks, but neither YAML nor torch.load(weights_only=True).
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, numbers.Integral):
                object.__setattr__(self, entry.name, int(value))
            elif isinstance(value, numbers.Real):
                object.__setattr__(self, entry.name, float(value))
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of all options."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> OwLoreConfig:
        """Builds a configuration from option names and values.

        Raises:
            TypeError: An option is unknown; the message names the nearest known one.
            ValueError: A value is out of its range.
        """
        check_names(options)
        return cls(**options)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> OwLoreConfig:
        """A published method: owlore (five blocks drawn at a time), ows, lisa, galore or full.

        Args:
            name: One of the five names.
            overrides: Options that differ from the preset.

        Raises:
            ValueError: The name is unknown.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_yaml(cls, path: str | Path) -> OwLoreConfig:
        """Reads options from a YAML file.

        Raises:
            ValueError: The file is missing, no YAML or no mapping, or a value is out of its range.
            TypeError: An option is unknown or of the wrong type.
        """
        import yaml

        try:
            with open(path, encoding="utf-8") as file:
                options = yaml.safe_load(file)
        except OSError as error:
            raise ValueError(f"config: cannot read {path}: {error.strerror}") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"config: {path} is not valid YAML: {error}") from error
        if not isinstance(options, dict):
            raise ValueError(f"{path}: expected a mapping of options, got {type(options).__name__}")
        return cls.from_dict(options)

    def to_dict(self) -> dict[str, Any]:
        """Options as plain numbers, strings and lists.

        Raises:
            ValueError: `distribution` is a function without an importable name.
        """
        plain = {name: getattr(self, name) for name in self.field_names()}
        plain["betas"] = list(self.betas)
        if callable(self.distribution):
            plain["distribution"] = _import_path(self.distribution)
        if self.scores is not None and not isinstance(self.scores, str):
            plain["scores"] = [float(s) for s in getattr(self.scores, "scores", self.scores)]
        return plain

    def to_yaml(self, path: str | Path) -> None:
        """Writes the options to a YAML file."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    def replace(self, **changes: Any) -> OwLoreConfig:
        """A copy with some options changed."""
        check_names(changes)
        return dataclasses.replace(self, **changes)


def check_names(options: Mapping[str, Any]) -> None:
    """Raises TypeError for the first option that does not exist, naming the nearest that does."""
    known = OwLoreConfig.field_names()
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise TypeError(f"unknown option {name!r}: {hint}")


def resolve_distribution(distribution: Distribution) -> Distribution:
    """Imports a distribution given as 'package.module:function'; other values pass unchanged.

    Raises:
        ValueError: The name cannot be imported or is no function.
    """
    if callable(distribution) or distribution in DISTRIBUTIONS:
        return distribution
    module, _, name = distribution.partition(":")
    try:
        function = operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        near = difflib.get_close_matches(distribution, DISTRIBUTIONS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"distribution: expected one of {', '.join(DISTRIBUTIONS)} or an importable "
            f"'package.module:function', got {distribution!r}{hint}: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"distribution: {distribution!r} is not a function")
    return function


def needs_scores(config: OwLoreConfig) -> bool:
    """Whether draws or ranks follow outlier scores that the configuration does not hold."""
    if config.scores is not None:
        return False
    if not (isinstance(config.distribution, str) and config.distribution in DISTRIBUTIONS):
        return True
    # Where all blocks train at one rank, scores decide nothing.
    matter = config.blocks != "all" or config.rank_distribution == "probability"
    return matter and config.distribution in ("outlier", "reverse")


def check_choices(options: Any) -> None:
    """Raises ValueError for the first field of a dataclass that has none of its choices."""
    for entry in dataclasses.fields(options):
        choices = entry.metadata["choices"]
        value = getattr(options, entry.name)
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            expected = ", ".join(choices)
            raise ValueError(f"{entry.name}: expected one of {expected}, got {value!r}{hint}")


def importable(function: Callable[..., Any]) -> bool:
    """Whether a function has a name under which 'package.module:function' finds it."""
    # Lambdas, local functions and functools.partial have none.
    name = getattr(function, "__qualname__", "<unnamed>")
    return "<" not in name and "." not in name


def _import_path(function: Callable[..., Any]) -> str:
    if not importable(function):
        raise ValueError(
            f"distribution: {function!r} has no importable name, so the configuration cannot be "
            "written; use a function at the top level of a module"
        )
    return f"{function.__module__}:{function.__qualname__}"


def _validate(config: OwLoreConfig) -> None:
    for name in ("lr", "eps", "weight_decay", "scale", "floor"):
        _number(name, getattr(config, name))
    _at_least("lr", config.lr, 0.0)
    if config.eps <= 0:
        # With eps = 0 a gradient of zero, as of a token that never came, would give 0 / 0.
        raise ValueError(f"eps: expected a number above 0, got {config.eps!r}")
    _at_least("weight_decay", config.weight_decay, 0.0)
    if config.dense_lr is not None:
        _number("dense_lr", config.dense_lr)
        _at_least("dense_lr", config.dense_lr, 0.0)
    if not isinstance(config.betas, tuple) or len(config.betas) != 2:
        raise TypeError(f"betas: expected two numbers, got {config.betas!r}")
    for beta in config.betas:
        _number("betas", beta)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas: expected numbers in [0, 1), got {config.betas!r}")
    if not 0.0 <= config.floor <= 1.0:
        raise ValueError(f"floor: expected a share between 0 and 1, got {config.floor!r}")
    if config.blocks != "all":
        _whole("blocks", config.blocks, 1, "or 'all'")
    if config.rank is not None:
        _whole("rank", config.rank, 1, "or None")
    for name in ("interval", "refresh_interval", "sketch_columns"):
        _whole(name, getattr(config, name), 1)
    for name in ("power_iterations", "oversampling", "seed"):
        _whole(name, getattr(config, name), 0)
    if config.seed >= 2**63:
        raise ValueError(f"seed: expected a number below 2^63, got {config.seed}")
    check_choices(config)
    if config.rank is not None and (config.gradient, config.refresh) == ("projected", "sketch"):
        for name in ("interval", "refresh_interval"):
            if getattr(config, name) < 2:
                raise ValueError(
                    f"{name}: expected at least 2, got 1: with refresh='sketch' the first step of "
                    "a basis finds it and trains nothing; use refresh='exact' or gradient='dense'"
                )
    if not (callable(config.distribution) or isinstance(config.distribution, str)):
        kind = type(config.distribution).__name__
        raise TypeError(f"distribution: expected a name or a function, got {kind}")
    resolve_distribution(config.distribution)
    if config.blocks_path is not None and not isinstance(config.blocks_path, str):
        raise TypeError(f"blocks_path: expected a string, got {config.blocks_path!r}")


def _number(name: str, value: object) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        hint = ""
        if isinstance(value, str):
            hint = " (YAML reads 3e-4 as text: write 3.0e-4)"
        raise TypeError(f"{name}: expected a number, got {value!r}{hint}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name}: expected a number >= {least:g}, got {value!r}")


def _whole(name: str, value: object, least: int, also: str = "") -> None:
    expected = " ".join(filter(None, (f"a whole number >= {least}", also)))
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
