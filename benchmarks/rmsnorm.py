"""Norms, and whole models with them: Pre-LN against Pre-RMSNorm and Pre-CRMSNorm, in turns.

    python benchmarks/rmsnorm.py [--width 768] [--layers 6] [--repeats 15] [--out benchmarks/results/rmsnorm.md]

The norms are timed with the residual addition before them, as they stand in a block: (h + x, norm(h + x)). Ratios are
of medians; the calls take turns, so that whatever else the machine does strikes all.
"""

import argparse
import datetime
import os
import platform
from importlib.metadata import version

import jax
import jax.numpy as jnp

import jaxformers as jf
from jaxformers import nn, surgery
from jaxformers.compress import convert_norm
from jaxformers.cost import latencies
from jaxformers.models import gpt2

FORMS = {
    "pre-ln": None, "pre-rms": {"target": "rms"}, "pre-rms, folded": {"target": "rms", "fold_affine": True},
    "pre-crms": {"target": "crms"}, "pre-crms, padded": {"target": "crms", "pad": True},
}  # fmt: skip


def ratios(programs, repeats):
    """Table rows: milliseconds (median, best) and the ratio of medians to the first."""
    times = latencies(programs, repeats=repeats)
    first = next(iter(times.values())).seconds
    rows = ((name, 1e3 * t.seconds, 1e3 * min(t.times), t.seconds / first) for name, t in times.items())
    return ["| {} | {:.4g} | {:.4g} | {:.3f} |".format(*row) for row in rows]


def norms(width, rows, dtype, repeats):
    """LayerNorm with and without γ, β, RMSNorm, and CRMSNorm in both forms, behind a residual addition."""
    full, short = (jax.random.normal(jax.random.key(0), (2, rows, n), dtype) for n in (width, width - 1))
    padded = full.at[..., -1].set(0)
    made = {
        "LayerNorm, γ and β": (nn.LayerNorm(width), full),
        "LayerNorm": (nn.LayerNorm(width, affine=False), full),
        "RMSNorm, γ and β": (nn.RMSNorm(width, bias=True), full),
        "RMSNorm": (nn.RMSNorm(width, affine=False), full),
        "CRMSNorm, d − 1": (nn.CRMSNorm(width), short),
        "CRMSNorm, padded": (nn.CRMSNorm(width), padded),
    }

    def after_addition(norm):
        def both(x, h):
            x = x + h
            return x, norm(x)

        return both

    return ratios({name: (after_addition(norm), x[0], x[1]) for name, (norm, x) in made.items()}, repeats)


def models(args, dtype):
    """Logits of a random GPT-2 in each form, and loss and gradients in the form for training."""
    shape = gpt2.Config(
        vocab_size=args.vocab, hidden_size=args.width, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, max_position_embeddings=args.length, hidden_dropout_prob=0.0,
        embedding_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = jf.init(shape, head="causal_lm", key=jax.random.key(0), dtype=dtype)
    ids = jnp.zeros((args.batch, args.length), jnp.int32)

    def logits(model):
        apply, params = jf.functional(model)
        return lambda params, ids: apply(params, {"input_ids": ids}).logits, params

    def gradients(model):
        run, params = logits(model)
        return jax.grad(lambda params, ids: jf.losses.cross_entropy(run(params, ids)[:, :-1], ids[:, 1:])), params

    forms = {name: model if options is None else convert_norm(model, **options) for name, options in FORMS.items()}
    bare = surgery.copy(model)  # no norm at all: what the others could save at most
    for stream in jf.residual.streams(bare):
        for path in stream.norms:
            parent, _, name = path.rpartition(".")
            setattr(jf.residual.at(bare, parent), name, nn.Identity())
    forms["no norm"] = bare
    forward = ratios({name: (*logits(m), ids) for name, m in forms.items()}, args.repeats)
    own = {"pre-ln": model, "pre-rms, recentred in every pass": convert_norm(model, on_the_fly=True)}
    return forward, ratios({name: (*gradients(m), ids) for name, m in own.items()}, args.repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 768, "layers": 6, "vocab": 4096, "batch": 2, "length": 128, "repeats": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, default=2048, help="tokens that the norms alone are timed on")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--out")
    args = parser.parse_args()
    head = ["| | ms, median | ms, best | of the first |", "|---|---|---|---|"]
    lines = ["# Pre-LN, Pre-RMSNorm and Pre-CRMSNorm"]
    for dtype in args.dtypes:
        lines += ["", f"Residual addition and norm, {args.rows} × {args.width}, {dtype}:", "", *head]
        lines += norms(args.width, args.rows, dtype, args.repeats)
        forward, training = models(args, dtype)
        size = f"{args.layers} layers of width {args.width}, {args.batch} × {args.length} tokens, {dtype}"
        lines += ["", f"Forward pass of a GPT-2 with {size}:", "", *head, *forward]
        lines += ["", "Loss and gradients of the same:", "", *head, *training]
    device = jax.devices()[0]
    lines += [
        "",
        f"- device: {device.device_kind}, {len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        f"- versions: jax {version('jax')}, flax {version('flax')}, Python {platform.python_version()}",
        f"- date: {datetime.date.today().isoformat()}; load average when it ended {os.getloadavg()[0]:.1f}",
    ]
    text = "\n".join([*lines, ""])
    print(text)
    if args.out:
        with open(args.out, "w") as file:
            file.write(text)


if __name__ == "__main__":
    main()
