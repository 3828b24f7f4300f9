"""The rows that benchmarks/bench_scale.py writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_rows_of_two_ranks(tmp_path: Path) -> None:
    file = tmp_path / "scale.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(ROOT / "benchmarks" / "bench_scale.py"), "--small", "--device", "cpu"]
    chosen = ["--cases", "ddp/4/projected", "fsdp2/4/projected", "ddp/1/dense"]
    subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *script, "--json", str(file), *chosen],
        # The Makefile keeps a script's folder off the path.
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    machine, *rows = json.loads(file.read_text())
    assert machine["bench"] == "machine"
    for row in rows:
        assert {
            "bench", "model", "strategy", "gpus", "blocks", "rank", "path", "peak_gib",
            "tokens_per_s", "efficiency", "allreduce_mib_per_step", "dense_allreduce_mib_per_step",
        } <= set(row)  # fmt: skip
        assert row["tokens_per_s"] > 0
    crossed = {
        (row["strategy"], row["blocks"], row["path"]): (
            row["allreduce_mib_per_step"],
            row["dense_allreduce_mib_per_step"],
        )
        for row in rows
    }
    assert crossed["one", 4, "projected"][0] == 0
    for strategy in ("ddp", "fsdp2"):
        low, dense = crossed[strategy, 4, "projected"]
        assert 0 < low < dense / 3
    low, dense = crossed["ddp", 1, "dense"]
    # Padding aside, it is all there.
    assert dense <= low < 1.1 * dense
