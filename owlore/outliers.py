"""Outlier scores of decoder blocks from a calibration pass (OWL, arXiv 2310.05175, section 3.1)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from owlore import blocks, ops

logger = logging.getLogger(__name__)

# Thresholds that every calibration counts, for "auto" and for whoever wants to compare: OWL's 3 to
# 7, and up to the 13 of the authors' LLaMA-2-7B file.
THRESHOLDS = (3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 13.0)
# threshold="auto" aims at this share of a model's blocks; the authors' LLaMA-2-7B probabilities
# have 18.5 effective blocks of 32.
_EFFECTIVE_SHARE = 0.6


@dataclass(frozen=True)
class OutlierScores:
    """Outlier scores of one model.

    Attributes:
        scores: D_l, share of a block's entries above threshold * mean, between 0 and 1. [L]
        threshold: Multiple tau of the block's mean above which an entry is an outlier.
        layers: The same share for each linear layer, against its block's mean, by layer name.
        tokens: Calibration tokens that counted.
        model: Name or path of the model.
        table: Scores under other thresholds, as pairs of a threshold and its scores [L].
        weights_hash: Fingerprint of the linear weights (a sample of each one's elements).
        data_hash: Hash of the calibration tokens.
    """

    scores: list[float]
    threshold: float
    layers: dict[str, float]
    tokens: int
    model: str
    table: list[tuple[float, list[float]]] = field(default_factory=list)
    weights_hash: str = ""
    data_hash: str = ""

    def save(self, path: str | Path) -> None:
        """Writes JSON, to a temporary file first, so that no half-written file is left."""
        path = Path(path)
        text = json.dumps(asdict(self), indent=1) + "\n"
        # A name that only this process writes; opened plainly, so that the umask decides who reads.
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> OutlierScores:
        """Reads what `save` wrote; a bare JSON list of scores is taken too.

        Raises:
            ValueError: The file is missing or is no such JSON.
        """
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except OSError as error:
            raise ValueError(
                f"scores: cannot read {path}: {error.strerror}; make it with `owlore outliers`"
            ) from error
        except ValueError as error:
            raise ValueError(f"scores: {path} is not valid JSON: {error}") from error
        if isinstance(content, list):
            content = {"scores": content, "threshold": 0, "layers": {}, "tokens": 0, "model": ""}
        names = {entry.name for entry in fields(cls)}
        needed = {
            entry.name
            for entry in fields(cls)
            if entry.default is MISSING and entry.default_factory is MISSING
        }
        if not isinstance(content, dict) or not needed <= set(content):
            raise ValueError(f"scores: {path}: expected a list or the keys {sorted(needed)}")
        scores = content["scores"]
        numeric = isinstance(scores, list) and all(
            isinstance(score, int | float) and not isinstance(score, bool) for score in scores
        )
        if not numeric:
            raise ValueError(f"scores: {path}: 'scores' must be a list of numbers")
        known = {name: content[name] for name in names & set(content)}
        known["table"] = [(tau, row) for tau, row in content.get("table", [])]
        return cls(**known)


def read_scores(source: Any) -> list[float]:
    """Scores from a file's path, an `OutlierScores` or a sequence of numbers.

    Raises:
        ValueError: The file is missing or damaged.
        TypeError: The source is none of the three.
    """
    if isinstance(source, str | Path):
        return OutlierScores.load(source).scores
    if isinstance(source, OutlierScores):
        return source.scores
    try:
        return [float(score) for score in source]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"scores: expected a path, OutlierScores or numbers, got {source!r}"
        ) from error


def _batches(data: Iterable[Any], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and mask [b, t]; sequences of equal length share a batch, so nothing is padded."""
    if isinstance(data, Mapping | str):
        raise TypeError(
            "data: expected sequences of token ids or dicts with input_ids, got one "
            f"{type(data).__name__}; put it into a list"
        )
    plain: list[Tensor] = []
    for item in data:
        if isinstance(item, Mapping):
            yield _padded_batch(item)
            continue
        try:
            sequence = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"data: expected sequences of token ids or dicts with input_ids, got {item!r}"
            ) from error
        if sequence.dim() == 1 and len(sequence) == 0:
            continue
        if sequence.dim() != 1 or sequence.is_floating_point():
            raise ValueError(
                "data: expected sequences of token ids or dicts with input_ids, got "
                f"{sequence.dtype} of shape {tuple(sequence.shape)}"
            )
        plain.append(sequence)
    for _, same in groupby(sorted(plain, key=len), key=len):
        for ids in torch.stack(list(same)).split(batch_size):
            yield ids, torch.ones_like(ids).bool()


