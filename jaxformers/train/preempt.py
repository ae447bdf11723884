"""SIGTERM as a request to stop after the step that is running."""

import signal
import threading
from types import FrameType, TracebackType

import jax
import numpy as np


class Sigterm:
    """Context in which SIGTERM sets ``received`` instead of ending the process. Only the main thread can listen."""

    def __init__(self, enabled: bool):
        self.received = False
        self._listen = enabled and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Sigterm":
        if self._listen:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._listen:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    @property
    def at_once(self) -> bool:
        """Whether to break off an evaluation: the time after SIGTERM is short. Never while others take part in it."""
        return self.received and jax.process_count() == 1

    def agreed(self, ask: bool) -> bool:
        """Whether to stop now. Processes must stop at the same step, so with several they ask one another, when
        ``ask`` (the same on all of them) says that it is time to."""
        if jax.process_count() == 1:
            return self.received
        if not ask:
            return False
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.bool_(self.received))))
