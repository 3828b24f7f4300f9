"""Rows of JSONL to tokens, labels and batches."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import CHAT_TEMPLATE, tokenizer, write_rows

from owlore.data import Collator, DataError, read_jsonl, split, tokenize

SUBSET = Path(__file__).parents[1] / "data" / "gsm8k"
GOOD = '{"prompt": "a", "completion": "b"}'


def trained(example: dict[str, list[int]]) -> str:
    """Text of the tokens that the loss is taken on."""
    return tokenizer().decode([label for label in example["labels"] if label != -100])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "the line is empty"),
        ("   ", "the line is empty"),
        ('{"prompt": "a", "comp', "not valid JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"prompt": "a"}', "expected the keys 'prompt' and 'completion'"),
        ('{"question": "a", "answer": "b"}', r"got \['answer', 'question'\]"),
        ('{"prompt": 1, "completion": "b"}', "'prompt' must be a string, got int"),
        ('{"prompt": "a", "completion": " "}', "'completion' is empty"),
        ('{"text": ""}', "'text' is empty"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "user"}]}', "message 1 needs the strings 'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message has the role 'assistant'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: .*{reason}"):
        read_jsonl(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file"):
        read_jsonl(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: the file is empty"):
        read_jsonl(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl, line 1: not UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match="directory"):
        read_jsonl(tmp_path)


def test_rows_come_in_order_with_a_byte_order_mark_or_without(tmp_path: Path) -> None:
    rows = [{"text": "één"}, {"text": "two"}]
    file = tmp_path / "rows.jsonl"
    for mark in ("", "\ufeff"):
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        file.write_text(mark + lines, encoding="utf-8")
        assert read_jsonl(file) == rows


def test_split_is_a_partition_that_the_seed_decides() -> None:
    rows = [{"text": str(i)} for i in range(50)]
    train, held = split(rows, 10, seed=3)
    assert len(held) == 10
    assert sorted(train + held, key=rows.index) == rows
    assert train == sorted(train, key=rows.index)
    assert split(rows, 10, seed=3) == (train, held)
    assert split(rows, 10, seed=4) != (train, held)
    assert split(rows, 0, seed=3) == (rows, [])
    with pytest.raises(DataError, match="cannot hold out 50 of 50 rows"):
        split(rows, 50, seed=3)


def test_the_loss_is_on_the_completion_and_its_end() -> None:
    (example,) = tokenize([{"prompt": "2+2=", "completion": "4"}], tokenizer(), 100).examples
    assert tokenizer().decode(example["input_ids"]) == "2+2=4</s>"
    assert trained(example) == "4</s>"
    (example,) = tokenize([{"text": "all"}], tokenizer(), 100).examples
    assert trained(example) == "all</s>"


def test_the_loss_is_on_the_assistants_turns_of_a_chat() -> None:
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "A2"},
    ]
    (example,) = tokenize([{"messages": chat}], tokenizer(), 200).examples
    whole = (
        "<|system|>S</s>\n<|user|>Q1</s>\n<|assistant|>A1</s>\n<|user|>Q2</s>\n<|assistant|>A2</s>"
    )
    assert tokenizer().decode(example["input_ids"]) == whole
    assert trained(example) == "A1</s>A2</s>"


def test_chats_that_cannot_be_rendered() -> None:
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    with pytest.raises(DataError, match="row 1: the tokenizer has no chat template"):
        tokenize([{"messages": chat}], tokenizer(None), 200)
    with pytest.raises(DataError, match="row 2: a chat cannot begin with the assistant"):
        tokenize([{"text": "a"}, {"messages": chat[1:]}], tokenizer(), 200)
    # As templates that drop the thinking of earlier turns do.
    rewriting = CHAT_TEMPLATE.replace(
        "message['content']", "message['content'] if loop.last else 'cut'"
    )
    with pytest.raises(DataError, match="rewrites earlier turns"):
        tokenize([{"messages": chat * 2}], tokenizer(rewriting), 200)


def test_truncation_is_counted_and_rows_without_a_target_are_left_out() -> None:
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "ab", "completion": "cdefgh"},
        {"prompt": "abcdefgh", "completion": "i"},
    ]
    data = tokenize(rows, tokenizer(), 5)
    assert [len(example["input_ids"]) for example in data.examples] == [5, 5]
    assert (data.truncated, data.dropped) == (2, 1)
    assert data.tokens == 10
    assert data.trained_tokens == 6
    with pytest.raises(DataError, match="none of the 1 rows has a token to train on"):
        tokenize(rows[2:], tokenizer(), 5)
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        tokenize(rows, tokenizer(), 1)


def test_batches_are_padded_on_the_right_and_padding_does_not_count() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "bcd"}]
    made = tokenizer()
    batch = Collator.of(made)(tokenize(rows, made, 100).examples)
    a, b, c, d = (made(letter)["input_ids"][0] for letter in "abcd")
    end, pad = made.eos_token_id, made.pad_token_id
    assert batch["input_ids"].tolist() == [[a, b, end, pad, pad], [a, b, c, d, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [[-100, b, end, -100, -100], [-100, b, c, d, end]]
    assert batch["labels"].dtype == torch.int64
    made.pad_token = None
    assert Collator.of(made).pad_token_id == end


def test_the_committed_subset_is_whole_and_reproducible(tmp_path: Path) -> None:
    for name, count in (("train", 1500), ("test", 200)):
        rows = read_jsonl(SUBSET / f"{name}.jsonl")
        assert len(rows) == count
        assert all("#### " in row["completion"] for row in rows)
        assert (SUBSET / f"{name}.jsonl").stat().st_size < 1_000_000
    # The script on a made-up source: the same bytes at each run, nothing too long.
    make = runpy.run_path(str(SUBSET / "make_subset.py"))
    source = [{"question": f"{i}?" * (i % 170), "answer": f"{i}"} for i in range(1, 2400)]
    (tmp_path / "out").mkdir()
    for name in ("train", "test"):
        write_rows(tmp_path / f"{name}.jsonl", source)
    script = tmp_path / "out" / "make_subset.py"
    script.write_text((SUBSET / "make_subset.py").read_text())
    written = []
    for _ in range(2):
        subprocess.run([sys.executable, str(script), "--data", str(tmp_path)], check=True)
        written.append((tmp_path / "out" / "train.jsonl").read_bytes())
    assert written[0] == written[1]
    rows = read_jsonl(tmp_path / "out" / "train.jsonl")
    assert len(rows) == make["ROWS"]["train"]
    assert all(len(r["prompt"] + r["completion"]) < make["MAX_CHARACTERS"] for r in rows)
