"""VTrans: does a classifier pruned by variational gates keep more than one that is cut at random, or by magnitude?

A post-norm encoder, trained from scratch on short reviews until it fits them, is brought to a share of its parameters
(tables included): by VTrans with weights and gates ("full") or gates alone ("faster"), by random masks, and by the
norms of heads, units and hidden units. All are fine-tuned for as many steps in total and judged on the test rows, which
nothing was chosen on.

    python -m experiments.vtrans                   # small: minutes on two CPU cores, three seeds
    python -m experiments.vtrans paper --checkpoint your-finetuned-bert --data sst2/

Data: `--data` a directory with train, val and test (.jsonl, .csv or .tsv, .gz allowed) of columns text and label, by
default sentiment_sentences beside the repository, else: which package of the standard library is this line of code
from?
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxformers as jf
from experiments import common, sentences
from jaxformers import gates, units
from jaxformers.compress import VTransConfig, vib_prune, vtrans
from jaxformers.data.tokenizers import Tokenizer, train_wordpiece
from jaxformers.evaluation import accuracy
from jaxformers.train import OptimConfig, TrainConfig

ROWS = 250  # of the test set at once


@dataclasses.dataclass(frozen=True)
class Config:
    """`checkpoint`: a fine-tuned classifier; None trains one of the sizes below. `shape`: its architecture, for dry
    runs. `keep`: shares of the parameters that stay; `steps` train gates, `finetune` follow, and the baselines get
    both. `rows`: of each split at most. `methods`: of full, faster (at the smallest share only), random, magnitude."""

    checkpoint: str | None = None
    shape: str | None = None
    data: Path | None = None
    rows: int | None = None
    vocab: int = 1500
    length: int = 24
    width: int = 64
    layers: int = 4
    heads: int = 4
    inner: int = 256
    dense_steps: int = 500
    dense_rate: float = 1e-3
    keep: tuple[float, ...] = (0.5, 0.2)
    steps: int = 400
    finetune: int = 200
    batch: int = 32
    rate: float = 5e-4
    mask_rate: float = 0.1
    lambda_rate: float = 1.0
    kl_factor: float = 1e-3
    head_kl: float = 1.0
    hidden_kl: float = 16.0
    warmup: float = 0.5
    distil: bool = True
    methods: tuple[str, ...] = ("full", "faster", "random", "magnitude")
    seeds: int = 3


PRESETS = {
    "smoke": Config(
        rows=64, vocab=200, width=16, layers=2, heads=2, inner=32, length=12, dense_steps=10, keep=(0.5,), steps=120,
        finetune=2, batch=16, mask_rate=0.4, lambda_rate=0.4, kl_factor=1e-2, seeds=1,
        distil=False, methods=("full", "magnitude"),
    ),
    "small": Config(),
    "paper": Config(
        checkpoint="textattack/bert-base-uncased-SST-2", shape="bert-base-uncased", length=128, keep=(0.3, 0.2, 0.1),
        steps=42_000, finetune=42_000, rate=2e-5, mask_rate=0.05, lambda_rate=0.1, kl_factor=1e-6, head_kl=256.0,
        hidden_kl=30.0, warmup=0.1, seeds=1,
    ),
}  # fmt: skip


def run(config: Config, out: Path) -> dict[str, Any]:
    texts = sentences.parted_texts(config.data, config.rows, ("asyncio", "email"))
    if config.checkpoint is not None:
        dense, tokenizer = common.pretrained(config.checkpoint)
    else:
        dense, tokenizer = None, train_wordpiece(texts["train"][0], config.vocab, max_length=config.length)
    rows = {name: sentences.encoded(tokenizer, part, config.length) for name, part in texts.items()}
    if dense is None:
        dense = train_dense(config, tokenizer, rows["train"])
    found = [{"method": "dense", "keep": 1.0, "seed": 0, "test": accuracy(dense, rows["test"], batch_size=ROWS)}]
    for seed in range(config.seeds):
        for keep in config.keep:
            for method in config.methods:
                if method == "faster" and keep != min(config.keep):
                    continue
                row = {"method": method, "keep": keep, "seed": seed, **one(config, dense, rows, method, keep, seed)}
                common.record(out, found, row)
    common.table(f"VTrans, {config.seeds} seeds: accuracy on test", summary(found))
    common.figure(out / "figure.png", lambda fig: draw(fig, found))
    return {"rows": found}


def one(config: Config, dense: nnx.Module, rows: dict, method: str, keep: float, seed: int) -> dict[str, Any]:
    """Prune by one method, fine-tune, measure."""
    key, began = jax.random.key(seed), time.perf_counter()
    if method in ("full", "faster"):
        teacher = dense if config.distil else None
        done = vib_prune(
            dense, rows["train"], {"params": keep}, mode=method, teacher=teacher, config=settings(config), key=key,
            val_data=rows["val"],
        )  # fmt: skip
        more = {name: done.report[name] for name in ("expected_sparsity", "actual_sparsity", "prune_seconds", "kept")}
        more["parameters"] = done.report["parameters"][1]
        found = accuracy(done.model, rows["test"], batch_size=ROWS)
        return {"test": found, "seconds": time.perf_counter() - began, **more}
    cost = vtrans.costs(dense)
    masks = baseline_masks(dense, cost, keep, method, seed)
    small = finetuned(config, jf.compact(dense, masks), rows["train"], config.steps + config.finetune, key)
    hard = jax.tree.map(lambda m: (m != 0).astype(jnp.float32), masks)
    return {
        "test": accuracy(small, rows["test"], batch_size=ROWS), "seconds": time.perf_counter() - began,
        "actual_sparsity": float(cost.sparsity(hard)), "parameters": parameters(small),
    }  # fmt: skip


def settings(config: Config) -> VTransConfig:
    return VTransConfig(
        steps=config.steps, finetune_steps=config.finetune, batch=config.batch, rate=config.rate,
        mask_rate=config.mask_rate, lambda_rate=config.lambda_rate, kl_factor=config.kl_factor,
        head_kl=config.head_kl, hidden_kl=config.hidden_kl, warmup=config.warmup,
    )  # fmt: skip


def baseline_masks(model: nnx.Module, cost: vtrans.Costs, keep: float, method: str, seed: int) -> dict[str, Any]:
    """Masks by random numbers, or by the norms of what each head, unit and hidden unit writes; ranked within a kind."""
    random = np.random.default_rng(seed)
    scores = {kind: jax.tree.map(lambda m: random.random(m.shape), mine) for kind, mine in gates.ones(
        model, ("hidden", "heads", "ffn")).items()}  # fmt: skip
    if method == "magnitude":
        own = units.axes(model)
        flat = jf.paths.flatten(jf.functional(model)[1])
        norm = lambda path, axis: np.square(np.asarray(flat[path])).sum(1 - axis)
        for path, attention in units.attentions(model):
            rows = norm(f"{path}.out.kernel", 0)
            scores["heads"][path] = np.sqrt(rows.reshape(attention.heads, -1).sum(1))
        for path, _ in units.mlps(model):
            scores["ffn"][path] = np.sqrt(norm(f"{path}.down.kernel", 0) + norm(f"{path}.up.kernel", 1))
        over = [(p, a) for p, axes in own.items() for a, axis in enumerate(axes) if axis == units.HIDDEN]
        over = [(p, a) for p, a in over if len(flat[p].shape) == 2]
        scores["hidden"] = np.sqrt(sum(norm(p, a) for p, a in over))
    return vtrans.masks_within(ranked(scores), cost, keep)


def ranked(scores: dict[str, Any]) -> dict[str, Any]:
    """Gates whose log alpha is the share of units of their kind that score higher, less one half; means 1."""
    found = {}
    for kind, mine in scores.items():
        every = np.sort(np.concatenate([np.ravel(s) for s in jax.tree.leaves(mine)]))
        alpha = lambda s, every=every: 0.5 - np.searchsorted(every, s, side="right") / every.size
        gate = lambda s, alpha=alpha: {"mu": jnp.ones(s.shape), "logD": jnp.asarray(alpha(s))}
        found[kind] = jax.tree.map(gate, mine)
    return found


def train_dense(config: Config, tokenizer: Tokenizer, rows: dict[str, np.ndarray]) -> nnx.Module:
    sizes = {name: getattr(config, name) for name in ("width", "layers", "heads", "length", "inner")}
    model = sentences.new_classifier(tokenizer, 2, **sizes, attention_dropout=0.0, key=jax.random.key(1234))
    return finetuned(config, model, rows, config.dense_steps, jax.random.key(5), config.dense_rate)


def finetuned(
    config: Config, model: nnx.Module, rows: dict, steps: int, key: jax.Array, rate: float | None = None
) -> nnx.Module:
    optim = OptimConfig(learning_rate=rate or config.rate, warmup=0.1)
    train = TrainConfig(steps=steps, optim=optim, log_every=steps, progress=False)
    return sentences.trained(model, rows, config.batch, train, key=key)


def parameters(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(jf.functional(model)[1]))


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for method, keep in dict.fromkeys((r["method"], r["keep"]) for r in found):
        mine = [r for r in found if (r["method"], r["keep"]) == (method, keep)]
        column = lambda name, mine=mine: [r[name] for r in mine if name in r]
        rows.append({
            "method": method, "keep": keep, "accuracy": common.mean_std(column("test")),
            "left": common.mean_std(1 - s for s in column("actual_sparsity")),
            "parameters": common.mean_std(column("parameters")), "seconds": common.mean_std(column("seconds")),
            "to prune": common.mean_std(column("prune_seconds")),
        })  # fmt: skip
    return rows


def draw(fig: Any, found: list[dict[str, Any]]) -> None:
    ax = fig.subplots()
    for i, method in enumerate(dict.fromkeys(r["method"] for r in found)):
        mine = [r for r in found if r["method"] == method]
        ax.plot([r["keep"] + 0.008 * i for r in mine], [100 * r["test"] for r in mine], "o", label=method)
    ax.set(xlabel="share of the parameters that stays", ylabel="test accuracy, %")
    ax.legend(frameon=False)


def step(config: Config, mesh: Any) -> Any:
    """For dry runs: a step of weights and gates towards the smallest share, the teacher's forward pass included; of
    `batch` rows, or one a device where that is more."""
    from jaxformers.compress.vtrans_prune import KINDS, checked, default_loss
    from jaxformers.compress.vtrans_train import frozen, make_objective, make_optimizer
    from jaxformers.dryrun_steps import Array, config_dict, train_step

    if config.shape is None:
        raise ValueError("shape: this preset trains its own classifier; name one, such as bert-base-uncased")
    build = lambda: jf.init(config_dict(config.shape), head="sequence_classification", key=jax.random.key(0))
    model, rules, rows = jf.surgery.named(nnx.eval_shape(build)), settings(config), max(config.batch, mesh.size)
    ids = Array((rows, config.length), jnp.int32)
    data = {"input_ids": ids, "attention_mask": ids, "labels": Array((rows,), jnp.int32)}
    kinds, counted, keep = checked(model, data, {"params": min(config.keep)}, KINDS, "full", None)
    objective, params = make_objective(
        model, model if config.distil else None, default_loss(model, data), kinds, counted, keep, rules, config.steps,
        jax.random.key(0),
    )  # fmt: skip
    train = TrainConfig(steps=config.steps, freeze=frozen(params, "full"))
    optimizer = make_optimizer(rules, config.steps)
    name = f"vtrans, {config.shape}, {rows} × {config.length} tokens"
    return train_step(name, objective, None, params, data, train, mesh, optimizer)


if __name__ == "__main__":
    common.main("vtrans", PRESETS, run, step=step)
