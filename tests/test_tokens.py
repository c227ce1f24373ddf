"""Packing, batches of packed rows, and the order of a training run."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.artifacts import read_json, write_json
from compress.errors import ArtifactError, ConfigError
from compress.packing import OPEN_ROWS, Packer
from compress.tokens import Rows, SequenceOrder, TokenSet, shard_name, write_index, write_shard

T = 16
Document = tuple[list[int], list[bool] | None]  # with a mask: a whole document; without: a text

masks = st.lists(st.booleans(), min_size=1, max_size=T)
documents = st.lists(
    st.one_of(
        st.lists(st.integers(1, 99), min_size=1, max_size=50).map(lambda ids: (ids, None)),
        masks.map(lambda mask: (list(range(1, len(mask) + 1)), mask)),
    ),
    max_size=40,
)


def pack(docs: list[Document]) -> Rows:
    packer = Packer(T, pad_id=0)
    for ids, mask in docs:
        if mask is None:
            packer.add_text(ids)
        else:
            packer.add_whole(ids, mask)
    return packer.rows()


def pieces(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """(ids, loss) of each document of the rows, the padding left out."""
    found = []
    for tokens, starts, loss, length in zip(rows.tokens, rows.starts, rows.loss, rows.lengths, strict=True):
        edges = [int(i) for i in np.flatnonzero(starts) if i < length] + [int(length)]
        found += [(tokens[a:b].tolist(), loss[a:b].tolist()) for a, b in pairwise(edges)]
    return found


def write_source(folder: Path, *shards: Rows, vocab_size: int = 100) -> Path:
    for index, rows in enumerate(shards):
        write_shard(folder / shard_name(index), rows, {})
    write_index(folder, T, vocab_size, [shard_name(index) for index in range(len(shards))])
    return folder


@given(documents)
@settings(max_examples=150, deadline=None)
def test_packing_neither_loses_nor_repeats_nor_cuts(docs: list[Document]) -> None:
    rows = pack(docs)
    whole = Counter((tuple(ids), tuple(map(int, mask))) for ids, mask in docs if mask is not None)
    placed = Counter((tuple(ids), tuple(loss)) for ids, loss in pieces(rows))
    assert whole <= placed, "a whole document stays in one piece, with its mask"
    texts = [token for ids, mask in docs if mask is None for token in ids]
    text_pieces = placed - whole
    assert sum(len(ids) * n for (ids, _), n in text_pieces.items()) == len(texts)
    assert all(all(loss) for _, loss in text_pieces), "every token of a text may be a target"
    assert int(rows.lengths.sum()) == sum(len(ids) for ids, _ in docs)
    padding = np.arange(T) >= rows.lengths[:, None]
    assert not rows.tokens[padding].any()
    assert not rows.loss[padding].any()
    assert rows.starts[:, 0].all()


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=50), max_size=20))
@settings(max_examples=50, deadline=None)
def test_texts_alone_are_kept_in_order_and_only_the_last_row_is_padded(texts: list[list[int]]) -> None:
    rows = pack([(text, None) for text in texts])
    assert (rows.lengths[:-1] == T).all()
    assert rows.tokens.ravel()[: int(rows.lengths.sum())].tolist() == [token for text in texts for token in text]


def test_whole_documents_fill_the_room_that_fits_them_best() -> None:
    rows = pack([(list(range(n)), [True] * n) for n in (10, 12, 4, 6)])
    assert [sorted(np.diff([*np.flatnonzero(s), T])) for s in rows.starts] == [[6, 10], [4, 12]]
    assert rows.lengths.tolist() == [T, T]


def test_rows_kept_open_are_bounded() -> None:
    packer = Packer(T, pad_id=0)
    for _ in range(3 * OPEN_ROWS):
        packer.add_whole([1] * 9, [True] * 9)
    assert len(packer._open) == OPEN_ROWS
    assert len(packer.rows().tokens) == 3 * OPEN_ROWS


@given(documents.filter(lambda docs: len(docs) > 0))
@settings(max_examples=60, deadline=None)
def test_positions_restart_and_no_target_crosses_documents(
    tmp_path_factory: pytest.TempPathFactory, docs: list[Document]
) -> None:
    rows = pack(docs)
    tokens = TokenSet([write_source(tmp_path_factory.mktemp("source"), rows)])
    batch = tokens.batch(range(tokens.num_sequences))
    for row in range(tokens.num_sequences):
        position, expected_mask = 0, []
        for t in range(T):
            position = 0 if rows.starts[row, t] else position + 1
            assert batch.position_ids[row, t] == position
            assert batch.valid_mask[row, t] == (t < rows.lengths[row])
            follows = t + 1 < rows.lengths[row] and not rows.starts[row, t + 1]
            expected_mask.append(bool(follows and rows.loss[row, t + 1]))
        assert batch.loss_mask[row].tolist() == expected_mask
    assert torch.equal(batch.input_ids, torch.from_numpy(rows.tokens).long())
    assert batch.loss_mask.sum(1).tolist() == tokens.loss_tokens.tolist()
    assert not batch.loss_mask[:, -1].any()
    assert tokens.num_tokens == sum(len(ids) for ids, _ in docs) == int(batch.valid_mask.sum())


def test_global_index_runs_over_shards_and_sources_sorted_by_name(tmp_path: Path) -> None:
    texts = [[(n % 90) + 1] * (T * rows) for n, rows in enumerate((3, 1, 2))]
    a, b, c = (pack([(text, None)]) for text in texts)
    write_source(tmp_path / "01-later", c)
    write_source(tmp_path / "00-first", a, pack([]), b)  # a shard whose records were all dropped has no rows
    tokens = TokenSet.open(tmp_path)
    assert tokens.source_names == ["00-first", "01-later"]
    assert tokens.source_sizes == [4, 2]
    assert tokens.num_sequences == 6
    assert tokens.batch([5, 0, 3, 3]).input_ids[:, 0].tolist() == [3, 1, 2, 2]
    assert len(tokens.loss_tokens) == 6
    assert TokenSet.open(tmp_path / "01-later").num_sequences == 2
    for wrong in ([6], [-1], []):
        with pytest.raises(IndexError, match="0 to 5"):
            tokens.batch(wrong)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    rows = pack([([1] * 40, None)])
    with pytest.raises(ArtifactError, match=r"missing.*run the tokenize stage"):
        TokenSet.open(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="holds no token folders"):
        TokenSet.open(tmp_path)
    folder = write_source(tmp_path / "00-a", rows)
    shard, index = folder / shard_name(0), folder / "index.json"
    good, facts = shard.read_bytes(), read_json(index)

    shard.write_bytes(good[:-7])
    with pytest.raises(ArtifactError, match=r"shard-00000.*not a complete safetensors"):
        TokenSet.open(tmp_path)
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00000.*missing"):
        TokenSet.open(tmp_path)
    write_shard(shard, pack([([1] * 80, None)]), {})
    with pytest.raises(ArtifactError, match=r"shard-00000.*index.json says"):
        TokenSet.open(tmp_path)
    write_shard(shard, pack([([1], [True])] * 3 + [([1] * T, [True] * T)] * 2), {})
    with pytest.raises(ArtifactError, match=r"30 loss tokens, its index.json says 37"):
        TokenSet.open(tmp_path)
    shard.write_bytes(good)
    write_json(index, {**facts, "format_version": 99})
    with pytest.raises(ArtifactError, match=r"format_version 99"):
        TokenSet.open(tmp_path)
    write_json(index, {"shards": []})
    with pytest.raises(ArtifactError, match="not an index"):
        TokenSet.open(tmp_path)
    write_json(index, facts)
    write_source(tmp_path / "01-b", rows, vocab_size=7)
    with pytest.raises(ArtifactError, match=r"01-b has \(sequence_length, vocab_size\) = \(16, 7\).*\(16, 100\)"):
        TokenSet.open(tmp_path)
    (tmp_path / "01-b" / "index.json").unlink()
    with pytest.raises(ArtifactError, match=r"01-b/index\.json is missing"):
        TokenSet.open(tmp_path)


def test_without_weights_every_epoch_is_another_permutation_of_everything() -> None:
    order = SequenceOrder([30, 20], None, 200, seed=3)
    epochs = order.indices(0, 200).reshape(4, 50)
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = SequenceOrder([30, 20], None, 200, seed=4).indices(0, 200)
    assert not np.array_equal(other, order.indices(0, 200))


def test_permutations_look_uniform() -> None:
    """Each value lands on each place about equally often: chi-squared within six standard deviations."""
    size, epochs = 8, 4000
    drawn = SequenceOrder([size], None, size * epochs, seed=0).indices(0, size * epochs).reshape(epochs, size)
    counts = np.stack([np.bincount(drawn[:, place], minlength=size) for place in range(size)])
    expected, freedom = epochs / size, (size - 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * (2 * freedom) ** 0.5


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 1)), min_size=1, max_size=5),
    st.integers(1, 3000),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_weights_are_kept_and_each_source_goes_by_epochs(
    sources: list[tuple[int, float]], total: int, seed: int
) -> None:
    sizes, weights = [list(column) for column in zip(*sources, strict=True)]
    drawn = SequenceOrder(sizes, weights, total, seed).indices(0, total)
    edges = np.cumsum([0, *sizes])
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        own = drawn[(drawn >= edges[source]) & (drawn < edges[source + 1])] - edges[source]
        assert abs(len(own) - total * weight / sum(weights)) < 2 * np.log2(total + 2) + 2
        for epoch in range(0, len(own) - size + 1, size):
            assert sorted(own[epoch : epoch + size]) == list(range(size))
        assert len(set(own[len(own) // size * size :])) == len(own) % size


@given(st.data(), st.booleans())
@settings(max_examples=20, deadline=None)
def test_random_access_equals_sequential_and_longer_runs_continue_shorter_ones(
    data: st.DataObject, weighted: bool
) -> None:
    total = 150_000  # more than two blocks
    weights = [0.7, 0.2, 0.1] if weighted else None
    order = SequenceOrder([1000, 50_000, 7], weights, total, seed=1)
    everything = order.indices(0, total)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    assert np.array_equal(
        SequenceOrder([1000, 50_000, 7], weights, stop, 1).indices(start, stop), everything[start:stop]
    )


def test_order_is_the_same_on_every_machine_and_release() -> None:
    """Golden numbers: another order would make a resumed run see sequences twice and others never."""
    assert SequenceOrder([5, 4], [0.75, 0.25], 12, seed=7).indices(0, 12).tolist() == [
        1,
        0,
        4,
        2,
        8,
        3,
        3,
        0,
        2,
        5,
        4,
        1,
    ]
    assert SequenceOrder([5, 4], None, 12, seed=7).indices(0, 12).tolist() == [1, 7, 6, 0, 4, 2, 8, 3, 5, 7, 5, 3]


def test_a_source_without_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"source 1 has no sequences.*\[3, 0\]"):
        SequenceOrder([3, 0], [0.5, 0.5], 4, seed=0)
    with pytest.raises(ConfigError, match="no sequences"):
        SequenceOrder([0], None, 4, seed=0)
