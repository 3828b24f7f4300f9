"""The pure parts of the quality benchmark: data, packing, likelihoods, statistics, jobs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import tiny_model
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import quality
import quality_data
import quality_embeddings
import quality_figures
import quality_queue
import quality_stats
import quality_train
from quality_data import Question, Tokens

from owlore import OwLore, OwLoreConfig

QUESTIONS = [
    Question("arc_easy", "Which one is red?", ("blood", "a leaf", "the sky at noon"), 0),
    Question("arc_easy", "Where do fish live?", ("water", "air"), 0),
    Question("openbookqa", "Ice is", ("cold", "hot"), 0),
]


def direct_log_likelihood(model, ids: tuple[int, ...], prompt: int) -> float:
    """One sequence alone, token by token."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(sum(logits[i - 1, ids[i]] for i in range(prompt, len(ids))))


def test_likelihoods_in_padded_batches_are_those_of_single_sequences() -> None:
    model, tokenizer = tiny_model.model(), tiny_model.tokenizer()
    sequences = quality_data.answer_sequences(QUESTIONS, tokenizer)
    assert [len(s.ids) - s.prompt for s in sequences[:2]] == [len(" blood"), len(" a leaf")]
    sums, counts = quality_train.log_likelihoods(model, sequences, tokens=100)
    assert counts == [len(s.ids) - s.prompt for s in sequences]
    for found, sequence in zip(sums, sequences, strict=True):
        expected = direct_log_likelihood(model.eval(), sequence.ids, sequence.prompt)
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_packed_batch_has_the_loss_of_its_rows() -> None:
    model, tokenizer = tiny_model.model(), tiny_model.tokenizer()
    rows = quality_data.training_sequences(QUESTIONS * 3, tokenizer, 80)
    (batch,) = quality_train.make_batches(rows, len(rows), 128, seed=0)
    assert batch.ids.shape[0] < len(rows)
    loss = quality_train.batch_loss(
        model.get_decoder(), model.get_output_embeddings(), batch.tensors()
    )
    expected = -sum(direct_log_likelihood(model, s.ids, s.prompt) for s in rows)
    assert float(loss.detach()) == pytest.approx(
        expected / sum(len(s.ids) - s.prompt for s in rows), 1e-5
    )


def test_packing_fits_and_keeps_every_row() -> None:
    lengths = [5, 9, 3, 10, 1, 7, 2]
    lines = quality_train.pack(lengths, 10)
    assert sorted(i for line in lines for i in line) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in line) <= 10 for line in lines)
    assert len(lines) == 4
    with pytest.raises(ValueError, match="a row of 11 tokens in a line of 10"):
        quality_train.pack([11], 10)


def test_batches_of_a_run_share_one_shape_and_an_order_that_the_seed_gives() -> None:
    rows = [Tokens(tuple(range(1, n + 2)), 1) for n in range(1, 40)]
    first = quality_train.make_batches(rows, 4, 64, seed=1)
    assert len(first) == 9
    assert len({tuple(t.shape for t in batch.tensors()) for batch in first}) == 1
    again = quality_train.make_batches(rows, 4, 64, seed=1)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    other = quality_train.make_batches(rows, 4, 64, seed=2)
    assert not torch.equal(first[0].ids, other[0].ids)
    assert all(float(batch.weights.sum()) == pytest.approx(1) for batch in first)


def test_training_lowers_the_loss() -> None:
    model, tokenizer = tiny_model.model(), tiny_model.tokenizer()
    rows = quality_data.training_sequences(QUESTIONS * 40, tokenizer, 80)
    batches = quality_train.make_batches(rows, 8, 160, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = quality_train.batch_loss(
        model.get_decoder(), model.get_output_embeddings(), batches[-1].tensors()
    )
    result = quality_train.train(model, optimizer, batches, autocast=False, graphs=True)
    after = quality_train.batch_loss(
        model.get_decoder(), model.get_output_embeddings(), batches[-1].tensors()
    )
    assert float(after.detach()) < 0.8 * float(before.detach())
    # Gradients and two moments.
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert result.state_bytes == 3 * weights
    assert result.captures == 0


def test_a_captured_pass_holds_until_the_next_draw() -> None:
    model = tiny_model.model()
    optimizer = OwLore(
        model, blocks=2, rank=4, interval=3, distribution="uniform", gradient="dense"
    )
    phase = quality_train._Phase(optimizer)
    keys = []
    for _ in range(6):
        keys.append(phase())
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Blocks are drawn in the forward passes of steps 0 and 3, which must run in Python.
    assert [key is None for key in keys] == [True, False, False, True, False, False]
    assert keys[1] == keys[2]
    assert keys[4] == keys[5] == optimizer.active_blocks


def test_the_rate_rises_then_falls_to_zero() -> None:
    rates = [quality_train.schedule(step, 100, 3) for step in range(101)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1], abs=0.02)
    assert rates[100] == 0
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_questions_of_the_test_files_are_dropped_however_they_are_written() -> None:
    train = [
        Question("a", "What is  this?", ("x", "y"), 0),
        Question("a", "Another one", ("x", "y"), 0),
        Question("b", "WHAT IS THIS", ("p", "q"), 1),
    ]
    held_out = [Question("c", "what is this", ("z",), 0)]
    kept, dropped = quality_data.drop_contaminated(train, held_out)
    assert [q.question for q in kept] == ["Another one"]
    assert dropped == {"a": 1, "b": 1}


def test_the_validation_split_shares_no_question_with_the_training_rows() -> None:
    train = [Question(task, f"question {i // 2}", (str(i),), 0) for task in "ab" for i in range(40)]
    kept, validation = quality_data.split_validation(train, 10)
    assert len(validation) == 10
    assert {q.task for q in validation} == {"a", "b"}
    asked = {q.question for q in validation}
    assert not asked & {q.question for q in kept}
    assert quality_data.split_validation(train, 10) == (kept, validation)


