"""Dense AdamW of an embedding: bfloat16 with stochastic rounding beside torch's fused AdamW.

    python benchmarks/bench_adamw.py --json benchmarks/results/h100/adamw.json

One parameter in bfloat16. floor_ms is bytes / copy bandwidth, both of the same run: G read once,
weight and moments read and written once; torch keeps its moments in the weight's dtype too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch

from owlore import ops, reference

HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def problem(m: int, n: int, moments: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of `adamw_` without the hyper-parameters. Random, never zero."""
    W = torch.randn(m, n, device=device) * 0.02
    return {
        "params": [W.bfloat16()],
        "grads": [torch.randn(m, n, device=device).bfloat16()],
        "exp_avgs": [(torch.randn(m, n, device=device) * 0.1).to(moments)],
        "exp_avg_sqs": [(torch.rand(m, n, device=device) * 0.1).to(moments)],
        "steps": [torch.tensor(7.0, device=device)],
        "lr": torch.tensor(1e-4, dtype=torch.float64, device=device),
        "nonfinite": torch.zeros(1, dtype=torch.int32, device=device),
        "rng_step": torch.tensor(5, device=device),
    }


def check(data: dict[str, Any], options: dict[str, Any]) -> None:
    """Holds one step on copies to the reference: the same bits but for values on the edge."""
    results = []
    for step in (reference.adamw_, ops.adamw_):
        copies = {
            name: [x.clone() for x in data[name]] for name in ("params", "exp_avgs", "exp_avg_sqs")
        }
        step(**{**data, **copies}, **HYPER, **options)
        results.append(copies)
    for name, want in results[0].items():
        for x, y in zip(results[1][name], want, strict=True):
            near = torch.isclose(x.float(), y.float(), rtol=2e-6, atol=1e-7)
            if not float((~near).float().mean()) < 2e-3:
                raise SystemExit(f"{name}: differs from the reference")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="32000x4096")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = [common.machine(args.device)]
    bandwidth = common.copy_bandwidth(args.device)
    rows[0] |= {"copy_TB_s": bandwidth / 1e12}
    common.show(rows[0])
    m, n = map(int, args.shape.split("x"))

    def row(provider: str, moments: torch.dtype, rounding: str, call: Any, moved: int) -> None:
        timing = common.measure([call], args.device, repeats=30, graph=False)
        floor = moved / bandwidth * 1e3
        rows.append(
            {
                "bench": "adamw", "case": args.shape, "provider": provider,
                "moments": str(moments).removeprefix("torch."), "rounding": rounding,
                "ms": timing.ms, "p20": timing.p20, "p80": timing.p80, "floor_ms": floor,
                "fraction": floor / timing.ms,
            }
        )  # fmt: skip
        common.show(rows[-1])

    for moments in (torch.bfloat16, torch.float32):
        data = problem(m, n, moments, args.device)
        moved = common.bytes_moved(*data["grads"])
        for name in ("params", "exp_avgs", "exp_avg_sqs"):
            moved += 2 * common.bytes_moved(*data[name])
        for rounding in ("nearest", "stochastic"):
            options = {"stochastic": rounding == "stochastic", "seed": 11, "streams": [1000]}
            check(data, options)
            given = {**data, **options}
            grads = given.pop("grads")
            step = ops.prepare_adamw(**given)
            row("owlore", moments, rounding, lambda s=step, g=grads: s(g, **HYPER), moved)
        if moments == torch.bfloat16:
            param = torch.nn.Parameter(data["params"][0].clone())
            param.grad = data["grads"][0]
            optimizer = torch.optim.AdamW([param], lr=1e-4, fused=param.is_cuda)
            row("torch fused", moments, "nearest", optimizer.step, moved)
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
