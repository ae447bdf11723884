"""Compile time of a 12-layer train step: layers as a Python loop, as a scan, with and without rematerialisation.

    python benchmarks/compile.py [--layers 12] [--rounds 3] [--tpu v5e:2x2] [--out benchmarks/results/compile.md]

A masked-LM BERT, batch 8 × 128, AdamW in float32, the step that `fit` compiles (forward, backward, clipping, update).
Each measurement is a process of its own without a compilation cache; "from the cache" is a second process that finds
the first one's program in the persistent cache which `fit` switches on. Variants take turns, times are
medians; CPU seconds are what to compare on a machine that does other things meanwhile. ``--tpu`` compiles for one chip
of that topology, which needs libtpu and no TPU.
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
from importlib.metadata import version
from pathlib import Path

VARIANTS = {
    "loop": {},
    "scan": {"scan_layers": True},
    "scan, rbg keys": {"scan_layers": True, "impl": "rbg"},
    "loop, remat": {"remat": "full"},
    "scan, remat": {"scan_layers": True, "remat": "full"},
}


def measure(options: dict, layers: int, width: int, tpu: str | None) -> dict:
    """Trace and compile once, without running; seconds, and the bytes that XLA plans for temporaries."""
    import time

    import jaxformers as jf  # isort: skip
    import jax
    import jax.numpy as jnp
    import optax

    from jaxformers.models import bert
    from jaxformers.train.optim import OptimConfig, make_optimizer
    from jaxformers.train.state import State, split
    from jaxformers.train.step import make_step

    config = bert.Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    model = jf.init(config, head="masked_lm", key=jax.random.key(0))
    impl = options.pop("impl", None)
    apply, params = jf.functional(model, **options)

    def objective(apply, params, batch, key):
        logits = apply(params, {k: v for k, v in batch.items() if k != "labels"}, rngs=key).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["labels"])
        return losses.mean(), {}

    trained, frozen, join = split(params)
    optimizer = make_optimizer(OptimConfig(weight_decay=0.01, warmup=0.1), 1000, trained)
    step = make_step(objective, apply, join, optimizer, dtypes={p: x.dtype for p, x in trained.items()})
    zero = jnp.zeros((), jnp.int32)
    state = jax.eval_shape(lambda: State(zero, trained, optimizer.init(trained), None, zero, zero))
    ids = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}

    key, where = jax.random.key(0, impl=impl), {}
    if tpu:
        from jax.experimental import topologies

        device = topologies.get_topology_desc(platform="tpu", topology_name=tpu).devices[0]
        where = dict.fromkeys(("in_shardings", "out_shardings"), jax.sharding.SingleDeviceSharding(device))
        key = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    now = lambda: (time.perf_counter(), time.process_time())
    start = now()
    traced = jax.jit(step, donate_argnums=0, **where).trace(state, frozen, batch, key)
    lowered = traced.lower(lowering_platforms=("tpu",) if tpu else None)
    middle = now()
    compiled = lowered.compile()
    end = now()
    return {
        "trace": middle[0] - start[0],
        "compile": end[0] - middle[0],
        "trace_cpu": middle[1] - start[1],
        "compile_cpu": end[1] - middle[1],
        "lines": lowered.as_text().count("\n"),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }


def child(name: str, args: argparse.Namespace, cache: str | None) -> dict:
    """:func:`measure` in a fresh process, with the persistent cache in ``cache`` or none."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"JAX_PLATFORMS": "cpu"}
    if cache:
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, __file__, "--child", name, "--layers", str(args.layers), "--width", str(args.width)]
    command += ["--tpu", args.tpu] if args.tpu else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tpu", help="compile for this topology")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(dict(VARIANTS[args.child]), args.layers, args.width, args.tpu)))
        return

    cold: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    warm: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name in VARIANTS:
            with tempfile.TemporaryDirectory() as cache:
                cold[name].append(child(name, args, cache))
                if not args.tpu:  # JAX keeps nothing of what is compiled for another machine
                    warm[name].append(child(name, args, cache))
    median = lambda runs, key: statistics.median(run[key] for run in runs)
    both = lambda name, kind="": median(cold[name], "trace" + kind) + median(cold[name], "compile" + kind)
    lines = [
        f"# Compile time of a train step, BERT with {args.layers} layers of width {args.width}, loop against scan"
        f"{', compiled for one chip of ' + args.tpu if args.tpu else ''}\n",
        "| layers as | trace + compile, s | against the loop | CPU seconds, all threads | against the loop | "
        "of it tracing | from the cache, s | program, lines | temporaries, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        again = f"{median(warm[name], 'trace') + median(warm[name], 'compile'):.1f}" if warm[name] else "–"
        lines.append(
            f"| {name} | {both(name):.1f} | {both(name) / both('loop'):.2f} | {both(name, '_cpu'):.1f} | "
            f"{both(name, '_cpu') / both('loop', '_cpu'):.2f} | {median(cold[name], 'trace_cpu'):.1f} | "
            f"{again} | {cold[name][0]['lines']:,} | "
            f"{cold[name][0]['temporaries'] / 1e6:,.0f} |"
        )
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    versions = ", ".join(f"{p} {version(p)}" for p in ("jax", "jaxlib", "flax", "optax"))
    lines += [
        "",
        f"- command: `python benchmarks/compile.py --layers {args.layers} --width {args.width} --rounds {args.rounds}"
        f"{' --tpu ' + args.tpu if args.tpu else ''}`",
        f"- machine: {cpu}, {len(os.sched_getaffinity(0))} cores, {platform.system()}, Python "
        f"{platform.python_version()}",
        f"- versions: {versions}",
        f"- date: {datetime.date.today().isoformat()}; load average when it ended {os.getloadavg()[0]:.1f}",
        "",
    ]
    print("\n".join(lines))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
