"""benchmarks/bench_train.py: rows have the agreed fields, and every case leaves the model bare."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FIELDS = [
    "bench", "model", "tokens", "provider", "blocks", "rank", "embeddings", "moments",
    "checkpointing", "peak_gib", "planned_gib", "tokens_per_s", "step_ms", "optimizer_ms",
    "refresh_ms",
]  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Any:
    """The benchmark as a module."""
    path = sys.path.copy()
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("bench_train", BENCHMARKS / "bench_train.py")
        assert spec is not None
        assert spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        sys.modules["bench_train"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = path
        sys.modules.pop("bench_train", None)


def test_names_select_one_case_each(bench: Any) -> None:
    names = [case.name for case in bench.cases()]
    assert len(set(names)) == len(names)


def test_rows_have_the_agreed_fields(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "train.json"
    chosen = ["7b/1x2048/owlore/5-blocks/freeze/bf16/std/checkpointed$", "7b/1x2048/embed"]
    words = ["--small", "--device", "cpu", "--no-plan", "--json", str(out), "--cases", *chosen]
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *words])
    bench.main()
    machine, *rows = json.loads(out.read_text())
    assert machine["bench"] == "machine"
    assert machine["copy_TB_s"] > 0
    assert [row["provider"] for row in rows] == ["owlore", "embed-head-only"]
    for row in rows:
        assert list(row)[: len(FIELDS)] == FIELDS
        assert row["step_ms"] > row["optimizer_ms"] > 0
        # On a CPU no peak is measured.
        assert row["peak_gib"] is None
    assert rows[0]["chosen"] == [0]


@pytest.mark.parametrize("provider", ["owlore", "lisa", "adamw-fused", "embed-head-only"])
def test_a_case_leaves_the_model_as_it_was(bench: Any, provider: str) -> None:
    model = bench.build(bench.model_config("llama2-7b", small=True), "cpu")
    kinds = [type(module) for module in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    case = next(c for c in bench.cases() if c.provider == provider)
    bench.checkpoint_blocks(model, True)
    made = bench.Provider(bench.shrunk(case, 4, 32), model, period=4)
    ids = bench.torch.arange(32)[None]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        made.optimizer.step()
    made.restore()
    assert [type(module) for module in model.modules()] == kinds
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, nn.Embedding))


@pytest.mark.parametrize("model", ["llama2-7b", "llama3-8b", "qwen3-4b"])
def test_a_table_holds_every_method_with_its_own_interval(bench: Any, model: str) -> None:
    table = [case for case in bench.cases() if case.model == model and case.tokens == "8x512"]
    assert {case.provider for case in table} == {
        "owlore", "peft-lora", "galore-torch", "adamw-fused", "lisa", "embed-head-only",
    }  # fmt: skip
    blocks = bench.planner.SHAPES[model][1]["num_hidden_layers"]
    for case in table:
        every = {5: 50, blocks: 200}.get(case.blocks)
        assert case.refresh_every == (every if case.provider == "owlore" else None)


def test_a_table_runs_at_once_and_is_planned(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "train.json"
    words = ["--small", "--device", "cpu", "--no-plan", "--json", str(out), "--cases"]
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *words, "qwen3-4b/8x512"])
    measure, failed = bench.measure, []

    def once_out_of_memory(case: Any, *args: Any) -> Any:
        if not failed:
            failed.append(case.name)
            raise bench.torch.OutOfMemoryError("no room")
        return measure(case, *args)

    monkeypatch.setattr(bench, "measure", once_out_of_memory)
    undo: list[Any] = []
    bench.galore_adamw(undo)
    undo.pop()()
    projector = sys.modules["galore_torch.galore_projector"].GaLoreProjector
    own = projector.get_orthogonal_matrix
    bench.main()
    assert projector.get_orthogonal_matrix is own
    _, *rows = json.loads(out.read_text())
    assert "owlore" in failed[0]
    assert len(rows) >= 6
    ours = [row for row in rows if row["provider"] == "owlore"]
    assert len(ours) == 3
    for row in ours:
        # tokens_per_s counts a share of a refresh.
        tokens = row["step_ms"] + row["refresh_ms"] / row["refresh_every"]
        assert row["tokens_per_s"] == pytest.approx(2 * 32 / tokens * 1e3)
        assert 0 < bench.planned_gib(row, small=True) < 0.1


@pytest.mark.parametrize("count", [32, 36])
def test_drawn_rows_reach_as_low_as_all_draws_do(bench: Any, count: int) -> None:
    case = next(case for case in bench.cases() if case.draws)
    config, chosen = bench.owlore_config(case, bench.DRAW_STEPS, count)
    assert not chosen
    lowest = [min(drawn) for drawn in bench.drawn_blocks(config, case.draws, count)]
    # The mean of the least of five of so many, over all draws, one by one.
    every = list(itertools.combinations(range(count), 5))
    wanted = sum(drawn[0] for drawn in every) / len(every)
    assert sum(lowest) / len(lowest) == pytest.approx(wanted, abs=0.1)
    assert len(set(lowest)) > 3


def test_a_drawn_row_is_the_mean_over_its_draws(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "train.json"
    words = ["--small", "--device", "cpu", "--no-plan", "--json", str(out), "--cases"]
    monkeypatch.setattr(
        sys, "argv", ["bench_train.py", *words, "7b/1x2048/owlore/5-blocks/freeze/bf16/std/stored"]
    )
    measure, rounds = bench.measure, []

    def counted(case: Any, *args: Any) -> Any:
        rounds.append((case.name, measure(case, *args)))
        return rounds[-1][1]

    monkeypatch.setattr(bench, "measure", counted)
    bench.main()
    _, drawn, worst = json.loads(out.read_text())
    # The worst draw's row is none of those that are measured again.
    assert ["draws" in name for name, _ in rounds] == [True] * bench.ROUNDS + [False]
    of = [each for name, each in rounds if "draws" in name]
    assert worst["chosen"] == [0]
    assert "draws" not in worst
    assert len(drawn["draws"]) == len(drawn["draw_ms"]) == bench.DRAWS
    for i, ms in enumerate(drawn["draw_ms"]):
        assert ms == pytest.approx(sorted(each.steps[i][0] for each in of)[1])
    assert drawn["step_ms"] == pytest.approx(sum(drawn["draw_ms"]) / bench.DRAWS)
    every = drawn["step_ms"] + drawn["refresh_ms"] / 50
    assert drawn["tokens_per_s"] == pytest.approx(32 / every * 1e3)
    assert len(drawn["round_ms"]) == bench.ROUNDS
    assert drawn["lowest"] == 1.5
    # The draws that hold most train the first block too, as the worst draw does.
    assert bench.planned_gib(drawn, small=True) == bench.planned_gib(worst, small=True)


def test_no_case_has_a_second_round_before_all_had_their_first(bench: Any) -> None:
    of = [case for case in bench.cases() if case.model == "llama2-7b"]
    order = bench.ordered(of, bench.ROUNDS)
    assert len(order) == sum(case.rounds for case in of)
    assert {case for case, _ in order} == set(of)
    before = [i for case, i in order if not case.last]
    assert before == sorted(before)
    assert max(before) == bench.ROUNDS - 1
    # The rest is what a run that is cut short can do without.
    assert all(case.last for case, _ in order[len(before) :])
    assert len(bench.ordered(of, 1)) == len(of)


class TickingClock:
    """A clock on which the steps of a draw take 10, 4 and 3 ms, of each 1 the optimizer's step."""

    def __init__(self, cuda: bool) -> None:
        self.marks = 0

    def mark(self) -> float:
        step, middle = divmod(self.marks, 2)
        self.marks += 1
        lasts = (10.0, 4.0, 3.0)
        before = sum(lasts[i % 3] for i in range(step))
        return before + (lasts[step % 3] - 1 if middle else 0)

    def between(self, begin: float, end: float) -> float:
        return end - begin


