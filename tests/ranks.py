"""Runs a function on several ranks: real processes that talk over gloo, or NCCL."""

from __future__ import annotations

import datetime
import functools
import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

_OURS = "OWLORE_"


@functools.cache
def _context(backend: str) -> Any:
    if backend == "nccl":
        # CUDA does not survive a fork.
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Imported once; each rank is a fork of a process that has them.
    context.set_forkserver_preload(
        ["torch", "transformers.models.llama", "owlore", "test_optimizer"]
    )
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(
    rank: int,
    ranks: int,
    port: int,
    backend: str,
    timeout: float,
    environment: dict[str, str],
    results: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    # The server that forks ranks has the environment of its start.
    for name in [name for name in os.environ if name.startswith(_OURS)]:
        del os.environ[name]
    os.environ |= environment
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = None
    if backend == "nccl":
        # cuBLAS repeats its sums with it; it is read once.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    try:
        torch.distributed.init_process_group(
            backend, timeout=datetime.timedelta(seconds=timeout), device_id=device
        )
        # As bytes: a tensor would be sent as a file that ends with its process.
        answer = io.BytesIO()
        torch.save(function(*args), answer)
        results.send((True, answer.getvalue()))
        torch.distributed.barrier()
    except Exception:
        results.send((False, traceback.format_exc()))
    finally:
        torch.distributed.destroy_process_group()


def run(
    function: Callable[..., Any],
    *args: Any,
    ranks: int = 2,
    timeout: float = 60,
    backend: str = "gloo",
    wait: float | None = None,
) -> list[Any]:
    """What a module-level function returns on each rank.

    Args:
        function: Called on every rank with the process group up.
        args: Its arguments; they must pickle, and so must what it returns.
        ranks: Number of processes.
        timeout: Seconds until a hanging collective is given up.
        backend: "gloo", or "nccl" with a GPU for each rank.
        wait: Seconds until a rank is given up; a little more than `timeout` if None.

    Raises:
        AssertionError: A rank raised; the message is its traceback.
    """
    port = _free_port()
    started = []
    environment = {key: value for key, value in os.environ.items() if key.startswith(_OURS)}
    context = _context(backend)
    for rank in range(ranks):
        here, there = context.Pipe(duplex=False)
        options = (rank, ranks, port, backend, timeout, environment, there, function, args)
        process = context.Process(target=_rank, args=options, daemon=True)
        process.start()
        there.close()
        started.append((process, here))
    answers = []
    try:
        for process, here in started:
            ended = "no answer"
            if here.poll(timeout + 5 if wait is None else wait):
                try:
                    answers.append(here.recv())
                    continue
                except EOFError:
                    process.join(5)
                    ended = f"ended with {process.exitcode}"
            answers.append((False, ended))
    finally:
        for process, _ in started:
            process.join(5)
            if process.is_alive():
                process.kill()
    failed = [f"rank {i}: {answer}" for i, (fine, answer) in enumerate(answers) if not fine]
    assert not failed, "\n".join(failed)
    return [torch.load(io.BytesIO(answer), weights_only=False) for _, answer in answers]
