"""What the benchmarks share: two contestants in turns, and a report that says where and when."""

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

ONE_CORE = "--one-core" in sys.argv


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, with what all benchmarks take."""
    parser.add_argument("--out", help="also write the result to this file")
    parser.add_argument(
        "--one-core",
        action="store_true",
        help="both on one core, processor time instead of time passed: what a busy machine does not distort much",
    )
    args = parser.parse_args()
    if args.one_core:  # XLA and torch make their threads when they are first used, after this
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
    return args


def alternate(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each call, in turns, so that whatever else the machine does strikes both; both have run before."""
    clock = time.process_time if ONE_CORE else time.perf_counter
    a, b = [], []
    for _ in range(rounds):
        for function, times in ((ours, a), (theirs, b)):
            start = clock()
            function()
            times.append(clock() - start)
    return a, b


def row(name: str, ours: list[float], theirs: list[float], per: float = 1.0) -> str:
    """One line of the table: medians, minima (of seconds · per) and both ratios."""
    text = lambda t: f"{t * per:.4g}"
    medians, minima = (statistics.median(ours), statistics.median(theirs)), (min(ours), min(theirs))
    return (
        f"| {name} | {text(medians[0])} | {text(medians[1])} | {medians[0] / medians[1]:.2f} | "
        f"{text(minima[0])} | {text(minima[1])} | {minima[0] / minima[1]:.2f} |"
    )


HEADER = (
    "| what | jaxformers, median | torch, median | ratio | jaxformers, best | torch, best | ratio |\n"
    "|---|---|---|---|---|---|---|"
)


def cpu() -> str:
    try:
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def report(out: str | None, title: str, table: list[str], notes: str) -> None:
    """Print a result with machine, date, versions and command; with ``out`` also write it there."""
    versions = ", ".join(f"{p} {version(p)}" for p in ("jax", "jaxlib", "flax", "torch", "transformers"))
    text = "\n".join(
        [
            f"# {title}\n",
            *table,
            "",
            f"- measured: {'processor time of one core' if ONE_CORE else 'time passed, all cores'}, in turns",
            f"- command: `python {' '.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}`",
            f"- machine: {cpu()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}, Python "
            f"{platform.python_version()}",
            f"- versions: {versions}",
            f"- date: {datetime.date.today().isoformat()}; load average when it ended {os.getloadavg()[0]:.1f}",
            "",
            notes.strip(),
            "",
        ]
    )
    print(text)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text)
