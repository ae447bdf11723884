"""AxFormer: does taking parts out of a fine-tuned classifier by its validation loss make it better, and smaller?

A BERT is trained on labelled sentences until it over-fits, once a seed; the search runs on validation sentences, and
the test sentences, which nothing has seen, say what it is worth: the model as trained, the specialised one, and one
trained anew with the structure that was found.

    python -m experiments.axformer                 # small: minutes on two CPU cores, three seeds
    python -m experiments.axformer paper --task cola --data GLUE/CoLA
    python -m experiments.axformer paper --task squad --data squad/              # train-v1.1.json and dev-v1.1.json

Data: with a `--task` of GLUE, or squad, its directory, where a part of the training set is for the search and the
development set reports; without one a directory with train, val and test (.jsonl, .csv or .tsv, .gz allowed) of columns
text (and text2 for pairs) and label (default: sentiment_sentences beside the repository, else: from which package of
the standard library is this line of code?).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxformers as jf
from experiments import common, glue, sentences
from experiments.sentences import Texts
from jaxformers.compress import axformer
from jaxformers.compress.axformer_report import Row, report
from jaxformers.data.batches import array_batches
from jaxformers.data.glue import TASKS as GLUE
from jaxformers.data.tokenizers import Tokenizer, train_wordpiece
from jaxformers.train import OptimConfig, TrainConfig

PACKAGES = ("asyncio", "email", "xml", "multiprocessing")  # where there are no sentences


@dataclasses.dataclass(frozen=True)
class Config:
    """`model`: a checkpoint to fine-tune; None trains a BERT of the sizes below from nothing. `group`: neurons that are
    removed together; `k`: keys that hard attention keeps. `rows`: at most so many sentences of each part. `epochs`:
    where `steps` is None. `length` and `rate` None: the paper's for the `task`."""

    task: str | None = None
    data: Path | None = None
    model: str | None = None
    vocab: int = 3000
    width: int = 64
    layers: int = 4
    heads: int = 4
    length: int | None = 32
    steps: int | None = 300
    epochs: int = 3
    batch: int = 32
    rate: float | None = 1e-3
    dropout: float = 0.1
    k: int = 10
    group: int = 64
    elements: tuple[str, ...] = axformer.ELEMENTS
    budget: int | None = None
    rows: int | None = None
    seeds: int = 3


# The paper fine-tunes every task of GLUE alike, and does not say how it does SQuAD: these are BERT's usual settings.
TASKS = {task: {"length": 128, "rate": 2e-5} for task in GLUE} | {"squad": {"length": 384, "rate": 3e-5}}
HELD_OUT = {"wnli": 0.18}  # of the training set, for the search; else 0.15
PRESETS = {
    "smoke": Config(vocab=300, width=16, layers=1, heads=2, steps=4, group=32, rows=48, budget=5, seeds=1),
    "small": Config(),
    "paper": Config(
        task="rte", model="google-bert/bert-base-cased", length=None, steps=None, rate=None, k=30, group=256
    ),
}


def run(config: Config, out: Path) -> dict[str, Any]:
    """Three rows a seed; written to `metrics.jsonl` as they come, with the log of each search beside."""
    texts = parts(config, out)
    config = settled(config, texts["train"])
    rows: list[dict[str, Any]] = []
    found = []
    for seed in range(config.seeds):
        start, tokenizer = beginning(config, texts, seed)
        given = {part: glue.rows(config.task, tokenizer, texts[part], config.length, padded=False) for part in texts}
        data, key = {part: rows_.data for part, rows_ in given.items()}, jax.random.key(seed)
        loss = glue.loss_of(config.task)
        model = sentences.trained(start, data["train"], config.batch, training(config), key=key, seed=seed, loss=loss)
        special = axformer.specialise(
            model, data["val"], test=data["test"], elements=config.elements, k=config.k, group_size=config.group,
            budget=config.budget, log=out / f"search-{seed}.jsonl",
        )  # fmt: skip
        same = array_batches(data["train"], config.batch, seed=seed)
        again = axformer.retrain(start, special.structure, same, training(config), key=key).model
        told = report(model, special.model, data["val"], data["test"])
        anew = report(model, again, data["val"], data["test"], repeats=1).after
        models = {"trained": model, "specialised": special.model, "trained anew": again}
        for (way, one), row in zip(models.items(), (told.before, told.after, anew), strict=True):
            common.record(out, rows, {"seed": seed, "way": way, **flat(row), **scores(config, one, given, texts)})
        found.append({"seed": seed, "evaluations": special.evaluations, "structure": special.structure.to_json(),
                      "constant": special.constant})  # fmt: skip
        special.structure.save(out / f"structure-{seed}.json")
    jf.save(special.model, out / "model", tokenizer=tokenizer)
    show(rows)
    common.figure(out / "figure.png", lambda fig: draw(fig, rows), size=(8, 2.4))
    return {"rows": rows, "searches": found}


