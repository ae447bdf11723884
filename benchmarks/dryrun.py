"""Dry runs of what the field trains and serves: does it fit, what does it send, how large may the batch be?

    python benchmarks/dryrun.py [--only llama] [--search] [--out benchmarks/results/dryrun.md]

Each row is one call of `jaxformers dry-run`: the real step compiled for a TPU topology by libtpu, without a TPU. Times
are rooflines from peak numbers, not measurements. `--search` looks for the largest batch: several compilations a row.
"""

import argparse
import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

from jaxformers.chips import GIB
from jaxformers.dryrun import Report, dry_run

CASES = [
    ("llama-7b", "v5p:4x4x4", {"mesh": "fsdp=64", "seq": 4096}),
    ("llama-70b", "v5p:8x8x8", {"mesh": "fsdp=128,tensor=4", "seq": 4096}),
    ("glm-100b", "v5p:8x8x16", {"mesh": "data=16,fsdp=64", "seq": 2048}),
    ("vit-g", "v5e:8x8", {"mesh": "fsdp=64", "batch": 1024}),
    ("t5-11b", "v5p:4x4x4", {"mesh": "fsdp=64", "seq": 512}),
    ("llama-70b", "v5e:4x4", {"mesh": "data=2,tensor=8", "step": "prefill", "seq": 4096, "batch": 2}),
    ("llama-70b", "v5e:4x4", {"mesh": "data=2,tensor=8", "step": "decode", "seq": 4096, "batch": 16}),
    ("llama-70b", "v5p:2x2x4", {"mesh": "data=2,tensor=8", "step": "prefill", "seq": 4096, "batch": 2}),
    ("llama-70b", "v5p:2x2x4", {"mesh": "data=2,tensor=8", "step": "decode", "seq": 4096, "batch": 16}),
]
HEADER = (
    "| model and step | topology | mesh | GiB a device | of | largest batch | FLOPs | sent by a device, GB | "
    "least step time, ms: compute, memory, links | compiled in, s |"
)


def row(report: Report) -> str:
    begun = f"| {report.name} | {report.topology} | {report.mesh} "
    if report.fits is None:
        return f"{begun}| could not check: {report.note} | | | | | | |"
    if not report.fits:
        largest = "–" if report.largest_batch is None else f"{report.largest_batch:,}"
        return f"{begun}| does not fit | {report.memory / GIB:.1f} | {largest} | {report.flops:.3g} | | | |"
    largest = "–" if report.largest_batch is None else f"{report.largest_batch:,}"
    sent = ", ".join(f"{kind} {c.bytes / 1e9:.3g}" for kind, c in report.collectives.items() if c.bytes > 1e6) or "0"
    times = ", ".join(f"{1000 * t:.3g}" for t in report.seconds.values())
    return (
        f"{begun}| {report.used / GIB:.1f} | {report.memory / GIB:.1f} | {largest} | {report.flops:.3g} | {sent} | "
        f"{times} | {report.compile_seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose model's name contains this")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dryrun.md")
    args = parser.parse_args()
    cache = args.out.with_suffix(".json")
    known = json.loads(cache.read_text()) if cache.exists() else {}
    from jaxformers.dryrun import from_json

    for model, topology, options in CASES:
        name = json.dumps([model, topology, options])
        if args.only not in model or name in known:
            continue
        try:
            search = args.search and options.get("step", "train") == "train"
            report = dry_run(model, topology, search=search, timeout=args.timeout, **options)
        except ValueError as error:
            print(f"{model}: {error}", flush=True)
            continue
        print(report, flush=True)
        known[name] = report.to_json()
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(known, indent=1))
    rows = [row(from_json(known[name])) for case in CASES if (name := json.dumps(list(case))) in known]
    versions = ", ".join(f"{p} {version(p)}" for p in ("jax", "flax", "libtpu"))
    lines = [
        "# Dry runs",
        "",
        "Compiled by libtpu for topologies that were not there; nothing was run. Least times are what the chip's peak "
        "numbers allow for matrix products, for reading arguments and writing results once, and for the links.",
        "",
        "XLA:TPU writes some gathers of weights as sums of slices put into zeros: they count as all-reduce, and send "
        "twice as much.",
        "",
        HEADER,
        "|" + "---|" * (HEADER.count("|") - 1),
        *rows,
        "",
        f"- command: `python benchmarks/dryrun.py{' --search' if args.search else ''}`",
        f"- machine: {platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}; {versions}",
        f"- date: {datetime.date.today().isoformat()}; load average when it ended {os.getloadavg()[0]:.1f}",
        "",
    ]
    args.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
