"""Training data: JSONL rows to token ids and labels, batches, and the held-out split.

A row is a JSON object on a line of its own, in one of three forms:

* ``{"prompt": str, "completion": str}``: the loss is taken on the completion;
* ``{"messages": [{"role": str, "content": str}, ...]}``: a chat, written with the tokenizer's chat
  template; the loss is taken on the assistant's turns;
* ``{"text": str}``: the loss is taken on all of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Collator", "DataError", "TokenizedData", "read_jsonl", "split", "tokenize"]

IGNORE_INDEX = -100

Row = dict[str, Any]
Example = dict[str, list[int]]


class DataError(ValueError):
    """A data file or a row of it cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class TokenizedData:
    """Token ids and labels of a data set, and what was lost on the way.

    Attributes:
        examples: One dict per row with "input_ids" and "labels", lists of the same length; labels
            are -100 where no loss is taken.
        truncated: Rows that were longer than the maximum length and were cut.
        dropped: Rows that had nothing left to train on after the cut and were left out.
    """

    examples: list[Example]
    truncated: int
    dropped: int

    @property
    def tokens(self) -> int:
        """Number of tokens in all examples."""
        return sum(len(example["input_ids"]) for example in self.examples)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that the loss is taken on."""
        return sum(_targets(example["labels"]) for example in self.examples)


def _targets(labels: Sequence[int]) -> int:
    # The model predicts token t from the tokens before it, so the first has no prediction.
    return sum(label != IGNORE_INDEX for label in labels[1:])


def _check_row(row: Any) -> str | None:
    """Returns what is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"expected a JSON object, got {type(row).__name__}"
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            return "'messages' must be a list with at least one message"
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")
            ):
                return f"message {number} needs the strings 'role' and 'content'"
        if not any(message["role"] == "assistant" for message in messages):
            return "no message has the role 'assistant', so there is nothing to train on"
        return None
    keys = ("text",) if "text" in row else ("prompt", "completion")
    for key in keys:
        if key not in row:
            return (
                "expected the keys 'prompt' and 'completion', or 'messages', or 'text'; "
                f"got {sorted(row) or 'no keys'}"
            )
        if not isinstance(row[key], str):
            return f"'{key}' must be a string, got {type(row[key]).__name__}"
    if not row[keys[-1]].strip():
        return f"'{keys[-1]}' is empty"
    return None


def read_jsonl(path: str | Path) -> list[Row]:
    """Reads a JSONL file and checks every row.

    Args:
        path: The file, UTF-8, one row a line (see the module's text for the three forms).

    Returns:
        The rows in order, at least one.

    Raises:
        DataError: The file is missing or empty, or a line is empty, is not JSON, or has no form
            that can be trained on. The message starts with file and line number.
    """
    rows: list[Row] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if not line.strip():
                    raise DataError(f"{where}: the line is empty")
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise DataError(f"{where}: not UTF-8 ({error.reason})") from error
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: not valid JSON ({error.msg})") from error
                problem = _check_row(row)
                if problem is not None:
                    raise DataError(f"{where}: {problem}")
                rows.append(row)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    if not rows:
        raise DataError(f"{path}: the file is empty")
    return rows


