"""Questions and texts of the quality tables: reading, contamination, prompts, token ids.

A folder of data holds commonsense/<task>_<train|test>.jsonl with rows {"question", "choices",
"label"}, gsm8k/<train|test>.jsonl with rows {"question", "answer"}, text/c4_300.jsonl with rows
{"text"}, text/wikitext2_<valid|test>.txt and text/tiny_shakespeare.txt. The data/ of this
repository holds a part of GSM8K alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "COMMONSENSE",
    "IGNORE",
    "Question",
    "Tokens",
    "answer_sequences",
    "drop_contaminated",
    "fold",
    "normalise",
    "prompt",
    "read_gsm8k",
    "read_parts",
    "read_questions",
    "read_texts",
    "shared_lines",
    "split_validation",
    "text_sequences",
    "training_sequences",
]

COMMONSENSE = ("arc_easy", "arc_challenge", "openbookqa", "commonsense_qa")
IGNORE = -100


@dataclass(frozen=True)
class Question:
    """A question, the texts that may answer it, and the index of the right one."""

    task: str
    question: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Tokens:
    """Token ids and the number of tokens at their beginning on which no loss is taken."""

    ids: tuple[int, ...]
    prompt: int


def _rows(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_questions(folder: Path, part: str) -> list[Question]:
    """The questions of the four commonsense tasks.

    Args:
        folder: Folder of data.
        part: "train" or "test".
    """
    found = []
    for task in COMMONSENSE:
        for row in _rows(folder / "commonsense" / f"{task}_{part}.jsonl"):
            choices, label = tuple(map(str, row["choices"])), int(row["label"])
            if not 0 <= label < len(choices):
                raise ValueError(f"{task}_{part}: label {label} of {len(choices)} choices")
            found.append(Question(task, row["question"], choices, label))
    return found


def read_gsm8k(folder: Path, part: str) -> list[Question]:
    """GSM8K as questions with one choice, the worked solution."""
    found = []
    for row in _rows(folder / "gsm8k" / f"{part}.jsonl"):
        if "prompt" in row:
            # The subset in this repository's data/ stands in the form that `owlore train` reads.
            asked = row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
            row = {"question": asked, "answer": row["completion"].removeprefix(" ")}
        found.append(Question("gsm8k", row["question"], (row["answer"],), 0))
    return found


def read_texts(folder: Path, rows: int | None = None) -> list[str]:
    """Documents of C4."""
    return [row["text"] for row in _rows(folder / "text" / "c4_300.jsonl")[:rows]]


def read_parts(folder: Path, task: str) -> dict[str, str]:
    """A text as training rows, validation and test: pieces that stand behind one another.

    WikiText-2 is trained on its validation file (the last tenth is ours) and tested on its test
    file. Of tiny Shakespeare the last tenth is the test, and a tenth of the rest the validation.

    Args:
        folder: Folder of data.
        task: "wikitext2" or "shakespeare".

    Returns:
        {"train" | "validation" | "test": text}
    """

    def halves(text: str) -> tuple[str, str]:
        # At a line's end.
        end = text.rindex("\n", 0, len(text) * 9 // 10) + 1
        return text[:end], text[end:]

    if task == "wikitext2":
        early, test = (
            (folder / "text" / f"wikitext2_{part}.txt").read_text(encoding="utf-8")
            for part in ("valid", "test")
        )
    else:
        path = folder / "text" / "tiny_shakespeare.txt"
        early, test = halves(path.read_text(encoding="utf-8"))
    train, validation = halves(early)
    return {"train": train, "validation": validation, "test": test}


def shared_lines(one: str, other: str, least: int = 60) -> set[str]:
    """Lines of at least so many characters, evened out, that stand in both texts."""
    first, second = (
        {line for line in map(normalise, text.splitlines()) if len(line) >= least}
        for text in (one, other)
    )
    return first & second


def normalise(text: str) -> str:
    """A question with case, punctuation and white space evened out, for comparisons."""
    kept = (c if c.isalnum() else " " for c in text.casefold())
    return " ".join("".join(kept).split())


def drop_contaminated(
    train: Sequence[Question], held_out: Iterable[Question]
) -> tuple[list[Question], dict[str, int]]:
    """Training rows whose question is not among the held-out ones.

    Returns:
        The rows that stay, and how many of each task were dropped.
    """
    seen = {normalise(question.question) for question in held_out}
    kept, dropped = [], dict.fromkeys(sorted({q.task for q in train}), 0)
    for question in train:
        if normalise(question.question) in seen:
            dropped[question.task] += 1
        else:
            kept.append(question)
    return kept, dropped


def split_validation(
    train: Sequence[Question], rows: int, seed: int = 0
) -> tuple[list[Question], list[Question]]:
    """Takes validation rows out of the training rows, as many of each task.

    Returns:
        Training rows, none of which asks a question of the validation rows, and these.
    """
    tasks = sorted({question.task for question in train})
    validation = []
    for task in tasks:
        own = [question for question in train if question.task == task]
        count = min(rows // len(tasks), len(own) - 1)
        validation += random.Random(f"{seed}/{task}").sample(own, count)
    return drop_contaminated(train, validation)[0], validation


def fold(
    train: Sequence[Question], number: int, folds: int = 3, rows: int = 1000
) -> tuple[list[Question], list[Question]]:
    """Holds out one of several disjoint folds.

    Args:
        train: Training rows.
        number: The fold, from 0.
        folds: How many there are.
        rows: Rows of a fold at most, of each task; a task has fewer where its rows do not suffice.

    Returns:
        Training rows, none of which asks a question of the fold, and the fold.
    """
    held_out = []
    for task in sorted({question.task for question in train}):
        own = [question for question in train if question.task == task]
        random.Random(f"folds/{task}").shuffle(own)
        count = min(rows, len(own) // folds)
        held_out += own[number * count : (number + 1) * count]
    return drop_contaminated(train, held_out)[0], held_out


def prompt(question: Question) -> str:
    """What stands before an answer; answers begin with a space, as in lm-evaluation-harness."""
    return f"Question: {question.question}\nAnswer:"


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def training_sequences(
    questions: Sequence[Question], tokenizer: Any, max_length: int
) -> list[Tokens]:
    """Prompt, right answer and end-of-text token; the loss is taken on answer and end."""
    before = _encode(tokenizer, [prompt(q) for q in questions])
    after = _encode(tokenizer, [" " + q.choices[q.label] for q in questions])
    end = [tokenizer.eos_token_id]
    return [
        Tokens(tuple((head + tail + end)[:max_length]), min(len(head), max_length))
        for head, tail in zip(before, after, strict=True)
    ]


def text_sequences(text: str, tokenizer: Any, length: int) -> list[Tokens]:
    """A text's tokens in rows of one length; a rest is left out.

    The loss is taken on all tokens but a row's first, which has nothing before it.
    """
    (ids,) = _encode(tokenizer, [text])
    return [Tokens(tuple(ids[i : i + length]), 1) for i in range(0, len(ids) - length + 1, length)]


def answer_sequences(questions: Sequence[Question], tokenizer: Any) -> list[Tokens]:
    """Prompt and answer for every answer of every question, in their order."""
    before = _encode(tokenizer, [prompt(q) for q in questions])
    after = iter(_encode(tokenizer, [" " + choice for q in questions for choice in q.choices]))
    return [
        Tokens(tuple(head + next(after)), len(head))
        for question, head in zip(questions, before, strict=True)
        for _ in question.choices
    ]
