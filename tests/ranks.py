"""Runs a function on several ranks: real processes that talk over gloo."""

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


@functools.cache
def _context() -> Any:
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
    timeout: float,
    results: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
        # As bytes: a tensor would be sent as a file that ends with its process.
        answer = io.BytesIO()
        torch.save(function(*args), answer)
        results.send((True, answer.getvalue()))
        torch.distributed.barrier()
    except Exception:
        results.send((False, traceback.format_exc()))
    finally:
        torch.distributed.destroy_process_group()


def run(function: Callable[..., Any], *args: Any, ranks: int = 2, timeout: float = 60) -> list[Any]:
    """What a module-level function returns on each rank.

    Args:
        function: Called on every rank with the process group up.
        args: Its arguments; they must pickle, and so must what it returns.
        ranks: Number of processes.
        timeout: Seconds until a hanging collective or rank is given up.

    Raises:
        AssertionError: A rank raised; the message is its traceback.
    """
    port = _free_port()
    started = []
    for rank in range(ranks):
        here, there = _context().Pipe(duplex=False)
        options = (rank, ranks, port, timeout, there, function, args)
        process = _context().Process(target=_rank, args=options, daemon=True)
        process.start()
        there.close()
        started.append((process, here))
    answers = []
    try:
        for process, here in started:
            ended = "no answer"
            if here.poll(timeout + 5):
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