def test_a_training_row_left_in_a_test_file_stops_the_run(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    rows = [{"question": f"question {i}", "answer": "a"} for i in range(600)]
    for part, own in (("train", rows), ("test", [*rows[:3], {"question": "new", "answer": "b"}])):
        text = "".join(json.dumps(row) + "\n" for row in own)
        (folder / f"{part}.jsonl").write_text(text)
    train, test, dropped = quality.questions_of(tmp_path, "gsm8k", "test")
    assert (len(train), len(test), dropped) == (97, 4, {"gsm8k": 3})
    monkeypatch.setattr(quality_data, "split_validation", lambda rows, count: (rows, rows[:1]))
    with pytest.raises(SystemExit, match="a training row asks a held-out question"):
        quality.questions_of(tmp_path, "gsm8k", "test")


def test_folds_are_disjoint_and_share_no_question_with_their_training_rows() -> None:
    train = [Question(task, f"{task} {i}", (str(i),), 0) for task in "ab" for i in range(40)]
    train += train[:5]
    found = [quality_data.fold(train, number, rows=15) for number in range(3)]
    asked = [{q.question for q in held_out} for _, held_out in found]
    for (kept, held_out), own in zip(found, asked, strict=True):
        assert [sum(q.task == task for q in held_out) for task in "ab"] == [15, 13]
        assert not own & {q.question for q in kept}
        assert len(kept) + len(held_out) >= len(train) - 5
    # A row that stands twice may be in two folds.
    assert sum(map(len, asked)) - len(set.union(*asked)) <= 5
    # A task of few rows has as many in each fold.
    few = [q for q in train if q.task == "b"]
    assert [len(quality_data.fold(few, number)[1]) for number in range(3)] == [13, 13, 13]


def test_texts_are_cut_into_pieces_that_share_no_line(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [f"line {i:03} " + "word " * 12 for i in range(200)]
    (folder / "tiny_shakespeare.txt").write_text("\n".join(lines))
    (folder / "wikitext2_valid.txt").write_text("\n".join(lines[:100]))
    (folder / "wikitext2_test.txt").write_text("\n".join(lines[100:]))
    for task, counts in (("shakespeare", (161, 18, 21)), ("wikitext2", (89, 11, 100))):
        parts = quality_data.read_parts(tmp_path, task)
        assert list(parts) == ["train", "validation", "test"]
        # Cut at a line's end: no line is lost or split.
        pieces = [part.splitlines() for part in parts.values()]
        assert [line for piece in pieces for line in piece] == lines
        assert [len(piece) for piece in pieces] == list(counts)
        assert quality.parts_of(tmp_path, task, "test") == (parts["train"], parts["test"])
    (folder / "wikitext2_test.txt").write_text(lines[3].upper())
    with pytest.raises(SystemExit, match="a line of the training text is held out"):
        quality.parts_of(tmp_path, "wikitext2", "validation")
    tokenizer = tiny_model.tokenizer()
    rows = quality_data.text_sequences(lines[0] * 4, tokenizer, 16)
    assert {(len(row.ids), row.prompt) for row in rows} == {(16, 1)}
    (batch,) = quality_train.make_batches(rows, 4, 16, seed=0, steps=1, lines=4)
    assert tuple(batch.ids.shape) == (4, 16)
    assert int((batch.weights > 0).sum()) == 4 * 15


def test_accuracy_goes_by_likelihood_per_character() -> None:
    # The long answer is less likely in all, but more likely per character.
    sums, lengths = [-2.0, -4.0, -1.0, -3.0], [2, 8, 1, 2]
    assert quality_stats.accuracy(sums, lengths, [2, 2], [1, 1]) == [True, False]


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (30, 2.04227)]
)
def test_quantiles_of_students_distribution(df: int, expected: float) -> None:
    assert quality_stats.t_quantile(df) == pytest.approx(expected, rel=1e-5)


def test_paired_difference_takes_the_seeds_in_common() -> None:
    mine, theirs = {0: 1.0, 1: 2.0, 2: 4.0, 7: 9.0}, {0: 0.5, 1: 1.0, 2: 2.5}
    mean, low, high = quality_stats.paired(mine, theirs) or (0, 0, 0)
    assert mean == pytest.approx(1.0)
    # Deviation .5 of three differences.
    assert high - mean == pytest.approx(4.30265 * 0.5 / 3**0.5, rel=1e-5)
    assert mean - low == pytest.approx(high - mean)
    assert quality_stats.paired(mine, {0: 1.0}) is None


def row(method: str, lr: float, value: float, split: str, seed: int = 0, variant="default") -> dict:
    return {
        "bench": "quality", "task": "commonsense", "method": method, "variant": variant, "lr": lr,
        "seed": seed, "split": split, "accuracy": value, "per_task": {"arc_easy": value},
        "peak_gib": 1.0, "state_mib": 2.0, "seconds": 3.0, "trained_parameters": 4,
    }  # fmt: skip


def test_rates_are_chosen_on_the_validation_split_alone() -> None:
    rows = [
        row("full", 1e-4, 50, "validation"), row("full", 3e-4, 60, "validation"),
        row("full", 1e-3, 90, "test"), row("owlore", 1e-4, 40, "validation"),
        row("owlore", 1e-3, 45, "validation", variant="blocks=all"),
        row("lora", 3e-4, 7, "validation"), row("lora", 1e-4, 7, "validation"),
    ]  # fmt: skip
    assert quality_stats.best_rates(rows, "commonsense") == {
        "full": ("default", 3e-4), "owlore": ("blocks=all", 1e-3), "lora": ("default", 1e-4),
    }  # fmt: skip


def test_summary_compares_seed_by_seed() -> None:
    rows = [row("full", 1e-4, 50.0 + seed, "test", seed) for seed in range(3)]
    rows += [row("lora", 3e-4, 49.0 + seed, "test", seed) for seed in range(3)]
    table = quality_stats.summarise(rows, "commonsense", "test")
    assert [entry["method"] for entry in table] == ["full", "lora"]
    assert table[1]["against"] == pytest.approx((-1.0, -1.0, -1.0))
    other = quality_stats.summarise(rows, "commonsense", "test", ("lora", "default"))
    assert other[0]["against"] == pytest.approx((1.0, 1.0, 1.0))
    assert table[1]["mean"] == 50.0
    assert table[1]["deviation"] == pytest.approx(1.0)


