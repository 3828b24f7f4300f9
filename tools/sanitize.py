"""Runs the GPU tests' smallest cases under NVIDIA's compute-sanitizer; a line for each tool.

    python tools/sanitize.py --out benchmarks/results/h100/sanitizer.txt

memcheck looks at every access of global, shared and local memory, racecheck at hazards between
threads in shared memory. Every tensor has an allocation of its own meanwhile, so that an access
beside it is seen.

benchmarks/results/*/sanitizer.txt hold the last lines of each kind of machine, of memcheck alone:
on an H200 beside other work racecheck had not ended after 290 s, where memcheck had.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUMMARY = r"(?:ERROR|RACECHECK) SUMMARY: (.*)"
# What runs: the kernels of every step, with and without rounding, both sides, lines skipped,
# shapes that are no multiple of a tile, walks of several tiles; the dense step; the refresh.
CASES = (
    "gluon_gives and rows and tile",
    "gluon_gives and rows and small and True-True",
    "test_large_factors_on_the_gpu and (16 or 144)",
    "table_configurations_on_the_gpu and (16 or 128)",
    "test_shards_on_the_gpu",
    "test_energy_on_a_gpu and 1-dtype0",
)
FILES = ("test_lowrank_adam.py", "test_adamw.py", "test_refresh.py", "test_inverse_cholesky.py")


def sanitizer() -> str:
    """Path of compute-sanitizer."""
    places = sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"))
    found = shutil.which("compute-sanitizer") or (places[0] if places else None)
    if found is None:
        raise SystemExit("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    return found


def main() -> int:
    """Runs the tools; 0 if the tests pass and no tool has found anything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck"])
    parser.add_argument("--seconds", type=float, default=600, help="for each tool")
    parser.add_argument("--out", help="file for the lines")
    options = parser.parse_args()
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    pytest += ["-k", " or ".join(f"({case})" for case in CASES)]
    pytest += [str(ROOT / "tests" / name) for name in FILES]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    check = [sanitizer(), "--error-exitcode", "9", "--target-processes", "application-only"]
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    machine = subprocess.run(query, capture_output=True, text=True, check=True)
    version = subprocess.run([check[0], "--version"], capture_output=True, text=True, check=True)
    numbers = re.search(r"Version (\S+)", version.stdout)
    commit = os.environ.get("OWLORE_COMMIT", "of the working tree")
    lines = [
        f"{machine.stdout.splitlines()[0]}, compute-sanitizer {numbers[1] if numbers else '?'}, "
        f"commit {commit}"
    ]
    failed = False
    # The first, without a tool, compiles the kernels.
    for tool in ("none", *options.tools):
        command = pytest if tool == "none" else [*check, "--tool", tool, *pytest]
        if tool != "none":
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=options.seconds
            )
            text, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as late:
            text, code = (late.stdout or b"").decode(), 124
        found = re.search(SUMMARY, text)
        tests = re.search(r"^=*\s*(\d+ (?:passed|failed).*?)(?: in .*)?$", text, re.MULTILINE)
        failed |= code != 0
        lines.append(
            f"{tool}: {found[1] if found else 'no summary'}; "
            f"tests: {tests[1] if tests else 'none finished'}; exit {code}"
        )
        print(lines[-1], flush=True)
        if code:
            print(text[-6000:], flush=True)
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
