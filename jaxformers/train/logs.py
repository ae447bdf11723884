"""Where the numbers of a run go: `metrics.jsonl`, TensorBoard, the progress line. Only process 0 writes."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformers.atomic import write_text_atomic


def local(directory: str | os.PathLike) -> Path:
    """A path of the file system. Raises ValueError for the address of an object store, which must be mounted first."""
    if "://" in str(directory) or str(directory).startswith(("gs:/", "s3:/")):
        raise ValueError(f"directory: {directory} is not a path; mount the bucket (gcsfuse, s3fs) and name the mount")
    return Path(directory)


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, flushed as it is written. Numbers that are not finite become null.

    ``kept`` are the records up to step ``resume_at`` of a run that is taken up.
    """

    def __init__(self, path: Path, resume_at: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept: list[dict[str, Any]] = []
        if resume_at and path.exists():  # lines of steps that are about to be run again would stand there twice
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the line that was being written when the process was killed
                if record.get("step", 0) <= resume_at:
                    self.kept.append(record)
        write_text_atomic(path, "".join(json.dumps(record) + "\n" for record in self.kept))
        self._file = path.open("a")

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Meter:
    """Weighted means of the metrics since the last report, and rates over the time spent training."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._depth = clock, 0
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._examples = self._tokens = self._steps = self._skipped = 0
        self._flops = 0.0
        self._start, self._pauses = self._clock(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training: compiling, evaluating, waiting for a checkpoint. May be nested."""
        self._depth += 1
        began = self._clock()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._pauses += self._clock() - began

    def add(
        self, metrics: Mapping[str, float], examples: int, tokens: int, flops: float, skipped: bool = False
    ) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
            self._counts[name] = self._counts.get(name, 0) + 1
        self._skipped += skipped
        self._steps += 1
        self._examples += examples
        self._tokens += tokens
        self._flops += flops

    def report(self, peak: float | None) -> dict[str, float]:
        """Means, ``steps_per_s``, ``examples_per_s``, ``tokens_per_s`` (token batches), ``mfu``; begins anew."""
        seconds = max(self._clock() - self._start - self._pauses, 1e-9)
        out = {name: total / self._counts[name] for name, total in self._sums.items()}
        out["steps_per_s"] = self._steps / seconds
        out["examples_per_s"] = self._examples / seconds
        if self._tokens:
            out["tokens_per_s"] = self._tokens / seconds
        if peak and self._flops:
            out["mfu"] = self._flops / seconds / peak
        if self._skipped:
            out["skipped_updates"] = self._skipped
        self.reset()
        return out


class Recorder:
    """Everything that a run tells: records in memory and in files, the progress line, messages."""

    def __init__(self, directory: Path | None, start: int, total: int, *, progress: bool, tensorboard: bool):
        self.history: list[dict[str, Any]] = []
        self.meter = Meter()
        self._bar = Progress(total, start, progress)
        self._files: list[Any] = []
        if directory is not None and jax.process_index() == 0:
            metrics_file = MetricsFile(directory / "metrics.jsonl", resume_at=start)
            self._files.append(metrics_file)
            self.history += metrics_file.kept
            if tensorboard:
                from jaxformers.train.tensorboard import EventFile

                self._files.append(EventFile(directory / "tensorboard"))

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep a record; one of kind "train" is shown on the progress line too."""
        self.history.append(dict(record))
        for file in self._files:
            file.write(record)
        if record["kind"] == "train":
            self._bar.update(record["step"], record)

    def compiled(self, name: str, trace: float, compile_: float, flops: float, shapes: int) -> None:
        """A program was compiled in ``compile_`` seconds, ``shapes`` so far."""
        self.write(
            {"kind": "compile", "program": name, "trace_seconds": trace, "compile_seconds": compile_, "flops": flops,
             "shapes": shapes}
        )  # fmt: skip

    def progress(self, step: int) -> None:
        self._bar.update(step)

    def say(self, message: str) -> None:
        self._bar.say(message)

    def close(self) -> None:
        self._bar.close()
        for file in self._files:
            file.close()


class Progress:
    """One line on a terminal: step, loss, rate, model FLOPs utilisation, time left. Silent anywhere else."""

    def __init__(self, total: int, start: int, enabled: bool):
        self._bar = None
        if not enabled or jax.process_index() or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(30), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
        times = (TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn())
        self._bar = Bar(TextColumn("train"), *columns, *times, console=Console(stderr=True))
        self._bar.start()
        self._task = self._bar.add_task("train", total=total, completed=start, text="compiling")

    def update(self, step: int, record: Mapping[str, float] | None = None) -> None:
        if self._bar is None:
            return
        if record is None:
            self._bar.update(self._task, completed=step)
            return
        parts = [f"loss {record['loss']:.4g}"]
        rate = "tokens" if "tokens_per_s" in record else "examples"
        parts.append(f"{record[rate + '_per_s']:,.0f} {rate}/s")
        if "mfu" in record:
            parts.append(f"MFU {100 * record['mfu']:.1f} %")
        self._bar.update(self._task, completed=step, text=" · ".join(parts))

    def say(self, message: str) -> None:
        """A line of text above the bar, or on stderr."""
        if jax.process_index():
            return
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def batch_size(batch: Any) -> tuple[int, int]:
    """(examples, tokens) of this process's batch times the number of processes; 0 tokens where it holds none."""
    leaves = jax.tree.leaves(batch)
    examples = int(np.shape(leaves[0])[0]) if leaves and np.ndim(leaves[0]) else 0
    tokens = 0
    if isinstance(batch, Mapping):
        if isinstance(batch.get("attention_mask"), np.ndarray):
            tokens = int(batch["attention_mask"].sum())
        elif "input_ids" in batch:
            tokens = int(np.prod(np.shape(batch["input_ids"])))
    n = jax.process_count()
    return examples * n, tokens * n


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    number = float(value)
    return number if math.isfinite(number) else None