def test_summary_compares_a_variant_with_its_base_and_with_other_distributions() -> None:
    both = "blocks=all,embeddings=freeze,head=freeze"
    assert quality_stats.base_of("default", {"default"}) is None
    assert quality_stats.base_of("rank=32", {"default"}) == "default"
    assert quality_stats.base_of(both, {"default", "blocks=all", "head=freeze"}) == "blocks=all"
    assert quality_stats.base_of(f"{both},rank=32", {both, "blocks=all"}) == both
    values = {
        ("full", "default", 1e-4): (50, 51, 52), ("full", "default", 3e-4): (60, 60, 60),
        ("full", "head=freeze", 1e-4): (70, 71, 72, 73),
        ("owlore", "default", 3e-4): (45, 46, 47), ("owlore", "rank=32", 3e-4): (44, 44, 47),
        ("uniform", "default", 3e-4): (44, 45, 46), ("uniform", "default", 1e-3): (10, 10, 10),
        ("reverse", "rank=32", 3e-4): (40, 41), ("lora", "default", 3e-4): (1,),
    }  # fmt: skip
    rows = [
        {**row(method, lr, value, "test", seed, variant), "chosen": lr == 1e-4,
         "state_mib": 8.0 if method == "full" else 2.0, "peak_gib": 3.0 - seed}
        for (method, variant, lr), of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]  # fmt: skip
    timed = [{**row("owlore", 1e-3, 0, "test"), "seconds": 9.0}]
    table = quality_stats.summarise(rows, "commonsense", "test", timed=timed)
    found = {(e["method"], e["variant"], e["lr"]): e for e in table}
    # The reference is the chosen rate of the default, whatever did better.
    own, low = found["owlore", "default", 3e-4], found["owlore", "rank=32", 3e-4]
    assert own["against"] == pytest.approx((-5, -5, -5))
    assert found["full", "default", 1e-4]["against"] is None
    assert found["lora", "default", 3e-4]["against"] is None
    # Differences -1, -2 and 0; deviation 1.
    half = 4.302653 / 3**0.5
    assert low["base"] == pytest.approx((-1, -1 - half, -1 + half), rel=1e-5)
    assert (own["base"], low["base_name"]) == (None, "default")
    assert own["uniform"] == pytest.approx((1, 1, 1))
    assert own["reverse"] is None
    assert low["reverse"] == pytest.approx((3.5, 3.5 - 12.7062 / 2, 3.5 + 12.7062 / 2), rel=1e-5)
    assert found["full", "default", 3e-4]["uniform"] is None
    assert own["state_share"] == 0.25
    assert own["seconds"] == 9.0
    assert low["seconds"] is None
    assert quality_stats.interval(own["against"], "gsm8k") == "-5.0000 [-5.0000, -5.0000]"


def test_variants_are_options() -> None:
    assert quality.parse_variant("default") == {}
    assert quality.parse_variant("blocks=all,rank=64,floor=0.2,side=auto") == {
        "blocks": "all", "rank": 64, "floor": 0.2, "side": "auto",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "trained"),
    [("blocks=all", True), ("blocks=all,embeddings=freeze,head=freeze", False)],
)  # fmt: skip
def test_a_variant_trains_what_it_says_whatever_the_defaults_are(
    variant: str, trained: bool
) -> None:
    bench = quality.Bench.__new__(quality.Bench)
    bench.args = argparse.Namespace(device="cpu")
    for method in ("owlore", "galore", "full"):
        model = tiny_model.model()
        own = {"full": "default", "galore": "default", "owlore": "blocks=all"}[method]
        chosen = own if trained else variant
        job = quality.Job("commonsense", method, chosen, 1e-3, 0, "test")
        options = {**quality.METHODS[method], **quality.parse_variant(chosen), "rank": 4}
        options["distribution"] = "uniform"
        _, _, count, _ = bench.build(job, model, options)
        ends = sum(p.numel() for p in {
            *model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()
        })  # fmt: skip
        every = sum(p.numel() for p in tiny_model.model().parameters())
        assert count == (every if trained else every - ends)


def test_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    wanted = list(quality.jobs("validation", []))
    assert len({job.key for job in wanted}) == len(wanted) >= 27
    rows = tmp_path / "rows.jsonl"
    finished = [
        {"bench": "quality", **dict(zip(quality.Job._fields[:6], job.key, strict=True))}
        for job in wanted[:2]
    ]
    rows.write_text("".join(json.dumps(entry) + "\n" for entry in finished * 2))
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"bench": "machine"}, finished[0]]))
    done = quality.read_rows([rows, results, tmp_path / "missing"])
    assert {quality.key_of(entry) for entry in done} == {job.key for job in wanted[:2]}


def test_the_test_table_needs_the_validation_table(tmp_path: Path) -> None:
    args = argparse.Namespace(tables=["test"], only=None, rows=tmp_path / "none.jsonl", done=[])
    with pytest.raises(SystemExit, match=r"no validation rows of full, .*: run validation first"):
        quality.run(args)
    assert list(quality.jobs("test", [])) == []
    rows = rows_of(quality.jobs("validation", []))
    assert {row["seed"] for row in rows} == {0}
    rows = rows_of(quality.jobs("validation", rows))
    chosen = [job for job in quality.jobs("test", rows) if job.chosen]
    assert len(chosen) == 5 * len(quality.MAIN)
    assert {job.split for job in chosen} == {"test"}


def rows_of(jobs) -> list[dict]:
    """Rows as finished runs leave them, the better the higher the rate and the fewer options."""
    return [
        {**job._asdict(), "bench": "quality",
         "accuracy": 10 + 1e4 * job.lr - 2 * job.variant.count("=")}
        for job in jobs
    ]  # fmt: skip


