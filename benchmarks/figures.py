"""Charts and tables of the README from the committed results.

    python benchmarks/figures.py

Reads benchmarks/results/*/*.json, writes docs/figures/*.png and the tables between the markers in
README.md and docs/distributed.md. `--check` writes nothing and fails if a table is not what the
results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A script's folder is off the path where PYTHONSAFEPATH is set, as make does.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import quality_figures

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
FIGURES = ROOT / "docs" / "figures"
BLUE, GREY = "#0072b2", "#9a9a9a"
Row = dict[str, Any]


def load(name: str, machine: str = "h100") -> list[Row]:
    """Rows of one results file, without its machine lines."""
    path = RESULTS / machine / f"{name}.json"
    return [row for row in json.loads(path.read_text()) if row["bench"] != "machine"]


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def step_table() -> str:
    """The low-rank step of one LLaMA-2-7B block, and of five."""
    order = ["owlore", "galore-torch", "apollo-torch", "adamw-fused", "torch.compile", "reference"]
    rows = [
        row
        for row in load("lowrank_adam")
        if row["case"] in ("llama2-7b-block", "llama2-7b-5-blocks") and row["rank"] in (128, 256)
    ]
    rows.sort(key=lambda r: (r["case"] != "llama2-7b-block", r["rank"], r["path"] != "dense",
                             order.index(r["provider"]), r["rounding"]))  # fmt: skip
    names = {"adamw-fused": "torch AdamW, fused, full rank", "reference": "PyTorch, eager",
             "torch.compile": "PyTorch, compiled"}  # fmt: skip
    return markdown(
        ["blocks", "rank", "gradient", "provider", "rounding", "ms", "share of the floor"],
        [
            (
                "5" if "5-blocks" in row["case"] else "1",
                row["rank"],
                "formed" if row["path"] == "dense" else "given in the basis",
                names.get(row["provider"], row["provider"]),
                row["rounding"],
                f"{row['ms']:.2f}",
                f"{row['fraction']:.2f}",
            )
            for row in rows
        ],
    )


TRAINERS = {
    "owlore": "owlore",
    "owlore-dense": "owlore, gradient formed",
    "peft-lora": "LoRA r 16 (PEFT)",
    "galore-torch": "GaLore (galore-torch)",
    "adamw-fused": "full fine-tuning (AdamW)",
    "lisa": "LISA (preset)",
    "embed-head-only": "embedding and head alone",
}

LAYERS = 32  # of LLaMA-2-7B


def training_rows() -> list[Row]:
    """The rows of LLaMA-2-7B with the default sides and eager blocks."""
    return [
        row
        for row in load("train")
        if row["model"] == "llama2-7b" and row["side"] in (None, "std") and not row["compile"]
    ]


def trained_blocks(row: Row) -> str:
    """Which blocks of a training row train."""
    trains = f"{row['blocks']} blocks" if row["blocks"] else "none"
    chosen = row.get("chosen")
    if row.get("draws"):
        trains += f" as drawn (the lowest is block {row['lowest']:g} on average)"
    elif chosen and chosen[-1] - chosen[0] == len(chosen) - 1:
        trains = f"top {trains}"
    elif chosen and chosen[0] > 0:
        trains += f", the lowest of them block {chosen[0]}"
    elif chosen:
        trains += ", the worst draw (block 0 is one)"
    if row.get("norms") == "freeze":
        trains += ", norms frozen"
    if row["backward_through"]:
        trains += ", backward through all"
    return trains


def training_table() -> str:
    """Whole training steps of LLaMA-2-7B: peak memory and tokens per second."""
    rows = training_rows()
    rows.sort(
        key=lambda r: (
            r["tokens"], not r["checkpointing"], r["embeddings"] == "freeze", -r["blocks"],
            list(TRAINERS).index(r["provider"]), r["moments"],
        )
    )  # fmt: skip
    cells = []
    for row in rows:
        trains = trained_blocks(row)
        planned, refresh = row["planned_gib"], row["refresh_ms"]
        rate = f"{row['tokens_per_s']:,.0f}"
        if row.get("tokens_per_s_with_svd"):
            rate += f" ({row['tokens_per_s_with_svd']:,.0f} with SVDs)"
        if row["refresh_every"]:
            what = "refresh" if row["blocks"] == LAYERS else "draw"
            trains += f", a {what} every {row['refresh_every']} steps"
        cells.append(
            (
                row["tokens"].replace("x", " x "),
                "yes" if row["checkpointing"] else "no",
                TRAINERS[row["provider"]],
                trains,
                row["embeddings"],
                row["moments"],
                f"{row['peak_gib']:.2f}",
                f"{planned:.2f}" if planned else "",
                rate,
                f"{row['step_ms']:.0f}",
                f"{row['optimizer_ms']:.1f}",
                f"{refresh:.0f}" if refresh else "",
            )
        )
    head = ["tokens", "checkpointing", "method", "blocks that train", "embedding and head",
            "moments", "peak GiB", "planned", "tokens/s", "step ms", "of it optimizer",
            "a refresh"]  # fmt: skip
    return markdown(head, cells)


def lora_table() -> str:
    """Ours with embedding and head frozen beside LoRA, nothing compiled and blocks compiled."""
    rows = [row for row in training_rows() if row["embeddings"] == "freeze"]
    compiled = []
    if (RESULTS / "h100" / "train_compiled.json").is_file():
        compiled = [row for row in load("train_compiled") if row["embeddings"] == "freeze"]

    def key(row: Row, provider: str) -> tuple[object, ...]:
        return row["tokens"], row["checkpointing"], provider

    def what(row: Row) -> tuple[object, ...]:
        return *key(row, "owlore"), trained_blocks(row)

    lora = {key(row, row["provider"]): row for row in rows if row["provider"] == "peft-lora"}
    fast_lora = {key(row, row["provider"]): row for row in compiled}
    fast = {what(row): row for row in compiled if row["provider"] == "owlore"}
    cells = []
    for row in rows:
        other = lora.get(key(row, "peft-lora"))
        if row["provider"] != "owlore" or row["backward_through"] or other is None:
            continue
        if row["blocks"] not in (5, LAYERS):
            continue
        cell = [
            row["tokens"].replace("x", " x "),
            "yes" if row["checkpointing"] else "no",
            trained_blocks(row),
            f"{row['peak_gib'] / other['peak_gib']:.2f}",
            f"{row['tokens_per_s']:,.0f} / {other['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / other['tokens_per_s']:.2f}",
        ]
        own, other = fast.get(what(row)), fast_lora.get(key(row, "peft-lora"))
        cell += ["", ""]
        if own and other:
            cell[-2:] = [
                f"{own['tokens_per_s']:,.0f} / {other['tokens_per_s']:,.0f}",
                f"{own['tokens_per_s'] / other['tokens_per_s']:.2f}",
            ]
        cells.append(cell)
    cells.sort(key=lambda cell: (cell[0], cell[1] == "no", -int(cell[2].split()[0]), cell[2]))
    head = ["tokens", "checkpointing", "blocks that train", "of LoRA's peak",
            "tokens/s, owlore / LoRA", "times LoRA", "blocks compiled: owlore / LoRA",
            "times LoRA"]  # fmt: skip
    shown = len(head) if compiled else len(head) - 2
    return markdown(head[:shown], [cell[:shown] for cell in cells])


def methods_table() -> str:
    """All methods on several models, 8 x 512 tokens; empty as long as there are no results."""
    if not (RESULTS / "h100" / "train_methods.json").is_file():
        return ""
    rows = [row for row in load("train_methods") if row["tokens"] == "8x512"]
    models = {"llama2-7b": "LLaMA-2-7B", "llama3-8b": "LLaMA-3-8B", "qwen3-4b": "Qwen3-4B"}
    models = {key: name for key, name in models.items() if any(r["model"] == key for r in rows)}
    order = ["owlore", "lisa", "peft-lora", "galore-torch", "adamw-fused", "embed-head-only"]
    rows.sort(key=lambda r: (r["embeddings"] != "freeze", order.index(r["provider"]), -r["blocks"]))
    lora = {row["model"]: row for row in rows if row["provider"] == "peft-lora"}
    found: dict[tuple[str, str], dict[str, tuple[Row, float]]] = {}
    for row in rows:
        name, rate = TRAINERS[row["provider"]], row["tokens_per_s"]
        if row["provider"] == "owlore":
            few = row["refresh_every"] == 50
            name += f", {row['blocks']} blocks, drawn" if few else ", all blocks, new bases"
            name += f" every {row['refresh_every']} steps"
        elif row["provider"] == "lisa":
            name += f", {row['blocks']} blocks"
        if row["moments"] != "bf16":
            name += f", {row['moments']} moments"
        rest = "frozen" if row["embeddings"] == "freeze" else "trained"
        rates = {name: rate}
        if row.get("tokens_per_s_with_svd"):
            rates = {f"{name} with its SVDs": row["tokens_per_s_with_svd"],
                     f"{name}, SVDs left out": rate}  # fmt: skip
        for each, value in rates.items():
            found.setdefault((each, rest), {})[row["model"]] = row, value
    cells = []
    for names, by_model in found.items():
        cell = [*names]
        for model in models:
            cell += ["", ""]
            if model in by_model:
                row, rate = by_model[model]
                cell[-2:] = [f"{row['peak_gib']:.2f}", f"{rate:,.0f}"]
                if model in lora:
                    cell[-1] += f" ({rate / lora[model]['tokens_per_s']:.2f})"
        cells.append(cell)
    head = ["method", "embedding and head"]
    for name in models.values():
        head += [f"{name}: peak GiB", "tokens/s (times LoRA's)"]
    return markdown(head, cells)


def training_chart(path: Path) -> None:
    """Tokens per second over peak memory, 16 sequences of 512 tokens, checkpointing."""
    from matplotlib.figure import Figure

    rows = [
        row
        for row in training_rows()
        if row["tokens"] == "16x512" and row["checkpointing"] and not row["backward_through"]
        and not (row.get("chosen") and row["chosen"][0] > 0) and row.get("norms") != "freeze"
    ]  # fmt: skip
    figure = Figure(figsize=(9, 4.6), dpi=130, layout="constrained")
    ax = figure.subplots()
    for row in rows:
        own = row["provider"].startswith("owlore")
        label = TRAINERS[row["provider"]]
        if own:
            trains = trained_blocks(row).split(" (")[0]
            rest = "frozen" if row["embeddings"] == "freeze" else row["embeddings"]
            label += f", {trains}, embedding and head {rest}"
            label += f", {row['moments']} moments"
        ax.scatter(row["peak_gib"], row["tokens_per_s"], color=BLUE if own else GREY, zorder=3)
        row["label"] = label
    # Labels stand to the right of the points in rows of their own, joined by a thin line.
    rows.sort(key=lambda row: -row["tokens_per_s"])
    low, high = ax.get_ylim()
    places = [high - (high - low) * (i + 0.5) / len(rows) for i in range(len(rows))]
    right = max(row["peak_gib"] for row in rows) * 1.06
    line = {"arrowstyle": "-", "color": "#d0d0d0", "lw": 0.6, "relpos": (0, 0.5)}
    for row, y in zip(rows, places, strict=True):
        ax.annotate(
            row["label"], (row["peak_gib"], row["tokens_per_s"]), xytext=(right, y), fontsize=8,
            va="center", arrowprops=line,
        )  # fmt: skip
    ax.set_xlim(right=right * 1.85)
    ax.set_xticks([tick for tick in ax.get_xticks() if ax.get_xlim()[0] < tick < right])
    ax.set_xlabel("peak memory, GiB (H100, LLaMA-2-7B shape, bf16, 16 x 512 tokens, checkpointing)")
    ax.set_ylabel("tokens per second")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def outlier_table() -> str:
    """The outlier statistics: counts of a block, squared norms, the calibration pass."""
    names = {"owlore": "owlore", "torch": "PyTorch, eager", "torch.compile": "PyTorch, compiled"}
    cells: list[tuple[str, str, str, str]] = []
    for row in load("outliers"):
        ms = f"{row['ms']:.3f}"
        if row["bench"] == "calibration":
            share = f"{row['ms'] / row['forward_ms']:.3f} x the plain forward"
            memory = f"{share}, {row['extra_mib']:.0f} MiB more"
            cells.append(("calibration, 16 x 2048 tokens", "owlore", f"{row['ms']:.0f}", memory))
        elif row["provider"] in names and row.get("thresholds", 8) == 8:
            if row["bench"] == "outlier_count":
                what, share = "mean and 8 counts of a block", row["floor_ms"] / row["ms"]
                share_text = f"{share:.2f} of two reads at copy bandwidth"
            else:
                what = f"squared norms of {row['case'].replace('x', ' x ')}"
                share_text = f"{row['fraction']:.2f} of the copy bandwidth"
            cells.append((what, names[row["provider"]], ms, share_text))
    return markdown(["LLaMA-2-7B shapes, bf16", "provider", "ms", ""], cells)


def step_chart(path: Path) -> None:
    """Bars of the step of five blocks at rank 128: gradients formed, rounding to nearest."""
    from matplotlib.figure import Figure

    chosen = [
        row
        for row in load("lowrank_adam")
        if row["case"] == "llama2-7b-5-blocks"
        and (row["rank"], row["path"], row["rounding"]) == (128, "dense", "nearest")
    ]
    chosen.sort(key=lambda row: -row["ms"])
    figure = Figure(figsize=(8, 0.5 * len(chosen) + 1.3), dpi=130, layout="constrained")
    ax = figure.subplots()
    colours = [BLUE if row["provider"] == "owlore" else GREY for row in chosen]
    bars = ax.barh([r["provider"] for r in chosen], [r["ms"] for r in chosen], color=colours)
    ax.bar_label(bars, fmt="%.2f", padding=3)
    floor = chosen[0]["floor_ms"]
    ax.axvline(floor, color="black", linestyle=":", label=f"memory floor, {floor:.2f} ms")
    ax.set_xlabel("ms for the step of 5 LLaMA-2-7B blocks (35 matrices), rank 128, H100")
    ax.legend(frameon=False, loc="upper right")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def outlier_chart(path: Path) -> None:
    """Bars of the counts of a block and of the squared norms, each with its floor."""
    from matplotlib.figure import Figure

    rows = [row for row in load("outliers") if row.get("thresholds", 8) == 8]
    panels = {
        "mean and 8 counts, LLaMA-2-7B block": [r for r in rows if r["bench"] == "outlier_count"],
        "squared norms, 8192 x 4096": [r for r in rows if r.get("case") == "8192x4096"],
        "squared norms, 8192 x 11008": [r for r in rows if r.get("case") == "8192x11008"],
    }
    figure = Figure(figsize=(9, 2.8), dpi=130, layout="constrained")
    for ax, (title, found) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        shown = sorted((r for r in found if "mask" not in r["provider"]), key=lambda r: -r["ms"])
        colours = [BLUE if row["provider"] == "owlore" else GREY for row in shown]
        bars = ax.barh([r["provider"] for r in shown], [r["ms"] for r in shown], color=colours)
        ax.bar_label(bars, fmt="%.3g", padding=3)
        own = next(row for row in shown if row["provider"] == "owlore")
        floor = own.get("floor_ms", own["ms"] * own.get("fraction", 1))
        ax.axvline(floor, color="black", linestyle=":", label="copy-bandwidth floor")
        ax.set_xlim(right=1.25 * shown[0]["ms"])
        ax.set_xlabel("ms, H100, bf16")
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


SCALE_RUNS = ("scale_first", "scale_second", "scale_third", "scale_fourth")
SHARING = {"one": "one GPU alone", "ddp": "DDP", "fsdp2": "FSDP2"}
PATHS = {
    "projected": "owlore", "dense": "owlore, gradient formed", "full": "AdamW",
    "norms": "AdamW on norms alone",
}  # fmt: skip


def scale_table() -> str:
    """Training on several GPUs, each case in the last run that has it; empty without results."""
    alone: dict[tuple, Row] = {}
    shared: dict[tuple, Row] = {}

    def group(row: Row) -> tuple:
        return row["path"], row["blocks"], row["tokens"], bool(row.get("compile"))

    for run, name in enumerate(SCALE_RUNS, 1):
        if not (RESULTS / "h200x2" / f"{name}.json").is_file():
            continue
        for row in load(name, "h200x2"):
            if row["strategy"] == "one":
                alone[run, group(row)] = row | {"run": run}
            elif row["strategy"] in SHARING:
                key = (group(row), row["strategy"], bool(row.get("prefetch")))
                peak = row["peak_gib"] or shared.get(key, {}).get("peak_gib")
                shared[key] = row | {"run": run, "peak_gib": peak}
    # An efficiency stands below the GPU that it was divided by, which is of the same run.
    bases = {(row["run"], group(row)) for row in shared.values()}
    rows = [*(row for key, row in alone.items() if key in bases), *shared.values()]
    if not rows:
        return ""
    rows.sort(key=lambda r: (list(PATHS).index(r["path"]), r["tokens"], bool(r.get("compile")),
                             -r["blocks"], r["run"], list(SHARING).index(r["strategy"]),
                             bool(r.get("prefetch"))))  # fmt: skip
    head = ["method", "tokens a GPU", "blocks that train", "on", "run", "rounds",
            "peak GiB of a GPU", "tokens/s", "efficiency", "all-reduced MiB a step",
            "by plain DDP"]  # fmt: skip
    cells = []
    for row in rows:
        one = row["strategy"] == "one"
        spread = (
            f" ({row['efficiency_low']:.3f} to {row['efficiency_high']:.3f})"
            if row.get("rounds", 1) > 1
            else ""
        )
        sums, dense = row["allreduce_mib_per_step"], row["dense_allreduce_mib_per_step"]
        cells.append(
            (
                PATHS[row["path"]] + (", compiled" if row.get("compile") else ""),
                row["tokens"].replace("x", " x "),
                row["blocks"],
                SHARING[row["strategy"]]
                + (", prefetching" if row.get("prefetch") else "")
                + ("" if one else f", {row['gpus']} GPUs"),
                row["run"],
                row.get("rounds", ""),
                f"{row['peak_gib']:.2f}" if row["peak_gib"] else "",
                f"{row['tokens_per_s'] / (row['gpus'] if one else 1):,.0f}",
                "" if one else f"{row['efficiency']:.3f}{spread}",
                "" if one else f"{sums:,.0f}",
                "" if one or dense is None else f"{dense:,.0f}",
            )
        )
    return markdown(head, cells)


def quality_rows() -> list[Row]:
    """The runs of benchmarks/quality.py."""
    return [row for row in load("quality", "h200x4") if row["bench"] == "quality"]


def filled(readme: str, tables: dict[str, str]) -> str:
    """A page with each table between its markers."""
    for name, table in tables.items():
        start, end = f"<!-- {name}: make figures -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), flags=re.DOTALL)
        assert pattern.search(readme), f"no page has a place for {name}"
        inside = f"\n{table}\n" if table else "\n"
        readme = pattern.sub(f"{start}{inside}{end}", readme)
    return readme


def main() -> int:
    """Writes charts and tables, or checks the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare the tables")
    args = parser.parse_args()
    tables = {
        "README.md": {
            "train": training_table(), "lora": lora_table(), "methods": methods_table(),
            "step": step_table(), "outliers": outlier_table(),
            "quality": markdown(*quality_figures.commonsense_table(quality_rows())),
            "tasks": markdown(*quality_figures.tasks_table(quality_rows())),
        },
        "docs/distributed.md": {"scale": scale_table()},
    }  # fmt: skip
    before = {name: (ROOT / name).read_text(encoding="utf-8") for name in tables}
    after = {name: filled(text, tables[name]) for name, text in before.items()}
    if args.check:
        for name in tables:
            if after[name] != before[name]:
                print(f"{name} does not show the committed results: run make figures")
        return int(after != before)
    FIGURES.mkdir(parents=True, exist_ok=True)
    training_chart(FIGURES / "train.png")
    step_chart(FIGURES / "step.png")
    outlier_chart(FIGURES / "outliers.png")
    quality_figures.chart(quality_rows(), FIGURES / "quality.png")
    for name, text in after.items():
        (ROOT / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