def test_what_a_draw_costs_is_all_beyond_its_last_step(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "Clock", TickingClock)
    case = next(case for case in bench.cases() if case.draws)
    model = bench.build(bench.model_config("llama2-7b", small=True), "cpu")
    args = argparse.Namespace(device="cpu", small=True, compile=False)
    found = bench.measure(bench.shrunk(case, 4, 32), model, 0, args)
    assert found.steps == [[3.0]] * case.draws
    assert found.ends == [1.0] * case.draws
    assert found.refreshes == [8.0] * case.draws


def test_compiled_rows_are_read_beside_a_rival(bench: Any) -> None:
    found = bench.compiled_cases()
    assert {case.provider for case in found} == {"owlore", "peft-lora", "galore-torch"}
    for case in found:
        rival = "peft-lora" if case.embeddings == "freeze" else "galore-torch"
        like = (rival, case.tokens, case.checkpointing, case.embeddings)
        assert like in {(c.provider, c.tokens, c.checkpointing, c.embeddings) for c in found}
    assert {case.blocks for case in found if case.draws} == {5}


@pytest.fixture
def figures(bench: Any) -> Any:
    """The module of the README's tables."""
    return importlib.import_module("figures")


def test_a_case_that_fails_leaves_the_others(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train.json"
    words = ["--small", "--device", "cpu", "--no-plan", "--json", str(out), "--cases"]
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *words, "8x512/peft", "8x512/embed"])
    measure = bench.measure

    def fails(case: Any, *args: Any) -> Any:
        if case.provider == "peft-lora":
            raise RuntimeError("the loss is nan")
        return measure(case, *args)

    monkeypatch.setattr(bench, "measure", fails)
    with pytest.raises(SystemExit, match="3 cases failed"):
        bench.main()
    assert "peft-lora/32-blocks/freeze/bf16/std/checkpointed: the loss is nan" in (
        capsys.readouterr().out
    )
    rows = json.loads(out.read_text())[1:]
    assert [row["provider"] for row in rows] == ["embed-head-only"] * 3


