"""Conversations are encoded as they are served, and the mask is what the model itself emits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from compress.conversations import EncodedSample, check_chat_template, encode_conversation
from compress.embedded import resolve
from compress.errors import ConfigError

# chat_template.jinja of SmolLM2-135M-Instruct, as it is
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
PLAIN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = PLAIN.replace(
    "{{ m.content }}<|im_end|>\n", "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}", 1
)
# Drops <think>...</think> of every assistant turn but the last, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = 2  # <|im_end|> of the tiny tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(resolve("embedded:tiny", tmp_path_factory.mktemp("cache")))


def with_template(folder: Path, template: str | None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def targets(tokenizer: Any, sample: EncodedSample) -> list[str]:
    """The text of each run of targets."""
    found: list[list[int]] = []
    previous = False
    for token, counted in zip(sample.ids, sample.loss, strict=True):
        if counted and not previous:
            found.append([])
        if counted:
            found[-1].append(token)
        previous = counted
    return [tokenizer.decode(ids) for ids in found]


contents = st.lists(st.text("ab <>|\n_im.é", max_size=12), min_size=2, max_size=7)


@pytest.mark.parametrize("template", [SMOLLM2, PLAIN])
def test_targets_are_the_responses_with_their_end_of_turn_and_nothing_else(tiny: Path, template: str) -> None:
    tokenizer = with_template(tiny, template)
    messages = chat("The river?", "The stone.", "And the letter?", "The market.\nIn winter.", "Thanks.")
    samples, dropped = encode_conversation(tokenizer, messages, None, "response")
    assert not dropped
    (sample,) = samples
    assert targets(tokenizer, sample) == ["The stone.<|im_end|>", "The market.\nIn winter.<|im_end|>"]


@given(contents=contents)
@settings(max_examples=60, deadline=None)
def test_each_response_stands_behind_the_ids_that_serving_would_feed(tiny: Path, contents: list[str]) -> None:
    for template in (SMOLLM2, PLAIN, MARKED, FORGETFUL):
        tokenizer = with_template(tiny, template)
        messages = chat(*contents)
        samples, dropped = encode_conversation(tokenizer, messages, None, "response")
        served = Counter()
        for turn in range(1, len(messages), 2):
            prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
            response = tokenizer(messages[turn]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
            response = response[: response.index(END) + 1]
            served[(*prompt, *response)] += 1
        learned = Counter()
        for sample in samples:
            for at, counted in enumerate(sample.loss):
                if counted and (at + 1 == len(sample.loss) or not sample.loss[at + 1]):
                    learned[tuple(sample.ids[: at + 1])] += 1
        assert learned == served, (template, dropped)


@given(contents=contents)
@settings(max_examples=60, deadline=None)
def test_masks_by_prefix_difference_equal_generation_marks(tiny: Path, contents: list[str]) -> None:
    messages = chat(*contents, system="Be brief.")
    plain, marked = with_template(tiny, PLAIN), with_template(tiny, MARKED)
    by_marks = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    (sample,), dropped = encode_conversation(plain, messages, None, "response")
    assert encode_conversation(marked, messages, None, "response") == ([sample], dropped)
    if len(messages) % 2:  # the last message is the assistant's, so that there is one text
        assert sample.ids == by_marks["input_ids"]
        assert sample.loss == [bool(mark) for mark in by_marks["assistant_masks"]]


def test_generation_marks_narrow_the_targets(tiny: Path) -> None:
    """A template may mark less than the whole response: then its author's word counts."""
    template = PLAIN.replace(
        "{{ m.content }}",
        "{{ m.content.split('#')[0] }}{% generation %}{{ m.content.split('#')[1] }}{% endgeneration %}",
        1,
    )
    tokenizer = with_template(tiny, template)
    (sample,), _ = encode_conversation(tokenizer, chat("Q", "not this.#But this"), None, "response")
    assert targets(tokenizer, sample) == ["But this"]


def test_a_template_that_rewrites_history_gives_each_turn_its_own_sample(tiny: Path) -> None:
    tokenizer = with_template(tiny, FORGETFUL)
    messages = chat("one", "<think>hm</think>first", "two", "<think>so</think>second")
    samples, dropped = encode_conversation(tokenizer, messages, None, "response")
    assert not dropped
    assert [targets(tokenizer, sample) for sample in samples] == [
        ["<think>hm</think>first<|im_end|>"],
        ["<think>so</think>second<|im_end|>"],
    ]
    assert "<think>hm" not in tokenizer.decode(samples[1].ids), "serving drops it from the prompt"
    whole, _ = encode_conversation(tokenizer, messages, None, "all")
    first, second = whole
    common = next(i for i, (a, b) in enumerate(zip(first.ids, second.ids, strict=False)) if a != b)
    assert all(first.loss)
    assert second.loss == [False] * common + [True] * (len(second.ids) - common), "nothing is counted twice"


