"""VTrans: does a classifier pruned by variational gates keep more than one that is cut at random, or by magnitude?

A post-norm encoder, trained from scratch on short reviews until it fits them, is brought to a share of its parameters
(tables included): by VTrans with weights and gates ("full") or gates alone ("faster"), by random masks, and by the
norms of heads, units and hidden units. All are fine-tuned for as many steps in total and judged on the test rows, which
nothing was chosen on.

    python -m experiments.vtrans                   # small: minutes on two CPU cores, three seeds
    python -m experiments.vtrans paper --task rte --data GLUE/RTE           # CoFi's settings of that task, as the paper
    python -m experiments.vtrans paper --task rte --data GLUE/RTE --encoder None --checkpoint your-finetuned-bert

Data: with a `--task` of GLUE its directory, of which a part of the training set chooses and the development set
reports; without one a directory with train, val and test (.jsonl, .csv or .tsv, .gz allowed) of columns text and label,
by default sentiment_sentences beside the repository, else: which package of the standard library is this line of code
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
from experiments import common, glue, sentences
from jaxformers import gates, units
from jaxformers.compress import VTransConfig, vib_prune, vtrans
from jaxformers.data.tokenizers import Tokenizer, train_wordpiece
from jaxformers.train import OptimConfig, TrainConfig

ROWS = 250  # of the test set at once


@dataclasses.dataclass(frozen=True)
class Config:
    """`checkpoint`: a fine-tuned classifier; `encoder`: a pre-trained one, which is fine-tuned here first; None of both
    trains one of the sizes below. `shape`: its architecture, for dry runs. `keep`: shares of the parameters that stay;
    `steps` train gates, `finetune` follow, and the baselines get both. `rows`: of each split at most. `methods`: of
    full, faster (at the smallest share only), random, magnitude. Where `steps`, `finetune` or `dense_steps` are None
    they are `epochs`, `finetune_epochs` or `dense_epochs` over the data; the paper's for the `task`, where it says."""

    task: str | None = None
    checkpoint: str | None = None
    encoder: str | None = None
    shape: str | None = None
    data: Path | None = None
    rows: int | None = None
    vocab: int = 1500
    length: int = 24
    width: int = 64
    layers: int = 4
    heads: int = 4
    inner: int = 256
    dense_steps: int | None = 500
    dense_epochs: int = 4
    dense_rate: float = 1e-3
    keep: tuple[float, ...] = (0.5, 0.2)
    steps: int | None = 400
    epochs: int | None = None
    finetune: int | None = 200
    finetune_epochs: int = 20
    batch: int = 32
    rate: float = 5e-4
    mask_rate: float = 0.1
    lambda_rate: float = 1.0
    kl_factor: float = 1e-3
    head_kl: float = 1.0
    hidden_kl: float = 16.0
    warmup: float | None = 0.5
    distil: bool = True
    methods: tuple[str, ...] = ("full", "faster", "random", "magnitude")
    seeds: int = 3


_LARGE, _SMALL = {"epochs": 20, "warmup": 0.1}, {"epochs": 100, "warmup": 0.2}  # CoFi's; warm-up of 2 and 20 epochs
TASKS = {
    **dict.fromkeys(("sst2", "qqp", "mnli", "mnli_mismatched", "qnli"), _LARGE),
    **dict.fromkeys(("cola", "mrpc", "stsb", "rte"), _SMALL),
}
PRESETS = {
    "smoke": Config(
        rows=64, vocab=200, width=16, layers=2, heads=2, inner=32, length=12, dense_steps=10, keep=(0.5,), steps=120,
        finetune=2, batch=16, mask_rate=0.4, lambda_rate=0.4, kl_factor=1e-2, seeds=1,
        distil=False, methods=("full", "magnitude"),
    ),
    "small": Config(),
    "paper": Config(
        task="sst2", encoder="google-bert/bert-base-uncased", shape="bert-base-uncased", length=128,
        keep=(0.3, 0.2, 0.1), dense_steps=None, dense_rate=2e-5, steps=None, finetune=None, rate=2e-5, mask_rate=0.05,
        lambda_rate=0.1, kl_factor=1e-6, head_kl=256.0, hidden_kl=30.0, warmup=None, seeds=1,
    ),
}  # fmt: skip


def run(config: Config, out: Path) -> dict[str, Any]:
    glue.classes_only(config.task, "VTrans")
    if config.task is None:
        texts = sentences.parted_texts(config.data, config.rows, ("asyncio", "email"))
    else:
        texts = glue.read(config.data, config.task, sentences.PARTS, config.rows, out=out)
    config = settled(config, len(texts["train"][1]))
    dense, tokenizer = dense_of(config, texts["train"])
    own = glue.outputs_of(config.task, dense)
    rows = {n: glue.rows(config.task, tokenizer, part, config.length, outputs=own) for n, part in texts.items()}
    quality = lambda model: glue.quality(config.task, model, rows["test"], texts["test"], batch=ROWS, outputs=own)
    data = {name: part.data for name, part in rows.items()}
    found = [{"method": "dense", "keep": 1.0, "seed": 0, **told(config, quality(dense))}]
    for seed in range(config.seeds):
        for keep in config.keep:
            for method in config.methods:
                if method == "faster" and keep != min(config.keep):
                    continue
                row = one(config, dense, data, method, keep, seed, lambda model: told(config, quality(model)))
                row = {"method": method, "keep": keep, "seed": seed, **row}
                common.record(out, found, row)
    main = glue.main_score(config.task)
    common.table(f"VTrans, {config.seeds} seeds: {main} on test", summary(found, main))
    common.figure(out / "figure.png", lambda fig: draw(fig, found, main))
    return {"rows": found}