def test_a_method_is_tested_once_its_own_validation_is_complete() -> None:
    wanted = list(quality.jobs("validation", rows_of(quality.jobs("validation", []))))
    rows = rows_of(job for job in wanted if job.method in ("full", "lora"))
    assert {job.method for job in quality.jobs("test", rows)} == {"full", "lora"}
    assert {job.lr for job in quality.jobs("test", rows)} == {1e-3}
    for missing in (job for job in wanted if job.method == "lora" and job.lr == 1e-3):
        without = [row for row in rows if quality.key_of(row) != missing.key]
        assert {job.method for job in quality.jobs("test", without)} == {"full"}
        # A run that failed is not waited for.
        left = {missing.key}
        left |= {job.key for job in quality.jobs("validation", without, left)}
        found = {job.method: job.lr for job in quality.jobs("test", without, left)}
        assert found == {"full": 1e-3, "lora": 3e-4 if missing.seed == 0 else 1e-3}
    # The controls wait for the default with one seed, not for variants and more seeds.
    default = [job for job in wanted if job.method == "owlore" and job.variant == "default"]
    default += [job for job in wanted if job.method == "full"]
    default = [job for job in default if job.seed == 0]
    controls = list(quality.jobs("controls", rows_of(default)))
    assert {job.lr for job in controls} == {1e-3}
    distributions = list(quality.jobs("distributions", rows_of(default)))
    assert {job.key[1:3] for job in distributions} == set(quality.DISTRIBUTIONS)
    assert [job.seed for job in distributions[:7]] == [0] * 6 + [1]
    assert len(distributions) == 5 * len(quality.DISTRIBUTIONS)
    assert "reverse" in {job.method for job in controls}


def test_runs_near_the_best_are_run_with_more_seeds_and_their_mean_decides() -> None:
    def wanted(rows, method="full", **how):
        return quality.validation_jobs("commonsense", method, rows, **how)

    def validation(lr, values, method="full"):
        return [row(method, lr, v, "validation", seed) for seed, v in enumerate(values)]

    first = validation(1e-4, [46.0]) + validation(3e-4, [46.8]) + validation(1e-3, [45.7])
    assert {job.seed for job in wanted(first[:2])} == {0}
    again = [(job.lr, job.seed) for job in wanted(first) if job.seed]
    assert again == [(1e-4, 1), (3e-4, 1), (1e-4, 2), (3e-4, 2)]
    assert {job.seed for job in wanted(first, again=False)} == {0}
    # A run that failed neither counts nor is waited for.
    found = wanted(first[:2], failed={wanted([])[2].key})
    assert [(job.lr, job.seed) for job in found[3:]] == again
    slow = [{**entry, "method": "dora"} for entry in first]
    assert {job.seed for job in wanted(slow, "dora")} == {0}
    # Alone, 3e-4 is the best, and 1e-3 better than the mean of either.
    done = validation(1e-4, [46.0, 45.4, 45.6]) + validation(3e-4, [46.8, 44.0, 44.1]) + first[2:]
    assert quality.chosen_rates("commonsense", done[:-2], methods=["full"]) == {}
    assert quality.chosen_rates("commonsense", done, methods=["full"]) == {
        "full": ("default", 1e-4)
    }
    how = {"methods": ["full"], "again": False}
    assert quality.chosen_rates("commonsense", done, **how) == {"full": ("default", 3e-4)}


def test_a_best_rate_at_the_end_of_the_grid_is_followed_by_one_beyond_it() -> None:
    def validation(losses):
        rows = [
            {**row("lora", lr, 0, "validation"), "task": "gsm8k", "loss": loss}
            for lr, loss in losses.items()
        ]
        jobs = quality.validation_jobs("gsm8k", "lora", rows)
        return [job.lr for job in jobs], quality.chosen_rates("gsm8k", rows, methods=["lora"])

    grid = list(quality.RATES)
    assert validation({1e-4: 0.8, 3e-4: 0.6, 1e-3: 0.7}) == (grid, {"lora": ("default", 3e-4)})
    falling = {1e-4: 0.8, 3e-4: 0.7, 1e-3: 0.6}
    assert validation(falling) == ([*grid, 3e-3], {})
    assert validation({**falling, 3e-3: 0.5}) == ([*grid, 3e-3], {"lora": ("default", 3e-3)})
    assert validation({**falling, 3e-3: 0.7}) == ([*grid, 3e-3], {"lora": ("default", 1e-3)})


def test_rivals_have_rates_of_their_own_for_what_embeddings_do() -> None:
    assert list(quality.jobs("embeddings", [])) == []
    rows = rows_of(quality.jobs("embeddings-validation", []))
    for entry in rows:
        if (entry["method"], entry["lr"]) == ("full", 3e-4):
            entry["accuracy"] = 99.0
    assert list(quality.jobs("embeddings", rows)) == []
    every = rows_of(quality.jobs("embeddings-validation", rows))
    for entry in every:
        if (entry["method"], entry["lr"]) == ("full", 3e-4):
            entry["accuracy"] = 99.0
    found = list(quality.jobs("embeddings", every))
    assert {job.lr for job in found if job.method == "full"} == {3e-4}
    assert {job.lr for job in found if job.method != "full"} == {1e-3}
    assert {(job.method, job.variant) for job in found} == set(quality.EMBEDDINGS)
    assert len(found) == 5 * len(quality.EMBEDDINGS)
    # They are no candidates: what is compared as full fine-tuning trains all weights at one rate.
    assert quality.chosen_rates("commonsense", every) == {}
    assert not any(job.chosen for job in found)


def embedding_rows(jobs, accuracy) -> list[dict]:
    """Rows of finished runs, judged by accuracy(job)."""
    return [
        {**job._asdict(), "bench": "quality", "accuracy": accuracy(job),
         "loss": 9 - accuracy(job) / 100}
        for job in jobs
    ]  # fmt: skip


