"""The rows that benchmarks/bench_scale.py writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def bench(file: Path, *options: str, fails: bool = False) -> tuple[list[dict[str, Any]], str]:
    """The rows after the machine's, and what was printed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(ROOT / "benchmarks" / "bench_scale.py"), "--small", "--device", "cpu"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *script, "--json", str(file), *options],
        # The Makefile keeps a script's folder off the path.
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    machine, *rows = json.loads(file.read_text())
    assert machine["bench"] == "machine"
    return rows, done.stdout


def test_rows_of_two_ranks(tmp_path: Path) -> None:
    chosen = ["ddp/4/projected", "fsdp2/4/projected", "ddp/1/dense", "fsdp2/1/dense", "ddp/4/full"]
    rows, _ = bench(tmp_path / "scale.json", "--cases", *chosen)
    found = {f"{row['strategy']}/{row['blocks']}/{row['path']}": row for row in rows}
    groups = ("4/projected", "1/dense", "4/full")
    assert set(found) == {*chosen, *(f"{base}/{g}" for base in ("one", "each") for g in groups)}
    for name, row in found.items():
        assert {
            "bench", "model", "strategy", "gpus", "blocks", "rank", "path", "peak_gib",
            "tokens_per_s", "efficiency", "allreduce_mib_per_step", "dense_allreduce_mib_per_step",
        } <= set(row)  # fmt: skip
        for column, base in (("efficiency", "one"), ("efficiency_beside", "each")):
            rate = found[base + name[name.index("/") :]]["tokens_per_s"]
            assert row[column] == pytest.approx(row["tokens_per_s"] / rate, abs=1e-3)
        twice = name.endswith("4/projected") and row["strategy"] != "fsdp2"
        assert row["steps"] == (6 if twice else 3)
        assert len(row["step_ms_by_gpu"]) == 2
        if row["strategy"] in ("one", "each"):
            assert row["allreduce_mib_per_step"] == 0
    # Weights and norms of four blocks in bfloat16, and the last norm.
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 176 * 64 + 2 * 64
    dense = pytest.approx(2 * (4 * block + 64) / 2**20, rel=1e-2)
    # R of each, of rank 8; FSDP2 averages norms itself, and R in float32.
    low = 8 * (2 * 64 + 2 * 64 + 3 * 176)
    for strategy, size in (("ddp", 2 * (4 * low + 9 * 64)), ("fsdp2", 4 * 4 * low)):
        row = found[f"{strategy}/4/projected"]
        assert row["dense_allreduce_mib_per_step"] == dense
        assert row["allreduce_mib_per_step"] == pytest.approx(size / 2**20, rel=2e-2)
    assert found["ddp/4/full"]["allreduce_mib_per_step"] == dense
    whole = found["ddp/1/dense"]
    assert whole["allreduce_mib_per_step"] == pytest.approx(
        whole["dense_allreduce_mib_per_step"], rel=2e-2
    )
    assert found["fsdp2/1/dense"]["reduce_scatter_mib_per_step"] == pytest.approx(
        whole["dense_allreduce_mib_per_step"], rel=2e-2
    )


def test_a_case_that_fails_loses_itself_alone(tmp_path: Path) -> None:
    # No rank is 0, and plain AdamW has none.
    chosen = ["ddp/1/projected", "ddp/4/full"]
    file = tmp_path / "scale.json"
    rows, text = bench(file, "--cases", *chosen, "--rank", "0", fails=True)
    assert [row["path"] for row in rows] == ["full"] * 3
    for name in ("one/1/projected", "ddp/1/projected"):
        assert f"not measured: {name}: ValueError: rank: expected" in text
