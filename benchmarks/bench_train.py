"""Whole training steps at 7B: peak memory and tokens per second, beside other methods.

    python benchmarks/bench_train.py --json benchmarks/results/h100/train.json
    python benchmarks/bench_train.py --cases lora --budget 120 --no-plan --json some.json
    python benchmarks/bench_train.py --cases 8x512 --json some.json
    python benchmarks/bench_train.py --cases 16x512/owlore/32-blocks/freeze 16x512/peft --compile
    python benchmarks/bench_train.py --plans some.json
    python benchmarks/bench_train.py --small --device cpu

A step is forward, backward and the optimizer's real step on random tokens; weights are random and
bfloat16, attention is torch's, gradient checkpointing is non-reentrant, nothing is compiled unless
--compile is given (then every decoder block, in every provider). Each case starts from the bare
model and must leave it so.

peak_gib is torch.cuda.max_memory_allocated() from the fourth step on, over normal steps and, for
owlore, two that refresh every active basis; planned_gib is what `owlore plan` says of the same
case. step_ms is the median of normal steps, optimizer_ms the part of it after backward, refresh_ms
what a refresh step takes beyond that. tokens_per_s belongs to the normal step; where refresh_every
is set, every so many steps one refresh step is counted in.

Providers: owlore (backward computes low-rank gradients), owlore-dense (the same step from whole
gradients), lisa (2 blocks, dense), galore-torch (its bases given: SVDs are not timed; svd_ms is one
torch.linalg.svd of each of its matrices, shared out over its gap of 200 steps), adamw-fused (full
fine-tuning), peft-lora (all linear layers but the head, bfloat16 adapters, AdamW fused) and
embed-head-only (blocks frozen: the floor of what trains embedding and head). Weights are bfloat16
everywhere, and so are the states of AdamW. Blocks are drawn uniformly; where embedding and head are
frozen they are spread evenly over the model, the first among them, so that backward has no short
way (chosen says which). Rows named from-4 have the lowest of five blocks where a uniform draw has
it on average, (32 + 1) / 6 - 1 = 4.5, rounded down. LoRA trains no norms; rows named norms-freeze
train none either.

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

from owlore import OwLore, OwLoreConfig, planner

GAP = 200  # steps between galore-torch's SVDs
LORA_RANK = 16
OWLORE = ("owlore", "owlore-dense", "lisa")
NEVER = 10**9


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
        ]  # fmt: skip
        return "/".join(parts)


def cases() -> list[Case]:
    """All rows, within each model those first that are missed most if --budget ends a run."""
    small = Case("llama2-7b", "1x2048", "owlore", 5, moments="fp32")
    large = replace(small, tokens="16x512")
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
    long = [replace(case, tokens="16x512") for case in (*memory[4:], lora)]
    average = replace(long[1], chosen=(4, 10, 15, 21, 26))
    no_norms = replace(long[0], norms="freeze")
    found = [
        *memory, galore, lora, top, replace(top, through=True), floor,
        replace(large, blocks=32, moments="bf16"),
        *(replace(case, tokens="16x512") for case in (full, floor)),
        replace(large, refresh_every=50),
        *long,
        *(replace(case, checkpointing=False) for case in (*memory[4:], lora, *long)),
        average, replace(average, checkpointing=False), replace(galore, tokens="16x512"),
        lisa, replace(small, provider="owlore-dense"), full,
        *(replace(case, side="reverse") for case in memory),
        no_norms, replace(no_norms, checkpointing=False),
    ]  # fmt: skip
    table = [
        replace(memory[3], refresh_every=200), replace(memory[0], refresh_every=50), lora, galore,
        full, lisa, floor, replace(memory[4], refresh_every=200),
        replace(memory[5], refresh_every=50),
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
    elif not chosen and case.embeddings == "freeze":
        chosen = tuple(i * count // case.blocks for i in range(case.blocks))
    config = OwLoreConfig(
        lr=1e-4, blocks=case.blocks, rank=case.rank or None, distribution="uniform",
        side=case.side, moments=case.moments, embeddings=case.embeddings, head=case.embeddings,
        norms=case.norms,
        gradient="dense" if case.provider == "owlore-dense" else "projected",
        interval=NEVER if chosen else period, refresh_interval=period if chosen else NEVER,
    )  # fmt: skip
    return config, chosen


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


def run(case: Case, model: nn.Module, bare: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measures a case on a model of so many bytes; the row without its plan."""
    cuda = args.device == "cuda"
    rows, length = size(case, args.small)
    # Refreshes fall on steps 0, period and 2 period.
    period = 6 if rows == 1 else 4
    warm, steps = 3, 2 * period + 1
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
    normal = [i for i in range(warm, steps) if i not in refreshing]
    step_ms = statistics.median(times[i] for i in normal)
    refresh_ms = None
    if refreshing and case.provider != "lisa":
        refresh_ms = statistics.median(times[i] for i in refreshing) - step_ms
    paid = step_ms + (refresh_ms or 0.0) / case.refresh_every if case.refresh_every else step_ms
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
    return {
        "bench": "train", "model": case.model, "tokens": case.tokens, "provider": case.provider,
        "blocks": case.blocks, "rank": case.rank, "embeddings": case.embeddings,
        "moments": case.moments, "checkpointing": case.checkpointing, "peak_gib": peak,
        "planned_gib": None, "tokens_per_s": rows * length / paid * 1e3, "step_ms": step_ms,
        "optimizer_ms": statistics.median(ends[i] for i in normal), "refresh_ms": refresh_ms,
        "side": case.side if case.provider in OWLORE[:2] else None, "compile": args.compile,
        "refresh_every": case.refresh_every, "backward_through": case.through,
        "steps": len(normal), **extra,
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


def _hide_gpus() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def planned_gib(row: dict[str, Any], small: bool) -> float:
    """The planner's peak for the case of a row."""
    chosen = row.get("chosen")
    case = Case(
        row["model"], row["tokens"], row["provider"], row["blocks"], row["rank"],
        row["embeddings"], row["moments"], row["checkpointing"], row["side"] or "std",
        chosen=None if chosen is None else tuple(chosen), norms=row.get("norms", "full"),
    )  # fmt: skip
    config = model_config(case.model, small)
    options, active = owlore_config(case, 6, config.num_hidden_layers)
    made = planner.plan(
        config, options, *size(case, small), checkpointing=case.checkpointing,
        active=active or None, input_grads=row["backward_through"],
    )  # fmt: skip
    return made.peak / 2**30


def add_plans(rows: Sequence[dict[str, Any]], small: bool = False) -> None:
    """Fills in planned_gib, in processes of their own that see no GPU."""
    workers = max(1, min(12, (os.cpu_count() or 2) - 1))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _hide_gpus) as pool:
        ours = [row for row in rows if row.get("provider") in OWLORE]
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
                *(["norms frozen"] if row.get("norms") == "freeze" else []))  # fmt: skip
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
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--no-plan", action="store_true", help="leave planned_gib out")
    parser.add_argument("--plans", metavar="FILE", help="fill planned_gib into results and stop")
    parser.add_argument("--json")
    args = parser.parse_args()
    began = time.perf_counter()
    chosen = [
        case
        for case in cases()
        if args.cases is None or any(text in f"{case.name}$" for text in args.cases)
    ]
    if args.list:
        print("\n".join(case.name for case in chosen))
        return
    if args.plans:
        rows = json.loads(Path(args.plans).read_text(encoding="utf-8"))
        add_plans(rows)
        common.write_rows(args.plans, rows)
        compare(rows[1:])
        return
    rows = [common.machine(args.device)]
    rows[0]["copy_TB_s"] = common.copy_bandwidth(args.device) / 1e12
    common.show(rows[0])
    model, built, bare, svds = None, "", 0, None
    for case in chosen:
        if time.perf_counter() - began > args.budget:
            print(f"out of time before {case.name}", flush=True)
            continue
        config = model_config(case.model, args.small)
        if case.model != built:
            model = svds = None
            gc.collect()
            if args.device == "cuda":
                forget_scratch()
            model, built = build(config, args.device), case.model
            bare = torch.cuda.memory_allocated() if args.device == "cuda" else 0
        count = config.num_hidden_layers
        if args.small:
            case = shrunk(case, count, planner.SHAPES[case.model][1]["num_hidden_layers"])
        try:
            row = run(case, model, bare, args)
        except ImportError as error:
            print(f"{case.name}: {error}", flush=True)
            continue
        except torch.OutOfMemoryError:
            # What the case left on the model is gone with it.
            print(f"{case.name}: out of memory", flush=True)
            model = svds = None
            built = ""
            continue
        if case.provider == "galore-torch":
            svds = svds or svd_ms(model, args.device)
            total = sum(svds[tuple(W.shape)] for W in block_weights(model))
            row["svd_ms"] = total / GAP
            tokens = row["step_ms"] * row["tokens_per_s"] / 1e3
            row["tokens_per_s_with_svd"] = tokens / (row["step_ms"] + row["svd_ms"]) * 1e3
        rows.append(row)
        common.show(row)
        # Each time, so that a run that is cut short leaves its rows.
        with contextlib.redirect_stdout(io.StringIO()):
            common.write_rows(args.json, rows)
    if not args.no_plan:
        add_plans(rows, args.small)
        common.write_rows(args.json, rows)
    compare(rows[1:])
    print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
