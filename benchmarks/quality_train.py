"""The training loop and the likelihoods of the quality tables, made for many short runs on one GPU.

A batch of short rows is packed: several rows stand behind one another in a line of fixed length and
attend only to themselves, so that every batch of a run has one shape and hardly any padding. On
CUDA the forward and backward pass is replayed from a CUDA graph, captured anew when the set of
trained weights or a basis changes; steps that draw blocks or look for a basis run eagerly. The loss
is taken on the answers only, whose hidden states are gathered before the LM head.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from quality_data import Tokens
from torch import Tensor, nn
from torch.nn import functional as F

from owlore import OwLore

__all__ = ["Batch", "TrainResult", "log_likelihoods", "make_batches", "pack", "schedule", "train"]


@dataclass(frozen=True)
class Batch:
    """Packed rows, and where the loss is taken.

    Attributes:
        ids: Token ids. [lines, length], int64
        positions: Position of each token in its row. [lines, length], int64
        rows: Number of the row a token belongs to, -1 for padding. [lines, length], int64
        index: Flat positions whose next token is a target. [targets], int64
        labels: The targets. [targets], int64
        weights: Share of each target in the mean, 0 for padding. [targets], float32
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    index: Tensor
    labels: Tensor
    weights: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""
        return (self.ids, self.positions, self.rows, self.index, self.labels, self.weights)


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Puts rows into lines of a fixed length: the longest first, each into the first line it fits.

    Returns:
        The rows of each line, by number.

    Raises:
        ValueError: A row is longer than a line.
    """
    lines: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[row] > length:
            raise ValueError(f"a row of {lengths[row]} tokens in a line of {length}")
        line = next((k for k, left in enumerate(room) if left >= lengths[row]), None)
        if line is None:
            line = len(lines)
            lines.append([])
            room.append(length)
        lines[line].append(row)
        room[line] -= lengths[row]
    return lines


def make_batches(
    sequences: Sequence[Tokens],
    batch_size: int,
    length: int,
    seed: int,
    steps: int | None = None,
    lines: int = 1,
) -> list[Batch]:
    """One epoch of packed batches of one shape, in an order given by the seed.

    Args:
        sequences: Rows.
        batch_size: Rows of a batch; a rest is left out.
        length: Length of a line.
        seed: Seed of the order.
        steps: Batches at most.
        lines: Lines of a batch at least, so that all seeds have one shape.
    """
    order = list(range(len(sequences)))
    random.Random(seed).shuffle(order)
    count = len(order) // batch_size
    if steps == 0:
        return []
    chosen = [
        [sequences[i] for i in order[k * batch_size : (k + 1) * batch_size]]
        for k in range(count if steps is None else min(count, steps))
    ]
    packed = [pack([len(s.ids) for s in rows], length) for rows in chosen]
    lines = max(lines, *(len(found) for found in packed))
    targets = max(sum(len(s.ids) - s.prompt for s in rows) for rows in chosen)
    targets = -(-targets // 64) * 64
    return [
        _batch(rows, found, lines, length, targets)
        for rows, found in zip(chosen, packed, strict=True)
    ]


def _batch(
    rows: Sequence[Tokens], packed: Sequence[Sequence[int]], lines: int, length: int, targets: int
) -> Batch:
    ids, positions = torch.zeros(2, lines, length, dtype=torch.int64)
    numbers = torch.full((lines, length), -1)
    index: list[int] = []
    labels: list[int] = []
    for line, members in enumerate(packed):
        start = 0
        for row in members:
            sequence = rows[row]
            end = start + len(sequence.ids)
            ids[line, start:end] = torch.tensor(sequence.ids)
            positions[line, start:end] = torch.arange(end - start)
            numbers[line, start:end] = row
            first = max(1, sequence.prompt)
            index += [line * length + start + i - 1 for i in range(first, len(sequence.ids))]
            labels += sequence.ids[first:]
            start = end
    spare = targets - len(index)
    weights = [1 / max(1, len(index))] * len(index) + [0.0] * spare
    return Batch(
        ids, positions, numbers, torch.tensor(index + [0] * spare),
        torch.tensor(labels + [0] * spare), torch.tensor(weights),
    )  # fmt: skip


def batch_loss(inner: nn.Module, head: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Mean negative log-likelihood of a packed batch's targets."""
    ids, positions, rows, index, labels, weights = batch
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    mask = (rows[:, :, None] == rows[:, None, :]) & causal
    hidden = inner(
        input_ids=ids, attention_mask=mask[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state
    logits = head(hidden.flatten(0, 1).index_select(0, index)).float()
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: linear warm-up, then linear decay to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


class _Phase:
    """What decides whether a captured pass still holds for the next step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.owlore = optimizer if isinstance(optimizer, OwLore) else None
        self.block_of: dict[int, int] = {}
        if self.owlore is not None:
            for group in self.owlore.param_groups:
                for name, param in zip(group["param_names"], group["params"], strict=True):
                    found = re.search(r"\.layers\.(\d+)\.", name)
                    if found:
                        self.block_of[id(param)] = int(found.group(1))

    def __call__(self) -> tuple[Any, ...] | None:
        """A key that equal passes share; None where the next pass must run eagerly."""
        if self.owlore is None:
            return ()
        config = self.owlore.config
        # A forward pass in Python draws the blocks; a replayed one cannot.
        if self.owlore.steps % config.interval == 0:
            return None
        active = self.owlore.active_blocks
        if config.rank is None or config.gradient == "dense":
            return active
        bases = []
        for param, state in self.owlore.state.items():
            if "basis_age" in state and self.block_of.get(id(param), -1) in (-1, *active):
                if state["basis_age"] < 0 or "basis" not in state:
                    return None
                bases.append(state["basis"].data_ptr())
        return (*active, *bases)


class _Passes:
    """Forward and backward passes over batches of one shape, replayed from a graph where it can."""

    def __init__(
        self,
        forward: Callable[[Sequence[Tensor]], Tensor],
        parameters: Sequence[nn.Parameter],
        first: Sequence[Tensor],
        graphs: bool,
    ) -> None:
        self.forward = forward
        self.parameters = parameters
        self.inputs = [tensor.clone() for tensor in first]
        self.graphs = graphs
        self.captures = 0
        self.key: tuple[Any, ...] | None = None
        self.graph: Any = None
        self.warm: tuple[Any, ...] | None = None
        self.grads: list[tuple[nn.Parameter, Tensor]] = []
        self.loss = torch.zeros(())

    def clear(self) -> None:
        """Frees all gradients."""
        for param in self.parameters:
            param.grad = None

    def __call__(self, batch: Sequence[Tensor], key: tuple[Any, ...] | None) -> Tensor:
        """Fills the gradients and gives the loss. [], a tensor that the next pass may overwrite."""
        for own, new in zip(self.inputs, batch, strict=True):
            own.copy_(new)
        # Before a capture comes a pass of its kind, which loads kernels and waits for what it must.
        cold = key not in (self.warm, self.key)
        if not self.graphs or key is None or cold or not self._holds(key):
            self.warm = key
            self.clear()
            self.loss = self.forward(self.inputs)
            self.loss.backward()
            return self.loss.detach()
        for param, grad in self.grads:
            param.grad = grad
        self.graph.replay()
        return self.loss.detach()

    def _holds(self, key: tuple[Any, ...]) -> bool:
        """Captures a pass if the last one was of another phase; whether there is one to replay."""
        if key == self.key:
            return True
        self.clear()
        self.grads, self.graph, self.key = [], None, None
        share = torch.cuda.mem_get_info()[1] * torch.cuda.get_per_process_memory_fraction()
        if torch.cuda.memory_reserved() > share / 2:
            # What earlier captures reserved.
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            # Not through torch.cuda.graph, which collects garbage and empties the cache each time.
            graph.capture_begin()
            try:
                self.loss = self.forward(self.inputs)
                self.loss.backward()
            finally:
                graph.capture_end()
        except RuntimeError as error:
            # A method that cannot be captured is slow, not wrong.
            print(f"not captured, runs eagerly: {str(error).splitlines()[0]}", flush=True)
            self.graphs = False
            return False
        self.graph, self.key = graph, key
        self.captures += 1
        self.grads = [(p, p.grad) for p in self.parameters if p.grad is not None]
        return True


@dataclass
class TrainResult:
    """What a run cost.

    Attributes:
        loss: Mean loss of the last fifty steps.
        seconds: Wall time of the steps.
        start_bytes: Device memory allocated before the first step: weights and batches.
        peak_bytes: Most device memory allocated.
        state_bytes: Most bytes of gradients, moments and bases of a step.
        captures: CUDA graphs captured.
    """

    loss: float
    seconds: float
    start_bytes: int
    peak_bytes: int
    state_bytes: int
    captures: int


def _bytes(tensors: Sequence[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of moments and bases."""
    held: list[Any] = []
    for state in optimizer.state.values():
        held += state.values()
        # GaLore keeps its basis in an object.
        projector = state.get("projector")
        if projector is not None:
            matrix = projector.ortho_matrix
            held += matrix if isinstance(matrix, list) else [matrix]
    return _bytes([t for t in held if isinstance(t, Tensor) and t.dim() > 0])


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    autocast: bool,
    graphs: bool,
    compiled: bool = False,
    warmup: float = 0.03,
) -> TrainResult:
    """Trains for one pass over the batches.

    Args:
        model: A Hugging Face causal language model, or a PEFT model around one.
        optimizer: Its optimizer; every group's rate is scaled by `schedule`.
        batches: Batches of one shape, on the model's device.
        autocast: Compute in bfloat16 where torch's autocast says so.
        graphs: Replay passes from CUDA graphs.
        compiled: Compile the decoder blocks: a third of the kernels, once they are compiled.
        warmup: Share of the steps over which the rate rises.
    """
    if not batches:
        return TrainResult(0.0, 0.0, 0, 0, 0, 0)
    causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner, head = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
    device = batches[0].ids.device
    cuda = device.type == "cuda"
    model.train()
    if compiled:
        # One graph for each kind of layer and phase, of all methods together.
        torch._dynamo.config.recompile_limit = 64
        for block in inner.layers:
            block.compile(dynamic=False)

    def forward(batch: Sequence[Tensor]) -> Tensor:
        # Casts of weights must not outlive the capture that made them: no cache.
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            return batch_loss(inner, head, batch)

    parameters = {id(p): p for p in model.parameters()}
    for group in optimizer.param_groups:
        parameters.update((id(p), p) for p in group["params"])
    passes = _Passes(forward, list(parameters.values()), batches[0].tensors(), graphs and cuda)
    phase = _Phase(optimizer)
    base = [group["lr"] for group in optimizer.param_groups]
    steps = len(batches)
    losses = torch.zeros(steps, device=device)
    most_state = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated() if cuda else 0
    began = time.perf_counter()
    with _side_stream(cuda):
        for step, batch in enumerate(batches):
            factor = schedule(step, steps, max(1, round(warmup * steps)))
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * factor
            captured = passes.captures
            key = phase()
            losses[step] = passes(batch.tensors(), key)
            measured = key is None or passes.captures > captured or step in (0, steps - 1)
            # A step may free gradients: a sketch is gone once it has become a basis.
            grads = _bytes([p.grad for p in parameters.values()]) if measured else 0
            optimizer.step()
            if measured:
                most_state = max(most_state, grads + state_bytes(optimizer))
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    passes.clear()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    last = float(losses[-50:].mean())
    return TrainResult(last, seconds, start, peak, most_state, passes.captures)


@contextlib.contextmanager
def _side_stream(cuda: bool) -> Iterator[None]:
    """All work on one stream that can be captured, or nothing on a CPU."""
    if not cuda:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@torch.inference_mode()
def log_likelihoods(
    model: nn.Module, sequences: Sequence[Tokens], tokens: int = 65536
) -> tuple[list[float], list[int]]:
    """Log-likelihood of what follows each sequence's prompt.

    Args:
        model: A Hugging Face causal language model, or a PEFT model around one.
        sequences: Rows; each needs a prompt of a token at least.
        tokens: Tokens of a batch at most, padding included.

    Returns:
        Sum of the log-probabilities of the tokens after the prompt, and their number, row by row.
    """
    causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner, head = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
    device = next(model.parameters()).device
    training, precision = model.training, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    model.eval()
    sums = torch.zeros(len(sequences), dtype=torch.float64, device=device)
    # Every batch has a length of its own: blocks that were compiled for training run as they are.
    torch.compiler.set_stance("force_eager")
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    start = 0
    while start < len(order):
        longest = len(sequences[order[start]].ids)
        chosen = order[start : start + max(1, tokens // longest)]
        start += len(chosen)
        # Padding stands behind every row, where a causal model does not see it: no mask is needed.
        rows = [sequences[i] for i in chosen]
        ids = torch.tensor([list(s.ids) + [0] * (longest - len(s.ids)) for s in rows])
        places = [(k, j, s.ids[j]) for k, s in enumerate(rows) for j in range(s.prompt, len(s.ids))]
        row, place, label = torch.tensor(places).T.to(device)
        hidden = inner(input_ids=ids.to(device), use_cache=False).last_hidden_state
        targets = hidden[row, place - 1]
        numbers = torch.tensor(chosen, device=device)[row]
        for part in range(0, len(targets), 4096):
            piece = slice(part, part + 4096)
            logits = head(targets[piece]).float()
            found = logits.gather(1, label[piece, None])[:, 0] - logits.logsumexp(dim=1)
            sums.index_add_(0, numbers[piece], found.double())
    model.train(training)
    torch.set_float32_matmul_precision(precision)
    torch.compiler.set_stance("default")
    return sums.tolist(), [len(s.ids) - s.prompt for s in sequences]
