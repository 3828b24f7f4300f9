"""Training on several GPUs: peak memory of each, tokens per second, bytes that cross the wire.

    torchrun --nproc-per-node 2 benchmarks/bench_scale.py --compile --json scale.json
    torchrun --nproc-per-node 2 benchmarks/bench_scale.py --cases one/32/projected ddp/32/projected
    torchrun --nproc-per-node 2 benchmarks/bench_scale.py --small --device cpu

A step is forward, backward and the optimizer's real step on random tokens; weights are random and
bfloat16, embedding and head are frozen, norms train, gradient checkpointing is non-reentrant. Each
GPU has its own sequences (tokens). Where few blocks train they are spread evenly over the model,
the first among them, so that backward has no short way. Where compile is true each decoder block is
compiled, in every strategy; graphs is how many it took.

strategy is ddp, fsdp2 (fully_shard of each block and of the model; prefetch: with two blocks'
gathering in flight, by set_modules_to_forward_prefetch) or without a wrapper: one on each GPU in
turn, while the others rest; each on all GPUs at once, which share the host.

All strategies of a group stay ready on models of their own, and are timed in rounds: in every
round each of them takes --steps steps that follow one another without waiting for the device, in an
order that changes from round to round, with Python's garbage collector off. The first step of each
is left out, and steps that sketch bases are not among them. tokens_per_s is that of all GPUs
together, the median of the rounds, and step_ms follows from it (step_ms_by_gpu: of each rank).
efficiency is the median over the rounds of the tokens per second of a GPU over those of `one` in
the same round, the mean of the same GPUs; efficiency_low and efficiency_high are the quartiles.
efficiency_beside is over those of `each`. Ranks have their own share of the host's cores, near
their GPU where the system tells.

peak_gib is the largest torch.cuda.max_memory_allocated() of all GPUs over the first steps, the one
that sketches among them, without the models of the other strategies.

allreduce_mib_per_step counts what a rank hands to all-reduce calls, DDP's buckets included;
dense_allreduce_mib_per_step is what plain DDP handed over in a step that formed the gradients of
the same parameters. Gradients that FSDP2 hands to reduce_scatter are counted apart; its gathering
of weights is in neither. exchange_ms is the part of a step on the device in which owlore averages.

path is projected, dense, full (plain AdamW on all blocks, what dense DDP comes to) or norms (plain
AdamW on the norms alone: forward and backward with nothing of owlore's, which tells a wrapper's own
cost).

--profile NAME prints where two steps of a case spend time, on the device and on the host.
A row is written as soon as it is measured. A case that fails on all ranks is reported, and the
others go on; --budget ends the run in time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import io
import itertools
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch
from bench_train import Clock, build, checkpoint_blocks, forget_scratch, model_config
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from owlore import OwLore

MIB, GIB = 2**20, 2**30
NEVER = 10**9
# DDP waits for the device in the first ten steps of a wrapper, to time itself.
WARM = {"ddp": 12}
# Strategies that others are compared with: the same training, on one GPU after another and at once.
ALONE = ("one", "each")
# Plain AdamW, without owlore.
PLAIN = ("full", "norms")
# Seconds that a part of a case may take, at most.
LONGEST = 25


@dataclass(frozen=True)
class Case:
    """One row."""

    strategy: str
    blocks: int
    path: str = "projected"
    rows: int = 1
    compiled: bool = False
    prefetch: bool = False

    @property
    def name(self) -> str:
        """What --cases selects by."""
        parts = [self.strategy, self.blocks, self.path]
        parts += [f"{self.rows}-rows"] if self.rows > 1 else []
        parts += ["compiled"] if self.compiled else []
        parts += ["prefetch"] if self.prefetch else []
        return "/".join(map(str, parts))

    @property
    def group(self) -> Case:
        """The same in all strategies."""
        return replace(self, strategy="", prefetch=False)


@dataclass
class Found:
    """What this rank measured of a case."""

    # Milliseconds of a step in each round.
    times: dict[int, float] = field(default_factory=dict)
    peak: float = 0.0
    sums: float = 0.0
    scattered: float = 0.0
    exchange: float = 0.0
    graphs: int = 0
    seconds: float = 0.0


@dataclass
class Counts:
    """Bytes handed to collectives so far."""

    sums: int = 0
    scattered: int = 0


def cases(blocks: int, compile_too: bool) -> list[list[Case]]:
    """All rows, in groups that are timed beside each other; first those that are missed most."""
    few = max(1, 5 * blocks // 32)
    low, some = Case("", blocks), Case("", few)
    groups = [low, some]
    if compile_too:
        groups += [replace(low, compiled=True), replace(some, compiled=True)]
    groups += [replace(low, rows=4), replace(low, path="norms")]
    if compile_too:
        groups += [replace(low, path="norms", compiled=True)]
    groups += [replace(some, path="dense"), replace(low, path="full")]
    strategies = (*ALONE, "ddp", "fsdp2")
    found = [[replace(group, strategy=s) for s in strategies] for group in groups]
    return [[*group, replace(group[-1], prefetch=True)] for group in found]


def count_bytes() -> Counts:
    """Counts the bytes of gradients that cross from now on."""
    counts = Counts()
    # FSDP2 calls the first of these that torch has.
    names = ("reduce_scatter_single", "reduce_scatter_tensor")
    name = next(name for name in names if hasattr(distributed, name))
    reduce, scatter = distributed.all_reduce, getattr(distributed, name)

    def counted_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts.sums += tensor.nbytes
        return reduce(tensor, *args, **kwargs)

    def counted_scatter(*args: Any, **kwargs: Any) -> Any:
        whole = kwargs["input"] if "input" in kwargs else args[1]
        counts.scattered += whole.nbytes
        return scatter(*args, **kwargs)

    distributed.all_reduce = counted_reduce
    setattr(distributed, name, counted_scatter)
    return counts


def under_ddp(model: nn.Module) -> DistributedDataParallel:
    """The model in a wrapper whose buckets go through `all_reduce` of Python, which is counted."""
    device = next(model.parameters()).device
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # The model's buffers are constants.
        broadcast_buffers=False,
    )

    # DDP wants its own annotations, or none.
    def hook(size, bucket):  # type: ignore[no-untyped-def]
        work = distributed.all_reduce(bucket.buffer().div_(size), async_op=True)
        return work.get_future().then(lambda sums: sums.value()[0])

    wrapped.register_comm_hook(distributed.get_world_size(), hook)
    return wrapped


def shard(model: nn.Module, prefetch: bool) -> nn.Module:
    """fully_shard of each block and of the model."""
    from torch.distributed.fsdp import fully_shard

    blocks = list(model.model.layers)
    for block in blocks:
        fully_shard(block)
    if prefetch:
        for block, following in itertools.pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])
    return fully_shard(model)


def options_of(case: Case, rank: int, count: int) -> dict[str, Any]:
    """Options of OwLore."""
    chosen = {i * count // case.blocks for i in range(case.blocks)}
    weights = [float(i in chosen) for i in range(count)]
    return {
        "blocks": case.blocks,
        "rank": rank,
        "interval": NEVER,
        "refresh_interval": NEVER,
        "distribution": lambda _: weights,
        "gradient": case.path,
        "moments": "bf16",
        "embeddings": "freeze",
        "head": "freeze",
        "norms": "full",
        "lr": 1e-5,
    }


class Training:
    """A model in its strategy, its optimizer and its batches."""

    def __init__(self, case: Case, model: nn.Module, args: argparse.Namespace) -> None:
        self.case, self.model = case, model
        device = next(model.parameters()).device
        if case.compiled:
            for block in model.model.layers:
                block.compile()
        if case.strategy == "fsdp2":
            model = shard(model, case.prefetch)
        if case.path in PLAIN:
            for name, param in model.named_parameters():
                trains = "norm" in name or (case.path == "full" and ".layers." in name)
                param.requires_grad_(trains)
            trained = [p for p in model.parameters() if p.requires_grad]
            self.optimizer: Any = torch.optim.AdamW(
                trained, lr=1e-5, fused=device.type == "cuda" or None
            )
        else:
            options = options_of(case, args.rank, len(model.model.layers))
            self.optimizer = OwLore(model, **options)
        self.wrapped = under_ddp(model) if case.strategy == "ddp" else model
        generator = torch.Generator().manual_seed(1 + distributed.get_rank())
        self.batches = [
            torch.randint(
                0, model.config.vocab_size, (case.rows, args.tokens), generator=generator
            ).to(device)
            for _ in range(2)
        ]

    def step(self, i: int) -> Tensor:
        """One step; returns the loss."""
        ids = self.batches[i % 2]
        loss = self.wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def exchange_ms(self, clock: Clock, count: int) -> float:
        """Milliseconds on the device of owlore's own averages, the median of some steps."""
        exchange = getattr(self.optimizer, "_exchange", None)
        if exchange is None or not exchange.active:
            return 0.0
        settle, marks = exchange.settle, []

        def timed() -> None:
            begin = clock.mark()
            settle()
            marks.append((begin, clock.mark()))

        exchange.settle = timed
        for i in range(count):
            self.step(i)
        exchange.settle = settle
        if clock.cuda:
            torch.cuda.synchronize()
        return statistics.median(clock.between(*pair) for pair in marks)

    def round(self, clock: Clock, steps: int) -> float:
        """Milliseconds of one of so many steps that follow one another."""
        # What it launches keeps the device busy while the first of the others is launched.
        self.step(0)
        begin = clock.mark()
        for i in range(steps):
            self.step(i)
        end = clock.mark()
        if clock.cuda:
            torch.cuda.synchronize()
        return clock.between(begin, end) / steps

    def trained(self) -> list[str]:
        """Names of what owlore trains."""
        if not isinstance(self.optimizer, OwLore):
            return []
        members = self.optimizer._members
        return [m.entry.name for m in members if self.optimizer._is_active(m)]

    def check(self, loss: Tensor) -> None:
        """Something was timed that trains.

        Raises:
            RuntimeError: It does not.
        """
        if not bool(torch.isfinite(loss)):
            raise RuntimeError(f"the loss is {float(loss)}")
        states = list(self.optimizer.state.values())
        keys = {"exp_avg", "basis"} if self.case.path not in PLAIN else {"exp_avg"}
        if not any(keys <= set(state) for state in states):
            raise RuntimeError("no weight has moments")

    def end(self) -> None:
        """Leaves the bare model."""
        if isinstance(self.optimizer, OwLore):
            self.optimizer.detach()
        self.model.requires_grad_(True)
        self.model.zero_grad(set_to_none=True)


