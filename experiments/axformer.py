"""AxFormer: does taking parts out of a fine-tuned classifier by its validation loss make it better, and smaller?

A BERT is trained on labelled sentences until it over-fits, once a seed; the search runs on validation sentences, and
the test sentences, which nothing has seen, say what it is worth: the model as trained, the specialised one, and one
trained anew with the structure that was found.

    python -m experiments.axformer                 # small: minutes on two CPU cores, three seeds
    python -m experiments.axformer paper --model google-bert/bert-base-cased --data rte/

Data: `--data` a directory with train, val and test (.jsonl, .csv or .tsv, .gz allowed) of columns text (and text2 for
pairs) and label (default: sentiment_sentences beside the repository, else: from which package of the standard library
is this line of code?).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxformers as jf
from experiments import common, sentences
from experiments.sentences import Texts
from jaxformers.compress import axformer
from jaxformers.compress.axformer_report import Row, report
from jaxformers.data.batches import array_batches
from jaxformers.data.tokenizers import Tokenizer, train_wordpiece
from jaxformers.train import OptimConfig, TrainConfig

PACKAGES = ("asyncio", "email", "xml", "multiprocessing")  # where there are no sentences


@dataclasses.dataclass(frozen=True)
class Config:
    """`model`: a checkpoint to fine-tune; None trains a BERT of the sizes below from nothing. `group`: neurons that are
    removed together; `k`: keys that hard attention keeps. `rows`: at most so many sentences of each part."""

    data: Path | None = None
    model: str | None = None
    vocab: int = 3000
    width: int = 64
    layers: int = 4
    heads: int = 4
    length: int = 32
    steps: int = 300
    batch: int = 32
    rate: float = 1e-3
    dropout: float = 0.1
    k: int = 10
    group: int = 64
    elements: tuple[str, ...] = axformer.ELEMENTS
    budget: int | None = None
    rows: int | None = None
    seeds: int = 3


PRESETS = {
    "smoke": Config(vocab=300, width=16, layers=1, heads=2, steps=4, group=32, rows=48, budget=5, seeds=1),
    "small": Config(),
    "paper": Config(model="google-bert/bert-base-cased", length=128, steps=200, rate=2e-5, k=30, group=256),
}


def run(config: Config, out: Path) -> dict[str, Any]:
    """Three rows a seed; written to `metrics.jsonl` as they come, with the log of each search beside."""
    texts = sentences.parted_texts(config.data, config.rows, PACKAGES)
    rows: list[dict[str, Any]] = []
    found = []
    for seed in range(config.seeds):
        start, tokenizer = beginning(config, texts, seed)
        data = {part: sentences.encoded(tokenizer, texts[part], config.length, padded=False) for part in texts}
        key = jax.random.key(seed)
        model = sentences.trained(start, data["train"], config.batch, training(config), key=key, seed=seed)
        special = axformer.specialise(
            model, data["val"], test=data["test"], elements=config.elements, k=config.k, group_size=config.group,
            budget=config.budget, log=out / f"search-{seed}.jsonl",
        )  # fmt: skip
        same = array_batches(data["train"], config.batch, seed=seed)
        again = axformer.retrain(start, special.structure, same, training(config), key=key).model
        told = report(model, special.model, data["val"], data["test"])
        anew = report(model, again, data["val"], data["test"], repeats=1).after
        for way, row in (("trained", told.before), ("specialised", told.after), ("trained anew", anew)):
            common.record(out, rows, {"seed": seed, "way": way, **flat(row)})
        found.append({"seed": seed, "evaluations": special.evaluations, "structure": special.structure.to_json(),
                      "constant": special.constant})  # fmt: skip
        special.structure.save(out / f"structure-{seed}.json")
    jf.save(special.model, out / "model", tokenizer=tokenizer)
    show(rows)
    common.figure(out / "figure.png", lambda fig: draw(fig, rows), size=(8, 2.4))
    return {"rows": rows, "searches": found}


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
    labels = int(max(y.max() for _, y in texts.values())) + 1
    key = jax.random.key(seed)
    if config.model is not None:
        return common.pretrained(config.model, head="sequence_classification", key=key, num_labels=labels)
    plain = [t for item in texts["train"][0] for t in ([item] if isinstance(item, str) else item)]
    tokenizer = train_wordpiece(plain, config.vocab, max_length=config.length)
    sizes = {name: getattr(config, name) for name in ("width", "layers", "heads", "length", "dropout")}
    return sentences.new_classifier(tokenizer, labels, **sizes, key=key), tokenizer


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
    kept: list[Any] = []

    def build() -> Any:
        model = jf.init(config_dict(config.model), head="sequence_classification", key=jax.random.key(0))
        kept.extend((axformer.candidate(model, config.k), Structure.whole(model, config.k, config.group)))
        return jf.functional(model)[1]

    params = jax.eval_shape(build)
    run, structure = kept
    hard = {f"layers.{i}.attention.probs": Array((), bool) for i in range(len(structure.heads))}
    masks = jax.tree.map(lambda mask: Array(np.shape(mask), np.float32), masks_of(structure))
    ids, labels = Array((128, config.length), np.int32), Array((128,), np.int32)
    batch = spread({"input_ids": ids, "attention_mask": ids, "labels": labels}, mesh)
    args = (replicated(params, mesh), batch, replicated(masks, mesh), replicated(hard, mesh))
    name = f"axformer, a candidate structure of {config.model} on 128 × {config.length} tokens"
    return Step(name, run, args, parameters=size(params))


if __name__ == "__main__":
    common.main("axformer", PRESETS, run, step=step)
