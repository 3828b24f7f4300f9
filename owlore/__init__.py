"""OwLore: fine-tunes large language models by sampled low-rank training (arXiv 2405.18380)."""

from __future__ import annotations

import platform
import sys
from typing import Any

from owlore._extension import status as _extension_status
from owlore.config import OwLoreConfig
from owlore.optimizer import OwLore, prepare_load
from owlore.outliers import OutlierScores, outlier_scores

__version__ = "0.1.0"
__all__ = [
    "OutlierScores",
    "OwLore",
    "OwLoreConfig",
    "__version__",
    "build_info",
    "outlier_scores",
    "prepare_load",
]


def build_info() -> dict[str, Any]:
    """Versions, devices and the state of the compiled extension.

    Returns:
        Keys "owlore", "python", "platform", "torch", "cuda" (toolkit version of torch, or None),
        "devices" (names of the GPUs), "triton" (version, or None) and "extension".
    """
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "owlore": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(count)],
        "triton": triton_version,
        "extension": _extension_status(),
    }
