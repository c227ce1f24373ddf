"""Multiple-choice items from a local jsonl, as an evaluation task and as a depth criterion."""

# B rows of a batch (one choice each), T tokens

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import ConfigError
from compress.tokens import TokenBatch

PROMPT = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Item:
    question: str
    choices: tuple[str, ...]
    label: int  # of the right choice


def read_items(path: Path, key: str, limit: int | None = None) -> list[Item]:
    """The items of a jsonl of {question, choices, label}; every line is checked, `limit` of them are returned.

    Raises ConfigError with `key`, file, line and rule.
    """
    if not path.is_file():
        raise ConfigError(f"{key}={path} is not there; give a jsonl of question, choices, label")
    items = []
    with path.open(errors="replace") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            found = _item(line)
            if isinstance(found, str):
                raise ConfigError(
                    f"{key}={path} line {number}: {found}; each line must be a JSON object of question (text), choices "
                    f"(two texts or more) and label (the right one's index): {line.strip()[:80]!r}"
                )
            items.append(found)
    if not items:
        raise ConfigError(f"{key}={path} is empty; give a jsonl of question, choices, label")
    return items[:limit]


def _item(line: str) -> Item | str:
    """The item, or what is wrong with it."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return f"not valid JSON ({error})"
    if not isinstance(row, dict) or not {"question", "choices", "label"} <= row.keys():
        return "not an object with question, choices and label"
    choices, label = row["choices"], row["label"]
    if not isinstance(row["question"], str):
        return "question is no text"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        return "choices is no list of two texts or more"
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        return f"label={label!r} is no index of its {len(choices)} choices"
    return Item(row["question"], tuple(choices), label)


@dataclass(frozen=True)
class Choices:
    """Every choice of every item as a row of its own, the loss mask on the choice's tokens."""

    batches: list[TokenBatch]
    choice_of_row: list[Tensor]  # for each batch (B,)
    item_of_choice: Tensor
    right: Tensor  # for each item, the number of its right choice


def encode_choices(tokenizer: Any, items: Sequence[Item], micro_batch_size: int, max_tokens: int) -> Choices:
    """Prompt and choice are tokenised together, as lm-eval does, and cut at the front to `max_tokens`."""
    rows: list[tuple[list[int], int]] = []  # ids, and how many of them at the end are the choice's
    item_of_choice, right = [], []
    for number, item in enumerate(items):
        prompt = PROMPT.format(question=item.question)
        right.append(len(rows) + item.label)
        begin = len(tokenizer(prompt)["input_ids"])
        for choice in item.choices:
            ids = tokenizer(f"{prompt} {choice}")["input_ids"]
            rows.append((ids[-max_tokens:], min(max(len(ids) - begin, 1), max_tokens - 1)))
            item_of_choice.append(number)
    batches, choice_of_row = [], []
    for start in range(0, len(rows), micro_batch_size):
        part = rows[start : start + micro_batch_size]
        width = max(len(ids) for ids, _ in part)
        ids_BT, at_BT = torch.zeros(len(part), width, dtype=torch.int64), torch.arange(width).repeat(len(part), 1)
        loss_BT, valid_BT = torch.zeros(2, len(part), width, dtype=torch.bool)
        for row, (ids, answer) in enumerate(part):
            length = len(ids)
            ids_BT[row, :length] = torch.tensor(ids)
            valid_BT[row, :length] = True
            loss_BT[row, length - 1 - answer : length - 1] = True
            at_BT[row, length:] = torch.arange(width - length)  # the padding is a document of its own
        batches.append(TokenBatch(ids_BT, at_BT, loss_BT, valid_BT))
        choice_of_row.append(torch.arange(start, start + len(part)))
    return Choices(batches, choice_of_row, torch.tensor(item_of_choice), torch.tensor(right))