def _padded_batch(item: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    if "input_ids" not in item:
        raise ValueError(f"data: expected dicts with input_ids, got the keys {sorted(item)}")
    ids = torch.as_tensor(item["input_ids"])
    mask = item.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    if ids.dim() != 2 or mask.shape != ids.shape:
        raise ValueError(
            "data: expected input_ids and attention_mask of one shape [b, t], got "
            f"{tuple(ids.shape)} and {tuple(mask.shape)}"
        )
    return ids, mask.bool()


class _ColumnNorms:
    """Forward pre-hooks that sum the squared inputs of linear layers."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._mask: Tensor | None = None
        self._seen: tuple[Tensor, int] | None = None
        self._part = torch.empty(0)

    def begin(self, mask: Tensor) -> None:
        """Announces the next forward pass and the tokens of it that count. [b, t], bool."""
        self._mask = None if bool(mask.all()) else mask
        self._seen = None

    def watch(self, name: str, layer: nn.Module, features: int) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            # Query, key and value, or gate and up, are called with one tensor after each other:
            # its squares are summed once.
            seen = self._seen
            if seen is None or seen[0] is not x or seen[1] != x._version:
                self._part = torch.zeros(features, dtype=torch.float64, device=x.device)
                ops.column_sq_norm_(self._part, x, self._mask_for(name, x))
                self._seen = (x, x._version)
            if name in self.sums:
                self.sums[name].add_(self._part)
            else:
                self.sums[name] = self._part.clone()

        return layer.register_forward_pre_hook(hook)

    def _mask_for(self, name: str, x: Tensor) -> Tensor | None:
        if self._mask is None:
            return None
        mask = self._mask.to(x.device)
        # An expert sees the tokens routed to it, in an order of its own.
        routed = ".experts." in name
        if not routed and x.shape[:-1] == mask.shape:
            return mask
        if not routed and x.shape[:-1] == (mask.numel(),):
            return mask.flatten()
        raise ValueError(
            f"data: {name} gets {tuple(x.shape)} for a batch of {tuple(mask.shape)}, so padding "
            "tokens cannot be told apart; give sequences of token ids instead of padded batches"
        )


@torch.no_grad()
def outlier_scores(
    model: nn.Module,
    data: Iterable[Any],
    *,
    threshold: float | str = 5.0,
    batch_size: int = 8,
    blocks_path: str | None = None,
    cache: str | Path | None = None,
) -> OutlierScores:
    """Outlier score of each decoder block (OWL, arXiv 2310.05175, equations 1 and 2).

    For each linear layer norm_j is the 2-norm of input feature j over all calibration tokens and
    A_ij = |W_ij| * norm_j; a block's score is the share of entries of A, over all its linear layers
    together, that exceed threshold * mean(A). One pass over the data serves all of THRESHOLDS.

    Args:
        model: A Hugging Face decoder. Runs in eval mode; its training flags are restored.
        data: Sequences of token ids (lists or 1-D tensors, of any lengths), or dicts with
            `input_ids` [b, t] and optionally `attention_mask`; padding tokens do not count. Pad on
            the right: a model of absolute positions, such as GPT-2, would see others otherwise.
        threshold: Multiple tau of the mean; OWL uses 3 to 7. "auto" takes the one of THRESHOLDS
            under which the effective number of blocks 1 / sum(p^2) is nearest to 0.6 L.
        batch_size: Sequences of one forward pass; does not change the result.
        blocks_path: Name of the block list, where the search does not find it.
        cache: File that the scores are written to, and read back from if it was made from these
            weights and this data.

    Returns:
        The scores.

    Raises:
        ValueError: No data, a threshold that is not positive, or a model without blocks.
        TypeError: An argument is of the wrong type.
    """
    _check_threshold(threshold)
    if not isinstance(batch_size, numbers.Integral):
        raise TypeError(f"batch_size: expected a whole number >= 1, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number >= 1, got {batch_size!r}")
    layout = blocks.find_layout(model, blocks_path)
    batches = list(_batches(data, batch_size))
    tokens = sum(int(mask.sum()) for _, mask in batches)
    if tokens == 0:
        raise ValueError("data: expected at least one token of calibration text, got none")
    layers = _linear_weights(layout)
    hashes = (_hash_weights(layers), _hash_data(batches))
    if cache is not None and Path(cache).is_file():
        found = OutlierScores.load(cache)
        if (found.weights_hash, found.data_hash) == hashes:
            kept = _at_threshold(found, threshold)
            if kept is not None:
                return kept
        logger.info("%s was made from other weights, data or threshold: computed anew", cache)
    _log_left_out(layout)
    watcher = _ColumnNorms()
    _calibrate(model, layers, batches, watcher)
    scores = _score(layers, watcher.sums, threshold, tokens, _model_name(model), hashes)
    if cache is not None:
        scores.save(cache)
    return scores


def _check_threshold(threshold: float | str) -> None:
    if threshold == "auto":
        return
    if not isinstance(threshold, numbers.Real):
        raise TypeError(f"threshold: expected a number above 0 or 'auto', got {threshold!r}")
    if not math.isfinite(threshold) or threshold <= 0:
        raise ValueError(f"threshold: expected a number above 0 or 'auto', got {threshold!r}")


class _Linear(NamedTuple):
    """A linear layer and its full name."""

    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """The weight as [out, in]."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().mT if self.transposed else weight.detach()


@contextmanager
def _in_memory(block: Sequence[_Linear]) -> Iterator[None]:
    """Brings in the weights that accelerate keeps elsewhere (device_map with cpu or disk)."""
    with ExitStack() as stack:
        for layer in block:
            if layer.weight.is_meta:
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(layer.module))
        yield


