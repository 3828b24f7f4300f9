"""New bases from gradients or sketches: time for each matrix in a batch, and the energy they hold.

    python benchmarks/bench_refresh.py --json benchmarks/results/h100/refresh.json
    python benchmarks/bench_refresh.py --gradients gradients.pt

energy_ratio is ||P^T G||^2 / ||P_svd^T G||^2 against the exact SVD, on the first matrix of the
batch. Path "sketch": the basis comes from G Omega with 2 r columns, as in a training step that
forms no gradients; making the sketch is not in the time. workspace_mib is the peak of allocated
memory over what was there before, the new bases among it. Spectra: singular values i^-0.5; a
Gaussian matrix, whose flat spectrum has no subspace to find; real gradients of SmolLM2 from
--gradients, a torch file {name: matrix}. Cases like "llama2-7b-5-blocks" are all matrices of so
many blocks at once, as a draw finds them: sides by shape, power-0.5. No call waits for the device:
the runs are made with torch.cuda.set_sync_debug_mode("error"). host_ms is how long the host takes
to start a call; a batch of few matrices is bound by it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch
from torch import Tensor

from owlore import projection


def matrix(m: int, n: int, spectrum: str, device: str) -> Tensor:
    """A gradient with singular values i^-0.5, or a Gaussian one. bfloat16."""
    if spectrum == "gaussian":
        return torch.randn(m, n, device=device).bfloat16()
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(d, k, device=device))[0] for d in (m, n))
    return ((U * torch.arange(1, k + 1, device=device) ** -0.5) @ V.mT).bfloat16()


def energies_of(G: Tensor) -> Tensor:
    """Squares of the singular values in float64, the largest first."""
    G = G.double() if G.shape[0] <= G.shape[1] else G.mT.double()
    return torch.linalg.eigvalsh(G @ G.mT).flip(0)


def captured(G: Tensor, P: Tensor, side: str) -> float:
    """||P^T G||^2 or ||G P||^2 in float64, with the rounding of P to bfloat16 made orthonormal."""
    G, P = G.double(), torch.linalg.qr(P.double())[0]
    return float((P.mT @ G if side == "left" else G @ P).square().sum())


def sketch(G: Tensor, columns: int, side: str) -> Tensor:
    """G Omega (left) or Omega^T G (right) for a random Omega."""
    Omega = torch.randn(G.shape[side == "left"], columns, dtype=G.dtype, device=G.device)
    return G @ Omega if side == "left" else Omega.mT @ G


def measured(
    sources: list[Tensor], G: Tensor, r: int, sides: list[str], exact: Tensor
) -> dict[str, Any]:
    """What one batch of refreshes takes, after a check of the energy that the first claims to hold.

    Args:
        sources: Gradients, or sketches of them; the first is G or a sketch of it.
        G: The first one's gradient.
        r: Rank.
        sides: Side of each.
        exact: Squares of G's singular values.
    """
    batch, device = len(sources), sources[0].device.type

    def refresh() -> tuple[list[Tensor], Tensor, Tensor]:
        return projection.refresh_bases(
            sources, [r] * batch, sides, [None] * batch, list(range(batch)), method="subspace",
            power_iterations=2, oversampling=8,
        )  # fmt: skip

    bases, energies, _ = refresh()
    share = captured(sources[0], bases[0], sides[0]) / float(sources[0].double().square().sum())
    if abs(float(energies[0]) - share) > 0.01:
        raise SystemExit(f"energy {share}, not {float(energies[0])}")
    row = {"energy_ratio": captured(G, bases[0], sides[0]) / float(exact[:r].sum())}
    del bases, energies
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        began = time.perf_counter()
        refresh()
        row["host_ms"] = (time.perf_counter() - began) * 1e3
        torch.cuda.set_sync_debug_mode("default")
        row["workspace_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    timing = common.measure([refresh], device, repeats=8, graph=False)
    return {"ms_per_matrix": timing.ms / batch, **row, "batch": batch}


def drawn(case: str, G: Tensor) -> list[Tensor]:
    """The gradients of "<model>-<k>-blocks", the first one like G; power-0.5."""
    model, count = case.removesuffix("-blocks").rsplit("-", 1)
    known = {tuple(G.shape): G}
    grads = []
    for m, n in common.BLOCKS[model] * int(count):
        if (m, n) not in known:
            known[m, n] = matrix(m, n, "power-0.5", G.device.type)
        grads.append(known[m, n].clone())
    # The order of the matrices is of no account; the first is looked at.
    return sorted(grads, key=lambda X: X.shape != G.shape)


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, Tensor]]:
    """Shape, spectrum and gradient of each case."""
    for spectrum in ("power-0.5", "gaussian"):
        for shape in args.shapes:
            m, n = map(int, shape.split("x"))
            yield shape, spectrum, matrix(m, n, spectrum, args.device)
    if args.gradients:
        for name, G in torch.load(args.gradients, weights_only=True).items():
            yield f"{G.shape[0]}x{G.shape[1]} {name}", "smollm2", G.to(args.device)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", default=["4096x11008", "11008x4096", "4096x4096"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[128, 256])
    # In one LLaMA block 4 matrices are square and 3 of 4096 x 11008 either way; in five, 20 and 15.
    parser.add_argument("--batches", nargs="+", type=int, default=[5, 15])
    parser.add_argument("--draws", nargs="*", default=["llama2-7b-5-blocks"])
    parser.add_argument("--no-svd", action="store_true", help="do not time an exact SVD")
    parser.add_argument("--gradients")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = [common.machine(args.device)]
    common.show(rows[0])
    first: Tensor | None = None
    for case, spectrum, G in cases(args):
        side = projection.choose_side(*G.shape, "std")
        exact = energies_of(G)
        for draw in args.draws if first is None else ():
            grads = drawn(draw, G)
            sides = [projection.choose_side(*X.shape, "std") for X in grads]
            for r in args.ranks:
                rows.append(
                    {
                        "bench": "refresh", "case": draw, "provider": "owlore", "rank": r,
                        "path": "gradient", "spectrum": spectrum,
                        **measured(grads, G, r, sides, exact),
                    }
                )  # fmt: skip
                common.show(rows[-1])
            del grads
        first = G if first is None else first
        for rank in args.ranks:
            r = min(rank, *G.shape)
            paths = {"gradient": G}
            if 2 * r < min(G.shape):
                paths["sketch"] = sketch(G, 2 * r, side)
            for path, source in paths.items():
                for batch in args.batches:
                    sources = [source.clone() for _ in range(batch)]
                    row = measured(sources, G, r, [side] * batch, exact)
                    del sources
                    rows.append(
                        {
                            "bench": "refresh", "case": case, "provider": "owlore", "rank": r,
                            "path": path, "spectrum": spectrum, **row,
                        }
                    )  # fmt: skip
                    common.show(rows[-1])
    if args.device == "cuda" and first is not None and not args.no_svd:
        svd = common.measure(
            [lambda: torch.linalg.svd(first.float(), full_matrices=False)],
            args.device, repeats=2, graph=False,
        )  # fmt: skip
        rows.append(
            {
                "bench": "refresh", "case": args.shapes[0], "provider": "torch.linalg.svd",
                "rank": 0, "path": "gradient", "spectrum": "power-0.5", "ms_per_matrix": svd.ms,
                "energy_ratio": 1.0, "batch": 1,
            }
        )  # fmt: skip
        common.show(rows[-1])
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