@given(contents=contents)
@settings(max_examples=40, deadline=None)
def test_loss_on_all_counts_every_token_of_the_whole_text(tiny: Path, contents: list[str]) -> None:
    tokenizer = with_template(tiny, SMOLLM2)
    (sample,), dropped = encode_conversation(tokenizer, chat(*contents), None, "all")
    assert not dropped
    assert all(sample.loss)
    assert sample.ids == tokenizer.apply_chat_template(chat(*contents), return_dict=False)


def test_loss_on_all_needs_no_assistant(tiny: Path) -> None:
    tokenizer = with_template(tiny, SMOLLM2)
    (sample,), dropped = encode_conversation(tokenizer, chat("only me"), None, "all")
    assert "only me" in tokenizer.decode(sample.ids)
    assert not dropped


def test_end_ids_end_a_turn_before_what_the_template_appends(tiny: Path) -> None:
    template = PLAIN.replace("{{ m.content }}<|im_end|>\n", "{{ m.content }}<|endoftext|>\n<|im_end|>\n", 1)
    tokenizer = with_template(tiny, template)
    (short,), _ = encode_conversation(tokenizer, chat("a", "b"), None, "response", end_ids=(0, END))
    (long,), _ = encode_conversation(tokenizer, chat("a", "b"), None, "response", end_ids=(END,))
    assert targets(tokenizer, short) == ["b<|endoftext|>"]
    assert targets(tokenizer, long) == ["b<|endoftext|>\n<|im_end|>"]


def test_boundaries_that_merge_when_rendered_again_are_not_joined(tiny: Path) -> None:
    """Without control tokens "…c" + "at" is other ids as history than as a response: then it is its own sample."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = with_template(tiny, template)
    messages = chat("The riv", "er opens ", "the gar", "den.")
    samples, _ = encode_conversation(tokenizer, messages, None, "response", end_ids=())
    assert len(samples) == 2
    for sample, turn in zip(samples, (1, 3), strict=True):
        text = "".join(m["content"] for m in messages[:turn])
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sample.ids[: len(prompt)] == prompt
        assert sample.loss.index(True) == len(prompt)


def test_tools_reach_the_template(tiny: Path) -> None:
    template = "{% if tools %}{% for t in tools %}{{ t.function.name }};{% endfor %}{% endif %}" + PLAIN
    tokenizer = with_template(tiny, template)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    (sample,), _ = encode_conversation(tokenizer, chat("a", "b"), tools, "response")
    assert tokenizer.decode(sample.ids).startswith("weather;<|im_start|>user")
    assert targets(tokenizer, sample) == ["b<|im_end|>"]


NOT_A_PREFIX = PLAIN.replace(
    "{% if add_generation_prompt %}<|im_start|>", "{% if add_generation_prompt %}<|im_start|>!"
)
RAISING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN


@pytest.mark.parametrize(
    ("template", "messages", "tools", "reason"),
    [
        (PLAIN, "hello", None, "not a list of messages"),
        (PLAIN, [], None, "not a list of messages"),
        (PLAIN, ["hello"], None, "not an object with a role"),
        (PLAIN, [{"content": "x"}], None, "not an object with a role"),
        (PLAIN, [{"role": "user"}, {"role": "assistant", "content": "x"}], None, "no content"),
        (PLAIN, chat("x"), None, "no assistant turn"),
        (PLAIN, chat("x", "y"), "weather", "tools is not a list"),
        (PLAIN, [{"role": "assistant", "content": "x"}], None, "without a prompt"),
        (NOT_A_PREFIX, chat("x", "y"), None, "not the beginning of its full text"),
        (RAISING, chat("x", "y", system="z"), None, "System role not supported"),
    ],
)
def test_what_cannot_be_served_is_dropped_with_its_reason(
    tiny: Path, template: str, messages: Any, tools: Any, reason: str
) -> None:
    samples, dropped = encode_conversation(with_template(tiny, template), messages, tools, "response")
    assert samples == []
    assert dropped.total() == 1
    assert reason in next(iter(dropped))


def test_one_turn_that_cannot_be_served_leaves_the_others(tiny: Path) -> None:
    messages = [{"role": "assistant", "content": "Welcome"}, *chat("x", "y")]
    tokenizer = with_template(tiny, PLAIN)
    (sample,), dropped = encode_conversation(tokenizer, messages, None, "response")
    assert targets(tokenizer, sample) == ["y<|im_end|>"]
    assert dropped == {"an assistant turn without a prompt before it": 1}


def test_a_tokenizer_without_a_template_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.path=some/base.*no chat template.*instruct model"):
        check_chat_template(with_template(tiny, None), "some/base")
    check_chat_template(with_template(tiny, PLAIN), "some/base")
