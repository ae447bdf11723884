"""An endless stream of batches whose position can be saved and taken up again."""

import json
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np


class Stream:
    """Batches from ``data``, begun anew when it ends.

    ``data`` is a grain dataset or iterator (its own state is kept), or any iterable: a list, or a generator that
    yields the same batches whenever the program is run. Those are brought back to their place by drawing and dropping
    what was already seen.
    """

    def __init__(self, data: Iterable):
        if not hasattr(data, "__iter__"):
            raise ValueError(f"data: expected an iterable of batches, got {type(data).__name__}")
        self._data, self._it = data, iter(data)
        self._one_time = self._it is data
        self._epoch, self._drawn = 0, 0

    def next(self) -> Any:
        """The next batch. Raises ValueError when a one-time iterator ends, or the data hold no batch at all."""
        for _ in range(2):
            try:
                batch = next(self._it)
            except StopIteration:
                if self._one_time:
                    raise ValueError(
                        f"data: the iterator ended after {self._drawn} batches; give one that repeats, or a dataset"
                    ) from None
                self._it, self._epoch, self._drawn = iter(self._data), self._epoch + 1, 0
            else:
                self._drawn += 1
                return batch
        raise ValueError("data: it holds no batch (fewer examples than one batch?)")

    def state(self) -> dict:
        """A JSON-able position: after ``restore`` the next batch is the one that would come next now."""
        inner = self._it.get_state() if hasattr(self._it, "get_state") else None
        return {
            "epoch": self._epoch,
            "drawn": self._drawn,
            "inner": json.loads(inner) if isinstance(inner, bytes) else inner,
            "bytes": isinstance(inner, bytes),
        }

    def restore(self, state: dict) -> None:
        """Go to a position that :meth:`state` told. Raises ValueError when the data are too short for it."""
        for _ in range(self._epoch, state["epoch"]):  # an iterable may shuffle anew whenever it is begun
            self._it = iter(self._data)
        if state["inner"] is not None and hasattr(self._it, "set_state"):
            self._it.set_state(json.dumps(state["inner"]).encode() if state["bytes"] else state["inner"])
        else:
            for i in range(state["drawn"]):
                if next(self._it, self) is self:
                    raise ValueError(f"data: the checkpoint stands after batch {state['drawn']}, the data end at {i}")
        self._epoch, self._drawn = state["epoch"], state["drawn"]


def gather_states(state: dict) -> list[dict]:
    """What each process gives (its position in the data, as JSON can hold it), in order, on every process."""
    if jax.process_count() == 1:
        return [state]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.full(longest, ord(" "), np.uint8)
    padded[: len(text)] = text
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def agreed(text: str) -> str:
    """Process 0's ``text``, on every process."""
    return gather_states({"text": text})[0]["text"]


def own_state(states: list[dict]) -> dict:
    """This process's position out of :func:`gather_states`.

    With another number of processes than before, positions carry over only where all were equal, as those of
    `jaxformers.data.batches` are. Raises ValueError otherwise.
    """
    if len(states) == jax.process_count():
        return states[jax.process_index()]
    if all(s == states[0] for s in states):
        return states[0]
    raise ValueError(
        f"data: the checkpoint holds the positions of {len(states)} processes that differ from one another; "
        f"resume with as many, not {jax.process_count()}"
    )
