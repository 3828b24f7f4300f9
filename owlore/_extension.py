"""Loads the compiled extension ``owlore/_C*.so``, once and on demand.

The package is whole without it: `owlore.reference` defines every op. A missing extension is normal
and silent; one that is there and does not load warns once.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path
from typing import TypedDict

import torch


class Status(TypedDict):
    """State of the extension, as shown by ``owlore info``.

    Attributes:
        available: The extension is loaded and its ops are registered.
        path: The file, or None if there is none.
        reason: Why it is not available, or "loaded".
        cuda: It was built with the CUDA kernels.
    """

    available: bool
    path: str | None
    reason: str
    cuda: bool


@functools.cache
def _load(folder: Path) -> Status:
    candidates = sorted(
        path for end in ("so", "pyd", "dylib") for path in folder.glob(f"_C*.{end}")
    )
    if not candidates:
        reason = "not built (pip install . --no-build-isolation builds it)"
        return {"available": False, "path": None, "reason": reason, "cuda": False}
    path = str(candidates[0])
    try:
        torch.ops.load_library(path)
        cuda = bool(ctypes.CDLL(path).owlore_built_with_cuda())
    except (OSError, RuntimeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"owlore: the compiled extension {path} does not load; the PyTorch reference runs "
            f"instead, which is slower. Build it again for torch {torch.__version__} "
            f"(pip install . --no-build-isolation). {reason}",
            RuntimeWarning,
            stacklevel=3,
        )
        return {"available": False, "path": path, "reason": reason, "cuda": False}
    return {"available": True, "path": path, "reason": "loaded", "cuda": cuda}


def status() -> Status:
    """State of the extension; the first call loads it."""
    return _load(Path(__file__).resolve().parent).copy()


def load() -> bool:
    """Loads the extension if it is there; returns whether its ops are registered."""
    return _load(Path(__file__).resolve().parent)["available"]
