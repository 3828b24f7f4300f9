"""The low-rank AdamW step over a block's matrices, beside PyTorch, its peers and full AdamW.

    python benchmarks/bench_lowrank_adam.py --json benchmarks/results/h100/lowrank_adam.json
    python benchmarks/bench_lowrank_adam.py --cases smollm2-135m-block --ranks 16 --device cpu

floor_ms is the larger of bytes / copy bandwidth and operations / GEMM rate, both measured in the
same run; fraction is floor_ms / ms. Bytes: G (or R), W and the moments, each read once, W and the
moments written once, and the bases read once. Rows of other providers carry the same floor.
Sides are `std`. No subspace is computed in the timed steps: galore-torch is given its bases, and
apollo-torch, which scales whole gradients by norms in a random subspace, has made its own before.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch

from owlore import ops, projection, reference

HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "scale": 0.25, "seed": 11}
LISTS = ("params", "grads", "bases", "exp_avgs", "exp_avg_sqs", "steps", "sides", "streams")
# Providers beside owlore run on these cases, ranks and path only.
RIVALS = {"llama2-7b-block", "llama2-7b-5-blocks"}


def shapes(case: str) -> list[tuple[int, int]]:
    """Matrices of "<model>-block" or "<model>-<k>-blocks"."""
    model, _, tail = case.removesuffix("s").removesuffix("-block").rpartition("-")
    if tail.isdigit():
        return common.BLOCKS[model] * int(tail)
    return common.BLOCKS[f"{model}-{tail}" if model else tail]


def problem(case: str, r: int, path: str, device: str) -> dict[str, Any]:
    """Arguments of `lowrank_adam_` without the hyper-parameters. Random, never zero."""
    data: dict[str, Any] = {name: [] for name in LISTS}
    for i, (m, n) in enumerate(shapes(case)):
        side = projection.choose_side(m, n, "std")
        k = min(r, m, n)
        moment = (k, n) if side == "left" else (m, k)
        P = torch.randn(m if side == "left" else n, k, device=device)
        W = torch.randn(m, n, device=device) * 0.02
        G = torch.randn(moment if path == "projected" else (m, n), device=device)
        data["params"].append(W.bfloat16())
        data["grads"].append(G if path == "projected" else G.bfloat16())
        data["bases"].append((P / P.shape[0] ** 0.5).bfloat16())
        data["exp_avgs"].append(torch.randn(moment, device=device) * 0.1)
        data["exp_avg_sqs"].append(torch.rand(moment, device=device) * 0.1)
        data["steps"].append(torch.tensor(7.0, device=device))
        data["sides"].append(side)
        data["streams"].append(1000 + i)
    data["lr"] = torch.tensor(1e-4, dtype=torch.float64, device=device)
    data["nonfinite"] = torch.zeros(len(data["params"]), dtype=torch.int32, device=device)
    data["rng_step"] = torch.tensor(5, device=device)
    return data


def floor_ms(data: dict[str, Any], path: str, bandwidth: float, rate: float) -> float:
    """Milliseconds that the bytes or the operations need at least."""
    moved = 2 * common.bytes_moved(*data["params"], *data["exp_avgs"], *data["exp_avg_sqs"])
    moved += common.bytes_moved(*data["grads"], *data["bases"])
    products = 1 if path == "projected" else 2
    work = sum(
        products * 2 * W.numel() * P.shape[1]
        for W, P in zip(data["params"], data["bases"], strict=True)
    )
    return max(moved / bandwidth, work / rate) * 1e3


def check(data: dict[str, Any], options: dict[str, Any]) -> None:
    """Holds one step of a block on copies to float64: at most twice the reference's own error."""
    count = min(len(data["params"]), 7)
    block = {k: (v[:count] if k in LISTS else v) for k, v in data.items()}
    block["nonfinite"] = data["nonfinite"][:count]
    names = ("params", "grads", "bases", "exp_avgs", "exp_avg_sqs")
    results = []
    for step, dtype in (
        (reference.lowrank_adam_, torch.float64),
        (reference.lowrank_adam_, None),
        (ops.lowrank_adam_, None),
    ):
        tensors = {name: [x.to(dtype or x.dtype, copy=True) for x in block[name]] for name in names}
        step(**{**block, **tensors}, **options)
        results.append([tensors[name] for name in ("params", *names[3:])])
    for kind, slack in enumerate((0.0, 4e-6, 4e-6)):
        # Sums over thousands of products in the tensor cores lose some of float32's last digits.
        for i, (want, near, got) in enumerate(zip(*(r[kind] for r in results), strict=True)):
            error = float((got.double() - want).norm() / want.norm())
            bound = 2 * float((near.double() - want).norm() / want.norm()) + slack
            if not error <= bound:
                raise SystemExit(f"matrix {i}: error {error:.2e} against float64, not {bound:.2e}")


