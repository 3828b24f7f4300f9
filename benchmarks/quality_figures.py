"""The quality table and chart of the README, from rows of benchmarks/quality.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quality_stats

__all__ = ["chart", "chosen", "table"]

Row = dict[str, Any]
NAMES = {
    "full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA", "galore": "GaLore", "lisa": "LISA",
    "ows": "OWS, full rank", "owlore-published": "OwLore as published", "owlore": "OwLore",
    "uniform": "uniform, low rank",
}  # fmt: skip


def chosen(rows: Sequence[Row], task: str) -> list[Row]:
    """Summaries of the runs on the test split that were named before it, the best first."""
    named = [row for row in rows if row.get("chosen")]
    return quality_stats.summarise(named, task, "test")


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[object]]]:
    """Head and cells of the table: commonsense accuracy, and the loss of GSM8K where there is one.

    Raises:
        ValueError: There is no row of a chosen variant.
    """
    found = chosen(rows, "commonsense")
    if not found:
        raise ValueError("quality: no rows of chosen variants on the test split")
    losses = {entry["method"]: entry for entry in chosen(rows, "gsm8k")}
    head = [
        "method", "lr", "accuracy, %", "against full fine-tuning, 95%", "GSM8K loss",
        "gradients and state, MiB", "peak, GiB", "s", "seeds",
    ]  # fmt: skip
    cells: list[list[object]] = []
    for entry in found:
        name = NAMES.get(entry["method"], entry["method"])
        if entry["variant"] != "default":
            name = f"{name} ({entry['variant']})"
        loss = losses.get(entry["method"])
        deviation = "" if entry["deviation"] is None else f" ± {entry['deviation']:.2f}"
        cells.append(
            [
                name, f"{entry['lr']:g}", f"{entry['mean']:.2f}{deviation}",
                quality_stats.interval(entry["against"], "commonsense"),
                "" if loss is None else f"{loss['mean']:.4f}", f"{entry['state_mib']:.0f}",
                f"{entry['peak_gib']:.2f}",
                "" if entry["seconds"] is None else f"{entry['seconds']:.0f}", entry["seeds"],
            ]
        )  # fmt: skip
    return head, cells


def chart(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against peak memory; bars are the 95% interval of the mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    ax = figure.subplots()
    for entry in chosen(rows, "commonsense"):
        half = 0.0
        if entry["seeds"] > 1:
            half = quality_stats.t_quantile(entry["seeds"] - 1) * entry["deviation"]
            half /= entry["seeds"] ** 0.5
        colour = "#0072b2" if entry["method"] == "owlore" else "#6a6a6a"
        ax.errorbar(entry["peak_gib"], entry["mean"], yerr=half, fmt="o", color=colour, capsize=3)
        ax.annotate(
            NAMES.get(entry["method"], entry["method"]), (entry["peak_gib"], entry["mean"]),
            xytext=(6, 4), textcoords="offset points", fontsize=9, color=colour,
        )  # fmt: skip
    ax.set_xlabel("peak memory, GiB (SmolLM2-135M, batch 32, H100)")
    ax.set_ylabel("accuracy, mean of four tasks, %")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
