"""Chart and table of the README from the committed results.

    python benchmarks/figures.py

Reads benchmarks/results/h100/*.json; writes benchmarks/results/h100/lowrank_adam.svg and prints the
table in Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "h100"


def load(name: str) -> list[dict[str, Any]]:
    """Rows of one results file, without the machine line."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    return [row for row in json.loads(path.read_text()) if row["bench"] == name]


def table(rows: list[dict[str, Any]], case: str) -> str:
    """Milliseconds and share of the floor of one case, a line for each provider and setting."""
    lines = [
        "| provider | rank | gradient | rounding | ms | of the floor |",
        "| --- |" + " --- |" * 5,
    ]
    for row in rows:
        if row["case"] == case:
            texts = (row["provider"], row["rank"], row["path"], row["rounding"])
            cells = [*map(str, texts), f"{row['ms']:.3f}", f"{row['fraction']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chart(rows: list[dict[str, Any]], case: str, rank: int, path: Path) -> None:
    """Bars of one case at one rank: the dense path, rounding to nearest, every provider."""
    from matplotlib.figure import Figure

    chosen = [
        row
        for row in rows
        if row["case"] == case and row["rank"] == rank and row["path"] == "dense"
        and row["rounding"] == "nearest"
    ]  # fmt: skip
    if not chosen:
        return
    chosen.sort(key=lambda row: -row["ms"])
    figure = Figure(figsize=(7, 0.5 * len(chosen) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([row["provider"] for row in chosen], [row["ms"] for row in chosen])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(chosen[0]["floor_ms"], color="black", linestyle=":", label="memory floor")
    axes.set_xlabel(f"ms per step, {case}, rank {rank}, H100")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Writes the chart and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="llama2-7b-5-blocks")
    parser.add_argument("--rank", type=int, default=128)
    args = parser.parse_args()
    rows = load("lowrank_adam")
    print(table(rows, args.case))
    chart(rows, args.case, args.rank, RESULTS / "lowrank_adam.svg")


if __name__ == "__main__":
    main()