def begin(
    case: Case, model: nn.Module, bare: int, args: argparse.Namespace, counts: Counts
) -> tuple[Training, Found]:
    """Gets a case ready on this rank: all of what it measures but times.

    Args:
        case: The case.
        model: Its model, bare.
        bare: Bytes on the device without it.
        args: Of the command line.
        counts: Of `count_bytes`.
    """
    cuda = args.device == "cuda"
    clock, found = Clock(cuda), Found()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    training = Training(case, model, args)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    # The first sketches, or finds its bases in whole gradients.
    for i in range(min(WARM.get(case.strategy, 4), 2 + args.steps)):
        loss = training.step(i)
    if cuda:
        torch.cuda.synchronize()
        found.peak = torch.cuda.max_memory_allocated() - bare
    training.check(loss)
    sums, scattered = counts.sums, counts.scattered
    training.step(0)
    found.sums, found.scattered = counts.sums - sums, counts.scattered - scattered
    found.exchange = training.exchange_ms(clock, 3)
    found.graphs = graphs["unique_graphs"] - before
    return training, found


def profile(case: Case, training: Training) -> None:
    """Prints what two steps spend their time on; every rank takes part, the first one prints."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as seen:
        began = time.perf_counter()
        for i in range(2):
            training.step(i)
        launched = time.perf_counter() - began
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ended = time.perf_counter() - began
    averages = seen.key_averages()
    # Ranges such as nccl:all_gather have the time of the kernels in them once more.
    kernels = [
        a
        for a in averages
        if a.device_type != torch.autograd.DeviceType.CPU and not a.is_user_annotation
    ]
    busy = sum(a.self_device_time_total for a in kernels) / 2e3
    print(
        f"profile {case.name} rank {distributed.get_rank()}: launched in {500 * launched:.0f} ms, "
        f"ended in {500 * ended:.0f} ms, device busy {busy:.0f} ms a step",
        flush=True,
    )
    if distributed.get_rank() == 0:
        print(averages.table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=60))
        print(averages.table(sort_by="self_device_time_total", row_limit=10), flush=True)


def dense_bytes(
    model: nn.Module, names: list[str], args: argparse.Namespace, counts: Counts
) -> int:
    """Bytes that plain DDP averages in a step in which the named parameters have gradients."""
    for name, param in model.named_parameters():
        param.requires_grad_(name in names)
    wrapped = under_ddp(model)
    before = counts.sums
    ids = torch.zeros(1, args.tokens, dtype=torch.int64, device=args.device)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    found = counts.sums - before
    model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    return found


def free(device: str) -> None:
    """Leaves the device bare for the next case."""
    gc.collect()
    if device == "cuda":
        forget_scratch()


class Bench:
    """All ranks' way through the cases."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rank, self.gpus = distributed.get_rank(), distributed.get_world_size()
        # Ranks that wait on it leave their GPU and the cores alone.
        self.control: Any = distributed.new_group(backend="gloo")
        self.counts = count_bytes()
        self.machine = common.machine(args.device)
        self.began = time.perf_counter()
        self.found: dict[Case, Found] = {}
        self.trainings: dict[Case, Training] = {}
        # Milliseconds of a step on each rank, in each round.
        self.times: dict[Case, dict[int, list[float]]] = {}
        self.rows: dict[Case, dict[str, Any]] = {}
        self.dense: dict[tuple[int, str], int] = {}
        self.failed: list[str] = []

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value."""
        values: list[Any] = [None] * self.gpus
        distributed.all_gather_object(values, value, group=self.control)
        return values

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """What work returns, or None where it failed on this rank or another."""
        spent = max(self.gathered(time.perf_counter() - self.began))
        if spent > self.args.budget - LONGEST:
            self.failed.append(f"{name}: no time left")
            return None
        result, error = None, None
        try:
            result = work()
        except Exception:
            error = traceback.format_exc()
        errors = [text for text in self.gathered(error) if text is not None]
        if errors:
            self.failed.append(f"{name}: {errors[0].strip().splitlines()[-1]}")
            if self.rank == 0:
                print(f"{name} failed:\n{errors[0]}", file=sys.stderr, flush=True)
            return None
        return result

    def in_turn(self, work: Callable[[], Any]) -> Any:
        """Runs work on one rank at a time."""
        error, result = None, None
        for rank in range(self.gpus):
            if rank == self.rank:
                try:
                    result = work()
                except Exception as raised:
                    error = raised
            distributed.barrier(group=self.control)
        if error is not None:
            raise error
        return result

    def model(self) -> nn.Module:
        """A bare model on this rank's device."""
        args = self.args
        model = build(model_config(args.model, args.small), args.device)
        checkpoint_blocks(model, True)
        return model

    def prepare(self, case: Case) -> None:
        """Builds a case's model and training, and measures all but times."""
        # NCCL holds what it averaged until the next call.
        distributed.barrier()
        free(self.args.device)
        bare = torch.cuda.memory_allocated() if self.args.device == "cuda" else 0
        began = time.perf_counter()
        made = self.attempt(
            case.name, lambda: begin(case, self.model(), bare, self.args, self.counts)
        )
        if made is not None:
            self.trainings[case], self.found[case] = made
            self.found[case].seconds += time.perf_counter() - began

    def time(self, case: Case, number: int) -> None:
        """One round of a case."""
        began = time.perf_counter()
        training = self.trainings[case]
        clock, steps = Clock(self.args.device == "cuda"), self.args.steps

        def work() -> float:
            return training.round(clock, steps)

        one = case.strategy == "one"
        ms = self.attempt(case.name, (lambda: self.in_turn(work)) if one else work)
        if ms is None:
            del self.trainings[case]
            return
        self.found[case].times[number] = ms
        self.found[case].seconds += time.perf_counter() - began

    def count_dense(self, group: Case, training: Training) -> None:
        """Lets plain DDP average the gradients of what trained, once."""
        key = (group.blocks, group.path)
        names = training.trained()
        training.end()
        if names and key not in self.dense:
            found = self.attempt(
                f"{training.case.name}: dense DDP",
                lambda: dense_bytes(training.model, names, self.args, self.counts),
            )
            if found is not None:
                self.dense[key] = found

    def group(self, group: list[Case]) -> None:
        """Measures cases side by side."""
        torch._dynamo.reset()
        # Of all strategies together; beyond the limit a block would run as it is, without a word.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for case in group:
            if case.strategy == "each":
                # The same training as `one`.
                one = replace(case, strategy="one")
                if one in self.trainings:
                    self.trainings[case] = self.trainings[one]
                    self.found[case] = replace(self.found[one], times={})
                continue
            self.prepare(case)
        for number in range(self.args.rounds):
            chosen = [case for case in group if case in self.trainings]
            if not chosen:
                break
            place = number % len(chosen)
            order = chosen[place:] + chosen[:place]
            gc.collect()
            gc.disable()
            for case in reversed(order) if number % 2 else order:
                self.time(case, number)
            gc.enable()
            for case in chosen:
                self.write(case)
        for case, training in self.trainings.items():
            if case.name in self.args.profile:
                self.attempt(f"{case.name}: profile", lambda c=case, t=training: profile(c, t))
        for case, training in self.trainings.items():
            if case.strategy == "one":
                self.count_dense(case.group, training)
        for case in group:
            if case in self.found and self.found[case].times:
                self.write(case)
                if self.rank == 0:
                    common.show(self.rows[case])
        self.trainings.clear()
        free(self.args.device)

    def rates(self, case: Case) -> dict[int, tuple[float, list[float]]]:
        """Tokens per second of all GPUs, and each one's milliseconds of a step, in each round."""
        tokens = case.rows * self.args.tokens
        rates = {}
        for number, ms in self.times[case].items():
            # Without a wrapper each has its own time; under one all wait for the slowest.
            paces = ms if case.strategy in ALONE else [max(ms)] * self.gpus
            rates[number] = (sum(1e3 * tokens / each for each in paces), ms)
        return rates

    def write(self, case: Case) -> None:
        """Makes a case's row, and writes all rows."""
        args, found = self.args, self.found[case]
        if not found.times:
            return
        every = self.gathered(found)
        self.times[case] = {i: [each.times[i] for each in every] for i in found.times}
        rates = self.rates(case)
        key = (case.blocks, case.path)
        if case.path == "full" and case.strategy == "ddp":
            self.dense[key] = int(found.sums)
        dense = self.dense.get(key)
        rate = statistics.median(rate for rate, _ in rates.values())
        by_gpu = zip(*(ms for _, ms in rates.values()), strict=True)
        row: dict[str, Any] = {
            "bench": "scale",
            "model": args.model,
            "strategy": case.strategy,
            "gpus": self.gpus,
            "blocks": case.blocks,
            "rank": args.rank if case.path not in PLAIN else 0,
            "path": case.path,
            "tokens": f"{case.rows}x{args.tokens}",
            "compile": case.compiled,
            **({"prefetch": case.prefetch} if case.strategy == "fsdp2" else {}),
            "peak_gib": round(max(each.peak for each in every) / GIB, 2),
            "tokens_per_s": round(rate),
            "efficiency": None,
            "efficiency_low": None,
            "efficiency_high": None,
            "efficiency_beside": None,
            "allreduce_mib_per_step": round(found.sums / MIB, 3),
            "dense_allreduce_mib_per_step": None if dense is None else round(dense / MIB, 3),
            "reduce_scatter_mib_per_step": round(found.scattered / MIB, 3),
            "step_ms": round(1e3 * case.rows * args.tokens * self.gpus / rate, 2),
            "step_ms_by_gpu": [round(statistics.median(ms), 2) for ms in by_gpu],
            "exchange_ms": round(max(each.exchange for each in every), 2),
            **({"graphs": max(each.graphs for each in every)} if case.compiled else {}),
            "rounds": len(rates),
            "steps": len(rates) * args.steps,
            "tokens_per_s_by_round": [round(rate) for rate, _ in rates.values()],
            "seconds": round(found.seconds, 1),
        }
        for column, strategy in (("efficiency", "one"), ("efficiency_beside", "each")):
            base = replace(case.group, strategy=strategy)
            if base not in self.times:
                continue
            bases = self.rates(base)
            ratios = [rates[i][0] / bases[i][0] for i in rates if i in bases]
            if not ratios:
                continue
            # Of one round there are none.
            cuts = statistics.quantiles(ratios, n=4, method="inclusive") if ratios[1:] else ratios
            row[column] = round(statistics.median(ratios), 3)
            if column == "efficiency":
                row["efficiency_low"], row["efficiency_high"] = (
                    round(cuts[0], 3),
                    round(cuts[-1], 3),
                )
        self.rows[case] = row
        if self.rank == 0:
            self.save()

    def save(self) -> None:
        """Writes all rows so far."""
        with contextlib.redirect_stdout(io.StringIO()):
            common.write_rows(self.args.json, [self.machine, *self.rows.values()])


