"""Batches: every example once an epoch, the same from the same seed, from any saved position, on any process."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformers.data import batches
from jaxformers.data.batches import array_batches, sequence_batches, token_batches


def take(dataset, n):
    iterator = iter(dataset)
    return [next(iterator) for _ in range(n)]


def test_every_example_once_an_epoch_and_another_order_in_the_next():
    dataset = array_batches({"x": np.arange(12), "y": np.arange(12) * 2}, 4, seed=1)
    batches = take(dataset, 6)
    first, second = ([int(i) for b in part for i in b["x"]] for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second != list(range(12))
    assert all(np.array_equal(b["y"], 2 * b["x"]) for b in batches)


def test_seed_and_no_shuffle():
    orders = [
        np.concatenate([b["x"] for b in take(array_batches({"x": np.arange(8)}, 4, seed=s), 2)]) for s in (1, 1, 2)
    ]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    plain = list(array_batches({"x": np.arange(10)}, 4, shuffle=False, epochs=1, drop_remainder=False))
    assert [b["x"].tolist() for b in plain] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(list(array_batches({"x": np.arange(10)}, 4, epochs=3))) == 6


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 25), st.integers(0, 3))
def test_any_position_is_restored(n, batch, position, threads):
    batch = min(batch, n)
    make = lambda: array_batches({"x": np.arange(n)}, batch, seed=5, threads=threads)
    iterator = iter(make())
    for _ in range(position):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    want = [next(iterator)["x"] for _ in range(4)]
    other = iter(make())
    next(other)
    other.set_state(state)
    for x in want:
        np.testing.assert_array_equal(next(other)["x"], x)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_batch(monkeypatch, processes):
    """Rows of the processes, joined in order, are the batch of one process; paddings and positions agree."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 9, rng.integers(1, 20)).tolist() for _ in range(24)]

    def make():
        return iter(sequence_batches(sequences, 8, pad_id=0, buckets=(4, 8, 20), group=3, seed=2, threads=0))

    alone = make()
    want = [next(alone) for _ in range(5)]
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    parts = []
    for p in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda p=p: p)
        iterator = make()
        parts.append([next(iterator) for _ in range(5)])
        assert iterator.get_state() == alone.get_state()
    for i, whole in enumerate(want):
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([part[i][name] for part in parts]), whole[name])


def test_token_windows(tmp_path):
    path = tmp_path / "tokens.bin"
    np.arange(103, dtype=np.uint16).tofile(path)
    tokens = np.memmap(path, np.uint16, "r")
    windows = np.concatenate([b["input_ids"] for b in token_batches(tokens, 10, 5, epochs=1, shuffle=False)])
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows, np.arange(100).reshape(10, 10))
    shuffled = np.concatenate([b["input_ids"] for b in token_batches(tokens, 10, 5, epochs=1, seed=3)])
    np.testing.assert_array_equal(np.sort(shuffled[:, 0]), np.arange(0, 100, 10))
    overlapping = list(token_batches(tokens, 10, 1, stride=5, epochs=1, shuffle=False))
    assert len(overlapping) == 19 and overlapping[-1]["input_ids"][0, -1] == 99


def test_sequences_are_padded_to_their_bucket_and_nothing_is_lost():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 50, n).tolist() for n in rng.integers(1, 33, 64)]
    dataset = sequence_batches(
        sequences, 8, pad_id=0, buckets=(32, 8, 16), extra={"label": np.arange(64)}, epochs=1, group=4, seed=1
    )
    seen, widths = set(), []
    for batch in dataset:
        longest = batch["attention_mask"].sum(1).max()
        width = batch["input_ids"].shape[1]
        assert width == min(b for b in (8, 16, 32) if b >= longest)
        widths.append(width)
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["label"], strict=True):
            assert ids[: mask.sum()].tolist() == sequences[label] and not ids[mask.sum() :].any()
            seen.add(int(label))
    assert seen == set(range(64))
    plain = sequence_batches(sequences, 8, pad_id=0, buckets=(8, 16, 32), epochs=1, seed=1)
    assert sum(widths) < sum(b["input_ids"].shape[1] for b in plain), "grouping by length saves padding"
    assert sorted(widths) != widths, "but batches do not come in order of length"


def test_max_length_cuts_and_the_default_is_one_shape():
    dataset = sequence_batches([[1] * n for n in (3, 9, 5, 7)], 2, pad_id=-1, max_length=6, epochs=1)
    assert {b["input_ids"].shape for b in dataset} == {(2, 6)}


def test_transform_runs_on_each_batch():
    dataset = array_batches({"x": np.arange(4)}, 2, transform=lambda b: {"x": b["x"] * 10}, epochs=1, shuffle=False)
    assert [b["x"].tolist() for b in dataset] == [[0, 10], [20, 30]]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: array_batches({}, 2), "arrays"),
        (lambda: array_batches({"x": np.ones(3), "y": np.ones(4)}, 2), "arrays"),
        (lambda: array_batches({"x": np.ones(3)}, 4), "batch_size: 4 is more than the 3 examples"),
        (lambda: array_batches({"x": np.ones(3)}, 0), "batch_size"),
        (lambda: array_batches({"x": np.ones(3)}, 2, epochs=0), "epochs"),
        (lambda: array_batches({"x": np.ones(3)}, 2, threads=-1), "threads"),
        (lambda: token_batches(np.arange(5), 10, 1), "tokens"),
        (lambda: token_batches(np.ones((5, 5)), 2, 1), "tokens"),
        (lambda: token_batches(np.arange(5), 0, 1), "length"),
        (lambda: sequence_batches([[1], []], 1, pad_id=0), "sequences: .* number 1 is empty"),
        (lambda: sequence_batches([], 1, pad_id=0), "sequences"),
        (lambda: sequence_batches([[1] * 9], 1, pad_id=0, buckets=(4, 8)), "buckets: .* 9 ids, the largest bucket 8"),
        (lambda: sequence_batches([[1]], 1, pad_id=0, extra={"y": np.ones(2)}), "extra"),
        (lambda: sequence_batches([[1]], 1, pad_id=0, group=0), "group"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_rows_of_each_process(monkeypatch):
    """Held-out rows are cut to what devices can share; a batch that all have made is parted; one may keep it whole."""
    rows = {"x": np.arange(11)}
    one = [batch["x"].tolist() for batch in batches.heldout_batches(rows, 4)]
    assert one == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert batches.own_rows(rows) is rows
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    found = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append([batch["x"].tolist() for batch in batches.heldout_batches(rows, 4)])
        whole = batches.array_batches(rows, 3, shuffle=False, epochs=1, drop_remainder=False, shared=False)
        assert sum((batch["x"].tolist() for batch in whole), []) == list(range(11))
        assert batches.own_rows({"a": {"b": np.arange(4)}})["a"]["b"].tolist() == [[0, 1], [2, 3]][process]
    assert found == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 2 processes, got 11 rows"):
        batches.own_rows(rows)
    with pytest.raises(ValueError, match="at least one row for each of 2 devices"):
        batches.heldout_batches({"x": np.arange(1)}, 4)
