"""New bases from gradients: time for each matrix in a batch, and the energy they capture.

    python benchmarks/bench_refresh.py --json benchmarks/results/h100/refresh.json
    python benchmarks/bench_refresh.py --gradients gradients.pt

energy_ratio is ||P^T G||^2 / ||P_svd^T G||^2 against the exact SVD, on the first matrix of the
batch. Spectra: singular values i^-0.5; a Gaussian matrix, whose flat spectrum has no subspace to
find; real gradients of SmolLM2 from --gradients, a torch file {name: matrix}. No call waits for the
device: the runs are made with torch.cuda.set_sync_debug_mode("error").
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch
from torch import Tensor

from owlore import projection


def matrix(m: int, n: int, spectrum: str, device: str) -> Tensor:
    """A gradient with singular values i^-0.5, or a Gaussian one. bfloat16."""
    G = torch.randn(m, n, device=device)
    if spectrum == "power-0.5":
        U, _, V = torch.linalg.svd(G, full_matrices=False)
        G = (U * torch.arange(1, len(V) + 1, device=device) ** -0.5) @ V
    return G.bfloat16()


def captured(G: Tensor, P: Tensor, side: str) -> float:
    """||P^T G||^2 or ||G P||^2 in float64, with the rounding of P to bfloat16 made orthonormal."""
    G, P = G.double(), torch.linalg.qr(P.double())[0]
    return float((P.mT @ G if side == "left" else G @ P).square().sum())


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008", "11008x4096"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[128, 256])
    # In one LLaMA block 4 matrices are square and 3 of 4096 x 11008 either way; in five, 20 and 15.
    parser.add_argument("--batches", nargs="+", type=int, default=[5, 15])
    parser.add_argument("--gradients")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = [common.machine(args.device)]
    common.show(rows[0])
    cases = []
    for shape in args.shapes:
        m, n = map(int, shape.split("x"))
        for spectrum in ("power-0.5", "gaussian"):
            G = matrix(m, n, spectrum, args.device)
            cases.append((shape, spectrum, G))
    if args.gradients:
        for name, G in torch.load(args.gradients, weights_only=True).items():
            shape = f"{G.shape[0]}x{G.shape[1]} {name}"
            cases.append((shape, "smollm2", G.to(args.device)))
    for case, spectrum, G in cases:
        grads = [G.clone() for _ in range(max(args.batches))]
        side = projection.choose_side(*G.shape, "std")
        exact = torch.linalg.svdvals(G.double())
        for rank in args.ranks:
            r = min(rank, *G.shape)

            for batch in args.batches:

                def refresh(grads=grads[:batch], r=r, side=side):
                    count = len(grads)
                    return projection.refresh_bases(
                        grads, [r] * count, [side] * count, [None] * count, list(range(count)),
                        method="subspace", power_iterations=2, oversampling=8,
                    )  # fmt: skip

                bases, energies, _ = refresh()
                energy = captured(G, bases[0], side)
                ratio = energy / float(exact[:r].square().sum())
                total = float(G.double().square().sum())
                if abs(float(energies[0]) - energy / total) > 0.01:
                    raise SystemExit(f"{case}: energy {energy / total}, not {float(energies[0])}")
                if args.device == "cuda":
                    torch.cuda.set_sync_debug_mode("error")
                    refresh()
                    torch.cuda.set_sync_debug_mode("default")
                timing = common.measure([refresh], args.device, repeats=8, graph=False)
                rows.append(
                    {
                        "bench": "refresh", "case": case, "provider": "owlore", "rank": r,
                        "ms_per_matrix": timing.ms / batch, "energy_ratio": ratio,
                        "spectrum": spectrum, "batch": batch,
                    }
                )  # fmt: skip
                common.show(rows[-1])
        if spectrum == "power-0.5" and args.device == "cuda":
            svd = common.measure(
                [lambda G=G: torch.linalg.svd(G.float(), full_matrices=False)],
                args.device, repeats=2, graph=False,
            )  # fmt: skip
            rows.append(
                {
                    "bench": "refresh", "case": case, "provider": "torch.linalg.svd", "rank": 0,
                    "ms_per_matrix": svd.ms, "energy_ratio": 1.0, "spectrum": spectrum, "batch": 1,
                }
            )  # fmt: skip
            common.show(rows[-1])
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