def _linear_weights(layout: blocks.Layout) -> list[list[_Linear]]:
    """The linear layers with float weights, block by block."""
    layers: list[list[_Linear]] = []
    for index, block in enumerate(layout.blocks):
        layers.append([])
        for name, layer, transposed in blocks.linear_layers(block):
            full = f"{layout.blocks_path}.{index}.{name}"
            weight = layer.weight
            if not isinstance(weight, Tensor) or not weight.is_floating_point():
                logger.warning("%s is left out of the scores: no float weight", full)
                continue
            layers[-1].append(_Linear(full, layer, transposed))
    return layers


def _calibrate(
    model: nn.Module,
    layers: Sequence[Sequence[_Linear]],
    batches: Sequence[tuple[Tensor, Tensor]],
    watcher: _ColumnNorms,
) -> None:
    """Runs the batches through the model while the watcher sums squares."""
    base = blocks.unwrap(model)
    base = getattr(base, "base_model", base)
    options = {"use_cache": False} if hasattr(base, "config") else {}
    handles = []
    training = [(module, module.training) for module in model.modules()]
    try:
        for layer in (layer for block in layers for layer in block):
            handles.append(watcher.watch(layer.name, layer.module, layer.weight.shape[1]))
        model.eval()
        device = next((p.device for p in base.parameters() if not p.is_meta), torch.device("cpu"))
        for ids, mask in batches:
            watcher.begin(mask)
            base(input_ids=ids.to(device), attention_mask=mask.to(device).long(), **options)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag


def choose_threshold(table: Sequence[tuple[float, Sequence[float]]]) -> float:
    """The threshold whose distribution is neither flat nor degenerate.

    With p = D / sum(D), 1 / sum(p^2) counts the blocks that share the draws; the threshold is taken
    that brings it nearest to 0.6 L, the lower one of two that are equally near.

    Args:
        table: Thresholds and the scores [L] under each.

    Returns:
        One of the thresholds.

    Raises:
        ValueError: Under every threshold all scores are zero.
    """
    distances = []
    for tau, scores in table:
        total = sum(scores)
        if total > 0:
            effective = 1 / sum((score / total) ** 2 for score in scores)
            distances.append((abs(effective - _EFFECTIVE_SHARE * len(scores)), tau))
    if not distances:
        raise ValueError("threshold: no entry of any block lies above any of the thresholds")
    return min(distances)[1]


