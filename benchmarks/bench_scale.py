"""Training on several GPUs: peak memory of each, tokens per second, bytes that cross the wire.

    torchrun --nproc-per-node 2 benchmarks/bench_scale.py --json results/h200x2/scale.json
    torchrun --nproc-per-node 2 benchmarks/bench_scale.py --small --device cpu

A step is forward, backward and the optimizer's real step on random tokens; weights are random and
bfloat16, embedding and head are frozen, gradient checkpointing is non-reentrant, nothing is
compiled. Each GPU has its own sequences.

strategy is ddp, fsdp2 (fully_shard of each block and of the model) or one: the same training on
each GPU by itself, at the same time. efficiency is the tokens per second of all GPUs over those of
`one`. step_ms is the median of steps that step; the step that sketches its bases is left out of it,
and is in peak_gib, the largest torch.cuda.max_memory_allocated() of all GPUs.
allreduce_mib_per_step counts what one rank hands to all-reduce calls, those of DDP's buckets
included; dense_allreduce_mib_per_step is what DDP alone hands over for gradients of the same
parameters. FSDP2's gathering of weights is in neither.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from owlore import OwLore

SIZES = {
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
}
MIB, GIB = 2**20, 2**30
NEVER = 10**9


@dataclass(frozen=True)
class Case:
    """One row."""

    strategy: str
    blocks: int
    path: str = "projected"
    moments: str = "bf16"


def cases(blocks: int) -> list[Case]:
    """All rows; `one` comes before what is compared with it."""
    few = max(1, 5 * blocks // 32)
    found = []
    for count in (blocks, few):
        found += [Case(strategy, count) for strategy in ("one", "ddp", "fsdp2")]
    found += [Case(strategy, few, path="dense") for strategy in ("one", "ddp", "fsdp2")]
    return found


def build(name: str, device: str) -> nn.Module:
    """The model with random weights in bfloat16, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[name], tie_word_embeddings=False))
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def count_bytes() -> list[int]:
    """Bytes of each call of all_reduce from now on."""
    sizes: list[int] = []
    call = distributed.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return call(tensor, *args, **kwargs)

    distributed.all_reduce = counted
    return sizes


def wrap(model: nn.Module, case: Case, device: str, sizes: list[int]) -> nn.Module:
    """Hands the model to its strategy."""
    if case.strategy == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for block in model.model.layers:
            fully_shard(block)
        return fully_shard(model)
    if case.strategy == "one":
        return model
    wrapped = DistributedDataParallel(
        model, device_ids=[torch.cuda.current_device()] if device == "cuda" else None
    )

    # DDP wants its own annotations, or none.
    def hook(group, bucket):  # type: ignore[no-untyped-def]
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        sizes.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, hook)
    return wrapped


def run(case: Case, args: argparse.Namespace, sizes: list[int]) -> dict[str, Any]:
    """Trains and measures one case on this rank."""
    rank = distributed.get_rank()
    size = SIZES[args.model]
    device = args.device
    model = build(args.model, device)
    options = {
        "blocks": case.blocks,
        "rank": args.rank,
        "interval": NEVER,
        "refresh_interval": NEVER,
        "distribution": "uniform",
        "gradient": case.path,
        "moments": case.moments,
        "embeddings": "freeze",
        "head": "freeze",
        "lr": 1e-5,
    }
    if case.strategy == "ddp":
        optimizer = OwLore(model, **options)
        trained = wrap(model, case, device, sizes)
    else:
        trained = wrap(model, case, device, sizes)
        optimizer = OwLore(trained, **options)
    generator = torch.Generator(device).manual_seed(1 + rank)
    shape = (args.rows, args.tokens)

    def step() -> None:
        ids = torch.randint(0, size["vocab_size"], shape, generator=generator, device=device)
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    settle = torch.cuda.synchronize if device == "cuda" else _nothing
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # The first sketches, or finds its bases in whole gradients; two more fill caches.
    for _ in range(3):
        step()
    times, start = [], len(sizes)
    for _ in range(args.steps):
        settle()
        distributed.barrier()
        settle()
        began = time.perf_counter()
        step()
        settle()
        times.append(time.perf_counter() - began)
    crossed = sum(sizes[start:]) / args.steps
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    weights = [m.weight for m in optimizer._members if optimizer._is_active(m)]
    dense = sum(weight.numel() * weight.element_size() for weight in weights)
    found = {"seconds": statistics.median(times), "crossed": crossed, "dense": dense, "peak": peak}
    if case.path == "projected":
        # Something was timed that trains.
        assert any("exp_avg" in state and "basis" in state for state in optimizer.state.values())
    optimizer.detach()
    return found


def _nothing() -> None:
    return None


def slowest(found: dict[str, Any], key: str) -> float:
    """The largest of all ranks' values."""
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, found[key])
    return max(values)


def free(device: str) -> None:
    """Leaves the device bare for the next case."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="llama2-7b", choices=SIZES)
    parser.add_argument("--rows", type=int, default=1, help="sequences a step on each GPU")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--cases", nargs="*", help="only these, such as ddp/32/projected")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args(argv)
    if args.small:
        args.model, args.tokens, args.rank, args.steps = "tiny", 32, 8, 3
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    gpus, first = distributed.get_world_size(), distributed.get_rank() == 0
    sizes = count_bytes()
    rows = [common.machine(args.device)]
    alone: dict[tuple[int, str], float] = {}
    for case in cases(SIZES[args.model]["num_hidden_layers"]):
        name = f"{case.strategy}/{case.blocks}/{case.path}"
        if args.cases and name not in args.cases and case.strategy != "one":
            continue
        found = run(case, args, sizes)
        free(args.device)
        seconds = slowest(found, "seconds")
        rate = gpus * args.rows * args.tokens / seconds
        peak = slowest(found, "peak")
        key = (case.blocks, case.path)
        if case.strategy == "one":
            alone[key] = rate
        row = {
            "bench": "scale",
            "model": args.model,
            "strategy": case.strategy,
            "gpus": gpus,
            "blocks": case.blocks,
            "rank": args.rank,
            "path": case.path,
            "peak_gib": round(peak / GIB, 2),
            "tokens_per_s": round(rate),
            "efficiency": round(rate / alone[key], 3),
            "allreduce_mib_per_step": round(found["crossed"] / MIB, 3),
            "dense_allreduce_mib_per_step": round(found["dense"] / MIB, 3),
            "step_ms": round(1e3 * seconds, 2),
            "tokens": f"{args.rows}x{args.tokens}",
            "moments": case.moments,
        }
        rows.append(row)
        if first:
            common.show(row)
            common.write_rows(args.json, rows)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
