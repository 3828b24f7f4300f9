"""Shares the runs of the quality tables between the processes of a machine.

A run is claimed by locking a file of its own. The lock is the system's and falls with its process:
the run of a process that crashed is taken up by another, which is told of the earlier start.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Claim", "Claims"]

Key = tuple[Any, ...]


class Claim:
    """A run that this process holds.

    Attributes:
        starts: How often the run was started before, by processes that did not finish it.
    """

    def __init__(self, file: int, starts: int) -> None:
        self._file = file
        self.starts = starts

    def release(self, outcome: str) -> None:
        """Ends the claim.

        Args:
            outcome: "done" or "failed"; nobody takes the run again.
        """
        os.write(self._file, f"{outcome}\n".encode())
        fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)


class Claims:
    """The claims of the processes that share a folder.

    Args:
        folder: Where the files are; a new one for runs that failed to be tried again.
        starts: Starts of a run at most, those included that a crash ended.
    """

    def __init__(self, folder: Path, starts: int = 3) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.starts = starts

    def take(self, key: Key) -> Claim | None:
        """Claims a run, unless another process holds it or it has ended."""
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
        file = os.open(self.folder / f"{name}.run", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            return None
        lines = os.pread(file, 1 << 16, 0).decode().split()
        starts = lines.count("start")
        if lines and lines[-1] == "start" and starts >= self.starts:
            self.fail(key)
            lines.append("failed")
            os.write(file, b"failed\n")
        if lines and lines[-1] != "start":
            os.close(file)
            return None
        os.write(file, b"start\n")
        return Claim(file, starts)

    def fail(self, key: Key) -> None:
        """Notes that a run has failed for good."""
        self.note("failed", json.dumps(key))

    def failed(self) -> set[Key]:
        """The runs that have failed for good."""
        return {tuple(json.loads(line)) for line in self.noted("failed")}

    def note(self, name: str, line: str) -> None:
        """Adds a line to what all processes know under a name."""
        with open(self.folder / f"{name}.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def noted(self, name: str) -> set[str]:
        """The lines that were noted under a name."""
        path = self.folder / f"{name}.txt"
        return set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Waits until no other process is in a block of this name."""
        with open(self.folder / f"{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
