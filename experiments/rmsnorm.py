"""Pre-RMSNorm and Pre-CRMSNorm: do converted models compute the same, train the same, and how much time do they take?

A small GPT-2 is trained and converted. Perplexity on held-out text says whether the forms are equal, in float32 and in
16 bits. From an untrained model, a few steps of Adam as Pre-LN, as RMSNorm recentred in every pass, and as RMSNorm
recentred once say which form takes Pre-LN's path. Then all forms of a larger random model are timed in turns.

    python -m experiments.rmsnorm                    # small: minutes on two CPU cores, three seeds
    python -m experiments.rmsnorm paper --model facebook/opt-125m --data train.txt --test wiki.test.raw

Data: as in `experiments.gptq`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxformers as jf
from experiments import common, language
from jaxformers import losses
from jaxformers.compress import convert_norm
from jaxformers.cost import latencies
from jaxformers.data import batches, text
from jaxformers.data.tokenizers import train_bpe
from jaxformers.evaluation import perplexity
from jaxformers.models import gpt2

FORMS = {
    "Pre-LN": None,
    "zero-mean Pre-LN": {"target": "zero-mean-ln"},
    "Pre-RMSNorm": {"target": "rms"},
    "Pre-RMSNorm, folded": {"target": "rms", "fold_affine": True},
    "Pre-CRMSNorm": {"target": "crms"},
    "Pre-CRMSNorm, padded": {"target": "crms", "pad": True},
}
WAYS = {"in every pass": {"on_the_fly": True}, "once": {}}


@dataclasses.dataclass(frozen=True)
class Config:
    """`forms`: of FORMS, Pre-LN first. `model`: a Pre-LN checkpoint to convert; None trains a GPT-2 of the sizes below.
    `adam`: steps of the comparison of paths. `timed_…`: sizes of the model that is timed, `repeats` times a form."""

    forms: tuple[str, ...] = tuple(FORMS)
    data: Path | None = None
    test: Path | None = None
    model: str | None = None
    vocab: int = 512
    width: int = 64
    layers: int = 2
    heads: int = 4
    length: int = 64
    batch: int = 8
    steps: int = 200
    rate: float = 3e-3
    adam: int = 20
    windows: int | None = 200
    timed_width: int = 256
    timed_layers: int = 4
    timed_batch: int = 4
    timed_length: int = 128
    repeats: int = 15
    seeds: int = 3


PRESETS = {
    "smoke": Config(
        forms=("Pre-LN", "Pre-CRMSNorm"), vocab=280, width=16, layers=1, heads=2, length=16, steps=4, adam=4, windows=4,
        timed_width=16, timed_layers=1, timed_length=8, repeats=2, seeds=1,
    ),
    "small": Config(),
    "paper": Config(
        model="facebook/opt-125m", length=1024, batch=4, windows=None, timed_width=768, timed_layers=12, timed_batch=8,
        timed_length=1024, repeats=30, seeds=1,
    ),
}  # fmt: skip


def run(config: Config, out: Path) -> dict[str, Any]:
    """One row for each seed and form; written to `metrics.jsonl` as they come."""
    train_text, test_text = language.corpus(config.data, config.test)
    rows: list[dict[str, Any]] = []
    paths: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        model, tokenizer = start(config, train_text, seed)
        ids = language.stream(train_text, tokenizer)
        windows = text.windows(language.stream(test_text, tokenizer), config.length)[: config.windows]
        for form in config.forms:
            converted = in_form(model, form)
            own = {name: perplexity(cast(converted, name), windows, config.length) for name in ("float32", "bfloat16")}
            common.record(out, rows, {"seed": seed, "form": form, **own})
            if seed == 0 and form == "Pre-CRMSNorm":
                jf.save(converted, out / "model-crms", tokenizer=tokenizer)
        paths.append({"seed": seed, **compare_paths(config, model.config, ids, seed)})
    times = timed(config)
    report(config, rows, paths, times, out)
    return {"rows": rows, "paths": paths, "milliseconds": times, "equal to 4 decimals": equal(rows)}


def in_form(model: nnx.Module, form: str) -> nnx.Module:
    options = FORMS[form]
    return model if options is None else convert_norm(model, **options)


def start(config: Config, texts: list[str], seed: int) -> tuple[nnx.Module, Any]:
    """The Pre-LN model and its tokenizer."""
    if config.model is not None:
        return common.pretrained(config.model, **without_dropout(jf.hub.read_config(config.model)))
    tokenizer = train_bpe(texts, config.vocab, max_length=config.length)
    shape = sizes(tokenizer.vocab_size, config.width, config.layers, config.heads, config.length)
    ids = language.stream(texts, tokenizer)
    names = ("length", "steps", "batch", "rate")
    return language.fitted(shape, ids, seed=seed, **{name: getattr(config, name) for name in names}), tokenizer


def without_dropout(hf: dict[str, Any]) -> dict[str, float]:
    """What :func:`jaxformers.load` is to override: the form for training has no place for dropout on the stream."""
    fields = dataclasses.fields(jf.models.architecture(hf["model_type"]).Config)
    return {f.name: 0.0 for f in fields if f.name in ("hidden_dropout_prob", "embedding_dropout_prob")}


def sizes(vocab: int, width: int, layers: int, heads: int, length: int) -> gpt2.Config:
    return gpt2.Config(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=length, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        embedding_dropout_prob=0.0,
    )  # fmt: skip


def cast(model: nnx.Module, dtype: str) -> nnx.Module:
    apply, params = jf.functional(model)
    return jf.with_params(model, jax.tree.map(lambda a: a.astype(dtype), params))


def compare_paths(config: Config, shape: Any, ids: np.ndarray, seed: int) -> dict[str, float]:
    """The largest difference of losses from those of Pre-LN, over the same steps of Adam from the same start."""
    model = jf.init(shape, head="causal_lm", key=jax.random.key(100 + seed))
    # with γ, β and biases that are not those of a start, which hide mistakes
    flat = jf.paths.flatten(jf.functional(model)[1])
    keys = jax.random.split(jax.random.key(seed), len(flat))
    noisy = {p: a + 0.1 * jax.random.normal(k, a.shape) for (p, a), k in zip(flat.items(), keys, strict=True)}
    model = jf.with_params(model, jf.paths.unflatten(noisy))
    data = iter(batches.token_batches(ids, config.length, config.batch, seed=seed))
    steps = np.stack([next(data)["input_ids"] for _ in range(config.adam)])
    expected = adam_losses(model, steps)
    found = {way: adam_losses(convert_norm(model, "rms", **options), steps) for way, options in WAYS.items()}
    return {way: float(np.abs(own - expected).max()) for way, own in found.items()}


def adam_losses(model: nnx.Module, steps: np.ndarray, rate: float = 3e-3) -> np.ndarray:
    """The loss before each of the ``steps`` (steps, B, L)."""
    apply, params = jf.functional(model)
    optimizer = optax.adam(rate)

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        return losses.cross_entropy(apply(params, {"input_ids": ids}).logits[:, :-1], ids[:, 1:])

    def step(carry: Any, ids: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(carry[0], ids)
        updates, state = optimizer.update(grads, carry[1])
        return (optax.apply_updates(carry[0], updates), state), value

    run = jax.jit(lambda params, steps: jax.lax.scan(step, (params, optimizer.init(params)), steps)[1])
    return np.asarray(run(params, jnp.asarray(steps)))


def timed(config: Config) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass of every form, and of a training step of those that take Pre-LN's path."""
    heads = max(2, config.timed_width // 64)
    shape = sizes(1024, config.timed_width, config.timed_layers, heads, config.timed_length)
    model = jf.init(shape, head="causal_lm", key=jax.random.key(0))
    ids = jnp.zeros((config.timed_batch, config.timed_length), jnp.int32)
    converted = {form: in_form(model, form) for form in config.forms}
    forward = {form: (logits_of(m), jf.functional(m)[1], ids) for form, m in converted.items()}
    training = {"Pre-LN": model, "Pre-RMSNorm, recentred in every pass": convert_norm(model, on_the_fly=True)}
    steps = {form: (gradients_of(m), jf.functional(m)[1], ids) for form, m in training.items()}
    found = {what: latencies(of, repeats=config.repeats) for what, of in (("forward", forward), ("gradients", steps))}
    return {what: {form: 1e3 * own.seconds for form, own in times.items()} for what, times in found.items()}


def logits_of(model: nnx.Module) -> Any:
    apply, _ = jf.functional(model)
    return lambda params, ids: apply(params, {"input_ids": ids}).logits


def gradients_of(model: nnx.Module) -> Any:
    logits = logits_of(model)
    return jax.grad(lambda params, ids: losses.cross_entropy(logits(params, ids)[:, :-1], ids[:, 1:]))


def equal(rows: list[dict[str, Any]]) -> bool:
    """Is the float32 perplexity of all forms of a seed the same to four decimals?"""
    of = {(r["seed"], r["form"]): r["float32"] for r in rows}
    return all(abs(value - of[seed, "Pre-LN"]) < 5e-5 for (seed, _), value in of.items())


def report(config: Config, rows: Any, paths: Any, times: dict[str, dict[str, float]], out: Path) -> None:
    reference = {r["seed"]: r["float32"] for r in rows if r["form"] == "Pre-LN"}
    table = []
    for form in config.forms:
        own = [r for r in rows if r["form"] == form]
        gap = max(abs(r["float32"] - reference[r["seed"]]) for r in own)
        forward = times["forward"]
        table.append({
            "form": form, "perplexity": common.mean_std(r["float32"] for r in own), "largest difference": f"{gap:.1e}",
            "in bfloat16": common.mean_std(r["bfloat16"] for r in own), "forward, ms": forward[form],
            "of Pre-LN": forward[form] / forward["Pre-LN"],
        })  # fmt: skip
    common.table("perplexity on held-out text, and time of a forward pass", table)
    gaps = [{"recentred": way, f"after {config.adam} steps": f"{max(p[way] for p in paths):.1e}"} for way in WAYS]
    common.table("largest difference of losses from Pre-LN's, Adam, the worst seed", gaps)
    steps = times["gradients"]
    own = [{"form": form, "ms": value, "of Pre-LN": value / steps["Pre-LN"]} for form, value in steps.items()]
    common.table("loss and gradients", own)
    parts = {f"{form}, {what}": [ms / of["Pre-LN"]] for what, of in times.items() for form, ms in of.items()}
    common.figure(out / "figure.png", lambda fig: common.bars(fig.subplots(), parts, "time, of Pre-LN's"))


def step(config: Config, mesh: Any) -> Any:
    """For dry runs: loss and gradients of `model`'s size in the form for training, the batch spread over the mesh."""
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxformers.dryrun import Step
    from jaxformers.dryrun_steps import config_dict, replicated, size

    if config.model is None:
        raise ValueError("model: this preset trains its own; name one to convert, such as gpt2")
    hf = config_dict(config.model)
    shape = jf.models.architecture(hf["model_type"]).Config.from_hf(hf)
    shape = dataclasses.replace(shape, **without_dropout(hf))
    kept: list[Any] = []

    def build() -> Any:
        model = convert_norm(jf.init(shape, head="causal_lm", key=jax.random.key(0)), on_the_fly=True)
        kept.append(gradients_of(model))
        return jf.functional(model)[1]

    params = jax.eval_shape(build)
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ids = jax.ShapeDtypeStruct((mesh.size * config.batch, config.length), jnp.int32, sharding=spread)
    shape = f"{mesh.size * config.batch} × {config.length:,} tokens"
    name = f"loss and gradients of {config.model}, RMSNorm recentred in every pass, {shape}"
    return Step(name, kept[0], (replicated(params, mesh), ids), parameters=size(params))


if __name__ == "__main__":
    common.main("rmsnorm", PRESETS, run, step=step)