def cores_in(text: str) -> set[int]:
    """Numbers of a list as Linux writes it, such as 0-3,8."""
    spans = [part.split("-") for part in text.strip().split(",") if part]
    return {core for span in spans for core in range(int(span[0]), int(span[-1]) + 1)}


def share_of_cores(local: int, count: int, cuda: bool) -> list[int]:
    """Cores for one of the ranks of this host: both threads of a core, near its GPU if known."""
    cores = os.sched_getaffinity(0)

    def known(file: str) -> set[int]:
        try:
            return cores_in(Path(file).read_text()) & cores
        except (OSError, ValueError):
            return set()

    near = []
    for gpu in range(count):
        place = set()
        if cuda:
            at = torch.cuda.get_device_properties(gpu)
            name = f"{at.pci_domain_id:04x}:{at.pci_bus_id:02x}:{at.pci_device_id:02x}.0"
            place = known(f"/sys/bus/pci/devices/{name}/local_cpulist")
        near.append(frozenset(place or cores))
    together = [gpu for gpu in range(count) if near[gpu] == near[local]]
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    ordered = sorted(near[local], key=lambda c: (min(known(siblings.format(c)) or {c}), c))
    share, place = len(ordered) // len(together), together.index(local)
    return ordered[place * share : (place + 1) * share] if share > 1 else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="llama2-7b", help="a shape that owlore plan knows")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--rank", type=int, help="128; 8 if --small")
    parser.add_argument("--steps", type=int, default=4, help="steps of a strategy in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="rows with compiled blocks too")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--cases", nargs="*", help="only these, such as ddp/32/projected")
    parser.add_argument("--profile", nargs="*", default=[], help="cases to profile, after timing")
    parser.add_argument("--budget", type=float, default=600, help="seconds for all cases")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args(argv)
    if args.rank is None:
        args.rank = 8 if args.small else 128
    if args.small:
        args.tokens, args.steps, args.rounds = 32, 2, 3
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # A machine without a network may not know its own name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Otherwise the ranks' threads get into each other's way.
    local, count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    cores = share_of_cores(local, count, args.device == "cuda")
    if cores:
        os.sched_setaffinity(0, cores)
    timeout = datetime.timedelta(seconds=90)
    if args.device == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device, timeout=timeout)
    else:
        distributed.init_process_group("gloo", timeout=timeout)
    bench = Bench(args)
    blocks = model_config(args.model, args.small).num_hidden_layers
    for group in cases(blocks, args.compile):
        wanted = {c.name for c in group if (c.name in args.cases if args.cases else not c.prefetch)}
        if wanted:
            # What is compared with others needs them.
            bench.group([c for c in group if c.strategy in ALONE or c.name in wanted])
    if bench.rank == 0:
        for text in bench.failed:
            print(f"not measured: {text}", flush=True)
    distributed.barrier(group=bench.control)
    distributed.destroy_process_group()
    if bench.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