def _at_threshold(found: OutlierScores, threshold: float | str) -> OutlierScores | None:
    """Cached scores if they are those of the threshold, else None."""
    wanted = choose_threshold(found.table) if threshold == "auto" and found.table else threshold
    return found if found.threshold == wanted else None


def _hash_weights(layers: Sequence[Sequence[_Linear]]) -> str:
    """Fingerprint of the weights: names, shapes, and about 1,000 elements spread over each."""
    digest = hashlib.blake2b(digest_size=16)
    for block in layers:
        with _in_memory(block):
            for layer in block:
                W = layer.weight
                rows, columns = (max(1, size // 32) for size in W.shape)
                sample = W[::rows, ::columns].float().cpu().contiguous()
                digest.update(f"{layer.name} {tuple(W.shape)} ".encode())
                digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _hash_data(batches: Sequence[tuple[Tensor, Tensor]]) -> str:
    """Hash of the tokens that count, sequence by sequence, whatever their order and batches."""
    sequences = []
    for ids, mask in batches:
        for row, keep in zip(ids.cpu(), mask.cpu(), strict=True):
            sequences.append(row[keep].to(torch.int64).numpy().tobytes())
    digest = hashlib.blake2b(digest_size=16)
    for sequence in sorted(sequences):
        digest.update(hashlib.blake2b(sequence, digest_size=16).digest())
    return digest.hexdigest()


def _log_left_out(layout: blocks.Layout) -> None:
    """Names the blocks' matrices that are no linear layer, such as stacks of experts."""
    stacks = [
        entry.name
        for entry in layout.entries
        if entry.role == blocks.OTHER and entry.block is not None and entry.param.dim() >= 2
    ]
    if stacks:
        logger.warning(
            "%d weights of the blocks belong to no linear layer and are left out of the scores, "
            "such as %s",
            len(stacks),
            stacks[0],
        )


def _model_name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "name_or_path", "")) or type(model).__name__


def _score(
    layers: Sequence[Sequence[_Linear]],
    sums: Mapping[str, Tensor],
    threshold: float | str,
    tokens: int,
    model: str,
    hashes: tuple[str, str],
) -> OutlierScores:
    taus = list(THRESHOLDS)
    if threshold != "auto" and threshold not in taus:
        taus.append(float(threshold))
    # One row of counts for each layer of each block, moved to the host once all are queued.
    counted = []
    for block in layers:
        with _in_memory(block):
            weights = [layer.weight for layer in block]
            counted.append(ops.outlier_counts(weights, _norms(block, sums), taus)[0])
    counts = [block.tolist() for block in counted]
    sizes = [sum(layer.weight.numel() for layer in block) for block in layers]
    table = [
        (
            tau,
            [sum(row[q] for row in rows) / size for rows, size in zip(counts, sizes, strict=True)],
        )
        for q, tau in enumerate(taus)
    ]
    chosen = choose_threshold(table) if threshold == "auto" else float(threshold)
    q = taus.index(chosen)
    shares = {
        layer.name: row[q] / layer.weight.numel()
        for block, rows in zip(layers, counts, strict=True)
        for layer, row in zip(block, rows, strict=True)
    }
    return OutlierScores(table[q][1], chosen, shares, tokens, model, sorted(table), *hashes)


def _norms(block: Sequence[_Linear], sums: Mapping[str, Tensor]) -> list[Tensor]:
    """Norm of each input feature, on the weights' devices; zero for a layer that never ran."""
    norms = []
    for name, weight in ((layer.name, layer.weight) for layer in block):
        total = sums.get(name)
        if total is None:
            # An expert that no token was routed to.
            total = torch.zeros(weight.shape[1], dtype=torch.float64)
        norms.append(total.to(weight.device).sqrt())
    return norms