def galore(data: dict[str, Any], r: int) -> Callable[[], Any]:
    """A step of galore-torch's AdamW with the bases given."""
    package_of("galore_torch")
    from galore_torch.adamw import AdamW
    from galore_torch.galore_projector import GaLoreProjector

    waiting = iter(
        [
            P if s == "left" else P.T.contiguous()
            for P, s in zip(data["bases"], data["sides"], strict=True)
        ]
    )
    GaLoreProjector.get_orthogonal_matrix = lambda *_, **__: next(waiting)
    params = [torch.nn.Parameter(W.clone()) for W in data["params"]]
    for param, G in zip(params, data["grads"], strict=True):
        param.grad = G
    group = {
        "params": params,
        "rank": r,
        "update_proj_gap": 10**9,
        "scale": 0.25,
        "proj_type": "std",
    }
    optimizer = AdamW([group], lr=1e-4, weight_decay=0.01, no_deprecation_warning=True)
    return optimizer.step


def package_of(name: str) -> None:
    """Makes an installed package importable without running its __init__.

    Those of galore-torch and apollo-torch import bitsandbytes for optimizers not used here.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{name} is not installed")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules.setdefault(name, package)


def apollo(data: dict[str, Any], r: int) -> Callable[[], Any]:
    """A step of apollo-torch's AdamW in a random subspace."""
    package_of("apollo_torch")
    from apollo_torch.apollo import AdamW

    params = [torch.nn.Parameter(W.clone()) for W in data["params"]]
    for param, G in zip(params, data["grads"], strict=True):
        param.grad = G
    group = {
        "params": params,
        "rank": r,
        "update_proj_gap": 10**9,
        "scale": 1.0,
        "proj": "random",
        "proj_type": "std",
        "scale_type": "channel",
    }
    return AdamW([group], lr=1e-4, weight_decay=0.01).step


def adamw_fused(data: dict[str, Any]) -> Callable[[], Any]:
    """A step of torch's fused AdamW on the whole matrices."""
    params = [torch.nn.Parameter(W.clone()) for W in data["params"]]
    for param, G in zip(params, data["grads"], strict=True):
        param.grad = G
    return torch.optim.AdamW(params, lr=1e-4, fused=params[0].is_cuda).step


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--cases", nargs="+", default=[*(f"{m}-block" for m in common.BLOCKS), "llama2-7b-5-blocks"]
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument(
        "--rivals",
        nargs="*",
        default=["reference", "torch.compile", "galore-torch", "apollo-torch", "adamw-fused"],
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = [common.machine(args.device)]
    bandwidth, rate = common.copy_bandwidth(args.device), common.gemm_rate(args.device)
    rows[0] |= {"copy_TB_s": bandwidth / 1e12, "gemm_TFLOP_s": rate / 1e12}
    common.show(rows[0])

    def row(case: str, provider: str, r: int, path: str, rounding: str, call, floor: float) -> None:
        timing = common.measure([call], args.device, repeats=args.repeats, graph=False)
        rows.append(
            {
                "bench": "lowrank_adam", "case": case, "provider": provider, "rank": r,
                "path": path, "rounding": rounding, "ms": timing.ms, "p20": timing.p20,
                "p80": timing.p80, "floor_ms": floor, "fraction": floor / timing.ms,
            }
        )  # fmt: skip
        common.show(rows[-1])

    for case in args.cases:
        for r in args.ranks:
            for path in ("dense", "projected"):
                data = problem(case, r, path, args.device)
                floor = floor_ms(data, path, bandwidth, rate)
                for rounding in ("nearest", "stochastic"):
                    options: dict[str, Any] = {
                        **HYPER, "stochastic": rounding == "stochastic",
                        "projected": path == "projected",
                    }  # fmt: skip
                    check(data, options)
                    row(
                        case,
                        "owlore",
                        r,
                        path,
                        rounding,
                        prepared(data, options),
                        floor,
                    )
                if case not in RIVALS or path == "projected" or r not in (128, 256):
                    continue
                options["stochastic"] = False
                calls = {
                    "reference": lambda d=data, o=options: (
                        lambda: reference.lowrank_adam_(**d, **o)
                    ),
                    "torch.compile": lambda d=data, o=options: compiled(d, o),
                    "galore-torch": lambda d=data, k=r: galore(d, k),
                    "apollo-torch": lambda d=data, k=r: apollo(d, k),
                    "adamw-fused": lambda d=data: adamw_fused(d),
                }
                for provider in args.rivals:
                    if provider == "torch.compile" and case != "llama2-7b-block":
                        continue
                    try:
                        call = calls[provider]()
                        row(case, provider, r, path, "nearest", call, floor)
                    except Exception as error:  # a rival that fails is a row less
                        print(f"{provider}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                    call = None
    common.write_rows(args.json, rows)


def prepared(data: dict[str, Any], options: dict[str, Any]) -> Callable[[], Any]:
    """The step as `OwLore.step()` makes it."""
    given = {**data, **options}
    hyper = {name: given.pop(name) for name in HYPER if name != "seed"}
    grads = given.pop("grads")
    step = ops.prepare_lowrank_adam(**given)
    return lambda: step(grads, **hyper)


def compiled(data: dict[str, Any], options: dict[str, Any]) -> Callable[[], Any]:
    """The reference through torch.compile."""
    step = torch.compile(reference.lowrank_adam_, dynamic=False)
    return lambda: step(**data, **options)


if __name__ == "__main__":
    main()
