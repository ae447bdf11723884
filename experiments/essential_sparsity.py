"""Essential sparsity: how much of a pretrained language model can be removed at once before its quality falls?

A byte-level language model is pruned at every sparsity of a grid: by magnitude, at random, by Wanda and by SparseGPT,
without and with a short fine-tuning under the fixed mask (the dense model is tuned as long). Cross-entropy on held-out
text says where each curve begins to fall. Lottery tickets (iterative pruning of trained weights, rewound) of the same
sparsity are the paper's comparison: how alike are the masks, and how good is each after fine-tuning?

    python -m experiments.essential_sparsity                     # small: minutes on two CPU cores, three seeds
    python -m experiments.essential_sparsity paper --data c4.jsonl --test wiki.test.raw       # OPT-125M
    python -m experiments.essential_sparsity paper --task cola --data GLUE/CoLA               # BERT-base

With a `--task` of GLUE or squad the encoder is pruned before it has learnt the task, at once by magnitude or at random,
and then fine-tuned under the fixed mask; the task's own score on the development set is the curve, and lottery tickets
are as above. Wanda and SparseGPT, whose calibration here is of language models, take no part in that.

Data: wikitext2_small beside the repository with the byte LM of its oracles; without those a small llama is trained on
the text that every Python ships. `--model` with `--data` and `--test` (.txt or a table with a column text) prunes any
checkpoint. Seeds draw the random masks, the calibration windows, and the order of the fine-tuning data.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxformers as jf
from experiments import common, glue, language, sentences
from jaxformers import losses, weights
from jaxformers.compress import sparsity_curve
from jaxformers.compress.essential_sparsity import prunable, prune
from jaxformers.compress.sparsity_curve import Curve, lottery_ticket, mask_similarity, sparsity_sweep
from jaxformers.data import batches, text
from jaxformers.data.glue import TASKS as GLUE
from jaxformers.data.tokenizers import train_wordpiece
from jaxformers.mesh import constrained
from jaxformers.train import OptimConfig, TrainConfig, fit


@dataclasses.dataclass(frozen=True)
class Config:
    """`grid`: sparsities of the one-shot curves; `tuned`: those that are fine-tuned too. `tau`: the drop of the
    cross-entropy, in nats, or of a task's score, that counts as none. `rounds`: of the lottery ticket, 20 % of what is
    left each. Of a `task`: `encoder`, None is a new BERT of the sizes below, tuned at all of `grid`; `task_length` and
    `task_rate`, None is the paper's; `task_steps`, None is `epochs` over the data; `rows` of each table at most."""

    task: str | None = None
    encoder: str | None = None
    task_steps: int | None = None
    task_length: int | None = None
    task_rate: float | None = None
    task_batch: int = 64
    epochs: int = 3
    rows: int | None = None
    data: Path | None = None
    test: Path | None = None
    model: str | None = None
    grid: tuple[float, ...] = sparsity_curve.GRID
    tuned: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.9)
    methods: tuple[str, ...] = ("magnitude", "random", "wanda", "sparsegpt")
    tau: float = 0.01
    rounds: int = 3
    steps: int = 60
    rate: float = 1e-3
    batch: int = 16
    length: int = 128
    samples: int = 64
    windows: int | None = 160
    seeds: int = 3
    vocab: int = 512
    width: int = 64
    layers: int = 2
    train_steps: int = 300


TASKS = {task: {"task_length": 256, "task_rate": 2e-5} for task in GLUE}  # as the authors' scripts
SCORES = {"mrpc": "f1"}  # where the paper's is not the first of the task's own
TASKS |= dict.fromkeys(glue.SQUAD, {"task_length": 384, "task_rate": 3e-5})  # windows begin 128 tokens apart
PRESETS = {
    "smoke": Config(
        grid=(0.0, 0.5), tuned=(0.0, 0.5), rounds=1, steps=2, batch=2, length=32, samples=4, windows=4, seeds=1,
        width=32, layers=1, train_steps=4,
    ),
    "small": Config(),
    "paper": Config(
        encoder="google-bert/bert-base-uncased",
        model="facebook/opt-125m", length=2048, samples=128, windows=None, steps=3000, rate=2e-5, batch=8, seeds=1
    ),
}  # fmt: skip


