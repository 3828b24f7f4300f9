"""Whole training steps at 7B: peak memory and tokens per second, beside other methods.

    python benchmarks/bench_train.py --json benchmarks/results/h100/train.json
    python benchmarks/bench_train.py --cases lora --budget 120 --no-plan --json some.json
    python benchmarks/bench_train.py --cases 8x512 --json benchmarks/results/h100/train_methods.json
    python benchmarks/bench_train.py --compile --json benchmarks/results/h100/train_compiled.json
    python benchmarks/bench_train.py --plans benchmarks/results/h100/train*.json
    python benchmarks/bench_train.py --small --device cpu

A step is forward, backward and the optimizer's real step on random tokens; weights are random and
bfloat16, attention is torch's, gradient checkpointing is non-reentrant, nothing is compiled unless
--compile is given (then every decoder block, in every provider). Each case starts from the bare
model and must leave it so.

peak_gib is torch.cuda.max_memory_allocated() from the third step on, over normal steps and, for
owlore, at least one that refreshes every active basis; planned_gib is what `owlore plan` says of
the same case, unless it is compiled. step_ms is the median of normal steps, optimizer_ms the part
of it after backward, refresh_ms what a refresh step takes beyond that. tokens_per_s belongs to the
normal step; where refresh_every is set, every so many steps one refresh step is counted in. Steps
of one sequence wait for the host, whose speed changes by the minute: what is compared there is
measured again, after all else, in up to three rounds (round_ms), and medians are of all steps.

Providers: owlore (backward computes low-rank gradients), owlore-dense (the same step from whole
gradients), lisa (2 blocks, dense), galore-torch (its bases given: SVDs are not timed; svd_ms is one
torch.linalg.svd of each of its matrices, shared out over its gap of 200 steps), adamw-fused (full
fine-tuning), peft-lora (all linear layers but the head, bfloat16 adapters, AdamW fused) and
embed-head-only (blocks frozen: the floor of what trains embedding and head). Weights are bfloat16
everywhere, and so are the states of AdamW. Blocks are drawn uniformly; where embedding and head are
frozen they are spread evenly over the model, the first among them, so that backward has no short
way: the worst draw (chosen says which). Rows named draws-4 and draws-8 measure what is drawn
instead: so many uniform draws of three steps each, a draw every 50 steps counted in. A step's time
is linear in the lowest of its blocks, below which nothing has a backward. Of five of 32 blocks that
is block (32 + 1) / 6 - 1 = 4.5 on average, and the seed is the first whose draws have that average
(lowest), so that their mean is that of all draws. Rows named through have none below either, but
backward all the same. LoRA trains no norms; rows named norms-freeze train none either.

Rows of 8x512 tokens are one table for each model: all methods, with the time of each method's SVDs
or refreshes at its own interval (200 steps, or the draws' 50).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import gc
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch
from torch import Tensor, nn

from owlore import OwLore, OwLoreConfig, planner, sampling

GAP = 200  # steps between galore-torch's SVDs
LORA_RANK = 16
OWLORE = ("owlore", "owlore-dense", "lisa")
NEVER = 10**9
DRAWS = 8  # of a row that measures blocks as they are drawn, of so many steps each
DRAW_STEPS = 3
ROUNDS = 3  # of what is compared where the host is the limit


@dataclass(frozen=True)
class Case:
    """One row: a model, a batch, a provider and its options."""

    model: str
    tokens: str
    provider: str
    blocks: int
    rank: int = 128
    embeddings: str = "full"
    moments: str = "bf16"
    checkpointing: bool = True
    side: str = "std"
    refresh_every: int | None = None
    # Blocks that train, instead of draws; backward through all blocks though none below trains.
    chosen: tuple[int, ...] | None = None
    through: bool = False
    norms: str = "full"
    # Draws to take the mean of, where blocks are neither chosen nor spread.
    draws: int = 0
    rounds: int = 1
    # To be run after all rounds of the other cases.
    last: bool = False

    @property
    def name(self) -> str:
        """What --cases selects by."""
        parts = [
            self.model, self.tokens, self.provider, f"{self.blocks}-blocks", self.embeddings,
            self.moments, self.side, "checkpointed" if self.checkpointing else "stored",
            *([f"from-{self.chosen[0]}"] if self.chosen else []),
            *(["through"] if self.through else []),
            *([f"every-{self.refresh_every}"] if self.refresh_every else []),
            *(["norms-freeze"] if self.norms == "freeze" else []),
            *([f"draws-{self.draws}"] if self.draws else []),
        ]  # fmt: skip
        return "/".join(parts)


def cases() -> list[Case]:
    """All rows, within each model those first that are missed most if --budget ends a run."""
    small = Case("llama2-7b", "1x2048", "owlore", 5, moments="fp32")
    lora = replace(small, provider="peft-lora", blocks=32, rank=LORA_RANK, embeddings="freeze",
                   moments="bf16")  # fmt: skip
    memory = [
        small,
        replace(small, embeddings="lowrank"),
        replace(small, blocks=32),
        replace(small, blocks=32, moments="bf16"),
        replace(small, blocks=32, moments="bf16", embeddings="freeze"),
        replace(small, moments="bf16", embeddings="freeze"),
    ]
    floor = replace(small, provider="embed-head-only", blocks=0, rank=0, moments="bf16")
    full = replace(small, provider="adamw-fused", blocks=32, rank=0, moments="bf16")
    galore = replace(small, provider="galore-torch", blocks=32, moments="bf16")
    lisa = replace(small, provider="lisa", blocks=2, rank=0, moments="bf16")
    top = replace(small, blocks=4, moments="bf16", embeddings="freeze", chosen=(28, 29, 30, 31))
    drawn = replace(memory[5], refresh_every=50, draws=DRAWS)
    lora_pairs = [
        replace(case, checkpointing=on)
        for on in (True, False)
        for case in (memory[4], lora, drawn)
    ]  # fmt: skip
    variants = [
        replace(case, checkpointing=on)
        for case in (replace(memory[4], norms="freeze"), memory[5])
        for on in (True, False)
    ]
    large = [
        *lora_pairs, *variants, memory[3], full, floor, replace(small, refresh_every=50)
    ]  # fmt: skip
    rest = [
        floor, full, lisa, replace(small, provider="owlore-dense"),
        *(replace(case, side="reverse") for case in memory),
    ]  # fmt: skip
    found = [
        *(replace(case, tokens="16x512", draws=case.draws // 2) for case in large),
        *(replace(case, rounds=ROUNDS) for case in (*memory[2:4], galore)), *memory[:2],
        # At one sequence LoRA's row stands between ours.
        *(replace(case, rounds=ROUNDS) for case in lora_pairs),
        replace(galore, tokens="16x512"), top, replace(top, through=True),
        *(replace(case, last=True) for case in (*variants, *rest)),
    ]  # fmt: skip
    table = [
        replace(memory[4], refresh_every=200), lora, galore, full,
        replace(memory[3], refresh_every=200), replace(drawn, draws=DRAWS // 2),
        replace(memory[0], refresh_every=50), lisa, floor,
    ]  # fmt: skip
    table = [replace(case, tokens="8x512") for case in table]
    found += table
    for model, blocks in (("llama3-8b", 32), ("qwen3-4b", 36)):
        others = [memory[0], memory[3], memory[4], lora, galore]
        # Where keys and values are narrow, as here but not in LLaMA-2-7B, auto is not std.
        others += [replace(memory[3], side=side) for side in ("reverse", "auto")]
        found += [
            replace(case, model=model, blocks=blocks if case.blocks == 32 else case.blocks)
            for case in (*others, *table)
        ]
    return found


def ordered(of: Sequence[Case], rounds: int) -> list[tuple[Case, int]]:
    """Cases and the number of the round: no second round before all first ones."""
    repeated = [(case, i) for i in range(rounds) for case in of if i < case.rounds]
    return [pair for pair in repeated if not pair[0].last] + [(c, 0) for c in of if c.last]


def compiled_cases() -> list[Case]:
    """What --compile runs unless --cases selects, those first that are missed most.

    Beside LoRA with embedding and head frozen, and beside GaLore where the host is the limit of
    blocks that are not compiled. Drawn rows, with the most graphs, and those without norms last.
    """
    found = [
        replace(case, rounds=1, last=False)
        for case in cases()
        if case.model == "llama2-7b" and case.tokens != "8x512" and case.side == "std"
        and case.chosen is None and (case.blocks == 32 or case.draws)
        and case.moments == "bf16" and (case.embeddings == "freeze" or case.rounds > 1)
    ]  # fmt: skip
    return sorted(
        found, key=lambda case: (case.norms == "freeze", case.draws, case.tokens == "1x2048")
    )


def shrunk(case: Case, blocks: int, of: int) -> Case:
    """The case for a model of few blocks."""
    chosen = None if case.chosen is None else tuple(range(blocks))[-1:]
    count = len(chosen) if chosen else -(-case.blocks * blocks // of)
    return replace(case, blocks=count, rank=min(case.rank, 8), chosen=chosen)


def model_config(name: str, small: bool) -> Any:
    """The transformers configuration of a shape; a tiny one of its kind if `small`."""
    from transformers import AutoConfig

    kind, fields = planner.SHAPES[name]
    if small:
        sizes = {
            "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "head_dim": 16,
        }  # fmt: skip
        fields = {**fields, **sizes}
    return AutoConfig.for_model(kind, **fields, use_cache=False)


def build(config: Any, device: str) -> nn.Module:
    """A model with random weights, created on the device as they stay. bfloat16."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.train()


