"""Rows of unequal lengths to rectangular arrays: the lengths to pad to, and the padding."""

import bisect
from collections.abc import Sequence

import numpy as np


def length_buckets(max_length: int, smallest: int = 16, per_doubling: int = 2) -> tuple[int, ...]:
    """Lengths to pad to, so many between a length and its double (16, 24, 32, 48, ...), ending with `max_length`.

    A step compiled for each bucket is compiled at most per_doubling · log2(max_length / smallest) + 1 times, and no row
    is padded to more than 1 + 1 / per_doubling times its length (beyond `smallest`, if per_doubling divides that).
    """
    if min(max_length, smallest, per_doubling) < 1:
        raise ValueError(
            f"max_length={max_length}, smallest={smallest}, per_doubling={per_doubling}: expected positive numbers"
        )
    parts = range(per_doubling, 2 * per_doubling)
    steps = sorted({(smallest << k) * part // per_doubling for k in range(40) for part in parts})
    return (*(step for step in steps if step < max_length), max_length)


def bucket(rows: Sequence[Sequence], buckets: Sequence[int] | None) -> int:
    """The smallest of `buckets` that holds the longest row (without buckets its length). ValueError where none does."""
    longest = max((len(row) for row in rows), default=0)
    if buckets is None:
        return longest
    sizes = sorted(buckets)
    if not sizes or sizes[0] < 1:
        raise ValueError(f"buckets={tuple(buckets)}: expected positive lengths")
    index = bisect.bisect_left(sizes, longest)
    if index == len(sizes):
        raise ValueError(f"buckets: a row of {longest} tokens is longer than the largest, {sizes[-1]}; give max_length")
    return sizes[index]


def pad_rows(rows: Sequence[Sequence[int]], length: int, fill: int, side: str) -> np.ndarray:
    """Rows of unequal lengths as int32 [n, length]."""
    out = np.full((len(rows), length), fill, np.int32)
    for i, row in enumerate(rows):
        if len(row):
            try:
                out[i, slice(0, len(row)) if side == "right" else slice(length - len(row), length)] = row
            except OverflowError:
                raise ValueError(f"rows: row {i} holds {max(row, key=abs)}, which is no int32") from None
    return out


def check_side(side: str, argument: str) -> str:
    """`side`, or ValueError naming `argument`."""
    if side not in ("right", "left"):
        raise ValueError(f"{argument}={side!r}: expected 'right' or 'left'")
    return side
