"""Conversations as training samples: the ids that a server would feed the model, and which of them are targets.

A server renders messages[:i] with the generation prompt, tokenises that text, and the model continues those ids until
it emits an end-of-turn token. Each assistant turn is encoded in just that way, prompt and response tokenised apart. As
long as the next turn's prompt begins with exactly the ids that are there already, the turns share one sample;
where the template renders history differently (drops earlier reasoning, say), a new sample begins, so that every
response is learned behind the ids it will be behind when served.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateSyntaxError

from compress.errors import ConfigError

# What Llama 3's templates print without a clock. With one they print today's date, and shards would depend on the day.
_DATE = "26 Jul 2024"
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class EncodedSample:
    """One document: token ids, and per token whether it may be a target. Both lists have the same length."""

    ids: list[int] = field(default_factory=list)
    loss: list[bool] = field(default_factory=list)


class _NotServable(Exception):
    """A turn, or a whole conversation, that can't be encoded; the text is the reason it is counted under."""


def check_chat_template(tokenizer: Any, teacher: str) -> None:
    """Raise ConfigError unless the teacher's tokenizer has a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"teacher.path={teacher}: its tokenizer has no chat template, and the data has conversations. Use an "
            "instruct model as the teacher, put its chat_template.jinja into the folder, or give records with text"
        )
    broken: BaseException | None = None
    try:
        tokenizer.get_chat_template()
        _render(tokenizer, [{"role": "user", "content": "x"}], None, True)
    except ValueError as error:  # several templates, and none is the default
        broken = error
    except _NotServable as refused:  # what a template raises itself, about this message, is no fault
        broken = refused.__cause__ if isinstance(refused.__cause__, TemplateSyntaxError) else None
    if broken is not None:
        reason = (str(broken).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"teacher.path={teacher}: its chat template can't be used ({type(broken).__name__}: {reason[:200]}); mend "
            "chat_template.jinja, or chat_template in tokenizer_config.json"
        ) from broken


def encode_conversation(
    tokenizer: Any,
    messages: Any,
    tools: Any,
    loss_on: str,
    end_ids: Collection[int] | None = None,
) -> tuple[list[EncodedSample], Counter[str]]:
    """The samples of one conversation, and how many turns (or, as a whole, conversations) were dropped per reason.

    loss_on="response": targets are what the assistant emits, its end-of-turn token included and what the template
    appends after it excluded. loss_on="all": targets are all tokens, each once. `end_ids` are the ids that end a turn
    (none = the tokenizer's eos); pass the generation config's too. `messages` and `tools` are checked here.
    """
    ends = frozenset([tokenizer.eos_token_id] if end_ids is None else end_ids)
    dropped: Counter[str] = Counter()
    try:
        turns = _checked(messages, tools, loss_on)
    except _NotServable as reason:
        return [], Counter([str(reason)])
    samples: list[EncodedSample] = []
    for turn in turns:
        try:
            prompt, response, emitted = _encode_turn(tokenizer, messages, turn, tools or None, ends)
        except _NotServable as reason:
            dropped[str(reason)] += 1
            continue
        if loss_on == "response":
            _extend(samples, prompt, False)
            samples[-1].ids += response
            samples[-1].loss += emitted
        else:
            _extend(samples, prompt + response, True)
    if loss_on == "all" and (not turns or turns[-1] != len(messages) - 1):  # what follows the last assistant turn
        try:
            _extend(samples, _ids(tokenizer, _render(tokenizer, messages, tools or None, False)), True)
        except _NotServable as reason:
            dropped[str(reason)] += 1
    kept = [sample for sample in samples if any(sample.loss[1:])]
    if len(kept) < len(samples):
        dropped["nothing to learn: no target token"] += len(samples) - len(kept)
    return kept, dropped


def _checked(messages: Any, tools: Any, loss_on: str) -> list[int]:
    """Indices of the assistant turns of well-formed messages."""
    if not isinstance(messages, list) or not messages:
        raise _NotServable("messages is not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _NotServable("a message is not an object with a role")
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise _NotServable("a message has no content")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _NotServable("tools is not a list of JSON schemas")
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns and loss_on == "response":
        raise _NotServable("no assistant turn")
    return turns


def _encode_turn(
    tokenizer: Any, messages: list[Any], turn: int, tools: Any, ends: frozenset[int]
) -> tuple[list[int], list[int], list[bool]]:
    """Ids of the prompt, ids of the response as the template writes it, and which of those the model emits."""
    if turn == 0:
        raise _NotServable("an assistant turn without a prompt before it")
    prompt = _render(tokenizer, messages[:turn], tools, True)
    full = _render(tokenizer, messages[: turn + 1], tools, False)
    if not full.startswith(prompt):
        raise _NotServable("the template's prompt is not the beginning of its full text")
    prompt_ids = _ids(tokenizer, prompt)
    response = _ids(tokenizer, full[len(prompt) :])
    emitted = [True] * len(response)
    if _GENERATION_MARK.search(tokenizer.get_chat_template(tools=tools)):
        marked = _marked(tokenizer, messages[: turn + 1], tools)
        # Apart and whole text may be tokenised differently where they meet; then the marks don't fit the served ids.
        if marked is not None and marked.ids == prompt_ids + response:
            emitted = marked.loss[len(prompt_ids) :]
    end = next((place for place, token in enumerate(response) if token in ends), len(response))
    return prompt_ids, response, [wanted and place <= end for place, wanted in enumerate(emitted)]


def _extend(samples: list[EncodedSample], ids: list[int], count: bool) -> None:
    """Make `ids` the content of the last sample if they begin with what it holds, else of a new one.

    With `count`, what is added is a target, except what a new sample shares with the beginning of the one before.
    """
    before = samples[-1].ids if samples else []
    common = next(
        (at for at, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))
    )
    if not samples or common < len(before):
        samples.append(EncodedSample(ids[:common], [False] * common))
    samples[-1].ids += ids[common:]
    samples[-1].loss += [count] * (len(ids) - common)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # the template wrote the BOS
    return ids


def _render(tokenizer: Any, messages: list[Any], tools: Any, add_generation_prompt: bool) -> str:
    text = _apply(
        tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False, date_string=_DATE
    )
    assert isinstance(text, str)
    return text


def _marked(tokenizer: Any, messages: list[Any], tools: Any) -> EncodedSample | None:
    """Ids of the whole text and the template's own `{% generation %}` mask; none from a tokenizer without offsets."""
    if not tokenizer.is_fast:
        return None
    encoded = _apply(
        tokenizer, messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True, date_string=_DATE
    )
    return EncodedSample(list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]])


def _apply(tokenizer: Any, messages: list[Any], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template is foreign code in a sandbox: its own raise_exception, or any error at all
        first_line = (str(error).splitlines() or [""])[0]
        raise _NotServable(f"chat template: {type(error).__name__}: {first_line[:80]}") from error
