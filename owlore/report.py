"""What a run leaves behind: pictures, report.html, the model card, and atomic writing of files."""

from __future__ import annotations

import base64
import html
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from owlore import sampling
from owlore.outliers import OutlierScores

__all__ = [
    "ReportError",
    "open_up",
    "plot_loss",
    "plot_scores",
    "plot_visits",
    "read_run",
    "summary",
    "write_atomic",
    "write_card",
    "write_json",
    "write_report",
]

# Okabe and Ito's colours, told apart by colour-blind readers.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8A8A"
PARTS = ("weights", "gradients", "moments", "basis", "host", "activations")


class ReportError(ValueError):
    """A folder holds no run that can be reported on."""


def open_up(path: Path) -> None:
    """Gives a file or a folder's files the permissions that the user's umask asks for."""
    mask = os.umask(0)
    os.umask(mask)
    if path.is_dir():
        path.chmod(0o777 & ~mask)
        for file in path.iterdir():
            open_up(file)
    else:
        path.chmod(0o666 & ~mask)


def write_atomic(path: str | Path, content: bytes) -> None:
    """Writes a file whole or not at all: to a temporary file beside it, then renamed."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        open_up(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON, whole or not at all."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_run(folder: str | Path) -> dict[str, Any]:
    """Reads run.json of a run's folder.

    Raises:
        ReportError: The folder holds no run, or one that has not got to its first results.
    """
    file = Path(folder) / "run.json"
    if not file.is_file():
        raise ReportError(f"{folder} holds no run: there is no {file.name} in it")
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ReportError(f"{file} is damaged: {error}") from error
    if not isinstance(run, dict) or "status" not in run:
        raise ReportError(f"{file} was not written by owlore train")
    if "draws" not in run:
        raise ReportError(f"the run in {folder} has no results yet (status: {run['status']})")
    return run


def _figure(rows: int, height: float, ratios: Sequence[float] = (1.0,)) -> Any:
    """A figure of `rows` panels above each other, without pyplot and so without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=130, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for ax in axes:
        _plain(ax)
    return figure, axes


def _plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=10)


def _save(figure: Any, path: str | Path) -> None:
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _block_ticks(ax: Any, blocks: int, axis: str = "x") -> None:
    step = max(1, round(blocks / 10))
    ticks = list(range(0, blocks, step))
    (ax.set_xticks if axis == "x" else ax.set_yticks)(ticks)


def plot_scores(
    path: str | Path,
    scores: Sequence[float] | None,
    probabilities: Sequence[float] | None,
    threshold: float | None = None,
) -> None:
    """Draws outlier scores and sampling probabilities over the blocks.

    Args:
        path: The PNG to write.
        scores: Outlier score of each block, as a fraction; None leaves the panel out. [L]
        probabilities: Probability of each block; None leaves the panel out. [L]
        threshold: The threshold behind the scores, for the label.
    """
    panels = [values for values in (scores, probabilities) if values is not None]
    blocks = len(panels[0])
    figure, axes = _figure(len(panels), 2.1 * len(panels) + 0.5)
    axes = list(axes)
    index = np.arange(blocks)
    if scores is not None:
        ax = axes.pop(0)
        ax.bar(index, 100 * np.asarray(scores), color=BLUE, width=0.75)
        ax.set_ylabel("outlier score\n(% of entries)", fontsize=11)
        above = "" if threshold is None else f": share of entries above {threshold:g} x the mean"
        ax.set_title(f"Outlier score of each block{above}", fontsize=11, loc="left")
    if probabilities is not None:
        ax = axes.pop(0)
        ax.bar(index, 100 * np.asarray(probabilities), color=ORANGE, width=0.75)
        ax.axhline(100 / blocks, color="black", linewidth=1, linestyle="--", label="uniform")
        ax.set_ylabel("probability (%)", fontsize=11)
        ax.set_title("How likely a block is drawn", fontsize=11, loc="left")
        ax.legend(fontsize=9, frameon=False, loc="upper right", bbox_to_anchor=(1, 1.2))
    ax.set_xlabel("decoder block (0 is next to the embedding)", fontsize=11)
    ax.set_xlim(-0.7, blocks - 0.3)
    _block_ticks(ax, blocks)
    _save(figure, path)