def split(rows: Sequence[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits rows at random into a training and a held-out part.

    Args:
        rows: All rows.
        held_out: Rows in the held-out part.
        seed: The split is a function of the seed and the number of rows.

    Returns:
        Training rows and held-out rows, both in their original order.

    Raises:
        DataError: Nothing would be left to train on.
    """
    if not 0 <= held_out < len(rows):
        raise DataError(
            f"cannot hold out {held_out} of {len(rows)} rows: at least one must be left to train on"
        )
    chosen = set(random.Random(seed).sample(range(len(rows)), held_out))
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [row for i, row in enumerate(rows) if i in chosen]


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    # Some tokenizers end every text with EOS, which would end the prompt as well.
    if special and ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _render(tokenizer: Any, messages: list[dict[str, str]], generation: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)


def _chat_segments(tokenizer: Any, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """Cuts a rendered chat into pieces of text, each with whether it is trained on."""
    whole = _render(tokenizer, messages, False)
    segments: list[tuple[str, bool]] = []
    end = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise DataError("a chat cannot begin with the assistant's turn")
        before = _render(tokenizer, messages[:index], True)
        after = _render(tokenizer, messages[: index + 1], False)
        # Templates that rewrite earlier turns have no fixed place for this one.
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= end):
            raise DataError(
                "the tokenizer's chat template rewrites earlier turns; give one row per assistant "
                "turn, or prompt and completion"
            )
        turn = after[len(before) :]
        stop = turn.rstrip()
        # What the template puts after the end-of-turn token is never generated.
        if tokenizer.eos_token is None or not stop.endswith(tokenizer.eos_token):
            stop = turn
        segments += [(whole[end : len(before)], False), (stop, True)]
        end = len(before) + len(stop)
    return segments


def _example(row: Row, tokenizer: Any) -> Example:
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "messages" in row:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, so 'messages' cannot be used; "
                "use 'prompt' and 'completion', or 'text'"
            )
        # The template writes the special tokens itself.
        parts = [
            (_encode(tokenizer, text, False), trained)
            for text, trained in _chat_segments(tokenizer, row["messages"])
        ]
    elif "text" in row:
        parts = [(_encode(tokenizer, row["text"], True) + eos, True)]
    else:
        completion = _encode(tokenizer, row["completion"], False) + eos
        parts = [(_encode(tokenizer, row["prompt"], True), False), (completion, True)]
    input_ids = [token for ids, _ in parts for token in ids]
    labels = [token if trained else IGNORE_INDEX for ids, trained in parts for token in ids]
    return {"input_ids": input_ids, "labels": labels}


def tokenize(rows: Sequence[Row], tokenizer: Any, max_length: int) -> TokenizedData:
    """Turns rows into token ids and labels.

    Prompt and completion (and the turns of a chat) are tokenised apart, as they are when the model
    generates. The end-of-text token is appended to a completion and to a text.

    Args:
        rows: Rows as `read_jsonl` returns them.
        tokenizer: A Hugging Face tokenizer.
        max_length: Tokens kept of each row, counted from its beginning.

    Returns:
        Examples, and how many rows were cut or left out.

    Raises:
        DataError: A row does not fit the tokenizer's chat template, or no row is left.
        ValueError: `max_length` is below 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")
    examples: list[Example] = []
    truncated = dropped = 0
    for number, row in enumerate(rows, 1):
        try:
            example = _example(row, tokenizer)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
        if len(example["input_ids"]) > max_length:
            truncated += 1
            example = {key: ids[:max_length] for key, ids in example.items()}
        if _targets(example["labels"]) == 0:
            dropped += 1
        else:
            examples.append(example)
    if not examples:
        raise DataError(
            f"none of the {len(rows)} rows has a token to train on within max_length {max_length}"
        )
    return TokenizedData(examples, truncated, dropped)


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right to the longest of the batch.

    Attributes:
        pad_token_id: The token written into the padding; it is masked and has label -100.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            examples: Dicts with "input_ids" and "labels".

        Returns:
            "input_ids", "attention_mask" and "labels". [batch, longest], int64.
        """
        longest = max(len(example["input_ids"]) for example in examples)

        def padded(values: list[int], fill: int) -> list[int]:
            return values + [fill] * (longest - len(values))

        return {
            "input_ids": torch.tensor(
                [padded(e["input_ids"], self.pad_token_id) for e in examples]
            ),
            "attention_mask": torch.tensor(
                [padded([1] * len(e["input_ids"]), 0) for e in examples]
            ),
            "labels": torch.tensor([padded(e["labels"], IGNORE_INDEX) for e in examples]),
        }

    @classmethod
    def of(cls, tokenizer: Any) -> Collator:
        """Takes the padding token from a tokenizer, or its end-of-text token, or token 0."""
        for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            if token is not None:
                return cls(token)
        return cls(0)
