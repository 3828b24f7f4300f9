"""What the way of finding a basis does to the held-out loss, on a model small enough for a CPU.

    python benchmarks/refresh_loss.py --json benchmarks/results/cpu/refresh_loss.json

The real optimizer trains stories260K (tests/data) on the texts of data/gsm8k, 16 x 128 tokens a
step, rank 8; the loss is that of held-out texts, nats per token. Scopes: all five blocks with a
refresh every `--refresh` steps, and two of five drawn every `--refresh` steps. Ways, paired by
seed: `exact` (from the gradient of the step, which then also updates), sketches of r, 2r and 4r
columns (the step of the sketch updates nothing), and two for scale: a random basis, and exact bases
never refreshed. benchmarks/quality.py's table `refresh` is the same on SmolLM2 and a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import common
import quality_data
import quality_stats
import quality_train
import stories260k
import torch
from quality_data import Tokens

from owlore import OwLore

ROOT = Path(__file__).resolve().parents[1]
WAYS: dict[str, dict[str, Any]] = {
    "exact": {"refresh": "exact", "basis": "svd"},
    "sketch 1r": {"sketch_columns": 1},
    "sketch 2r": {"sketch_columns": 2},
    "sketch 4r": {"sketch_columns": 4},
    "random": {"gradient": "dense", "basis": "random"},
    "exact, never refreshed": {"refresh": "exact", "basis": "svd", "refresh_interval": 10**6},
}


def rows_of(part: str, tokenizer: stories260k.Tokenizer, length: int, count: int) -> list[Tokens]:
    """Texts of GSM8K behind one another, cut into rows of one length."""
    ids: list[int] = []
    for question in quality_data.read_gsm8k(ROOT / "data", part):
        if len(ids) >= length * count:
            break
        ids += tokenizer.encode(f"{question.question} {question.choices[0]}")
    # The first token of a row has nothing before it.
    return [Tokens(tuple(ids[i : i + length]), 1) for i in range(0, len(ids) - length + 1, length)]


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--refresh", type=int, default=40)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--json")
    args = parser.parse_args()
    scopes = {
        "all": {"blocks": "all", "interval": 10**6, "refresh_interval": args.refresh},
        "sampled": {"blocks": 2, "interval": args.refresh},
    }
    tokenizer = stories260k.Tokenizer()
    train = rows_of("train", tokenizer, 128, 16 * args.steps)
    held_out = rows_of("test", tokenizer, 128, 200)
    rows = [
        common.machine("cpu") | {"setting": {k: v for k, v in vars(args).items() if k != "json"}}
    ]
    losses: dict[tuple[str, str], dict[int, float]] = {}
    for seed in range(args.seeds):
        batches = quality_train.make_batches(train, 16, 128, seed, args.steps)
        for scope, choices in scopes.items():
            for way, options in WAYS.items():
                if scope == "sampled" and way.endswith("never refreshed"):
                    continue
                torch.manual_seed(seed)
                model = stories260k.load_model()
                optimizer = OwLore(
                    model, lr=args.lr, rank=args.rank, distribution="uniform", seed=seed,
                    embeddings="freeze", head="freeze", norms="full", **{**choices, **options},
                )  # fmt: skip
                began = time.perf_counter()
                quality_train.train(model, optimizer, batches, autocast=False, graphs=False)
                optimizer.detach()
                sums, counts = quality_train.log_likelihoods(model, held_out, tokens=8192)
                loss = -sum(sums) / sum(counts)
                losses.setdefault((scope, way), {})[seed] = loss
                rows.append(
                    {
                        "bench": "refresh_loss", "scope": scope, "way": way, "seed": seed,
                        "loss": loss, "seconds": time.perf_counter() - began,
                    }
                )  # fmt: skip
                common.show(rows[-1])
                common.write_rows(args.json, rows)
    for (scope, way), own in losses.items():
        difference = quality_stats.paired(own, losses[scope, "exact"])
        mean = sum(own.values()) / len(own)
        text = "" if difference is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference)
        print(f"{scope:8} {way:24} {mean:.4f} {text}")


if __name__ == "__main__":
    main()