def test_each_setting_of_the_embeddings_has_a_rate_of_its_own() -> None:
    frozen = "blocks=all,embeddings=freeze,head=freeze"

    def accuracy(job):
        # Frozen is best at the grid's upper end, the others at its lower one.
        lucky = 2 if job.key[2:5] == (frozen, 1e-4, 2) else 0
        value = job.lr * 1e3 if job.variant == frozen else -job.lr * 1e4
        return 50 + value + job.seed / 10 + lucky

    def next_rows(table, rows, failed=()):
        have = {quality.key_of(r) for r in rows} | set(failed)
        new = {job.key: job for job in quality.jobs(table, rows, failed) if job.key not in have}
        return [job for job in new.values() if job.method == "owlore"]

    rows = []
    first = next_rows("folds", rows)
    assert len(first) == 27
    assert {(job.split, job.seed) for job in first} == {("fold", k) for k in range(3)}
    rows += embedding_rows(first[:-1], accuracy)
    # Two settings are complete, of which one rate beyond the grid's end is tried.
    beyond = next_rows("folds", rows)
    assert sorted({(job.variant, job.lr) for job in beyond}) == [
        ("blocks=all", 3e-5), ("blocks=all,dense_lr=lr/3", 1e-3), (frozen, 3e-3),
    ]  # fmt: skip
    assert next_rows("folds-test", rows) == []
    while todo := next_rows("folds", rows):
        rows += embedding_rows(todo, accuracy)
    tuned = quality_embeddings.tuned("commonsense", "owlore", rows)
    assert {variant: lr for variant, (lr, _) in tuned.items()} == {
        "blocks=all": 3e-5, frozen: 3e-3, "blocks=all,dense_lr=lr/3": 3e-5,
    }  # fmt: skip
    assert tuned[frozen][1] == pytest.approx(50 + 3 + 0.1)
    assert quality_embeddings.chosen("commonsense", rows) == {"owlore": (frozen, 3e-3)}
    test = next_rows("folds-test", rows)
    assert [job.seed for job in test] == [s for s in range(5, 10) for _ in range(3)]
    assert {(job.variant, job.lr) for job in test if job.chosen} == {(frozen, 3e-3)}
    # Of the rivals but full fine-tuning only the chosen setting is tested.
    rivals = []
    while todo := [
        job for job in quality.jobs("folds", rivals)
        if job.method in ("lisa", "full") and job.key not in {quality.key_of(r) for r in rivals}
    ]:  # fmt: skip
        rivals += embedding_rows(todo, accuracy)
    found = {(job.method, job.variant) for job in quality.jobs("folds-test", rivals)}
    assert len({key for key in found if key[0] == "full"}) == 3
    assert len({key for key in found if key[0] == "lisa"}) == 1


def test_a_text_has_more_seeds_at_the_best_rate() -> None:
    def owlore(table, rows):
        have = {quality.key_of(r) for r in rows}
        return [
            job for job in quality.jobs(table, rows)
            if job.method == "owlore" and job.task == "wikitext2" and job.key not in have
        ]  # fmt: skip

    def accuracy(job):
        return 50 - abs(job.lr - 3e-4) * 1e3 + (job.variant == "blocks=all") * job.seed

    rows = embedding_rows(owlore("text-validation", []), accuracy)
    assert {(r["seed"], r["split"]) for r in rows} == {(0, "validation")}
    more = owlore("text-validation", rows)
    assert sorted((job.lr, job.seed) for job in more) == [(3e-4, s) for s in (1, 2) for _ in "abc"]
    assert owlore("text", rows) == []
    failed = {more[0].key}
    assert quality_embeddings.chosen("wikitext2", rows, {job.key for job in more})["owlore"]
    rows += embedding_rows(more[1:], accuracy)
    assert quality_embeddings.chosen("wikitext2", rows) == {}
    assert quality_embeddings.chosen("wikitext2", rows, failed)["owlore"] == ("blocks=all", 3e-4)
    rows += embedding_rows(more[:1], accuracy)
    assert {job.lr for job in owlore("text", rows)} == {3e-4}
    # Both texts use the same compiled blocks.
    kinds = {
        quality.kind(quality.Job(task, "full", "default", 1e-4, 0, "test"))
        for task in ("wikitext2", "shakespeare", "gsm8k")
    }
    assert len(kinds) == 2


def settled(wins: int, differences: dict[str, float]) -> list[dict]:
    """Rows of all runs of `owlore`: frozen wins on so many tasks, and tests better by so much."""

    def accuracy(job):
        value = 60 - abs(job.lr - 3e-4) * 1e3
        place = list(quality_embeddings.PLANS).index(job.task)
        if "freeze" in job.variant:
            value += differences.get(job.task, 0) if job.split == "test" else place < wins
            value -= 0.5 if job.split != "test" else 0
        return value

    rows: list[dict] = []
    for tables in (("folds", "text-validation", "gsm8k-embeddings-validation"),
                   ("folds-test", "text", "gsm8k-embeddings")):  # fmt: skip
        while True:
            have = {quality.key_of(r) for r in rows}
            new = {job.key: job for table in tables for job in quality.jobs(table, rows)
                   if job.method == "owlore" and job.key not in have}  # fmt: skip
            if not new:
                break
            rows += embedding_rows(new.values(), accuracy)
    return rows


@pytest.mark.parametrize(
    ("wins", "differences", "expected"),
    [
        (3, {}, True), (2, {}, False), (4, {"commonsense": -0.4}, True),
        (4, {"commonsense": -0.6}, False), (4, {"gsm8k": -0.9}, True),
        (4, {"shakespeare": -1.1}, False),
    ],
)  # fmt: skip
def test_the_rule_for_the_default(wins: int, differences: dict, expected: bool) -> None:
    rows = settled(wins, differences)
    frozen, third = quality_embeddings.verdict(rows)
    assert (frozen.setting, frozen.default, third.default) == ("frozen", expected, False)
    assert len(frozen.chosen) == wins
    for task, value in differences.items():
        found = frozen.differences[task]
        assert found is not None
        assert found[0] == pytest.approx(value if task == "commonsense" else value / 100)
    # While tests are missing nothing becomes the default.
    early = [r for r in rows if r["split"] != "test"]
    assert quality_embeddings.verdict(early)[0].default is (None if wins > 2 else False)


