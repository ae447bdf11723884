"""GPTQ, Wanda and SparseGPT of a stack of llama blocks: this library against the usual torch loops, in one run.

    python benchmarks/compress.py [--width 256] [--layers 2] [--rounds 3] [--out benchmarks/results/compress.md]

The torch side is written from the papers as their public code goes about it: hooks add up the statistic of each linear
of Hugging Face's block, the layer is solved by a Python loop over columns in blocks of 128, the block is run again.
Both start from the same weights and calibration ids, take 8 sequences at a time, and must agree on what they remove.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from compare import HEADER, ONE_CORE, alternate, arguments, report, row
from gptq_layer import torch_grid, torch_solve

import jaxformers as jf
from jaxformers.compress import block as blocks
from jaxformers.compress import calibration, essential_sparsity
from jaxformers.models import llama

SPARSITY, BITS, BATCH = 0.5, 4, 8
clock = time.process_time if ONE_CORE else time.perf_counter


# ---- torch ---------------------------------------------------------------------------------------------------------


def torch_sweep(model, ids, measure, change):
    """``measure(old, seen, x) -> new`` adds x (samples, tokens, in) up; ``change(linear, statistic)`` solves one."""
    layers, caught = model.model.layers, []
    handle = layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: caught.append((args, kwargs)), with_kwargs=True
    )
    for part in ids.split(BATCH):
        model.model(part, use_cache=False)
    handle.remove()
    inputs = [(args[0] if args else kwargs.pop("hidden_states"), kwargs) for args, kwargs in caught]
    for layer in layers:
        linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        found, handles = dict.fromkeys(linears), []
        seen = dict.fromkeys(linears, 0)
        for linear in linears:

            def add(module, args, found=found, seen=seen):
                found[module] = measure(found[module], seen[module], args[0])
                seen[module] += len(args[0])

            handles.append(linear.register_forward_pre_hook(add))
        run = lambda: [layer(x, **kwargs) for x, kwargs in inputs]  # noqa: B023, E731
        run()
        for handle in handles:
            handle.remove()
        for linear in linears:
            change(linear, found[linear])
        outputs = run()
        inputs = [(y[0] if isinstance(y, tuple) else y, kwargs) for y, (_, kwargs) in zip(outputs, inputs, strict=True)]


def torch_gram(H, seen, x):
    rows, new = x.reshape(-1, x.shape[-1]), len(x)
    gram = (2 / (seen + new)) * rows.T @ rows
    return gram if H is None else H * (seen / (seen + new)) + gram


def torch_norms(norms, seen, x):
    new = len(x)
    own = torch.linalg.vector_norm(x.reshape(-1, x.shape[-1]), dim=0) ** 2 / (seen + new)
    return own if norms is None else norms * (seen / (seen + new)) + own


def torch_gptq(linear, H):
    linear.weight.data = torch_solve(linear.weight.data, H, BITS, -1)[0]


def torch_wanda(linear, norms):
    W = linear.weight.data
    order = torch.sort(W.abs() * norms.sqrt()[None], dim=-1, stable=True)[1]
    W.scatter_(1, order[:, : int(W.shape[1] * SPARSITY)], 0)


def torch_sparsegpt(linear, H, damp=0.01, blocksize=128):
    W, H = linear.weight.data.clone(), H.clone()
    out, n = W.shape
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(damp * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for i1 in range(0, n, blocksize):
        i2 = min(i1 + blocksize, n)
        W1, U1 = W[:, i1:i2].clone(), U[i1:i2, i1:i2]
        Q1, E = torch.zeros_like(W1), torch.zeros_like(W1)
        score = W1**2 / torch.diag(U1)[None] ** 2
        gone = score <= torch.sort(score.flatten())[0][int(score.numel() * SPARSITY)]
        for i in range(i2 - i1):
            w, d = W1[:, i], U1[i, i]
            q = torch.where(gone[:, i], 0.0, w)
            Q1[:, i] = q
            e = (w - q) / d
            W1[:, i:] -= e[:, None].matmul(U1[i, i:][None])
            E[:, i] = e
        W[:, i1:i2] = Q1
        W[:, i2:] -= E.matmul(U[i1:i2, i2:])
    linear.weight.data = W


# ---- both ----------------------------------------------------------------------------------------------------------


def shares(ours):
    """Seconds of one call, and of it those in: blocks' forward passes, statistics (with the pass they are read from),
    solving layers. The rest is Python, transfers and copies."""
    spent = dict.fromkeys(("forward", "statistics", "solve"), 0.0)

    def timed(name, f):
        def g(*args, **kwargs):
            start = clock()
            out = jax.block_until_ready(f(*args, **kwargs))
            spent[name] += clock() - start
            return out

        return g

    patched = [
        (calibration, "block_outputs", "forward"), (calibration, "first_inputs", "forward"),
        (blocks, "collect", "statistics"), (essential_sparsity, "collect", "statistics"),
        (blocks.columns, "solve", "solve"), (essential_sparsity.pruning, "wanda", "solve"),
        (essential_sparsity.pruning, "sparsegpt", "solve"),
    ]  # fmt: skip
    old = [getattr(module, name) for module, name, _ in patched]
    for (module, name, kind), f in zip(patched, old, strict=True):
        setattr(module, name, timed(kind, f))
    try:
        start = clock()
        ours()
        total = clock() - start
    finally:
        for (module, name, _), f in zip(patched, old, strict=True):
            setattr(module, name, f)
    return total, spent


def agreement(ours, theirs, name):
    """Share of weights on which both agree: removed or not (pruning), the value within half a step (GPTQ)."""
    same, total = 0, 0
    for i, layer in enumerate(theirs.model.layers):
        pairs = zip(("query", "key", "value", "out"), ("q_proj", "k_proj", "v_proj", "o_proj"), strict=True)
        own = {f"attention.{a}": getattr(layer.self_attn, b) for a, b in pairs}
        own |= {f"mlp.{a}": getattr(layer.mlp, f"{a}_proj") for a in ("up", "gate", "down")}
        for path, linear in own.items():
            kernel = dict(jf.surgery.find_linears(ours.layers, f"{i}.{path}"))[f"{i}.{path}"].kernel.get_value()
            a, b = np.asarray(jf.weights.dense(kernel)).T, linear.weight.data.numpy()
            step = torch_grid(linear.weight.data, 2**BITS - 1)[0].numpy() / 2
            hit = np.abs(a - b) < step if name == "GPTQ" else (a == 0) == (b == 0)
            same, total = same + int(hit.sum()), total + hit.size
    return same / total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 256), ("layers", 2), ("samples", 32), ("length", 256), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--alone", action="store_true", help="leave torch out: where our own seconds go")
    args = arguments(parser)
    torch.set_grad_enabled(False)
    config = llama.Config(
        vocab_size=512, hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.width // 64,
        intermediate_size=args.width * 11 // 4 // 32 * 32, max_position_embeddings=args.length, initializer_range=0.1,
    )  # fmt: skip
    model = jf.init(config, head="causal_lm", key=jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 512, (args.samples, args.length))
    with tempfile.TemporaryDirectory() as folder:
        jf.save(model, Path(folder) / "model")
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model").float()  # noqa: E731
        torch_model = load()
    weights = {name: tensor.clone() for name, tensor in torch_model.state_dict().items()}
    torch_ids = torch.tensor(ids)
    ways = {
        "GPTQ": (lambda: jf.compress.gptq(model, ids, bits=BITS, scale_dtype="float32"), torch_gram, torch_gptq),
        "Wanda": (lambda: jf.compress.prune(model, "wanda", sparsity=SPARSITY, calibration=ids).model,
                  torch_norms, torch_wanda),
        "SparseGPT": (lambda: jf.compress.prune(model, "sparsegpt", sparsity=SPARSITY, calibration=ids).model,
                      torch_gram, torch_sparsegpt),
    }  # fmt: skip
    table, parts = [HEADER], []
    for name, (ours, measure, change) in ways.items():

        def theirs(measure=measure, change=change):
            torch_model.load_state_dict(weights)
            torch_sweep(torch_model, torch_ids, measure, change)

        start = clock()
        found = ours()
        first, same = clock() - start, "not compared with torch"
        if not args.alone:
            theirs()
            same = f"agreement with torch {agreement(found, torch_model, name):.4f}"
            table.append(row(f"{name}, seconds", *alternate(ours, theirs, args.rounds)))
        total, spent = min((shares(ours) for _ in range(args.rounds)), key=lambda t: t[0])
        rest = total - sum(spent.values())
        line = ", ".join(f"{kind} {seconds:.3f} s" for kind, seconds in spent.items())
        parts.append(
            f"- {name}: first call {first:.1f} s with its compilation; then {total:.3f} s, of which {line}, the rest "
            f"(Python, transfers, reports) {rest:.3f} s = {rest / total:.0%}; outside of forward passes and statistics "
            f"{(total - spent['forward'] - spent['statistics']) / total:.0%}; {same}"
        )
    notes = (
        f"{args.layers} llama blocks, width {args.width}, MLP {config.intermediate_size}, float32; {args.samples} "
        f"sequences of {args.length} random ids, {BATCH} at a time. GPTQ: {BITS} bits, one grid per output; pruning: "
        f"sparsity {SPARSITY:g}. Agreement falls with depth: each block sees what those before it put out.\n\n"
        + "\n".join(parts)
    )
    report(args.out, "GPTQ, Wanda and SparseGPT against torch", table, notes)


if __name__ == "__main__":
    main()