def told(config: Config, scores: dict[str, float]) -> dict[str, float]:
    """The score that is drawn, and the others that a task has."""
    main = glue.main_score(config.task)
    return {"test": scores[main], **{f"test {name}": value for name, value in scores.items() if name != main}}


def settled(config: Config, rows: int) -> Config:
    """``config`` with its task's settings, and its steps counted over so many rows."""
    needed = ("warmup", *(("epochs",) if config.steps is None else ()))
    config = glue.filled(config, TASKS, needed)
    count = lambda steps, epochs: glue.steps_of(steps, epochs, rows, config.batch)
    return dataclasses.replace(
        config, steps=count(config.steps, config.epochs), finetune=count(config.finetune, config.finetune_epochs),
        dense_steps=count(config.dense_steps, config.dense_epochs),
    )  # fmt: skip


def one(
    config: Config, dense: nnx.Module, rows: dict, method: str, keep: float, seed: int, measure: Any
) -> dict[str, Any]:  # fmt: skip
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
        return {**measure(done.model), "seconds": time.perf_counter() - began, **more}
    cost = vtrans.costs(dense)
    masks = baseline_masks(dense, cost, keep, method, seed)
    small = finetuned(config, jf.compact(dense, masks), rows["train"], config.steps + config.finetune, key)
    hard = jax.tree.map(lambda m: (m != 0).astype(jnp.float32), masks)
    return {
        **measure(small), "seconds": time.perf_counter() - began,
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


def dense_of(config: Config, train: sentences.Texts) -> tuple[nnx.Module, Tokenizer]:
    """A fine-tuned checkpoint as it is, or a pre-trained encoder or a new BERT, trained on the task."""
    if config.checkpoint is not None and config.encoder is not None:
        raise ValueError("checkpoint, encoder: give one of them")
    if config.checkpoint is not None:
        return common.pretrained(config.checkpoint)
    head = glue.head_of(config.task, train)
    if config.encoder is not None:
        model, tokenizer = common.pretrained(config.encoder, **head, key=jax.random.key(1234))
    else:
        tokenizer = train_wordpiece(glue.texts_of(train), config.vocab, max_length=config.length)
        sizes = {name: getattr(config, name) for name in ("width", "layers", "heads", "length", "inner")}
        labels = 2 if config.task is None else head["num_labels"]
        model = sentences.new_classifier(tokenizer, labels, **sizes, attention_dropout=0.0, key=jax.random.key(1234))
    rows = glue.rows(config.task, tokenizer, train, config.length).data
    return finetuned(config, model, rows, config.dense_steps, jax.random.key(5), config.dense_rate), tokenizer


def finetuned(
    config: Config, model: nnx.Module, rows: dict, steps: int, key: jax.Array, rate: float | None = None
) -> nnx.Module:
    optim = OptimConfig(learning_rate=rate or config.rate, warmup=0.1)
    train = TrainConfig(steps=steps, optim=optim, log_every=steps, progress=False)
    return sentences.trained(model, rows, config.batch, train, key=key, loss=glue.loss_of(config.task))


def parameters(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(jf.functional(model)[1]))


def summary(found: list[dict[str, Any]], main: str) -> list[dict[str, Any]]:
    rows = []
    for method, keep in dict.fromkeys((r["method"], r["keep"]) for r in found):
        mine = [r for r in found if (r["method"], r["keep"]) == (method, keep)]
        column = lambda name, mine=mine: [r[name] for r in mine if name in r]
        rows.append({
            "method": method, "keep": keep, main: common.mean_std(column("test")),
            "left": common.mean_std(1 - s for s in column("actual_sparsity")),
            "parameters": common.mean_std(column("parameters")), "seconds": common.mean_std(column("seconds")),
            "to prune": common.mean_std(column("prune_seconds")),
        })  # fmt: skip
    return rows


def draw(fig: Any, found: list[dict[str, Any]], main: str) -> None:
    ax = fig.subplots()
    for i, method in enumerate(dict.fromkeys(r["method"] for r in found)):
        mine = [r for r in found if r["method"] == method]
        ax.plot([r["keep"] + 0.008 * i for r in mine], [100 * r["test"] for r in mine], "o", label=method)
    ax.set(xlabel="share of the parameters that stays", ylabel=f"test {main}, %")
    ax.legend(frameon=False)


def step(config: Config, mesh: Any) -> Any:
    """For dry runs: a step of weights and gates towards the smallest share, the teacher's forward pass included; of
    `batch` rows, or one a device where that is more."""
    from jaxformers.compress.vtrans_prune import KINDS, checked, default_loss
    from jaxformers.compress.vtrans_train import frozen, make_objective, make_optimizer
    from jaxformers.dryrun_steps import Array, config_dict, train_step

    if config.shape is None:
        raise ValueError("shape: this preset trains its own classifier; name one, such as bert-base-uncased")
    glue.classes_only(config.task, "VTrans")
    config = settled(config, 1 if config.task is None else glue.rows_of(config.task))
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
