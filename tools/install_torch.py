"""Installs torch for the Python that runs this, unless it is there: the CUDA build only for a GPU.

On Linux the default wheel of torch brings gigabytes of CUDA libraries. Without a GPU the CPU build
is taken instead, from torch's own index, unless pip would choose a CPU build anyway.

    python tools/install_torch.py "torch==2.13.0" [--index URL]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import shutil
import subprocess
import sys

CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(*arguments: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE if quiet else None, text=True)


def default_brings_cuda(spec: str) -> bool:
    """Whether pip, left alone, would install CUDA libraries. It downloads metadata only."""
    plan = pip("install", "--dry-run", "--no-deps", "--quiet", "--report", "-", spec, quiet=True)
    if plan.returncode != 0:
        return False
    needed = [
        requirement
        for item in json.loads(plan.stdout)["install"]
        if "+cpu" not in item["metadata"]["version"]
        for requirement in item["metadata"].get("requires_dist", [])
    ]
    return any(requirement.startswith(("nvidia-", "cuda-")) for requirement in needed)


def main() -> int:
    parser = argparse.ArgumentParser(description="Installs torch, the CUDA build only for a GPU.")
    parser.add_argument("spec", help='what to install, such as "torch==2.13.0"')
    parser.add_argument("--index", default="", help="where from; chosen if not given")
    options = parser.parse_args()

    if importlib.util.find_spec("torch") is not None:
        import torch

        if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11):
            print(f"torch {torch.__version__} is installed")
            return 0
    if options.index:
        return pip("install", options.spec, "--index-url", options.index).returncode
    no_gpu = platform.system() == "Linux" and shutil.which("nvidia-smi") is None
    if no_gpu and default_brings_cuda(options.spec):
        print("no GPU here: installing torch's CPU build")
        if pip("install", options.spec, "--index-url", CPU_INDEX).returncode == 0:
            return 0
        print("the CPU build is not to be had; installing the default build, with CUDA libraries")
    return pip("install", options.spec).returncode


if __name__ == "__main__":
    sys.exit(main())
