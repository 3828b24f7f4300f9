"""The quality tables and the chart of the README, from rows of benchmarks/quality.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import quality_embeddings
import quality_stats
from quality_embeddings import PLANS

__all__ = [
    "chart", "commonsense_table", "shown", "tasks_table",
]  # fmt: skip

Row = dict[str, Any]
NAMES = {
    "full": "full fine-tuning", "lora": "LoRA r 16", "dora": "DoRA r 16", "galore": "GaLore",
    "lisa": "LISA, 5 blocks", "ows": "OWS, 5 blocks, full rank",
    "owlore-published": "OwLore as published, 5 blocks", "owlore": "OwLore",
    "uniform": "drawn evenly, 5 blocks, rank 128",
}  # fmt: skip
FROZEN = "embeddings=freeze,head=freeze"
VARIANTS = {
    "default": "5 blocks", "blocks=all": "all blocks",
    f"blocks=all,{FROZEN}": "all blocks, frozen embedding",
    f"blocks=all,{FROZEN},norms=freeze": "the defaults",
    f"blocks=all,{FROZEN},rank=32": "all, frozen embedding, rank 32", FROZEN: "frozen embedding",
    "dense_lr=lr/3": "embedding at lr / 3",
    "blocks=all,dense_lr=lr/3": "all blocks, embedding at lr / 3",
    "implementation=galore-torch": "galore-torch",
}  # fmt: skip
TASKS = {
    "commonsense": "commonsense, %", "gsm8k": "GSM8K, loss", "wikitext2": "WikiText-2, loss",
    "shakespeare": "Shakespeare, loss",
}  # fmt: skip
SETTINGS = {
    "full": "trained", "frozen": "frozen", "third": "trained at lr / 3", "": "as chosen",
}  # fmt: skip
DEFAULTS = ("owlore", f"blocks=all,{FROZEN},norms=freeze")
# Shown beside what validation chose and what got a rate of its own: the defaults and what explains
# them.
BESIDE = [(*DEFAULTS, 3e-4), ("owlore", "default", 3e-4),
          ("owlore", f"blocks=all,{FROZEN},rank=32", 3e-4)]  # fmt: skip


def summaries(rows: Sequence[Row], task: str) -> list[Row]:
    """Summaries of the test split, by the fresh seeds where a variant ran with them."""
    return quality_stats.summarise(rows, task, "test", fresh=PLANS[task].test)


def shown(rows: Sequence[Row], task: str) -> list[Row]:
    """Summaries of what validation chose and of what stands beside it, the best first.

    Raises:
        ValueError: There is no row of a chosen variant.
    """
    every = summaries(rows, task)
    named = [entry for entry in every if entry["chosen"] or entry["tuned"]]
    found = [
        entry
        for entry in every
        if entry in named or (entry["method"], entry["variant"], entry["lr"]) in BESIDE
    ]
    if not any(entry["chosen"] for entry in found):
        raise ValueError("quality: no rows of chosen variants on the test split")
    return found


def name_of(entry: Row) -> str:
    """Method and variant in words."""
    name, variant = NAMES.get(entry["method"], entry["method"]), entry["variant"]
    if not variant or (variant == "default" and entry["method"] != "owlore"):
        return name
    return f"{name}, {VARIANTS.get(variant, variant)}"


def commonsense_table(rows: Sequence[Row]) -> tuple[list[str], list[list[object]]]:
    """Head and cells of the table of commonsense accuracy."""
    head = [
        "method", "chosen", "lr", "against full fine-tuning, 95%", "accuracy, %", "seeds",
        "gradients and state, MiB", "of full's", "peak over weights, GiB",
    ]  # fmt: skip
    cells: list[list[object]] = []
    # Accuracies of other seeds compare less well than differences within them.
    for entry in sorted(shown(rows, "commonsense"), key=lambda e: -over(e)):
        added, share = entry["added_gib"], entry["state_share"]
        cells.append(
            [
                name_of(entry), "yes" if entry["chosen"] else "", f"{entry['lr']:g}",
                quality_stats.interval(entry["against"], "commonsense"),
                f"{entry['mean']:.2f}{deviation(entry, 2)}", entry["seed_range"],
                f"{entry['state_mib']:,.0f}", "" if share is None else f"{100 * share:.0f}%",
                "" if added is None else f"{added:.2f}",
            ]
        )  # fmt: skip
    return head, cells


def tasks_table(rows: Sequence[Row]) -> tuple[list[str], list[list[object]]]:
    """Head and cells of the table of all tasks.

    A cell is the mean over the test seeds at the setting's own rate, and the difference to full
    fine-tuning with all weights trained; what validation chose for a method stands in bold. Of
    methods whose settings were not all tested there is one line, of what was chosen.
    """
    entries = {task: summaries(rows, task) for task in TASKS}
    lines: list[tuple[str, str, dict[str, Row]]] = []

    def line(name: str, setting: str, wanted: Callable[[str, Row], bool]) -> None:
        found = {
            task: next((entry for entry in entries[task] if wanted(task, entry)), None)
            for task in TASKS
        }
        kept = {task: entry for task, entry in found.items() if entry is not None}
        if kept:
            lines.append((name, SETTINGS[setting], kept))

    for method in ("full", "galore", "owlore"):
        for setting, variant in quality_embeddings.SETTINGS[method].items():
            line(
                name_of({"method": method, "variant": ""}), setting,
                lambda _, e, key=(method, variant): (e["method"], e["variant"]) == key
                and (e["tuned"] or e["chosen"]),
            )  # fmt: skip
    for lr in (3e-4, 1e-3):
        line(
            f"OwLore's defaults at {lr:g}", "frozen",
            lambda _, e, key=(*DEFAULTS, lr): (e["method"], e["variant"], e["lr"]) == key,
        )  # fmt: skip
    for method in ("lora", "dora", "lisa", "ows", "owlore-published", "uniform"):
        line(
            name_of({"method": method, "variant": ""}), "",
            lambda _, e, key=method: e["method"] == key and e["chosen"],
        )  # fmt: skip
    cells: list[list[object]] = []
    for name, setting, by_task in lines:
        cells.append([name, setting])
        for task in TASKS:
            text = ""
            if task in by_task:
                entry = by_task[task]
                text = f"{entry['mean']:.{2 if task == 'commonsense' else 4}f}"
                text = f"**{text}**" if entry["chosen"] else text
                text = f"{text} {quality_stats.interval(entry['against'], task)}".rstrip()
            cells[-1].append(text)
    return ["method", "embedding and head", *TASKS.values()], cells


def over(entry: Row) -> float:
    """Difference to full fine-tuning; minus infinity where too few seeds are there for one."""
    if entry["reference"]:
        return 0.0
    return entry["against"][0] if entry["against"] else -math.inf


def deviation(entry: Row, digits: int) -> str:
    """The standard deviation over seeds as text, empty with one seed."""
    return "" if entry["deviation"] is None else f" ± {entry['deviation']:.{digits}f}"


def chart(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over full fine-tuning's against peak memory and training state, with intervals."""
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch

    entries = sorted(shown(rows, "commonsense"), key=lambda entry: -over(entry))
    entries = [entry for entry in entries if math.isfinite(over(entry))]
    figure = Figure(figsize=(11, 5.6), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(
        1, 3, sharey=True, gridspec_kw={"width_ratios": (3, 2.2, 3)}
    )
    for entry in entries:
        mean, low, high = entry["against"] or (0.0, 0.0, 0.0)
        entry["over"] = mean
        entry["colour"] = "#0072b2" if entry["method"] == "owlore" else "#5a5a5a"
        entry["places"] = [(left, entry["added_gib"]), (right, entry["state_mib"])]
        fill = entry["colour"] if entry["chosen"] else "white"
        for ax, x in entry["places"]:
            if x is not None:
                ax.errorbar(
                    x, mean, yerr=[[mean - low], [high - mean]], fmt="o", color=entry["colour"],
                    capsize=3, markerfacecolor=fill, zorder=3,
                )  # fmt: skip
    low, high = left.get_ylim()
    heights = [high - (high - low) * (i + 0.5) / len(entries) for i in range(len(entries))]
    for entry, y in zip(entries, heights, strict=True):
        middle.text(
            0.5, y, name_of(entry), ha="center", va="center", fontsize=8, color=entry["colour"]
        )
        for (ax, x), end in zip(entry["places"], (0.0, 1.0), strict=True):
            if x is not None:
                figure.add_artist(
                    ConnectionPatch(
                        (end, y), (x, entry["over"]), "data", "data", axesA=middle, axesB=ax,
                        color="#d4d4d4", linewidth=0.7, zorder=0,
                    )
                )  # fmt: skip
    middle.set_xlim(0, 1)
    middle.set_axis_off()
    left.set_xlabel("peak memory over weights and batches, GiB")
    left.set_ylabel("accuracy over full fine-tuning's with the same seeds, points")
    right.set_xscale("log")
    right.set_xticks([100, 300, 1000], ["100", "300", "1,000"])
    right.set_xlabel("gradients, moments and bases, MiB")
    for ax in (left, right):
        # The lines to the labels lie below the axes.
        ax.patch.set_visible(False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "SmolLM2-135M on commonsense; filled: chosen before the test (no peak of the defaults)",
        fontsize=10,
    )
    figure.savefig(path, metadata={"Software": None})
