"""Training on several GPUs: peak memory of each, tokens per second, bytes that cross the wire.

    torchrun --nproc-per-node 2 benchmarks/bench_scale.py --json scale.json
    torchrun --nproc-per-node 2 benchmarks/bench_scale.py --cases one/32/projected ddp/32/projected
    torchrun --nproc-per-node 2 benchmarks/bench_scale.py --small --device cpu

A step is forward, backward and the optimizer's real step on random tokens; weights are random and
bfloat16, embedding and head are frozen, gradient checkpointing is non-reentrant, nothing is
compiled. Each GPU has its own sequences. Where few blocks train they are spread evenly over the
model, the first among them, so that backward has no short way.

strategy is ddp, fsdp2 (fully_shard of each block and of the model) or without a wrapper: one on
each GPU in turn, while the others rest; each on all GPUs at once, which share the host.
tokens_per_s is that of all GPUs together. efficiency is the tokens per second of a GPU over those
of `one`, the mean of the same GPUs; efficiency_beside is over those of `each`. step_ms is the
median of steps that follow one another without waiting for the device (step_ms_by_gpu: of each
rank); steps that sketch bases are left out of it, and are in peak_gib, the largest
torch.cuda.max_memory_allocated() of all GPUs. Rounds of `one`, `each` and ddp take turns, so that a
machine that changes its pace changes all. Ranks have their own share of the host's cores.

allreduce_mib_per_step counts what a rank hands to all-reduce calls, DDP's buckets included;
dense_allreduce_mib_per_step is what plain DDP handed over in a step that formed the gradients of
the same parameters. Gradients that FSDP2 hands to reduce_scatter are counted apart; its gathering
of weights is in neither. exchange_ms is the part of a step on the device in which owlore averages.

path is projected, dense, or full: plain AdamW on all blocks, what dense DDP comes to.

--profile prints where two steps of each case spend time, on the device and on the host.
A row is written as soon as it is measured. A case that fails on all ranks is reported, and the
others go on; --budget ends the run in time.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
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
WARM = {"one": 4, "each": 4, "ddp": 12, "fsdp2": 4}
# Seconds that a case may take, at most.
LONGEST = 25


@dataclass(frozen=True)
class Case:
    """One row."""

    strategy: str
    blocks: int
    path: str = "projected"

    @property
    def name(self) -> str:
        """What --cases selects by."""
        return f"{self.strategy}/{self.blocks}/{self.path}"


@dataclass
class Found:
    """What this rank measured of a case, in all rounds."""

    times: list[float] = field(default_factory=list)
    peak: float = 0.0
    sums: float = 0.0
    scattered: float = 0.0
    exchange: list[float] = field(default_factory=list)


@dataclass
class Counts:
    """Bytes handed to collectives so far."""

    sums: int = 0
    scattered: int = 0


def cases(blocks: int) -> list[list[Case]]:
    """All rows, in groups on one model; `one` comes before what is compared with it."""
    few = max(1, 5 * blocks // 32)
    strategies = ("one", "each", "ddp", "fsdp2")
    low, some = [[Case(s, n) for s in strategies] for n in (blocks, few)]
    dense = [Case(s, few, "dense") for s in strategies]
    return [low, some, dense, [Case(s, blocks, "full") for s in strategies[:3]]]


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


def shard(model: nn.Module) -> nn.Module:
    """fully_shard of each block and of the model."""
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block)
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
        "lr": 1e-5,
    }


class Training:
    """A model in its strategy, its optimizer and its batches."""

    def __init__(self, case: Case, model: nn.Module, args: argparse.Namespace) -> None:
        self.case, self.model = case, model
        device = next(model.parameters()).device
        if case.strategy == "fsdp2":
            model = shard(model)
        if case.path == "full":
            for part in (model.get_input_embeddings(), model.get_output_embeddings()):
                part.requires_grad_(False)
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
                0, model.config.vocab_size, (args.rows, args.tokens), generator=generator
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

    def exchanges(self, clock: Clock, count: int) -> list[float]:
        """Milliseconds on the device of owlore's own averages in some steps."""
        exchange = getattr(self.optimizer, "_exchange", None)
        if exchange is None or not exchange.active:
            return []
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
        return [clock.between(*pair) for pair in marks]

    def check(self, loss: Tensor) -> None:
        """Something was timed that trains.

        Raises:
            RuntimeError: It does not.
        """
        if not bool(torch.isfinite(loss)):
            raise RuntimeError(f"the loss is {float(loss)}")
        states = list(self.optimizer.state.values())
        keys = {"exp_avg", "basis"} if self.case.path != "full" else {"exp_avg"}
        if not any(keys <= set(state) for state in states):
            raise RuntimeError("no weight has moments")

    def end(self) -> None:
        """Leaves the bare model."""
        if isinstance(self.optimizer, OwLore):
            self.optimizer.detach()
        self.model.requires_grad_(True)
        self.model.zero_grad(set_to_none=True)