def parts(config: Config, out: Path) -> dict[str, Any]:
    """What is to be trained, searched and reported on."""
    if config.task is None:
        return sentences.parted_texts(config.data, config.rows, PACKAGES)
    held_out = HELD_OUT.get(config.task, 0.15)
    return glue.read(config.data, config.task, sentences.PARTS, config.rows, held_out=held_out, out=out)


def settled(config: Config, train: Any) -> Config:
    """``config`` with its task's settings, and its steps counted over the training rows."""
    config = glue.filled(config, TASKS, ("length", "rate"))
    rows = len(train) if isinstance(train, list) else len(train[1])
    return dataclasses.replace(config, steps=glue.steps_of(config.steps, config.epochs, rows, config.batch))


def scores(config: Config, model: nnx.Module, given: dict[str, glue.Rows], texts: dict[str, Any]) -> dict[str, float]:
    """The task's own scores; none without a task, whose accuracy `flat` tells."""
    found = {}
    for name, part in (("validation", "val"), ("test", "test")) if config.task is not None else ():
        own = glue.quality(config.task, model, given[part], texts[part], batch=128)
        found |= {f"{name} {score}": value for score, value in own.items()}
    return found


def flat(row: Row) -> dict[str, float]:
    return {
        "validation loss": row.validation_loss, "test loss": row.test_loss,
        "validation accuracy": row.validation_metric, "test accuracy": row.test_metric,
        "parameters": row.cost.parameters, "MMACs a sentence": row.cost.macs / row.latency.batch / 1e6,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """The table: mean and deviation over seeds."""
    ways, columns = dict.fromkeys(r["way"] for r in rows), [c for c in rows[0] if c not in ("seed", "way")]
    of = lambda way, column: common.mean_std(r[column] for r in rows if r["way"] == way)
    common.table("as trained, and by AxFormer", [{"way": w, **{c: of(w, c) for c in columns}} for w in ways])


def draw(fig: Any, rows: list[dict[str, Any]]) -> None:
    for axis, column in zip(fig.subplots(1, 2), ("validation loss", "test loss"), strict=True):
        ways = dict.fromkeys(r["way"] for r in rows)
        common.bars(axis, {way: [r[column] for r in rows if r["way"] == way] for way in ways}, column)


def beginning(config: Config, texts: dict[str, Texts], seed: int) -> tuple[nnx.Module, Tokenizer]:
    """The model before it is fine-tuned, and its tokenizer."""
    head, key = glue.head_of(config.task, texts["train"]), jax.random.key(seed)
    if config.task is None:
        head["num_labels"] = int(max(y.max() for _, y in texts.values())) + 1
    if config.model is not None:
        return common.pretrained(config.model, **head, key=key)
    tokenizer = train_wordpiece(glue.texts_of(texts["train"]), config.vocab, max_length=config.length)
    sizes = {name: getattr(config, name) for name in ("width", "layers", "heads", "length", "dropout")}
    labels = head.get("num_labels", 2)
    return sentences.new_classifier(tokenizer, labels, **sizes, head=head["head"], key=key), tokenizer


def training(config: Config) -> TrainConfig:
    optim = OptimConfig(learning_rate=config.rate, schedule="linear")
    return TrainConfig(steps=config.steps, optim=optim, log_every=max(1, config.steps // 10))


def step(config: Config, mesh: Any) -> Any:
    """For dry runs: one evaluation of a candidate on a batch of 128 validation sentences, spread over the mesh."""
    from jaxformers.compress.axformer_structure import Structure, masks_of
    from jaxformers.dryrun import Step
    from jaxformers.dryrun_steps import Array, config_dict, replicated, size, spread

    if config.model is None:
        raise ValueError("model: this preset trains its own; name one, such as google-bert/bert-base-cased")
    config = glue.filled(config, TASKS, ("length",))
    span = glue.is_span(config.task)
    head = "question_answering" if span else "sequence_classification"
    kept: list[Any] = []

    def build() -> Any:
        model = jf.init(config_dict(config.model), head=head, key=jax.random.key(0))
        kept.extend((axformer.candidate(model, config.k), Structure.whole(model, config.k, config.group)))
        return jf.functional(model)[1]

    params = jax.eval_shape(build)
    run, structure = kept
    hard = {f"layers.{i}.attention.probs": Array((), bool) for i in range(len(structure.heads))}
    masks = jax.tree.map(lambda mask: Array(np.shape(mask), np.float32), masks_of(structure))
    ids, labels = Array((128, config.length), np.int32), Array((128,), np.int32)
    targets = ("start_positions", "end_positions") if span else ("labels",)
    batch = spread({"input_ids": ids, "attention_mask": ids, **dict.fromkeys(targets, labels)}, mesh)
    args = (replicated(params, mesh), batch, replicated(masks, mesh), replicated(hard, mesh))
    name = f"axformer, a candidate structure of {config.model} on 128 × {config.length} tokens"
    return Step(name, run, args, parameters=size(params))


if __name__ == "__main__":
    common.main("axformer", PRESETS, run, step=step)