def row(**changes: Any) -> dict[str, Any]:
    """A row of ours of the benchmark, 32 blocks beside LoRA's shape."""
    return {
        "bench": "train", "model": "llama2-7b", "tokens": "16x512", "provider": "owlore",
        "blocks": 32, "rank": 128, "embeddings": "freeze", "moments": "bf16",
        "checkpointing": True, "peak_gib": 19.0, "planned_gib": None, "tokens_per_s": 1200.0,
        "step_ms": 700.0, "optimizer_ms": 10.0, "refresh_ms": 300.0, "side": "std",
        "compile": False, "refresh_every": None, "backward_through": False, **changes,
    }  # fmt: skip


def test_the_table_beside_lora_pairs_rows_of_one_run(
    figures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"provider": "peft-lora", "rank": 16, "side": None, "refresh_ms": None}
    draws = {"blocks": 5, "refresh_every": 50, "draws": [[0, 1, 2, 3, 9]], "lowest": 4.5}
    eager = [
        row(),
        row(**lora, tokens_per_s=1000.0, peak_gib=20.0),
        row(**lora, tokens_per_s=500.0, peak_gib=38.0, checkpointing=False),
        row(**draws, tokens_per_s=1500.0),
        row(blocks=5, chosen=[0, 6, 12, 19, 25], tokens_per_s=1300.0),
        row(norms="freeze", tokens_per_s=1250.0),
        row(blocks=4, chosen=[28, 29, 30, 31]),
        row(blocks=4, chosen=[28, 29, 30, 31], backward_through=True),
        row(embeddings="full"),
        row(side="reverse"),
        row(checkpointing=False, tokens_per_s=600.0, peak_gib=57.0),
        row(tokens="1x2048"),
    ]
    compiled = [
        row(compile=True, tokens_per_s=1800.0),
        row(**lora, compile=True),
        row(compile=True, embeddings="full", tokens_per_s=1700.0),
    ]
    results = {"train": eager, "train_compiled": compiled}
    monkeypatch.setattr(figures, "load", lambda name: results[name])
    monkeypatch.setattr(Path, "is_file", lambda path: path.stem in results)
    _, _, *lines = figures.lora_table().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert [cell[1:6] for cell in cells] == [
        ["yes", "32 blocks", "0.95", "1,200 / 1,000", "1.20"],
        ["yes", "32 blocks, norms frozen", "0.95", "1,250 / 1,000", "1.25"],
        ["yes", "5 blocks as drawn (the lowest is block 4.5 on average)", "0.95",
         "1,500 / 1,000", "1.50"],
        ["yes", "5 blocks, the worst draw (block 0 is one)", "0.95", "1,300 / 1,000", "1.30"],
        ["no", "32 blocks", "1.50", "600 / 500", "1.20"],
    ]  # fmt: skip
    assert [cell[6:] for cell in cells] == [["1,800 / 1,200", "1.50"], *[["", ""]] * 4]


def test_the_table_of_methods_counts_what_bases_cost(
    figures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    galore = {"provider": "galore-torch", "embeddings": "full", "side": None}
    rows = [
        row(tokens="8x512", **galore, tokens_per_s=900.0, tokens_per_s_with_svd=300.0),
        row(tokens="8x512", provider="peft-lora", side=None, tokens_per_s=1000.0, peak_gib=18.0),
        row(tokens="8x512", blocks=5, refresh_every=50, draws=[[0, 1, 2, 3, 9]], lowest=4.5),
        row(tokens="8x512", provider="lisa", blocks=2, embeddings="full", moments="fp32"),
        row(tokens="8x512", refresh_every=200, tokens_per_s=1100.0),
        row(tokens="8x512", refresh_every=200, model="qwen3-4b", blocks=36, peak_gib=11.0),
        row(tokens="1x2048"),
    ]
    monkeypatch.setattr(figures, "load", lambda name: rows)
    monkeypatch.setattr(Path, "is_file", lambda path: path.stem == "train_methods")
    _, _, *lines = figures.methods_table().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    # Who rests its embedding first; a ratio only where LoRA's row is of the same model.
    assert cells == [
        ["owlore, all blocks, new bases every 200 steps", "frozen", "19.00", "1,100 (1.10)",
         "11.00", "1,200"],
        ["owlore, 5 blocks, drawn every 50 steps", "frozen", "19.00", "1,200 (1.20)", "", ""],
        ["LoRA r 16 (PEFT)", "frozen", "18.00", "1,000 (1.00)", "", ""],
        ["LISA (preset), 2 blocks, fp32 moments", "trained", "19.00", "1,200 (1.20)", "", ""],
        ["GaLore (galore-torch) with its SVDs", "trained", "19.00", "300 (0.30)", "", ""],
        ["GaLore (galore-torch), SVDs left out", "trained", "19.00", "900 (0.90)", "", ""],
    ]  # fmt: skip


def test_a_case_that_freezes_the_norms_trains_none(bench: Any) -> None:
    model = bench.build(bench.model_config("llama2-7b", small=True), "cpu")
    case = next(c for c in bench.cases() if c.norms == "freeze")
    made = bench.Provider(bench.shrunk(case, 4, 32), model, period=4)
    ids = bench.torch.arange(32)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if "norm" in name and p.requires_grad]
    made.restore()
