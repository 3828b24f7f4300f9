"""`OwLore.step()` on five LLaMA-2-7B blocks: time on the device and on the host.

    python benchmarks/bench_step.py --json benchmarks/results/h100/step.json

host_ms is how long step() keeps the calling thread, without waiting for the device; ms is the
device's time for steps in a row. Embedding, head and norms are frozen: the 35 matrices alone. The
steps run under torch.cuda.set_sync_debug_mode("error").
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch

from owlore import OwLore


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


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--small", action="store_true", help="tiny blocks, to try the script")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = [common.machine(args.device)]
    common.show(rows[0])
    model = build(args.device, args.small)
    ids = torch.randint(0, 512, (1, 16), device=args.device)
    providers = [("owlore", r, path) for path in ("projected", "dense") for r in args.ranks]
    for provider, rank, path in [*providers, ("adamw-fused", 0, "dense")]:
        if provider == "owlore":
            optimizer = OwLore(
                model, lr=1e-4, blocks="all", rank=min(rank, 64) if args.small else rank,
                distribution="uniform", embeddings="freeze", head="freeze", norms="freeze",
                refresh_interval=10**6, gradient=path,
            )  # fmt: skip
        else:
            params = [p for n, p in model.named_parameters() if "proj" in n]
            for param in params:
                param.requires_grad_(True)
            optimizer = torch.optim.AdamW(params, lr=1e-4, fused=args.device == "cuda")
        # The first step computes bases and compiles; the later ones find everything in place.
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        host = []
        for _ in range(20):
            began = time.perf_counter()
            optimizer.step()
            host.append((time.perf_counter() - began) * 1e3)
            if args.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
        if args.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        timing = common.measure([optimizer.step], args.device, repeats=20, graph=False)
        rows.append(
            {
                "bench": "step", "case": "llama2-7b-5-blocks", "provider": provider, "rank": rank,
                "path": path,
                "ms": timing.ms, "host_ms": statistics.median(host),
            }
        )  # fmt: skip
        common.show(rows[-1])
        if provider == "owlore":
            optimizer.detach()
        del optimizer
        model.zero_grad(set_to_none=True)
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