def test_the_table_of_all_tasks_compares_with_full_fine_tuning() -> None:
    frozen = "blocks=all,embeddings=freeze,head=freeze"

    def runs(method, lr, score, task="commonsense", variant="default", chosen=False, first=5):
        made = [
            {**row(method, lr, score + s, "test", s, variant), "task": task, "tuned": True,
             "loss": score + s / 10, "chosen": chosen}
            for s in range(first, first + 3)
        ]  # fmt: skip
        return made

    rows = runs("full", 1e-4, 40.0)
    rows += runs("full", 3e-4, 41.0, variant="embeddings=freeze,head=freeze", chosen=True)
    rows += runs("owlore", 3e-4, 40.5, variant=frozen, chosen=True)
    rows += runs("owlore", 3e-4, 40.25, variant=f"{frozen},norms=freeze")
    rows += runs("lora", 1e-3, 39.0, chosen=True)
    # Of other rates nothing was named before the test.
    rows += [{**r, "tuned": False} for r in runs("lora", 1e-4, 50.0)]
    rows += runs("full", 3e-4, 0.6, "gsm8k", first=0)
    rows += runs("lora", 1e-3, 0.5, "gsm8k", chosen=True, first=0)
    head, cells = quality_figures.tasks_table(rows)
    assert all(len(line) == len(head) for line in cells)
    assert [line[:4] for line in cells] == [
        ["full fine-tuning", "trained", "46.00", "0.7000"],
        ["full fine-tuning", "frozen", "**47.00** +1.00 [+1.00, +1.00]", ""],
        ["OwLore", "frozen", "**46.50** +0.50 [+0.50, +0.50]", ""],
        ["OwLore's defaults at 0.0003", "frozen", "46.25 +0.25 [+0.25, +0.25]", ""],
        ["LoRA r 16", "as chosen", "**45.00** -1.00 [-1.00, -1.00]",
         "**0.6000** -0.1000 [-0.1000, -0.1000]"],
    ]  # fmt: skip


def test_fresh_seeds_count_alone_where_they_are_there() -> None:
    rows = [row("full", 1e-4, 50.0 + seed, "test", seed) for seed in range(10)]
    rows += [row("lora", 1e-4, 40.0 + 2 * seed, "test", seed) for seed in range(5)]
    rows += [row("owlore", 1e-4, 49.0 + seed, "test", seed) for seed in (1, 6, 7)]
    tuned = [{**row("full", 3e-4, 20.0, "test", seed), "tuned": True} for seed in (5, 6)]
    table = quality_stats.summarise(rows, "commonsense", "test", fresh=range(5, 10))
    found = {entry["method"]: entry for entry in table}
    assert [found[m]["mean"] for m in ("full", "lora", "owlore")] == [57.0, 44.0, 55.5]
    assert (found["full"]["seeds"], found["full"]["seed_range"]) == (5, "5-9")
    assert found["owlore"]["against"] == pytest.approx((-1.0, -1.0, -1.0))
    # Earlier seeds are compared with earlier ones.
    assert found["lora"]["against"][0] == pytest.approx(-8.0)
    # Compared by earlier seeds with what has no fresh ones, and by fresh ones with what has.
    drawn = [row("uniform", 1e-4, 48.5 + seed, "test", seed) for seed in range(5)]
    drawn += [row("reverse", 1e-4, 45.0 + seed, "test", seed) for seed in (6, 7)]
    drawn += [row("owlore", 1e-4, 9.0 + seed, "test", seed) for seed in (2, 3)]
    table = quality_stats.summarise(rows + drawn, "commonsense", "test", fresh=range(5, 10))
    (own,) = (entry for entry in table if entry["method"] == "owlore")
    assert own["uniform"][0] == pytest.approx((0.5 - 39.5 - 39.5) / 3)
    assert own["reverse"] == pytest.approx((4.0, 4.0, 4.0))
    assert own["mean"] == 55.5
    # What was tuned is the reference, however many seeds others have.
    table = quality_stats.summarise(rows + tuned, "commonsense", "test", fresh=range(5, 10))
    (other,) = (e for e in table if (e["method"], e["lr"]) == ("full", 1e-4))
    assert other["against"][0] == pytest.approx(35.5)


def test_tables_may_name_methods(tmp_path: Path) -> None:
    assert quality.table_of("test") == ("test", [])
    assert quality.table_of("gsm8k:full,owlore") == ("gsm8k", ["full", "owlore"])
    for text in ("tests", "test:fill"):
        with pytest.raises(SystemExit, match=f"no table {text}: expected one of validation"):
            quality.table_of(text)
    args = argparse.Namespace(
        tables=["validation:lora", "validation"], only=None, rows=tmp_path / "rows", done=[]
    )
    claims = quality_queue.Claims(tmp_path / "claims")
    found = [quality.next_job(args, claims, (), 9.0, {})[0].method for _ in range(4)]
    assert found == ["lora", "lora", "lora", "full"]
    args.tables = ["validation:owlore@blocks=all"]
    found = [quality.next_job(args, claims, (), 9.0, {}) for _ in range(4)]
    assert {job.variant for job, _ in found[:3]} == {"blocks=all"}
    assert found[3] == "wait"


def test_a_merge_names_anew_what_was_chosen(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(quality, "REPEATS", {"commonsense": 1, "gsm8k": 1})
    lines = [row("full", lr, 40 + 1e4 * lr, "validation") for lr in quality.RATES]
    for lr in (3e-4, 1e-3):
        lines.append({**row("full", lr, 45, "test"), "chosen": lr == 3e-4})
    lines.append({**row("full", 1e-3, 45, "test", variant="steps=0"), "chosen": True})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = argparse.Namespace(json=tmp_path / "new" / "q.json", files=[tmp_path / "rows.jsonl"])
    args.json.parent.mkdir()
    quality.merge(args)
    merged = quality.read_rows([args.json])
    assert len(merged) == len(lines)
    chosen = [(r["variant"], r["lr"]) for r in merged if r["chosen"]]
    assert chosen == [("default", 1e-3)]
    # As long as runs are missing, one seed of those that are there decides.
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in lines[:2] + lines[3:])
    )
    args.json.unlink()
    quality.merge(args)
    chosen = [(r["variant"], r["lr"]) for r in quality.read_rows([args.json]) if r["chosen"]]
    assert chosen == [("default", 3e-4)]


