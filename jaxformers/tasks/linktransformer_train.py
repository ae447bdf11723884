"""Training of LinkTransformer's linkage models from a labelled table (arXiv 2309.00789, section on customisation).

Three shapes of data: pairs that match (1), pairs with a label 0/1 (2), texts with a cluster id (3). Matching pairs are
edges of a graph over left and right ids; its connected components are classes, as clusters are. Losses, with z the
unit embeddings, tau the temperature and d = 1 - cosine:

    supcon              -mean_i 1/|P(i)| sum_{p in P(i)} ( z_i.z_p/tau - log sum_{a != i} exp(z_i.z_a/tau) )
    onlinecontrastive   sum over hard positives d^2 + sum over hard negatives relu(margin - d)^2      (shape 2)
    triplet             mean over a, p of one class and n of another: relu(d(a, p) - d(a, n) + margin)

Batches for supcon and triplet hold each label at least twice. The result is a directory in the sentence-transformers
layout with `LT_training_config.json` (all settings) and `LT_evaluation.json` (metrics before and after).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers import atomic, losses
from jaxformers.tasks.linktransformer_data import LabelledPairs, Split, load_splits
from jaxformers.tasks.linktransformer_data import tokenize as tokenize_bucketed
from jaxformers.tasks.linktransformer_rows import DEFAULT_MODEL, DEFAULT_SEP, as_columns

logger = logging.getLogger("jaxformers.link")

Table = Any  # a DataFrame, or the path of a .csv or .xlsx file


@dataclasses.dataclass(frozen=True)
class LinkTrainingArgs:
    """How to train and where to save; the names are those of the original package's configuration.

    `warm_up_perc` is the share of all steps over which the rate rises. `val_perc` of the classes (shape 2: of the rows)
    are held out, half of those as test set with `test_at_end`; 1 means validation on the training data.
    `val_query_prop` of a held-out cluster's texts are queries, the rest corpus; `large_val` adds the training texts as
    distractors. `eval_steps_perc` is the share of all steps between evaluations (None: before and after only).
    `interpolation` is how far the result lies on the way from the weights given to the trained ones: below 1 it is an
    average of both, which keeps more of what the encoder knew of other texts (WiSE-FT, arXiv 2109.01903, equation 1).
    `chunk` > 0 encodes a batch in chunks with the exact gradient of the whole (gradient caching). `max_length` None is
    the model's own.
    """

    model_save_dir: str = "models"
    model_save_name: str = "linkage_model"
    train_batch_size: int = 64
    num_epochs: int = 10
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    warm_up_perc: float = 0.1
    loss_type: str = "supcon"
    temperature: float = 0.07
    margin: float = 0.5
    interpolation: float = 1.0
    val_perc: float = 0.2
    val_query_prop: float = 0.5
    large_val: bool = True
    test_at_end: bool = True
    eval_steps_perc: float | None = None
    max_length: int | None = None
    chunk: int = 0
    seed: int = 42
    progress: bool = False
    opt_model_description: str | None = None
    opt_model_lang: str | None = None

    def __post_init__(self) -> None:
        if self.loss_type not in ("supcon", "onlinecontrastive", "triplet"):
            raise ValueError(f"loss_type must be supcon, onlinecontrastive or triplet, got {self.loss_type!r}")
        least = {"train_batch_size": 2, "num_epochs": 1, "chunk": 0}
        for name, low in least.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {getattr(self, name)!r}")
        if self.loss_type != "onlinecontrastive" and (self.train_batch_size < 4 or self.train_batch_size % 2):
            raise ValueError(
                f"train_batch_size must be even and >= 4 for {self.loss_type}, got {self.train_batch_size}"
            )
        for name in ("warm_up_perc", "val_perc", "val_query_prop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        for name in ("learning_rate", "temperature", "margin"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")
        if not 0 < self.interpolation <= 1:
            raise ValueError(f"interpolation must be in (0, 1], got {self.interpolation!r}")
        if self.eval_steps_perc is not None and not 0 < self.eval_steps_perc <= 1:
            raise ValueError(f"eval_steps_perc must be in (0, 1], got {self.eval_steps_perc!r}")


def train_model(
    data: Table | None = None,
    train_data: Table | None = None,
    val_data: Table | None = None,
    test_data: Table | None = None,
    model_path: Any = DEFAULT_MODEL,
    left_col_names: Sequence[str] | None = None,
    right_col_names: Sequence[str] | None = None,
    left_id_name: str | Sequence[str] | None = None,
    right_id_name: str | Sequence[str] | None = None,
    label_col_name: str | None = None,
    clus_id_col_name: str | None = None,
    clus_text_col_names: Sequence[str] | None = None,
    config_path: str | Path | None = None,
    training_args: Mapping[str, Any] | LinkTrainingArgs | None = None,
) -> str:
    """Fine-tune a sentence encoder for linkage; returns the directory of the saved model.

    Give `data` (split here) or `train_data` with optional `val_data`, `test_data`: DataFrames, or .csv or .xlsx files.
    Columns by shape: (1) `left_col_names`, `right_col_names` and optionally their ids; (2) these and
    `label_col_name` (0/1, or "same"/"different"); (3) `clus_id_col_name` and `clus_text_col_names`. `model_path`: a
    name, a directory, or a loaded model. `training_args`: fields of `LinkTrainingArgs`, over those in `config_path`
    (an LT_training_config.json). Raises ValueError before any compute: see `LinkTrainingArgs` and `load_splits`.
    """
    args = _training_args(config_path, training_args)
    if args.loss_type == "onlinecontrastive" and label_col_name is None:
        raise ValueError("loss_type onlinecontrastive needs label_col_name: pairs with labels 0 and 1")
    loaded = functools.cache(lambda: _load(model_path))
    splits = load_splits(
        data, train_data, val_data, test_data, left_col_names, right_col_names, left_id_name, right_id_name,
        label_col_name, clus_id_col_name, clus_text_col_names,
        val_perc=args.val_perc, test_at_end=args.test_at_end, val_query_prop=args.val_query_prop,
        large_val=args.large_val, seed=args.seed, positives_only=args.loss_type != "onlinecontrastive",
        sep_token=lambda: loaded()[1].sep_token or DEFAULT_SEP,
    )  # fmt: skip
    directory = Path(args.model_save_dir) / args.model_save_name
    model, tokenizer = loaded()
    trained, evaluation = fit_linkage(model, tokenizer, splits, args)

    from jaxformers import hub

    hub.save(trained, directory, tokenizer)
    settings = dataclasses.asdict(args) | {
        "base_model_path": model_path if isinstance(model_path, str) else getattr(model, "source", None),
        "left_col_names": _listed(left_col_names), "right_col_names": _listed(right_col_names),
        "left_id_name": _listed(left_id_name), "right_id_name": _listed(right_id_name),
        "label_col_name": label_col_name, "clus_id_col_name": clus_id_col_name,
        "clus_text_col_names": _listed(clus_text_col_names),
    }  # fmt: skip
    atomic.write_json_atomic(directory / "LT_training_config.json", settings)
    atomic.write_json_atomic(directory / "LT_evaluation.json", evaluation)
    return str(directory)


def fit_linkage(model: Any, tokenizer: Any, splits: Split, args: LinkTrainingArgs) -> tuple[Any, dict[str, Any]]:
    """(trained model, {"before", "after", "test", "history"}) for prepared data; `model` is left as it is."""
    from jaxformers import train
    from jaxformers.embedding import embed
    from jaxformers.functional import functional, with_params

    def encode(params: Any) -> Callable[[list[str]], np.ndarray]:
        current = with_params(model, params)
        return lambda texts: embed(current, texts, tokenizer=tokenizer, max_length=args.max_length)

    def tokenize(texts: Sequence[str]) -> dict[str, np.ndarray]:
        return tokenize_bucketed(model, tokenizer, texts, args.max_length)

    if args.loss_type == "onlinecontrastive":
        steps_per_epoch = max(1, len(splits.train) // args.train_batch_size)
        batches = pair_batches(splits.train, args.train_batch_size, args.seed, tokenize)
        objective = _pair_objective(args)
    else:
        groups = sum(len(texts) // 2 for texts in splits.train)
        steps_per_epoch = max(1, groups // (args.train_batch_size // 2))
        batches = grouped_batches(splits.train, args.train_batch_size, args.seed, tokenize)
        objective = group_objective(args)
    steps = args.num_epochs * steps_per_epoch
    # a share of exactly 1 means that the rate rises to the last step
    warmup = steps if args.warm_up_perc == 1 else args.warm_up_perc
    config = train.TrainConfig(
        steps=steps,
        optim=train.OptimConfig(
            learning_rate=args.learning_rate, weight_decay=args.weight_decay, schedule="linear", warmup=warmup
        ),
        eval_every=max(1, round(args.eval_steps_perc * steps)) if args.eval_steps_perc and splits.val else 0,
        progress=args.progress,
    )

    def evaluate(params: Any, step: int) -> Mapping[str, float]:
        return {f"eval_{name}": value for name, value in splits.val.score(encode(params)).items()}

    start = functional(model)[1]
    evaluation: dict[str, Any] = {"before": splits.val.score(encode(start)) if splits.val else None}
    result = train.fit(
        objective, model, batches, config, key=jax.random.key(args.seed), evaluate=evaluate if splits.val else None
    )
    params, trained = result.params, result.model
    after = {name: result.last(f"eval_{name}") for name in evaluation["before"] or ()}  # `fit` evaluates at the end
    if args.interpolation < 1:
        share = args.interpolation
        params = jax.tree.map(lambda a, b: ((1 - share) * a + share * b).astype(a.dtype), start, params)
        trained = with_params(model, params)
        after = splits.val.score(encode(params)) if splits.val else None
    evaluation["after"] = after or None
    evaluation["test"] = splits.test.score(encode(params)) if splits.test else None
    evaluation["history"] = result.history
    logger.info("linkage training: before %s, after %s", evaluation["before"], evaluation["after"])
    return trained, evaluation


# ------------------------------------------------------------------------------------------------- batches and losses


def grouped_batches(
    classes: Sequence[Sequence[str]], batch_size: int, seed: int, tokenize: Callable
) -> Iterator[dict[str, Any]]:
    """Endless batches {inputs, labels} in which every label occurs at least twice.

    Each epoch shuffles every class, cuts it into couples (of an odd class one text waits for another epoch), shuffles
    the couples and fills batches; couples that fill no batch wait as well.
    """
    from jaxformers.data.batches import own_rows

    rng = np.random.default_rng(seed)
    while True:
        couples = []
        for label, texts in enumerate(classes):
            order = rng.permutation(len(texts))
            couples += [(label, texts[i], texts[j]) for i, j in zip(order[::2], order[1::2], strict=False)]
        couples = [couples[i] for i in rng.permutation(len(couples))]
        per_batch = min(batch_size // 2, len(couples))
        for start in range(0, len(couples) - per_batch + 1, per_batch):
            part = couples[start : start + per_batch]
            labels = np.array([c[0] for c in part for _ in range(2)], np.int32)
            yield own_rows({"inputs": tokenize([text for c in part for text in c[1:]]), "labels": labels})


def pair_batches(pairs: LabelledPairs, batch_size: int, seed: int, tokenize: Callable) -> Iterator[dict[str, Any]]:
    """Endless batches {left, right, labels} of pairs, shuffled anew each epoch."""
    from jaxformers.data.batches import own_rows

    rng = np.random.default_rng(seed)
    size = min(batch_size, len(pairs))
    while True:
        order = rng.permutation(len(pairs))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            left, right = ([side[i] for i in rows] for side in (pairs.left, pairs.right))
            labels = np.array([pairs.labels[i] for i in rows], np.int32)
            yield own_rows({"left": tokenize(left), "right": tokenize(right), "labels": labels})


def triplet_loss(features: jax.Array, labels: jax.Array, margin: float = 0.5) -> jax.Array:
    """Mean over all (a, p, n), p of a's label and n of another, of relu(d(a, p) - d(a, n) + margin), d = 1 - cosine.

    features (rows, width), labels (rows,) -> scalar; 0 when the batch holds no such triple.
    """
    z = losses.normalize(features.astype(jnp.float32))
    d = 1 - jnp.matmul(z, z.T, precision="highest")
    same = labels[:, None] == labels[None]
    positive = same & ~jnp.eye(len(labels), dtype=bool)
    valid = positive[:, :, None] & ~same[:, None, :]
    hinge = jax.nn.relu(d[:, :, None] - d[:, None, :] + margin)
    return jnp.sum(jnp.where(valid, hinge, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def group_objective(args: LinkTrainingArgs) -> Callable:
    """The objective, for `fit`, of batches {inputs, labels} (rows): supervised contrast or triplets."""

    def objective(apply, params, batch, key):
        z = _embeddings(apply, args.chunk)(params, batch["inputs"], key)
        if args.loss_type == "supcon":
            loss = losses.supcon_loss(z, batch["labels"], temperature=args.temperature, eps=0.0)
        else:
            loss = triplet_loss(z, batch["labels"], args.margin)
        return loss, {}

    return objective


def _pair_objective(args: LinkTrainingArgs) -> Callable:
    def objective(apply, params, batch, key):
        keys = (None, None) if key is None else jax.random.split(key)
        encode = _embeddings(apply, args.chunk)
        u, v = (encode(params, batch[side], k) for side, k in zip(("left", "right"), keys, strict=True))
        return losses.online_contrastive_loss(u, v, batch["labels"], margin=args.margin), {}

    return objective


def _embeddings(apply: Callable, chunk: int) -> Callable:
    """encode(params, inputs, key) -> (rows, width), in chunks with the exact gradient where chunk > 0."""

    def encode(params, inputs, key):
        return apply(params, inputs, rngs=key).pooled

    def encode_in_chunks(params, inputs, key):
        from jaxformers.train.gradient_cache import gradient_cache

        return gradient_cache(encode, min(chunk, len(inputs["input_ids"])))(params, inputs, key)

    return encode_in_chunks if chunk else encode


# ------------------------------------------------------------------------------------------------------------ private


def _training_args(config_path: Any, given: Any) -> LinkTrainingArgs:
    if isinstance(given, LinkTrainingArgs):
        if config_path is not None:
            raise ValueError("config_path: training_args is complete already; give one of the two")
        return given
    known = {field.name for field in dataclasses.fields(LinkTrainingArgs)}
    # what a saved LT_training_config.json tells beside the settings
    told = {"base_model_path", "left_col_names", "right_col_names", "left_id_name", "right_id_name", "label_col_name",
            "clus_id_col_name", "clus_text_col_names"}  # fmt: skip
    values: dict[str, Any] = {}
    if config_path is not None:
        path = Path(config_path)
        if not path.is_file():
            raise ValueError(f"config_path: there is no file {path}")
        values = {k: v for k, v in json.loads(path.read_text("utf-8")).items() if k not in told}
    values |= dict(given or {})
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"training_args: unknown {unknown}; known are {sorted(known)}")
    return LinkTrainingArgs(**values)


def _load(model: Any) -> tuple[Any, Any]:
    """(model with a sentence head, tokenizer)."""
    from flax import nnx

    from jaxformers import hub, nn, surgery
    from jaxformers.data.tokenizers import load_tokenizer

    if not isinstance(model, nnx.Module):
        model = hub.load(model, head="sentence")
    if model.source is None:
        raise ValueError("model_path: the model has no directory to read its tokenizer from; save it first")
    if model.head_name != "sentence":
        model = nn.new_sentence_head(surgery.copy(model), pooling="mean", rngs=nnx.Rngs(0))
    return model, load_tokenizer(model.source)


def _listed(columns: Any) -> list | None:
    return None if columns is None else as_columns("columns", columns)