def run(config: Config, out: Path) -> dict[str, Any]:
    """Curves per seed, tickets per seed; the figure and the table are means over seeds."""
    if config.task is not None:
        return run_task(config, out)
    model, train_ids, test_ids = materials(config)
    windows = text.windows(test_ids, config.length)[: config.windows]
    metric = negative_loss(model, windows)
    curves: list[Curve] = []
    tickets: list[dict[str, float]] = []
    for seed in range(config.seeds):
        calibration = text.random_windows(train_ids, config.samples, config.length, seed=seed)
        options = {"calibration": calibration, "key": jax.random.key(seed), "tau": config.tau}
        tune = tuner(config, train_ids, seed)
        found = sparsity_sweep(model, metric, methods=config.methods, grid=config.grid, **options)
        found += sparsity_sweep(
            model, metric, methods=config.methods[:2], grid=config.tuned, finetune=tune,
            **options, directory=out / f"tuned-{seed}",
        )  # fmt: skip
        sparsity_curve.write_curves(found, out / f"seed-{seed}")
        curves += found
        tickets.append(ticket(config, model, metric, tune))
    means = averaged(curves)
    report(config, curves, means, tickets, out)
    jf.save(prune(model, sparsity=means[0].essential_sparsity).model, out / "model-essential")
    rows = [{**dataclasses.asdict(c), "essential_sparsity": c.essential_sparsity, "knee": c.knee} for c in curves]
    return {"curves": rows, "tickets": tickets}


def run_task(config: Config, out: Path) -> dict[str, Any]:
    """As :func:`run`, of an encoder that learns the task under each mask."""
    raw = glue.read(config.data, config.task, ("train", "dev"), config.rows)
    config = glue.filled(config, TASKS, ("task_length", "task_rate"))
    model, tokenizer = encoder_of(config, raw["train"])
    train, dev = (glue.rows(config.task, tokenizer, raw[part], config.task_length) for part in ("train", "dev"))
    examples = len(train.data["input_ids"])
    steps = glue.steps_of(config.task_steps, config.epochs, examples, config.task_batch)
    config = dataclasses.replace(config, steps=steps, rate=config.task_rate)
    main = score_of(config)

    def metric(tuned: nnx.Module) -> float:
        merged = weights.merge_masks(tuned)
        return glue.quality(config.task, merged, dev, raw["dev"], batch=config.task_batch)[main]

    curves: list[Curve] = []
    tickets: list[dict[str, float]] = []
    for seed in range(config.seeds):

        def tune(masked: nnx.Module, seed: int = seed) -> nnx.Module:
            options = {"key": jax.random.key(seed), "seed": seed, "loss": glue.loss}
            return sentences.trained(masked, train.data, config.task_batch, training(config), **options)

        curves += sparsity_sweep(
            model, metric, methods=("magnitude", "random"), grid=config.grid, finetune=tune, tau=config.tau,
            key=jax.random.key(seed), directory=out / f"tuned-{seed}",
        )  # fmt: skip
        tickets.append(ticket(config, model, metric, tune))
    means = averaged(curves)
    report(config, curves, means, tickets, out)
    jf.save(prune(model, sparsity=means[0].essential_sparsity).model, out / "model-essential", tokenizer=tokenizer)
    rows = [{**dataclasses.asdict(c), "essential_sparsity": c.essential_sparsity, "knee": c.knee} for c in curves]
    return {"task": config.task, "score": main, "curves": rows, "tickets": tickets}


def score_of(config: Config) -> str:
    return SCORES.get(config.task, glue.main_score(config.task))