def expected_visits(
    p: np.ndarray, gamma: int, method: str, steps: int, interval: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often a planned run trains each block.

    Args:
        p: Probability of each block. [L]
        gamma: Blocks drawn at a time.
        method: "sequential" or "inclusion".
        steps: Optimizer steps of the run.
        interval: Steps between draws.

    Returns:
        Expected share of the steps in which a block trains, [L], and the probability that it never
        does, [L].
    """
    inclusion = sampling.inclusion_probabilities(p, gamma, method)
    return inclusion, (1 - np.minimum(inclusion, 1)) ** -(-steps // interval)


def _layer_types(layers: dict[str, float]) -> dict[str, float]:
    """Mean outlier share of the layers of one kind, such as q_proj, over all blocks."""
    kinds: dict[str, list[float]] = {}
    for name, share in layers.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(share)
    return {kind: float(np.mean(shares)) for kind, shares in kinds.items()}


def plot_outliers(
    path: str | Path,
    scores: OutlierScores,
    gamma: int,
    method: str,
    steps: int,
    interval: int,
    weight_norms: Sequence[float] | None = None,
) -> list[int]:
    """Draws what a person wants to know of the scores before a run.

    Score of each block, mean share of each kind of layer, probabilities under each distribution,
    and how much a planned run trains each block.

    Args:
        path: The PNG to write.
        scores: The scores.
        gamma: Blocks drawn at a time in the planned run.
        method: "sequential" or "inclusion".
        steps: Optimizer steps of the planned run.
        interval: Steps between its draws.
        weight_norms: Norm of each block's weights; None leaves that distribution out. [L]

    Returns:
        The blocks that the planned run more likely never trains than trains.

    Raises:
        ValueError: gamma blocks cannot be drawn by these scores.
    """
    from matplotlib.figure import Figure

    n = len(scores.scores)
    p = sampling.probabilities("outlier", n, scores.scores)
    share, never = expected_visits(p, gamma, method, steps, interval)
    idle = np.flatnonzero(never > 0.5)
    figure = Figure(figsize=(11, 7), dpi=120, layout="constrained")
    (top, kinds), (bottom, plan) = figure.subplots(2, 2, width_ratios=[3, 2])
    for ax in (top, kinds, bottom, plan):
        _plain(ax)
    index = np.arange(n)

    top.bar(index, 100 * np.asarray(scores.scores), color=BLUE, width=0.75)
    top.set_ylabel("outlier score (% of entries)")
    title = f"Entries above {scores.threshold:g} x the block's mean"
    top.set_title(title, fontsize=11, loc="left")
    by_kind = _layer_types(scores.layers)
    kinds.barh(list(by_kind), [100 * value for value in by_kind.values()], color=BLUE)
    kinds.invert_yaxis()
    kinds.grid(axis="y", visible=False)
    kinds.set_xlabel("% of the layer's entries, mean over blocks")
    kinds.set_title("Which layers hold the outliers", fontsize=11, loc="left")

    styles = {"outlier": (ORANGE, "-", 2.2), "reverse": ("#009e73", "-", 1.4),
              "increase": ("#56b4e9", "--", 1.2), "decrease": ("#cc79a7", "--", 1.2),
              "uniform": ("black", ":", 1.2)}  # fmt: skip
    if weight_norms is not None:
        styles["weight_norm"] = ("#d55e00", ":", 1.4)
    for name, (colour, line, width) in styles.items():
        values = 100 * sampling.probabilities(name, n, scores.scores, weight_norms)
        bottom.plot(index, values, color=colour, linestyle=line, linewidth=width, label=name)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("probability (%)")
    bottom.set_title("How likely a block is drawn, by distribution", fontsize=11, loc="left")
    bottom.legend(fontsize=9, frameon=False, ncols=2, loc="upper center")
    colours = [ORANGE if never[block] <= 0.5 else "#999999" for block in index]
    plan.bar(index, share * steps, color=colours, width=0.75)
    plan.set_ylabel("expected steps of training")
    title = f"A run of {steps} steps, {gamma} blocks drawn every {interval}"
    if len(idle):
        title += "\ngrey: more likely never trained than trained"
    plan.set_title(title, fontsize=11, loc="left")
    for ax in (top, bottom, plan):
        ax.set_xlabel("decoder block (0 is next to the embedding)")
        ax.set_xlim(-0.7, n - 0.3)
        _block_ticks(ax, n)
    _save(figure, path)
    return [int(block) for block in idle]


def active_steps(
    draws: Sequence[Sequence[Any]], steps: int, blocks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Turns draws into a raster.

    Args:
        draws: Pairs of the step of a draw and the blocks drawn.
        steps: Steps that the run made.
        blocks: Number of decoder blocks.

    Returns:
        The raster of booleans [blocks, draws], and the steps at which its columns begin and
        end [draws + 1].
    """
    used = [(step, active) for step, active in draws if step < steps]
    raster = np.zeros((blocks, len(used)), dtype=bool)
    for column, (_, active) in enumerate(used):
        raster[list(active), column] = True
    return raster, np.array([step for step, _ in used] + [steps])


def plot_visits(path: str | Path, draws: Sequence[Sequence[Any]], steps: int, blocks: int) -> None:
    """Draws which blocks were active when, and how long each was in all.

    Args:
        path: The PNG to write.
        draws: Pairs of the step of a draw and the blocks drawn.
        steps: Steps that the run made.
        blocks: Number of decoder blocks.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    raster, edges = active_steps(draws, steps, blocks)
    figure = Figure(figsize=(8, max(2.6, 1.2 + 0.11 * blocks)), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [5, 1]})
    left.pcolormesh(
        edges, np.arange(blocks + 1) - 0.5, raster,
        cmap=ListedColormap(["#f3f3f3", BLUE]), vmin=0, vmax=1,
    )  # fmt: skip
    for block in range(1, blocks):
        left.axhline(block - 0.5, color="white", linewidth=0.8)
    if len(edges) <= 80:
        for edge in edges[1:-1]:
            left.axvline(edge, color="white", linewidth=0.8)
    left.set_title("Blocks that trained (blue), by step", fontsize=11, loc="left")
    left.set_xlabel("optimizer step", fontsize=11)
    left.set_ylabel("decoder block", fontsize=11)
    left.set_xlim(0, steps)
    left.set_ylim(-0.5, blocks - 0.5)
    left.xaxis.get_major_locator().set_params(integer=True)
    _block_ticks(left, blocks, "y")
    left.spines[["top", "right"]].set_visible(False)
    share = (raster * np.diff(edges)).sum(axis=1) / max(1, steps)
    right.barh(np.arange(blocks), 100 * share, color=BLUE, height=0.75)
    _plain(right)
    right.grid(axis="y", visible=False)
    right.grid(axis="x", color="#dddddd", linewidth=0.7)
    right.tick_params(left=False)
    right.set_xlabel("% of steps", fontsize=11)
    right.set_title("in all", fontsize=11, loc="left")
    _save(figure, path)


def plot_loss(
    path: str | Path,
    training: Sequence[dict[str, float]],
    held_out: Sequence[dict[str, float]],
) -> None:
    """Draws the training loss and the held-out loss over the steps.

    Args:
        path: The PNG to write.
        training: Dicts with "step" and "loss".
        held_out: Dicts with "step" and "loss"; may be empty.
    """
    from matplotlib.patheffects import withStroke

    figure, (ax,) = _figure(1, 3.6)
    if training:
        steps = np.array([entry["step"] for entry in training])
        loss = np.array([entry["loss"] for entry in training])
        ax.plot(steps, loss, color=BLUE, alpha=0.35, linewidth=1, label="training, each step")
        window = max(1, len(loss) // 10)
        if window > 1:
            # A mean over the steps so far at both ends keeps the line on the data.
            kernel = np.ones(window)
            weight = np.convolve(np.ones(len(loss)), kernel, "same")
            smooth = np.convolve(loss, kernel, "same") / weight
            label = f"training, mean of {window} steps"
            ax.plot(steps, smooth, color=BLUE, linewidth=2, label=label)
    if held_out:
        x = [entry["step"] for entry in held_out]
        y = [entry["loss"] for entry in held_out]
        ax.plot(x, y, color=RED, marker="o", linewidth=1.5, linestyle="--", label="held out")
        for i in {0, len(x) - 1}:
            side = "left" if i == 0 else "right"
            ax.annotate(
                f"{y[i]:.3f}", (x[i], y[i]), xytext=(6 if i == 0 else -6, 8), ha=side,
                textcoords="offset points", color=RED, fontsize=11, fontweight="bold",
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip
    ax.set_xlabel("optimizer step", fontsize=11)
    ax.set_ylabel("loss (nats per token)", fontsize=11)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=10, frameon=False)
    _save(figure, path)


def _size(count: float | None) -> str:
    if count is None:
        return "not measured"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _spans(run: dict[str, Any]) -> list[tuple[int, int, list[int]]]:
    """First step, last step and blocks of every draw, steps counted from 1."""
    starts = [entry for entry in run["draws"] if entry[0] < run["steps"]]
    ends = [entry[0] for entry in starts[1:]] + [run["steps"]]
    return [(step + 1, end, blocks) for (step, blocks), end in zip(starts, ends, strict=True)]


def _blocks_text(blocks: Sequence[int], total: int) -> str:
    return f"all {total}" if len(blocks) == total else " ".join(map(str, blocks))


def summary(run: dict[str, Any], folder: str | Path, draws: int = 12) -> str:
    """The few lines that `owlore train` prints at its end.

    Args:
        run: The content of run.json.
        folder: The run's folder.
        draws: Draws listed at most.
    """
    loss = run["loss"]
    lines = []
    if loss["before"] is not None and loss["after"] is not None:
        rows = run["data"]["held_out_rows"]
        lines.append(
            f"held-out loss  {loss['before']:.4f} -> {loss['after']:.4f}   ({rows} rows, nats per "
            f"token; perplexity {np.exp(loss['before']):.2f} -> {np.exp(loss['after']):.2f})"
        )
    elif loss["training"]:
        first, last = loss["training"][0]["loss"], loss["training"][-1]["loss"]
        lines.append(f"training loss  {first:.4f} at the first step, {last:.4f} at the last")
    lines.append("blocks active")
    spans = _spans(run)
    for first, last, blocks in spans[:draws]:
        lines.append(f"  steps {first:>5} to {last:>5}: {_blocks_text(blocks, run['blocks'])}")
    if len(spans) > draws:
        lines.append(f"  ... and {len(spans) - draws} draws more: see the report")
    account = run["memory"]["bytes"]
    planned = run["memory"].get("planned") or {"bytes": {}}
    lines.append("memory" + (" (planned for a GPU)" if planned["bytes"] else ""))
    for part in PARTS:
        if part != "host" or account.get(part):
            size, plan = account.get(part), planned["bytes"].get(part)
            lines.append(f"  {part:<12}{_size(size):>12}{_planned(plan)}")
    if run["memory"]["peak_cuda_bytes"]:
        size, plan = run["memory"]["peak_cuda_bytes"], planned.get("peak_cuda_bytes")
        lines.append(f"  GPU peak    {_size(size):>12}{_planned(plan)}")
    total = sum(run["seconds"].values())
    lines.append(
        f"time           {_duration(total)} ({_duration(run['seconds']['training'])} training, "
        f"{run['seconds']['training'] / max(1, run['steps']):.2f} s a step)"
    )
    if run["nonfinite"]:
        lines.append(f"warning        {run['nonfinite']} matrix-steps had non-finite gradients")
    lines += [f"model          {Path(folder) / 'model'}"]
    lines += [f"report         {Path(folder) / 'report.html'}"]
    return "\n".join(lines)


def _planned(size: int | None) -> str:
    return "" if size is None else f"   ({_size(size)})"


def _options_rows(run: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Name, value and whether it differs from the default, for all options."""
    from owlore.config import OwLoreConfig

    defaults = OwLoreConfig().to_dict()
    rows = [
        (name, str(value), name not in defaults or value != defaults[name])
        for name, value in run["config"].items()
        if name != "scores"
    ]
    hidden = {"model", "out", "resume", "keep_checkpoints", "tensorboard", "save_every"}
    rows += [(k, str(v), False) for k, v in run["options"].items() if k not in hidden]
    return rows


def write_card(path: str | Path, run: dict[str, Any]) -> None:
    """Writes the model card of a fine-tuned model.

    Args:
        path: The README.md to write.
        run: The content of run.json; the losses must be there.
    """
    model, loss, config = run["model"], run["loss"], run["config"]
    known = model["license"] != "unknown"
    hub_name = model["name"].count("/") == 1 and not model["name"].startswith((".", "/"))
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"license: {model['license']}"] if known else []
    front += [f"base_model: {model['name']}"] if hub_name else []
    front += ["tags: [owlore, fine-tuned]", "---"]
    rank = "full" if config["rank"] is None else config["rank"]
    blocks = f"all {run['blocks']} blocks"
    if not _trains_all(run):
        blocks = (
            f"{config['blocks']} of {run['blocks']} blocks at a time, redrawn every "
            f"{config['interval']} steps, distribution {config['distribution']}"
        )
    scores = "" if run["scores"] is None else "; outlier scores: see scores.json beside this folder"
    data = Path(run["options"]["data"])
    data_name = f"{data.parent.name}/{data.name}" if data.parent.name else data.name
    lines = [
        *front,
        "",
        f"# {model['name']}, fine-tuned with OwLore",
        "",
        "An ordinary dense checkpoint: `AutoModelForCausalLM.from_pretrained(folder)` loads it, "
        "owlore is not needed.",
        "",
        f"- **Base model**: {model['name']}" + (f". {model['note']}" if model["note"] else ""),
        f"- **Data**: {data_name}, {run['data']['rows']} rows, "
        f"{run['data']['trained_tokens']} tokens in the loss per pass, rows cut to "
        f"{run['options']['max_length']} tokens ({run['data']['truncated_rows']} were longer)",
    ]
    if loss["after"] is not None:
        lines.append(
            f"- **Held-out loss**: {loss['before']:.4f} before, {loss['after']:.4f} after "
            f"(nats per token, {run['data']['held_out_rows']} rows that were not trained on)"
        )
    lines += [
        f"- **Training**: {run['steps']} steps of "
        f"{run['options']['batch_size'] * run['options']['accumulation']} rows, learning rate "
        f"{config['lr']:g} ({run['options']['scheduler']})",
        f"- **Method**: OwLore (arXiv 2405.18380): {blocks}, rank {rank}{scores}",
        f"- **Licence**: the base model's licence is {model['license']}; it and the licence of the "
        "training data also bind this model. Check both before you pass it on.",
        f"- **Made with**: owlore {run['versions']['owlore']}, torch {run['versions']['torch']}, "
        f"transformers {run['versions']['transformers']}",
        "",
        "The loss is all that was measured. What the model says has not been checked for truth or "
        "harm.",
        "",
    ]
    write_atomic(path, "\n".join(lines).encode())


