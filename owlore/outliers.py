"""Outlier scores of decoder blocks from a calibration pass (OWL, arXiv 2310.05175, section 3.1)."""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from owlore import blocks, ops

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutlierScores:
    """Outlier scores of one model.

    Attributes:
        scores: D_l, share of a block's entries above threshold * mean, between 0 and 1. [L]
        threshold: Multiple tau of the block's mean above which an entry is an outlier.
        layers: The same share for each linear layer, against its block's mean, by layer name.
        tokens: Calibration tokens that counted.
        model: Name or path of the model.
    """

    scores: list[float]
    threshold: float
    layers: dict[str, float]
    tokens: int
    model: str

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
        if not isinstance(content, dict) or not names <= set(content):
            raise ValueError(f"scores: {path}: expected a list or the keys {sorted(names)}")
        scores = content["scores"]
        numeric = isinstance(scores, list) and all(
            isinstance(score, int | float) and not isinstance(score, bool) for score in scores
        )
        if not numeric:
            raise ValueError(f"scores: {path}: 'scores' must be a list of numbers")
        return cls(**{name: content[name] for name in names})


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
        self.mask = torch.ones(0, dtype=torch.bool)
        self.sums: dict[str, Tensor] = {}

    def watch(self, name: str, layer: nn.Module, features: int) -> RemovableHandle:
        device = layer.weight.device
        assert isinstance(device, torch.device)
        acc = self.sums[name] = torch.zeros(features, dtype=torch.float64, device=device)

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            ops.column_sq_norm_(acc, x, self._mask_for(name, x))

        return layer.register_forward_pre_hook(hook)

    def _mask_for(self, name: str, x: Tensor) -> Tensor | None:
        if bool(self.mask.all()):
            return None
        mask = self.mask.to(x.device)
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
    threshold: float = 5.0,
    batch_size: int = 8,
    blocks_path: str | None = None,
) -> OutlierScores:
    """Outlier score of each decoder block (OWL, arXiv 2310.05175, equations 1 and 2).

    For each linear layer norm_j is the 2-norm of input feature j over all calibration tokens and
    A_ij = |W_ij| * norm_j; a block's score is the share of entries of A, over all its linear layers
    together, that exceed threshold * mean(A).

    Args:
        model: A Hugging Face decoder. Runs in eval mode; its training flags are restored.
        data: Sequences of token ids (lists or 1-D tensors, of any lengths), or dicts with
            `input_ids` [b, t] and optionally `attention_mask`; padding tokens do not count. Pad on
            the right: a model of absolute positions, such as GPT-2, would see others otherwise.
        threshold: Multiple tau of the mean; OWL uses 3 to 7.
        batch_size: Sequences of one forward pass; does not change the result.
        blocks_path: Name of the block list, where the search does not find it.

    Returns:
        The scores.

    Raises:
        ValueError: No data, a threshold that is not positive, or a model without blocks.
        TypeError: An argument is of the wrong type.
    """
    if not isinstance(threshold, numbers.Real):
        raise TypeError(f"threshold: expected a number above 0, got {threshold!r}")
    if not math.isfinite(threshold) or threshold <= 0:
        raise ValueError(f"threshold: expected a number above 0, got {threshold!r}")
    if not isinstance(batch_size, numbers.Integral):
        raise TypeError(f"batch_size: expected a whole number >= 1, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number >= 1, got {batch_size!r}")
    layout = blocks.find_layout(model, blocks_path)
    _log_left_out(layout)
    base = blocks.unwrap(model)
    base = getattr(base, "base_model", base)
    options = {"use_cache": False} if hasattr(base, "config") else {}
    watcher = _ColumnNorms()
    layers: list[list[tuple[str, Tensor]]] = []
    handles = []
    training = [(module, module.training) for module in model.modules()]
    tokens = 0
    try:
        for index, block in enumerate(layout.blocks):
            layers.append([])
            for name, layer, transposed in blocks.linear_layers(block):
                full = f"{layout.blocks_path}.{index}.{name}"
                weight = layer.weight
                if not isinstance(weight, Tensor) or not weight.is_floating_point():
                    logger.warning("%s is left out of the scores: no float weight", full)
                    continue
                W = weight.detach().mT if transposed else weight.detach()
                layers[-1].append((full, W))
                handles.append(watcher.watch(full, layer, W.shape[1]))
        model.eval()
        device = next(base.parameters()).device
        for ids, mask in _batches(data, batch_size):
            watcher.mask = mask
            tokens += int(mask.sum())
            base(input_ids=ids.to(device), attention_mask=mask.to(device).long(), **options)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag
    if tokens == 0:
        raise ValueError("data: expected at least one token of calibration text, got none")
    return _score(layers, watcher.sums, threshold, tokens, _model_name(model))


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
    layers: Sequence[Sequence[tuple[str, Tensor]]],
    sums: Mapping[str, Tensor],
    threshold: float,
    tokens: int,
    model: str,
) -> OutlierScores:
    scores: list[float] = []
    shares: dict[str, float] = {}
    for block in layers:
        weights = [W for _, W in block]
        norms = [sums[name].sqrt() for name, _ in block]
        counts, _ = ops.outlier_counts(weights, norms, [threshold])
        found = counts[:, 0].tolist()
        scores.append(sum(found) / sum(W.numel() for W in weights))
        for (name, W), count in zip(block, found, strict=True):
            shares[name] = count / W.numel()
    return OutlierScores(scores, threshold, shares, tokens, model)