def encoder_of(config: Config, train: Any) -> tuple[nnx.Module, Any]:
    """The encoder with a new head for the task, and its tokenizer."""
    head, key = glue.head_of(config.task, train), jax.random.key(1234)
    if config.encoder is not None:
        return common.pretrained(config.encoder, **head, key=key)
    tokenizer = train_wordpiece(glue.texts_of(train), config.vocab, max_length=config.task_length)
    labels, sizes = head.get("num_labels", 2), {"width": config.width, "layers": config.layers, "heads": 2}
    model = sentences.new_classifier(tokenizer, labels, **sizes, length=config.task_length, head=head["head"], key=key)
    return model, tokenizer


def materials(config: Config) -> tuple[nnx.Module, np.ndarray, np.ndarray]:
    """(model, token ids to calibrate and tune on, token ids to evaluate on)."""
    train, test = language.corpus(config.data, config.test)
    if config.model is not None:
        model, tokenizer = common.pretrained(config.model)
        return model, language.stream(train, tokenizer), language.stream(test, tokenizer)
    shared = common.shared_data("wikitext2_small")
    byte_lm = None if shared is None else shared.parent.parent / "oracles" / "gptq" / "trained_byte_lm"
    if config.data is None and byte_lm is not None and byte_lm.is_dir():
        ids = lambda texts: np.frombuffer("".join(texts).encode(), np.uint8).astype(np.int32)  # noqa: E731
        return jf.load(byte_lm), ids(train), ids(test)
    model, tokenizer = language.trained(
        train, vocab=config.vocab, width=config.width, layers=config.layers, heads=2, mlp=3 * config.width,
        length=config.length, steps=config.train_steps,
    )  # fmt: skip
    return model, language.stream(train, tokenizer), language.stream(test, tokenizer)


def negative_loss(model: nnx.Module, windows: np.ndarray, rows: int = 32) -> Callable[[nnx.Module], float]:
    """``metric(pruned)``: minus the mean cross-entropy in nats over the windows' predictions, compiled once."""
    apply, _ = jf.functional(model)
    loss = jax.jit(
        lambda params, ids: losses.cross_entropy(apply(params, {"input_ids": ids}).logits[:, :-1], ids[:, 1:])
    )

    def metric(pruned: nnx.Module) -> float:
        _, params = jf.functional(weights.merge_masks(pruned))
        parts = [windows[i : i + rows] for i in range(0, len(windows), rows)]
        return -float(np.average([float(loss(params, part)) for part in parts], weights=[len(p) for p in parts]))

    return metric


def next_token(apply: Any, params: Any, batch: Any, key: Any) -> tuple[jax.Array, dict[str, Any]]:
    logits = apply(params, {"input_ids": batch["input_ids"]}, rngs=key).logits
    return losses.cross_entropy(logits[:, :-1], batch["input_ids"][:, 1:]), {}


def tuner(config: Config, ids: np.ndarray, seed: int) -> Callable[[nnx.Module], nnx.Module]:
    """Fine-tuning as the paper does it: AdamW, linear decay to 0, no warm-up, no weight decay, no clipping."""

    def tune(model: nnx.Module) -> nnx.Module:
        data = batches.token_batches(ids, config.length, config.batch, seed=seed)
        return fit(next_token, model, data, training(config), key=jax.random.key(seed)).model

    return tune


def training(config: Config) -> TrainConfig:
    optim = OptimConfig(learning_rate=config.rate, schedule="linear", clip_norm=None)
    return TrainConfig(steps=config.steps, optim=optim, log_every=config.steps, progress=False)


def ticket(
    config: Config, model: nnx.Module, metric: Callable[[nnx.Module], float], tune: Callable[[nnx.Module], nnx.Module]
) -> dict[str, float]:
    """A lottery ticket against one-shot magnitude at its sparsity: similarity of the masks, quality after tuning."""
    found = lottery_ticket(model, lambda masked, i: tune(masked), rounds=config.rounds)
    once = prune(model, sparsity=found.report.sparsity)
    quality = lambda pruned: metric(tune(weights.add_masks(pruned.model, pruned.masks)))  # noqa: E731
    return {
        "sparsity": found.report.sparsity,
        "similarity": mask_similarity(found.masks, once.masks).overall,
        "ticket": quality(found),
        "one-shot": quality(once),
    }