STYLE = """
:root{--ink:#1c2733;--soft:#5b6875;--line:#dfe4ea;--blue:#0072B2}
*{box-sizing:border-box}
body{margin:0;background:#f5f7f9;color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:880px;margin:0 auto;padding:28px 18px 60px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:34px 0 10px}
p{margin:8px 0}.soft{color:var(--soft);font-size:.92rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0}
.card{background:#fff;border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.card b{display:block;font-size:clamp(1.05rem,4.4vw,1.3rem);line-height:1.3;white-space:nowrap}
.card span{color:var(--soft);font-size:.88rem}
.note{background:#fff8e6;border-left:4px solid #E69F00;padding:8px 12px;border-radius:4px}
.fig{overflow-x:auto;background:#fff;border:1px solid var(--line);border-radius:10px;
 padding:6px;margin:10px 0}
.fig img{display:block;width:100%;min-width:560px;height:auto}
.wide{overflow-x:auto;background:#fff;border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.93rem}
td:first-child{white-space:nowrap}
td,th{text-align:left;padding:6px 12px;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}th{color:var(--soft);font-weight:600}
.n{text-align:right;width:1%;white-space:nowrap;font-variant-numeric:tabular-nums}
.bar{background:var(--blue);height:12px;border-radius:3px;min-width:2px}
pre{background:#fff;border:1px solid var(--line);border-radius:10px;padding:12px 14px;
 overflow-x:auto;font-size:.86rem;line-height:1.45}
summary{cursor:pointer;color:var(--blue);margin:8px 0}
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """An HTML table; cells are HTML already."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="n"' if i in numbers else "" for i in range(len(cells))]
        shown = (f"<{tag}{k}>{cell}</{tag}>" for k, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    body = line("th", head) + "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>{body}</table></div>'


def _trains_all(run: dict[str, Any]) -> bool:
    """Whether every block of the run trains in every step."""
    return run["config"]["blocks"] in ("all", run["blocks"])


def _image(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'
    return f'<div class="fig">{image}</div>'


def _page(run: dict[str, Any], folder: Path) -> str:
    e = html.escape
    loss, seconds, config = run["loss"], run["seconds"], run["config"]
    cards = []
    if loss["before"] is not None and loss["after"] is not None:
        change = 100 * (loss["after"] / loss["before"] - 1)
        cards += [
            (f"{loss['before']:.3f} &rarr; {loss['after']:.3f}", f"held-out loss ({change:+.0f}%)"),
            (
                f"{np.exp(loss['before']):.2f} &rarr; {np.exp(loss['after']):.2f}",
                "held-out perplexity",
            ),
        ]
    rank = "full rank" if config["rank"] is None else f"rank {config['rank']}"
    cards += [
        (f"{config['blocks']} of {run['blocks']}", f"blocks at a time, {rank}"),
        (_duration(sum(seconds.values())), f"for everything; {run['steps']} steps"),
    ]
    shown = "".join(f'<div class="card"><b>{a}</b><span>{b}</span></div>' for a, b in cards)
    parts = [
        f"<h1>{e(run['model']['name'])}, fine-tuned with OwLore</h1>",
        f'<p class="soft">{run["data"]["rows"]} rows of {e(run["options"]["data"])}, '
        f"{run['steps']} steps of {run['options']['batch_size'] * run['options']['accumulation']} "
        f"rows; owlore {e(run['versions']['owlore'])}</p>",
        f'<div class="cards">{shown}</div>',
    ]
    if run["status"] != "finished":
        parts.append(
            f'<p class="note">This run is {e(run["status"])}: {run["steps"]} of '
            f"{run['planned_steps']} steps.</p>"
        )
    if run["model"]["note"]:
        parts.append(f'<p class="note">{e(run["model"]["note"])}</p>')
    if run["nonfinite"]:
        parts.append(
            f'<p class="note">{run["nonfinite"]} matrix-steps had non-finite gradients; their '
            "entries were skipped.</p>"
        )
    data = run["data"]
    held = (
        f"Held-out loss: mean over {data['held_out_tokens']} tokens of {data['held_out_rows']} "
        "rows that are not trained on, every token with the same weight. "
        if data["held_out_rows"]
        else ""
    )
    parts += [
        "<h2>Loss</h2>",
        _image(folder / "loss.png", "training and held-out loss over the steps"),
        f'<p class="soft">{held}Of the training rows {data["truncated_rows"]} were cut to '
        f"{run['options']['max_length']} tokens and {data['dropped_rows']} left out because "
        "nothing to train on remained.</p>",
        "<h2>Which blocks trained, and when</h2>",
        _image(folder / "visits.png", "blocks active over the steps"),
        "<details><summary>All draws</summary>",
        _table(
            ("steps", "blocks"),
            [(f"{a} to {b}", _blocks_text(blocks, run["blocks"])) for a, b, blocks in _spans(run)],
        ),
        "</details>",
    ]
    if run["scores"] is not None or not _trains_all(run):
        parts += [
            "<h2>Why these blocks</h2>",
            _image(
                folder / "scores.png", "outlier scores and sampling probabilities of the blocks"
            ),
            f'<p class="soft">Distribution: {e(str(config["distribution"]))}. An outlier score is '
            "the share of entries of a block's weights, each times the norm of its input over the "
            "calibration text, that exceed the threshold times their mean.</p>",
        ]
    parts.append("<h2>Memory</h2>")
    account = run["memory"]["bytes"]
    largest = max([size for size in account.values() if size] or [1])
    planned = (run["memory"].get("planned") or {"bytes": {}})["bytes"]
    rows = [
        (
            part if part != "host" else "in host memory",
            _size(account.get(part)),
            _size(planned[part]) if part in planned else "",
            f'<div class="bar" style="width:{100 * (account.get(part) or 0) / largest:.1f}%">'
            "</div>",
        )
        for part in PARTS
        if part != "host" or account.get(part)
    ]
    parts.append(_table(("part", "measured", "planned for a GPU", ""), rows, numbers=(1, 2)))
    whole = [f"highest resident memory of the process {_size(run['memory']['peak_process_bytes'])}"]
    if run["memory"]["peak_cuda_bytes"]:
        whole.append(f"highest allocated GPU memory {_size(run['memory']['peak_cuda_bytes'])}")
    parts += [
        f'<p class="soft">{e(run["memory"]["how"])}. For comparison: {e(", ".join(whole))} '
        "(Python and libraries included in the former).</p>",
        "<h2>Use the model</h2>",
        "<pre>from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'model = AutoModelForCausalLM.from_pretrained("model")   # the folder beside this page\n'
        'tokenizer = AutoTokenizer.from_pretrained("model")</pre>',
        f'<p class="soft">The base model\'s licence is {e(run["model"]["license"])}; it and the '
        "licence of the training data also bind the fine-tuned model.</p>",
        "<h2>Details</h2>",
        "<details><summary>What trained how</summary>",
        f"<pre>{e(chr(10).join(run['plan']))}</pre></details>",
        "<details><summary>All options (bold: not the default)</summary>",
        _table(
            ("option", "value"),
            [
                (f"<b>{e(k)}</b>", f"<b>{e(v)}</b>") if changed else (e(k), e(v))
                for k, v, changed in _options_rows(run)
            ],
        ),
        "</details>",
        "<details><summary>Time</summary>",
        _table(("phase", "seconds"), [(e(k), f"{v:.1f}") for k, v in seconds.items()], (1,)),
        "</details>",
        "<details><summary>Versions</summary>",
        _table(("", ""), [(e(k), e(v)) for k, v in run["versions"].items()]),
        "</details>",
    ]
    title = e(f"{run['model']['name']}, fine-tuned with OwLore")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def write_report(folder: str | Path) -> Path:
    """Draws the pictures of a run and writes report.html, which holds all of them itself.

    Args:
        folder: The output folder of `owlore train`.

    Returns:
        The path of report.html.

    Raises:
        ReportError: The folder holds no run, or one without results.
    """
    folder = Path(folder)
    run = read_run(folder)
    scores_file = folder / "scores.json"
    threshold = None
    if scores_file.is_file():
        threshold = json.loads(scores_file.read_text()).get("threshold")
    plot_scores(folder / "scores.png", run["scores"], run["probabilities"], threshold)
    plot_visits(folder / "visits.png", run["draws"], run["steps"], run["blocks"])
    plot_loss(folder / "loss.png", run["loss"]["training"], run["loss"]["held_out"])
    write_atomic(folder / "report.html", _page(run, folder).encode())
    return folder / "report.html"
