"""`OwLore.step()` on five LLaMA-2-7B blocks: time on the device and on the host.

    python benchmarks/bench_step.py --json benchmarks/results/h100/step.json

host_ms is how long step() keeps the calling thread, without waiting for the device; ms is the
device's time for steps in a row. The case "llama2-7b-5-blocks" is the 35 matrices alone, with
embedding, head and norms frozen; in "-and-dense" those train too (with a vocabulary of 512).
Gradients are "kept" in their places, with the same learning rate and nothing between two steps; or
"new" at every step, at addresses that no step saw before. In a "loop" they come from a forward and
a backward pass on 512 tokens at every step, after zero_grad(set_to_none=True) and with another
learning rate, as in training; in a "ragged loop" the passes take 64 to 512 tokens in turn, so that
memory is handed out differently. tables is in how many of the timed steps the kernels' addresses of
gradients were sent to the device, as no recent step had had them. launches and copies are the
kernels, and the copies and fills of memory, of one step. The timed steps are those between two
draws and two refreshes, and run under torch.cuda.set_sync_debug_mode("error").
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch

from owlore import OwLore

CASE = "llama2-7b-5-blocks"
FROZEN = {"embeddings": "freeze", "head": "freeze", "norms": "freeze"}
TRAINED = dict.fromkeys(FROZEN, "full")


def build(device: str, small: bool) -> torch.nn.Module:
    """Five LLaMA-2-7B blocks with a small vocabulary, random weights. bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64 if small else 4096,
        intermediate_size=172 if small else 11008,
        num_attention_heads=4 if small else 32,
        num_key_value_heads=4 if small else 32,
        num_hidden_layers=5,
        vocab_size=512,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).train()


def build_optimizer(
    model: torch.nn.Module, provider: str, rank: int, path: str, dense: bool
) -> torch.optim.Optimizer:
    """A provider's optimizer; `dense`: embedding, head and norms train too."""
    # The provider before may have left some of them frozen.
    model.requires_grad_(True)
    if provider == "owlore":
        return OwLore(
            model, lr=1e-4, blocks="all", rank=rank, distribution="uniform", interval=10**6,
            refresh_interval=10**6, gradient=path, **(TRAINED if dense else FROZEN),
        )  # fmt: skip
    for name, param in model.named_parameters():
        param.requires_grad_(dense or "proj" in name)
    params = [param for param in model.parameters() if param.requires_grad]
    return torch.optim.AdamW(params, lr=1e-4, fused=True)


def move_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Gives every gradient another address."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    random.shuffle(params)
    moved = [param.grad.clone() for param in params]
    for param, grad in zip(params, moved, strict=True):
        param.grad = grad


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: int, lr: float) -> None:
    """What a training loop does between two steps."""
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups:
        group["lr"] = lr
    ids = torch.randint(0, 512, (1, tokens), device=next(model.parameters()).device)
    model(input_ids=ids, labels=ids).loss.backward()


def tables_written(optimizer: torch.optim.Optimizer) -> int:
    """How often the kernels' addresses of gradients were sent to the device."""
    buckets = optimizer._buckets or () if isinstance(optimizer, OwLore) else ()
    prepared = [bucket.ready.step._prepared for bucket in buckets if bucket.ready is not None]
    return sum(one.addresses.written for one in prepared if one is not None)


def host_time(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    device: str,
    gradients: str,
    repeats: int,
    longest: int = 512,
) -> dict[str, float]:
    """Median time for which step() keeps the calling thread, in milliseconds, and tables sent."""
    samples, tables = [], []
    lengths = random.Random(0)
    for k in range(repeats):
        if gradients == "new":
            move_gradients(optimizer)
        elif gradients != "kept":
            tokens = longest if gradients == "loop" else lengths.randint(longest // 8, longest)
            train(model, optimizer, tokens, 1e-4 * (1 - k / 10_000))
        if device == "cuda":
            if gradients in ("kept", "new"):
                torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        before = tables_written(optimizer)
        began = time.perf_counter()
        optimizer.step()
        samples.append((time.perf_counter() - began) * 1e3)
        tables.append(tables_written(optimizer) > before)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            # As where a loop reads its loss: no step waits for room in the queue of launches.
            torch.cuda.synchronize()
    # The first ones fill caches.
    timed = slice(repeats // 4, None)
    return {"host_ms": statistics.median(samples[timed]), "tables": sum(tables[timed])}


def count_launches(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, gradients: str
) -> dict[str, int]:
    """Kernels, and copies and fills of memory, in one step on the GPU."""
    if gradients == "new":
        move_gradients(optimizer)
    elif gradients != "kept":
        train(model, optimizer, 512, 2e-4)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    on_device = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in on_device)
    return {"launches": len(on_device) - copies, "copies": copies}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--small", action="store_true", help="tiny blocks, to try the script")
    parser.add_argument("--repeats", type=int, default=40, help="steps whose host time is taken")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = [common.machine(args.device)]
    common.show(rows[0])
    model = build(args.device, args.small)
    ids = torch.randint(0, 512, (1, 16), device=args.device)
    ranks = [min(rank, 64) if args.small else rank for rank in args.ranks]
    providers = [("owlore", rank, path) for path in ("projected", "dense") for rank in ranks]
    for dense in (False, True):
        for provider, rank, path in [*providers, ("adamw-fused", 0, "dense")]:
            optimizer = build_optimizer(model, provider, rank, path, dense)
            # The first steps compute bases and compile; the later ones find everything in place.
            for _ in range(3):
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
            timing = common.measure([optimizer.step], args.device, repeats=20, graph=False)
            for gradients in ("kept", "new", "loop", "ragged loop"):
                longest = 64 if args.small else 512
                host = host_time(model, optimizer, args.device, gradients, args.repeats, longest)
                on_gpu = args.device == "cuda"
                counts = count_launches(model, optimizer, gradients) if on_gpu else {}
                rows.append(
                    {
                        "bench": "step", "case": CASE + ("-and-dense" if dense else ""),
                        "provider": provider, "rank": rank, "path": path, "gradients": gradients,
                        "ms": timing.ms, **host, **counts,
                    }
                )  # fmt: skip
                common.show(rows[-1])
            if isinstance(optimizer, OwLore):
                optimizer.detach()
            del optimizer
            model.zero_grad(set_to_none=True)
            # Whoever ends it early has what was measured.
            common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