def averaged(curves: list[Curve]) -> list[Curve]:
    """One curve per method, with and without tuning: the mean over seeds."""
    kinds = dict.fromkeys((c.method, c.finetuned) for c in curves)
    groups = [[c for c in curves if (c.method, c.finetuned) == kind] for kind in kinds]
    return [
        dataclasses.replace(group[0], metric=tuple(np.mean([c.metric for c in group], axis=0).tolist()))
        for group in groups
    ]


def report(config: Config, curves: list[Curve], means: list[Curve], tickets: list[dict[str, float]], out: Path) -> None:
    """The tables (mean and deviation over seeds) and the figure."""
    rows, shown = [], (lambda value: np.exp(-value)) if config.task is None else float
    told = "perplexity" if config.task is None else f"{config.task}, {score_of(config)}"
    for mean in means:
        own = [c for c in curves if (c.method, c.finetuned) == (mean.method, mean.finetuned)]
        at = lambda s, own=own: common.mean_std([shown(c.metric[c.sparsity.index(s)]) for c in own])  # noqa: E731
        rows.append(
            {"way": f"{mean.method}{', tuned' if mean.finetuned else ''}"}
            | {f"{s:.0%}": at(s) if s in mean.sparsity else "–" for s in config.tuned}
            | {f"ES {config.tau:g}": f"{mean.essential_sparsity:g}", "knee": f"{mean.knee:g}"}
        )
    common.table(f"{told} on held-out {'text' if config.task is None else 'rows'} by sparsity", rows)
    common.table(
        f"lottery tickets and one-shot masks, {told} after tuning",
        [
            {
                "sparsity": common.mean_std([t["sparsity"] for t in tickets]),
                "similarity": common.mean_std([t["similarity"] for t in tickets]),
                "ticket": common.mean_std([shown(t["ticket"]) for t in tickets]),
                "one-shot": common.mean_std([shown(t["one-shot"]) for t in tickets]),
            }
        ],
    )

    def draw(fig: Any) -> None:
        axis = fig.subplots()
        sparsity_curve.draw(axis, means)
        if config.task is not None:
            axis.set(ylabel=told)
            return
        low = min(c.metric[0] for c in means)
        axis.set(ylim=(low - 1.0, low + 0.1), ylabel="minus cross-entropy on held-out text, nats")

    common.figure(out / "figure.png", draw)


def step(config: Config, mesh: Any) -> Any:
    """For dry runs: a step of fine-tuning `model` under masks; of `batch` windows, or one a device where that is
    more."""
    from jaxformers.dryrun_steps import Array, config_dict, train_step

    if config.task is not None:
        raise ValueError("task: the step that is compiled is that of the language model; leave the task out")
    if config.model is None:
        raise ValueError("model: this preset trains its own; name one to prune, such as facebook/opt-125m")
    kept: list[Any] = []

    def build() -> Any:
        model = jf.init(config_dict(config.model), head="causal_lm", key=jax.random.key(0))
        whole = {path: jnp.ones(kernel.shape, bool) for path, (kernel, _) in prunable(model).items()}
        apply, params = jf.functional(weights.add_masks(model, whole))
        kept.append(constrained(apply, mesh))
        return params

    params, rows = jax.eval_shape(build), max(config.batch, mesh.size)
    ids = {"input_ids": Array((rows, config.length), jnp.int32)}
    name = f"essential_sparsity, {config.model} under masks, {rows} × {config.length:,} tokens"
    return train_step(name, next_token, kept[0], params, ids, training(config), mesh)


if __name__ == "__main__":
    common.main("essential_sparsity", PRESETS, run, step=step)
