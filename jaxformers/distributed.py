"""Several processes that train as one: how they find each other, and what happens when one of them is gone.

Every process runs the same command. On a TPU pod and under SLURM or Open MPI they find each other by themselves;
anywhere else each is told the coordinator's address, how many there are and which one it is. Batches are made for each
process's part (`jaxformers.data.batches`), process 0 writes logs, all of them write checkpoints together.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 75  # EX_TEMPFAIL: start all processes again, nothing is wrong with the run
_HEARTBEAT_SECONDS = 900  # JAX aborts without a word about checkpoints then; `Watch` is to speak first


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> bool:
    """Join the other processes, before anything else touches JAX's devices; True where there are several.

    ``coordinator`` "host:port" of process 0, ``processes`` how many, ``process`` which one, from 0: all or none of
    them. Without them they are taken from the environment of a TPU pod, SLURM or Open MPI; a process that is alone
    stays alone. Raises ValueError for arguments that cannot be.
    """
    import jax

    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if all(value is None for value in given.values()):
        if not launched_together():
            return False
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
        return jax.process_count() > 1
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{missing[0]}: coordinator, processes and process belong together")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator: expected host:port, got {coordinator!r}")
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(f"process: expected 0 to {processes - 1} of {processes} processes, got {process}")
    jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    return processes > 1


def launched_together(environment: dict[str, str] | None = None) -> bool:
    """Whether a launcher has started several processes: a TPU pod slice, SLURM, or Open MPI."""
    env = os.environ if environment is None else environment
    number = lambda name: int(env[name]) if env.get(name, "").isdigit() else 1
    hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    slurm = number("SLURM_NTASKS") if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env else 1
    return len(hosts) > 1 or slurm > 1 or number("OMPI_COMM_WORLD_SIZE") > 1 or number("MEGASCALE_NUM_SLICES") > 1


class Watch:
    """Ends this process with :data:`EXIT_CODE` when it has waited for the others longer than ``limit`` seconds.

    A collective whose partner has died may never return, and no exception can reach a thread that waits in one. So the
    wait is timed from another thread. ``last()`` names the newest checkpoint. Does nothing for a process alone.
    """

    def __init__(self, limit: float, last: Callable[[], str]):
        import jax

        self._limit, self._last, self._since = limit, last, None
        self._alone = jax.process_count() == 1
        self._stop = threading.Event()
        if not self._alone:
            threading.Thread(target=self._look, daemon=True, name="jaxformers-watch").start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A stretch of code that needs all processes; an error of the runtime within it ends this process too."""
        if self._alone:
            yield
            return
        import jax

        self._since = time.monotonic()
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            self._leave(f"a collective failed: {(str(error).splitlines() or [''])[0][:300]}")
        finally:
            self._since = None

    def close(self) -> None:
        self._stop.set()

    def _look(self) -> None:
        while not self._stop.wait(min(1.0, self._limit / 4)):
            since = self._since
            if since is not None and time.monotonic() - since > self._limit:
                self._leave(f"no answer from the other processes for {self._limit:g} s")

    def _leave(self, why: str) -> None:
        """At once: exit handlers would wait for the process that is gone."""
        import jax

        print(
            f"process {jax.process_index()} of {jax.process_count()}: {why}. One of them has probably died. "
            f"{self._last()}; the same command on all of them goes on from there.",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(EXIT_CODE)
