"""A two-layer perceptron, data and an objective for the tests of the loop; run as a script it is a run to be killed.

python toy.py DIRECTORY OUT.npz [--kill-at N] [--term-at N] [--full-at N] [--mesh data=2,fsdp=4] [--steps N] …
"""

import argparse
import os
import resource
import signal
import time
from pathlib import Path

import jaxformers  # noqa: F401  (before jax: it keeps an idle libtpu quiet)

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np

from jaxformers.data.batches import array_batches
from jaxformers.distributed import initialize
from jaxformers.train import CheckpointNotWritten, OptimConfig, TrainConfig, fit


def apply(params, batch, *, rngs=None):
    h = jnp.tanh(batch["x"] @ params["layers"]["0"]["kernel"] + params["layers"]["0"]["bias"])
    if rngs is not None:  # dropout: the keys of a resumed run must be those of the unbroken one
        h = h * jax.random.bernoulli(rngs, 0.9, h.shape) / 0.9
    return h @ params["head"]["kernel"]


def objective(apply, params, batch, key):
    error = apply(params, batch, rngs=key) - batch["y"]
    return jnp.mean(error.astype(jnp.float32) ** 2), {"worst": jnp.abs(error).max()}


def parameters(width=32, seed=0):
    k0, k1 = jax.random.split(jax.random.key(seed))
    return {
        "layers": {"0": {"kernel": 0.3 * jax.random.normal(k0, (4, width)), "bias": jnp.zeros(width)}},
        "head": {"kernel": 0.3 * jax.random.normal(k1, (width, 2))},
    }


def arrays(n=96):
    x = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32)
    return {"x": x, "y": np.stack([np.sin(x.sum(1)), x.prod(1)], 1).astype(np.float32)}


def limit_files(size):
    """What a full disk is to those who write: no file may grow beyond `size` bytes (None: as they like)."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("out")
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--term-at", type=int, default=0)
    parser.add_argument("--full-at", type=int, default=0, help="from this batch on no file may grow large")
    parser.add_argument("--mesh")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint-every", type=int, default=7)
    parser.add_argument("--process", help="I/N:PORT, one of N processes that train together")
    parser.add_argument("--killed", type=int, help="which of them --kill-at is for; default: all")
    parser.add_argument("--peer-timeout", type=float, default=300)
    args = parser.parse_args()
    if args.process:
        which, port = args.process.split(":")
        index, count = map(int, which.split("/"))
        initialize(f"localhost:{port}", count, index)
        args.kill_at = args.kill_at if args.killed in (None, index) else 0

    def signals(batch, seen=[0]):  # noqa: B006  (counts on purpose)
        seen[0] += 1
        if seen[0] == args.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if seen[0] == args.term_at:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a second one while the first is being served changes nothing
        if seen[0] == args.full_at:
            last = (args.full_at - 1) // args.checkpoint_every * args.checkpoint_every
            while not (Path(args.directory) / "checkpoints" / str(last)).is_dir():
                time.sleep(0.05)
            limit_files(2500)
        return batch

    data = array_batches(arrays(), 16, seed=3, threads=0, transform=signals)
    config = TrainConfig(
        steps=args.steps,
        optim=OptimConfig(learning_rate=1e-2, schedule="cosine", warmup=5, weight_decay=0.1),
        accumulate=2,
        ema=0.9,
        checkpoint_every=args.checkpoint_every,
        log_every=5,
        peer_timeout=args.peer_timeout,
    )
    mesh = jaxformers.mesh(args.mesh) if args.mesh else None
    try:
        result = fit(
            objective, (apply, parameters()), data, config, key=jax.random.key(7), directory=args.directory, mesh=mesh
        )
    except CheckpointNotWritten as error:
        if error.result is None:
            raise
        result = error.result
        limit_files(None)
    gather = lambda tree: tree
    if args.process:  # every process holds a part
        from jax.experimental.multihost_utils import process_allgather

        gather = lambda tree: jax.tree.map(lambda x: process_allgather(x, tiled=True), tree)
    named = jax.tree_util.tree_flatten_with_path(gather({"params": result.params, "ema": result.ema}))[0]
    np.savez(Path(args.out), step=result.step, **{jax.tree_util.keystr(k): np.asarray(x) for k, x in named})


if __name__ == "__main__":
    main()