def measure(
    case: Case, model: nn.Module, found: Found, args: argparse.Namespace, counts: Counts
) -> list[str]:
    """Trains one case on this rank and adds what it measured.

    Returns:
        Names of the parameters that trained.
    """
    cuda = args.device == "cuda"
    clock = Clock(cuda)
    training = Training(case, model, args)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    # The first sketches, or finds its bases in whole gradients.
    for i in range(min(WARM[case.strategy], 2 + args.steps)):
        training.step(i)
    before = Counts(counts.sums, counts.scattered)
    marks = [clock.mark()]
    for i in range(args.steps):
        loss = training.step(i)
        marks.append(clock.mark())
    if cuda:
        torch.cuda.synchronize()
        found.peak = max(found.peak, torch.cuda.max_memory_allocated())
    found.times += [clock.between(*marks[i : i + 2]) for i in range(args.steps)]
    found.sums = (counts.sums - before.sums) / args.steps
    found.scattered = (counts.scattered - before.scattered) / args.steps
    found.exchange += training.exchanges(clock, 3)
    if args.profile:
        profile(case, training)
    training.check(loss)
    names = []
    if isinstance(training.optimizer, OwLore):
        optimizer = training.optimizer
        names = [m.entry.name for m in optimizer._members if optimizer._is_active(m)]
    training.end()
    return names


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
    kernels = [a for a in averages if a.device_type != torch.autograd.DeviceType.CPU]
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
    ids = torch.zeros(args.rows, args.tokens, dtype=torch.int64, device=args.device)
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

    def measure(self, case: Case, model: nn.Module) -> list[str] | None:
        """Measures a case once more, and writes its row."""
        began = time.perf_counter()
        found = self.found.setdefault(case, Found())

        def work() -> list[str]:
            return measure(case, model, found, self.args, self.counts)

        one = case.strategy == "one"
        names: list[str] | None = self.attempt(
            case.name, (lambda: self.in_turn(work)) if one else work
        )
        free(self.args.device)
        if names is not None:
            self.write(case, time.perf_counter() - began)
        return names

    def count_dense(self, case: Case, model: nn.Module, names: list[str]) -> None:
        """Lets plain DDP average the gradients of what trained in a case, once."""
        key = (case.blocks, case.path)
        if key not in self.dense:
            found = self.attempt(
                f"{case.name}: dense DDP",
                lambda: dense_bytes(model, names, self.args, self.counts),
            )
            free(self.args.device)
            if found is not None:
                self.dense[key] = found

    def group(self, group: list[Case], rounds: int) -> None:
        """Measures cases that share a model."""
        made: list[nn.Module] = []
        for i in range(rounds):
            for case in group:
                if case.strategy == "fsdp2" and i < rounds - 1:
                    continue
                if case.strategy == "fsdp2" or not made:
                    made.clear()
                    free(self.args.device)
                    self.attempt(f"{case.name}: model", lambda: made.append(self.model()))
                if not made:
                    continue
                names = self.measure(case, made[0])
                if names is None:
                    # It may not have been left as it was.
                    made.clear()
                elif case.strategy == "one" and names:
                    self.count_dense(case, made[0], names)
        made.clear()
        free(self.args.device)

    def write(self, case: Case, seconds: float) -> None:
        """Makes a case's row, and writes all rows."""
        args, found = self.args, self.found[case]
        tokens = args.rows * args.tokens
        ms = self.gathered(statistics.median(found.times))
        peak = max(self.gathered(found.peak))
        exchange = max(self.gathered(statistics.median(found.exchange or [0.0])))
        by_gpu = [round(each, 2) for each in ms]
        # Without a wrapper each has its own time; under one all wait for the slowest.
        ms = ms if case.strategy in ("one", "each") else [max(ms)] * self.gpus
        rate = sum(1e3 * tokens / each for each in ms)
        dense = self.dense.get((case.blocks, case.path))
        if case.path == "full" and case.strategy == "ddp":
            dense = int(found.sums)
        self.rows[case] = {
            "bench": "scale",
            "model": args.model,
            "strategy": case.strategy,
            "gpus": self.gpus,
            "blocks": case.blocks,
            "rank": args.rank if case.path != "full" else 0,
            "path": case.path,
            "peak_gib": round(peak / GIB, 2),
            "tokens_per_s": round(rate),
            "efficiency": None,
            "allreduce_mib_per_step": round(found.sums / MIB, 3),
            "dense_allreduce_mib_per_step": None if dense is None else round(dense / MIB, 3),
            "reduce_scatter_mib_per_step": round(found.scattered / MIB, 3),
            "efficiency_beside": None,
            "step_ms": round(statistics.mean(ms), 2),
            "step_ms_by_gpu": by_gpu,
            "exchange_ms": round(exchange, 2),
            "tokens": f"{args.rows}x{args.tokens}",
            "steps": len(found.times),
            "seconds": round(seconds, 1),
        }
        for other, row in self.rows.items():
            key = (other.blocks, other.path)
            for column, strategy in (("efficiency", "one"), ("efficiency_beside", "each")):
                base = self.rows.get(Case(strategy, *key))
                if base is not None:
                    row[column] = round(row["tokens_per_s"] / base["tokens_per_s"], 3)
            if row["dense_allreduce_mib_per_step"] is None and key in self.dense:
                row["dense_allreduce_mib_per_step"] = round(self.dense[key] / MIB, 3)
        if self.rank == 0:
            common.show(self.rows[case])
            self.save()

    def save(self) -> None:
        """Writes all rows so far."""
        common.write_rows(self.args.json, [self.machine, *self.rows.values()])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="llama2-7b", help="a shape that owlore plan knows")
    parser.add_argument("--rows", type=int, default=1, help="sequences a step on each GPU")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--rank", type=int, help="128; 8 if --small")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2, help="rounds of the first group")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--cases", nargs="*", help="only these, such as ddp/32/projected")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--budget", type=float, default=200, help="seconds for all cases")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args(argv)
    if args.rank is None:
        args.rank = 8 if args.small else 128
    if args.small:
        args.tokens, args.steps = 32, 3
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # A machine without a network may not know its own name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Otherwise the ranks' threads get into each other's way.
    local, count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // count
    if share > 1:
        os.sched_setaffinity(0, cores[local * share : (local + 1) * share])
    timeout = datetime.timedelta(seconds=90)
    if args.device == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device, timeout=timeout)
    else:
        distributed.init_process_group("gloo", timeout=timeout)
    bench = Bench(args)
    blocks = model_config(args.model, args.small).num_hidden_layers
    for i, group in enumerate(cases(blocks)):
        wanted = {case.name for case in group if not args.cases or case.name in args.cases}
        if wanted:
            # What is compared with others needs them.
            bases = ("one", "each")
            chosen = [case for case in group if case.strategy in bases or case.name in wanted]
            bench.group(chosen, args.rounds if i == 0 else 1)
    if bench.rank == 0:
        for text in bench.failed:
            print(f"not measured: {text}", flush=True)
    distributed.barrier(group=bench.control)
    distributed.destroy_process_group()
    if bench.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
