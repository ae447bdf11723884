"""Load and save time and peak memory of a synthetic checkpoint of about 1 GB, against reading and writing its bytes.

    python benchmarks/load.py [--gigabytes 1.08] [--repeat 3] [--out benchmarks/results/load.md]

Every measurement is a process of its own, after `import jaxformers` and the start of JAX; the file is in the page cache
for all of them alike. Time is the median. Peak memory is the growth of the resident set's high-water mark (VmHWM),
which counts pages of the mapped file as well; "anonymous" is what the process itself allocated, measured every 2 ms.
Needs Linux (/proc).
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

WIDTH, INNER, VOCAB = 1024, 2816, 32000
LAYER_BYTES = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH)
OUTER_BYTES = 4 * (2 * VOCAB * WIDTH + WIDTH)
SHARDS = 4


def make(directory: Path, layers: int, max_shard_bytes: float) -> None:
    """A Llama with random float32 weights."""
    from jaxformers.safetensors_io import write_checkpoint

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    shapes = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (WIDTH, INNER)}
        shapes |= {f"{layer}{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    rng = np.random.default_rng(0)
    draw = lambda shape: lambda: rng.standard_normal(shape, np.float32)
    tensors = [(name, shape, np.float32, draw(shape)) for name, shape in shapes.items()]
    write_checkpoint(
        tensors, directory, max_shard_bytes=max_shard_bytes, extra_files={"config.json": json.dumps(config)}
    )


# ---- what is measured: each function prepares, and returns what is timed, in a process of its own ------------------


def read_bytes(directory: Path):
    """The least there is: every file into one buffer in memory."""

    def run():
        buffers = []
        for path in sorted(directory.glob("*.safetensors")):
            buffer = np.empty(path.stat().st_size, np.uint8)
            with open(path, "rb", buffering=0) as file:
                view, done = memoryview(buffer), 0
                while done < len(buffer):
                    done += file.readinto(view[done : done + (8 << 20)])
            buffers.append(buffer)
        return buffers

    return run


def reference(directory: Path):
    """safetensors.numpy.load_file: arrays in memory, nothing checked or converted."""
    from safetensors.numpy import load_file

    return lambda: [load_file(path) for path in sorted(directory.glob("*.safetensors"))]


def load(directory: Path, **options):
    import jax

    import jaxformers as jf

    return lambda: jax.block_until_ready(jf.functional(jf.load(directory, **options))[1])


def save(directory: Path):
    import jaxformers as jf

    model = jf.load(directory)
    return lambda: jf.save(model, directory.parent / "saved")


def write_bytes(directory: Path):
    data = b"".join(path.read_bytes() for path in sorted(directory.glob("*.safetensors")))

    def run():
        with open(directory.parent / "bytes", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return run


# name -> (function, shards, what stays in memory afterwards relative to the checkpoint; None: not a load)
CASES = {
    "read the bytes": (read_bytes, 1, 1.0),
    "safetensors.numpy.load_file": (reference, 1, 1.0),
    "jf.load, one file": (load, 1, 1.0),
    "jf.load, four shards": (load, SHARDS, 1.0),
    "jf.load, four shards, to bfloat16": (lambda d: load(d, dtype="bfloat16"), SHARDS, 0.5),
    "write the bytes and fsync": (write_bytes, 1, None),
    "jf.save": (save, 1, None),
}


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def measure(case: str, directory: Path) -> None:
    """Runs in the child: prints seconds, growth of the peak resident set and of the peak anonymous memory."""
    import jax

    import jaxformers  # noqa: F401

    jax.block_until_ready(jax.numpy.zeros(1))
    run = CASES[case][0](directory)
    anonymous, stop = [status("RssAnon")], threading.Event()

    def watch():
        while not stop.wait(0.002):
            anonymous.append(status("RssAnon"))

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark counts from here
    before = status("VmHWM")
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    print(json.dumps([seconds, status("VmHWM") - before, max(anonymous) - anonymous[0]]))
    del result


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.08)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to put the checkpoint (default: a temporary directory)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "load.md")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        return measure(arguments.case[0], Path(arguments.case[1]))

    chosen = {name: case for name, case in CASES.items() if arguments.only in name}
    layers = max(1, round((arguments.gigabytes * 1e9 - OUTER_BYTES) / LAYER_BYTES))
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        size = OUTER_BYTES + layers * LAYER_BYTES
        largest = {}
        for shards in sorted({shards for _, shards, _ in chosen.values()}):
            directory = Path(place) / str(shards)
            make(directory, layers, 5e9 if shards == 1 else size / SHARDS * 1.05)
            largest[shards] = max(path.stat().st_size for path in directory.glob("*.safetensors"))
        os.sync()
        runs: dict[str, list] = {case: [] for case in chosen}
        for turn in range(arguments.repeat + 1):  # in turns, so that all see the same machine; the first one warms up
            for case, (_, shards, _) in chosen.items():
                command = [sys.executable, __file__, "--case", case, str(Path(place) / str(shards))]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{case}: {done.stderr}")
                if turn:
                    runs[case].append(json.loads(done.stdout.splitlines()[-1]))
        rows = []
        for case, (_, shards, stays) in chosen.items():
            seconds, peak, anonymous = (statistics.median(values) for values in zip(*runs[case], strict=True))
            bound = None if stays is None else 1.2 * largest[shards] + stays * size
            rows.append((case, seconds, peak, anonymous, bound))
            print(
                f"{case:36} {seconds:6.2f} s  peak {peak / 1e9:5.2f} GB  anonymous {anonymous / 1e9:5.2f} GB",
                flush=True,
            )

    import jax

    base = {row[0]: row[1] for row in rows}
    lines = [
        "# Loading and saving a checkpoint",
        "",
        f"{datetime.date.today()}, {cpu_name()}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}, jax {jax.__version__}; `python benchmarks/load.py --gigabytes "
        f"{arguments.gigabytes} --repeat {arguments.repeat}`.",
        "",
        f"A Llama of {layers} layers, {size / 1e9:.2f} GB in float32; the largest of the four shards has "
        f"{largest[SHARDS] / 1e9:.2f} GB. Median of {arguments.repeat} processes each, taken in turns after one to "
        f"warm up; file in the page cache; load average {os.getloadavg()[0]:.0f}. Bound: 1.2 × the largest shard + "
        "what stays in memory.",
        "",
        "| | time (s) | against the bytes | peak resident (GB) | of it anonymous (GB) | bound (GB) |",
        "|---|---|---|---|---|---|",
    ]
    for case, seconds, peak, anonymous, bound in rows:
        plain = base.get("read the bytes" if bound is not None else "write the bytes and fsync")
        against = "–" if plain is None else f"{seconds / plain:.2f}"
        limit = "" if bound is None else f"{bound / 1e9:.2f}"
        lines.append(f"| {case} | {seconds:.2f} | {against} | {peak / 1e9:.2f} | {anonymous / 1e9:.2f} | {limit} |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
