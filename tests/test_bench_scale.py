"""The rows that benchmarks/bench_scale.py writes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench_scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; it finds its neighbours by its folder."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("bench_scale")
    for name in {"bench_scale", "bench_train", "common"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the tables."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("figures")
    for name in {name for name in sys.modules if name.startswith(("figures", "quality"))} - before:
        sys.modules.pop(name, None)


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
            other = found[base + name[name.index("/") :]]["tokens_per_s_by_round"]
            rates = zip(row["tokens_per_s_by_round"], other, strict=True)
            ratios = sorted(ours / theirs for ours, theirs in rates)
            assert row[column] == pytest.approx(ratios[1], rel=5e-3)
            if column == "efficiency":
                low, high = sum(ratios[:2]) / 2, sum(ratios[1:]) / 2
                assert row["efficiency_low"] == pytest.approx(low, rel=5e-3)
                assert row["efficiency_high"] == pytest.approx(high, rel=5e-3)
        assert row["tokens_per_s"] == sorted(row["tokens_per_s_by_round"])[1]
        assert row["step_ms"] == pytest.approx(2e3 * 32 / row["tokens_per_s"], rel=5e-3)
        assert (row["rounds"], row["steps"], row["tokens"]) == (3, 6, "1x32")
        assert not row["compile"]
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


def test_names_of_cases_are_their_own(bench_scale: Any) -> None:
    names = [case.name for group in bench_scale.cases(32, True) for case in group]
    assert len(set(names)) == len(names)
    assert {"ddp/32/projected", "ddp/5/projected/compiled", "ddp/32/projected/4-rows"} <= set(names)
    assert "fsdp2/32/projected/prefetch" in names
    for group in bench_scale.cases(32, True):
        assert len({case.group for case in group}) == 1


def test_cores_are_shared_out_once(bench_scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_scale.cores_in("0-2,8\n") == {0, 1, 2, 8}
    monkeypatch.setattr(bench_scale.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5, 6})
    # The second thread of each core has a number of the upper half.
    monkeypatch.setattr(
        bench_scale.Path, "read_text", lambda path: f"{int(path.parts[5][3:]) % 4},9"
    )
    shares = [bench_scale.share_of_cores(i, 2, False) for i in range(2)]
    assert shares == [[0, 4, 1], [5, 2, 6]]
    assert bench_scale.share_of_cores(0, 7, False) == []


def test_the_table_shows_an_efficiency_below_its_own_base(
    figures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(strategy: str, rate: int, tokens: str = "1x2048", **changes: Any) -> dict[str, Any]:
        return {
            "strategy": strategy, "gpus": 2, "blocks": 32, "path": "projected", "tokens": tokens,
            "peak_gib": 9.0, "tokens_per_s": rate, "allreduce_mib_per_step": 1.0,
            "dense_allreduce_mib_per_step": None, **changes,
        }  # fmt: skip

    def rounds(count: int, efficiency: float, **changes: Any) -> dict[str, Any]:
        spread = {"efficiency_low": 0.5, "efficiency_high": 0.75}
        return {"rounds": count, "efficiency": efficiency, **spread, **changes}

    runs = [
        [row("one", 200), row("ddp", 180, efficiency=0.9), row("fsdp2", 100, efficiency=0.5)],
        [row("one", 210), row("ddp", 200, **rounds(6, 0.95), peak_gib=None), row("each", 205)],
        [
            row("one", 220), row("fsdp2", 132, **rounds(3, 0.6), prefetch=False),
            row("fsdp2", 110, **rounds(3, 0.5), prefetch=True),
            row("one", 400, "4x2048"), row("ddp", 396, "4x2048", **rounds(1, 0.99)),
            row("one", 250, "8x2048"),
        ],
    ]  # fmt: skip
    monkeypatch.setattr(figures, "load", lambda name, machine: runs[int(name)])
    monkeypatch.setattr(figures, "SCALE_RUNS", [str(run) for run in range(len(runs))])
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    _, _, *lines = figures.scale_table().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert [[cell[1], *cell[3:9]] for cell in cells] == [
        ["1 x 2048", "one GPU alone", "2", "", "9.00", "105", ""],
        ["1 x 2048", "DDP, 2 GPUs", "2", "6", "9.00", "200", "0.950 (0.500 to 0.750)"],
        ["1 x 2048", "one GPU alone", "3", "", "9.00", "110", ""],
        ["1 x 2048", "FSDP2, 2 GPUs", "3", "3", "9.00", "132", "0.600 (0.500 to 0.750)"],
        ["1 x 2048", "FSDP2, prefetching, 2 GPUs", "3", "3", "9.00", "110",
         "0.500 (0.500 to 0.750)"],
        ["4 x 2048", "one GPU alone", "3", "", "9.00", "200", ""],
        ["4 x 2048", "DDP, 2 GPUs", "3", "1", "9.00", "396", "0.990"],
    ]  # fmt: skip