def test_a_run_is_claimed_once_and_a_crashed_one_is_taken_up(tmp_path: Path) -> None:
    one, other = (quality_queue.Claims(tmp_path / "claims", starts=2) for _ in range(2))
    claim = one.take(("task", 0.1, 3))
    assert claim is not None
    assert claim.starts == 0
    assert other.take(("task", 0.1, 3)) is None
    assert other.take(("task", 0.1, 4)) is not None
    claim.release("done")
    assert other.take(("task", 0.1, 3)) is None
    # The system gives a dead process's lock back.
    for starts in (0, 1):
        dying = one.take(("crashes",))
        assert dying is not None
        assert dying.starts == starts
        os.close(dying._file)
    assert one.failed() == set()
    assert one.take(("crashes",)) is None
    assert other.failed() == {("crashes",)}
    assert one.take(("crashes",)) is None
    assert len(other.noted("failed")) == 1


def test_a_run_that_fails_is_run_in_a_simpler_way(tmp_path: Path, monkeypatch) -> None:
    bench = quality.Bench.__new__(quality.Bench)
    bench.args = argparse.Namespace(device="cuda", no_compile=False, no_graphs=False)
    bench.claims = quality_queue.Claims(tmp_path)
    monkeypatch.setattr(quality, "broken", lambda device: False)
    job, same, other = (
        quality.Job("commonsense", method, "default", lr, 0, "test")
        for method, lr in (("galore", 1e-4), ("full", 3e-4), ("lora", 1e-4))
    )
    tried = []

    def run(job, compiled, graphs):
        tried.append((job.method, compiled, graphs))
        if compiled or job.method == "lora":
            raise RuntimeError("no compiler")
        return {"compiled": compiled}

    monkeypatch.setattr(bench, "run", run)
    assert bench.run_somehow(job) == {"compiled": False}
    assert tried == [("galore", True, True), ("galore", False, True)]
    # The kind of run that did not compile is not compiled again.
    assert quality.kind(job) == quality.kind(same) != quality.kind(other)
    tried.clear()
    assert bench.run_somehow(same) == {"compiled": False}
    assert tried == [("full", False, True)]
    tried.clear()
    with pytest.raises(RuntimeError, match="no compiler"):
        bench.run_somehow(other)
    assert tried == [("lora", True, True), ("lora", False, True), ("lora", False, False)]
    # What ended its process goes on with the next way.
    tried.clear()
    monkeypatch.setattr(bench, "run", lambda *how: tried.append(how[1:]))
    bench.run_somehow(job._replace(method="owlore"), starts=1)
    bench.run_somehow(job._replace(method="uniform"), starts=7)
    assert tried == [(False, True), (False, False)]
    bench.args.device = "cpu"
    bench.run_somehow(job, starts=2)
    assert tried[2:] == [(False, False)]


def test_memory_is_measured_in_a_plain_loop(tmp_path: Path, monkeypatch) -> None:
    bench = quality.Bench.__new__(quality.Bench)
    bench.args = argparse.Namespace(device="cuda", no_compile=False, no_graphs=False)
    tried = []
    monkeypatch.setattr(bench, "run", lambda job, **how: tried.append(how))
    jobs = list(quality.jobs("memory", []))
    for job in jobs:
        bench.run_somehow(job)
    assert tried == [{"compiled": False, "graphs": False}] * len(jobs)
    assert len({job.key for job in jobs}) == len(jobs)
    assert {job.method for job in jobs} == set(quality.MAIN)
    # Past a draw of what draws every 50 steps, and a refresh of what stays.
    assert quality.MEMORY_STEPS > OwLoreConfig().refresh_interval > 50
    # It judges nothing, and is judged by nothing.
    bench = quality.Bench.__new__(quality.Bench)
    bench.args = argparse.Namespace(device="cpu", max_steps=None, model="m")
    bench.model = tiny_model.model()
    rows = [Tokens(tuple(range(3, 9)), 2)] * 64
    monkeypatch.setattr(bench, "data", lambda *key: quality.Data(rows, [], [], {}))
    monkeypatch.setattr(bench, "evaluate", lambda *how: pytest.fail("evaluated"))
    monkeypatch.setattr(quality, "MEMORY_STEPS", 1)
    job = next(job for job in jobs if job.method == "full")
    found = quality.Bench.run(bench, job, False, False)
    assert (found["split"], found["steps"], "accuracy" in found) == ("memory", 1, False)
    table = quality_stats.summarise([found], "commonsense", "test")
    assert table == []
    assert quality_stats.best_rates([found], "commonsense") == {}


def test_what_the_readme_shows_is_tested_with_fresh_seeds() -> None:
    rows = []
    while todo := [
        job for job in quality.jobs("validation", rows)
        if job.key not in {quality.key_of(r) for r in rows}
    ]:  # fmt: skip
        rows += embedding_rows(todo, lambda job: 40 - job.lr)
    found = list(quality.jobs("fresh", rows))
    assert {job.seed for job in found} == set(range(5, 10))
    assert {(job.method, job.variant, job.lr) for job in found} == {
        ("dora", "default", 1e-4), ("owlore-published", "default", 1e-4),
        ("uniform", "default", 1e-4), ("owlore", "default", 3e-4),
        ("owlore", quality.FROZEN_32, 3e-4),
    }  # fmt: skip
    # No method's rate is known without its validation.
    assert {job.method for job in quality.jobs("fresh", [])} == {"owlore"}
    rates = {(job.task, job.seed) for job in quality.jobs("rates", [])}
    assert rates == {
        (task, seed) for task, plan in quality_embeddings.PLANS.items() for seed in plan.test
    }
    config = OwLoreConfig()
    default = quality.parse_variant(quality.FROZEN_ALL)
    assert all(getattr(config, name) == value for name, value in default.items())
    assert config.lr in {job.lr for job in quality.jobs("rates", [])}


