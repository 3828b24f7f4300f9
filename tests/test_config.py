"""Every option's checks, presets, and the ways in and out of a configuration."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import re
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import yaml

from owlore import OutlierScores, OwLore, OwLoreConfig, config

DEFAULTS = {
    "lr": 3e-4,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "scale": 1.0,
    "blocks": "all",
    "rank": 128,
    "rank_distribution": "even",
    "interval": 50,
    "distribution": "outlier",
    "draw": "sequential",
    "floor": 0.0,
    "scores": None,
    "side": "std",
    "gradient": "projected",
    "basis": "subspace",
    "power_iterations": 2,
    "oversampling": 8,
    "refresh": "sketch",
    "sketch_columns": 2,
    "refresh_interval": 200,
    "on_refresh": "keep",
    "state": "reset",
    "embeddings": "freeze",
    "head": "freeze",
    "norms": "freeze",
    "other": "freeze",
    "dense_lr": None,
    "dense_moments": "auto",
    "moments": "fp32",
    "rounding": "stochastic",
    "seed": 0,
    "blocks_path": None,
}
CHOICES = {
    "rank_distribution": ("even", "probability"),
    "draw": ("sequential", "inclusion"),
    "side": ("std", "left", "right", "reverse", "auto"),
    "gradient": ("projected", "dense"),
    "basis": ("subspace", "svd", "random"),
    "refresh": ("sketch", "exact"),
    "on_refresh": ("keep", "reset", "transport"),
    "state": ("reset", "keep", "offload"),
    "embeddings": ("full", "freeze", "lowrank"),
    "head": ("full", "freeze", "lowrank"),
    "norms": ("full", "freeze"),
    "other": ("freeze", "full"),
    "dense_moments": ("auto", "fp32", "bf16"),
    "moments": ("fp32", "bf16"),
    "rounding": ("stochastic", "nearest"),
}
NUMBERS = ("lr", "eps", "weight_decay", "scale", "floor", "dense_lr")
NOT_NEGATIVE = ("lr", "weight_decay", "dense_lr")
WHOLE = {
    "blocks": 1,
    "rank": 1,
    "interval": 1,
    "refresh_interval": 1,
    "sketch_columns": 1,
    "power_iterations": 0,
    "oversampling": 0,
    "seed": 0,
}


def by_square(scores: Any) -> Any:
    return np.square(scores)


class Rules:
    @staticmethod
    def constant(scores: Any) -> Any:
        return np.ones_like(scores)

    def scaled(self, scores: Any) -> Any:
        return 2 * scores


not_a_function = 3


def test_defaults_are_the_documented_ones():
    assert OwLoreConfig().to_dict() == DEFAULTS | {"betas": [0.9, 0.999]}
    assert OwLoreConfig.field_names() == tuple(DEFAULTS)


def test_every_option_has_a_line_of_help():
    for entry in dataclasses.fields(OwLoreConfig):
        text = entry.metadata["help"]
        assert 10 < len(text) < 120, entry.name
        assert entry.metadata["choices"] == CHOICES.get(entry.name, ())


def test_options_for_type_checkers_are_the_dataclass_fields():
    hints = typing.get_type_hints(config.Options)
    assert hints == {
        name: typing.get_type_hints(OwLoreConfig)[name] for name in OwLoreConfig.field_names()
    }
    assert config.Options.__required_keys__ == frozenset()


def test_a_configuration_cannot_be_changed():
    given = OwLoreConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.lr = 1.0
    changed = given.replace(lr=1.0, blocks=7)
    assert (changed.lr, changed.blocks, given.lr) == (1.0, 7, 3e-4)
    with pytest.raises(ValueError, match="lr: expected a number >= 0, got -1"):
        given.replace(lr=-1)


# Types, ranges, choices.


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["3e-4", [1.0], True, 1j, {}])
def test_numbers_must_be_numbers(name, value):
    with pytest.raises(
        TypeError, match=rf"^{name}: expected a number, got {re.escape(repr(value))}"
    ):
        OwLoreConfig(**{name: value})


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "dense_lr"])
def test_none_is_no_number(name):
    with pytest.raises(TypeError, match=f"^{name}: expected a number, got None"):
        OwLoreConfig(**{name: None})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a finite number, got {value}"):
        OwLoreConfig(**{name: value})


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_numbers_below_zero_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: expected a number >= 0, got -0.1"):
        OwLoreConfig(**{name: -0.1})
    assert getattr(OwLoreConfig(**{name: 0}), name) == 0.0


def test_scale_may_be_any_finite_number():
    assert OwLoreConfig(scale=-0.25).scale == -0.25


@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_floor_is_a_share(value):
    with pytest.raises(ValueError, match=f"^floor: expected a share between 0 and 1, got {value}"):
        OwLoreConfig(floor=value)
    assert OwLoreConfig(floor=0).floor == 0.0
    assert OwLoreConfig(floor=1).floor == 1.0


@pytest.mark.parametrize("value", [0.9, (0.9,), (0.9, 0.99, 0.999), "ab", None])
def test_betas_must_be_two(value):
    with pytest.raises(TypeError, match=r"^betas: expected two numbers, got"):
        OwLoreConfig(betas=value)


@pytest.mark.parametrize("value", [(0.9, "0.99"), (None, 0.9), (True, 0.9)])
def test_betas_must_be_numbers(value):
    with pytest.raises(TypeError, match=r"^betas: expected a number"):
        OwLoreConfig(betas=value)


@pytest.mark.parametrize("value", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan)])
def test_betas_have_a_range(value):
    with pytest.raises(ValueError, match=r"^betas: expected"):
        OwLoreConfig(betas=value)
    assert OwLoreConfig(betas=[0, 0.5]).betas == (0.0, 0.5)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [1.0, "3", True, [2], (1,)])
def test_whole_numbers_must_be_whole(name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected a whole number >= {WHOLE[name]}"):
        OwLoreConfig(**{name: value})


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_have_a_least_value(name):
    least = WHOLE[name]
    got = least - 1
    with pytest.raises(
        ValueError, match=rf"^{name}: expected a whole number >= {least}.* got {got}"
    ):
        OwLoreConfig(**{name: got})
    assert getattr(OwLoreConfig(**{name: least}, gradient="dense"), name) == least


@pytest.mark.parametrize("name", ["interval", "refresh_interval"])
def test_a_sketch_needs_a_second_step(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected at least 2, .*refresh='exact'"):
        OwLoreConfig(**{name: 1})
    assert getattr(OwLoreConfig(**{name: 1}, refresh="exact"), name) == 1
    assert getattr(OwLoreConfig(**{name: 1}, rank=None), name) == 1


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "rank"])
def test_none_is_no_whole_number(name):
    with pytest.raises(TypeError, match=f"^{name}: expected a whole number"):
        OwLoreConfig(**{name: None})


def test_blocks_all_and_rank_none():
    assert OwLoreConfig(blocks="all").blocks == "all"
    assert OwLoreConfig(rank=None).rank is None
    with pytest.raises(TypeError, match=r"^blocks: .* number >= 1 or 'all', got 'al'"):
        OwLoreConfig(blocks="al")
    with pytest.raises(TypeError, match=r"^rank: .* number >= 1 or None, got 'no'"):
        OwLoreConfig(rank="no")


def test_seed_fits_a_torch_generator():
    assert OwLoreConfig(seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(ValueError, match=r"^seed: expected a number below 2\^63"):
        OwLoreConfig(seed=2**63)


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    for choice in CHOICES[name]:
        assert getattr(OwLoreConfig(**{name: choice}), name) == choice
    for wrong in ("nothing like it", 3, None, True, ["full"], CHOICES[name][0].upper()):
        with pytest.raises(ValueError, match=f"^{name}: expected one of {CHOICES[name][0]}, "):
            OwLoreConfig(**{name: wrong})


def test_a_misspelt_choice_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"got 'sequental'.*did you mean 'sequential'"):
        OwLoreConfig(draw="sequental")
    with pytest.raises(ValueError, match=r"got 'offlod'.*did you mean 'offload'"):
        OwLoreConfig(state="offlod")


@pytest.mark.parametrize("value", [3, ["model.layers"], True])
def test_blocks_path_is_a_string(value):
    with pytest.raises(TypeError, match=r"^blocks_path: expected a string"):
        OwLoreConfig(blocks_path=value)


# Names.


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("learning_rte", None), ("ranks", "rank"), ("intervall", "interval"), ("beta", "betas")],
)
def test_unknown_options_get_a_suggestion(wrong, near):
    hint = f"did you mean {near!r}" if near else "known are lr, betas, "
    model = tiny_models.build("llama")
    builders = [
        lambda: OwLoreConfig.from_dict({wrong: 1}),
        lambda: OwLoreConfig().replace(**{wrong: 1}),
        lambda: OwLoreConfig.preset("lisa", **{wrong: 1}),
        lambda: OwLore(model, **{wrong: 1}),
        lambda: OwLore(model, OwLoreConfig(), **{wrong: 1}),
    ]
    for build in builders:
        with pytest.raises(TypeError, match=f"^unknown option {wrong!r}: {hint}"):
            build()
    assert not model.model._forward_pre_hooks


def test_keywords_override_the_configuration():
    given = OwLoreConfig(distribution="uniform", blocks=1, lr=0.5)
    optimizer = OwLore(tiny_models.build("llama"), given, lr=0.25)
    assert (optimizer.config.lr, optimizer.config.blocks) == (0.25, 1)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    with pytest.raises(TypeError, match="config: expected an OwLoreConfig, got dict"):
        OwLore(tiny_models.build("llama"), {"lr": 0.5})


# Presets.


def test_presets():
    def differs(name: str) -> dict[str, Any]:
        plain = OwLoreConfig.preset(name).to_dict()
        default = OwLoreConfig().to_dict()
        return {key: value for key, value in plain.items() if value != default[key]}

    trained = {"embeddings": "full", "head": "full", "norms": "full"}
    assert differs("owlore") == {"blocks": 5} | trained
    assert differs("ows") == {"blocks": 5, "rank": None} | trained
    assert differs("lisa") == {"distribution": "uniform", "blocks": 5, "rank": None} | trained
    assert differs("galore") == {"distribution": "uniform"} | trained
    assert differs("full") == {"distribution": "uniform", "rank": None} | trained
    assert OwLoreConfig.preset("lisa", blocks=2, rank=4).rank == 4


@pytest.mark.parametrize("name", ["lissa", "", None])
def test_unknown_presets_are_refused(name):
    with pytest.raises(ValueError, match="preset: expected one of owlore, ows, lisa, galore, full"):
        OwLoreConfig.preset(name)


@pytest.mark.parametrize("name", ["lisa", "galore", "full"])
def test_presets_without_outlier_scores_need_none(name):
    overrides = {"blocks": 2} if name == "lisa" else {}
    optimizer = OwLore(tiny_models.build("llama"), OwLoreConfig.preset(name, **overrides))
    assert optimizer.probabilities == pytest.approx([1 / 3] * 3)


def test_scores_are_needed_only_where_they_decide_something():
    optimizer = OwLore(tiny_models.build("llama"), rank=4)
    assert optimizer.probabilities == pytest.approx([1 / 3] * 3)
    optimizer = OwLore(tiny_models.build("llama"), rank=4, scores=[1, 1, 2])
    assert optimizer.probabilities == pytest.approx([0.25, 0.25, 0.5])
    for options in ({"blocks": 3}, {"rank_distribution": "probability"}):
        for distribution in ("outlier", "reverse"):
            wanted = OwLoreConfig(distribution=distribution, **options)
            assert config.needs_scores(wanted)
            assert not config.needs_scores(wanted.replace(scores=[1, 1, 2]))
            assert not config.needs_scores(wanted.replace(distribution="uniform"))
            assert not config.needs_scores(OwLoreConfig(distribution=distribution))
            with pytest.raises(ValueError, match=r"scores: .*`owlore outliers"):
                OwLore(tiny_models.build("llama"), wanted)
    assert config.needs_scores(OwLoreConfig(distribution=lambda scores: scores))


@pytest.mark.parametrize("name", ["owlore", "ows"])
def test_presets_by_outlier_score_name_the_command_that_makes_scores(name):
    with pytest.raises(ValueError, match=r"scores: .*`owlore outliers"):
        OwLore(tiny_models.build("llama"), OwLoreConfig.preset(name, blocks=1))


# In and out.

ODD = {
    "lr": 1e-5,
    "betas": (0.8, 0.95),
    "blocks": "all",
    "rank": None,
    "distribution": f"{__name__}:by_square",
    "scores": [0.1, 0.2, 0.3],
    "dense_lr": 2e-5,
    "seed": 2**62 + 1,
    "blocks_path": "model.layers",
    "eps": 1e-30,
    "state": "offload",
}


@pytest.mark.parametrize("options", [{}, ODD])
def test_dict_and_yaml_round_trip(tmp_path, options):
    given = OwLoreConfig(**options)
    plain = given.to_dict()
    assert OwLoreConfig.from_dict(plain) == given
    given.to_yaml(tmp_path / "config.yaml")
    read = OwLoreConfig.from_yaml(tmp_path / "config.yaml")
    assert read == given
    assert read.to_dict() == plain
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == plain


def test_a_yaml_file_may_hold_some_options(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("rank: null\nblocks: all\nlr: 3.0e-4\nbetas: [0.9, 0.95]\nside: auto\n")
    given = OwLoreConfig.from_yaml(str(path))
    assert given == OwLoreConfig(rank=None, blocks="all", betas=(0.9, 0.95), side="auto")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "expected a mapping of options, got NoneType"),
        ("- lr", ValueError, "expected a mapping of options, got list"),
        ("lr: [", ValueError, "config.yaml is not valid YAML"),
        ("lr: 3e-4", TypeError, "lr: expected a number, got '3e-4'.*write 3.0e-4"),
        ("rnk: 4", TypeError, "unknown option 'rnk': did you mean 'rank'"),
        ("4: 4", TypeError, "unknown option 4: known are"),
        ("rank: 0", ValueError, "rank: expected a whole number >= 1 or None, got 0"),
        ("!!python/object:os.system {}", ValueError, "not valid YAML"),
    ],
)
def test_a_bad_yaml_file_is_refused(tmp_path, text, error, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        OwLoreConfig.from_yaml(path)


def test_an_unreadable_yaml_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config: cannot read .*none\.yaml: No such file"):
        OwLoreConfig.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00lr")
    with pytest.raises(ValueError, match=r"config: .*binary\.yaml is not valid YAML"):
        OwLoreConfig.from_yaml(tmp_path / "binary.yaml")


def test_numpy_numbers_become_plain_ones():
    given = OwLoreConfig(
        lr=np.float64(1e-3),
        dense_lr=np.float32(0.5),
        blocks=np.int64(2),
        rank=np.int32(4),
        betas=(np.float64(0.9), np.float32(0.5)),
        scores=np.array([0.5, 0.25, 0.25]),
        floor=0,
    )
    plain = given.to_dict()
    for key, value in plain.items():
        parts = value if isinstance(value, list) else [value]
        assert {type(part) for part in parts} <= {int, float, str, type(None)}, key
    assert plain["scores"] == [0.5, 0.25, 0.25]
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    # A checkpoint of such a run is one that torch reads safely.
    buffer = io.BytesIO()
    torch.save(OwLore(tiny_models.build("llama"), given).state_dict(), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


# Scores.


def test_scores_of_every_kind_are_written_as_numbers(tmp_path):
    numbers = [0.5, 0.25, 0.25]
    measured = OutlierScores(numbers, 5.0, {}, 10, "m")
    for scores in (numbers, tuple(numbers), np.array(numbers), torch.tensor(numbers), measured):
        given = OwLoreConfig(scores=scores, blocks=1)
        assert given.to_dict()["scores"] == numbers
        assert OwLore(tiny_models.build("llama"), given).probabilities == numbers
    measured.save(tmp_path / "scores.json")
    for path in (tmp_path / "scores.json", str(tmp_path / "scores.json")):
        given = OwLoreConfig(scores=path, blocks=1)
        assert given.to_dict()["scores"] == str(path)
        optimizer = OwLore(tiny_models.build("llama"), given)
        assert optimizer.scores == numbers


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([0.5, 0.5], ValueError, r"scores: expected 3 numbers, one for each block, got \(2,\)"),
        ([[0.5, 0.2, 0.3]], TypeError, "scores: expected a path, OutlierScores or numbers"),
        ([0.5, -0.1, 0.6], ValueError, "scores: expected finite numbers >= 0"),
        ([0.5, math.nan, 0.6], ValueError, "scores: expected finite numbers >= 0"),
        ([0.5, math.inf, 0.6], ValueError, "scores: expected finite numbers >= 0"),
        ([0.0, 0.0, 0.0], ValueError, "scores: expected at least one score above 0"),
        ([0.5, 0.0, 0.0], ValueError, "blocks: expected at most 1, .*got 2"),
        (5, TypeError, "scores: expected a path, OutlierScores or numbers, got 5"),
        (["a", "b", "c"], TypeError, "scores: expected a path, OutlierScores or numbers"),
        ("no/such/scores.json", ValueError, "scores: cannot read no/such/scores.json"),
    ],
)
def test_bad_scores_are_refused_before_anything_changes(scores, error, message):
    model = tiny_models.build("llama")
    with pytest.raises(error, match=message):
        OwLore(model, scores=scores, blocks=2)
    assert not model.model._forward_pre_hooks
    assert all(param.requires_grad for param in model.parameters())


# Distributions.


def test_a_function_may_be_given_as_itself_or_by_name():
    by_name = OwLoreConfig(distribution=f"{__name__}:by_square", scores=[1.0, 2.0, 3.0], blocks=1)
    as_itself = by_name.replace(distribution=by_square)
    want = [1 / 14, 4 / 14, 9 / 14]
    for given in (by_name, as_itself):
        assert OwLore(tiny_models.build("llama"), given).probabilities == pytest.approx(want)
        assert given.to_dict()["distribution"] == f"{__name__}:by_square"


def test_a_name_may_point_into_a_class():
    given = OwLoreConfig(distribution=f"{__name__}:Rules.constant")
    assert config.resolve_distribution(given.distribution) is Rules.constant
    assert OwLoreConfig.from_dict(given.to_dict()) == given


@pytest.mark.parametrize(
    "function",
    [lambda scores: scores, functools.partial(by_square), Rules().scaled],
    ids=["lambda", "partial", "method"],
)
def test_a_function_without_a_name_trains_but_cannot_be_written(function):
    given = OwLoreConfig(distribution=function, scores=[1.0, 2.0, 3.0], blocks=1)
    assert len(OwLore(tiny_models.build("llama"), given).probabilities) == 3
    with pytest.raises(ValueError, match=r"distribution: .*no importable name"):
        given.to_dict()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("unifrm", "did you mean 'uniform'"),
        ("no.such.module:f", "No module named"),
        ("json", "got 'json'"),
        ("json:no_such_function", "no_such_function"),
        (":f", "got ':f'"),
        ("", "got ''"),
        (f"{__name__}:not_a_function", "is not a function"),
    ],
)
def test_a_distribution_that_is_no_function_is_refused(value, message):
    with pytest.raises(ValueError, match=f"^distribution: .*{message}"):
        OwLoreConfig(distribution=value)


@pytest.mark.parametrize("value", [None, 3, ["uniform"], Path("uniform")])
def test_a_distribution_is_a_name_or_a_function(value):
    with pytest.raises(TypeError, match=r"^distribution: expected a name or a function, got"):
        OwLoreConfig(distribution=value)


@pytest.mark.parametrize("eps", [0.0, -1e-8])
def test_eps_is_above_zero(eps):
    # A token that never came has a gradient of zero, and 0 / (0 + 0) would reach its embedding.
    with pytest.raises(ValueError, match="eps: expected a number above 0"):
        OwLoreConfig(eps=eps)
