"""Batches as grain datasets: arrays, a token stream, sequences of unequal length.

Each function returns a `grain.IterDataset` of dicts of numpy arrays. Its iterator's state is one number, the same on
every process, so that `fit` keeps it in checkpoints and a run may go on with another number of processes. Batch i of
epoch e is a pure function of (seed, e, i). ``batch_size`` counts the examples of all processes together; each process
gets its rows of every batch.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

Batch = dict[str, np.ndarray]
_ENDLESS = 2**62


def array_batches(
    arrays: Mapping[str, Any],
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    transform: Callable[[Batch], Batch] | None = None,
    threads: int = 1,
    shared: bool = True,
) -> grain.IterDataset:
    """Rows of ``arrays`` ({name: (n, …)}, numpy or anything that takes an index array): {name: (batch, …)}.

    Args:
        epochs: passes over the data; None for no end.
        drop_remainder: leave out the last, smaller batch of each pass. Keep it for evaluation.
        transform: a pure function of a batch, run in the loading thread.
        threads: loading threads; 0 loads when asked.
        shared: each of several processes gets its rows of a batch, as `fit` takes them; else all rows.

    Raises ValueError for arrays of unequal length, none at all, or a batch larger than the data or not divisible by
    the number of processes.
    """
    sizes = {name: len(a) for name, a in arrays.items()}
    if not sizes or len(set(sizes.values())) != 1:
        raise ValueError(f"arrays: expected arrays of one common length, got {sizes or 'none'}")
    rows = dict(arrays)

    def gather(index: np.ndarray) -> Batch:
        batch = {name: np.asarray(a[index]) for name, a in rows.items()}
        return transform(batch) if transform is not None else batch

    order = lambda epoch: _permutation(len(next(iter(rows.values()))), seed, epoch, shuffle)
    n = next(iter(sizes.values()))
    return _dataset(order, n, batch_size, gather, epochs, drop_remainder, threads, shared=shared)


def heldout_batches(arrays: Mapping[str, Any], batch_size: int) -> grain.IterDataset:
    """:func:`array_batches` for evaluation: once through all rows in their order.

    Of several processes each device needs as many rows as every other: of the last rows those that cannot be spread
    are left out then, fewer than there are devices. Errors as :func:`array_batches`.
    """
    if jax.process_count() > 1:
        ways = jax.device_count()
        whole = min(len(a) for a in arrays.values()) // ways * ways
        if not whole:
            raise ValueError(f"arrays: expected at least one row for each of {ways} devices")
        arrays, batch_size = {name: a[:whole] for name, a in arrays.items()}, min(batch_size, whole)
    return array_batches(arrays, batch_size, shuffle=False, epochs=1, drop_remainder=False)


def own_rows(batch: Any) -> Any:
    """This process's rows of a batch (a tree of arrays) that all processes have made alike; alone: all of them.

    Raises ValueError for rows that do not divide over the processes.
    """
    n = jax.process_count()

    def part(x: np.ndarray) -> np.ndarray:
        if len(x) % n:
            raise ValueError(f"batch_size: expected a multiple of the {n} processes, got {len(x)} rows")
        return x[jax.process_index() * len(x) // n : (jax.process_index() + 1) * len(x) // n]

    return batch if n == 1 else jax.tree.map(part, batch)


def token_batches(
    tokens: Any,
    length: int,
    batch_size: int,
    *,
    stride: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    threads: int = 1,
) -> grain.IterDataset:
    """Windows of ``length`` out of one stream of ids, (tokens,) numpy or memory-mapped: {"input_ids": (batch, length)}.

    Window i begins at ``i · stride`` (default: ``length``, no overlap); what does not fill the last one is left out.
    Raises ValueError for a stream shorter than one window, and as :func:`array_batches`.
    """
    stride = length if stride is None else stride
    if length < 1 or stride < 1:
        raise ValueError(f"length, stride: expected 1 or more, got {length}, {stride}")
    if np.ndim(tokens) != 1 or len(tokens) < length:
        raise ValueError(f"tokens: expected one axis of at least {length} ids, got shape {np.shape(tokens)}")
    windows = (len(tokens) - length) // stride + 1
    offsets = np.arange(length)

    def gather(index: np.ndarray) -> Batch:
        return {"input_ids": np.asarray(tokens[index[:, None] * stride + offsets], np.int32)}

    order = lambda epoch: _permutation(windows, seed, epoch, shuffle)
    return _dataset(order, windows, batch_size, gather, epochs, drop_remainder, threads)


def sequence_batches(
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    *,
    pad_id: int,
    max_length: int | None = None,
    buckets: Sequence[int] | None = None,
    extra: Mapping[str, Any] | None = None,
    group: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    threads: int = 1,
) -> grain.IterDataset:
    """Lists of ids padded on the right: {"input_ids", "attention_mask": (batch, L) int32, and the rows of ``extra``}.

    L is the smallest of ``buckets`` that holds the longest sequence of the whole batch, on all processes; the default
    is one bucket, the longest sequence. Every bucket is one compiled program.

    Args:
        max_length: longer sequences are cut.
        extra: {name: (n, …)} further arrays, labels for example.
        group: cut batches from windows of ``group`` batches sorted by length, in random order: less padding. 1 keeps
            the order of the shuffle.

    Raises ValueError for an empty sequence, one longer than the largest bucket, and as :func:`array_batches`.
    """
    cut = [np.asarray(s[:max_length], np.int32) for s in sequences]
    lengths = np.array([len(s) for s in cut], np.int64)
    if not len(cut) or lengths.min() == 0:
        raise ValueError(f"sequences: expected at least one id in each, number {int(np.argmin(lengths))} is empty"
                         if len(cut) else "sequences: there are none")  # fmt: skip
    sizes = np.array(sorted(buckets) if buckets else [lengths.max()], np.int64)
    if lengths.max() > sizes[-1]:
        raise ValueError(f"buckets: the longest sequence has {lengths.max()} ids, the largest bucket {sizes[-1]}")
    extra = dict(extra or {})
    for name, a in extra.items():
        if len(a) != len(cut) or name in ("input_ids", "attention_mask"):
            raise ValueError(f"extra: {name} has {len(a)} rows for {len(cut)} sequences, or a name that is taken")
    if group < 1:
        raise ValueError(f"group: expected 1 or more batches, got {group}")

    def order(epoch: int) -> np.ndarray:
        plain = _permutation(len(cut), seed, epoch, shuffle)
        return plain if group == 1 else _grouped(plain, lengths, batch_size, group, seed, epoch, shuffle)

    def gather(index: np.ndarray, whole: np.ndarray) -> Batch:
        width = int(sizes[np.searchsorted(sizes, lengths[whole].max())])
        ids = np.full((len(index), width), pad_id, np.int32)
        mask = np.zeros((len(index), width), np.int32)
        for row, i in enumerate(index):
            ids[row, : lengths[i]] = cut[i]
            mask[row, : lengths[i]] = 1
        return {"input_ids": ids, "attention_mask": mask, **{k: np.asarray(a[index]) for k, a in extra.items()}}

    return _dataset(order, len(cut), batch_size, gather, epochs, drop_remainder, threads, whole=True)


def _dataset(
    order: Callable[[int], np.ndarray],
    n: int,
    batch_size: int,
    gather: Callable[..., Batch],
    epochs: int | None,
    drop_remainder: bool,
    threads: int,
    whole: bool = False,
    shared: bool = True,
) -> grain.IterDataset:
    """Batch number i of the endless sequence of epochs; ``order(epoch)`` is a permutation of the n examples."""
    processes, process = (jax.process_count(), jax.process_index()) if shared else (1, 0)
    if batch_size < 1 or batch_size % processes:
        raise ValueError(f"batch_size: expected a multiple of the {processes} processes, got {batch_size}")
    if drop_remainder and batch_size > n:
        raise ValueError(f"batch_size: {batch_size} is more than the {n} examples; set drop_remainder=False")
    if not drop_remainder and (n % batch_size) % processes:
        raise ValueError(f"drop_remainder: the last {n % batch_size} examples do not divide over {processes} processes")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs: expected 1 or more, or None for no end, got {epochs}")
    if threads < 0:
        raise ValueError(f"threads: expected 0 or more, got {threads}")
    per_epoch = n // batch_size if drop_remainder else -(-n // batch_size)
    # one permutation serves a whole epoch; two, as loading threads may look into the next one
    cached = functools.lru_cache(maxsize=2)(order)

    def batch(i: int) -> Batch:
        epoch, k = divmod(int(i), per_epoch)
        index = cached(epoch)[k * batch_size : (k + 1) * batch_size]
        share = len(index) // processes
        mine = index[process * share : (process + 1) * share]
        return gather(mine, index) if whole else gather(mine)

    source = grain.MapDataset.range(per_epoch * epochs if epochs else _ENDLESS).map(batch)
    dataset = source.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    dataset.endless = epochs is None  # `fit` refuses to evaluate on such a dataset instead of never coming back
    return dataset


def _permutation(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n) if shuffle else np.arange(n)


def _grouped(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, group: int, seed: int, epoch: int, shuffle: bool
) -> np.ndarray:
    """Sort windows of ``group`` batches by length, then put the full batches of each into random order."""
    rng = np.random.default_rng((seed, epoch, 1))
    out = []
    for start in range(0, len(order), group * batch_size):
        window = order[start : start + group * batch_size]
        window = window[np.argsort(lengths[window], kind="stable")]
        full = len(window) // batch_size * batch_size
        batches = window[:full].reshape(-1, batch_size)
        out += [rng.permutation(batches).ravel() if shuffle else batches.ravel(), window[full:]]
    return np.concatenate(out)
