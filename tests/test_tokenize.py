"""The tokenize stage: every kind of source, resuming, workers, the report, and what it says of bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from compress import tokenize
from compress.artifacts import read_json
from compress.config import load_config
from compress.errors import ArtifactError, CompressError, ConfigError, NumericalError
from compress.overlap import COMMON_MIN_DOCUMENTS, NGRAM, measure_overlap, ngram_hashes
from compress.packing import Packer
from compress.settings import CompressConfig
from compress.tokens import TokenSet, shard_name, write_index, write_shard

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(cache: Path) -> Any:
    return AutoTokenizer.from_pretrained(cache / "tiny" / "teacher")


def configured(cache: Path, *overrides: str, train: str | None = None) -> CompressConfig:
    """recipe=tiny with `train` (yaml of a list of sources) in place of its training sources."""
    replaced = [f"data.train={train}"] if train else []
    return load_config("recipe=tiny", f"cache_dir={cache}", "data.sequence_length=64", *replaced, *overrides)


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f'[{{path: "{path}"}}]'


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def token_stream(folder: Path) -> list[int]:
    """All real tokens of a split folder, in order."""
    return [
        t
        for rows in TokenSet.open(folder).shards()
        for row, n in zip(rows.tokens, rows.lengths, strict=True)
        for t in row[:n].tolist()
    ]


TEXTS = [f"The letter {n} opens the garden near the river in {1000 + n}." for n in range(50)]


def test_every_token_of_every_text_arrives_in_order(cache: Path, tokenizer: Any, tmp_path: Path) -> None:
    tokenize.run(configured(cache, "data.records_per_shard=64"), tmp_path)
    rows = [json.loads(line)["text"] for line in (cache / "tiny" / "train.jsonl").read_text().splitlines()]
    expected = [token for text in rows for token in [*tokenizer(text)["input_ids"], EOS]]
    train = tmp_path / "tokens" / "train"
    assert len(list((train / "00-tiny-train").glob("shard-*"))) == 7
    assert token_stream(train / "00-tiny-train") == expected
    report = read_json(tmp_path / "tokens" / "report.json")
    text, chat = report["train"]
    assert (text["records"], text["documents"], text["tokens"]) == (400, 400, len(expected))
    assert (chat["records"], chat["conversations"], chat["dropped"]) == (80, 80, {})
    tokens = TokenSet.open(train)
    assert tokens.source_sizes == [text["sequences"], chat["sequences"]]
    assert int(tokens.loss_tokens.sum()) == text["loss_tokens"] + chat["loss_tokens"]
    assert text["padding_share"] == pytest.approx(1 - len(expected) / (text["sequences"] * 64))
    assert (
        TokenSet.open(tmp_path / "tokens" / "validation" / "validation").num_tokens == report["validation"][0]["tokens"]
    )
    assert set(report["overlap"]) == {"validation"}
    samples = (tmp_path / "tokens" / "samples.txt").read_text()
    assert "⟦The⟧" in samples, "a document's first token is shown as no target"


def test_one_set_of_records_in_every_kind_of_file_gives_the_same_tokens(cache: Path, tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    folder, saved = tmp_path / "folder", tmp_path / "saved"
    folder.mkdir()
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "spaced.jsonl").write_text("\n \n" + "\n\n".join(json.dumps(row) for row in rows))
    (tmp_path / "list.json").write_text("\n " + json.dumps(rows))
    write_jsonl(tmp_path / "lines.json", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    write_jsonl(folder / "part-1.jsonl", rows[:20])
    write_jsonl(folder / "part-2.jsonl", rows[20:])
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(saved)
    paths = [
        "a.jsonl",
        "spaced.jsonl",
        "list.json",
        "lines.json",
        "a.parquet",
        "folder/part-*.jsonl",
        "folder",
        "saved",
    ]
    train = "[" + ", ".join(f'{{path: "{tmp_path / path}"}}' for path in paths) + "]"
    tokenize.run(configured(cache, "data.records_per_shard=16", train=train), tmp_path / "run")
    sets = sorted((tmp_path / "run" / "tokens" / "train").iterdir())
    assert len(sets) == len(paths)
    arrays = [[vars(rows) for rows in TokenSet([path]).shards()] for path in sets]
    assert len(arrays[0]) == 4
    for other in arrays[1:]:
        for mine, theirs in zip(arrays[0], other, strict=True):
            assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_a_text_file_is_one_document_cut_at_blank_lines(cache: Path, tokenizer: Any, tmp_path: Path) -> None:
    paragraph = "The é river\nopens.\r\n\r\n"
    (tmp_path / "short.txt").write_text(paragraph * 3)
    book = paragraph * 5000
    (tmp_path / "book.txt").write_text(book)
    train = f'[{{path: "{tmp_path}/short.txt"}}, {{path: "{tmp_path}/book.txt"}}]'
    tokenize.run(configured(cache, "data.append_eos=false", train=train), tmp_path / "run")
    short, long = read_json(tmp_path / "run" / "tokens" / "report.json")["train"]
    assert short["documents"] == 1
    assert long["documents"] == -(-len(book.encode()) // 65536)
    decoded = tokenizer.decode(token_stream(tmp_path / "run" / "tokens" / "train" / "01-book"))
    assert decoded == book


def test_tables_with_nulls_for_absent_keys_give_the_same_conversations(cache: Path, tmp_path: Path) -> None:
    """Arrow gives every message the keys that any has; a template must not see them."""
    template = "{% for m in messages %}{{ m.content }}{{ m.call | tojson }}<|im_end|>{% endfor %}"
    teacher = tmp_path / "teacher"
    shutil.copytree(cache / "tiny" / "teacher", teacher)
    (teacher / "chat_template.jinja").write_text(template)
    messages = [
        {"role": "user", "content": "hm", "call": {"city": "Ghent"}},
        {"role": "assistant", "content": "ja", "call": {"river": ["Lys"]}},
    ]
    rows = [
        {"messages": messages, "text": None},
        {"messages": None, "text": "The letter."},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    train = f'[{{path: "{tmp_path}/a.jsonl"}}, {{path: "{tmp_path}/a.parquet"}}]'
    tokenize.run(configured(cache, f"teacher.path={teacher}", train=train), tmp_path / "run")
    plain, table = (
        [vars(r) for r in TokenSet([p]).shards()] for p in sorted((tmp_path / "run/tokens/train").iterdir())
    )
    assert all(np.array_equal(plain[0][name], table[0][name]) for name in plain[0])
    assert 'm{"city": "Ghent"}<|im_end|>ja{"river": ["Lys"]}' in (tmp_path / "run/tokens/samples.txt").read_text()


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    for workers in (0, 1, 2):
        tokenize.run(
            configured(cache, "data.records_per_shard=128", f"data.workers={workers}"), tmp_path / str(workers)
        )
    assert shard_bytes(tmp_path / "0") == shard_bytes(tmp_path / "1") == shard_bytes(tmp_path / "2")


def test_a_resumed_run_makes_only_what_is_missing_and_ends_with_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    config = configured(cache, "data.records_per_shard=64")
    tokenize.run(config, tmp_path)
    whole = shard_bytes(tmp_path)
    source = tmp_path / "tokens" / "train" / "00-tiny-train"
    (source / shard_name(1)).unlink()
    (source / shard_name(4)).write_bytes((source / shard_name(4)).read_bytes()[:1000])
    (source / f".{shard_name(5)}.tmp-123").write_bytes(b"left by a killed writer")
    (source / shard_name(9)).write_bytes((source / shard_name(0)).read_bytes())
    (source / "index.json").unlink()
    times = {f.name: f.stat().st_mtime_ns for f in source.glob("shard-*")}
    tokenize.run(config, tmp_path)
    assert shard_bytes(tmp_path) == whole
    for index in (0, 2, 3, 5, 6):
        assert (source / shard_name(index)).stat().st_mtime_ns == times[shard_name(index)], "kept, not made again"


@pytest.mark.parametrize(
    "change", ["data.sequence_length=32", "data.append_eos=false", "data.loss_on=response", "data.records_per_shard=50"]
)
def test_shards_of_other_settings_are_never_reused(cache: Path, tmp_path: Path, change: str) -> None:
    tokenize.run(configured(cache, "data.records_per_shard=64"), tmp_path / "a")
    changed = configured(cache, "data.records_per_shard=64", change)
    tokenize.run(changed, tmp_path / "a")
    tokenize.run(changed, tmp_path / "fresh")
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "fresh")


def test_changed_text_tokenizer_or_list_of_sources_is_noticed(cache: Path, tmp_path: Path) -> None:
    both = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])[:-1] + ", {path: embedded:tiny-chat}]"
    tokenize.run(configured(cache, train=both), tmp_path / "run")
    first = token_stream(tmp_path / "run" / "tokens" / "train" / "00-a")
    one = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in reversed(TEXTS)])
    teacher = tmp_path / "teacher"
    shutil.copytree(cache / "tiny" / "teacher", teacher)
    tokenize.run(configured(cache, f"teacher.path={teacher}", train=one), tmp_path / "run")
    second = token_stream(tmp_path / "run" / "tokens" / "train" / "00-a")
    assert sorted(first) == sorted(second)
    assert first != second
    assert [f.name for f in (tmp_path / "run" / "tokens" / "train").iterdir()] == ["00-a"]
    facts = json.loads((teacher / "tokenizer.json").read_text())
    facts["model"]["merges"] = facts["model"]["merges"][:20]  # the same ids for everything else in the settings
    (teacher / "tokenizer.json").write_text(json.dumps(facts))
    tokenize.run(configured(cache, f"teacher.path={teacher}", train=one), tmp_path / "run")
    other = AutoTokenizer.from_pretrained(teacher)
    expected = [token for text in reversed(TEXTS) for token in [*other(text)["input_ids"], EOS]]
    assert token_stream(tmp_path / "run" / "tokens" / "train" / "00-a") == expected != second


def test_a_killed_run_leaves_only_whole_shards_and_goes_on(cache: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS * 40])
    arguments = [
        "recipe=tiny",
        f"cache_dir={cache}",
        f"data.train={train}",
        "data.records_per_shard=4",
        "data.workers=1",
    ]
    program = (
        "import sys; from pathlib import Path; from compress import tokenize; from compress.config import load_config\n"
        "tokenize.run(load_config(*sys.argv[2:]), Path(sys.argv[1]))"
    )
    killed, fresh = tmp_path / "killed", tmp_path / "fresh"
    process = subprocess.Popen([sys.executable, "-c", program, str(killed), *arguments], cwd=Path(__file__).parents[1])
    source = killed / "tokens" / "train" / "00-a"
    while not (source / shard_name(3)).exists():
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = sorted(source.glob("shard-*"))
    assert 4 <= len(made) < 500
    assert not (source / "index.json").exists()
    with pytest.raises(ArtifactError, match=r"index\.json is missing"):
        TokenSet.open(killed / "tokens" / "train")
    config = load_config(*arguments)
    tokenize.run(config, fresh)
    assert all(file.read_bytes() == (fresh / file.relative_to(killed)).read_bytes() for file in made)
    tokenize.run(config, killed)
    assert shard_bytes(killed) == shard_bytes(fresh)


def test_truncated_and_dropped_records_are_counted_by_reason(cache: Path, tmp_path: Path) -> None:
    def chat(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    rows = [
        chat("short", "answer"),
        chat("short", "long " * 90),
        chat("long " * 90, "answer"),
        {"messages": [{"role": "user", "content": "alone"}]},
        {"messages": "no list"},
        {**chat("a", "b"), "tools": '[{"type": "function"}]'},
        {**chat("a", "b"), "tools": "[{"},
        {"text": ""},
        {"text": None},
        {"text": "The river.\ud800"},
    ]
    train = write_jsonl(tmp_path / "a.jsonl", rows)
    tokenize.run(configured(cache, "data.loss_on=response", train=train), tmp_path / "run")
    (facts,) = read_json(tmp_path / "run" / "tokens" / "report.json")["train"]
    assert facts["records"] == len(rows)
    assert facts["truncated"] == 1
    assert facts["documents"] == 4
    assert facts["dropped"] == {
        "no assistant turn": 1,
        "messages is not a list of messages": 1,
        "no target within sequence_length": 1,
        "text of no tokens": 2,
        "tools is not valid JSON": 1,
    }
    assert (
        "⟦<|im_start|>user\nshort<|im_end|>\n<|im_start|>assistant\n⟧answer<|im_end|>⟦\n⟧"
        in (tmp_path / "run" / "tokens" / "samples.txt").read_text()
    )


def test_max_records_takes_the_first(cache: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS[:10]])
    write_jsonl(tmp_path / "b.jsonl", [{"text": t} for t in TEXTS[10:]])
    expected = write_jsonl(tmp_path / "expected-of-13.jsonl", [{"text": t} for t in TEXTS[:13]])
    limited = f'[{{path: "{tmp_path}/[ab].jsonl", max_records: 13}}]'
    tokenize.run(configured(cache, train=limited), tmp_path / "limited")
    tokenize.run(configured(cache, train=expected), tmp_path / "expected")
    streams = [token_stream(tmp_path / name / "tokens" / "train") for name in ("limited", "expected")]
    assert streams[0] == streams[1]


GOOD = json.dumps({"text": "The river opens."}) + "\n"
BAD_JSON = (GOOD + "{bad\n").encode()
OTHER_KEYS = b'{"body": "x", "id": 1}\n'
NO_KEY = (
    r"data\.train\[0\]: .*line 1 has neither text_key='text' nor messages_key='messages'; its keys are body, id\. Set"
)
NO_TARGET = r"no token to learn from in train: 1 records gave 0 documents and 0 tokens \(text of no tokens: 1\)"
BAD_FILES: list[tuple[str, bytes, str, type[CompressError], str]] = [
    ("a.jsonl", BAD_JSON, "", ArtifactError, r"a\.jsonl line 2: not valid JSON.*'\{bad'; mend or delete"),
    ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}\n', "", ArtifactError, r"a\.jsonl line 2: not UTF-8"),
    ("a.jsonl", b"", "", ConfigError, r"data\.train\[0\]\.path: .*a\.jsonl is empty"),
    ("a.jsonl", b"\n \n", "", ConfigError, r"a\.jsonl is empty"),
    ("a.jsonl", b"[1]\n", "", ConfigError, r"a\.jsonl line 1 is a list.*an object with 'text' or 'messages'"),
    ("a.jsonl", OTHER_KEYS, "", ConfigError, NO_KEY),
    ("a.jsonl", GOOD.encode() + OTHER_KEYS, "", ConfigError, r"line 2 has neither"),
    ("a.jsonl", b'{"text": 3}\n', "", ConfigError, r"line 1 has a int under text_key='text'"),
    ("a.jsonl", GOOD.encode(), ", max_records: 0", ConfigError, r"data\.train\[0\]\.max_records=0 must be at least 1"),
    ("a.jsonl", b'{"text": ""}\n', "", NumericalError, NO_TARGET),
    ("a.json", b'[{"text": "x"},', "", ArtifactError, r"a\.json: not valid JSON"),
    ("a.json", b"[]", "", ConfigError, r"a\.json is empty"),
    ("a.txt", b"", "", ConfigError, r"a\.txt is empty"),
    ("a.txt", b" \n\n ", "", ConfigError, r"a\.txt is empty"),
    ("a.txt", b"\xff\xfe", "", ArtifactError, r"a\.txt line 1: not UTF-8"),
    ("a.parquet", b"PAR1 and then nothing", "", ArtifactError, r"a\.parquet is not a complete parquet file"),
    ("a.csv", b"text\nx\n", "", ConfigError, r"a\.csv: files must be \.jsonl, \.json, \.parquet, \.txt"),
]


@pytest.mark.parametrize(("name", "content", "more", "error", "message"), BAD_FILES)
def test_bad_files_are_named_and_leave_nothing_that_looks_done(
    cache: Path, tmp_path: Path, name: str, content: bytes, more: str, error: type[CompressError], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        tokenize.run(configured(cache, train=f'[{{path: "{tmp_path / name}"{more}}}]'), tmp_path / "run")
    assert not (tmp_path / "run" / "tokens" / "report.json").exists()
    assert not list((tmp_path / "run").glob("tokens/train/*/index.json"))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "nowhere/a.jsonl",
            ConfigError,
            r"data\.train\[0\]\.path=nowhere/a\.jsonl: no such file or folder; .*start at /",
        ),
        ("/nowhere/folder", ConfigError, r"path=/nowhere/folder: no such file or folder"),
        ("*.nothing", ConfigError, r"path=\*\.nothing matches no file"),
        ("embedded:nothing", ConfigError, r"embedded:nothing: no such embedded resource; there are boolq"),
    ],
)
def test_sources_that_are_not_there(
    cache: Path, tmp_path: Path, source: str, error: type[CompressError], message: str
) -> None:
    with pytest.raises(error, match=message):
        tokenize.run(configured(cache, train=f'[{{path: "{source}"}}]'), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_a_folder_without_data_is_named(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=r"data\.train\[0\]\.path=.*folder can't be read by datasets.*split=train"):
        tokenize.run(configured(cache, train=f'[{{path: "{tmp_path}/folder"}}]'), tmp_path / "run")


def test_conversations_without_a_chat_template_are_refused_before_any_work(cache: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(cache / "tiny" / "teacher", teacher)
    (teacher / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=rf"teacher\.path={re.escape(str(teacher))}.*no chat template.*instruct"):
        tokenize.run(configured(cache, f"teacher.path={teacher}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_source_whose_every_token_is_masked_is_refused(cache: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}] * 3)
    with pytest.raises(
        NumericalError, match=r"3 records gave 0 documents.*no assistant turn: 3.*set data\.loss_on=all \(now response"
    ):
        tokenize.run(configured(cache, "data.loss_on=response", train=train), tmp_path / "run")


# ---- overlap


def token_set(folder: Path, documents: list[list[int]], sequence_length: int = 40) -> TokenSet:
    packer = Packer(sequence_length, pad_id=0)
    for ids in documents:
        packer.add_whole(ids, [True] * len(ids))
    write_shard(folder / shard_name(0), packer.rows(), {})
    write_index(folder, sequence_length, 10_000, [shard_name(0)])
    return TokenSet([folder])


def grams(document: list[int]) -> set[tuple[int, ...]]:
    return {tuple(document[i : i + NGRAM]) for i in range(len(document) - NGRAM + 1)}


def test_overlap_of_constructed_text(tmp_path: Path) -> None:
    clean = [list(range(n * 100 + 1000, n * 100 + 1030)) for n in range(6)]  # 18 n-grams each
    train = token_set(tmp_path / "train", [clean[0], [7, *clean[1][5:20], 8], [*clean[2][:12], 9, *clean[2][12:24]]])
    sets = {"a": token_set(tmp_path / "a", [*clean[:4], [5] * 12]), "b": token_set(tmp_path / "b", clean[4:])}
    overlap = measure_overlap(train, sets)
    assert vars(overlap["a"]) == {
        "ngrams": 4 * 18,
        "ngrams_in_training": 18 + 3,  # the whole of one, 15 tokens of another, of the third no 13 in a row
        "documents": 4,  # the fifth is too short to tell
        "documents_in_training": 2,
        "common_ngrams": 0,
    }
    assert overlap["a"].ngram_share == pytest.approx(21 / 72)
    assert overlap["a"].document_share == pytest.approx(0.5)
    assert overlap["b"].ngrams_in_training == overlap["b"].documents_in_training == 0


def test_what_most_documents_share_is_form_and_not_overlap(tmp_path: Path) -> None:
    form = list(range(1, 16))
    documents = [form + list(range(n * 100 + 1000, n * 100 + 1020)) for n in range(COMMON_MIN_DOCUMENTS)]
    train = token_set(tmp_path / "train", [form + list(range(9000, 9020))])
    overlap = measure_overlap(train, {"a": token_set(tmp_path / "a", documents)})["a"]
    assert overlap.common_ngrams == 3
    assert overlap.documents_in_training == 0
    assert overlap.documents == COMMON_MIN_DOCUMENTS


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_overlap_equals_comparing_every_ngram(
    tmp_path_factory: pytest.TempPathFactory, train: list[list[int]], validation: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("overlap")
    overlap = measure_overlap(token_set(folder / "t", train), {"v": token_set(folder / "v", validation)})["v"]
    there = set().union(*map(grams, train))
    wanted = set().union(*map(grams, validation))
    assert (overlap.ngrams, overlap.ngrams_in_training) == (len(wanted), len(wanted & there))
    assert overlap.documents_in_training == sum(bool(grams(document) & there) for document in validation)


def test_ngram_hashes_tell_orders_apart() -> None:
    packer = Packer(NGRAM, pad_id=0)
    rng = np.random.default_rng(0)
    for _ in range(500):
        packer.add_text(rng.permutation(NGRAM).tolist())
    hashes, _ = ngram_hashes(packer.rows())
    assert len(np.unique(hashes)) == len(hashes) == 500