def test_other_subspaces_are_tested_where_they_are_ahead_on_what_is_held_out() -> None:
    jobs = [*quality.subspace_jobs(), *quality.subspace_jobs([quality.FROZEN_ALL])]
    assert {job.split for job in jobs} == {"fold", "validation"}
    one, other = quality.SUBSPACES[1], quality.SUBSPACES[3]

    def accuracy(job):
        # embedding_rows: a hundredth in loss. Two tasks gain at one rate, one loses at both.
        gain = {
            (one, "gsm8k", 1e-3): 2.0,
            (one, "wikitext2", 3e-4): 1.5,
            (other, "gsm8k", 1e-3): 0.9,
        }
        less = -1.0 if (job.variant, job.task) == (one, "commonsense") else 0.0
        return 50 + gain.get((job.variant, job.task, job.lr), 0.0) + less - (job.lr == 3e-4) / 2

    rows = embedding_rows(jobs, accuracy)
    # A mean of (2 + 1 - 2) / 4 of what counts as worse, and of .9 / 4.
    best = quality.best_subspace(rows)
    assert best is not None
    assert best[0] == one
    assert best[1] == {"commonsense": 1e-3, "gsm8k": 1e-3, "wikitext2": 3e-4, "shakespeare": 1e-3}
    assert quality.best_subspace(rows[1:]) is None
    assert list(quality.jobs("subspace-test", rows[1:])) == []
    assert quality.best_subspace(rows[1:], {quality.key_of(rows[0])}) is not None
    found = list(quality.jobs("subspace-test", rows))
    assert {(job.task, job.lr) for job in found} == set(best[1].items())
    assert {job.variant for job in found} == {one}
    assert len(found) == 20
    behind = embedding_rows(jobs, lambda job: 50 + (job.variant == quality.FROZEN_ALL))
    assert quality.best_subspace(behind) is None
    # With a fold missing a rate does not count, and with all failed nothing is ahead.
    lost = {job.key for job in jobs if (job.variant, job.task, job.seed) == (one, "commonsense", 1)}
    kept = [r for r in rows if quality.key_of(r) not in lost]
    best = quality.best_subspace(kept, lost)
    assert best is not None
    assert best[0] == other
    assert quality.best_subspace([], {job.key for job in jobs}) is None


def test_summaries_of_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no file .*nosuch"):
        quality.results_files([tmp_path / "nosuch.json"])
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row("full", 1e-4, 50.0, "test")]))
    args = argparse.Namespace(files=[file], against=("galore", "nonsense"))
    with pytest.raises(SystemExit, match="no run of galore nonsense"):
        quality.summary(args)


def test_the_next_run_is_of_a_kind_that_is_compiled(tmp_path: Path) -> None:
    args = argparse.Namespace(tables=["validation"], only=None, rows=tmp_path / "rows", done=[])
    claims = quality_queue.Claims(tmp_path / "claims")

    def take(kinds, left=100.0, about=None):
        found = quality.next_job(args, claims, kinds, left, about or {})
        return found if isinstance(found, str) else found[0].method

    lora = quality.kind(quality.Job("commonsense", "lora", "default", 1e-4, 0, "validation"))
    assert [take({lora}) for _ in range(4)] == ["lora"] * 3 + ["full"]
    args.only = ["lora"]
    assert take(()) == "wait"
    rows = rows_of(quality.jobs("validation", rows_of(quality.jobs("validation", []))))
    rows = [row for row in rows if row["method"] == "full"] + [
        row for row in rows if row["method"] == "lora" and row["lr"] == 1e-4
    ]
    args.rows.write_text(
        "".join(json.dumps({**row, "wall_seconds": 50.0}) + "\n" for row in rows) + '{"half'
    )
    assert take(()) == "wait"
    assert take((), left=40.0) == "2 runs left: out of time"
    args.only = ["full"]
    assert take(()) == "nothing left"


def test_the_table_shows_what_was_chosen_before_the_test(tmp_path: Path, monkeypatch) -> None:
    rows = [
        {**row("full", 1e-4, 48.0 + seed, "test", seed), "chosen": True} for seed in range(3)
    ] + [{**row("owlore", 3e-4, 47.9 + seed, "test", seed), "chosen": True} for seed in range(3)]
    rows.append(row("owlore", 3e-4, 99.0, "test", variant="blocks=2"))
    rows.append(row("owlore", 3e-4, 47.0, "test", variant="blocks=all", seed=1))
    beside = [("owlore", "blocks=all", 3e-4)]
    monkeypatch.setattr(quality_figures, "BESIDE", beside)
    head, cells = quality_figures.commonsense_table(rows)
    assert [line[:2] for line in cells] == [
        ["full fine-tuning", "yes"], ["OwLore, 5 blocks", "yes"], ["OwLore, all blocks", ""],
    ]  # fmt: skip
    assert all(len(line) == len(head) for line in cells)
    assert cells[1][3:6] == ["-0.10 [-0.10, -0.10]", "48.90 ± 1.00", "0-2"]
    # Runs that replay graphs do not say what a plain loop needs.
    rows[0] |= {"peak_gib": 3.2, "start_gib": 1.0}
    assert [line[8] for line in cells] == ["", "", ""]
    rows += [
        {**rows[0], "split": "memory", "peak_gib": peak, "start_gib": start}
        for peak, start in ((3.5, 1.0), (3.9, 1.25))
    ]
    assert quality_figures.commonsense_table(rows)[1][0][8] == "2.50"
    quality_figures.chart(rows, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no rows of chosen variants"):
        quality_figures.commonsense_table(rows[-1:])


def test_adapters_count_in_what_lora_adds() -> None:
    entry = {"peak_gib": 2.0, "start_gib": 0.5, "trained_parameters": 2**26}
    rows = [{**row(method, 1e-4, 40, "memory"), **entry} for method in ("lora", "full")]
    rows.append({**rows[0], "peak_gib": 0.0, "split": "test"})
    methods = ("lora", "full", "dora")
    found = {m: quality_stats.added_gib(rows, "commonsense", m, "default") for m in methods}
    assert found == {"lora": 1.75, "full": 1.5, "dora": None}