def owlore_config(case: Case, period: int, count: int) -> tuple[OwLoreConfig, tuple[int, ...]]:
    """Options of a case of ours, and its blocks if they are not drawn."""
    chosen = case.chosen or ()
    if case.blocks == count:
        chosen = tuple(range(count))
    elif not chosen and case.embeddings == "freeze" and not case.draws:
        chosen = tuple(i * count // case.blocks for i in range(case.blocks))
    config = OwLoreConfig(
        lr=1e-4, blocks=case.blocks, rank=case.rank or None, distribution="uniform",
        side=case.side, moments=case.moments, embeddings=case.embeddings, head=case.embeddings,
        norms=case.norms,
        gradient="dense" if case.provider == "owlore-dense" else "projected",
        interval=NEVER if chosen else period, refresh_interval=period if chosen else NEVER,
    )  # fmt: skip
    if case.draws:
        config = config.replace(seed=even_seed(config, case.draws, count))
    return config, chosen


def drawn_blocks(config: OwLoreConfig, draws: int, count: int) -> list[tuple[int, ...]]:
    """The blocks of so many uniform draws; the first draw of the run warms up and is no part."""
    p = sampling.probabilities("uniform", count, None, None, config.floor)
    gamma = int(config.blocks)
    return [
        sampling.draw(p, gamma, config.seed, i, config.draw) for i in range(1, draws + 1)
    ]  # fmt: skip


def even_seed(config: OwLoreConfig, draws: int, count: int) -> int:
    """The first seed whose draws' lowest blocks have the mean that all draws' have."""
    wanted = (count + 1) / (int(config.blocks) + 1) - 1

    def distance(seed: int) -> float:
        found = drawn_blocks(config.replace(seed=seed), draws, count)
        return abs(statistics.fmean(map(min, found)) - wanted)

    return min(range(200), key=distance)


def galore_adamw(undo: list[Callable[[], Any]]) -> type[torch.optim.Optimizer]:
    """galore-torch's AdamW, whose bases are random: their computation is measured on its own.

    Args:
        undo: Takes what gives galore-torch its own bases back.
    """
    name = "galore_torch"
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("galore-torch is not installed")
    # Its __init__ imports bitsandbytes for an optimizer that is not used here.
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules.setdefault(name, package)
    from galore_torch.adamw import AdamW
    from galore_torch.galore_projector import GaLoreProjector

    def orthogonal(_: Any, weights: Tensor, rank: int, type: str) -> Tensor:
        m, n = weights.shape
        shape = (m, rank) if type == "left" else (rank, n)
        return torch.randn(shape, dtype=weights.dtype, device=weights.device).div_(
            max(shape) ** 0.5
        )

    own = GaLoreProjector.get_orthogonal_matrix
    undo.append(lambda: setattr(GaLoreProjector, "get_orthogonal_matrix", own))
    GaLoreProjector.get_orthogonal_matrix = orthogonal
    return AdamW


def block_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the linear layers in the decoder blocks."""
    layers = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    return [layer.weight for layer in layers]


class Provider:
    """A way to train the model: its optimizer, and how to take it off again."""

    def __init__(self, case: Case, model: nn.Module, period: int) -> None:
        self.model = model
        self.undo: list[Callable[[], Any]] = []
        self.extra: dict[str, Any] = {}
        fused = next(model.parameters()).is_cuda
        model.requires_grad_(True)
        count = len(model.model.layers)
        if case.provider in OWLORE:
            config, chosen = owlore_config(case, period, count)
            if case.draws:
                found = drawn_blocks(config, case.draws, count)
                self.extra["draws"] = [list(active) for active in found]
                self.extra["lowest"] = statistics.fmean(map(min, found))
            if chosen and len(chosen) < count:
                weights = [float(i in chosen) for i in range(count)]
                config = config.replace(distribution=lambda _: weights)
                self.extra["chosen"] = list(chosen)
            optimizer: Any = OwLore(model, config)
            self.undo.append(optimizer.detach)
        elif case.provider == "peft-lora":
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules="all-linear")
            wrapped = get_peft_model(model, lora, autocast_adapter_dtype=False)
            self.undo.append(wrapped.unload)
            self.extra["adapter_dtype"] = "bf16"
            trained = [p for p in wrapped.parameters() if p.requires_grad]
            assert all(p.dtype == torch.bfloat16 for p in trained)
            optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=fused)
        elif case.provider == "galore-torch":
            matrices = block_weights(model)
            known = {id(p) for p in matrices}
            rest = [p for p in model.parameters() if id(p) not in known]
            low = {
                "params": matrices, "rank": case.rank, "update_proj_gap": NEVER, "scale": 0.25,
                "proj_type": "std",
            }  # fmt: skip
            optimizer = galore_adamw(self.undo)(
                [{"params": rest}, low], lr=1e-4, no_deprecation_warning=True
            )
        else:
            if case.provider == "embed-head-only":
                model.requires_grad_(False)
                for part in (model.get_input_embeddings(), model.get_output_embeddings()):
                    part.requires_grad_(True)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=fused)
        # PEFT asks for the gradient of the embeddings, which none of the frozen cases needs.
        model.disable_input_require_grads()
        if case.through:
            embeddings = model.get_input_embeddings()
            hook = embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_(True))
            self.undo.append(hook.remove)
        self.optimizer = optimizer

    def restore(self) -> None:
        """Leaves the model as it was, but for the values of its weights."""
        for undo in self.undo:
            undo()
        self.model.requires_grad_(True)
        self.model.zero_grad(set_to_none=True)


def forget_scratch() -> None:
    """Frees what outlives a case: workspaces of cuBLAS, scratch and tables of our kernels."""
    from owlore.kernels import adamw, lowrank_adam
    from owlore.kernels import common as kernels

    for held in (kernels, adamw, lowrank_adam):
        for name in ("_arenas", "_plans", "_prepared"):
            getattr(held, name, {}).clear()
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


class Clock:
    """Marks in time: events on the device, or the host's clock."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def mark(self) -> Any:
        """Now."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds; the marks must have come to pass."""
        return begin.elapsed_time(end) if self.cuda else (end - begin) * 1e3


def checkpoint_blocks(model: nn.Module, on: bool) -> None:
    """Switches non-reentrant gradient checkpointing."""
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers makes the embeddings' output require a gradient along with it.
        model.disable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()


@dataclass
class Round:
    """What one round of a case measured.

    Attributes:
        steps: Milliseconds of normal steps; of a drawn case those of each draw. [draws or 1][steps]
        ends: Milliseconds of the optimizer's step in each of them.
        refreshes: Milliseconds that a refresh, or a draw, takes beyond a normal step.
        peak_gib: Peak memory, or None on a CPU.
        extra: Fields that only some rows have.
    """

    steps: list[list[float]]
    ends: list[float]
    refreshes: list[float]
    peak_gib: float | None
    extra: dict[str, Any]


def measure(case: Case, model: nn.Module, bare: int, args: argparse.Namespace) -> Round:
    """Measures a case on a model of so many bytes."""
    cuda = args.device == "cuda"
    rows, length = size(case, args.small)
    # Refreshes fall on steps 0 and 4 and, where steps are short, 8; draws on every multiple of 3.
    period, warm = (DRAW_STEPS, DRAW_STEPS) if case.draws else (4, 2)
    steps = 9 if rows == 1 else warm + 5 if case.provider in OWLORE else warm + 4
    if case.draws:
        steps = (case.draws + 1) * period
    checkpoint_blocks(model, case.checkpointing)
    if args.compile:
        for block in model.model.layers:
            block.compile()
        torch._dynamo.utils.counters.clear()
    provider = Provider(case, model, period)
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    batches = [
        torch.randint(0, vocabulary, (rows, length), generator=generator).to(args.device)
        for _ in range(2)
    ]
    trained = case.provider in ("adamw-fused", "galore-torch") or case.blocks == len(
        model.model.layers
    )
    probe = (
        block_weights(model)[-1] if case.provider not in ("peft-lora", "embed-head-only") else None
    )
    old = None if probe is None else probe.detach()[:64].clone()
    clock = Clock(cuda)
    marks: list[tuple[Any, Any]] = []
    for step in range(steps):
        if step == warm and cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = clock.mark()
        ids = batches[step % 2]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        middle = clock.mark()
        provider.optimizer.step()
        provider.optimizer.zero_grad(set_to_none=True)
        marks.append((begin, middle))
    marks.append((clock.mark(), None))
    if cuda:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    if not bool(torch.isfinite(loss)):
        raise RuntimeError(f"{case.name}: the loss is {float(loss)}")
    if trained and old is not None and torch.equal(old, probe.detach()[:64]):
        raise RuntimeError(f"{case.name}: a weight that trains did not move")
    times = [clock.between(marks[i][0], marks[i + 1][0]) for i in range(steps)]
    ends = [clock.between(marks[i][1], marks[i + 1][0]) for i in range(steps)]
    # Only ours refresh; the step after a refresh pays for what the refresh left undone.
    refreshing = [i for i in range(warm, steps) if i % period == 0 and case.provider in OWLORE]
    if case.draws:
        # A draw's last step is its normal one, and what the others take more is the draw's.
        normal = [i for i in range(warm, steps) if i % period == period - 1]
        found = [[times[i]] for i in normal]
        refreshes = [
            sum(times[i : i + period]) - period * times[i + period - 1] for i in refreshing
        ]
        drawn = [list(active) for index, active in provider.optimizer.draws() if index]
        assert drawn == provider.extra["draws"], drawn
    else:
        normal = [i for i in range(warm, steps) if i not in refreshing]
        found = [[times[i] for i in normal]]
        middle_ms = statistics.median(found[0])
        refreshes = [times[i] - middle_ms for i in refreshing if case.provider != "lisa"]
    extra = provider.extra
    if case.norms == "freeze":
        extra["norms"] = "freeze"
    if args.compile:
        extra["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    provider.restore()
    del provider, loss, batches, old, probe
    if args.compile:
        for block in model.model.layers:
            block._compiled_call_impl = None
        torch._dynamo.reset()
    if cuda:
        forget_scratch()
        after = torch.cuda.memory_allocated()
        if after - bare > 2**24:
            raise RuntimeError(f"{case.name} left {(after - bare) / 2**20:.0f} MiB behind")
    return Round(found, [ends[i] for i in normal], refreshes, peak, extra)


def made_row(case: Case, rounds: Sequence[Round], args: argparse.Namespace) -> dict[str, Any]:
    """The row of a case from the rounds that were measured, without its plan."""
    rows, length = size(case, args.small)

    def step_ms(of: Sequence[Round]) -> list[float]:
        draws = zip(*(each.steps for each in of), strict=True)
        return [statistics.median(itertools.chain(*steps)) for steps in draws]

    step = statistics.fmean(step_ms(rounds))
    taken = [ms for each in rounds for ms in each.refreshes]
    refresh = None
    if taken:
        refresh = statistics.fmean(taken) if case.draws else statistics.median(taken)
    paid = step + (refresh or 0.0) / case.refresh_every if case.refresh_every else step
    extra = dict(rounds[-1].extra)
    if case.draws:
        extra["draw_ms"] = step_ms(rounds)
    if len(rounds) > 1:
        extra["round_ms"] = [statistics.fmean(step_ms([each])) for each in rounds]
    return {
        "bench": "train", "model": case.model, "tokens": case.tokens, "provider": case.provider,
        "blocks": case.blocks, "rank": case.rank, "embeddings": case.embeddings,
        "moments": case.moments, "checkpointing": case.checkpointing,
        "peak_gib": None if rounds[0].peak_gib is None else max(r.peak_gib for r in rounds),
        "planned_gib": None, "tokens_per_s": rows * length / paid * 1e3, "step_ms": step,
        "optimizer_ms": statistics.median(ms for each in rounds for ms in each.ends),
        "refresh_ms": refresh, "side": case.side if case.provider in OWLORE[:2] else None,
        "compile": args.compile, "refresh_every": case.refresh_every,
        "backward_through": case.through,
        "steps": sum(len(steps) for each in rounds for steps in each.steps), **extra,
    }  # fmt: skip


def size(case: Case, small: bool) -> tuple[int, int]:
    """Sequences and their tokens."""
    rows, length = map(int, case.tokens.split("x"))
    return (min(rows, 2), 32) if small else (rows, length)


def svd_ms(model: nn.Module, device: str) -> dict[tuple[int, int], float]:
    """Milliseconds of torch.linalg.svd of one matrix of each shape that galore-torch projects."""
    clock = Clock(device == "cuda")
    torch.linalg.svd(torch.randn(64, 64, device=device), full_matrices=False)
    found = {}
    for shape in {tuple(W.shape) for W in block_weights(model)}:
        G = torch.randn(shape, device=device)
        begin = clock.mark()
        torch.linalg.svd(G, full_matrices=False)
        end = clock.mark()
        if device == "cuda":
            torch.cuda.synchronize()
        found[shape] = clock.between(begin, end)
    return found


def add_svds(row: dict[str, Any], model: nn.Module, svds: dict[tuple[int, int], float]) -> None:
    """What galore-torch's SVDs take, shared out over its gap, and its tokens per second with it."""
    row["svd_ms"] = sum(svds[tuple(W.shape)] for W in block_weights(model)) / GAP
    tokens = row["step_ms"] * row["tokens_per_s"] / 1e3
    row["tokens_per_s_with_svd"] = tokens / (row["step_ms"] + row["svd_ms"]) * 1e3


def _hide_gpus() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def planned_gib(row: dict[str, Any], small: bool) -> float:
    """The planner's peak for the case of a row; of a drawn one over the draws that reach lowest."""
    chosen, draws = row.get("chosen"), row.get("draws", [])
    case = Case(
        row["model"], row["tokens"], row["provider"], row["blocks"], row["rank"],
        row["embeddings"], row["moments"], row["checkpointing"], row["side"] or "std",
        chosen=None if chosen is None else tuple(chosen), norms=row.get("norms", "full"),
        draws=len(draws),
    )  # fmt: skip
    config = model_config(case.model, small)
    options, active = owlore_config(case, 6, config.num_hidden_layers)
    # Each block with a backward holds its input at least.
    lowest = [blocks for blocks in draws if min(blocks) == min(map(min, draws))]
    return max(
        planner.plan(
            config, options, *size(case, small), checkpointing=case.checkpointing,
            active=blocks, input_grads=row["backward_through"],
        ).peak / 2**30
        for blocks in (lowest or [active or None])
    )  # fmt: skip


def add_plans(rows: Sequence[dict[str, Any]], small: bool = False) -> None:
    """Fills in planned_gib, in processes of their own that see no GPU."""
    workers = min(12, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _hide_gpus) as pool:
        # What a compiled block keeps for its backward is the compiler's choice.
        ours = [row for row in rows if row.get("provider") in OWLORE and not row["compile"]]
        for row, future in [(row, pool.submit(planned_gib, row, small)) for row in ours]:
            row["planned_gib"] = future.result()


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Prints ours against the provider that a case is meant to be read beside."""

    def find(like: dict[str, Any], **changes: Any) -> dict[str, Any] | None:
        keys = ("model", "tokens", "checkpointing", "compile", "provider")
        wanted = {key: like[key] for key in keys} | changes
        return next((r for r in rows if all(r.get(k) == v for k, v in wanted.items())), None)

    for row in rows:
        if row.get("provider") != "owlore":
            continue
        frozen = row["embeddings"] == "freeze"
        rivals = ("peft-lora",) if frozen else ("embed-head-only", "galore-torch", "adamw-fused")
        texts = []
        for rival in rivals:
            other = find(row, provider=rival)
            if other is None:
                continue
            text = f"{row['tokens_per_s'] / other['tokens_per_s']:.2f}x"
            pairs = list(zip(row.get("round_ms", ()), other.get("round_ms", ()), strict=False))
            if pairs:
                text += f" (steps, by round: {', '.join(f'{b / a:.2f}' for a, b in pairs)})"
            if other["peak_gib"] and row["peak_gib"]:
                text += f" at {row['peak_gib'] / other['peak_gib']:.2f}x peak"
            texts.append(f"{rival} {text}")
            if "tokens_per_s_with_svd" in other:
                texts[-1] += (
                    f" ({row['tokens_per_s'] / other['tokens_per_s_with_svd']:.1f}x with SVDs)"
                )
        if row["blocks"] == len(row.get("chosen", ())) and not row["backward_through"]:
            other = find(row, backward_through=True)
            if other is not None and other.get("chosen") == row.get("chosen"):
                texts.append(f"backward through all {row['step_ms'] / other['step_ms']:.2f}x step")
        what = (row["model"], row["tokens"], row["blocks"], row["embeddings"], row["moments"],
                row["side"], "checkpointed" if row["checkpointing"] else "stored",
                *([f"from {row['chosen'][0]}"] if row.get("chosen") else []),
                *([f"drawn, from {row['lowest']:g} on average"] if row.get("draws") else []),
                *(["norms frozen, as LoRA's"] if row.get("norms") == "freeze" else []),
                *([f"compiled, {row['graphs']} graphs"] if row["compile"] else []))  # fmt: skip
        if row["planned_gib"] and row["peak_gib"]:
            texts.append(f"plan {row['planned_gib'] / row['peak_gib']:.3f}x measured")
        print(" ".join(map(str, what)) + ": " + "; ".join(texts), flush=True)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--cases", nargs="+", metavar="TEXT",
        help="only cases whose name, with a $ at its end, has one of these in it",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    parser.add_argument("--compile", action="store_true", help="compile every decoder block")
    parser.add_argument("--budget", type=float, default=NEVER, help="seconds; then no new case")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="rounds of what is compared at one sequence"
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--no-plan", action="store_true", help="leave planned_gib out")
    parser.add_argument(
        "--plans", nargs="+", metavar="FILE", help="fill planned_gib into results and stop"
    )  # fmt: skip
    parser.add_argument("--json")
    args = parser.parse_args()
    began = time.perf_counter()
    chosen = [
        case
        for case in (compiled_cases() if args.compile and not args.cases else cases())
        if args.cases is None or any(text in f"{case.name}$" for text in args.cases)
    ]
    if args.list:
        print("\n".join(case.name for case in chosen))
        return
    for path in args.plans or ():
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        add_plans(rows)
        common.write_rows(path, rows)
        compare(rows[1:])
    if args.plans:
        return
    rows = [common.machine(args.device)]
    rows[0]["copy_TB_s"] = common.copy_bandwidth(args.device) / 1e12
    common.show(rows[0])
    model, built, bare, svds, failed = None, "", 0, {}, 0
    measured: dict[Case, list[Round]] = {}
    found: dict[Case, dict[str, Any]] = {}
    for name in dict.fromkeys(case.model for case in chosen):
        for case, of in ordered([case for case in chosen if case.model == name], args.rounds):
            # A case that failed is not measured again.
            if len(measured.get(case, [])) < of:
                continue
            if time.perf_counter() - began > args.budget:
                print(f"out of time before round {of + 1} of {case.name}", flush=True)
                continue
            config = model_config(case.model, args.small)
            if case.model != built:
                model = None
                gc.collect()
                if args.device == "cuda":
                    forget_scratch()
                model, built = build(config, args.device), case.model
                bare = torch.cuda.memory_allocated() if args.device == "cuda" else 0
            run = case
            if args.small:
                of_blocks = planner.SHAPES[case.model][1]["num_hidden_layers"]
                run = shrunk(case, config.num_hidden_layers, of_blocks)
            try:
                measured.setdefault(case, []).append(measure(run, model, bare, args))
            except ImportError as error:
                print(f"{case.name}: {error}", flush=True)
                continue
            except RuntimeError as error:
                # What the case left on the model is gone with it.
                short = isinstance(error, torch.OutOfMemoryError)
                print(f"{case.name}: {'out of memory' if short else error}", flush=True)
                failed += not short
                model, built = None, ""
                continue
            row = made_row(run, measured[case], args)
            if case.provider == "galore-torch":
                if case.model not in svds:
                    svds[case.model] = svd_ms(model, args.device)
                add_svds(row, model, svds[case.model])
            common.show(row)
            found[case] = row
            # Each time, so that a run that is cut short leaves its rows.
            with contextlib.redirect_stdout(io.StringIO()):
                common.write_rows(args.json, [*rows, *found.values()])
    rows += found.values()
    if not args.no_plan:
        add_plans(rows, args.small)
        common.write_rows(args.json, rows)
    compare(rows[1:])
    print(f"{time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        sys.exit(f"{failed} cases failed")


if __name__ == "__main__":
    main()
